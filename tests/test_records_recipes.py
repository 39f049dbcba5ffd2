"""The recipes under records/, against constants copied from the programs at the head of the published logs."""

import math
import re
from collections import namedtuple
from dataclasses import fields
from glob import glob

import pytest
import torch
from conftest import ROOT, one_process, start

import train_gpt
from harness.ranks import Place
from records.recipes import meaning, read_recipe, recipes, rule
from rules import Named, Rule
from train_gpt import GPT, Hyperparameters, accumulate_gradients, initial_weights, make_banks, override

# train_steps, the reported step, rule and rate of the matrices, rule of all others, rates of embedding, head and
# vectors, warm-up steps. 1 warm-up step is none.
ADAMW = "adamw(0.8, 0.95, 1e-10, 0)"
PUBLISHED = {
    "adamw": (5625, 5625, "adamw(0.9, 0.95, 1e-10, 0.1)", .0015, ADAMW, .3, 1 / 320, .01, 250),
    "06_muon": (3375, 3375, "nesterov(0.95) | polar | aspect | decay(0.025) | step", .025, ADAMW, .3, 1 / 320, .01, 1),
    "36_muon_tuned": (3250, 3250, "nesterov(0.95) | polar | aspect | decay(0.05) | step", .025,
                      "adamw(0.8, 0.95, 1e-10, 0.001)", .7, .004, .015, 1),
    "10_normuon": (3300, 3250, "nesterov(0.95) | polar | normuon_lite(0.95) | aspect | decay(0.025) | step", .035,
                   ADAMW, .3, 1 / 320, .01, 1),
    # these two set a decay of .025 and do not apply it
    "09_normuon_uw_floor": (3250, 3250, "nesterov(0.95) | polar | normuon_lite(0.95) | aspect | floor(0.35) | step",
                            .0375, ADAMW, .3, 1 / 320, .01, 1),
    "11_contra_muon": (3225, 3225, "nesterov(0.95) | polar | contra(0.4) | normuon_lite(0.95) | aspect | floor(0.35) | "
                       "step", .0375, ADAMW, .3, 1 / 320, .01, 1),
    "05_muonh": (3325, 3325, "nesterov(0.95) | polar | hyperball", .018, ADAMW, .3, 1 / 320, .01, 1),
    "08_normuonh": (3275, 3250, "nesterov(0.95) | polar | normuon_lite(0.95) | hyperball", .018, ADAMW, .3, 1 / 320,
                    .01, 1),
    "37_muonh_tuned": (3250, 3250, "nesterov(0.95) | polar | hyperball", .018, "adamw(0.8, 0.95, 1e-10, 0.001)", .91,
                       .0064, .0195, 1),
    "17_aurora": (3200, 3175, "nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step", .0375,
                  ADAMW, .3, 1 / 320, .01, 1),
}
# of those on a sphere the schedules and the initial weights too; all others have result #17's
SPHERES = {"05_muonh": ("linear(1)", "linear(0.4)", "uniform_lengths"),
           "08_normuonh": ("linear(1)", "linear(0.4)", "uniform_lengths"),
           "37_muonh_tuned": ("linear(1)", "linear(0.85)", "normal_lengths")}
# The later results, from the programs in their logs: the rates' horizon, the last step, the claimed step, the first of
# the dense evaluations and their distance.
Later = namedtuple("Later", "horizon last claimed dense every")
LATER = {"14_soap_mlp": Later(3175, 3175, 3150, 3100, 25), "20_powercool": Later(3105, 3040, 3030, 3000, 10),
         "29_radial_brake": Later(3105, 3020, 2990, 2990, 10), "30_aurora_wide": Later(3050, 3020, 2930, 2820, 10),
         "40_ema_nesterov": Later(2980, 2900, 2890, 2820, 10), "44_soap_muon": Later(2900, 2900, 2750, 2700, 5),
         "45_tail_ema": Later(2900, 2720, 2720, 2700, 5), "46_rowfloor_cwd": Later(2900, 2900, 2690, 2600, 5),
         "339_bimaxwell": Later(2900, 2900, 2635, 2600, 5), "2540_open_claim": Later(2840, 2600, 2540, 2500, 5)}
