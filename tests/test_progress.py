"""What a person sees while a run trains, and W&B's mirror of it. Every test was seen to fail."""

import fcntl
import importlib.util
import json
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, start

import train_gpt
from harness.arguments import parse
from harness.run import recall, shown_beside
from harness.trial import against_reference, read_reference
from records import published
from records.__main__ import main


def numbers(lines: list[str]) -> dict[int, tuple]:
    rows = [line.split(",") for line in lines]
    return {int(step): tuple(map(float, row)) for step, *row in rows}


def test_reference_is_made_from_the_curves():
    """Kills: a reference that no command makes; #46's raw losses for those that it claims, its seed 7, which ends at
    2765, for the end of the schedule."""
    assert (published.FOLDER / "reference.csv").read_text() == published.references()
    assert numbers(published.reference(list(published.curves(17).values())))[3175][:2] == (3.278845, 0.001112)
    late = numbers(published.reference(list(published.curves(46).values())))
    assert max(late) == 2900 and late[2900][:2] == (3.271750, 0.001021)


def test_projection_covers():
    """Kills: an interval of the mean for one of a run; a slope of the wrong sign. Every published run is foretold from
    the other 19, from 60% of the steps on: 95% nominal, of 20 correlated sets at least 90%."""
    curves = list(published.curves(17).values())
    hits = []
    for k, left_out in enumerate(curves):
        reference = numbers(published.reference(curves[:k] + curves[k + 1:]))
        for step in (s for s in reference if 1920 <= s < 3200):
            told = against_reference(step, left_out[step], 17, reference)
            final, half = map(float, re.search(r"final ([\d.]+) \+- ([\d.]+)", told).groups())
            hits.append(abs(final - left_out[3200]) <= half + 5e-5)  # of four printed digits
    assert len(hits) == 20 * 20 and 0.9 < sum(hits) / len(hits) < 1


@pytest.mark.parametrize("step, loss, said", [
    (1000, 3.6957 + 2 * 0.00182, " #17 +2.0 sd"), (1875, 3.494, " #17 -0.0 sd"), (2000, 3.469091 - 0.001058,
     " #17 -1.0 sd, final 3.2772 +- 0.0013"), (3200, 3.278114, " #17 +0.0 sd"), (2001, 3.4, "")])  # fmt: skip
def test_progress_line(step, loss, said):
    """Kills: a projection before 60% or at the end; a difference in nats called deviations; a KeyError at a step that
    was not published."""
    assert against_reference(step, loss, 17, read_reference(train_gpt.Hyperparameters(), 17, ROOT)) == said


def started(*words: str):
    return recall(train_gpt.EXPERIMENT, parse([*words]))


@pytest.mark.parametrize("words, result, step, mean", [
    ([], 17, 3200, 3.278114), (["matrix_lr=0.04", "floor.target=0.3"], 17, 3200, 3.278114),
    (["@36_muon_tuned", "embed_lr=0.6"], 36, 3250, 3.278659), (["@records/06_muon/recipe"], 6, 3375, 3.278930),
    (["@17_aurora", "@36_muon_tuned"], 36, 3250, 3.278659), (["@riemannian_aurora"], 17, 3200, 3.278114),
    (["@45_tail_ema"], 45, 2720, 3.278565)])  # fmt: skip
def test_reference_of_the_recipe_that_runs(words, result, step, mean):
    """Kills: every run held against #17; a recipe's path, or the last of two recipes, taken for none; a knob that is
    varied, or a rule of ours, which the curve is shown for, taken for another schedule; #45's blend, which its runs print as
    val_loss, not found by ours, which call it val_ema_loss."""
    start = started(*words)
    reference = read_reference(start.hp, start.result, ROOT)
    assert start.result == result and max(reference) == step and reference[step][0] == pytest.approx(mean, abs=1e-6)
    assert against_reference(step, mean, start.result, reference).startswith(f" #{result} ")


@pytest.mark.parametrize("words", [
    ["train_steps=3000"], ["matrix_schedule=linear(0.5)"], ["warmup_steps=9"], ["@36_muon_tuned", "train_steps=3200"],
    ["@36_muon_tuned", "adam_schedule=linear(0.8)"], ["@06_muon", "@tiny"], ["@u_normuon"], ["@adamw"],
    ["@05_muonh"]])  # fmt: skip
def test_no_reference_of_another_schedule(words):
    """Kills: a run of another length, schedule or target held against a curve; #17's curve beside #36's recipe at 3200
    steps; a result without curves."""
    start = started(*words)
    assert read_reference(start.hp, start.result, ROOT) == {}


