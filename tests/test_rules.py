"""The language of update rules: what it refuses, what a knob's schedule is worth, and stages that a user adds."""

import contextlib

import pytest
import torch
from conftest import UPDATES, Unguarded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import aurora
import rules
from aurora import RESULT_17, Aurora, Shares, column_pairs, row_pairs
from rules import STAGES, BelowOne, Rule, stage, whole, with_knob
from train_gpt import Bank, Hyperparameters

SHAPES = SQUARE, TALL, WIDE = (8, 8), (12, 4), (4, 10)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def refusal(text: str) -> str:
    with pytest.raises(ValueError) as caught:
        Rule.of(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable()
    return message


@pytest.fixture
def own_stages():
    """Stages that a test adds are gone after it, and so are the rules that name them."""
    before = dict(STAGES)
    yield
    STAGES.clear()
    STAGES.update(before)
    Rule.of.cache_clear()


# Refusals

@pytest.mark.parametrize("text, words", [
    ("nestrov(0.95) | polar | step", "no stage 'nestrov'; the nearest is 'nesterov'"),
    ("nesterov(mo=0.95) | step", "nesterov has no 'mo'; the nearest is 'mu'"),
    ("nesterov(rmp(0, 0.5, 0, 3)) | step", "no schedule 'rmp'; the nearest is 'ramp'"),
    ("nesterov(ramp(0, 0.5, 0, stopp=3)) | step", "ramp has no 'stopp'; the nearest is 'stop'"),
    ("nesterov(0.9, 1) | step", "that is more than nesterov takes; it takes mu"),
    ("nesterov(*[0.9]) | step", "is not understood"),
    ("nesterov(**0.9) | step", "is not understood"),
    ("polar(1) | step", "that is more than polar takes; it takes nothing"),
    ("nesterov(ramp(0, 0.5, 0, 3, 4)) | step", "that is more than ramp takes; it takes before, after, start, stop"),
    ("aurora(2, iterations=3) | step", "iterations is given twice"),
    ("nesterov(mu=0.9, mu=0.8) | step", "mu is given twice"),
    ("decay | step", "rate is missing; it takes rate"),
    ("nesterov(ramp(0, 0.5, 0)) | step", "stop is missing"),
    ("aurora(2.0) | step", "iterations is a whole number, at least 1, not 2.0"),
    ("aurora(0) | step", "iterations is a whole number, at least 1, not 0"),
    ("aurora(True) | step", "iterations is a whole number, at least 1, not True"),
    ("aurora(2147483648) | step", "iterations is a whole number"),
    ("nesterov('0.9') | step", "is not understood"),
    ("nesterov(1) | step", "mu is a number at least 0 and below 1, not 1"),
    ("nesterov(False) | step", "mu is a number at least 0 and below 1, not False"),
    ("nesterov(-0.1) | step", "mu is a number at least 0 and below 1, not -0.1"),
    ("floor(-1) | step", "target is a number, finite and not negative, not -1"),
    ("floor(1e999) | step", "target is a number, finite and not negative"),
    ("floor(0.3 + 0.1) | step", "target is a number, finite and not negative, not 0.3 + 0.1"),
    ("floor(inf) | step", "target is a number, finite and not negative, not inf"),
    ("nesterov(ramp(0, 1.5, 0, 3)) | step", "after is a number at least 0 and below 1, not 1.5"),
    ("nesterov(ramp(0, 0.5, -1, 3)) | step", "start is a whole number, at least 0, not -1"),
    ("nesterov(ramp(0, 0.5, 3, 3)) | step", "start=3 is not before stop=3"),
    ("nesterov(ramp(0, ramp(0, 1.5, 0, 3), 0, 3)) | step", "mu: after: after is a number at least 0 and below 1"),
    ("nesterov(ramp(0, ramp(0, 0.5, 3, 3), 0, 3)) | step", "mu: after: start=3 is not before stop=3"),
    ("nesterov(ramp(0, 0.5, ramp(0, 1, 0, 3), 3)) | step", "start is a whole number, at least 0"),
    ("nesterov(names(ramp(0, 0.5, 0, 3))) | step", "mu is a number at least 0 and below 1, not ramp"),
    ("nesterov(names(embed=0.5)) | step", "write names(VALUE, PART_OF_A_NAME=VALUE, ...)"),
    ("aurora(names(2, fc=3)) | step", "iterations is a constant of the program"),
    ("aurora(ramp(1, 3, 0, 9)) | step", "iterations is a constant of the program"),
    ("adamw(ramp(0.8, 0.9, 0, 9))", "beta1 is a constant of the program"),
    ("polar | contra(0.4) | step", "contra needs N, which no stage before it makes: nesterov does"),
    ("nesterov(0.95) | polar", "does not move the weight: end it with | step"),
    ("decay(0.1)", "does not move the weight"),
    ("polar | polar | step", "polar stands twice"),
    ("step | step", "step stands twice"),
    ("adamw | step", "adamw moves the weight by itself: it stands first"),
    ("adamw | aspect", "adamw moves the weight by itself"),
    ("adamw | pin", "adamw moves the weight by itself"),
    ("step | adamw", "adamw moves the weight by itself"),
    ("soap | trust_gate | polar | step", "trust_gate needs M, which no stage before it makes: nesterov does"),
    ("nesterov | polar | anneal(0.5) | step", "anneal needs L, which no stage before it makes: soap does"),
    ("soap(least=ramp(0, 1, 0, 9)) | step", "least is a constant of the program"),
    ("soap | anneal(0) | step", "ratio is a number above 0 and at most 1, not 0"),
    ("soap | anneal(at_least(0.5, 2)) | step", "ratio: least is a number above 0 and at most 1, not 2"),
    ("step | polar", "polar stands after step"),
    ("tail_average | step", "tail_average looks back at the step: put it after step"),
    ("lookahead | step", "lookahead looks back at the step: put it after step"),
    ("step | lookahead | tail_average", "tail_average stands after lookahead, which goes beyond the weight"),
    ("step | lookahead | cautious_decay(0.1)", "cautious_decay stands after lookahead"),
    ("adamw | lookahead | anchored_average", "anchored_average stands after lookahead"),
    ("step" + " " * 997, "at most 1000 characters, this one 1001"),
    ("", "is not understood: write it as nesterov(0.95) | polar"),
    ("nesterov(0.95) | | step", "is not understood"),
    ("nesterov(0.95 | step", "is not understood"),
    ("(" * 400 + "step" + ")" * 400, "is not understood"),
    ("floor(" + "-" * 900 + "1) | step", "is not understood"),
    ("step" + "()" * 450, "is not understood"),
    ("a" + ".b" * 450, "is not understood"),
    ("floor(f'{1!r:\\n}') | step", "is not understood"),
    ("step\0", "is not understood"),
    ("step\ud800", "is not understood"),
    ("polar & step", "is not understood"),
    ("polar; step", "is not understood"),
    ("lambda: step", "is not understood"),
])
def test_a_wrong_rule_is_refused_in_one_line(text, words):
    """Kills: a mistake that is read as something else, one that ends in a traceback of the parser's or of Python's
    recursion, a message that names neither the place nor the nearest right word."""
    assert words in refusal(text)


def test_nothing_of_a_rule_is_run(tmp_path):
    """Kills: eval in place of a parser. A rule from the command line, or from somebody's recipe, is text."""
    trace = tmp_path / "trace"
    for call in (f"__import__('os').mkdir({str(trace)!r})", f"open({str(trace)!r}, 'w')", '__import__("os")'):
        for text in (call, f"{call} | step", f"nesterov({call}) | step", f"nesterov(ramp(0, {call}, 0, 3)) | step"):
            assert refusal(text)
        with pytest.raises(ValueError):
            with_knob(RESULT_17, "floor", "target", call)
    assert not trace.exists()


word = st.sampled_from([*STAGES, "ramp", "|", "(", ")", ",", "=", "*", "**", "-", "0.5", "2", "1e999", "mu", "beta",
                        "f'", "'", "\n", " ", "\\", "#", "None", "\0", "[", "]", ":", "lambda", "not ", ".", "é"])


@settings(max_examples=400, deadline=None, database=None)
@given(st.one_of(st.text(max_size=80), st.lists(word, max_size=40).map("".join),
                 st.tuples(word, st.integers(0, 400)).map(lambda x: x[0] * x[1] + "step")))
@example("not " * 200 + "step")
@example("step | " * 100 + "step")
@example("[" * 90 + "step" + "]" * 90)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")  # Python's, of what it parses
def test_any_text_is_a_rule_or_refused_in_one_line(text):
    """Kills: an error of another kind, or of several lines, for a text that no one thought of."""
    try:
        rule = Rule.of(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(rule, Rule) and rule.text == text and rule.parts


# Knobs

def test_a_ramp_at_its_start_middle_and_end():
    """Kills: a ramp that starts or ends a step late, goes on behind its end, or counts steps from 1; a number that is
    handed out as if it were a schedule."""
    rule = Rule.of("nesterov(ramp(0.85, 0.95, 100, 300)) | polar | floor(target=ramp(0.4, 0, 0, 10)) | step")
    for done, mu, target in ((0, 0.85, 0.4), (5, 0.85, 0.2), (10, 0.85, 0), (100, 0.85, 0), (101, 0.8505, 0),
                             (200, 0.9, 0), (299, 0.9495, 0), (300, 0.95, 0), (5000, 0.95, 0)):
        assert rule.at(done) == pytest.approx({"nesterov.mu": mu, "floor.target": target})
    assert Rule.of(RESULT_17).at(7) == {}


def test_a_ramp_is_what_an_update_uses():
    """Kills: a schedule's value of the step before or after, or its first value for good. By a gradient and a momentum
    that are known: with weights at zero and rate 1, W is minus the sum of (1 - mu) G + mu M."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = Aurora([p], lr=1.0, update="nesterov(ramp(0, 0.5, 0, 2)) | step")
    momentum = expected = torch.zeros(2, 2, dtype=torch.float64)
    for i, mu in enumerate((0, 0.25, 0.5, 0.5)):
        p.grad = draw(2, 2, seed=i, dtype=torch.float64)
        optimizer.step()
        momentum = mu * momentum + (1 - mu) * p.grad
        expected = expected - ((1 - mu) * p.grad + mu * momentum)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text, name, knob, value, by_hand", [
    ("nesterov(0.95) | polar | step", "nesterov", "mu", "0.9", "nesterov(0.9) | polar | step"),
    ("nesterov(mu=0.95) | polar | step", "nesterov", "mu", "0.9", "nesterov(0.9) | polar | step"),
    ("nesterov | polar | step", "nesterov", "mu", "0.9", "nesterov(0.9) | polar | step"),
    ("aurora(2, 0.5) | step", "aurora", "iterations", "3", "aurora(3, 0.5) | step"),
    ("aurora(beta=0.5, iterations=2) | step", "aurora", "beta", "0.25", "aurora(2, 0.25) | step"),
    ("aurora(2) | step", "aurora", "beta", "0.25", "aurora(2, 0.25) | step"),
    ("aurora | step", "aurora", "beta", "0.25", "aurora(beta=0.25) | step"),
    ("adamw(0.8, eps=1e-10)", "adamw", "decay", "0.1", "adamw(beta1=0.8, eps=1e-10, decay=0.1)"),
    ("nesterov(0.95)|polar|step", "nesterov", "mu", "ramp(0.85, 0.95, 0, 300)",
     "nesterov(ramp(0.85, 0.95, 0, 300)) | polar | step"),
    ("nesterov(ramp(0.85, 0.95, 0, 300)) | step", "nesterov", "mu", "0.9", "nesterov(0.9) | step"),
])
def test_with_knob_is_the_rule_written_by_hand(text, name, knob, value, by_hand):
    """Kills: a value that goes to the neighbour of its knob, a knob that was named or left out before and is lost, a
    stage lost, a stage moved."""
    assert with_knob(text, name, knob, value) == by_hand
    assert Rule.of(by_hand)


@pytest.mark.parametrize("name, knob, value, words", [
    ("floor", "tarjet", "0.4", "floor has no 'tarjet'; the nearest is 'target'"),
    ("aspect", "ratio", "2", "aspect has no 'ratio'; it takes nothing"),
    ("floor", "target", "0.4) | decay(0.1", "is not understood: write it as a number or a schedule"),
    ("floor", "target", "0.4 | decay(0.1)", "target is a number"),
    ("floor", "target", "decay(0.1)", "no schedule 'decay'"),
    ("floor", "target", "0.4, 0.5", "target is a number"),
    ("floor", "target", "*[0.4]", "is not understood"),
    ("floor", "target", "-" * 900 + "1", "is not understood"),
    ("floor", "target", "", "is not understood"),
    ("floor", "target", "-1", "target is a number, finite and not negative"),
    ("nesterov", "mu", "1", "mu is a number at least 0 and below 1"),
    ("aurora", "iterations", "ramp(1, 3, 0, 9)", "iterations is a constant of the program"),
])
def test_with_knob_refuses(name, knob, value, words):
    """Kills: a value that smuggles in another stage or argument, a value that is not checked until the rule is used."""
    with pytest.raises(ValueError) as caught:
        with_knob(RESULT_17, name, knob, value)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_result_17_is_the_trainers_default():
    """Kills: two defaults that part ways."""
    assert Hyperparameters().matrix_update == RESULT_17 == UPDATES["aurora"]


# State

@pytest.mark.parametrize("dtype, kept", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32),
                                         (torch.float64, torch.float64)])
def test_state_of_a_rule(dtype, kept):
    """Kills: a momentum in bf16, a second moment over the wrong side or over the stack, state of AdamW in another dtype
    than torch's, a name that another stage's state could have too."""
    for m, n in SHAPES:
        W = torch.ones(3, m, n, dtype=dtype)
        lite = (3, m, 1) if m >= n else (3, 1, n)
        expected = {"normuon": {"normuon.second_moment": (3, m, 1)},
                    "normuon_lite": {"normuon_lite.second_moment": lite}}
        for name, text in UPDATES.items():
            shapes = ({"adamw.exp_avg": (3, m, n), "adamw.exp_avg_sq": (3, m, n)} if name == "adamw" else
                      {"nesterov.momentum": (3, m, n)} | expected.get(name, {}))
            state = Rule.of(text).state(W)
            assert {name: tuple(x.shape) for name, x in state.items()} == shapes
            assert {x.dtype for x in state.values()} == {dtype if name == "adamw" else kept}
            assert not any(x.any() for x in state.values())


@pytest.mark.parametrize("name", sorted(STAGES.keys() - {"adamw"}))
def test_no_stage_changes_its_inputs(name):
    """Kills: an operation in place, on the caller's gradient or on what the next stage reads. On single matrices and on
    stacks, of all three shapes."""
    part = STAGES[name]
    for shape in SHAPES:
        for stack in ((), (2,)):
            W, *others = (draw(*stack, *shape, seed=seed) for seed in range(6))
            inputs = dict(zip(("G", "U", "N", "M", "W0"), others), W=W, lr=torch.tensor(0.02), t=torch.tensor(1.0),
                          L=draw(*row_pairs(W), seed=7), R=draw(*column_pairs(W), seed=8))
            inputs = {x: inputs[x] for x in part.takes}
            inputs |= {x: draw(*shape_of(W), seed=6).abs() for x, shape_of in part.state.items()}
            inputs |= {x: torch.tensor(0.1) for x, p in part.knobs.items() if p.default is p.empty}
            before = {x: value.clone() for x, value in inputs.items()}
            made = part.function(**inputs)
            assert all(torch.equal(value, before[x]) for x, value in inputs.items())
            made = made if isinstance(made, tuple) else (made,)
            assert len(made) == len(part.makes) + len(part.state)
            shapes = dict(L=row_pairs(W), R=column_pairs(W))
            assert all(x.shape == shapes.get(name, W.shape) for name, x in zip(part.makes, made))


# Stages of one's own

@pytest.fixture
def smooth(own_stages):
    """A stage with state, a knob and a part that runs after the step: it forgets half of what it has kept."""
    @stage(average=whole, after=lambda average: {"average": average / 2})
    def smooth(U, average, beta: BelowOne = 0.9):
        average = beta * average + (1 - beta) * U
        return average, average
    return smooth


def test_a_stage_of_ones_own(smooth):
    """Kills: state that is not kept, or kept before `after` has run; a knob that stands still; an order of the stages
    other than the text's. By class Aurora and by a rule on a stack, against a loop in float64 written by hand."""
    rule = Rule.of("nesterov(0.5) | smooth(ramp(0, 0.8, 0, 4)) | decay(0.1) | step")
    start = draw(3, *TALL, dtype=torch.float64)
    W, params = start.clone(), [nn.Parameter(w.clone()) for w in start]
    state, optimizer = rule.state(W), Aurora(params, lr=0.3, update=rule.text)
    expected, momentum, average = start, torch.zeros_like(start), torch.zeros_like(start)
    for done in range(6):
        G = draw(3, *TALL, seed=10 + done, dtype=torch.float64)
        rule.advance_(W, G, state, dict(lr=0.3, t=done + 1) | rule.at(done))
        rule.after_(state, done + 1)
        for p, g in zip(params, G):
            p.grad = g
        optimizer.step()

        momentum = 0.5 * momentum + 0.5 * G
        beta = 0.2 * min(done, 4)
        average = beta * average + (1 - beta) * (0.5 * G + 0.5 * momentum)
        expected = expected - 0.3 * 0.1 * expected - 0.3 * average
        average = average / 2
        for result in (W, torch.stack([p.detach() for p in params])):
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
        for kept in (state["smooth.average"], torch.stack([optimizer.state[p]["smooth.average"] for p in params])):
            torch.testing.assert_close(kept, average, rtol=0, atol=1e-12)
        assert {optimizer.state[p]["step"] for p in params} == {done + 1}
    assert smooth(start, start)[0].shape == start.shape  # the decorated function stays a function


def test_which_losses_a_rule_has(smooth):
    """Kills: a second validation because a stage's state is called average, or because a lookahead has a view of its
    own; an average whose loss a run does not measure."""
    ends = {"smooth | step": ["val_loss"], "step | lookahead": ["val_loss"],
            "step | tail_average | lookahead": ["val_loss", "val_ema_loss"],
            "step | anchored_average": ["val_loss", "val_ema_loss"]}
    assert {end: Hyperparameters(matrix_update=f"nesterov | {end}").metrics for end in ends} == ends


def test_a_stage_that_returns_too_little(own_stages):
    """Kills: state that silently keeps its zeros because a stage forgot to return it."""
    @stage(average=whole)
    def forgetful(U, average):
        return U
    rule, W = Rule.of("forgetful | step"), draw(1, *TALL)
    with pytest.raises(AssertionError, match="forgetful returns 1 values"):
        rule.advance_(W, W.clone(), rule.state(W), dict(lr=0.1, t=1))


@pytest.mark.parametrize("name, graphs, runs", [("halved", 0, 4), ("polar", 1, 2)])
def test_a_stage_that_no_graph_can_hold(name, graphs, runs, own_stages, monkeypatch):
    """Kills: a CUDA graph around a stage that says that none can hold it, and a graph lost where every stage can be
    held. Four steps of a bank on a fake GPU: without a graph each runs the update; else the second is captured."""
    @stage(captured=False)
    def halved(U):
        return U / 2
    rule, made, calls = Rule.of(f"nesterov(0.95) | {name} | step"), [], []
    assert rule.captured == bool(graphs)

    class Graph:
        def __init__(self):
            made.append(self)

        def replay(self):
            pass
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **named: contextlib.nullcontext())
    monkeypatch.setattr(rules, "compiled_rule", lambda text: lambda *arguments: calls.append(text))
    with FakeTensorMode(), Unguarded():
        params = {name: nn.Parameter(torch.empty(rows, 4, device="cuda")) for name, rows in (("a", 4), ("b", 8))}
        bank = Bank(params, (4, 4), rule, lambda step: 0.1, pool="pool")
        for step in range(4):
            bank.reduce()
            bank.step(step)
    assert len(made) == graphs and calls == [rule.text] * runs


def test_a_second_part_runs_beside_the_next_pass(own_stages, monkeypatch):
    """Kills: a second part in the stream of the forward pass, which would wait for it; one that begins before the step
    has made its state; a next step, a checkpoint or a load that does not wait for it. On a fake GPU, whose streams note
    in what order things are asked of them."""
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")
    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)

    @contextlib.contextmanager
    def on(stream):
        said.append(f"on {stream.name}")
        yield
        said.append("on main")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(rules, "compiled_rule", lambda text: lambda *arguments: said.append("step"))

    @stage(captured=False, average=whole, after=lambda average: said.append("after") or {})
    def slow(U, average):
        return U, average
    with FakeTensorMode(), Unguarded():
        params = {"a": nn.Parameter(torch.empty(4, 4, device="cuda"))}
        bank = Bank(params, (4, 4), Rule.of("slow | step"), lambda _: 0.1)
        for step in range(2):
            bank.reduce()
            bank.step(step)
        bank.buffers = {name: torch.empty(1, 4, 4) for name in ("masters", "slow.average")}
        bank.load(bank.gather_state())
    a_step = ["main waits for side", "step", "side waits for main", "on side", "after", "on main"]
    assert said == [*a_step, *a_step, "main waits for side", "main waits for side"]


