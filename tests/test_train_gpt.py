"""The parts of the trainer: recipe, data, model, schedule, source of the log."""

import ast
import gc
import math
import os
import re
import runpy
import weakref
from contextlib import nullcontext
from dataclasses import FrozenInstanceError
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import triton
from conftest import ROOT, one_process, train, write_shard

import train_gpt
from aurora import RESULT_17
from harness.arguments import departures
from harness.graphs import Replayed
from harness.log import facts, flatten, render
from harness.ranks import Place, fastest_attention, pin_attention
from harness.run import summary
from harness.shards import DamagedShard, batches_in, download_of, find_shards
from harness.trial import Clock
from initial import opposed_signs
from kernels.cross_entropy import fused_head_loss
from kernels.mlp import fused_relu2_mlp
from kernels.newton_schulz import NEWTON_SCHULZ_CHOICE
from kernels.norm import fused_prenorm
from kernels.qkv import fused_qkv_heads
from train_gpt import EXPERIMENT, GPT, RULES, Hyperparameters, initial_weights, override, read_batches

CPU = torch.device("cpu")


@pytest.fixture
def run_source(tmp_path, monkeypatch):
    """Runs a program, but not as the main one, and returns what it defines."""
    # the operators of kernels/ would be lost to those of the same name in a program taken from a log
    monkeypatch.setattr(torch.library, "custom_op", MagicMock())

    def run(source: str) -> dict:
        (tmp_path / "program.py").write_text(source)
        return runpy.run_path(str(tmp_path / "program.py"))
    return run


def test_the_defaults_are_result_17():
    """Kills: any constant of the published run that drifts; the table is copied from its log, not from our code."""
    assert vars(Hyperparameters()) == dict(
        train_files="data/fineweb10B/fineweb_train_*.bin", val_files="data/fineweb10B/fineweb_val_*.bin",
        batch_tokens=524288, sequence_length=1024, val_tokens=10485760, micro_batch=64,
        vocab_size=50304, num_layers=12, model_dim=768, head_dim=128, mlp_expansion=4.0, activation="relu2",
        matrix_update="nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step", matrix_lr=0.0375,
        adam_update="adamw(0.8, 0.95, 1e-10, 0)", embed_lr=0.3, head_lr=1 / 320, vector_lr=0.01,
        mlp_update="", head_update="", vector_update="", final_update="", embed_dtype="bfloat16",  # as the others
        matrix_schedule="linear(0.7)", adam_schedule="linear(0.7)", warmup_steps=1, train_steps=3200, stop_step=10**9,
        init="zero_projections",
        val_every=125, val_every_late=25, val_late=0.9, target_loss=3.28, metric="val_loss")
    with pytest.raises(FrozenInstanceError):
        Hyperparameters().matrix_lr = 0.9
    assert Hyperparameters().matrix_update == RESULT_17


def test_the_default_model_and_its_banks():
    """Kills: a layer, bias or gain too many or too few, a parameter that no optimizer or two have, banks mixed up, an
    order that sends the big vectors before the matrices, whose update takes longest."""
    hp = Hyperparameters()
    meta = torch.device("meta")
    with meta:
        model = GPT(hp)
    assert sum(p.numel() for p in model.parameters()) == 162_354_816
    banks = train_gpt.make_banks(model, hp, Place(0, 1, meta))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [tuple(bank.masters.shape) for bank in banks] == [
        (12, 3072, 768), (12, 768, 3072), (48, 768, 768), (50304 * 768,), (50304 * 768,),
        (162_354_816 - 2 * 50304 * 768 - 12 * 12 * 768**2,)]
    assert [bank.masters.dtype for bank in banks] == [torch.float32] * 4 + [torch.bfloat16, torch.float32]
    head, embed = list(banks[3].params), list(banks[4].params)
    assert (head, embed) == (["head.weight"], ["embed.weight"])
    assert [(bank.rule.text, bank.lr(0)) for bank in banks] == [
        *((hp.matrix_update, 0.0375),) * 3, *((hp.adam_update, lr) for lr in (1 / 320, 0.3, 0.01))]


def test_names_of_slots():
    """Kills: q, k and v as one name, by which no rule can tell them apart, or in another order than in their product;
    a knob by name that is another slot's, as of attn.v in the recipe of result #30."""
    hp = override(["@30_aurora_wide", "num_layers=2", "model_dim=32", "head_dim=16"])
    model = GPT(hp)
    *_, squares = train_gpt.make_banks(model, hp, Place(0, 1, CPU))[:3]
    assert squares.slots == [f"blocks.{i}.attn.{x}.weight" for i in (0, 1) for x in ("q", "k", "v", "proj")]
    of_v = torch.tensor([0.0, 0, 1, 0, 0, 0, 1, 0]).view(8, 1, 1)
    assert all(torch.equal(squares.knobs[f"trust_gate.{x}"], of_v) for x in ("floor", "cap"))
    assert torch.equal(squares.weights[2], model.blocks[0].attn.qkv.weight.chunk(3)[2])


def test_adamw_takes_the_matrices_too(small):
    """Kills: matrices left to no optimizer, the others' beta1, rate or decay on them, others without decay."""
    hp = override([*small, "matrix_lr=0.0015", "matrix_update=adamw(0.9, 0.95, 1e-10, 0.1)",
                   "adam_update=adamw(0.8, 0.95, 1e-10, 0.001)"])
    banks = train_gpt.make_banks(GPT(hp), hp, Place(0, 1, CPU))
    assert [(bank.lr(0), *bank.rule.parts[0].knobs.values()) for bank in banks] == [
        *((0.0015, 0.9, 0.95, 1e-10, 0.1),) * 3, *((lr, 0.8, 0.95, 1e-10, 0.001) for lr in (1 / 320, 0.3, 0.01))]
    assert sum(bank.shares.count for bank in banks[:3]) == 12


