"""What Dynamo makes of the model and of an update, which a GPU runs compiled: graphs without a break, each compiled
once, with the bits of their operators one by one."""

import pytest
import torch
from conftest import DEVICE, one_process
from torch import nn
from torch._dynamo.utils import counters

import aurora
from aurora import Aurora, advance_
from harness.ranks import Place
from kernels import cross_entropy, mlp, norm, qkv
from train_gpt import GPT, accumulate_gradients, fill, initial_weights, make_banks, override, validation_loss


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """How many Dynamo has made; and it has broken none."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_the_model_is_one_graph_and_another_to_validate(monkeypatch):
    """Kills: a construct that breaks the graph, or for which a later micro-batch or trial compiles again: on a GPU
    quietly and slowly; a gradient that the compiled model alone gets wrong, as of an operator that says less than it
    writes to.

    On the kernels' path, by the trainer's own functions. The weights of the second trial lie elsewhere.
    """
    for module in (cross_entropy, mlp, norm, qkv):
        monkeypatch.setattr(module, "runs_kernels", torch.compiler.assume_constant_result(lambda device: True))
    monkeypatch.setattr(cross_entropy, "rows_at_once", torch.compiler.assume_constant_result(lambda device, size: 5))
    hp = override(["num_layers=2", "model_dim=32", "head_dim=16", "vocab_size=300", "mlp_expansion=2",
                   "sequence_length=4", "batch_tokens=16", "val_tokens=16", "micro_batch=2"])
    tokens = torch.randint(300, (4, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = tokens[:, :-1].int().contiguous(), tokens[:, 1:].contiguous()
    models = eager, compiled = GPT(hp).to(DEVICE), GPT(hp).to(DEVICE)
    compiled.compile(dynamic=False, backend="aot_eager")

    def trial(model, seed):
        generator = torch.Generator().manual_seed(seed)
        banks = make_banks(model, hp, Place(0, 1, DEVICE))
        values = initial_weights(model, seed)  # many are zero, which makes gradients zero
        fill(banks, {name: value + torch.randn(value.shape, generator=generator) / 8 for name, value in values.items()})
        losses = validation_loss(model, *batch, hp), accumulate_gradients(model, banks, batch, hp).item()
        return losses, [bank.gradients for bank in banks]

    with one_process():
        for seed in range(2):
            (losses, gradients), (same_losses, same_gradients) = (trial(model, seed) for model in models)
            assert graphs() == 2
            assert losses == same_losses
            assert all(g.any() and torch.equal(g, same) for g, same in zip(gradients, same_gradients, strict=True))


# the record's, one with a second moment, one that stays in fp32
@pytest.mark.parametrize("direction", ["aurora", "normuon_lite", "aurora_july"])
def test_an_update_is_one_graph_a_shape(direction, monkeypatch):
    """Kills: a construct that breaks the graph, a number of a schedule or of the steps so far that is a constant of the
    graph, so that each step compiles again; a number of a trial, for which the next one does.

    By class Aurora, whose stacks of three shapes are updated in one call each.
    """
    def trial(advance):
        monkeypatch.setattr(aurora, "advance_", advance)
        stacks = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
                  for shape in ((3, 16, 16), (2, 24, 8), (2, 8, 24))]
        numbers = {name: torch.tensor(x) for name, x in dict(lr=0.0, weight_decay=0.1, mu=0.95).items()}  # as on a GPU
        optimizer = Aurora(stacks, direction=direction, **numbers)
        made = []
        for step in range(3):
            numbers["lr"].fill_(0.02 / (1 + step))
            for p in stacks:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            made.append(graphs())
        return made, [p.detach() for p in stacks] + [x for p in stacks for x in optimizer.state[p].values()]

    compiled = torch.compile(advance_, dynamic=False, backend="aot_eager")
    (none, eager), (made, first), (again, second) = map(trial, (advance_, compiled, compiled))
    assert (none, made, again) == ([0] * 3, [3] * 3, [3] * 3)
    for trained in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(eager, trained, strict=True))
