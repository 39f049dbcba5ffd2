"""class Aurora as a member of torch.optim, and against itself on 1, 2 and 4 processes."""

import copy
import doctest
import functools
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import UPDATES, Unguarded
from torch._subclasses.fake_tensor import FakeTensorMode

import aurora
import rules
from aurora import QUINTIC_5, Aurora, polar, spectral_norm
from rules import Rule, advance_

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
    """Kills: balancing by the stage polar, contra or the floor where no text names them, the aspect factor of a wide
    matrix."""
    for shape, aspect in ((SQUARE, 1), (TALL, 3**0.5), (WIDE, 1)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = draw(*shape)
        Aurora([p], lr=1.0, update="nesterov(0.95) | polar | aspect | step").step()
        expected = -aspect * polar(p.grad * (0.05 + 0.95 * 0.05))  # scale matters not, its rounding does
        torch.testing.assert_close(p.detach(), expected.float(), rtol=0, atol=2**-7)


def test_torch_optim_muon_is_the_same_update(monkeypatch):
    """Kills: another momentum, Nesterov form, decay or aspect factor than Muon's.

    Where the two define the same update: quintic-5, no contra, no floor. torch computes it in bf16 only, so the
    measure is how far torch itself is from the same rule in fp64: ours in bf16 is at most twice as far.
    """
    theirs, ours, truth = parameters(), parameters(), parameters(torch.float64)
    steps(torch.optim.Muon(theirs, momentum=0.95, nesterov=True, lr=0.02, weight_decay=0.1), 0, 10)
    text = "nesterov(0.95) | jordan_polar | aspect | decay(0.1) | step"
    steps(Aurora(ours, lr=0.02, update=text), 0, 10)
    exact = functools.partial(polar, coefficients=QUINTIC_5, dtype=torch.float64)
    monkeypatch.setattr(aurora, "jordan_polar", exact)
    steps(Aurora(truth, lr=0.02, update=text), 0, 10)
    for start, a, b, t in zip(parameters(torch.float64), theirs, ours, truth):
        assert (b - t).norm() <= 2 * (a - t).norm()
        assert (a - t).norm() <= 0.02 * (t - start).norm()  # far closer than the way they went


def test_gradients_are_left_as_they_were():
    """Kills: grad.lerp_, an in-place scaling of the caller's tensors (upstream overwrites p.grad)."""
    for text in UPDATES.values():
        p = torch.nn.Parameter(draw(*TALL))
        p.grad = draw(*TALL, seed=1)
        Aurora([p], update=text.replace("| step", "| decay(0.1) | step")).step()
        assert torch.equal(p.grad, draw(*TALL, seed=1))
        assert not torch.equal(p.detach(), draw(*TALL))


def test_refusals():
    """Kills: a vector, a stack or a convolution that is silently flattened, an unknown stage, a beta that nothing
    reads, a group whose rule is not checked until its first step."""
    matrix = [torch.nn.Parameter(torch.ones(3, 3))]
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\)"):
        Aurora([torch.nn.Parameter(torch.ones(3))])
    for shape in ((3, 3, 1, 1), (2, 3, 3)):
        with pytest.raises(ValueError, match=re.escape(f"shape {shape}") + ".*see Aurora's docstring"):
            Aurora([torch.nn.Parameter(torch.ones(shape))])
    with pytest.raises(ValueError, match="there is no stage 'sgd'; the nearest is "):
        Aurora(matrix, update="sgd")
    with pytest.raises(ValueError, match="aurora_paper has no 'beta'; the nearest is "):
        Aurora(matrix, update="aurora_paper(beta=0.25) | step")
    with pytest.raises(ValueError, match="there is no stage 'sgd'"):
        Aurora(matrix).add_param_group(dict(params=[torch.nn.Parameter(torch.ones(3, 3))], update="sgd"))


def test_frozen_parameters_keep_their_weight_and_their_state():
    """Kills: a parameter without gradient that moves, or whose momentum is lost or decays meanwhile, or whose count of
    steps goes on."""
    params = parameters()
    optimizer = Aurora(params)
    steps(optimizer, 0, 1)
    before = [(p.detach().clone(), optimizer.state[p]["nesterov.momentum"].clone()) for p in params]
    steps(optimizer, 1, 2)
    for i, (p, (weight, momentum)) in enumerate(zip(params, before)):
        assert torch.equal(p, weight) == (i % 3 == 0)
        assert torch.equal(optimizer.state[p]["nesterov.momentum"], momentum) == (i % 3 == 0)
        assert optimizer.state[p]["step"] == (1 if i % 3 == 0 else 2)
    assert Aurora(parameters()).step() is None  # no gradient at all


def test_closure_groups_and_schedulers():
    """Kills: a closure run without gradients or not run, a group that gets another's settings, a learning rate that is
    read once, at construction."""
    p, q = torch.nn.Parameter(draw(*TALL)), torch.nn.Parameter(draw(*TALL, seed=1))
    optimizer = Aurora([p], lr=0.1, update="nesterov(0.95) | aurora(2, 0.5) | aspect | step")
    optimizer.add_param_group(dict(params=[q], lr=0.3, update="nesterov(0.95) | polar | aspect | step"))
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