def test_mlp_options():
    """Kills: a width that ignores the expansion, a gate that relu2 has or swiglu lacks, a default model whose
    parameters, in whose order the initial weights are drawn, are not what they were."""
    with torch.device("meta"):
        mlps = [GPT(override(words)).blocks[0].mlp for words in (
            [], ["mlp_expansion=2.5"], ["mlp_expansion=0.0007"], ["activation=swiglu", "mlp_expansion=2.6666667"])]
    shapes = [{name: tuple(p.shape) for name, p in mlp.named_parameters() if p.ndim == 2} for mlp in mlps]
    assert shapes == [
        {"fc.weight": (3072, 768), "proj.weight": (768, 3072)},
        {"fc.weight": (1920, 768), "proj.weight": (768, 1920)},
        {"fc.weight": (1, 768), "proj.weight": (768, 1)},
        {"gate.weight": (2048, 768), "fc.weight": (2048, 768), "proj.weight": (768, 2048)}]
    assert [name for name, _ in mlps[0].named_parameters()] == ["fc.weight", "fc.bias", "proj.weight", "proj.bias"]


@pytest.mark.parametrize("words, line", [
    ([], []),
    (["matrix_lr=0.05", "train_steps=3000", "train_files=/data/*.bin", "micro_batch=8"], []),
    (["num_layers=4", "mlp_expansion=2"], ["not a record attempt: unlike result #17, num_layers=4, mlp_expansion=2.0"]),
    (["activation=swiglu"], ["not a record attempt: unlike result #17, activation=swiglu"]),
    (["batch_tokens=1048576"], ["not a record attempt: unlike result #17, batch_tokens=1048576"]),
    (["target_loss=3.3"], ["not a record attempt: unlike result #17, target_loss=3.3"]),
])
def test_departures_from_the_rules(words, line, run_source):
    """Kills: a run of another architecture, batch or target that passes for a record attempt, an optimizer's constant
    called a departure, a program taken from a log that compares its values with themselves."""
    hp = override(words)
    assert departures(hp, RULES) == line
    assert summary(EXPERIMENT, hp, 1).splitlines()[1:] == line
    assert [fact for fact in facts(EXPERIMENT, hp, Place(0, 1, CPU), {}).splitlines() if "record" in fact] == line
    namespace = run_source(render(flatten(ROOT / "train_gpt.py", ROOT), hp))
    assert namespace["departures"](namespace["Hyperparameters"](), namespace["EXPERIMENT"].rules) == line


@pytest.mark.parametrize("init, drawn", [("uniform_lengths", "uniform"), ("normal_lengths", "normal")])
def test_initial_weights_of_a_sphere(init, drawn):
    """Kills: a matrix that begins at zero and so stays there, a length that is another matrix's, biases or a head that
    are drawn where the program has zeros, a normal draw for a uniform one. 65,536 numbers: a deviation to 1%."""
    hp = override(["num_layers=1", "model_dim=256", "head_dim=64", "vocab_size=256", f"init={init}"])
    values = train_gpt.initial_weights(GPT(hp), 0, init)
    unit = (1 / 3 if drawn == "uniform" else 0.33) ** 0.5
    for name, factor, fan_in in (("attn.qkv", 1, 256), ("attn.proj", 1.25, 256), ("mlp.fc", 1.5, 256),
                                 ("mlp.proj", 3, 1024)):
        weight = values[f"blocks.0.{name}.weight"]
        assert weight.std().item() == pytest.approx(factor * unit / fan_in**0.5, rel=0.01)
        assert (weight.abs().max() <= factor / fan_in**0.5) == (drawn == "uniform")
        bias = values[f"blocks.0.{name}.bias"]
        assert bool(bias.any()) == (drawn == "uniform" and "proj" not in name)
        assert bias.abs().max() <= 1 / 16
    assert not values["head.bias"].any() and bool(values["head.weight"].any()) == (drawn == "normal")
    assert (values["blocks.0.norm1.gains"] == 1).all()


@pytest.mark.parametrize("init", ["zero_projections", "uniform_lengths", "normal_lengths", "uniform_zero_projections"])
def test_weights_that_are_drawn_one_by_one(init):
    """Kills: a draw in another order or of another generator than the parameters' own, gains or an embedding that
    depend on the rest. Bit by bit against a loop of its own."""
    model = GPT(override(["num_layers=2", "model_dim=64", "head_dim=32", "vocab_size=512", f"init={init}"]))
    values, generator = train_gpt.initial_weights(model, 5, init), torch.Generator().manual_seed(5)
    lengths = dict(zero_projections=(0, 0, 1), uniform_zero_projections=(0, 0, 1)).get(init, (1.25, 3.0, 1.5))
    uniform = init.startswith("uniform")
    for name, p in model.named_parameters():
        length, fan_in = 1.0, 256 if name.endswith("mlp.proj.weight") else 64
        for part, x in zip(("attn.proj.weight", "mlp.proj.weight", "mlp.fc.weight"), lengths):
            length = x if name.endswith(part) else length
        zero = ("proj.bias" in name or name == "head.bias" or name.endswith("bias") and not uniform
                or name == "head.weight" and init != "normal_lengths" or length == 0)
        if name.endswith("gains"):
            expected = torch.ones(64)
        elif name == "embed.weight":
            expected = torch.randn(512, 64, generator=generator)
        elif zero:
            expected = torch.zeros(p.shape)
        elif uniform:
            expected = (2 * torch.rand(p.shape, generator=generator) - 1) * length / fan_in**0.5
        elif init == "normal_lengths":
            expected = torch.randn(p.shape, generator=generator) * length * (0.33 / fan_in) ** 0.5
        else:
            expected = torch.randn(p.shape, generator=generator) * (0.33 / fan_in) ** 0.5
        assert torch.equal(values[name], expected), name