# Shares

@pytest.mark.parametrize("count, world, multiple, share", [
    (1, 1, 1, 1), (7, 1, 1, 7), (7, 2, 1, 4), (7, 4, 1, 2), (3, 4, 1, 1), (5, 4, 1, 2), (9, 8, 1, 2), (1, 2, 64, 64),
    (129, 2, 64, 128), (128, 2, 64, 64)])
def test_shares_of_odd_counts(count, world, multiple, share, monkeypatch):
    """Kills: a slot that two ranks own or none, a share of another length than the other ranks', which a collective
    would not take, padding that is not zero or is taken from the wrong end. 5 slots on 4 ranks: 2, 2, 1 and none."""
    monkeypatch.setattr(aurora.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(aurora.dist, "get_world_size", lambda group: world)
    slots, taken, owned = torch.arange(1.0, 1 + 2 * count).view(count, 2), [], []
    for rank in range(world):
        monkeypatch.setattr(aurora.dist, "get_rank", lambda group: rank)
        shares = Shares.of(count, multiple)
        assert (shares.share, shares.padded) == (share, world * share) and share % multiple == 0
        taken.append(shares.take(slots))
        assert taken[-1].shape == (share, 2)
        owned += range(shares.padded)[shares.mine]
    whole = torch.cat(taken)
    assert owned == list(range(world * share))
    assert torch.equal(whole[:count], slots) and not whole[count:].any()


def test_shares_without_a_process_group():
    """Kills: a default process group that class Aurora needs where there is one process."""
    shares, slots = Shares.of(5), draw(5, 2)
    assert shares == Shares(count=5, share=5, rank=0, world=1)
    assert shares.reduce(slots) is shares.gather(slots) is None
    assert torch.equal(shares.take(slots), slots)
