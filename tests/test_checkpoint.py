"""A run that is killed and goes on is the run that was never killed; it can be seen, waited for, and forked."""

import copy
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SOAP_MUON, start, train

import train_gpt
from harness.arguments import parse
from harness.checkpoint import read_checkpoint, write_checkpoint
from harness.run import recall
from records.__main__ import main as desk
from records.log import read
from tests.drills import kill
from tests.drills.kill import checkpoint_of, curve, tensors

# The trainer, which sends itself a signal when a function is called for the n-th time.
SELF_KILL = """
import os, sys
import harness.checkpoint, train_gpt

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


def killed(folder: Path, words, owner="train_gpt", name="update", calls=6, number=signal.SIGKILL):
    folder.mkdir(exist_ok=True)
    (folder / "killed.py").write_text(SELF_KILL.format(owner=owner, name=name, calls=calls, signal=int(number)))
    return start(words, folder, folder / "killed.py", PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def words(quick):
    return [*quick, "--checkpoint-every", "3", "--trials", "2", "--neurons", "4"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """Two trials of 9 steps that nothing interrupted; the last checkpoint is of the last step."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, [*words, "train_steps=9"])
    return folder


@pytest.fixture(scope="module")
def soap_words(words):
    return [*words, *SOAP_MUON]


@pytest.fixture(scope="module")
def soap_whole(soap_words, tmp_path_factory):
    """The same of a rule that looks ahead and averages."""
    folder = tmp_path_factory.mktemp("soap")
    train(folder, [*soap_words, "train_steps=9"])
    assert all(" val_ema_loss:" in line for line in curve(folder)[1] if line.startswith("step:"))
    return folder


def same(folder: Path, whole: Path, count: int = 15):
    assert curve(folder) == curve(whole)
    assert kill.same(folder, whole) and len(tensors(read_checkpoint(checkpoint_of(whole)))) == count


def test_checkpoints_change_nothing(whole, quick, tmp_path):
    """Kills: a checkpoint that draws a random number, skips a batch or leaves a line in the log."""
    train(tmp_path, [*quick, "train_steps=9", "--trials", "2", "--neurons", "4"])
    assert curve(tmp_path) == curve(whole)
    assert not list((tmp_path / "logs").glob("*.checkpoint"))
    assert sorted(path.name for path in checkpoint_of(whole).iterdir()) == ["manifest.json", "seed1-step9.pt"]


@pytest.mark.parametrize("words, steps", [
    (["--checkpoint-every", "3"], [3, 6, 8]), (["--checkpoint-every", "4"], [4, 8]), (["--checkpoint-last"], [8]),
    (["--checkpoint-last", "stop_step=5"], [5]), (["--checkpoint-last", "--trials", "2"], [8, 8])])
def test_the_last_step_is_saved(words, steps, quick, tmp_path, monkeypatch):
    """Kills: last weights that are lost because N does not divide the steps, or because the run stops early; a last
    step that is saved twice; more than the last where that was asked for."""
    saved = []
    monkeypatch.setattr("harness.checkpoint.write_checkpoint", lambda folder, name, state: saved.append(state["step"]))
    train(tmp_path, [*quick, *words])
    assert saved == steps