@pytest.mark.parametrize("init, strength", [("gain_signs", 0.14), ("paired_gain_signs", 0.125)])
@pytest.mark.parametrize("layers", [1, 5, 8])
def test_initial_weights_of_the_later_records(init, strength, layers):
    """Kills: fc shrunk by l / L or in the wrong direction, another matrix that shrinks too, gains of more than two
    values or of one sign for both norms, the model's own norms among them, a projection or its bias that is not zero,
    biases of zero, a normal draw, pairs that begin in the first half, whose sums do not cancel or whose signs are each
    other's opposite channel by channel, weights that depend on the signs. 65,536 numbers: a deviation to 0.5%.
    """
    model = GPT(override([f"num_layers={layers}", "model_dim=128", "head_dim=32", "vocab_size=512"]))
    values, unsigned = initial_weights(model, 1, init), initial_weights(model, 1, "uniform_zero_projections")
    assert [(name, v.shape) for name, v in values.items()] == [(n, p.shape) for n, p in model.named_parameters()]
    signs = []
    for block in range(layers):
        at = f"blocks.{block}."
        depth = 1 - 0.3 * block / max(1, layers - 1)
        std = values[at + "mlp.fc.weight"].std().item()
        assert std == pytest.approx(depth / (3 * 128) ** 0.5, rel=0.015)
        assert values[at + "mlp.fc.weight"].abs().max() <= depth / 128**0.5
        signs.append((values[at + "norm2.gains"] - 1) / strength)
        assert signs[-1].abs() == pytest.approx(1, rel=1e-5)
        assert values[at + "norm1.gains"] == pytest.approx(1 - strength * signs[-1], rel=1e-6)
        assert values[at + "attn.qkv.bias"].any() and values[at + "mlp.fc.bias"].any()
    for name, v in values.items():
        if "proj" in name or name.startswith("head"):
            assert not v.any()
        elif "fc.weight" not in name and not name.endswith("gains") or name.startswith("norm"):
            assert torch.equal(v, unsigned[name])
    groups = torch.stack(signs).round().view(layers, 4, 32)
    cancelling = [not (a + b).sum(dim=-1).any() for a, b in zip(groups, groups[1:])]
    paired = [init.startswith("paired") and block in range(layers // 2, layers, 2) for block in range(layers - 1)]
    assert cancelling == paired
    assert not any(torch.equal(a, -b) for a, b in zip(groups, groups[1:]))


def test_opposed_signs():
    """Kills: a half that is rounded up where upstream's is rounded to even, a sum of a group that is not halved. The
    numbers of +1 are recomputed from the same draws."""
    generator, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    a, b = opposed_signs(6000, 6, generator)
    for group in range(1000):
        fair = int(torch.randint(2, (6,), generator=again).sum())
        torch.randperm(6, generator=again), torch.randperm(6, generator=again)
        plus = {0: 2, 1: 2, 2: 2, 3: 3, 4: 4, 5: 4, 6: 4}[fair]  # 1.5, 2, 2.5, 3, 3.5, 4 and 4.5, to even
        assert (a[6 * group:][:6] == 1).sum() == plus and (b[6 * group:][:6] == 1).sum() == 6 - plus


def test_a_schedule_in_a_schedule():
    """Kills: a horizon that is train_steps whatever is given, or given and not read; a rate that goes over to another
    schedule a step early or late, or counts its steps anew; a number that a schedule cannot go over to."""
    hp = override(["train_steps=100", "matrix_schedule=ramp(power(50, 1, 200), ramp(linear(1), 0.25, 80, 90), 60, 61)"])
    rates = {0: 1, 60: 1, 61: 0.39, 80: 0.2, 85: (0.15 + 0.25) / 2, 90: 0.25, 99: 0.25}
    assert {t: train_gpt.learning_rate_factor(t, hp) for t in rates} == pytest.approx(rates)
    hp = override(["train_steps=100", "adam_schedule=power(50, 1, horizon=200)"])
    assert [train_gpt.learning_rate_factor(t, hp, "adam") for t in (99, 175)] == [1, 0.5]


def test_power_schedule():
    """Kills: another constant than those of results #44 to #46, whose rates are lr0 min(1, c (2900 - t)^1.2) with
    c = lr0 / 2386.4^1.2 (matrices); a rate above its start; a flat part that ends a step early."""
    hp = override(["train_steps=2900", "matrix_schedule=power(2386.4, 1.2)", "adam_schedule=power(1413, 1.2)"])
    for family, last, flat in (("matrix", 2386.4, 513), ("adam", 1413, 1487)):
        factors = [train_gpt.learning_rate_factor(step, hp, family) for step in range(2900)]
        assert factors == pytest.approx([min(1, (2900 - t) ** 1.2 / last**1.2) for t in range(2900)], rel=1e-12)
        assert factors[flat] == 1 > factors[flat + 1]
    assert train_gpt.learning_rate_factor(2690, hp) == pytest.approx(0.054, abs=5e-4)
    assert train_gpt.learning_rate_factor(2690, hp, "adam") == pytest.approx(0.102, abs=5e-4)


def test_initialisation(small):
    """Kills: a projection or head that is not zero, a std of 1/sqrt(fan_in), a draw that differs between two calls,
    a gate that is not drawn like the other input of the MLP."""
    model = GPT(override([*small, "model_dim=128", "activation=swiglu"]))
    values = initial_weights(model, seed=3)
    again, other = initial_weights(model, seed=3), initial_weights(model, seed=4)
    assert [(name, v.shape) for name, v in values.items()] == [(n, p.shape) for n, p in model.named_parameters()]
    for name, v in values.items():
        assert torch.equal(v, again[name]) and v.dtype == torch.float32
        if name.endswith("gains"):
            assert (v == 1).all()
        elif name.endswith("bias") or "proj" in name or "head" in name:
            assert (v == 0).all()
        else:
            std = 1 if name == "embed.weight" else (0.33 / 128) ** 0.5
            assert v.std().item() == pytest.approx(std, rel=0.03)  # 16,384 draws: sd of .6%
    assert not torch.equal(values["embed.weight"], other["embed.weight"])
    # as the published program draws q, k and v: one after the other
    generator = torch.Generator().manual_seed(3)
    torch.randn(50304, 128, generator=generator)
    q, k = (torch.randn(128, 128, generator=generator) * (0.33 / 128) ** 0.5 for _ in range(2))
    assert torch.equal(values["blocks.0.attn.qkv.weight"][:256], torch.cat([q, k]))


def filled(model: GPT, values: dict, dtype=torch.bfloat16) -> GPT:
    for name, p in model.named_parameters():
        p.data = values[name].to(dtype)
    return model


@pytest.fixture(params=["relu2", "swiglu"])
def model(request, small):
    """Small, with every zero of the initialisation replaced: a zero head would hide what the rest does."""
    model = GPT(override([*small, "vocab_size=512", f"activation={request.param}"]))
    generator = torch.Generator().manual_seed(1)
    values = initial_weights(model, seed=0)
    return filled(model, {name: v + 0.1 * torch.randn(v.shape, generator=generator) for name, v in values.items()})


def test_the_future_does_not_reach_the_past(model):
    """Kills: attention without its mask, targets used as inputs."""
    inputs = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(2))
    changed = inputs.clone()
    changed[:, 20] += 1
    a, b = model.activations(inputs), model.activations(changed)
    assert torch.equal(a[:, :20], b[:, :20])
    assert (a[:, 20:] != b[:, 20:]).any(dim=-1).all()


def test_loss_at_initialisation(small):
    """Kills: a head that is not zero, a mean where a sum was meant. Zero logits give ln(50304) a token."""
    model = GPT(override(small))
    filled(model, initial_weights(model, seed=0))
    inputs = torch.randint(400, (4, 32))
    assert model(inputs, inputs).item() / 128 == pytest.approx(math.log(50304), rel=1e-6)


def test_logits_are_those_of_a_model_written_in_float64(model):
    """Kills: a wrong rotary sign, half or frequency, QK-norm left out, attention scaled by .125 for .12, relu for
    relu^2, a gate and its input exchanged, a missing residual or gain, norm after the layer, activations not in bf16.

    With the embedding in fp32 all activations are; two layers of fp32 against float64 agree to 1e-4 of the spread.
    """
    inputs = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(3))
    P = {n: p.detach().double() for n, p in model.named_parameters()}

    def norm(x, gains=1.0):
        return x / (x * x).mean(-1, keepdim=True).sqrt() * gains

    def linear(x, name):
        return x @ P[name + ".weight"].T + P[name + ".bias"]

    def turn(x):  # (T, K) of one head: pairs (x_j, x_{j+8}) as complex numbers, turned backwards by t * frequency_j
        frequency = torch.tensor([(1 / 1024) ** (j / 3) for j in range(4)] + [0.0] * 4, dtype=torch.float64)
        z = torch.complex(x[:, :8], x[:, 8:]) * torch.exp(-1j * torch.arange(32.0)[:, None] * frequency)
        return torch.cat([z.real, z.imag], dim=1)

    logits = []
    for row in inputs:
        x = norm(P["embed.weight"][row], P["norm1.gains"])
        for i in range(2):
            y = norm(x, P[f"blocks.{i}.norm1.gains"])
            q, k, v = linear(y, f"blocks.{i}.attn.qkv").split(32, dim=1)
            heads = []
            for h in (slice(0, 16), slice(16, 32)):
                score = 0.12 * turn(norm(q[:, h])) @ turn(norm(k[:, h])).T
                score += torch.full((32, 32), -math.inf).triu(1)
                heads.append(score.softmax(1) @ v[:, h])
            x = x + linear(torch.cat(heads, 1), f"blocks.{i}.attn.proj")
            y = norm(x, P[f"blocks.{i}.norm2.gains"])
            hidden = linear(y, f"blocks.{i}.mlp.fc")
            if f"blocks.{i}.mlp.gate.weight" in P:
                gate = linear(y, f"blocks.{i}.mlp.gate")
                hidden = gate / (1 + torch.exp(-gate)) * hidden
            else:
                hidden = hidden.clamp(min=0) ** 2
            x = x + linear(hidden, f"blocks.{i}.mlp.proj")
        logits.append(linear(norm(x, P["norm2.gains"]), "head"))
    exact = torch.stack(logits)
    assert model.activations(inputs).dtype == torch.bfloat16
    ours = model.head(model.float().activations(inputs))
    assert (ours.double() - exact).abs().max() < 1e-4 * exact.std()


