"""The recipes under records/, against constants copied from the programs at the head of the published logs."""

import math

import pytest
from conftest import ROOT, start

import train_gpt
from train_gpt import Hyperparameters, override

# train_steps, the reported step, direction, matrix lr, its decay, beta1 or mu, contra, floor, AdamW: lr of embedding,
# head, vectors, decay; warm-up steps. 1 warm-up step is none.
PUBLISHED = {
    "adamw": (5625, 5625, "adamw", .0015, .10, .9, 0, 0, .3, 1 / 320, .01, 0, 250),
    "06_muon": (3375, 3375, "muon", .025, .025, .95, 0, 0, .3, 1 / 320, .01, 0, 1),
    "36_muon_tuned": (3250, 3250, "muon", .025, .05, .95, 0, 0, .7, .004, .015, .001, 1),
    "10_normuon": (3300, 3250, "normuon_lite", .035, .025, .95, 0, 0, .3, 1 / 320, .01, 0, 1),
    # these two set a decay of .025 and do not apply it
    "09_normuon_uw_floor": (3250, 3250, "normuon_lite", .0375, 0, .95, 0, .35, .3, 1 / 320, .01, 0, 1),
    "11_contra_muon": (3225, 3225, "normuon_lite", .0375, 0, .95, .4, .35, .3, 1 / 320, .01, 0, 1),
    "17_aurora": (3200, 3175, "aurora", .0375, 0, .95, .4, .35, .3, 1 / 320, .01, 0, 1),
}
OURS = {"u_normuon": "10_normuon", "riemannian_aurora": "17_aurora"}
RECIPES = sorted(path.parent.name for path in ROOT.glob("records/*/recipe"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_constants_of_its_program(name):
    """Kills: a constant from memory, a decay that the program sets but does not apply, a reported step that is not
    evaluated, a field that no published program has changed (the betas, epsilon, cooldown, all that the rules fix)."""
    hp = override([f"@{name}"])
    steps, reported, *constants = PUBLISHED[name]
    assert hp.train_steps == steps and train_gpt.is_validation_step(reported, hp)
    assert [hp.direction, hp.matrix_lr, hp.weight_decay, hp.mu, hp.contra, hp.uw_floor, hp.embed_lr, hp.head_lr,
            hp.vector_lr, hp.adam_weight_decay, hp.warmup_steps] == constants
    free = {"train_steps", "direction", "matrix_lr", "weight_decay", "mu", "contra", "uw_floor", "embed_lr", "head_lr",
            "vector_lr", "adam_weight_decay", "warmup_steps", "val_every_late"}
    assert {f for f, value in vars(hp).items() if value != getattr(Hyperparameters, f)} <= free
    dense = name in ("17_aurora", "36_muon_tuned", "11_contra_muon")
    assert train_gpt.is_validation_step(math.ceil(0.9 * steps / 25) * 25, hp) == dense


@pytest.mark.parametrize("name", OURS)
def test_ours_differ_from_a_published_recipe_in_the_direction(name):
    """Kills: a comparison with more than one difference."""
    ours, published = vars(override([f"@{name}"])), vars(override([f"@{OURS[name]}"]))
    differing = {f for f in ours if ours[f] != published[f]}
    assert "direction" in differing and differing <= {"direction", "val_every_late"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_dry(name, tmp_path, monkeypatch, capsys):
    """Kills: a recipe that a renamed field or direction has left behind, a record attempt that is called none, a folder
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


@pytest.mark.parametrize("name", ["adamw", "10_normuon", "riemannian_aurora"])
def test_a_recipe_trains(name, small, tmp_path):
    """Kills: AdamW on the matrices that leaves them, a direction with a state that the trainer cannot step, a log
    without the direction. Each goes from ln(50304) = 10.8 below 9 in 20 steps at a size of seconds."""
    run = start([f"@{name}", *small, "train_steps=20", "warmup_steps=1"], tmp_path)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split("val_loss:")[-1].split()[0]) < 9
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert f"direction: str = {override([f'@{name}']).direction!r}" in log.read_text()