UNCOOLED = ("14_soap_mlp",)  # linear, over the last 0.7
AVERAGED = ("45_tail_ema", "46_rowfloor_cwd", "339_bimaxwell", "2540_open_claim")
SOAP_ALL = ("44_soap_muon", *AVERAGED)
SOAP_V = ("20_powercool", "29_radial_brake", "30_aurora_wide", "40_ema_nesterov")
BY_ROW = ("46_rowfloor_cwd", "339_bimaxwell", "2540_open_claim")
STAGES = {
    "14_soap_mlp": "nesterov polar contra normuon_lite aspect floor step",
    "20_powercool": "nesterov soap trust_gate schatten4_polar schatten4_contra schatten4_normuon_lite aspect floor "
                    "step",
    "29_radial_brake": "nesterov soap trust_gate schatten4_polar schatten4_contra schatten4_normuon_lite aspect brake "
                       "floor step pin",
    "30_aurora_wide": "nesterov soap trust_gate schatten4_polar schatten4_contra aspect brake floor step pin",
    "40_ema_nesterov": "nesterov soap trust_gate schatten4_polar schatten4_contra aspect brake floor step pin "
                       "lookahead",
    "44_soap_muon": "nesterov soap trust_gate schatten4_polar aspect brake floor step pin lookahead",
    "45_tail_ema": "nesterov soap trust_gate schatten4_polar aspect brake floor step pin tail_average lookahead",
    "46_rowfloor_cwd": "nesterov soap trust_gate schatten4_polar aspect brake row_floor step pin cautious_decay "
                       "tail_average lookahead",
    "339_bimaxwell": "bimaxwell soap trust_gate schatten4_polar aspect brake row_floor step pin cautious_decay "
                     "tail_average lookahead",
    "2540_open_claim": "bimaxwell soap trust_gate schatten4_polar aspect anneal brake row_floor step pin "
                       "cautious_decay anchored_average lookahead"}
SAMPLES = (0, 1, 150, 298, 299, 300, 514, 999, 1000, 1001, 1374, 1375, 1400, 1500, 1624, 1625, 1888, 1889, 1948, 1949,
           2000, 2039, 2099, 2150, 2199, 2499, 2639, 2640, 2690, 2700, 2719, 2750, 2799, 2800, 2839)


def knob(rule: Rule, stage: str, name: str, step: int, parameter: str = "") -> float | None:
    """What a knob is after `step` steps; None where the rule has no such stage."""
    for part in rule.parts:
        if part.stage.name == stage:
            value = part.knobs.get(name, part.stage.knobs[name].default)
            return value(parameter if isinstance(value, Named) else step) if callable(value) else value


@pytest.mark.parametrize("name", LATER)
def test_a_later_recipe_has_the_rates_and_steps_of_its_program(name):
    """Kills: a horizon that is the last step, another power, the matrices' constant for the others', a claimed step
    that is not evaluated, an evaluation grid that begins late. Rates are min(lr0, c (horizon - t)^1.2) there."""
    hp, (horizon, last, claimed, dense, every) = override([f"@{name}"]), LATER[name]
    assert (hp.train_steps, hp.last_step) == (horizon, last)
    evaluated = [step for step in range(last + 1) if train_gpt.is_validation_step(step, hp)]
    assert claimed in evaluated and {*range(0, dense, 125), *range(dense, last, every), last} == {*evaluated}
    rates = ((hp.matrix_lr, "matrix", 0.0375, 3.3169534699576625e-06),
             (hp.embed_lr, "adam", 0.3, 4.976805410800738e-05),
             (hp.head_lr, "adam", 1 / 320, 5.184172302917436e-07), (hp.vector_lr, "adam", 0.01, 1.6589351369335795e-06))
    for rate, family, flat, c in rates:
        for t in SAMPLES:
            ours = rate * train_gpt.learning_rate_factor(t, hp, family)
            if name in UNCOOLED:
                assert ours == pytest.approx(flat * min(1, (3175 - t) / (0.7 * 3175)), rel=1e-9)
            else:
                end = 2900 if name == "2540_open_claim" and t < 1400 else horizon
                assert ours == pytest.approx(min(flat, c * (end - t) ** 1.2), rel=1e-9)


