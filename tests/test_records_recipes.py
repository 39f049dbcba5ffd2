"""The recipes under records/, against constants copied from the programs at the head of the published logs."""

import math
from dataclasses import fields

import pytest
from conftest import ROOT, start

import train_gpt
from records.recipes import meaning, read_recipe, recipes, rule
from train_gpt import Hyperparameters, override

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
OURS = {"u_normuon": "10_normuon", "riemannian_aurora": "17_aurora"}
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


@pytest.mark.parametrize("name", RECIPES)
def test_the_desk_reads_what_the_trainer_runs(name):
    """Kills: a default, a comment or a number that the desk reads otherwise than the trainer does."""
    read, hp = read_recipe(ROOT / "records" / name / "recipe"), override([f"@{name}"])
    assert list(read) == [field.name for field in fields(Hyperparameters)]
    assert {x: meaning(text) for x, text in read.items() if "**" not in text} == {
        x: meaning(str(value)) for x, value in vars(hp).items() if "**" not in read[x]}  # the desk computes no powers
    assert rule(name) == hp.matrix_update and name in recipes()


@pytest.mark.parametrize("name", OURS)
def test_ours_differ_from_a_published_recipe_in_one_stage(name):
    """Kills: a comparison with more than one difference."""
    ours, published = vars(override([f"@{name}"])), vars(override([f"@{OURS[name]}"]))
    differing = {f for f in ours if ours[f] != published[f]}
    assert "matrix_update" in differing and differing <= {"matrix_update", "val_every_late"}
    texts = [rule["matrix_update"].split(" | ") for rule in (ours, published)]
    assert sum(a != b for a, b in zip(*texts, strict=True)) == 1


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
    assert f"{hp.train_steps:,} steps of {hp.batch_tokens:,} tokens" in said
    assert ("not a record attempt" in said) == (name == "tiny")
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
