"""What Dynamo makes of the model and of an update, which a GPU runs compiled: graphs without a break, each compiled
once, with the bits of their operators one by one."""

from functools import partial

import pytest
import torch
from conftest import DEVICE, UPDATES, one_process
from torch import nn
from torch._dynamo.utils import counters

import rules
from aurora import Aurora
from harness.ranks import Place
from kernels import bf16, cross_entropy, mlp, norm, qkv
from rules import Rule, advance_
from train_gpt import GPT, accumulate_gradients, fill, initial_weights, make_banks, override, validation_loss


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """How many Dynamo has made; and it has broken none."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_a_constant_result_is_marked_as_pytorch_marks_it():
    """Kills: another mark, as of another version, for which the compiled model breaks at the first kernel."""
    functions = (mark(lambda: 1) for mark in (bf16.assume_constant_result, torch.compiler.assume_constant_result))
    ours, theirs = map(vars, functions)
    assert ours == theirs != {}


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
@pytest.mark.parametrize("update", ["aurora", "normuon_lite", "aurora_july"])
def test_an_update_is_one_graph_a_shape(update, monkeypatch):
    """Kills: a construct that breaks the graph, a number of a schedule or of the steps so far that is a constant of the
    graph, so that each step compiles again; a number of a trial, for which the next one does.

    By class Aurora, whose stacks of three shapes are updated in one call each.
    """
    text = UPDATES[update].replace("nesterov(0.95)", "nesterov(ramp(0.85, 0.95, 0, 2))")
    text = text.replace("| step", "| decay(0.1) | step")

    def trial(advance):
        # as on a GPU, where numbers are tensors
        monkeypatch.setattr(rules, "advance_", lambda rule, W, G, state, knobs: advance(
            W, G, state, {name: torch.as_tensor(x, dtype=torch.float32) for name, x in knobs.items()}))
        shapes = [(16, 16)] * 3 + [(24, 8)] * 2 + [(8, 24)] * 2
        params = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
                  for i, shape in enumerate(shapes)]
        optimizer = Aurora(params, update=text)
        group, = optimizer.param_groups
        made = []
        for step in range(3):
            group["lr"] = 0.02 / (1 + step)
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
            made.append(graphs())
        state = [x for p in params for name, x in optimizer.state[p].items() if name != "step"]
        return made, [p.detach() for p in params] + state

    eager = partial(advance_, Rule.of(text))
    compiled = torch.compile(eager, dynamic=False, backend="aot_eager")
    (none, plain), (made, first), (again, second) = map(trial, (eager, compiled, compiled))
    assert (none, made, again) == ([0] * 3, [3] * 3, [3] * 3)
    for trained in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(plain, trained, strict=True))