@pytest.mark.parametrize("name", LATER)
def test_a_later_recipe_has_the_rules_of_its_program(name):
    """Kills: a stage left out or in another order, the floor before the brake, a decay before the pin, a constant from
    memory, a schedule that is a step early or late, SOAP or a gate of the wrong matrices, Adam's betas of another
    family of vectors, an embedding that is averaged, AdamW's old beta2."""
    hp = override([f"@{name}"])
    matrix, mlp, vector, adam = (hp.rule(rule) for rule in ("matrix_update", "mlp_update", "vector_update",
                                                            "adam_update"))
    assert " ".join(part.stage.name for part in matrix.parts) == STAGES[name]
    stages = STAGES[name].split()
    if name not in SOAP_ALL:  # a gate that chooses attn.v stands beside SOAP of all squares
        polar = stages.index("polar" if name == "14_soap_mlp" else "schatten4_polar")
        stages[1:polar + 1] = ["soap", "aurora_wide" if name[:2] in ("30", "40") else stages[polar]]
    assert [part.stage.name for part in mlp.parts] == stages
    for part in (*matrix.parts, *mlp.parts):  # what never changes
        of_v = (0.55, 0.95) if name not in SOAP_ALL and part in matrix.parts else ()
        constants = {"soap": (0.9, 0.9, 1 if name in SOAP_ALL else 10, *of_v), "normuon_lite": (0.95,), "brake": (0.5,),
                     "schatten4_normuon_lite": (0.95,),
                     "floor": (0.35 if name == "14_soap_mlp" else 0.3825,), "row_floor": (0.3825,),
                     "cautious_decay": (0.025,), "aurora_wide": (3, 0.25)}
        if part.stage.name in constants:
            assert tuple(part.knobs.values()) == constants[part.stage.name]
    cooled = {"30_aurora_wide": 3020, "40_ema_nesterov": 2900, "2540_open_claim": 2840}.get(name, 2900)
    cooldown = 100 if name[:2] in ("30", "40") else 200
    names = [n for n, _ in GPT(override(["num_layers=2", "model_dim=32", "head_dim=16"])).named_parameters()]
    for t in SAMPLES:
        mu = 0.85 + 0.1 * t / 300 if t < 300 else 0.95 - 0.1 * max(0, t - (cooled - cooldown)) / cooldown
        mu = mu if name not in ("14_soap_mlp", "20_powercool", "29_radial_brake") else 0.95
        kernel = "bimaxwell" if name in ("339_bimaxwell", "2540_open_claim") else "nesterov"
        assert knob(matrix, kernel, "mu", t) == pytest.approx(mu, abs=1e-12) == knob(mlp, kernel, "mu", t)
        if kernel == "bimaxwell":  # its buffers begin as the momentum that step 1000 has just updated
            fast, slow = (knob(matrix, kernel, x, t) for x in ("fast", "slow"))
            assert (fast, slow) == pytest.approx((0.85, 0.98) if t > 1000 else (mu, mu), abs=1e-12)
            assert knob(matrix, kernel, "share", t) == 0.4385
        fades = {"20_powercool": 2000, "29_radial_brake": 2000, "30_aurora_wide": 2500, "40_ema_nesterov": 2500}
        strength = 2 * 0.2 * (1 - min(1, t / fades[name]) if name in fades else 1)
        for contra in {"contra", "schatten4_contra"} & {*stages}:
            for rule in (matrix, mlp):
                assert knob(rule, contra, "strength", t) == pytest.approx(strength)
        if name in SOAP_ALL:
            floor = 0.45 if t < 1375 else 0.45 * max(0, 1625 - t) / 250
            gate = (1, 1) if name == "2540_open_claim" and t >= 1000 else (floor, 0.85 if t < 1625 else 1)
            assert tuple(knob(matrix, "trust_gate", x, t) for x in ("floor", "cap")) == pytest.approx(gate, abs=1e-12)
        # the move before forward t + 1 has the rate of step t
        if "lookahead" in stages:
            start, stop, end = (300, 1890, 2840) if name == "2540_open_claim" else (300, 1950, {
                "40_ema_nesterov": 2980}.get(name, 2900))
            size = 0.3 * min(1, 4.976805410800738e-05 * (end - t) ** 1.2 / 0.3) if start <= t + 1 < stop else 0
            for rule in (matrix, mlp, vector, adam):
                assert knob(rule, "lookahead", "size", t) == pytest.approx(size, rel=1e-9)
                assert knob(rule, "lookahead", "forget", t) == 0.01
        if name == "2540_open_claim":
            size = 0.45 * min(1, max(0, (t + 1 - 2100) / 100))
            assert knob(adam, "anchored_average", "anchor", t) == pytest.approx(size, abs=1e-12)
            rate = min(0.0375, 3.3169534699576625e-06 * ((2900 if t < 1400 else 2840) - t) ** 1.2)
            assert knob(matrix, "anneal", "ratio", t) == pytest.approx(max(0.3, rate / 0.0375), rel=1e-9)
            assert [knob(matrix, "anneal", x, t) for x in ("exponent", "forget")] == [0.25, 0.01]
    for parameter in names if name in AVERAGED else ():
        average = stages[-2]
        share = 0 if "embed" in parameter else 0.6
        if name == "2540_open_claim" and share:
            share = 1 if parameter.endswith(("bias", "gains")) else 0.5 if "head" in parameter else (
                0.8 if "blocks.0." in parameter else 0.55)
        begin = {"45_tail_ema": (2000, 150), "2540_open_claim": (2040, 100)}.get(name, (2400, 150))
        for rule in (matrix, mlp, vector, adam):
            assert knob(rule, average, "share", 0, parameter) == share
            assert tuple(knob(rule, average, x, 0) for x in ("start", "steps")) == begin
    for parameter in names if name in SOAP_ALL else ():
        beta2 = 0.99 if "gains" in parameter else 0.9965 if "attn.proj.bias" in parameter else 0.997
        assert knob(vector, "raw_adam", "beta2", 0, parameter) == beta2
        assert knob(matrix, "trust_gate", "share", 0, parameter) == ("attn.proj" in parameter)
    for parameter in ("attn.q.weight", "attn.v.weight", "attn.proj.weight") if name in SOAP_V else ():
        bounds = [knob(matrix, "trust_gate", x, 0, f"blocks.3.{parameter}") for x in ("floor", "cap", "share")]
        assert bounds == [parameter == "attn.v.weight"] * 2 + [1]
    if name in SOAP_ALL:
        assert [knob(vector, "raw_adam", x, 0) for x in ("beta1", "eps")] == [0.8, 1e-10]
    head = hp.rule("head_update").parts
    if name == "2540_open_claim":
        assert [part.stage.name for part in head] == ["eigen_adam", "step", *stages[-2:]]
        assert [*head[0].knobs.values()] == [0.8, 0.99, 1e-10, 1000, 8, 0.05]
    else:
        assert head == adam.parts
    beta2 = 0.95 if name in ("14_soap_mlp", "20_powercool", "29_radial_brake") else 0.99
    assert [*adam.parts[0].knobs.values()] == [0.8, beta2, 1e-10, 0]
    assert hp.init == ("paired_gain_signs" if name in SOAP_ALL else
                       "gain_signs" if name[:2] in ("30", "40") else "uniform_zero_projections")
    assert hp.metric == ("val_ema_loss" if name in AVERAGED else "val_loss")
    assert hp.embed_dtype == ("float32" if name == "2540_open_claim" else "bfloat16") and hp.warmup_steps == 1