def test_no_reference_of_another_metric(tmp_path):
    """Kills: raw losses held against #46's, which are of averaged weights; defaults that a person has edited, held
    against #17; a run that needs the file."""
    raw = SimpleNamespace(target_loss=3.28, train_steps=2900, last_step=2900, metric="val_loss")
    assert read_reference(raw, 46, ROOT) == {} and read_reference(raw, 44, ROOT)[2900][0] == 3.273030
    raw.metric = "val_ema_loss"
    assert read_reference(raw, 46, ROOT)[2690][0] == pytest.approx(3.27836, abs=5e-5)
    assert not read_reference(raw, 44, ROOT)
    assert shown_beside(46, raw, SimpleNamespace(**vars(raw) | {"metric": "val_loss"})) == 0
    assert shown_beside(46, raw, SimpleNamespace(**vars(raw))) == 46
    assert read_reference(train_gpt.Hyperparameters(train_steps=3000), 17, ROOT) == {}
    assert read_reference(train_gpt.Hyperparameters(target_loss=2.35), 17, ROOT) == {}
    assert read_reference(train_gpt.Hyperparameters(), 17, tmp_path) == {}


def test_terminal_shows_the_reference(small, tmp_path):
    """Kills: a line that is computed but not shown. The trainer runs in a terminal, beside a reference of 40 steps."""
    for name in ("train_gpt.py", "aurora.py", "initial.py", "rules.py", "harness", "kernels"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    folder = tmp_path / "records" / "published"
    folder.mkdir(parents=True)
    rows = "".join(f"44,val_loss,40,{step},11,0.1,1,0.5\n" for step in range(2, 41, 2))
    (folder / "reference.csv").write_text("record,metric,train_steps,step,mean,sd,slope,half_width\n" + rows)
    (folder / "44_small").write_text("\n".join([*small, "target_loss=3.28"]))
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen([sys.executable, "train_gpt.py", f"@{folder}/44_small"], cwd=tmp_path,
                               stdout=its_end, stderr=its_end, env=os.environ | {"OMP_NUM_THREADS": "1",
                                                                                 "CUDA_VISIBLE_DEVICES": ""})
    os.close(its_end)
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # the other end was closed
        pass
    assert process.wait(60) == 0
    text = shown.decode()
    assert re.search(r"seed 0 #44 -\d+\.\d sd +\d+%", text)
    assert re.search(r"seed 0 #44 -\d+\.\d sd, final \d\.\d{4} \+- 0\.5000", text)
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert "#44 -" not in log.read_text().rpartition("=" * 100)[2]


def test_a_run_that_plainly_diverges_ends(small, tmp_path, capsys):
    """Kills: hours of GPUs on a run that is worse than its start; its loss lost, or counted as an accident."""
    for name in ("aurora.py", "initial.py", "rules.py", "harness", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    source, loss = (ROOT / "train_gpt.py").read_text(), "validation_loss(model, *validation, hp)\n"
    assert source.count(loss) == 1
    (tmp_path / "train_gpt.py").write_text(source.replace(loss, f"step / 2 + {loss}"))
    run = start([*small, "train_steps=60", "val_every=2"], tmp_path, tmp_path / "train_gpt.py")
    assert run.returncode == 1
    (log,) = (tmp_path / "logs").glob("*.txt")
    step, loss = re.search(r"failed: the validation loss at step (\d+) is (.+)\n", log.read_text()).groups()
    assert 6 <= int(step) < 20 and 10.83 < float(loss) < math.inf
    assert main(["verify", str(log)]) == 1
    assert "failed: the validation loss" in capsys.readouterr().out


def test_wandb_is_not_imported_when_off(small, tmp_path):
    """Kills: an import that every run pays for, or fails at."""
    (tmp_path / "wandb.py").write_text("raise SystemExit('imported')")
    assert start([*small, "train_steps=1"], tmp_path, PYTHONPATH=str(tmp_path)).returncode == 0


def test_wandb_that_is_missing_is_named(monkeypatch, capsys):
    """Kills: a traceback after the data were loaded."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--wandb needs the package: python -m pip install -r requirements.txt"):
        train_gpt.main(["--wandb", "offline"])


needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@needs_wandb
def test_wandb_without_a_key(small, tmp_path):
    """Kills: a traceback; a log that holds a head alone."""
    run = start([*small, "--wandb", "online"], tmp_path, HOME=str(tmp_path), WANDB_API_KEY="",
                NETRC=str(tmp_path / "none"))
    assert run.returncode == 1
    assert run.stderr.startswith("train_gpt.py: rank 0: --wandb online: No API key configured")
    assert run.stderr.count("\n") == 1 and not list(tmp_path.glob("logs/*.txt"))


@needs_wandb
def test_wandb_offline(small, tmp_path):
    """Kills: a mirror in place of the sidecar; one that loses the second trial, whose steps begin again."""
    words = ["train_steps=8", "val_every=2", "--wandb", "offline", "--trials", "2"]
    run = start([*small, *words], tmp_path, WANDB_SILENT="true")
    assert run.returncode == 0, run.stderr
    (sidecar,) = (tmp_path / "logs").glob("*.jsonl")
    seeds = [json.loads(line)["seed"] for line in sidecar.read_text().splitlines()]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1}
    (file,) = Path(tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    # one record a line of the sidecar that has the value
    for seed in (0, 1):
        lines = [json.loads(line) for line in sidecar.read_text().splitlines()]
        losses = [line["val_loss"] for line in lines if line["seed"] == seed and "val_loss" in line]
        assert content.count(f"val_loss/seed {seed}".encode()) >= len(losses) > 2
        assert all(repr(loss).encode() in content for loss in losses)