@pytest.mark.parametrize("moment", [
    dict(calls=5),  # in step 5, of which the log already tells
    dict(calls=15),  # in the second trial
    dict(owner="harness.checkpoint.torch", name="save", calls=2),
    dict(owner="harness.checkpoint.os", name="rename", calls=3),  # before the second file has its name
    dict(owner="harness.checkpoint.os", name="rename", calls=4),  # between the second file's and its manifest's
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


def test_a_killed_run_that_looks_ahead_goes_on_to_the_same_bits(soap_words, soap_whole, tmp_path):
    """Kills: as above, a point, a drift, an average, a basis or a covariance that is lost; training that goes on from
    what a validation has shown, or from W where it had looked ahead; a val_ema_loss of another average."""
    assert killed(tmp_path, [*soap_words, "train_steps=9"], calls=6).returncode == -signal.SIGKILL
    train(tmp_path, ["--resume", f"logs/{checkpoint_of(tmp_path).name}"])
    same(tmp_path, soap_whole, count=59)


def test_what_a_fork_of_a_rule_may_change(soap_whole, tmp_path):
    """Kills: a fork that goes on without a state that its rule needs, or with one of another meaning; one that refuses
    another number."""
    folder = str(checkpoint_of(soap_whole))
    for words, name in ((["final_update="], "matrix_update"), (["vector_update="], "vector_update"),
                        (["head_update="], "head_update"),
                        ([f"final_update={SOAP_MUON[-1].split(' | ')[1]}"], "matrix_update")):
        with pytest.raises(SystemExit) as refused:
            train(tmp_path / "refused", ["--fork-from", folder, "train_steps=12", *words])
        assert re.fullmatch(fr"train_gpt.py: --fork-from: {name} is '.*' in .*, with another state than .*: knobs may "
                            "change, and stages that keep nothing", str(refused.value))
    train(tmp_path / "fork", ["--fork-from", folder, "train_steps=11", "soap.beta=0.5", "lookahead.size=0.1",
                              "anchored_average.share=0.5", "val_every=1"])
    (log,) = (tmp_path / "fork" / "logs").glob("*.txt")
    rows = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines() if "val_ema_loss" in line]
    assert [row["step"] for row in rows] == [9, 11]
    assert rows[0]["val_loss"] == curve(soap_whole)[0][-1][2] and rows[0]["val_ema_loss"] != curve(soap_whole)[0][-1][3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_at_the_next_step(number, words, whole, tmp_path):
    """Kills: work lost to a scheduler's warning or a closed terminal; an end that looks like a success; a traceback; a
    remedy that the shell makes two words of, as of logs/*.checkpoint."""
    run = killed(tmp_path, [*words, "train_steps=9"], calls=4, number=number)
    assert run.returncode == 1
    # sent in step 4 after the ranks agreed: heeded in step 5
    folder = f"logs/{checkpoint_of(tmp_path).name}"
    assert run.stderr == f"train_gpt.py: stopped by a signal at step 5; --resume {folder} goes on\n"
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert log.read_text().splitlines()[-1] == "stopped: by a signal at step 5"
    train(tmp_path, ["--resume", f"logs/{checkpoint_of(tmp_path).name}"])
    same(tmp_path, whole)
    assert "stopped" not in log.read_text().split("=" * 100)[2]


def test_all_ranks_leave_together(quick, tmp_path, monkeypatch):
    """Kills: a rank that leaves while rank 0 still receives or writes: torchrun would soon end rank 0 as well."""
    events, barrier = [], dist.barrier
    monkeypatch.setattr("harness.checkpoint.write_checkpoint", lambda *_: events.append("written"))
    monkeypatch.setattr(dist, "barrier", lambda: (events.append("all ranks are here"), barrier()))
    monkeypatch.setattr("harness.trial.record_neurons", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(tmp_path, [*quick, "--checkpoint-every", "100", "--neurons", "5"])
    assert events[-2:] == ["written", "all ranks are here"]


def test_a_signal_may_ask_for_a_checkpoint_alone(quick, tmp_path, monkeypatch):
    """Kills: a run that ends of SIGUSR1, or does not heed it."""
    saved = []
    monkeypatch.setattr("harness.checkpoint.write_checkpoint", lambda folder, name, state: saved.append(state["step"]))
    monkeypatch.setattr("harness.trial.record_neurons", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    train(tmp_path, [*quick, "--checkpoint-every", "100", "--neurons", "5"])
    assert saved == [6, 8]  # sent in step 5, after the ranks agreed; and the last
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert read(log).trials[0].complete


def test_what_nohup_asks_for(quick, tmp_path, monkeypatch):
    """Kills: a run that its terminal ends in spite of nohup, or that does not save then."""
    saved = []
    monkeypatch.setattr("harness.checkpoint.write_checkpoint", lambda folder, name, state: saved.append(state["step"]))
    monkeypatch.setattr("harness.trial.record_neurons", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tmp_path, [*quick, "--checkpoint-every", "100", "--neurons", "5"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved == [6, 8]


def test_a_signal_that_saves_ends_no_run_that_saves_nothing(quick, tmp_path, monkeypatch):
    """Kills: a run without --checkpoint-every that SIGUSR1 ends, which Slurm sends all alike."""
    monkeypatch.setattr("harness.trial.record_neurons", lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    train(tmp_path, [*quick, "--neurons", "5"])
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert read(log).trials[0].complete


def test_a_worker_does_not_outlive_its_launcher(quick, tmp_path):
    """Kills: an orphan that trains on, and holds its GPU, when torchrun dies of a signal that it does not know."""
    script = SELF_KILL.format(owner="train_gpt", name="update", calls=4, signal=int(signal.SIGUSR2)).replace(
        "os.kill(os.getpid(), signal)", "parent = os.getppid(); os.kill(parent, signal)\n"
        "        while os.getppid() == parent: pass")
    (tmp_path / "orphan.py").write_text(script)
    words = [sys.executable, "orphan.py", *quick, "--checkpoint-every", "100"]
    run = subprocess.run(["sh", "-c", '"$@"; true', "sh", *words], cwd=tmp_path, text=True, capture_output=True,
                         timeout=60, env=os.environ | {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1",
                                                       "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert run.returncode == -signal.SIGUSR2  # its output ends when the worker's does
    folder = f"logs/{checkpoint_of(tmp_path).name}"
    assert run.stderr == f"train_gpt.py: stopped by a signal at step 5; --resume {folder} goes on\n"


def test_files_of_other_names_stay_in_a_checkpoint(tmp_path):
    """Kills: a state that a person has kept, or a note beside it, removed by the next checkpoint; old states that
    stay."""
    write_checkpoint(tmp_path / "run", "seed0-step1.pt", {"x": torch.zeros(1)})
    for name in ("best.pt", "notes.txt", "seed0-step2.part"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "run" / "folder").mkdir()
    write_checkpoint(tmp_path / "run", "seed0-step3.pt", {"x": torch.zeros(1)})
    assert sorted(os.listdir(tmp_path / "run")) == ["best.pt", "folder", "manifest.json", "notes.txt", "seed0-step3.pt"]


def test_a_run_that_goes_on_knows_its_recipe(quick, tmp_path, monkeypatch):
    """Kills: a resumed run of #36's recipe shown beside result #17, or beside none; a fork with another schedule shown
    beside the recipe that it left."""
    recipe = tmp_path / "36_quick"
    recipe.write_text("\n".join(quick))
    monkeypatch.setattr("harness.checkpoint.write_checkpoint", lambda folder, name, state: name == "seed0-step6.pt" and
                        write_checkpoint(folder, name, state))  # not the last step's, of which no fork can begin
    train(tmp_path, [f"@{recipe}", "--checkpoint-every", "6"])
    folder = str(checkpoint_of(tmp_path))
    monkeypatch.chdir(tmp_path)
    beside = [recall(train_gpt.EXPERIMENT, parse(words)).result for words in (
        ["--resume", folder], ["--fork-from", folder, "matrix_lr=1"], ["--fork-from", folder, "train_steps=11"])]
    assert beside == [36, 36, 0]


def test_what_a_person_types_for_resume(quick, tmp_path, monkeypatch):
    """Kills: [Errno 20] for the file in the folder or for the log; another state than the one that is named; a card
    that is too small to go on; a resumed run that calls itself another program."""
    monkeypatch.setattr("harness.checkpoint.write_checkpoint", lambda folder, name, state: name == "seed0-step8.pt" and
                        write_checkpoint(folder, name, state))  # not step 9
    train(tmp_path, [*quick, "train_steps=9", "--checkpoint-every", "4"])
    folder = checkpoint_of(tmp_path)
    log = folder.with_suffix(".txt")
    losses = read(log).trials[0].losses
    for word in (folder / "seed0-step8.pt", log, folder.with_suffix(".jsonl"), folder / "manifest.json"):
        train(tmp_path, ["--resume", str(word)])
        assert read(log).trials[0].losses == losses
    (folder / "best.pt").touch()
    with pytest.raises(SystemExit, match="best.pt is not the file that .*manifest.json names"):
        train(tmp_path, ["--resume", str(folder / "best.pt")])
    other = tmp_path / "logs" / "older.checkpoint"
    other.mkdir()
    os.utime(other, (0, 0))
    with pytest.raises(SystemExit, match=f"these are 2: give one; the newest is {folder}$"):
        train(tmp_path, ["--resume", str(folder), str(other)])
    train(tmp_path, ["--resume", str(folder), "micro_batch=1"])
    assert "resumed: step 8, world_size 1, micro_batch 1\n" in log.read_text()
    # each micro-batch's gradient is rounded to bf16
    assert read(log).trials[0].losses == pytest.approx(losses, abs=1e-3)
    assert read(log).trials[0].losses != losses
    train(tmp_path, ["--resume", str(folder)])
    assert read(log).trials[0].losses == losses


NEWEST = ["--checkpoint-every", "3", "--resume", "newest"]


def logs_of(folder: Path) -> list[Path]:
    return sorted((folder / "logs").glob("*.txt"), key=os.path.getmtime)


def test_one_command_until_it_is_finished(quick, whole, tmp_path, capsys):
    """Kills: a run that is begun anew though a checkpoint of it is there, or that goes on with that of another recipe
    or of some of its seeds; one that is trained again when it is finished, also by another micro_batch; a checkpoint of
    another program in the way."""
    words = [*quick, "train_steps=9", "--neurons", "4", "--trials", "2", *NEWEST]
    for others in ([*quick, "train_steps=7"], [*quick, "train_steps=9", "--seed", "1"]):
        assert killed(tmp_path, [*others, *NEWEST], calls=5).returncode == -signal.SIGKILL
    write_checkpoint(tmp_path / "logs" / "a.checkpoint", "seed0-step1.pt", {"x": torch.zeros(1)})
    before = logs_of(tmp_path)
    for moment in (dict(calls=5), dict(calls=4), dict(owner="harness.checkpoint.os", name="rename", calls=3)):
        assert killed(tmp_path, words, **moment).returncode == -signal.SIGKILL
    train(tmp_path, words)
    (log,) = set(logs_of(tmp_path)) - set(before)
    ours, theirs = ([trial.losses for trial in read(path).trials] for path in (log, *logs_of(whole)))
    assert ours == theirs and len(ours) == 2
    stamp = log.stat().st_mtime_ns
    for micro_batch in ("2", "1"):
        capsys.readouterr()
        train(tmp_path, [*words, f"micro_batch={micro_batch}"])
        said = capsys.readouterr()
        assert said.out.splitlines() == [f"seed {seed} is finished, in logs/{log.name}: it is not run again"
                                         for seed in (0, 1)]
        assert said.err == "skipped: logs/a.checkpoint is no checkpoint of a run\n"
    assert log.stat().st_mtime_ns == stamp and len(logs_of(tmp_path)) == len(before) + 1


def test_a_smaller_card_goes_on_with_the_newest(quick, tmp_path):
    """Kills: a fresh start, and the time before it lost, because the next machine needs another micro_batch; a run that
    goes on as its fork."""
    assert killed(tmp_path, [*quick, *NEWEST], calls=5).returncode == -signal.SIGKILL
    fork = ["--fork-from", f"logs/{checkpoint_of(tmp_path).name}", "--checkpoint-every", "1"]
    assert killed(tmp_path, fork, calls=3).returncode == -signal.SIGKILL
    log, _ = logs_of(tmp_path)
    train(tmp_path, [*quick, *NEWEST, "micro_batch=1"])
    assert "resumed: step 3, world_size 1, micro_batch 1\n" in log.read_text()
    assert read(log).trials[0].complete and len(logs_of(tmp_path)) == 2


def test_a_failure_is_not_repeated_for_ever(quick, tmp_path, capsys):
    """Kills: a loop that pays for the same NaN again and again; a failure that ends as a success; a seed that is not
    run because another has failed."""
    words = [*quick, "embed_lr=1e38", "vector_lr=1e38", *NEWEST]
    for trials in ("1", "2", "2"):
        with pytest.raises(SystemExit) as end:
            train(tmp_path, [*words, "--trials", trials])
        assert end.value.code == 1
    said = capsys.readouterr()
    first, second = (path.name for path in logs_of(tmp_path))
    again = "seed {} has failed, in logs/{}: it is not run again"
    assert [line for line in said.out.splitlines() if line.startswith("seed")] == [
        again.format(0, first), again.format(0, first), again.format(1, second)]
    assert said.err.count("is not finite") == 2


def test_two_with_the_same_command(quick, tmp_path, monkeypatch):
    """Kills: two processes that train the same run side by side, before the first checkpoint or after; one that lives
    and keeps a run of another seed from starting."""
    words, runs, update = [*quick, *NEWEST], {}, train_gpt.update

    def at(banks, step):
        if step in (1, 5):
            runs[step] = start(words, tmp_path)
            runs[step, "other"] = start([*words, "--seed", str(step)], tmp_path)
        update(banks, step)
    monkeypatch.setattr(train_gpt, "update", at)
    train(tmp_path, words)
    for step in (1, 5):
        assert runs[step].returncode == 1 and runs[step, "other"].returncode == 0
        assert re.fullmatch(rf"train_gpt.py: process {os.getpid()} on \S+ has come first with this command, and lives "
                            r"\(logs/\.newest-\w+-0-1\): wait for its end, or end it\n", runs[step].stderr)
    assert sorted(read(path).trials[0].seed for path in (tmp_path / "logs").glob("*.txt")) == [0, 1, 5]
    assert all(read(path).trials[0].complete for path in (tmp_path / "logs").glob("*.txt"))


def test_a_run_that_goes_on_elsewhere_says_so(quick, tmp_path, monkeypatch, capsys):
    """Kills: a log that tells the first machine alone; runs of two kinds of hardware that pass for one kind; the first
    machine's name on a trial that the second has run whole."""
    with monkeypatch.context() as patch:
        patch.setattr("harness.checkpoint.write_checkpoint", lambda folder, name, state: name == "seed0-step6.pt" and
                      write_checkpoint(folder, name, state))
        train(tmp_path, [*quick, "--checkpoint-every", "3", "--trials", "2"])
    folder = checkpoint_of(tmp_path)
    monkeypatch.setattr("harness.log.processor", lambda: "CPU Other Machine, 9000")
    train(tmp_path, ["--resume", str(folder)])
    log = folder.with_suffix(".txt")
    assert f"resumed: step 6, world_size 1, on CPU Other Machine, 9000, PyTorch {torch.__version__}, threads 1\n" in \
        log.read_text()
    first, second = read(log).trials
    assert first.device.endswith(" and then CPU Other Machine, 9000") and second.device == "CPU Other Machine, 9000"
    assert desk(["verify", str(log)]) == 2
    assert "2 different devices: 1 on CPU " in capsys.readouterr().err


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
    assert len(places[0]) == 15 and places[0] == places[1]


def test_a_fork_is_a_variation_and_no_evidence(quick, whole, tmp_path, capsys):
    """Kills: a fork that begins at step 0, keeps the old rate, or writes into the log of the run that it leaves; one
    that is judged like a run from step 0, with --mixed too."""
    train(tmp_path, [*quick, "--checkpoint-every", "4"])  # of 8 steps: the checkpoint is of step 8
    folder = checkpoint_of(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "logs").glob("*.*") if path.is_file()}
    for mu in (0.95, 0.5):
        train(tmp_path, ["--fork-from", str(folder), "train_steps=11", f"nesterov.mu={mu}"])
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


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(quick, tmp_path, capsys):
    """Kills: a checkpoint before that is gone; half a file left on a full disk; a run that ends of it, or silence."""
    write_checkpoint(tmp_path / "run", "a.pt", {"x": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))  # takes a log, and no checkpoint
    try:
        with pytest.raises((OSError, RuntimeError)):
            write_checkpoint(tmp_path / "run", "b.pt", {"x": torch.zeros(10**6)})
        train(tmp_path, [*quick, "--checkpoint-every", "4"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path / "run")) == ["a.pt", "manifest.json"]
    assert torch.equal(read_checkpoint(tmp_path / "run")["x"], torch.zeros(10))
    (log,) = (tmp_path / "logs").glob("*.txt")
    said = [f"train_gpt.py: no checkpoint logs/{log.stem}.checkpoint/seed0-step{step}.pt: [Errno 27] File too large\n"
            for step in (4, 8)]
    assert capsys.readouterr().err == "".join(said)
    assert read(log).trials[0].complete and os.listdir(checkpoint_of(tmp_path)) == []


def test_a_checkpoint_is_of_its_moment(quick, tmp_path, monkeypatch):
    """Kills: tensors, or AdamW's count of steps, that training changes while the thread writes them; a next checkpoint
    that does not wait; a run that ends before its last one is whole."""
    words = [*quick, "--checkpoint-every", "3"]
    taken, written, step_6 = [], [], threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr("harness.checkpoint.Writer.write", lambda *arguments: taken.append(copy.deepcopy(arguments[-1])))
        train(tmp_path / "at once", words)

    def slow(folder, name, state):
        assert step_6.wait(60)
        time.sleep(0.5)  # while the run goes on to its next checkpoint or its end, unless it waits
        written.append(copy.deepcopy(state))
    monkeypatch.setattr("harness.checkpoint.write_checkpoint", slow)
    factor = train_gpt.learning_rate_factor
    monkeypatch.setattr(train_gpt, "learning_rate_factor",
                        lambda step, *rest: (step == 5 and step_6.set()) or factor(step, *rest))
    train(tmp_path / "slowly", words)
    for ours, theirs in zip(written, taken, strict=True):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tensors(ours), tensors(theirs), strict=True))
    assert [state["step"] for state in written] == [3, 6, 8]


def test_killed_at_any_moment(tmp_path):
    """Kills: as above, with two ranks under torchrun's agent, at five moments, some of them within the writing of a
    checkpoint. `python -m tests.drills.kill` does it fifty times."""
    code = ("import sys; from pathlib import Path; from tests.drills import kill; "
            "print(kill.kills(Path(sys.argv[1]), 5))")
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert re.fullmatch(r"\(5, [1-5]\)\n", run.stdout), run.stdout + run.stderr


@pytest.mark.parametrize("words", [["--resume", "logs/a.checkpoint"],
                                   ["--fork-from", "logs/a.checkpoint", "nesterov.mu=0.9"],
                                   ["@tiny", "--checkpoint-every", "9", "--resume", "newest"]])
def test_run_sh_leaves_a_checkpoint_its_recipe(words, tmp_path):
    """Kills: @tiny before --resume, which takes no values, or over those of the run that a fork leaves; no @tiny for
    --resume newest, which may begin."""
    (tmp_path / "run.sh").write_text((ROOT / "run.sh").read_text())
    (tmp_path / "requirements.txt").write_text("pins\n")
    for name in ("pip", "python"):
        stub = tmp_path / ".venv" / "bin" / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f'#!/bin/sh\ncase "$*" in *find_gpus*) echo 0; exit;; esac\necho "{name} $*" >> calls\n')
        stub.chmod(0o755)
    (tmp_path / ".venv" / "requirements.txt").write_text("pins\n")
    typed = words[words[0] == "@tiny":]
    subprocess.run(["bash", "run.sh", *typed], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"]})
    calls = [call for call in (tmp_path / "calls").read_text().splitlines() if "local.py" not in call]
    assert calls[0] == " ".join(["python -m harness.doctor --", *words])
    assert calls[1].endswith(" ".join(["train_gpt.py", *words])) and "--nproc_per_node=1 " in calls[1]
