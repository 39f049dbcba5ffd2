"""What a person sees where something is wrong, and what is left of a run: arguments, data, checkpoints, ranks."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start, train, write_shard

import train_gpt
from harness.checkpoint import file_sha256, read_checkpoint, write_checkpoint
from harness.heartbeat import Heartbeat
from harness.log import commit
from records.__main__ import main as desk
from records.log import read
from tests.drills.kill import checkpoint_of

SHARD = "train_files={here}/train_*.bin"
RESUME = ["--resume", "logs/run.checkpoint"]
FORK = ["--fork-from", "logs/run.checkpoint"]


def shard(tokens, **header):
    return lambda folder, _: write_shard(folder / "train_1.bin", tokens, **header)


def cut(folder, _):
    write_shard(folder / "train_1.bin", range(2000))
    os.truncate(folder / "train_1.bin", 1024 + 2 * 1950)


def environment(**variables):
    return lambda _, monkeypatch: [monkeypatch.setenv(name, value) for name, value in variables.items()]


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def checkpoint(change=lambda folder, file: None):
    """The checkpoint of a whole run, without its log, and changed."""
    def plant(folder, _):
        copy = folder / "logs" / "run.checkpoint"
        shutil.copytree(checkpoint_of(folder.parent / "whole"), copy)
        change(copy, *copy.glob("*.pt"))
    return plant


def flip(folder, file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def manifest(**values):
    return lambda folder, _: (folder / "manifest.json").write_text(
        json.dumps(json.loads((folder / "manifest.json").read_text()) | values))


def bomb(folder, _):
    with zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    manifest(file="a.pt", bytes=os.path.getsize(folder / "a.pt"), sha256=file_sha256(folder / "a.pt"))(folder, None)


def state(**values):
    return lambda folder, _: write_checkpoint(folder, "seed0-step1.pt", read_checkpoint(folder) | values)


def fails(place, error):
    def plant(_, monkeypatch):
        def failing(*_):
            raise error
        monkeypatch.setattr(place, failing)
    return plant


def nothing(*_):
    pass


FAULTS = [  # what is typed, what is planted, the line that a person reads
    (["matrix_ir=1"], nothing, "'matrix_ir' is not a hyperparameter; the nearest is 'matrix_lr'"),
    (["train_steps=many"], nothing, "train_steps=many: train_steps takes a value of type int"),
    (["fast"], nothing, "'fast' is not understood: write NAME=VALUE or @RECIPE"),
    (["@nowhere"], nothing, "@nowhere: there is no records/nowhere/recipe and no file nowhere"),
    (["micro_batch=0"], nothing, "micro_batch=0: it is at least 1 and below 2^63"),
    (["nesterov.mu=2"], nothing, "nesterov(2): mu is a number at least 0 and below 1, not 2"),
    (["matrix_update=nesterov | polr | step"], nothing,
     "matrix_update: there is no stage 'polr'; the nearest is 'polar'"),
    (["matrix_update=nesterov | floor(taget=0.4) | step"], nothing,
     "matrix_update: floor(taget=0.4): floor has no 'taget'; the nearest is 'target'"),
    (["matrix_update=contra(0.4) | step"], nothing,
     "matrix_update: contra needs N, which no stage before it makes: nesterov does"),
    (["matrix_update=nesterov | polar"], nothing,
     "matrix_update: 'nesterov | polar' does not move the weight: end it with | step"),
    (["head_dim=12"], nothing, "head_dim=12 does not divide model_dim=32"),
    (["--sead", "1"], nothing, "unrecognized arguments: --sead 1; the nearest is --seed"),
    (["--trials", "0"], nothing, "--seed 0 --trials 0: seeds are 0 to 2^63 - 1, trials at least 1"),
    (["--seed", str(2**63)], nothing,
     "--seed 9223372036854775808 --trials 1: seeds are 0 to 2^63 - 1, trials at least 1"),
    (["--checkpoint-every", "-1"], nothing, "--checkpoint-every -1: a number of steps, or 0 for never"),
    ([], environment(WORLD_SIZE="2"), "WORLD_SIZE=2 but no MASTER_ADDR: start the processes with torchrun"),
    ([], environment(WORLD_SIZE="abc"),
     "WORLD_SIZE=abc in the environment: torchrun sets it to a number of at least 1; unset WORLD_SIZE"),
    ([], environment(WORLD_SIZE="0"),
     "WORLD_SIZE=0 in the environment: torchrun sets it to a number of at least 1; unset WORLD_SIZE"),
    ([], environment(MASTER_PORT="99999"),
     "MASTER_PORT=99999 in the environment: torchrun sets it to a number of at least 0 and at most 65535; unset "
     "MASTER_PORT"),
    ([], environment(RANK="3"), "RANK=3 with WORLD_SIZE=1 in the environment: torchrun sets both; unset RANK"),
    ([], environment(LOCAL_RANK="1"),
     "LOCAL_RANK=1 with RANK=0 in the environment: torchrun sets both; unset LOCAL_RANK"),
    ([], environment(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"),
     "torchrun is gone: nobody answers at 127.0.0.1:1, where it keeps the store of this job; by hand, unset "
     "TORCHELASTIC_USE_AGENT_STORE"),
    (["matrix_ir=1"], environment(LOCAL_RANK="1"),
     "LOCAL_RANK=1 with RANK=0 in the environment: torchrun sets both; unset LOCAL_RANK"),
    ([], environment(WORLD_SIZE="3"),
     "batch_tokens=128 is 8 sequences, which 3 processes cannot share equally: start 2, or change batch_tokens"),
    ([SHARD], nothing,
     "no file {here}/train_*.bin: python data/cached_fineweb10B.py downloads FineWeb, python "
     "data/local.py makes shards of text on this machine"),
    ([SHARD], shard([1, 2], magic=1), "{here}/train_1.bin is not a token shard: {again}"),
    ([SHARD], shard([1, 2], version=2), "{here}/train_1.bin is not a token shard: {again}"),
    ([SHARD], lambda folder, _: (folder / "train_1.bin").touch(), "{here}/train_1.bin is not a token shard: {again}"),
    ([SHARD], cut, "{here}/train_1.bin holds 1950 tokens, its header says 2000: {again}"),
    ([SHARD], shard(range(2000), count=1999), "{here}/train_1.bin holds 2000 tokens, its header says 1999: {again}"),
    ([SHARD], shard([5] * 900),
     "8 batches of 128 tokens are needed, {here}/train_*.bin holds 7: make or download more shards (see "
     "data/), or ask for less"),
    ([SHARD], shard([5] * 2000 + [600]), "{here}/train_1.bin holds token 600, vocab_size is 512: {again}"),
    ([*RESUME, "--fork-from", "a"], nothing, "--resume goes on with a run, --fork-from starts another: give one"),
    (["--resume", "newest"], nothing,
     "--resume newest without --checkpoint-every N finds nothing to go on from: give both"),
    (RESUME, nothing, "there is no logs/run.checkpoint/manifest.json on this machine: name a checkpoint that is here; "
     "of several machines all see one logs/"),
    (RESUME, checkpoint(),
     "logs/run.txt is not here, or shorter than logs/run.checkpoint says: start where logs/ holds both"),
    ([*RESUME, "matrix_lr=0.9"], checkpoint(),
     "--resume goes on as the run began, without NAME=VALUE; --fork-from starts a variation"),
    (RESUME, checkpoint(flip),
     "logs/run.checkpoint/seed0-step8.pt is damaged: its size or sha256 is not what manifest.json says"),
    (RESUME, checkpoint(lambda _, file: os.truncate(file, 1000)),
     "logs/run.checkpoint/seed0-step8.pt is damaged: its size or sha256 is not what manifest.json says"),
    (RESUME, checkpoint(lambda folder, _: (folder / "manifest.json").write_text("[" * 4000)),
     "logs/run.checkpoint/manifest.json is no manifest of a checkpoint"),
    (RESUME, checkpoint(manifest(file="../../state.pt")),
     "logs/run.checkpoint/manifest.json names '../../state.pt', which is no checkpoint's file"),
    (RESUME, checkpoint(lambda folder, _: write_checkpoint(folder, "seed0-step1.pt", {"model": Code()})),
     "logs/run.checkpoint/seed0-step1.pt is no checkpoint: it is not made of tensors, numbers and text alone"),
    (RESUME, checkpoint(lambda folder, _: write_checkpoint(folder, "seed0-step1.pt", {"x": torch.ones(1)})),
     "logs/run.checkpoint is no checkpoint of a run, or of another version's, whose commit its log names"),
    (RESUME, checkpoint(bomb),
     "logs/run.checkpoint/a.pt is no checkpoint: it is not made of tensors, numbers and text alone"),
    (RESUME, checkpoint(state(source_sha256="0")),
     "logs/run.checkpoint is of another version of this program: check out the commit that its log names"),
    (RESUME, checkpoint(state(hyperparameters=dict(direction="aurora", mu=0.95))),
     "logs/run.checkpoint is of another version of this program: check out the commit that its log names"),
    ([*FORK, "model_dim=64"], checkpoint(), "--fork-from: model_dim is 32 in logs/run.checkpoint and cannot change"),
    ([*FORK, "batch_tokens=256"], checkpoint(),
     "--fork-from: batch_tokens is 128 in logs/run.checkpoint and cannot change"),
    ([*FORK, "matrix_update=adamw"], checkpoint(),
     "--fork-from: matrix_update is 'nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step' in "
     "logs/run.checkpoint, with another state than 'adamw': knobs may change, and stages that keep nothing"),
    ([*FORK, "train_steps=8"], checkpoint(), "--fork-from: the last step is 8, and logs/run.checkpoint is at step 8"),
    ([], lambda folder, _: (folder / "logs").touch(), "rank 0: [Errno 17] File exists: 'logs'"),
    ([], fails("train_gpt.accumulate_gradients", torch.OutOfMemoryError()),
     "rank 0: the GPU has not enough memory for micro_batch=2; try micro_batch=1"),
    (["micro_batch=1"], fails("train_gpt.accumulate_gradients", torch.OutOfMemoryError()),
     "rank 0: the GPU has not enough memory for micro_batch=1; no smaller one is left: take more GPUs or "
     "a smaller model"),
    ([], fails("harness.run.facts", OSError(28, "No space left on device")),
     "rank 0: [Errno 28] No space left on device"),
]


@pytest.fixture(scope="module")
def faults(quick, tmp_path_factory) -> Path:
    """A folder for folders, in which there is a whole run with a checkpoint of its last step."""
    folder = tmp_path_factory.mktemp("faults")
    train(folder / "whole", [*quick, "--checkpoint-every", "4"])
    return folder


@pytest.mark.parametrize("k", range(len(FAULTS)))
def test_a_fault_is_one_line(k, faults, quick, monkeypatch):
    """Kills: a traceback; an error that names neither what is wrong nor a remedy; a stranger's file that runs code,
    reaches outside of its folder or unpacks to any size; a log begun before all was looked at."""
    words, plant, line = FAULTS[k]
    folder = faults / str(k)
    folder.mkdir()
    plant(folder, monkeypatch)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        train(folder, [word.format(here=folder) for word in quick * (words[:2] not in (RESUME, FORK)) + words])
    again = "delete it and make it again with the program in data/"
    assert str(end.value) == "train_gpt.py: " + line.format(here=folder, again=again)
    if not line.startswith("rank"):  # of a run that had begun
        assert sorted(folder.rglob("*")) == before


# The trainer, with a NaN planted in one parameter's gradient in one backward pass of one rank.
PLANT = """
import os, sys
import train_gpt

