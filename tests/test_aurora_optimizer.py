"""class Aurora as a member of torch.optim, and against itself on 1, 2 and 4 processes."""

import copy
import doctest
import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensorMode

import aurora
from aurora import DIRECTIONS, QUINTIC_5, Aurora, advance_, contra, polar, update_weight_floor

SQUARE, TALL, WIDE = (24, 24), (48, 16), (16, 40)
SHAPES = [SQUARE] * 5 + [TALL] * 3 + [WIDE]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype=torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(draw(*s, seed=i, dtype=dtype)) for i, s in enumerate(SHAPES)]


def steps(optimizer: Aurora, first: int, last: int):
    """Steps on gradients that depend on the step's number alone; at step 1 some parameters have none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, last):
        for i, p in enumerate(params):
            p.grad = None if step == 1 and i % 3 == 0 else draw(*p.shape, seed=1000 * step + i).to(p.dtype)
        optimizer.step()


def test_docstring_example():
    """Kills: an example that does not run or does not train."""
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(verbose=False)
    torch.manual_seed(0)
    result = [runner.run(test) for test in finder.find(Aurora, "Aurora", globs={"torch": torch, "Aurora": Aurora})]
    assert [(r.failed, r.attempted > 5) for r in result] == [(0, True)]


def test_muon_is_the_polar_factor_of_the_momentum():
    """Kills: balancing under direction="muon", contra or the floor left on at 0, the aspect factor of a wide matrix."""
    for shape, aspect in ((SQUARE, 1), (TALL, 3**0.5), (WIDE, 1)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = draw(*shape)
        Aurora([p], lr=1.0, direction="muon", contra=0.0, uw_floor=0.0).step()
        expected = -aspect * polar(p.grad * (0.05 + 0.95 * 0.05))  # scale matters not, its rounding does
        torch.testing.assert_close(p.detach(), expected.float(), rtol=0, atol=2**-7)


def test_torch_optim_muon_is_the_same_update():
    """Kills: another momentum, Nesterov form, decay or aspect factor than Muon's.

    Where the two define the same update: quintic-5, no contra, no floor. torch computes it in bf16 only, so the
    measure is how far torch itself is from the same rule in fp64: ours in bf16 is at most twice as far.
    """
    settings = dict(lr=0.02, weight_decay=0.1)
    own = dict(direction="muon", contra=0.0, uw_floor=0.0, mu=0.95)
    exact = functools.partial(polar, coefficients=QUINTIC_5, dtype=torch.float64)
    theirs, ours, truth = parameters(), parameters(), parameters(torch.float64)
    optimizers = [torch.optim.Muon(theirs, momentum=0.95, nesterov=True, **settings),
                  Aurora(ours, polar=functools.partial(polar, coefficients=QUINTIC_5), **settings, **own),
                  Aurora(truth, polar=exact, **settings, **own)]
    for optimizer in optimizers:
        steps(optimizer, 0, 10)
    for start, a, b, t in zip(parameters(torch.float64), theirs, ours, truth):
        assert (b - t).norm() <= 2 * (a - t).norm()
        assert (a - t).norm() <= 0.02 * (t - start).norm()  # far closer than the way they went


def test_gradients_and_inputs_are_left_as_they_were():
    """Kills: grad.lerp_, an in-place scaling of the caller's tensors (upstream overwrites p.grad)."""
    for direction in DIRECTIONS:
        p = torch.nn.Parameter(draw(*TALL))
        p.grad = draw(*TALL, seed=1)
        before = p.grad.clone()
        Aurora([p], weight_decay=0.1, direction=direction).step()
        assert torch.equal(p.grad, before)
        G = draw(*WIDE)
        DIRECTIONS[direction].factor(G)
        assert torch.equal(G, draw(*WIDE))
    U, W = draw(*TALL, seed=2), draw(*TALL, seed=3)
    copies = U.clone(), W.clone()
    update_weight_floor(U, W), contra(U, W)
    assert torch.equal(U, copies[0]) and torch.equal(W, copies[1])