@pytest.mark.parametrize("name", LATER)
def test_a_later_recipe_trains_at_steps_all_along_its_run(name, quick):
    """Kills: a stage whose state or knobs a bank cannot step, a NaN where a schedule has set in, a weight that stands
    still, an average or lookahead that validation does not see. Six steps of a model of two layers, taken for those
    that come first, and when lookahead, average and cooldown are on."""
    size = [word for word in quick if not word.startswith(("train_steps", "val_every"))]
    hp, place = override([f"@{name}", *size]), Place(0, 1, torch.device("cpu"))
    with one_process():
        model = GPT(hp)
        banks, start = make_banks(model, hp, place), initial_weights(model, 0, hp.init)
        train_gpt.fill(banks, start)
        read = train_gpt.read_batches(sorted(glob(hp.train_files)), hp.batch_tokens, 16, place)
        for step, batch in zip((0, 1, 300, 1500, 2450, hp.last_step - 1), read):
            accumulate_gradients(model, banks, batch, hp)
            train_gpt.update(banks, step)
        validation = next(train_gpt.read_batches(glob(hp.val_files), hp.val_tokens, 16, place))
        losses = train_gpt.validation_losses(model, banks, validation, hp.last_step, hp)
    assert [*losses] == hp.metrics and all(1 < loss < 1.05 * math.log(512) for loss in losses.values())
    assert len({*losses.values()}) == len(losses)
    for bank in banks:
        for parameter, now in zip(bank.params, bank.views(bank.masters)):
            assert now.isfinite().all() and not torch.equal(now, start[parameter].to(now.dtype)), parameter