PARAMETER, BACKWARD, RANK = "blocks.1.mlp.fc.weight", {backward}, {rank}
passes = 0

def hook(gradient):
    global passes
    passes += 1
    planted = passes == BACKWARD and int(os.environ.get("RANK", 0)) == RANK
    return gradient * float("nan") if planted else gradient

def make_banks(model, hp, place, original=train_gpt.make_banks, hooked=[]):
    if not hooked:
        hooked.append(dict(model.named_parameters())[PARAMETER].register_hook(hook))
    return original(model, hp, place)

train_gpt.make_banks = make_banks
train_gpt.main(sys.argv[1:])
"""


def planted(folder, words, backward, rank=0, processes=0):
    script = folder / "planted.py"
    script.write_text(PLANT.format(backward=backward, rank=rank))
    return start(words, folder, script, processes, PYTHONPATH=str(ROOT))


def test_a_gradient_that_is_not_finite_is_named(quick, tmp_path):
    """Kills: a NaN found on the rank that has it alone, which leaves the other waiting; the sum over ranks searched,
    which blames rank 0; the step before or after; weights that are trained on with it.

    Two micro-batches of two sequences on each of two ranks: backward pass 7 is the first of step 4.
    """
    run = planted(tmp_path, quick, backward=7, rank=1, processes=2)
    assert run.returncode == 1
    line = "the gradient of blocks.1.mlp.fc.weight is not finite on rank 1 at step 4"
    assert run.stderr.count(f"train_gpt.py: seed 0: {line}\n") == 1 and "FloatingPointError" not in run.stderr
    (path,) = (tmp_path / "logs").glob("*.txt")
    assert path.read_text().splitlines()[-1] == f"failed: {line}"
    assert json.loads(path.with_suffix(".jsonl").read_text().splitlines()[-1])["step"] == 3
    (trial,) = read(path).trials
    assert trial.failed == line and trial.diverged


def test_a_trial_that_fails_leaves_the_next_one_clean(quick, tmp_path):
    """Kills: seeds that are never run because one failed; gradients, weights or state of the failed trial in the next;
    an exit code of 0 over a failure."""
    run = planted(tmp_path, [*quick, "--trials", "2"], backward=7)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "log: " in run.stdout
    (path,) = (tmp_path / "logs").glob("*.txt")
    failed, whole = read(path).trials
    assert failed.failed.startswith("the gradient of blocks.1.mlp.fc.weight is not") and failed.last_step == 0
    (tmp_path / "alone").mkdir()
    assert start([*quick, "--seed", "1"], tmp_path / "alone").returncode == 0
    (alone,) = (tmp_path / "alone" / "logs").glob("*.jsonl")
    values = [[(r["step"], r.get("val_loss"), r.get("loss")) for r in map(json.loads, file.read_text().splitlines())
               if r["seed"] == 1] for file in (path.with_suffix(".jsonl"), alone)]
    assert values[0] == values[1] and len(values[0]) == 8 + 3
    assert whole.complete and not whole.fault


def log_of(folder) -> Path:
    (path,) = (folder / "logs").glob("*.txt")
    return path


def test_finished_seeds_are_not_run_again(quick, tmp_path, capsys):
    """Kills: a seed that is paid for twice; one that is skipped though it failed, was cut short, or ran with other
    values; a single run that is skipped."""
    def seeds(words) -> list[int]:
        before = set(tmp_path.glob("logs/*.txt"))
        capsys.readouterr()
        train(tmp_path, [*quick, *words])
        return [trial.seed for path in set(tmp_path.glob("logs/*.txt")) - before for trial in read(path).trials]
    assert seeds(["--trials", "2"]) == [0, 1]
    name = log_of(tmp_path).name
    assert seeds(["--trials", "3"]) == [2]
    said = [f"seed {seed} is finished, in logs/{name}: it is not run again" for seed in (0, 1)]
    assert capsys.readouterr().out.splitlines()[:2] == said
    assert seeds(["--trials", "3"]) == [] and seeds(["--trials", "2", "nesterov.mu=0.5"]) == [0, 1]
    assert seeds(["--seed", "1"]) == [1]
    for path in tmp_path.glob("logs/*.txt"):
        path.write_text(path.read_text().replace("step:8/8 val_loss:", "step:8/8 val_loss:nan", 1))
    assert seeds(["--trials", "3"]) == [0, 2]
    for path in tmp_path.glob("logs/*.txt"):
        path.write_text(path.read_text() + "failed: the validation loss at step 8 is 9\n")
    assert seeds(["--trials", "2", "--seed", "2"]) == [2, 3]
    for path in tmp_path.glob("logs/*.txt"):
        path.write_text(path.read_text()[:-40])
    assert seeds(["--trials", "2", "--seed", "2"]) == [3]


def test_a_run_that_goes_on_runs_what_it_cuts_off(quick, tmp_path, monkeypatch):
    """Kills: seeds taken for finished because they stand in the part of the log that a resumed run cuts off; its own
    seed left out, and its state given to the next one, because another log holds it."""
    train(tmp_path / "single", quick)
    with monkeypatch.context() as patch:
        patch.setattr("harness.checkpoint.write_checkpoint", lambda folder, name, state: "seed0" in name and
                      write_checkpoint(folder, name, state))
        train(tmp_path, [*quick, "--trials", "3", "--checkpoint-every", "5"])
    path = log_of(tmp_path)
    losses = [trial.losses for trial in read(path).trials]
    shutil.copy(log_of(tmp_path / "single"), tmp_path / "logs")
    train(tmp_path, ["--resume", f"logs/{checkpoint_of(tmp_path).name}"])
    assert [trial.losses for trial in read(path).trials] == losses and len(losses) == 3


def test_what_is_no_log_is_skipped(quick, tmp_path, monkeypatch, capsys):
    """Kills: --trials, or the desk, that a folder, a dangling link or another's file of that name keeps from
    starting."""
    train(tmp_path, [*quick, "--trials", "2"])
    (tmp_path / "logs" / "00.txt").mkdir()
    (tmp_path / "logs" / "01.txt").symlink_to("/nonexistent")
    capsys.readouterr()
    train(tmp_path, [*quick, "--trials", "2"])
    said = capsys.readouterr()
    assert said.err == "skipped: logs/00.txt: Is a directory\nskipped: logs/01.txt: No such file or directory\n"
    assert said.out.count("it is not run again") == 2
    assert desk(["verify", str(tmp_path / "logs")]) == 1  # read and judged
    assert "00.txt cannot be read: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_logs_that_cannot_be_locked(number, quick, tmp_path, monkeypatch, capsys):
    """Kills: no training on Lustre or NFS, where flock fails; two empty files in logs/."""
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr("fcntl.flock", refuse)
    train(tmp_path, quick)
    assert read(log_of(tmp_path)).trials[0].complete
    assert capsys.readouterr().err == (f"train_gpt.py: warning: logs/ cannot be locked ({os.strerror(number)}): see to "
                                       "it that no other run resumes this log\n")


def test_where_the_locale_is_ascii(quick, tmp_path):
    """Kills: sources, recipes and logs that are read and written as the locale has it."""
    for folder in ("harness", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("aurora.py", "initial.py", "rules.py"):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    (tmp_path / "train_gpt.py").write_text(text + "# \u00e9\n", encoding="utf-8")
    (tmp_path / "r").write_text("\n".join(quick) + "\n# \u00e9\n", encoding="utf-8")
    run = start(["@r"], tmp_path, tmp_path / "train_gpt.py", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert run.returncode == 0, run.stderr
    assert "# \u00e9" in log_of(tmp_path).read_text(encoding="utf-8")


def test_nobody_reads_what_a_run_prints(quick, tmp_path):
    """Kills: a run that `| head` ends, or a launcher that is gone: with [Errno 32], or at its very end."""
    run = subprocess.Popen([sys.executable, str(ROOT / "train_gpt.py"), *quick], cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == ("", 0)
    assert read(log_of(tmp_path)).trials[0].complete


def test_the_commit_is_of_this_project(tmp_path):
    """Kills: the commit of a repository around a copy of the project, which says nothing of it."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    (tmp_path / "copy").mkdir()
    assert re.fullmatch("[0-9a-f]{40}", commit(tmp_path)) and commit(tmp_path / "copy") == "none"


