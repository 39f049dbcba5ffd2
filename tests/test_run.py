"""Whole runs, as a person starts them: world sizes, the source of a log, verdicts, mistakes."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, start, write_shard

STEPS = [0, 10, 20, 30, 36, 38, 40]


def losses(run) -> list[tuple[int, float]]:
    assert run.returncode == 0, run.stderr
    return [(int(step), float(loss)) for step, loss in re.findall(r"^step:(\d+)/\d+ val_loss:(\S+)", run.stdout, re.M)]


@pytest.fixture(scope="module")
def one_process(small, tmp_path_factory):
    """A run without torchrun: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("one_process")
    return folder, start(small, folder)


def test_the_loss_falls_and_the_desk_reads_the_log(one_process):
    """Kills: a run that learns nothing, a log that the desk cannot read, a sidecar that says something else.

    From ln(50304) = 10.83 to about 4.95 in 40 steps; a rate of 0 for the matrices alone leaves it above 6.
    """
    folder, run = one_process
    curve = losses(run)
    assert [step for step, _ in curve] == STEPS
    assert curve[0][1] == 10.82584 and curve[-1][1] < 5.5
    (log,) = (folder / "logs").glob("*.txt")
    sidecar = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    assert [(r["step"], round(r["val_loss"], 5)) for r in sidecar if "val_loss" in r] == curve
    logged = [r for r in sidecar if "loss" in r]
    assert [r["step"] for r in logged] == list(range(1, 41))
    assert {"lr", "tokens_per_second", "peak_memory"} < logged[0].keys()
    desk = subprocess.run([sys.executable, "-m", "records", "verify", str(log)],
                          cwd=ROOT, text=True, capture_output=True)
    assert "n=1, target 5" in desk.stdout and f"{curve[-1][1]:.6f}" in desk.stdout
    facts = log.read_text().split("=" * 100)[1]
    for fact in ("PyTorch", "with world_size 1", "commit: ", "source_sha256: ", "micro_batch: 2",
                 "train_000002.bin 17150"):
        assert fact in facts


@pytest.mark.parametrize("processes", [2, 4])
def test_world_sizes_train_alike(one_process, small, tmp_path, processes):
    """Kills: gradients of one rank only, a rank that reads another's tokens, weights that drift apart.

    A micro-batch's gradients are bf16 numbers, and fp32 sums of a few of those are all but exact in any order: the
    five printed digits agree, give or take the last.
    """
    run = start(small, tmp_path, processes=processes)
    expected = losses(one_process[1])
    assert [step for step, _ in losses(run)] == [step for step, _ in expected]
    for (_, ours), (_, theirs) in zip(losses(run), expected):
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert len(list((tmp_path / "logs").glob("*.txt"))) == 1


def test_the_source_of_a_log_runs_alone_and_logs_itself(one_process, tmp_path):
    """Kills: a module left out of the source, an override left out of the defaults, a source that changes when run."""
    folder, run = one_process
    (log,) = (folder / "logs").glob("*.txt")
    desk = [sys.executable, "-m", "records", "extract", str(log), "-o", str(tmp_path / "ripped.py")]
    subprocess.run(desk, cwd=ROOT, check=True)
    again = start([], tmp_path, script=tmp_path / "ripped.py")
    assert losses(again) == losses(run)
    (second,) = (tmp_path / "logs").glob("*.txt")
    assert second.read_text().split("=" * 100)[0] == (tmp_path / "ripped.py").read_text()


def test_trials_are_seeds(one_process, small, tmp_path):
    """Kills: a second trial that starts from the first one's weights or place in the data, a seed that is ignored."""
    words = [*small, "--trials", "2"]
    curves = losses(start([*words, "--seed", "7"], tmp_path))
    assert [step for step, _ in curves] == STEPS * 2
    assert curves[1:7] != curves[8:]
    assert losses(start([*words[:-2], "--seed", "8"], tmp_path)) == curves[7:]


def test_a_run_that_diverges_stops_and_says_so(small, tmp_path):
    """Kills: a NaN that is trained on to the end, an exit code of 0."""
    run = start([*small, "embed_lr=1e38", "vector_lr=1e38"], tmp_path)
    assert run.returncode == 1
    (log,) = (tmp_path / "logs").glob("*.txt")
    last = log.read_text().splitlines()[-1]
    assert re.fullmatch(r"failed: the gradient of embed.weight and of \d+ others is not .+ on rank 0 at step 2", last)
    assert run.stderr == f"train_gpt.py: seed 0: {last.removeprefix('failed: ')}\n"


