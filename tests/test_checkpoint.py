"""A run that is killed and goes on is the run that was never killed; what is no checkpoint is refused in one line."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start

import train_gpt
from checkpoint import file_sha256, read_checkpoint, write_checkpoint
from records.__main__ import main as desk
from records.log import read

# The trainer, which sends itself a signal when a function is called for the n-th time.
SELF_KILL = """
import os, sys
import checkpoint, train_gpt

owner, name, calls, signal = {owner}, {name!r}, {calls}, {signal}
original = getattr(owner, name)

def counted(*arguments, **settings):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal)
    return original(*arguments, **settings)

setattr(owner, name, counted)
train_gpt.main(sys.argv[1:])
"""


def killed(folder: Path, words, owner="train_gpt", name="learning_rate_factor", calls=6, number=signal.SIGKILL):
    folder.mkdir(exist_ok=True)
    (folder / "killed.py").write_text(SELF_KILL.format(owner=owner, name=name, calls=calls, signal=int(number)))
    return start(words, folder, folder / "killed.py", PYTHONPATH=str(ROOT))


def train(folder: Path, words):
    """In this process, which is quicker; on one thread, as in `start`. The signals' handlers are put back."""
    folder.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before, handlers = Path.cwd(), {number: signal.getsignal(number) for number in train_gpt.SIGNALS}
    os.chdir(folder)
    try:
        train_gpt.main(list(words))
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def checkpoint_of(folder: Path) -> Path:
    (found,) = (folder / "logs").glob("*.checkpoint")
    return found


def tensors(state) -> list:
    """All of a state that is a tensor, by its place."""
    if isinstance(state, torch.Tensor):
        return [((), state)]
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return [((key, *place), tensor) for key, value in items for place, tensor in tensors(value)]


def curve(folder: Path) -> list:
    """(seed, step, loss) of every line of the sidecar, the log's lines without times, and the neurons' file."""
    (path,) = (folder / "logs").glob("*.txt")
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    lines = [re.sub(r" train_time.*", "", line) for line in path.read_text().split("=" * 100)[2].splitlines()]
    return ([(row["seed"], row["step"], row.get("val_loss", row.get("loss"))) for row in rows],
            [line for line in lines if not line.startswith("resumed: ")],
            gzip.open(path.with_suffix(".neurons.jsonl.gz")).read())