def meanwhile(monkeypatch, step: int, what):
    """Do something in the middle of a run."""
    original = train_gpt.update

    def update(banks, now):
        if now == step:
            what()
        original(banks, now)
    monkeypatch.setattr(train_gpt, "update", update)


def test_a_run_keeps_its_log_to_itself(quick, tmp_path, monkeypatch):
    """Kills: two processes that go on with one run, and both write its log; two runs of one folder that meet."""
    runs = []

    def others():
        while not list(tmp_path.glob("logs/*.checkpoint/manifest.json")):
            time.sleep(0.01)
        runs.append(start(["--resume", f"logs/{checkpoint_of(tmp_path).name}"], tmp_path))
        runs.append(start(quick, tmp_path))
    meanwhile(monkeypatch, 5, others)
    train(tmp_path, [*quick, "--checkpoint-every", "3"])
    second, beside = runs
    name = checkpoint_of(tmp_path).stem
    assert second.returncode == 1 and second.stderr == (
        f"train_gpt.py: rank 0: logs/{name}.txt belongs to a run that lives: wait for its end, or end it\n")
    assert beside.returncode == 0 and len(list(tmp_path.glob("logs/*.txt"))) == 2
    assert all([trial.complete for trial in read(path).trials] == [True] for path in tmp_path.glob("logs/*.txt"))


