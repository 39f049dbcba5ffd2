"""Banks: an update is the same for every number of ranks, and can be held by a CUDA graph."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import one_process
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from aurora import DIRECTIONS, Aurora
from train_gpt import GPT, Place, Replayed, fill, initial_weights, make_banks, override, update

CPU = torch.device("cpu")
# 3 blocks: 12 squares, 3 tall and 3 wide matrices; of the tall ones 4 ranks own 1, 1, 1 and none
SHAPE = ["num_layers=3", "model_dim=16", "head_dim=8", "vocab_size=64"]


def gradients(bank, step: int):
    """Four parts, which the ranks share; whole numbers, whose sum is exact in any order."""
    shape = bank.gradients[:bank.count].shape
    return torch.randint(-9, 10, (4, *shape), generator=torch.Generator().manual_seed(step)).float()


def train(words: list[str], saved: list | None = None, first: int = 0, last: int = 3):
    """The weights and the state after steps on gradients that the ranks have parts of."""
    hp, place = override([*SHAPE, *words]), Place(dist.get_rank(), dist.get_world_size(), CPU)
    model = GPT(hp)
    banks = make_banks(model, hp, place)
    fill(banks, initial_weights(model, 0))
    for bank, state in zip(banks, saved or []):
        bank.load(state)
    for step in range(first, last):
        for bank in banks:
            parts = gradients(bank, step).chunk(place.world)[place.rank]
            bank.gradients[:bank.count] = parts.sum(0)
            bank.reduce()
        update(banks, 0.5)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, [
        {name: x.clone() for name, x in bank.state().items()} for bank in banks]


def share(saved):
    return {direction: (*train([f"direction={direction}"]), train([f"direction={direction}"], saved[direction], 2)[0])
            for direction in saved}


def one_of_several(rank: int, world: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(share(torch.load(f"{folder}/saved.pt", weights_only=True)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    """What one process has after 3 steps, and after 2."""
    with one_process():
        saved = {d: train([f"direction={d}"], last=2)[1] for d in ("aurora", "normuon", "adamw")}
        return saved, share(saved)


@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_ranks_gives_the_same_bits(alone, world, tmp_path):
    """Kills: a rank that owns nothing and waits, a slot owned twice or by nobody, padding that reaches a parameter, a
    master that another rank needs, a gradient that is not summed or summed twice, weights that are not gathered, a
    state that lacks a rank's share or that only the same number of ranks can load, q and k updated as one matrix."""
    saved, one = alone
    torch.save(saved, tmp_path / "saved.pt")
    mp.spawn(one_of_several, (world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        several = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for direction, (weights, states, resumed) in one.items():
            for a, b in ((weights, several[direction][0]), (resumed, several[direction][2])):
                assert all(torch.equal(a[name], b[name]) for name in weights)
            for state, other in zip(states if rank == 0 else [], several[direction][1]):
                assert state.keys() == other.keys()
                assert all(torch.equal(x, other[name]) for name, x in state.items()), direction


def test_a_state_goes_on_to_the_same_bits(alone):
    """Kills: a master, a moment or AdamW's count of steps that a state lacks."""
    for weights, _, resumed in alone[1].values():
        assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_step_is_that_of_the_plain_optimizers():
    """Kills: a parameter in the wrong place of its bank, masters in bf16, an embedding whose master is not, a rate
    that is not scaled, q, k and v not three matrices.

    The same optimizers on the parameters one by one. Aurora's batches of other sizes round alike.
    """
    hp = override(SHAPE)
    with one_process():
        weights, states = train([])
        model = GPT(hp)
        layout = make_banks(model, hp, Place(0, 1, CPU))
        values = initial_weights(model, 0)
        params = {name: nn.Parameter(v.bfloat16() if name == "embed.weight" else v) for name, v in values.items()}
        thirds = {name: list(map(nn.Parameter, p.detach().chunk(3))) for name, p in params.items() if "qkv.w" in name}
        matrices = [q for name in params if name in thirds for q in thirds[name]]
        matrices += [p for name, p in params.items() if "blocks" in name and p.ndim == 2 and name not in thirds]
        adamw = dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)
        vectors = [p for p in params.values() if p.ndim == 1]
        optimizers = [Aurora(matrices, lr=0.5 * hp.matrix_lr), *(
            torch.optim.AdamW(group, lr=torch.tensor(lr) * 0.5, **adamw) for group, lr in (
                ([params["embed.weight"]], 0.3), ([params["head.weight"]], 1 / 320), (vectors, 0.01)))]
        for step in range(3):
            for bank in layout:
                parts = gradients(bank, step)
                bank.gradients[:bank.count] = parts.sum(0)
                for name, g in zip(bank.params, bank.views(bank.gradients)):
                    for p, part in zip(thirds.get(name, [params[name]]), g.chunk(3 if name in thirds else 1)):
                        p.grad = part.to(p.dtype).clone()
            for optimizer in optimizers:
                optimizer.step()
    for name, p in params.items():
        expected = torch.cat(thirds[name]) if name in thirds else p
        assert torch.equal(weights[name], expected.detach().bfloat16()), name


def test_sums_of_vectors_fit_their_bank(alone):
    """Kills: a view of a bank that is a copy: what the model reads must be what is gathered."""
    hp = override(SHAPE)
    with one_process():
        model = GPT(hp)
        for bank in make_banks(model, hp, Place(0, 1, CPU)):
            bank.weights.fill_(7)
    assert all((p == 7).all() for p in model.parameters())


class Graph:
    """A CUDA graph's part in what Replayed does: what is recorded does not run until it is replayed."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_replayed_runs_once_and_then_replays(monkeypatch):
    """Kills: a first step that is captured before its state exists, a captured step that is not also run, a capture at
    every call, a private pool of memory for every graph."""
    graphs, pools, calls = [], [], []

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        graphs.append(graph)
        pools.append(pool)
        yield
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    run = Replayed("pool")
    for _ in range(4):
        run(lambda: calls.append(len(graphs)))
    assert calls == [0, 1] and [g.replays for g in graphs] == [3] and pools == ["pool"]


class Devices(TorchDispatchMode):
    """Where the tensors live that are made meanwhile."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {x.device.type for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_update_can_be_in_a_cuda_graph(direction):
    """Kills: a number read from the GPU, a tensor that is built on the CPU and sent.

    The meta device stands for a GPU: what needs a value is an error there.
    """
    p = nn.Parameter(torch.zeros(3, 24, 8, device="meta"))
    p.grad = torch.zeros_like(p)
    optimizer = Aurora([p], direction=direction)
    optimizer.param_groups[0]["lr"] = torch.zeros((), device="meta")
    with Devices() as devices:
        optimizer.step()
    assert devices.seen == {"meta"} and optimizer.state[p]["momentum"].shape == p.shape