@pytest.fixture
def kernels(monkeypatch):
    """What a GPU runs, interpreted."""
    monkeypatch.setattr(train_gpt, "head_loss", partial(fused_head_loss, rows=40))
    monkeypatch.setattr(train_gpt, "relu2_mlp", fused_relu2_mlp)
    monkeypatch.setattr(train_gpt, "qkv_heads", fused_qkv_heads)
    monkeypatch.setattr(train_gpt, "prenorm", fused_prenorm)


def test_the_model_is_one_graph(model, kernels):
    """Kills: a construct that torch.compile cannot trace: on a GPU it would break the graph, quietly and slowly."""
    inputs = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(4))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert compiled(inputs, inputs).item() == model(inputs, inputs).item()


def test_kernels_train_as_their_references_do(model, request):
    """Kills: a gradient that a kernel gives the wrong parameter, scales or leaves out: the losses after it differ.

    Four steps of gradient descent in fp32, after which the loss has fallen by a third. Sums of other orders: 1e-5.
    """
    inputs, targets = torch.randint(400, (2, 4, 32), generator=torch.Generator().manual_seed(6))
    start = {name: p.detach().float() for name, p in model.named_parameters()}

    def losses():
        filled(model, {name: v.clone() for name, v in start.items()}, torch.float32)
        found = []
        for _ in range(5):
            loss = model(inputs, targets)
            loss.backward()
            found.append(loss.item())
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
            model.zero_grad()
        return found
    references = losses()
    request.getfixturevalue("kernels")
    assert losses() == pytest.approx(references, rel=1e-5)
    assert references[-1] < 0.7 * references[0]