def test_a_clock_that_goes_backwards(quick, tmp_path, monkeypatch):
    """Kills: times of training, or names of logs, that rest on the time of day."""
    now = iter(range(2 * 10**9, 0, -100000))
    monkeypatch.setattr(time, "time", lambda: next(now))
    monkeypatch.setattr(time, "strftime", lambda _: "20200101-000000-")
    train(tmp_path, quick)
    train(tmp_path, quick)
    for path in tmp_path.glob("logs/*.jsonl"):
        times = [json.loads(line)["train_time"] for line in path.read_text().splitlines()]
        assert times == sorted(times) and 0 <= times[0]
    assert len(list(tmp_path.glob("logs/*.txt"))) == 2


def test_a_log_that_is_cut_anywhere_is_told_from_a_whole_one(quick, tmp_path, capsys):
    """Kills: a traceback of the desk over half a head or half a line; a loss of which digits are missing."""
    train(tmp_path, quick)
    path = log_of(tmp_path)
    whole = path.read_bytes()
    facts = whole.index(b"=" * 100)
    last = whole.rindex(b"step:8/8")
    for size in (0, 1000, facts - 1, facts + 50, facts + 101, facts + 200, last, last + 20, len(whole) - 10):
        path.write_bytes(whole[:size])
        capsys.readouterr()
        code = desk(["verify", str(path)])
        said = capsys.readouterr()
        # a line of the log that is cut off is told too
        assert code in (1, 2) and said.err.count("\n") == (code == 2 or "no whole loss in the line" in said.err), size
        assert code == 2 or "FAIL" in said.out and "used" in said.out