def damaged(folder, what):
    tokens = np.arange(2000)
    path = folder / "train_000001.bin"
    if what == "empty":
        path.write_bytes(b"")
    elif what == "truncated":
        write_shard(path, tokens)
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "wrong magic":
        write_shard(path, tokens, magic=1)
    elif what == "wrong version":
        write_shard(path, tokens, version=2)
    elif what == "wrong count":
        write_shard(path, tokens, count=1999)
    elif what == "few":
        write_shard(path, tokens)
    elif what == "vocabulary":
        write_shard(path, tokens + 60000)


@pytest.mark.parametrize("what, says", [
    ("missing", r"no file \S+train_\*.bin: python data/cached_fineweb10B.py downloads"),
    ("empty", r"\S+train_000001.bin is not a token shard: delete it and make it again"),
    ("truncated", r"\S+train_000001.bin holds 1950 tokens, its header says 2000: delete it"),
    ("wrong magic", r"\S+train_000001.bin is not a token shard: delete it and make it again"),
    ("wrong version", r"\S+train_000001.bin is not a token shard: delete it and make it again"),
    ("wrong count", r"\S+train_000001.bin holds 2000 tokens, its header says 1999: delete it"),
    ("few", r"40 batches of 256 tokens are needed, \S+ holds 7: make or download more shards"),
    ("vocabulary", r"\S+train_000001.bin holds token 61999, vocab_size is 50304: delete it"),
])
def test_bad_shards(what, says, small, tmp_path):
    """Kills: a traceback, an error that names no file or no remedy, a log begun before the data were looked at."""
    damaged(tmp_path, what)
    words = small[1:]
    run = start([f"train_files={tmp_path}/train_*.bin", *words], tmp_path)
    assert run.returncode == 1 and run.stdout == ""
    assert re.fullmatch(rf"train_gpt.py: {says}.*\n", run.stderr), run.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("words, environment, says", [
    (["learning_rate=1"], {}, "'learning_rate' is not a hyperparameter; the nearest is "),
    (["train_steps=many"], {}, "train_steps=many: train_steps takes a value of type int"),
    (["--sead", "1"], {}, "unrecognized arguments: --sead"),
    (["--trials", "0"], {}, "--trials 0: seeds are 0 to 2^63 - 1, trials at least 1"),
    (["--seed", str(2**63)], {}, "trials at least 1"),
    ([], {"WORLD_SIZE": "2"}, "no MASTER_ADDR: start the processes with torchrun"),
    ([], {"WORLD_SIZE": "3"}, "batch_tokens=256 is 8 sequences, which 3 processes cannot share equally: start 2"),
])
def test_bad_arguments(words, environment, says, small, tmp_path):
    """Kills: a traceback, a world size that does not divide the batch and trains on a part of it."""
    run = start([*small, *words], tmp_path, **environment)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("train_gpt.py: ") and says in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_dry_run_says_what_would_run_and_leaves_nothing(small, tmp_path):
    """Kills: a dry run that trains or writes."""
    run = start([*small, "--dry-run"], tmp_path)
    assert run.returncode == 0 and "40 steps of 256 tokens, 7 validations of 512 tokens, world_size 1" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_run_sh_names_the_package_that_venv_needs(tmp_path):
    """Kills: python's own page of advice, or a half-made .venv, where Debian's python3 comes without ensurepip."""
    (tmp_path / "run.sh").write_text((ROOT / "run.sh").read_text())
    (tmp_path / "bin").mkdir()
    python3 = tmp_path / "bin" / "python3"
    python3.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python3.chmod(0o755)
    run = subprocess.run(["bash", "run.sh"], cwd=tmp_path, text=True, capture_output=True,
                         env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    package = f"python3.{sys.version_info[1]}-venv"
    assert run.returncode == 1
    assert run.stderr == f"run.sh: python3 cannot make a virtual environment: apt install {package}\n"
    assert not (tmp_path / ".venv").exists()