@pytest.fixture(scope="module")
def words(quick):
    return [*quick, "--checkpoint-every", "3", "--trials", "2", "--neurons", "4"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """Two trials of 9 steps that nothing interrupted; the last checkpoint is of the last step."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, [*words, "train_steps=9"])
    return folder


def same(folder: Path, whole: Path):
    assert curve(folder) == curve(whole)
    states = [tensors(read_checkpoint(checkpoint_of(f))) for f in (folder, whole)]
    assert [place for place, _ in states[0]] == [place for place, _ in states[1]]
    assert len(states[0]) == 18 and all(torch.equal(a, b) for (_, a), (_, b) in zip(*states))


def test_checkpoints_change_nothing(whole, quick, tmp_path):
    """Kills: a checkpoint that draws a random number, skips a batch or leaves a line in the log."""
    train(tmp_path, [*quick, "train_steps=9", "--trials", "2", "--neurons", "4"])
    assert curve(tmp_path) == curve(whole)
    assert not list((tmp_path / "logs").glob("*.checkpoint"))
    assert sorted(path.name for path in checkpoint_of(whole).iterdir()) == ["manifest.json", "seed1-step9.pt"]


@pytest.mark.parametrize("moment", [
    dict(calls=5),  # in step 5, of which the log already tells
    dict(calls=15),  # in the second trial
    dict(owner="checkpoint.torch", name="save", calls=2),
    dict(owner="checkpoint.os", name="rename", calls=3),  # before the second file has its name
    dict(owner="checkpoint.os", name="rename", calls=4),  # between the second file's and its manifest's
])
def test_a_killed_run_goes_on_to_the_same_bits(moment, words, whole, tmp_path):
    """Kills: weights, a momentum, AdamW's count of steps or the place in the data that is lost or a step off; lines
    that stand in the log twice; a trial begun again or left out; a checkpoint that is named before it is whole."""
    run = killed(tmp_path, [*words, "train_steps=9"], **moment)
    assert run.returncode == -signal.SIGKILL
    train(tmp_path, ["--resume", f"logs/{checkpoint_of(tmp_path).name}"])
    same(tmp_path, whole)
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert len(re.findall(r"^resumed: step [36], world_size 1$", log.read_text(), re.MULTILINE)) == 1
    assert [trial.complete for trial in read(log).trials] == [True, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_step(number, words, whole, tmp_path):
    """Kills: work lost to a scheduler's warning; an end that looks like a success; a traceback."""
    run = killed(tmp_path, [*words, "train_steps=9"], calls=4, number=number)
    assert run.returncode == 1
    # sent in step 4 after the ranks agreed: heeded in step 5
    assert run.stderr == "train_gpt.py: stopped by a signal at step 5; --resume logs/*.checkpoint goes on\n"
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert log.read_text().splitlines()[-1] == "stopped: by a signal at step 5"
    train(tmp_path, ["--resume", f"logs/{checkpoint_of(tmp_path).name}"])
    same(tmp_path, whole)
    assert "stopped" not in log.read_text().split("=" * 100)[2]


def test_a_signal_may_ask_for_a_checkpoint_alone(quick, tmp_path, monkeypatch):
    """Kills: a run that ends of SIGUSR1, or does not heed it."""
    saved = []
    monkeypatch.setattr(train_gpt, "write_checkpoint", lambda folder, name, state: saved.append(state["step"]))
    monkeypatch.setattr(train_gpt, "record_neurons", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    train(tmp_path, [*quick, "--checkpoint-every", "100", "--neurons", "5"])
    assert saved == [6]  # sent in step 5, after the ranks agreed
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert read(log).trials[0].complete


def test_another_number_of_processes_goes_on(words, whole, tmp_path):
    """Kills: a checkpoint of one rank's share of Aurora's state, or a rank that resumes with another's; a batch that
    one rank reads twice, a log that two ranks cut.

    To rounding: 2 processes sum 4 bf16 gradients each and then 2 sums, in another order than 8 in a row.
    """
    assert killed(tmp_path, [*words, "train_steps=9"], calls=5).returncode == -signal.SIGKILL
    run = start(["--resume", f"logs/{checkpoint_of(tmp_path).name}"], tmp_path, processes=2)
    assert run.returncode == 0, run.stderr
    ours, theirs = curve(tmp_path)[0], curve(whole)[0]
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=2e-5)
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert "resumed: step 3, world_size 2\n" in log.read_text()
    places = [{(place, x.shape) for place, x in tensors(read_checkpoint(checkpoint_of(folder)))}
              for folder in (tmp_path, whole)]
    assert len(places[0]) == 18 and places[0] == places[1]


def test_a_fork_is_a_variation_and_no_evidence(quick, whole, tmp_path, capsys):
    """Kills: a fork that begins at step 0, keeps the old rate, or writes into the log of the run that it leaves; one
    that is judged like a run from step 0, with --mixed too."""
    train(tmp_path, [*quick, "--checkpoint-every", "4"])  # of 8 steps: the checkpoint is of step 8
    folder = checkpoint_of(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "logs").glob("*.*") if path.is_file()}
    for mu in (0.95, 0.5):
        train(tmp_path, ["--fork-from", str(folder), "train_steps=11", f"mu={mu}"])
    assert all(path.read_bytes() == content for path, content in before.items())
    forks = sorted(set((tmp_path / "logs").glob("*.txt")) - set(before), key=os.path.getmtime)
    trials = [read(path).trials[0] for path in forks]
    assert [list(trial.losses) for trial in trials] == [[8, 11]] * 2 and trials[0].seed == 0
    assert trials[0].losses[8] == trials[1].losses[8] and trials[0].losses[11] != trials[1].losses[11]
    assert read(forks[1]).facts["partial"] == [f"forked from step 8 of {folder}, seed 0"]
    capsys.readouterr()
    for words in ([], ["--mixed", next(str(path) for path in before if path.suffix == ".txt")]):
        assert desk(["verify", *words, str(forks[1])]) == 2
        assert re.fullmatch(r"records: \S+ is partial: forked from step 8 .+\n", capsys.readouterr().err)


def refuse(tmp_path, words) -> str:
    with pytest.raises(SystemExit) as end:
        train(tmp_path, words)
    line = str(end.value)
    assert line.startswith("train_gpt.py: ") and "\n" not in line
    return line


@pytest.mark.parametrize("values, says", [
    (["model_dim=64"], "model_dim is 32"), (["batch_tokens=256"], "batch_tokens is 128"),
    (["direction=adamw"], "direction is aurora"), (["train_steps=9"], "train_steps=9, and"),
    (["mu=2"], "mu=2.0: the weight of the past")])