def test_a_shard_that_is_damaged_is_found_when_the_run_comes_to_it(quick, tmp_path):
    """Kills: a token outside of the vocabulary that is trained on; a rank that waits for one that has found it; a
    traceback, or a line a rank; the checkpoint before it lost."""
    tokens = [7] * 600
    write_shard(tmp_path / "train_1.bin", tokens)
    write_shard(tmp_path / "train_2.bin", [*tokens, 600])
    words = [*quick, f"train_files={tmp_path}/train_*.bin", "--checkpoint-every", "2"]
    run = start(words, tmp_path, processes=2)
    line = f"train_gpt.py: {tmp_path}/train_2.bin holds token 600, vocab_size is 512: delete it and make it again with"
    assert run.returncode == 1 and run.stderr.count(line) == 1 and "DamagedShard" not in run.stderr, run.stderr
    write_shard(tmp_path / "train_2.bin", tokens)
    train(tmp_path, ["--resume", f"logs/{checkpoint_of(tmp_path).name}"])
    assert read(log_of(tmp_path)).trials[0].complete


# The trainer, with a rank that does something else when step 6 has its gradients.
LOST = """
import os, signal, sys, time
import train_gpt
from harness import heartbeat

heartbeat.SILENT, heartbeat.STALLED = {silent}, {stalled}
update = train_gpt.update

def otherwise(banks, step):
    if step == 5 and os.environ.get("RANK", "0") == "{rank}":
        {what}
    update(banks, step)

train_gpt.update = otherwise
train_gpt.main(sys.argv[1:])
"""