@pytest.mark.parametrize("update", ["aurora", "normuon"])
def test_bf16_parameters(update):
    """Kills: momentum kept in bf16, where .05 of a gradient is lost against a momentum 200 times as large; a weight
    rounded more than once. One bf16 step is the fp32 step from the same numbers, rounded."""
    low, high = parameters(torch.bfloat16), parameters(torch.bfloat16)
    high = [torch.nn.Parameter(p.detach().float()) for p in high]
    text = UPDATES[update].replace("| step", "| decay(0.5) | step")
    optimizers = [Aurora(params, update=text) for params in (low, high)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(low, high)):
            p.grad = draw(*p.shape, seed=1000 * step + i).bfloat16()
            q.grad = p.grad.float()
            q.data.copy_(p.data.float())
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(low, high):
            assert torch.equal(p, q.bfloat16())
            assert optimizers[0].state[p]["nesterov.momentum"].dtype == torch.float32


def test_stack_of_equal_shapes_is_updated_in_one_call(monkeypatch):
    """Kills: a loop over matrices where a batched call was promised: 3 shapes are 3 calls."""
    calls = []
    monkeypatch.setattr(aurora, "spectral_norm", lambda N: calls.append(N.shape) or spectral_norm(N))  # contra's
    params = [torch.nn.Parameter(draw(*s)) for s in [SQUARE, TALL] * 4 + [WIDE]]
    for p in params:
        p.grad = draw(*p.shape, seed=1)
    Aurora(params).step()
    assert sorted(calls) == [(1, *WIDE), (4, *SQUARE), (4, *TALL)]


# AdamW is a fused kernel, which nothing compiles
@pytest.mark.parametrize("update", sorted(UPDATES.keys() - {"adamw"}))
def test_a_step_is_one_graph(update):
    """Kills: a construct that breaks the graph, which a GPU runs compiled: slowly, and without a word; a number that is
    a constant of the graph where a schedule may change it."""
    text = UPDATES[update].replace("nesterov(0.95)", "nesterov(ramp(0.85, 0.95, 0, 2))")
    rule = Rule.of(text.replace("| step", "| decay(0.1) | step"))

    def run(advance, step):
        W, G = draw(3, *TALL), draw(3, *TALL, seed=1)
        state = {name: draw(*x.shape, seed=2).abs() for name, x in rule.state(W).items()}
        knobs = dict(lr=0.02 / (1 + step), t=1.0 + step) | rule.at(step)
        advance(W, G, state, {name: torch.tensor(x) for name, x in knobs.items()})
        return [W, G, *state.values()]
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph
    eager = functools.partial(advance_, rule)
    compiled = torch.compile(eager, backend=backend, fullgraph=True, dynamic=False)
    for step in range(2):
        assert all(map(torch.equal, run(compiled, step), run(eager, step)))
    assert len(graphs) == 1
    assert not torch.equal(run(eager, 0)[0], run(eager, 1)[0])


@pytest.mark.parametrize("stacked", [False, True])
def test_a_gpu_takes_the_compiled_step(stacked, monkeypatch):
    """Kills: a GPU that runs eagerly without a word, or updates a stack in several calls; a number of a schedule for
    which it would compile again. Nothing is computed: the tensors are fake. A stack is what train_gpt.py's banks hand
    in, with tensors for numbers; class Aurora makes both of its parameters."""
    calls = []
    monkeypatch.setattr(rules, "compiled_rule", lambda text: lambda *arguments: calls.append((text, *arguments)))
    rule = Rule.of(UPDATES["normuon"].replace("nesterov(0.95)", "nesterov(ramp(0.85, 0.95, 0, 300))"))
    with FakeTensorMode(), Unguarded():
        if stacked:
            W = torch.empty(20, 768, 768, device="cuda")
            knobs = {name: torch.empty((), device="cuda") for name in ("lr", "t", *rule.at(0))}
            rule.advance_(W, torch.empty_like(W), rule.state(W), knobs)
        else:
            params = [torch.nn.Parameter(torch.empty(768, 768, device="cuda")) for _ in range(20)]
            for p in params:
                p.grad = torch.empty_like(p)
            Aurora(params, update=rule.text).step()
        (text, W, G, state, knobs), = calls
        assert text == rule.text
        assert W.shape == G.shape == state["nesterov.momentum"].shape == (20, 768, 768)
        assert state["normuon.second_moment"].shape == (20, 768, 1)
        assert set(knobs) == {"lr", "t", "nesterov.mu"}
        for x in knobs.values():
            assert (x.device.type, x.dtype, x.ndim) == ("cuda", torch.float32, 0)