def test_schedule():
    """Kills: a cooldown over 0.3 instead of the last 0.7, a rate that is 0 at the reported step, a warm-up
    that begins at 0, is a step late or puts the cooldown off, an evaluation lost."""
    hp = Hyperparameters()
    factor = [train_gpt.learning_rate_factor(step, hp) for step in range(3200)]
    assert factor[0] == factor[959] == 1
    assert factor[960] == pytest.approx(1) and factor[2080] == pytest.approx(0.5)
    assert factor[3175] == pytest.approx(25 / 2240) and factor[3199] == pytest.approx(1 / 2240)
    warm = override(["warmup_steps=4", "train_steps=8", "matrix_schedule=linear(1)"])
    assert [train_gpt.learning_rate_factor(step, warm) for step in range(8)] == pytest.approx(
        [1 / 4, 2 / 4 * 7 / 8, 3 / 4 * 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    steps = [step for step in range(3201) if train_gpt.is_validation_step(step, hp)]
    assert steps == [*range(0, 2880, 125), *range(2900, 3201, 25)]


def test_batches_are_upstreams(tmp_path):
    """Kills: targets not shifted by one, ranks that overlap or leave a gap, a shard left too early or too late.

    Tokens are their own positions, so that what is read can be checked by arithmetic. 8-token batches: a shard of
    26 tokens gives 3 (0 + 8 + 1 < 26, 8 + 8 + 1 < 26, 16 + 8 + 1 < 26), one of 25 gives 2.
    """
    write_shard(tmp_path / "b.bin", np.arange(100, 125))
    write_shard(tmp_path / "a.bin", np.arange(26))
    shards = find_shards(f"{tmp_path}/*.bin", 8, 5, 50304)
    assert list(shards.values()) == [26, 25]
    for world in (1, 2, 4):
        ranks = [list(read_batches(shards, 8, 2, Place(rank, world, CPU))) for rank in range(world)]
        assert [len(batches) for batches in ranks] == [5] * world
        for batch, start in enumerate([0, 8, 16, 100, 108]):
            inputs = torch.cat([batches[batch][0].flatten() for batches in ranks])
            targets = torch.cat([batches[batch][1].flatten() for batches in ranks])
            assert inputs.tolist() == list(range(start, start + 8))
            assert targets.tolist() == list(range(start + 1, start + 9))
    assert batches_in(np.empty(100_000_000, np.uint16), 524288) == 190


def test_gradients_do_not_depend_on_the_micro_batch(model, small):
    """Kills: a mean over micro-batches, a gradient that is overwritten, lost, or summed in bf16, or to the last step's.

    A micro-batch's own gradient is rounded to bf16 (2^-9), so sums over other partitions differ by about that; one
    partition's must be exactly the fp32 sum of its micro-batches'.
    """
    inputs, targets = batch = torch.randint(400, (2, 8, 32), generator=torch.Generator().manual_seed(5))
    values = {name: p.detach().float() for name, p in model.named_parameters()}
    results = []
    with one_process():
        for micro_batch in (8, 3, 1):  # 3 does not divide 8: 2 is used
            hp = override([*small, f"micro_batch={micro_batch}"])
            banks = train_gpt.make_banks(model, hp, Place(0, 1, CPU))
            train_gpt.fill(banks, values)
            for bank in banks:
                bank.gradients.fill_(1)  # of the step before
            loss = train_gpt.accumulate_gradients(model, banks, batch, hp)
            results.append((loss.item(), {name: g for bank in banks
                                          for name, g in zip(bank.params, bank.views(bank.gradients.clone()))}))
    parts = []
    for sequence in zip(inputs.split(1), targets.split(1)):  # the last micro_batch above
        model(*sequence).backward()
        parts.append({name: p.grad.float() for name, p in model.named_parameters()})
        model.zero_grad()
    for name, gradient in results[-1][1].items():
        assert torch.equal(gradient, sum(part[name] for part in parts))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, reference in results[0][1].items():
            assert (gradients[name] - reference).norm() < 0.02 * reference.norm()


def test_clock_counts_training_alone(monkeypatch):
    """Kills: validation counted as training, a lap that is counted twice or not at all."""
    instants = iter([0, 5, 25, 26, 30])
    monkeypatch.setattr("harness.trial.time", SimpleNamespace(perf_counter=lambda: next(instants)))
    with one_process():
        clock = Clock(Place(0, 1, CPU))
        assert clock.read() == 5
        clock.resume()  # at 25
        assert clock.read() == 6
        assert clock.read() == 10


def test_what_downloads_the_shards_of_a_run():
    """Kills: 16 or 18 shards for 3200 steps (190 batches each), a download for a run on other text, the program of
    another dataset than the one that is read."""
    ten, hundred = "data/cached_fineweb10B.py", "train_files=data/fineweb100B/fineweb_train_*.bin"
    for words, download in (([], f"{ten} 17"), (["train_steps=3230"], f"{ten} 17"), (["train_steps=3231"], f"{ten} 18"),
                            (["batch_tokens=1048576"], f"{ten} 34"), (["train_files=a*.bin"], ""),
                            ([hundred], "data/cached_fineweb100B.py 17"),
                            ([hundred, "batch_tokens=4194304", "train_steps=23690"],
                             "data/cached_fineweb100B.py 1030")):
        assert download_of(override(words)) == download
        for program in download.split(" ")[:1]:
            assert not program or (ROOT / program).exists()


def test_shards_are_read_when_the_run_comes_to_them(tmp_path, monkeypatch):
    """Kills: every token of 1,000 shards read before the first step, or of those that a resumed run has behind it; a
    token outside of the vocabulary that is trained on; a header or a size that is looked at too late."""
    for number in range(4):
        write_shard(tmp_path / f"{number}.bin", [5] * 26 if number != 2 else [5] * 25 + [600])
    read = []
    monkeypatch.setattr("harness.shards.check_tokens", lambda tokens, _: read.append(os.path.basename(tokens.filename)))
    shards = find_shards(f"{tmp_path}/*.bin", 8, 12, 512)
    assert len(shards) == 4 and read == ["0.bin"]
    batches = read_batches(shards, 8, 2, Place(1, 2, CPU), vocab_size=512)
    assert [len(next(batches)[0]) for _ in range(6)] == [2] * 6
    with pytest.raises(DamagedShard, match=r"/2.bin holds token 600, vocab_size is 512: delete it"):
        next(batches)
    assert len(list(read_batches(shards, 8, 2, Place(0, 1, CPU), first=9, vocab_size=512))) == 3
    write_shard(tmp_path / "3.bin", [5] * 26, count=27)
    with pytest.raises(DamagedShard, match="3.bin holds 26 tokens, its header says 27"):
        find_shards(f"{tmp_path}/*.bin", 8, 12, 512)


def test_overrides(tmp_path):
    """Kills: a value of the wrong type, a recipe's comment read as a value, an earlier word that wins."""
    (tmp_path / "recipe").write_text("# small\nnum_layers=3  # three\n\nmatrix_lr=2e-2\n")
    hp = override([f"@{tmp_path}/recipe", "num_layers=4", "train_files=a=b"])
    assert (hp.num_layers, hp.matrix_lr, hp.train_files) == (4, 0.02, "a=b")
    assert hp.train_steps == 3200


def test_a_knob_of_a_stage():
    """Kills: a knob of another stage or of another rule that changes, an earlier word that wins, a schedule that is
    refused as a value."""
    def rule(*words):
        return override([*words]).matrix_update
    assert rule("floor.target=0.4", "contra.strength=0.5", "floor.target=0.3") == RESULT_17.replace(
        "0.35", "0.3").replace("contra(0.4)", "contra(0.5)")
    assert rule("matrix_update=nesterov | polar | step", "nesterov.mu=ramp(0.85, 0.95, 0, 300)") == (
        "nesterov(ramp(0.85, 0.95, 0, 300)) | polar | step")
    assert rule("floor.target=0.4", "matrix_update=polar | step") == "polar | step"
    hp = override(["adamw.decay=0.1"])
    assert (hp.adam_update, hp.matrix_update) == ("adamw(0.8, 0.95, 1e-10, 0.1)", RESULT_17)


@pytest.mark.parametrize("words, says", [
    (["matrix_rl=1"], "'matrix_rl' is not a hyperparameter; the nearest is 'matrix_lr'"),
    (["train_steps=1e3"], "train_steps takes a value of type int"),
    (["head_lr=high"], "head_lr takes a value of type float"),
    (["head_lr=nan"], "head_lr=nan: it is finite and not negative"),
    (["micro_batch=0"], "micro_batch=0: it is at least 1"),
    (["head_dim=100"], "head_dim=100 does not divide model_dim=768"),
    (["adam_update=adamw(1.0)"], "adam_update: adamw(1.0): beta1 is a number at least 0 and below 1, not 1.0"),
    (["adam_update=polar | step"], "adam_update: vectors and numbers have no rows"),
    (["head_update=eigen_adam | step", "vocab_size=1004"], "head_update: the head is moved in 8 equal parts, which "
     "vocab_size=1004 does not allow: take a multiple of 8"),
    (["matrix_update=nesterov | polar | step", "aurora.iterations=3"], "no rule of this run has a stage 'aurora'"),
    (["floor.target=low"], "floor(low): target is a number, finite and not negative"),
    (["floor.target=0.9) | polar(2"], "'0.9) | polar(2' is not understood: write it as a number or a schedule"),
    (["flor.target=0.4"], "no rule of this run has a stage 'flor'; the nearest is 'floor'"),
    (["floor.taget=0.4"], "floor.taget=0.4: floor has no 'taget'; the nearest is 'target'"),
    (["matrix_update=adamw", "adamw.beta1=0.9"], "adamw is in matrix_update and adam_update; write the one"),
    (["matrix_update=sgd", "floor.target=0.4"], "there is no stage 'sgd'; the nearest is "),
    (["activation=gelu"], "activation='gelu': it is one of relu2, swiglu"),
    (["mlp_expansion=0.0001"], "mlp_expansion=0.0001: no neuron is left of 768 times that"),
    (["warmup_steps=0"], "warmup_steps=0: it is at least 1"),
    (["matrix_schedule=linear(7)"], "matrix_schedule: linear(7): fraction is a number above 0 and at most 1, not 7"),
    (["adam_schedule=cosine(0.7)"], "adam_schedule: there is no schedule 'cosine'; the nearest is 'linear'"),
    (["init=kaiming"], "init='kaiming': it is one of zero_projections, uniform_lengths, normal_lengths, uniform_zero"),
    (["matrix_update=poler | step"], "matrix_update: there is no stage 'poler'; the nearest is 'polar'"),
    (["17"], "'17' is not understood: write NAME=VALUE or @RECIPE"),
    (["@nowhere"], "there is no records/nowhere/recipe"),
])
def test_wrong_overrides(words, says):
    """Kills: a typo that is ignored, an error that does not name the thing."""
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        override(words)
    assert "\n" not in str(error.value)


def test_rendered_source_is_the_run(run_source):
    """Kills: a value written into the wrong line or lost, a default that is respelled, a second rendering that
    differs from the first, a local import that stays."""
    source = flatten(ROOT / "train_gpt.py", ROOT)
    assert render(source, Hyperparameters()) == source
    assert not [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)
                and (ROOT / (n.module.replace(".", "/") + ".py")).exists()]
    hp = override(["matrix_lr=0.02", "train_steps=100", "floor.target=0.4", "train_files=x/*.bin"])
    rendered = render(source, hp)
    assert render(rendered, hp) == rendered
    changed = [line for line, old in zip(rendered.splitlines(), source.splitlines(), strict=True) if line != old]
    assert [line.split("#")[0].strip() for line in changed] == [
        "train_files: str = 'x/*.bin'",
        "matrix_update: str = 'nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.4) | step'",
        "matrix_lr: float = 0.02", "train_steps: int = 100"]
    namespace = run_source(rendered)
    assert vars(namespace["Hyperparameters"]()) == vars(hp)


def test_the_program_of_a_log_is_its_files(tmp_path):
    """Kills: a file that is lost, twice there, cut, or below one that needs it; a banner with another's name; a
    docstring of the program that is another file's; a program that is put together anew from itself."""
    source = flatten(ROOT / "train_gpt.py", ROOT)
    opening, *parts = re.split(r"^#{80}\n# +(\S+) +#\n#{80}\n", source, flags=re.MULTILINE)
    files = dict(zip(parts[::2], parts[1::2]))
    assert list(files)[-1] == "train_gpt.py" and len(files) == len(parts) // 2
    assert ast.get_docstring(ast.parse(source), clean=False) == train_gpt.__doc__
    files["train_gpt.py"] = f"{opening.rstrip()}\n{files['train_gpt.py']}"
    above = set()
    for name, text in files.items():
        needed = re.findall(r"^# from (\S+) import \w", text, flags=re.MULTILINE)
        assert {f"{module.replace('.', '/')}.py" for module in needed} <= above
        assert re.sub(r"^# (from \S+ import \w)", r"\1", text, flags=re.MULTILINE).rstrip() == (
            ROOT / name).read_text().rstrip()
        above.add(name)
    folders = {f"{path.parent.name}/{path.name}" for path in ROOT.glob("*/[!_]*.py")
               if path.parent.name in ("kernels", "harness")}
    assert above == {"train_gpt.py", "aurora.py", "initial.py", "rules.py", *folders} - {
        "harness/doctor.py", "harness/torchrun.py"}
    (tmp_path / "program.py").write_text(source)
    assert flatten(tmp_path / "program.py", tmp_path) == source


@pytest.mark.parametrize("main, other, complaint", [
    ("import kernels.other", "", "main.py:1: import kernels.other: "),
    ("import math, kernels.other", "", "main.py:1: import math, kernels.other: "),
    ("from kernels.other import a as b", "a = 1", "main.py:1: from kernels.other import a as b: "),
    ("from kernels.other import *", "a = 1", "main.py:1: from kernels.other import "),
    ("from kernels import other", "", "main.py:1: from kernels import other: "),
    ("from . import kernels", "", "main.py:1: from . import kernels: "),
    ("def f():\n    from kernels.other import a", "a = 1", "main.py:2: from kernels.other import a: "),
    ("from kernels.other import a\nb = 2", "a, b = 1, 2", "main.py: b is main.b here and kernels.other.b above"),
    ("from kernels.other import a\ndef b(): pass", "a = 1\nclass b: pass", "main.py: b is main.b here and kernels"),
    ("from kernels.other import a\nimport torch as F", "import torch.nn as F\na = 1", "F is torch here and torch.nn"),
    ("from kernels.other import a\nimport os.path", "a = os = 1", "main.py: os is os here and kernels.other.os above"),
    ("from kernels.other import a\nfrom math import e", "a = 1\nfor e in []: pass", "main.py: e is math.e here and ke"),
    ("from kernels.other import round", "def round(x): pass", "round is kernels.other.round here and builtins."),
    ("from kernels.other import a\nimport os.path\nfrom os import path", "import os.path as path, os\na = 1", ""),
    ("from kernels.other import (a,\n  b)\nc = [x for x in (1,)]", "a = b = 1\ndef f(c, x): e = 1", ""),
])
def test_what_one_file_cannot_hold(main, other, complaint, tmp_path):
    """Kills: an import of a local file that a log's program would still ask for, or whose names it would not have; two
    meanings of one name, of which the program would keep the last; a local variable taken for such a name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "kernels" / "other.py").write_text(other + "\n")
    (tmp_path / "main.py").write_text(main + "\n")
    if complaint:
        with pytest.raises(AssertionError, match=re.escape(complaint)):
            flatten(tmp_path / "main.py", tmp_path)
    else:
        exec(flatten(tmp_path / "main.py", tmp_path), {})


@pytest.mark.parametrize("device, capability, activation, lines", [
    ("cpu", None, "relu2", ["kernels: plain PyTorch", "newton_schulz: reference"]),
    ("cpu", None, "swiglu", ["kernels: plain PyTorch", "newton_schulz: reference"]),
    ("cuda", (7, 5), "swiglu", ["kernels: plain PyTorch", "newton_schulz: reference"]),
    ("cuda", (8, 0), "relu2", ["kernels: Triton", f"newton_schulz: {', '.join(NEWTON_SCHULZ_CHOICE)}"]),
    ("cuda", (8, 0), "swiglu", ["kernels: Triton, MLP plain PyTorch",
                                f"newton_schulz: {', '.join(NEWTON_SCHULZ_CHOICE)}"])])
def test_the_log_names_what_computes(device, capability, activation, lines, monkeypatch):
    """Kills: a log that says kernels where PyTorch computes, as it does an MLP with a gate, or the other way round. The
    tests of kernels hold the dispatchers to the same cards."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    said = facts(EXPERIMENT, Hyperparameters(activation=activation), Place(0, 1, torch.device(device)), {}).splitlines()
    assert [line for line in said if line.startswith(("kernels: ", "newton_schulz: "))] == lines
    assert (f"triton: {triton.__version__}" in said) == (device == "cuda")


@pytest.mark.parametrize("capability, head_dim, versions, backend", [
    ((9, 0), 128, (92000, (13, 0)), "cudnn"), ((10, 0), 64, (91501, (12, 9)), "cudnn"),
    ((9, 0), 128, (91500, (13, 0)), "flash"), ((9, 0), 128, (92000, (12, 8)), "flash"),
    ((8, 0), 128, (92000, (13, 0)), "flash"), ((12, 0), 128, (92000, (13, 0)), "flash"),
    ((9, 0), 256, (92000, (13, 0)), "flash"), ((9, 0), 12, (92000, (13, 0)), "flash"),
    ((9, 0), 264, (92000, (13, 0)), "mem_efficient"), ((7, 5), 64, (92000, (13, 0)), "mem_efficient"),
    ((9, 0), 260, (92000, (13, 0)), "math"), ((7, 5), 20, (92000, (13, 0)), "math")])
def test_the_attention_of_a_card(capability, head_dim, versions, backend):
    """Kills: heads of a size that the pinned backend does not take, so that the model fails as it compiles; a version
    of cuDNN that is wrong; an older card pinned to what it has not."""
    assert fastest_attention(capability, head_dim, *versions) == backend


def test_one_backend_of_attention_is_allowed(monkeypatch):
    """Kills: a backend that stays allowed beside the one that the log names; the size of the heads not asked for."""
    allowed = {}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp", partial(allowed.__setitem__, name))
    for head_dim, fastest in ((128, "cudnn"), (192, "flash")):
        assert pin_attention(torch.device("cuda", 0), head_dim) == fastest
        assert allowed == {name: name == fastest for name in ("cudnn", "flash", "mem_efficient", "math")}
    assert pin_attention(CPU, 128) == "PyTorch"


def test_products_are_summed_in_fp32(quick, tmp_path, monkeypatch):
    """Kills: cuBLAS's default, by which the parts of a long product may be added in bf16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = True
        train(tmp_path, [*quick, "train_steps=1"])
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_a_finished_trial_leaves_no_bank(quick, tmp_path, monkeypatch):
    """Kills: a bank that refers to itself. It would live on, with a trial's weights, gradients and states, until Python
    looks for such circles, which in a run it may never do."""
    alive, begun, make_banks = [], [], train_gpt.make_banks

    def counted(model, hp, place):
        begun.append(sum(bank() is not None for bank in alive))
        banks = make_banks(model, hp, place)
        for bank in banks:
            bank.run = Replayed("pool")
        alive.extend(map(weakref.ref, banks))
        return banks
    monkeypatch.setattr(train_gpt, "make_banks", counted)
    # a graph that replays nothing: only who refers to whom matters here
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **settings: nullcontext())
    gc.disable()
    try:
        train(tmp_path, [*quick, "--trials", "3"])
    finally:
        gc.enable()
    assert len(alive) == 18 and begun == [0, 0, 0]