def test_a_fork_that_cannot_be(values, says, whole, tmp_path):
    """Kills: a traceback from a state that does not fit; a fork that reads other batches than it says."""
    assert says in refuse(tmp_path, ["--fork-from", str(checkpoint_of(whole)), *values])


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def damage(folder: Path, what: str):
    (file,) = folder.glob("*.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    if what == "bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "manifest":
        (folder / "manifest.json").write_text("[" * 4000)
    elif what == "outside":
        (folder / "manifest.json").write_text(json.dumps(manifest | {"file": "../../state.pt"}))
    elif what == "code":
        write_checkpoint(folder, "seed0-step1.pt", {"model": Code()})
    elif what == "other":
        write_checkpoint(folder, "seed0-step1.pt", {"model": torch.zeros(1)})
    elif what == "source":
        write_checkpoint(folder, "seed0-step1.pt", read_checkpoint(folder) | {"source_sha256": "0"})
    elif what == "bomb":
        with zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive, zipfile.ZipFile(file) as stored:
            for entry in stored.namelist():
                archive.writestr(entry, stored.read(entry))
        manifest = dict(file="a.pt", bytes=os.path.getsize(folder / "a.pt"), sha256=file_sha256(folder / "a.pt"))
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("what, says", [
    ("bit", "seed1-step9.pt is damaged: its size or sha256 is not what manifest.json says"),
    ("cut", "seed1-step9.pt is damaged"), ("manifest", "manifest.json is no manifest of a checkpoint"),
    ("outside", "manifest.json names '../../state.pt', which is no checkpoint's file"),
    ("code", "seed0-step1.pt is no checkpoint: it is not made of tensors, numbers and text alone"),
    ("other", "is no checkpoint of a run"), ("source", "is of another version of this program: check out the commit"),
    ("bomb", "a.pt is compressed, which no checkpoint is")])
def test_what_is_no_checkpoint_is_refused(what, says, whole, tmp_path):
    """Kills: a file of a stranger that runs code, reaches outside its folder or unpacks to any size; bits that have
    changed; weights of another program; a traceback."""
    folder = tmp_path / "logs" / "run.checkpoint"
    folder.mkdir(parents=True)
    for path in checkpoint_of(whole).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder, what)
    assert says in refuse(tmp_path, ["--resume", "logs/run.checkpoint"])
    assert not (tmp_path / "ran").exists() and sorted(os.listdir(tmp_path)) == ["logs"]


def test_a_resumed_run_needs_its_log_and_its_own_values(whole, tmp_path):
    """Kills: a log begun anew in the middle of a run; values of the command line that are dropped in silence."""
    folder = checkpoint_of(whole)
    assert "is not here, or shorter than" in refuse(tmp_path, ["--resume", str(folder)])
    assert "without NAME=VALUE" in refuse(tmp_path, ["--resume", str(folder), "mu=0.9"])
    assert "No such file" in refuse(tmp_path, ["--resume", "logs/nowhere.checkpoint"])


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path):
    """Kills: a checkpoint before that is gone; half a file left on a full disk; another exception than the two."""
    write_checkpoint(tmp_path / "run", "a.pt", {"x": torch.zeros(10)})
    code = ("import resource, sys, torch; from pathlib import Path; from checkpoint import write_checkpoint\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
            "try: write_checkpoint(Path('run'), 'b.pt', {'x': torch.zeros(10**6)})\n"
            "except (OSError, RuntimeError): sys.exit(7)")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 7
    assert sorted(os.listdir(tmp_path / "run")) == ["a.pt", "manifest.json"]
    assert torch.equal(read_checkpoint(tmp_path / "run")["x"], torch.zeros(10))


@pytest.mark.parametrize("words", [["--resume", "logs/a.checkpoint"], ["--fork-from", "logs/a.checkpoint", "mu=0.9"]])
def test_run_sh_leaves_a_checkpoint_its_recipe(words, tmp_path):
    """Kills: @tiny before --resume, which takes no values, or over those of the run that a fork leaves."""
    (tmp_path / "run.sh").write_text((ROOT / "run.sh").read_text())
    (tmp_path / "requirements.txt").write_text("pins\n")
    for name in ("pip", "python", "torchrun"):
        stub = tmp_path / ".venv" / "bin" / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >> calls\n')
        stub.chmod(0o755)
    (tmp_path / ".venv" / "requirements.txt").write_text("pins\n")
    subprocess.run(["bash", "run.sh", *words], cwd=tmp_path, check=True,
                   env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""})
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == " ".join(["python -m records doctor --", *words])
    assert calls[1].endswith(" ".join(["train_gpt.py", *words])) and "--nproc_per_node=1 " in calls[1]
