"""--neurons K looks at the MLPs' neurons every K steps, for `python -m records neurons`. No result changes, and the
other steps cost nothing. Neuron i is row i of fc and, where there is one, of the gate."""

import torch
import torch.distributed as dist
from torch import Tensor

from aurora import leverage_scores
from harness.ranks import Place


def owned_neurons(banks: list) -> dict[str, tuple]:
    """{name of a weight (neurons, model_dim): its bank and its index there} of those that this rank owns."""
    return {name: (bank, i) for bank in banks for i, name in enumerate(bank.slots[bank.shares.mine])
            if name.endswith(("mlp.fc.weight", "mlp.gate.weight"))}


@torch.no_grad()
def neuron_rows(bank, i: int, before: Tensor) -> dict[str, list[float]]:
    """Leverage scores of the momentum (the first state that the rule keeps), and row norms: of the momentum, of the
    gradient of the batch's summed loss, and of this step's change of the weights, its learning rate, decay and floor
    included."""
    momentum = next(iter(bank.state.values()))[i]
    rows = dict(leverage=leverage_scores(momentum), momentum=momentum.norm(dim=1),
                gradient=bank.gradients[bank.shares.mine][i].norm(dim=1),
                update=(bank.masters[i] - before).norm(dim=1))
    return {name: [float(f"{x:.4g}") for x in values.tolist()] for name, values in rows.items()}


def record_neurons(banks: list, before: dict[str, Tensor], seed: int, step: int, place: Place, log):
    """Collective: what each matrix's owner knows of its neurons goes to rank 0's RunLog, a line a matrix."""
    mine = {name: neuron_rows(bank, i, before[name]) | dict(inputs=bank.masters.size(-1))
            for name, (bank, i) in owned_neurons(banks).items()}
    shares = [None] * place.world if place.rank == 0 else None
    dist.gather_object(mine, shares)
    if place.rank == 0:
        rows = [(int(name.split(".")[1]), name.split(".")[3], values) for share in shares
                for name, values in share.items()]
        log.record_neurons([dict(seed=seed, step=step, layer=layer, matrix=matrix, **values)
                            for layer, matrix, values in sorted(rows, key=lambda row: row[:2])])
