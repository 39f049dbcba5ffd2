"""Whole runs, as a person starts them: world sizes, the source of a log, verdicts."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, start, train

from records.log import read

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

    From ln(512) = 6.24 to about 2.62 in 40 steps.
    """
    folder, run = one_process
    curve = losses(run)
    assert [step for step, _ in curve] == STEPS
    assert curve[0][1] == 6.23832 and curve[-1][1] < 3
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


def test_trials_are_seeds(small, tmp_path):
    """Kills: a second trial that starts from the first one's weights or place in the data, a seed that is ignored."""
    curves = {}
    for words in (["--seed", "7", "--trials", "2"], ["--seed", "8"]):
        train(tmp_path / words[1], [*small, "train_steps=10", *words])
        (log,) = (tmp_path / words[1] / "logs").glob("*.txt")
        curves[words[1]] = [trial.losses for trial in read(log).trials]
    first, second = curves["7"]
    assert first.keys() == second.keys() and first[10] != second[10]
    assert curves["8"] == [second]


def test_a_run_that_diverges_stops_and_says_so(small, tmp_path, capsys):
    """Kills: a NaN that is trained on to the end, an exit code of 0."""
    with pytest.raises(SystemExit) as end:
        train(tmp_path, [*small, "embed_lr=1e38", "vector_lr=1e38"])
    assert end.value.code == 1
    (log,) = (tmp_path / "logs").glob("*.txt")
    last = log.read_text().splitlines()[-1]
    assert re.fullmatch(r"failed: the gradient of blocks.0.mlp.fc.weight and of \d+ others is not finite on rank 0 "
                        r"at step 2", last)
    assert capsys.readouterr().err == f"train_gpt.py: seed 0: {last.removeprefix('failed: ')}\n"


def test_dry_run_says_what_would_run_and_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    """Kills: a dry run that trains or writes, or that does not say what a machine without a GPU leaves unchecked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train(tmp_path, [*small, "--dry-run"])
    said = capsys.readouterr().out
    assert "40 steps of 256 tokens, 7 validations of 512 tokens, world_size 1" in said
    assert said.count("\nnot checked, for want of a GPU: ") == 1
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


@pytest.fixture
def run_sh(tmp_path):
    """run.sh in a folder of its own, on a machine that stand-ins make: GPUs, of which nvidia-smi tells line by line,
    and a Python that asks the real doctor how many, has PyTorch do as `torch` says, and notes what else it is asked."""
    for name in ("run.sh", "requirements.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "harness").symlink_to(ROOT / "harness")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "requirements.txt").write_text((ROOT / "requirements.txt").read_text())

    def run(torch, gpus, **environment):
        stand_ins = {".venv/bin/pip": "", ".venv/bin/python": f'''case "$*" in
    *doctor.find_gpus*) exec {sys.executable} "$@";;
    *torch.zeros*) {torch};;
    *--fineweb-shards*) ;;
    *) echo "$WORLD_SIZE: $*" >> asked;;
esac''', "nvidia-smi": f'''for gpu in {gpus}; do
    case $1 in
        -L) echo "GPU $gpu: NVIDIA H100 80GB HBM3 (UUID: GPU-${{gpu}}a7e)";;
        *) echo "$gpu, GPU-${{gpu}}a7e, 580.65.06, Disabled, NVIDIA H100 80GB HBM3, 9.0, 81559, 4";;
    esac
    sleep .2  # long enough for a reader that has seen enough to be gone
done'''}
        for name, text in stand_ins.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE")}
        found = subprocess.run(["bash", "run.sh", "--dry-run"], cwd=tmp_path, text=True, capture_output=True,
                               env=clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment)
        asked = tmp_path / "asked"
        return found, asked.read_text() if asked.exists() else ""
    return run


def test_run_sh_trains_on_all_gpus(run_sh):
    """Kills: @tiny for a machine with GPUs, because somebody stopped listening while nvidia-smi still spoke."""
    run, asked = run_sh("echo 2", "0 1")
    assert run.returncode == 0, run.stderr
    assert asked == "2: -m harness.doctor -- --dry-run\n"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_run_sh_with_hidden_gpus(hidden, run_sh):
    """Kills: an error for one who asks for the CPU, in either of the ways that CUDA knows."""
    run, asked = run_sh("exit 1", "0", CUDA_VISIBLE_DEVICES=hidden)
    assert run.returncode == 0, run.stderr
    assert asked.splitlines()[-1] == "1: -m harness.doctor -- @tiny --dry-run"


def test_run_sh_where_pytorch_cannot_use_the_gpus(run_sh):
    """Kills: @tiny without a word; more than a line; a driver that is blamed without a look at its number."""
    run, asked = run_sh("exit 1", "0", CUDA_VISIBLE_DEVICES="GPU-0")
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and asked == ""
    assert "-m harness.doctor may say why" in run.stderr
