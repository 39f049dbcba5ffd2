"""Aurora for a model that torch.distributed.fsdp.fully_shard (FSDP2) has cut: each rank has some rows of each matrix.

A polar factor needs whole matrices. So in a step the rows of weight, gradient and state travel to the rank that owns
the matrix, and the new rows of weight and state travel back: one shape of matrices after the other, an equal share of
them to each rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

from aurora import Aurora, Shares, check_parameter, expected_state, update_
from rules import Rule


class ShardedAurora(Aurora):
    """Aurora, with its arguments, groups and update rules, for matrices that fully_shard has cut into runs of rows.

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]  # after fully_shard, which makes new ones
        optimizer = ShardedAurora(matrices, lr=0.02)

    Vectors and embeddings go to torch.optim.AdamW, which takes them as they are. examples/fsdp2.py is a whole loop.

    From equal gradients weights and state are, bit for bit, those of Aurora on as many ranks as cut a matrix.
    (fully_shard's mean over ranks rounds gradients, unless their number is a power of 2.) A mesh of two dimensions
    (HSDP) may repeat the rows; tensor parallelism, which cuts a matrix twice, and offloading are refused.

    State is cut as its parameter is, and there from the start: torch.distributed.checkpoint saves it on one number of
    ranks and loads it on another. load_state_dict() takes Aurora's state, too. `process_group`: the ranks that have
    the same parameters, such as those of one stage of a pipeline; by default all.
    """

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if isinstance(p, DTensor):  # not yet where accelerate makes the optimizer before it cuts the model
                self.state[p] = state_of(p, self.param_groups[-1]["update"])

    def _check(self, p: Tensor):
        check_parameter(p)
        if not isinstance(p, DTensor):
            return
        if [x for x in p.placements if not x.is_replicate()] != [Shard(0)]:
            raise ValueError(f"ShardedAurora updates matrices of which each rank has some rows, as fully_shard cuts "
                             f"them, not one of shape {tuple(p.shape)} that is cut by {p.placements}")
        if p.device.type != p.device_mesh.device_type:
            raise ValueError(f"ShardedAurora got a matrix of shape {tuple(p.shape)} on {p.device.type}, of a mesh of "
                             f"{p.device_mesh.device_type}: give it the model after to_empty(), and without offloading")

    def _checksum(self, p: Tensor) -> int:
        return 0  # each rank has other rows: there is nothing to compare

    def _owners(self) -> dict[Tensor, None]:
        return {p: None for group in self.param_groups for p in group["params"] if p.numel()}

    def _moving(self) -> set[Tensor]:
        for p, name in self._names().items():
            if not isinstance(p, DTensor):
                raise ValueError(f"{name} is whole on this rank: ShardedAurora takes what fully_shard has cut, so call "
                                 "fully_shard before, or use Aurora")
        return super()._moving()

    def _advance(self, moving: set[Tensor]):
        for group in self.param_groups:
            alike = {}  # in one order on all ranks, as collectives need: no set
            for p in group["params"]:
                if p in moving:
                    kind = p.shape, p.dtype, p.device_mesh, p.placements, self._steps(p)
                    alike.setdefault(kind, []).append(p)
            for (*_, mesh, placements, steps), params in alike.items():
                shares = Shares.of(len(params), group=mesh.get_group(placements.index(Shard(0))))
                self._update_rows(params, shares, steps, group)

    def _update_rows(self, params: list[DTensor], shares: Shares, steps: int, group: dict):
        """Move matrices of one shape, each after `steps` steps."""
        rule = Rule.of(group["update"])
        for p in params:
            self.state[p] = self.state.get(p) or state_of(p, rule.text)
        states = {name: [self.state[p][name] for p in params] for name in rule.keeps}
        W = to_owners(shares, params)
        G = to_owners(shares, [cut_as(p, p.grad) for p in params])
        state = {name: to_owners(shares, rows) for name, rows in states.items()}
        if len(W):
            update_(rule, W, G, state, group["lr"], steps)
        from_owners_(shares, params, W)
        for name, rows in states.items():
            from_owners_(shares, rows, state[name])

    def _take(self, states: dict[Tensor, dict]):
        super()._take(states)
        for p, state in self.state.items():
            if isinstance(p, DTensor):
                self.state[p] = {name: cut_as(p, x) if isinstance(x, Tensor) else x for name, x in state.items()}

    def consolidate_state_dict(self, to: int | None = 0):
        """Nothing: state_dict() has this rank's rows, which is what torch.distributed.checkpoint takes."""


def state_of(p: DTensor, update: str) -> dict:
    """What a rule keeps of a parameter that has not moved."""
    dtype = Rule.of(update).dtype(p)
    return dict(step=0) | {name: zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements)
                           for name, shape in expected_state(update, p).items()}


def cut_as(p: DTensor, x: Tensor) -> DTensor:
    """x, of which each rank gets the rows that it has of p."""
    if isinstance(x, DTensor):
        return x.redistribute(p.device_mesh, p.placements)
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)  # all ranks have it


# fully_shard cuts m rows as torch.chunk does: ceil(m / world) for each rank until there are no more. Padded to that
# number, the rows of a matrix stand one after the other in what its owner gets, and the padding behind them.

def to_owners(shares: Shares, tensors: list[DTensor]) -> Tensor:
    """A collective: of matrices of one shape those that this rank owns, (its slots, m, n)."""
    m, n = tensors[0].shape
    mine = torch.stack([x.to_local() for x in tensors])
    rows = mine.new_zeros(shares.padded, -(-m // shares.world), n)
    rows[:shares.count, :mine.size(1)] = mine
    whole = torch.empty_like(rows)
    dist.all_to_all_single(whole, rows, group=shares.group)
    whole = whole.unflatten(0, (shares.world, shares.share)).transpose(0, 1).flatten(1, 2)
    return whole[:len(tensors[shares.mine]), :m].contiguous()


def from_owners_(shares: Shares, tensors: list[DTensor], whole: Tensor):
    """A collective: put this rank's rows of what to_owners() gave each rank into `tensors`."""
    m, n = tensors[0].shape
    padded = whole.new_zeros(shares.share, shares.world, -(-m // shares.world), n)
    padded.flatten(1, 2)[:len(whole), :m] = whole
    parts = padded.transpose(0, 1).flatten(0, 1)
    rows = torch.empty_like(parts)
    dist.all_to_all_single(rows, parts, group=shares.group)
    mine = [x.to_local() for x in tensors]
    torch._foreach_copy_(mine, list(rows[:shares.count, :len(mine[0])]))