def test_refusals():
    """Kills: a vector or a convolution that is silently flattened, an unknown direction, a beta that nothing reads."""
    matrix = [torch.nn.Parameter(torch.ones(3, 3))]
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\)"):
        Aurora([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"shape \(3, 3, 1, 1\).*see Aurora's docstring"):
        Aurora([torch.nn.Parameter(torch.ones(3, 3, 1, 1))])
    with pytest.raises(ValueError, match="direction='sgd': it is one of aurora, "):
        Aurora(matrix, direction="sgd")
    with pytest.raises(ValueError, match="no meaning for direction='aurora_paper': they belong to aurora and"):
        Aurora(matrix, direction="aurora_paper", pp_beta=0.25)
    with pytest.raises(ValueError, match="direction='sgd'"):
        Aurora(matrix).add_param_group(dict(params=[torch.nn.Parameter(torch.ones(3, 3))], direction="sgd"))


def test_frozen_parameters_keep_their_weight_and_their_state():
    """Kills: a parameter without gradient that moves, or whose momentum is lost or decays meanwhile."""
    params = parameters()
    optimizer = Aurora(params)
    steps(optimizer, 0, 1)
    before = [(p.detach().clone(), optimizer.state[p]["momentum"].clone()) for p in params]
    steps(optimizer, 1, 2)
    for i, (p, (weight, momentum)) in enumerate(zip(params, before)):
        assert torch.equal(p, weight) == (i % 3 == 0)
        assert torch.equal(optimizer.state[p]["momentum"], momentum) == (i % 3 == 0)
    assert Aurora(parameters()).step() is None  # no gradient at all


def test_closure_groups_and_schedulers():
    """Kills: a closure run without gradients or not run, a group that gets another's settings, a learning rate that is
    read once, at construction."""
    p, q = torch.nn.Parameter(draw(*TALL)), torch.nn.Parameter(draw(*TALL, seed=1))
    optimizer = Aurora([p], lr=0.1, contra=0.0, uw_floor=0.0)
    optimizer.add_param_group(dict(params=[q], lr=0.3, direction="muon"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1.0, 0.5, 0.0)[step])

    def closure():
        optimizer.zero_grad()
        loss = (p * draw(*TALL, seed=2)).sum() + (q * draw(*TALL, seed=2)).sum()
        loss.backward()
        return loss

    moved = []
    for _ in range(3):
        before = p.detach().clone(), q.detach().clone()
        assert optimizer.step(closure).item() == pytest.approx(
            ((before[0] + before[1]) * draw(*TALL, seed=2)).sum().item(), rel=1e-4, abs=1e-3)
        moved.append([(a - b).norm().item() for a, b in zip((p, q), before)])
        schedule.step() if len(moved) < 3 else None
    # updates of one length: sqrt of the rank 16 times the aspect factor 3, up to bf16
    length = (16 * 3) ** 0.5
    for factor, row in zip((1.0, 0.5, 0.0), moved):
        assert row == pytest.approx([0.1 * factor * length, 0.3 * factor * length], rel=0.02)


def test_convolution_as_its_docstring_says():
    """Kills: advice that does not work: the filters and their matrix must be one memory, and must move."""
    conv = torch.nn.Conv2d(3, 8, 5)
    start = conv.weight.detach().clone()
    m = torch.nn.Parameter(conv.weight.detach().flatten(1))
    conv(draw(2, 3, 9, 9)).square().sum().backward()
    m.grad = conv.weight.grad.flatten(1)
    Aurora([m]).step()
    assert torch.equal(conv.weight.detach().flatten(1), m.detach())
    assert not torch.equal(conv.weight, start)


@pytest.mark.parametrize("direction", ["aurora", "normuon"])
def test_bf16_parameters(direction):
    """Kills: momentum kept in bf16, where .05 of a gradient is lost against a momentum 200 times as large; a weight
    rounded more than once. One bf16 step is the fp32 step from the same numbers, rounded."""
    low, high = parameters(torch.bfloat16), parameters(torch.bfloat16)
    high = [torch.nn.Parameter(p.detach().float()) for p in high]
    optimizers = [Aurora(params, direction=direction, weight_decay=0.5) for params in (low, high)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(low, high)):
            p.grad = draw(*p.shape, seed=1000 * step + i).bfloat16()
            q.grad = p.grad.float()
            q.data.copy_(p.data.float())
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(low, high):
            assert torch.equal(p, q.bfloat16())
            assert optimizers[0].state[p]["momentum"].dtype == torch.float32


def test_stack_of_equal_shapes_is_updated_in_one_call(monkeypatch):
    """Kills: a loop over matrices where a batched call was promised: 3 shapes are 3 calls."""
    calls = []
    monkeypatch.setattr(aurora, "contra", lambda U, G, s: calls.append(U.shape) or contra(U, G, s))
    params = [torch.nn.Parameter(draw(*s)) for s in [SQUARE, TALL] * 4 + [WIDE]]
    for p in params:
        p.grad = draw(*p.shape, seed=1)
    Aurora(params).step()
    assert sorted(calls) == [(1, *WIDE), (4, *SQUARE), (4, *TALL)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_is_one_graph(direction):
    """Kills: a construct that breaks the graph, which a GPU runs compiled: slowly, and without a word; a number that is
    a constant of the graph where a schedule may change it."""
    way = DIRECTIONS[direction]

    def run(advance, lr):
        tensors = [draw(3, *TALL, seed=seed) for seed in range(3)]
        moments = {"second_moment": draw(3, *way.second_moment(*TALL), seed=3).abs()} if way.second_moment else {}
        advance(*tensors, *map(torch.tensor, (lr, 0.1, 0.95)), direction, dict(pp_beta=0.4) if way.balances else {},
                0.4, 0.35, **moments)
        return [*tensors, *moments.values()]
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph
    compiled = torch.compile(advance_, backend=backend, fullgraph=True, dynamic=False)
    for lr in (0.02, 0.01):
        assert all(map(torch.equal, run(compiled, lr), run(advance_, lr)))
    assert len(graphs) == 1


@pytest.mark.parametrize("stacked", [False, True])
def test_a_gpu_takes_the_compiled_step(stacked, monkeypatch):
    """Kills: a GPU that runs eagerly without a word, or updates a stack in several calls; a number of a schedule for
    which it would compile again. Nothing is computed: the tensors are fake."""
    calls = []
    monkeypatch.setattr(aurora, "compiled_advance", lambda: lambda **arguments: calls.append(arguments))
    with FakeTensorMode():
        shapes = [(20, 768, 768)] if stacked else [(768, 768)] * 20
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
        for p in params:
            p.grad = torch.empty_like(p)
        Aurora(params).step()
        call, = calls
        assert call["weight"].shape == (20, 768, 768)
        for name in ("lr", "weight_decay", "mu"):
            assert (call[name].device.type, call[name].dtype, call[name].ndim) == ("cuda", torch.float32, 0)


@pytest.mark.parametrize("direction", ["aurora", "normuon_lite"])
def test_a_stack_is_its_matrices(direction, monkeypatch):
    """Kills: a norm or a second moment over a whole stack, state of one matrix given to the next, a stack that moves
    where it has no gradient."""
    monkeypatch.setattr(aurora, "at_once", lambda stack: 2)  # of three
    for shape in (TALL, WIDE):
        stack, *alone = (torch.nn.Parameter(x) for x in (draw(3, *shape), *draw(3, *shape)))
        idle = torch.nn.Parameter(draw(3, *shape))
        optimizers = [Aurora([stack, idle], direction=direction), Aurora(alone, direction=direction)]
        for step in range(3):
            stack.grad = draw(3, *shape, seed=step + 1)
            for p, g in zip(alone, stack.grad):
                p.grad = g.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(stack.detach(), torch.stack([p.detach() for p in alone]))
        assert torch.equal(idle.detach(), draw(3, *shape))


# World sizes

def make(direction: str, dtype=torch.float32) -> Aurora:
    params = parameters(dtype)
    return Aurora([dict(params=params[:6]), dict(params=params[6:], lr=0.01)], direction=direction)


def weights(optimizer: Aurora) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def share_of_a_run(checkpoint: dict) -> dict:
    """What one process of any number has: per direction the weights after 4 steps and how many matrices it owns, its
    state_dict after 3, and the weights after a 4th step from another run's state."""
    outcome = {}
    for direction in DIRECTIONS:
        optimizer = make(direction)
        steps(optimizer, 0, 3)
        state = copy.deepcopy(optimizer.state_dict())  # it holds the tensors themselves, as torch's does
        steps(optimizer, 3, 4)
        resumed = make(direction)
        if direction in checkpoint:
            resumed.load_state_dict(checkpoint[direction]["state"])
            for p, w in zip((p for group in resumed.param_groups for p in group["params"]),
                            checkpoint[direction]["at"]):
                p.data.copy_(w)
            steps(resumed, 3, 4)
        outcome[direction] = dict(weights=weights(optimizer), owned=len(optimizer.state), state=state,
                                  resumed=weights(resumed), kept=len(resumed.state))
    return outcome


def checkpoints() -> dict:
    """Each direction's state and weights after three steps of one process."""
    saved = {}
    for direction in DIRECTIONS:
        optimizer = make(direction)
        steps(optimizer, 0, 3)
        saved[direction] = dict(state=optimizer.state_dict(), at=weights(optimizer))
    return saved


def one_of_several(rank: int, world: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(share_of_a_run(torch.load(f"{folder}/checkpoint.pt", weights_only=True)), f"{folder}/{rank}.pt")
    dist.barrier()  # a process that is gone while another still talks to it aborts that one
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_size_gives_the_same_bits(world, tmp_path):
    """Kills: a rank that misses or doubles a matrix, a batched product whose rounding depends on the stack's size,
    state kept by ranks that do not own it, a second moment that is not sharded, a state_dict that lacks other ranks'
    share or that only the same number of ranks can load, ownership that moves when a gradient is missing.

    5, 3 and 1 matrices of a shape: with 4 ranks some own two, some one, some none. Every direction.
    """
    saved = checkpoints()
    torch.save(saved, tmp_path / "checkpoint.pt")
    mp.spawn(one_of_several, (world, str(tmp_path)), nprocs=world)
    alone = share_of_a_run(saved)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for direction, one in alone.items():
        assert one["owned"] == sum(rank[direction]["owned"] for rank in ranks) == len(SHAPES)
        assert one["kept"] == sum(rank[direction]["kept"] for rank in ranks) == len(SHAPES)
        for rank in ranks:
            for name in ("weights", "resumed"):
                assert all(torch.equal(a, b) for a, b in zip(one["weights"], rank[direction][name], strict=True))
            assert rank[direction]["state"]["state"].keys() == one["state"]["state"].keys()
            for index, state in one["state"]["state"].items():
                assert all(torch.equal(x, rank[direction]["state"]["state"][index][name])
                           for name, x in state.items()), (direction, index)
        assert all(torch.equal(a, b) for a, b in zip(one["weights"], one["resumed"], strict=True))


def test_state_keeps_its_precision_through_a_checkpoint(tmp_path):
    """Kills: torch's cast of loaded state to the parameter's dtype (fp32 momentum of a bf16 parameter), state that is
    shared with the dictionary it came from, a checkpoint that weights_only=True refuses."""
    one, other = make("normuon", torch.bfloat16), make("normuon", torch.bfloat16)
    steps(one, 0, 3)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state)
    before = state["state"][0]["momentum"].clone()
    for p, w in zip((p for group in other.param_groups for p in group["params"]), weights(one)):
        p.data.copy_(w)
    steps(one, 3, 5)
    steps(other, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other)))
    assert torch.equal(state["state"][0]["momentum"], before)