def lost(folder, what, rank=1, silent=5, stalled=1000):
    script = folder / "lost.py"
    script.write_text(LOST.format(what=what, rank=rank, silent=silent, stalled=stalled))
    return script


def test_a_rank_that_is_stopped_ends_the_job(quick, tmp_path):
    """Kills: ranks that wait for a stopped one until gloo's half an hour is over; a line that blames the one that
    waits; a checkpoint or a log that is spoiled by it."""
    script = lost(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, script, *quick, "--checkpoint-every", "3"], cwd=tmp_path, text=True,
                              stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                              env=os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                                                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHONPATH=str(ROOT),
                                                    CUDA_VISIBLE_DEVICES=""))
             for rank in (0, 1)]
    try:
        said = ranks[0].communicate(timeout=100)[1]
        assert ranks[0].returncode == 1 and ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert said.splitlines()[-1] == (
        "train_gpt.py: rank 0, step 6: rank 1 has been silent for 5 s: it is stopped, or its machine is gone")
    assert read_checkpoint(checkpoint_of(tmp_path))["step"] == 3
    assert log_of(tmp_path).read_text().endswith("ms\n")


def test_a_step_that_hangs_ends_the_job(quick, tmp_path):
    """Kills: a watch that no longer counts after a validation, or that counts a step with one, which may compile; a
    line that does not tell where the program hangs."""
    run = start(quick, tmp_path, lost(tmp_path, "time.sleep(100)", rank=0, stalled=4), PYTHONPATH=str(ROOT))
    assert run.returncode == 1
    assert re.fullmatch(r"train_gpt.py: rank 0, step 6: no end for \d+ s, in train \(train_gpt.py:\d+\)\n", run.stderr)
    validating = lost(tmp_path, "time.sleep(7)", rank=0, stalled=4)
    validating.write_text(validating.read_text().replace("step == 5", "step == 4"))
    assert start(quick, tmp_path, validating, PYTHONPATH=str(ROOT)).returncode == 0


def test_where_a_program_hangs_is_told_by_a_line_of_its_own(tmp_path):
    """Kills: a line of a package in .venv, which is also below the root; only files of the root itself, or those beside
    heartbeat.py, known as the project's."""
    names = {"beat": Heartbeat(0, 1, tmp_path)}
    for name, code in ((".venv/lib/python3/site-packages/torch/a.py", "def inner(): return beat.whereabouts()"),
                       ("harness/b.py", "def outer(): return inner()"), ("c.py", "def direct(): return inner()")):
        exec(compile(code, str(tmp_path / name), "exec"), names)
    assert (names["outer"](), names["direct"]()) == ("outer (b.py:1)", "direct (c.py:1)")


def test_a_rank_that_is_killed_ends_the_job(quick, tmp_path):
    """Kills: a survivor that waits; a report that blames the survivor; half a line in the log."""
    run = start(quick, tmp_path, lost(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), 2, PYTHONPATH=str(ROOT))
    assert run.returncode == 1
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 ", run.stderr[run.stderr.index("Root Cause"):])
    assert log_of(tmp_path).read_text().endswith("ms\n")