OURS = {"u_normuon": "10_normuon", "riemannian_aurora": "17_aurora"}
# what an attempt changes: against which recipe, fields, and what stands where in the one rule that it changes
ATTEMPTS = {
    "attempt_auxiliary_rates": ("339_bimaxwell", dict(embed_lr=0.7, head_lr=0.004, vector_lr=0.015), ()),
    "attempt_corrected_vectors": ("339_bimaxwell", dict(vector_update="adamw(0.8, 0.997, 1e-10, 0)"), ()),
    "attempt_plain_start": ("339_bimaxwell", dict(init="zero_projections"), ()),
    "attempt_anneal_alone": ("339_bimaxwell", {}, ("aspect | ", "aspect | anneal(at_least(power(1, 2900, 2386.4, 1.2), "
                                                   "0.3), 0.25, 0.01) | ")),
    "attempt_tail_heat": ("2540_open_claim", {}, ("row_floor(0.3825)", "row_floor(ramp(0.3825, 0.75, 2240, 2540))")),
}
RECIPES = sorted(path.parent.name for path in ROOT.glob("records/*/recipe"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_constants_of_its_program(name):
    """Kills: a constant from memory, a decay that the program sets but does not apply, a reported step that is not
    evaluated, a field that no published program has changed (all that the rules fix)."""
    hp = override([f"@{name}"])
    steps, reported, *constants = PUBLISHED[name]
    assert hp.train_steps == steps and train_gpt.is_validation_step(reported, hp)
    assert [hp.matrix_update, hp.matrix_lr, hp.adam_update, hp.embed_lr, hp.head_lr, hp.vector_lr,
            hp.warmup_steps] == constants
    free = {"train_steps", "matrix_update", "matrix_lr", "adam_update", "embed_lr", "head_lr", "vector_lr",
            "warmup_steps", "val_every_late", "matrix_schedule", "adam_schedule", "init"}
    assert (hp.matrix_schedule, hp.adam_schedule, hp.init) == SPHERES.get(
        name, ("linear(0.7)", "linear(0.7)", "zero_projections"))
    assert {f for f, value in vars(hp).items() if value != getattr(Hyperparameters, f)} <= free
    dense = name in ("17_aurora", "36_muon_tuned", "11_contra_muon")
    late = math.ceil(0.9 * steps / 25) * 25
    assert train_gpt.is_validation_step(late + 25 * (late % 125 == 0), hp) == dense


def test_tiny_soap_is_result_46_in_600_steps():
    """Kills: a small trial of another method, a step that is left at its place among 2900."""
    small, record = override(["@tiny_soap"]), override(["@46_rowfloor_cwd"])
    for rule in ("matrix_update", "adam_update", "vector_update", "final_update", "matrix_schedule", "adam_schedule"):
        texts = [re.split(r"(?<![\w.])(\d+\.?\d*)", getattr(hp, rule)) for hp in (small, record)]
        for i, (ours, theirs) in enumerate(zip(*texts, strict=True)):
            if i % 2 and float(theirs) > 25:
                assert abs(float(ours) - float(theirs) * 600 / 2900) < 1.1, rule
            else:
                assert ours == theirs or (ours, theirs) == ("0.05", "0.01")
    assert (small.init, small.metric, small.train_steps) == (record.init, record.metric, 600)


@pytest.mark.parametrize("name", RECIPES)
def test_the_desk_reads_what_the_trainer_runs(name):
    """Kills: a default, a comment or a number that the desk reads otherwise than the trainer does."""
    read, hp = read_recipe(ROOT / "records" / name / "recipe"), override([f"@{name}"])
    assert list(read) == [field.name for field in fields(Hyperparameters)]
    assert {x: meaning(text) for x, text in read.items() if "**" not in text} == {
        x: meaning(str(value)) for x, value in vars(hp).items() if "**" not in read[x]}  # the desk computes no powers
    mlp = f", of MLPs {hp.mlp_update}" if hp.mlp_update else ""
    assert rule(name) == hp.matrix_update + mlp and name in recipes()


@pytest.mark.parametrize("name", OURS)
def test_ours_differ_from_a_published_recipe_in_one_stage(name):
    """Kills: a comparison with more than one difference."""
    ours, published = vars(override([f"@{name}"])), vars(override([f"@{OURS[name]}"]))
    differing = {f for f in ours if ours[f] != published[f]}
    assert "matrix_update" in differing and differing <= {"matrix_update", "val_every_late"}
    texts = [rule["matrix_update"].split(" | ") for rule in (ours, published)]
    assert sum(a != b for a, b in zip(*texts, strict=True)) == 1


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("attempt")])
def test_an_attempt_is_another_recipe_but_for_what_it_says(name):
    """Kills: a second difference, as where the recipe that an attempt starts from has changed since; a README that does
    not say that nothing was run."""
    base, fields, replaced = ATTEMPTS[name]
    expected = vars(override([f"@{base}"])) | fields
    if replaced:
        assert replaced[0] in expected["matrix_update"]
        expected["matrix_update"] = expected["matrix_update"].replace(*replaced)
    assert vars(override([f"@{name}"])) == expected
    readme = (ROOT / "records" / name / "README.md").read_text()
    assert "not a claim: nothing of it was run at full size" in readme and f"../{base})" in readme


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_dry(name, tmp_path, monkeypatch, capsys):
    """Kills: a recipe that a renamed field or stage has left behind, a record attempt that is called none, a folder
    without a README or a line in the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.run.find_shards", lambda *_: {})
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    train_gpt.main([f"@{name}", "--dry-run"])
    said = capsys.readouterr().out
    hp = override([f"@{name}"])
    assert f"{hp.last_step:,} steps of {hp.batch_tokens:,} tokens" in said
    assert ("not a record attempt" in said) == name.startswith("tiny")
    assert f"| [{name}]({name}) |" in (ROOT / "records" / "README.md").read_text()
    assert name == "tiny" or len((ROOT / "records" / name / "README.md").read_text()) > 500


@pytest.mark.parametrize("name", ["adamw", "08_normuonh", "riemannian_aurora"])
def test_a_recipe_trains(name, small, tmp_path):
    """Kills: AdamW on the matrices that leaves them, a stage with a state that the trainer cannot step, a log
    without the rule. Each goes from ln(50304) = 10.8 below 9 in 20 steps at a size of seconds."""
    run = start([f"@{name}", *small, "train_steps=20", "warmup_steps=1"], tmp_path)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split("val_loss:")[-1].split()[0]) < 9
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert f"matrix_update: str = {override([f'@{name}']).matrix_update!r}" in log.read_text()