@pytest.mark.parametrize("update", ["aurora", "normuon_lite"])
def test_a_stack_is_its_matrices(update, monkeypatch):
    """Kills: a norm or a second moment over a whole stack, state of one matrix given to the next, a matrix that is in
    no part or in two where a stack is updated in parts. A rule on a stack against class Aurora on its matrices."""
    for module in (aurora, rules):
        monkeypatch.setattr(module, "at_once", lambda stack: 2)  # of three
    rule = Rule.of(UPDATES[update])
    for shape in (TALL, WIDE):
        stack, alone = draw(3, *shape), [torch.nn.Parameter(x) for x in draw(3, *shape)]
        state, optimizers = rule.state(stack), [Aurora([p], update=rule.text) for p in alone]
        for step in range(3):
            G = draw(3, *shape, seed=step + 1)
            rule.advance_(stack, G, state, dict(lr=0.0375, t=step + 1) | rule.at(step))
            for optimizer, p, g in zip(optimizers, alone, G):
                p.grad = g.clone()
                optimizer.step()
        assert torch.equal(stack, torch.stack([p.detach() for p in alone]))
        for name, x in state.items():
            assert torch.equal(x, torch.stack([o.state[p][name] for o, p in zip(optimizers, alone)]))


# World sizes

def make(update: str, dtype=torch.float32) -> Aurora:
    params = parameters(dtype)
    return Aurora([dict(params=params[:6]), dict(params=params[6:], lr=0.01)], update=UPDATES[update])


def weights(optimizer: Aurora) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def share_of_a_run(checkpoint: dict) -> dict:
    """What one process of any number has: per update the weights after 4 steps and how many matrices it owns, its
    state_dict after 3, and the weights after a 4th step from another run's state."""
    outcome = {}
    for update in UPDATES:
        optimizer = make(update)
        steps(optimizer, 0, 3)
        owned = sum(len(state) > 1 for state in optimizer.state.values())  # all have the number of their steps
        optimizer.consolidate_state_dict(to=None)
        state = copy.deepcopy(optimizer.state_dict())  # it holds the tensors themselves, as torch's does
        steps(optimizer, 3, 4)
        resumed = make(update)
        if update in checkpoint:
            resumed.load_state_dict(checkpoint[update]["state"])
            for p, w in zip((p for group in resumed.param_groups for p in group["params"]),
                            checkpoint[update]["at"]):
                p.data.copy_(w)
            steps(resumed, 3, 4)
        outcome[update] = dict(weights=weights(optimizer), owned=owned, state=state, resumed=weights(resumed),
                               kept=sum(len(state) > 1 for state in resumed.state.values()))
    return outcome


def checkpoints() -> dict:
    """Each update's state and weights after three steps of one process."""
    saved = {}
    for update in UPDATES:
        optimizer = make(update)
        steps(optimizer, 0, 3)
        saved[update] = dict(state=optimizer.state_dict(), at=weights(optimizer))
    return saved


def one_of_several(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(share_of_a_run(torch.load(f"{folder}/checkpoint.pt", weights_only=True)), f"{folder}/{rank}.pt")
    dist.barrier()  # a process that is gone while another still talks to it aborts that one
    dist.destroy_process_group()


def test_four_ranks_give_the_bits_of_one(tmp_path):
    """Kills: a rank that misses or doubles a matrix, a batched product whose rounding depends on the stack's size,
    state kept by ranks that do not own it, a second moment that is not sharded, a state_dict that lacks other ranks'
    share or that only the same number of ranks can load, ownership that moves when a gradient is missing.

    5, 3 and 1 matrices of a shape: with 4 ranks some own two, some one, some none. Every update.
    """
    saved = checkpoints()
    torch.save(saved, tmp_path / "checkpoint.pt")
    mp.spawn(one_of_several, (4, str(tmp_path)), nprocs=4)
    alone = share_of_a_run(saved)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for update, one in alone.items():
        assert one["owned"] == sum(rank[update]["owned"] for rank in ranks) == len(SHAPES)
        assert one["kept"] == sum(rank[update]["kept"] for rank in ranks) == len(SHAPES)
        for rank in ranks:
            for name in ("weights", "resumed"):
                assert all(torch.equal(a, b) for a, b in zip(one["weights"], rank[update][name], strict=True))
            assert rank[update]["state"]["state"].keys() == one["state"]["state"].keys()
            for index, state in one["state"]["state"].items():
                other = rank[update]["state"]["state"][index]
                assert state.keys() == other.keys() and state["step"] == other["step"]
                assert all(torch.equal(x, other[name]) for name, x in state.items() if name != "step"), (update, index)
        assert all(torch.equal(a, b) for a, b in zip(one["weights"], one["resumed"], strict=True))


def test_state_keeps_its_precision_through_a_checkpoint(tmp_path):
    """Kills: torch's cast of loaded state to the parameter's dtype (fp32 momentum of a bf16 parameter), state that is
    shared with the dictionary it came from, a checkpoint that weights_only=True refuses."""
    one, other = make("normuon", torch.bfloat16), make("normuon", torch.bfloat16)
    steps(one, 0, 3)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state)
    before = state["state"][0]["nesterov.momentum"].clone()
    for p, w in zip((p for group in other.param_groups for p in group["params"]), weights(one)):
        p.data.copy_(w)
    steps(one, 3, 5)
    steps(other, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other)))
    assert torch.equal(state["state"][0]["nesterov.momentum"], before)
