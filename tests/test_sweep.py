"""./run.sh sweep: files of variations, runs that are started, stopped and shared, and the ledger that they leave.

In place of the trainer stands a program that takes its words and writes its logs, in a thirtieth of a second; one test
starts the trainer itself. Every test was seen to fail.
"""

import fcntl
import hashlib
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, train, wait_for

import sweep as runner
import train_gpt
from records import sweep as desk
from records.ledger import CRASHED, FAILED, FINISHED, Plan, Variation, read_ledger

STAND_IN = '''
import hashlib, json, os, random, signal, sys, time

words = sys.argv[1:]
option = {name: words[words.index(name) + 1] for name in ("--seed", "--resume", "--checkpoint-every") if name in words}
if folder := option.get("--resume"):
    name, first = folder.removesuffix(".checkpoint"), 10
    effect, seed = json.load(open(folder + "/manifest.json"))
else:
    effect, seed = [word for word in words if word.startswith("effect=")][0], int(option["--seed"])
    name, first = f"logs/{time.time_ns()}-{os.getpid()}", 0
source = f"{effect!r}\\n"
kind, _, size = effect.removeprefix("effect=").partition(":")

def stop(number, _):
    if "--checkpoint-every" in option or folder:
        os.makedirs(name + ".checkpoint", exist_ok=True)
        json.dump([effect, seed], open(name + ".checkpoint/manifest.json", "w"))
    sys.exit("train_gpt.py: stopped by a signal")

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
if kind == "crash":
    print("Traceback ...", file=sys.stderr)
    sys.exit("train_gpt.py: rank 0: the GPU has not enough memory")
log, sidecar = open(name + ".txt", "a"), open(name + ".jsonl", "a")

def say(line):
    print(line, file=log, flush=True)
    print(line, flush=True)

if not first:
    line, sha256 = "=" * 100, hashlib.sha256(source.encode()).hexdigest()
    print(source, line, "\\nRunning PyTorch on a CPU with world_size 1\\nsource_sha256: ", sha256, "\\n", line,
          f"\\nseed: {seed}", sep="", file=log, flush=True)
luck, own = random.Random(seed), random.Random(f"{seed} {effect}")
for step in range(first, 21, 10):
    if kind == "wait" and step == 20:
        while not os.path.exists("go"):
            time.sleep(0.01)
    loss = 4 - 0.1 * step + luck.gauss(0, 1e-3) + own.gauss(0, 3e-4) + float(size or 0)
    print(json.dumps(dict(seed=seed, step=step, val_loss=loss)), file=sidecar, flush=True)
    say(f"step:{step}/20 val_loss:{loss:.5f} train_time:{step}.000s step_avg:1.00ms")
    if kind == "fail":
        print("failed: the validation loss at step 0 is nan", file=log, flush=True)
        sys.exit("train_gpt.py: seed 0: the validation loss at step 0 is nan")
'''
# The sweep as a process, which can be killed: of the plan that stands first in the ledger
DRIVER = """
import sys
from sweep import sweep
from records.ledger import read_ledger
plan = read_ledger("v.txt.jsonl").plans[0]
sys.exit(sweep(plan, "v.txt.jsonl", [sys.executable, "-S", "stand_in.py"], 10))
"""


def planned(effects: dict[str, str], seeds: int) -> Plan:
    """`effects`: {name of the variation: what it does}, as the stand-in has it."""
    def sha256(effect):
        return hashlib.sha256(f"{f'effect={effect}'!r}\n".encode()).hexdigest()
    variations = [Variation(name, [f"effect={effect}"], sha256(effect), "val_loss", 20)
                  for name, effect in effects.items()]
    return Plan("", "v.txt", [(seed, "") for seed in range(seeds)], variations)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the stand-in; signals are put back."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in runner.SIGNALS}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def sweep(plan: Plan) -> tuple[int, dict]:
    """Its exit code and its table."""
    if not os.path.exists("v.txt.jsonl"):
        runner.append("v.txt.jsonl", plan)
    code = runner.sweep(plan, "v.txt.jsonl", [sys.executable, "-S", "stand_in.py"], 0)
    return code, desk.sweep(read_ledger("v.txt.jsonl"))


def driver(**streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", DRIVER], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                            **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | streams)


def ends() -> list[tuple]:
    return [(run.name, run.seed, run.status) for run in read_ledger("v.txt.jsonl").runs]


def test_ranks(place, capsys):
    """Kills: pairs of different seeds; the losses of the first validation; a sign that is turned; a failed run that is
    repeated or left out; a run that is made twice; the digits of the log for those of its sidecar.

    Own deviations of .0003 on seeds' of .001: in 5 pairs .003 is known for sure, and in runs that are not paired it is
    not. The losses are drawn from fixed seeds.
    """
    plan = planned({"base": "same:0", "null": "null:0", "up": "up:3e-3", "down": "down:-3e-3", "hot": "fail"}, 5)
    code, table = sweep(plan)
    assert code == 0 and table["verdict"] and table["to_come"] == 0
    outcomes = {row["name"]: row["outcome"] for row in table["variations"]}
    assert outcomes == {"null": "open", "up": "worse", "down": "better", "hot": "failed"}
    up = next(row for row in table["variations"] if row["name"] == "up")
    assert up["difference"] == pytest.approx(3e-3, abs=3 * 3e-4 * (2 / 5) ** 0.5) and up["pairs"] == 5
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[-8:-3]] == ["base", "down", "null", "up", "hot"]
    runs = read_ledger("v.txt.jsonl").runs
    assert [(run.seed, run.name) for run in runs] == [(seed, v.name) for seed in range(5) for v in plan.variations]
    assert runs[4].status == FAILED and runs[4].why == "the validation loss at step 0 is nan"
    for run in (run for run in runs if run.status == FINISHED):
        last = json.loads(Path(run.log).with_suffix(".jsonl").read_text().splitlines()[-1])
        assert (run.loss, run.step, run.device, run.world) == (last["val_loss"], 20, "a CPU", 1)
        assert f"\nseed: {run.seed}\n" in Path(run.log).read_text() and round(run.loss, 5) != run.loss
    before = Path("v.txt.jsonl").read_bytes()
    assert sweep(plan)[0] == 0 and Path("v.txt.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_sweep_goes_on(place, number):
    """Kills: a run that outlives its sweep, or ends without its checkpoint; one that was stopped, in the ledger as a
    crash; one that begins anew beside its checkpoint, or keeps it when it has finished; a finished run made again."""
    runner.append("v.txt.jsonl", planned({"base": "same:0", "slow": "wait:0"}, 1))
    first = driver()
    wait_for(lambda: len([path for path in place.glob("logs/.sweep-*") if "log: " in path.read_text()]) == 2)
    first.send_signal(number)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == (-number if number == signal.SIGKILL else 1)
    assert said == ("" if number == signal.SIGKILL else "sweep: stopped; the same command goes on\n")
    wait_for(lambda: [*place.glob("logs/*.checkpoint/manifest.json")])
    assert ends() == [("base", 0, FINISHED)]
    (place / "go").touch()
    second = driver()
    assert "no verdict" not in second.communicate(timeout=60)[0] and second.returncode == 0
    assert ends() == [("base", 0, FINISHED), ("slow", 0, FINISHED)]
    assert len([*place.glob("logs/*.txt")]) == 2 and not [*place.glob("logs/*.checkpoint")]


def test_two_sweeps_share_the_runs(place):
    """Kills: a run that two sweeps make; one that waits for the other; a verdict before the last run has ended."""
    runner.append("v.txt.jsonl", planned({"base": "wait:0", "up": "up:1"}, 2))
    first = driver()
    wait_for(lambda: [*place.glob("logs/*.txt")])
    second = driver()
    wait_for(lambda: ends() == [("up", 0, FINISHED)])
    wait_for(lambda: len([*place.glob("logs/*.txt")]) == 3)  # the second waits in its own run of the first variation
    (place / "go").touch()
    out, err = zip(*(each.communicate(timeout=60) for each in (first, second)))
    assert sorted(ends()) == [("base", 0, FINISHED), ("base", 1, FINISHED), ("up", 0, FINISHED), ("up", 1, FINISHED)]
    assert 0 in (first.returncode, second.returncode) and "worse" in out[0] + out[1]
    assert not (first.returncode and second.returncode)


def test_a_crash_is_tried_three_times(place, capsys):
    """Kills: a crash that is repeated for ever, or in one command; one that ends the other runs; a crash called a
    failure of the recipe; an exit code of 0 while there is something to try."""
    plan = planned({"base": "same:0", "large": "crash", "up": "up:1"}, 2)
    assert [sweep(plan)[0] for _ in range(4)] == [1, 1, 0, 0]
    whole = [(name, seed, FINISHED) for name in ("base", "up") for seed in (0, 1)]
    assert sorted(ends()) == sorted(whole + [("large", seed, CRASHED) for seed in (0, 0, 0, 1, 1, 1)])
    run = next(run for run in read_ledger("v.txt.jsonl").runs if run.status == CRASHED)
    assert run.why == "rank 0: the GPU has not enough memory" and run.log == "" and run.loss is None
    said, err = capsys.readouterr()
    assert f"large seed 0: crashed: {run.why}, step 0, " in said and "open (2 crashed)" in said
    assert err.splitlines() == ["sweep: 2 runs crashed; the same command goes on"] * 2


def test_a_crash_of_the_first_variation_ends_the_sweep(place, capsys):
    """Kills: hours of runs that nothing can be compared with."""
    assert sweep(planned({"base": "crash", "up": "up:1"}, 2))[0] == 1 and ends() == [("base", 0, CRASHED)]
    assert "sweep: the first variation has crashed" in capsys.readouterr().err


def test_progress_on_a_terminal(place):
    """Kills: a bar of one run, or of steps that are not made; a bar in a pipe, which the other tests would see."""
    runner.append("v.txt.jsonl", planned({"base": "same:0", "slow": "wait:0"}, 1))
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = driver(stderr=end)
    wait_for(lambda: [text for path in place.glob("logs/*.txt")
                      if "wait" in (text := path.read_text()) and "step:10/" in text])
    (place / "go").touch()
    process.communicate(timeout=60)
    seen = os.read(terminal, 2**16)
    os.close(terminal)
    os.close(end)
    assert b"0/None" not in seen
    time_left = rb"\[\d\d:\d\d<\d\d:\d\d\]"
    assert re.search(rb"slow seed 0, 1 run to come +75%\|.* 30/40 steps, val_loss:(2.99|3.00)\d+ " + time_left, seen)


@pytest.mark.parametrize("text, says", [
    ("", " has no variation: "), ("# nothing\n\n", " has no variation: "),
    ("base:\nlr matrix_lr=1", ":2: 'lr matrix_lr=1' is not understood"), ("a b: x=1", ":1: 'a b: x=1' is not"),
    ("base:\nbase: x=1", ":2: a second base"), ("base:\n\n# x\nb: 'x=1", ":4: \"'x=1\" has a quotation mark"),
    ("base: --seed 3", ":1: '--seed' is not understood"), ("base: x", ":1: 'x' is not understood"),
    ("a: x=1\0", ":1: 'a: x=1\\x00' is not"), ("\xff", " is no file of variations"), ("#" * 70000, " is no file of")])
def test_mistakes_in_a_file_of_variations(text, says, tmp_path):
    """Kills: a traceback; a line that is not named, or by another number; an option for one variation alone."""
    path = tmp_path / "v.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        runner.read_variations(path)
    assert str(error.value).startswith(f"{path}{says}") and "\n" not in str(error.value)


def test_a_file_of_variations(tmp_path):
    """Kills: quotation marks that stay; a rule that is cut at its spaces or at a #; a comment that is read; a byte
    order mark or a carriage return in a name."""
    path = tmp_path / "v.txt"
    path.write_bytes(b"\xef\xbb\xbfbase:  # the recipe\r\n\r\n#x: y=1\r\n"
                     b"rule-2: matrix_update=\"polar | step\" @tiny a.b='1'  # as it was\r\n")
    rule = ["matrix_update=polar | step", "@tiny", "a.b=1"]
    assert runner.read_variations(path) == [(1, "base", []), (4, "rule-2", rule)]


@pytest.fixture
def asked(monkeypatch, capsys):
    """What the trainer makes of a file of variations, as JSON, or the line in which it refuses."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def ask(lines, words, checkpoints=(), download=False):
        lines = [runner.read_variation(number, line) for number, line in enumerate(lines, 1)]
        asked = dict(file="v.txt", lines=lines, words=words, checkpoints=checkpoints, download=download)
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asked)))
        try:
            runner.examine(train_gpt)
        except SystemExit as end:
            return end.code
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return ask


@pytest.mark.parametrize("lines, says", [
    (["base:", "b: matrix_lrr=1"], "v.txt:2: b: 'matrix_lrr' is not a hyperparameter; the nearest is 'matrix_lr'"),
    (["base:", "b: train_steps=9", "c: train_steps=8"], "v.txt:3: c is the same run as base: leave one out"),
    (["base:", "b: val_tokens=128"], "v.txt:2: b has another val_tokens than the first variation: their losses"),
    (["base:", "b: train_files=nowhere/*.bin"], "v.txt:2: b: no file nowhere/*.bin"),
    (["base: contra.strenght=0.3"], "v.txt:1: base: ")])
def test_variations_that_cannot_run(asked, quick, lines, says):
    """Kills: a mistake that is found after hours, in the last variation; two lines that are one run; losses of two
    validation sets held against each other."""
    assert asked(lines, quick).startswith(says)


def test_what_downloads_the_shards_of_all(asked):
    """Kills: the shards of the first variation alone; a check of those that are to be downloaded."""
    answer = asked(["base:", "long: train_steps=6400", "short: train_steps=100"], [], download=True)
    assert answer["download"] == "data/cached_fineweb10B.py 34"


def test_forks(asked, quick, place, capsys):
    """Kills: forks of two steps or of one seed, as pairs; a source that the trainer's log does not have, so that no log
    is found; a fork that is none. The trainer runs, from a checkpoint of 8 steps to step 10."""
    for seed in ("0", "1"):
        train(place, [*quick, "--seed", seed, "--checkpoint-last"])
    train(place, [*quick, "train_steps=4", "--checkpoint-last"])
    first, second, early = sorted(map(str, Path("logs").glob("*.checkpoint")), key=os.path.getmtime)
    assert f"{early} is at step 4, {first} at 8, or of other" in asked(["base:"], ["train_steps=10"], [first, early])
    assert asked(["base:"], [], [first]).startswith("v.txt:1: base: --fork-from: the last step is 8")
    answer = asked(["base:", "low: matrix_lr=0.001"], ["train_steps=10"], [first, second])
    assert isinstance(answer, dict), answer
    options = runner.parse(["v.txt", "train_steps=10", "--fork-from", first, "--fork-from", second])
    plan = runner.plan_of(options, answer, [])
    assert plan.starts == [(0, f"step 8 of {first}"), (1, f"step 8 of {second}")]
    with pytest.raises(ValueError, match="holds runs from step 0, these are from step 8"):
        runner.plan_of(options, answer, [replace(plan, starts=[(0, "")])])
    one = replace(plan, starts=plan.starts[1:], variations=plan.variations[1:])
    runner.append("v.txt.jsonl", one)
    for name, value in dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="").items():
        os.environ.setdefault(name, value)
    assert runner.sweep(one, "v.txt.jsonl", [sys.executable, str(ROOT / "train_gpt.py")], 4) == 0
    (run,) = read_ledger("v.txt.jsonl").runs
    assert (run.status, run.seed, run.step, run.overrides) == (FINISHED, 1, 10, ["train_steps=10", "matrix_lr=0.001"])
    assert f"partial: forked from step 8 of {second}, seed 1" in Path(run.log).read_text()
    assert Path(first).exists() and Path(second).exists() and not Path(run.log).with_suffix(".checkpoint").exists()


def test_checkpoints_that_are_no_pairs():
    """Kills: two checkpoints of one seed, which are one draw, as two pairs; those of two recipes."""
    state = dict(seed=0, step=8)
    runner.check_alike({"a": (state, "recipe"), "b": (dict(seed=1, step=8), "recipe")})
    for other, says in (((state, "recipe"), "b and a are both of seed 0"),
                        ((dict(seed=1, step=9), "recipe"), "b is at step 9"),
                        ((dict(seed=1, step=8), "another"), "or of other values")):
        with pytest.raises(ValueError, match=says):
            runner.check_alike({"a": (state, "recipe"), "b": other})


def test_starts_of_a_plan():
    """Kills: seeds of the ledger that a later command forgets, or doubles; a default that adds some to them."""
    def starts(*words, before=()):
        answer = dict(variations=[], forks=[])
        return [seed for seed, _ in runner.plan_of(runner.parse(["v.txt", *words]), answer, list(before)).starts]
    assert starts() == [0, 1, 2, 3] and starts("--seeds", "2", "--seed", "5") == [5, 6]
    old = [Plan("", "v.txt", [(seed, "") for seed in (0, 1)], [])]
    assert starts(before=old) == [0, 1] and starts("--seeds", "3", before=old) == [0, 1, 2]
    assert starts("--seeds", "2", "--seed", "7", before=old) == [0, 1, 7, 8]


def test_words_for_all_that_are_forgotten(place, monkeypatch, capsys):
    """Kills: a second command without the first one's words after the file, which begins other runs without a word; a
    word where only a variation has come to it."""
    plan = planned({"first": "loss:2", "other": "loss:1"}, 1)
    (place / "v.txt").write_text("first: a=1\nother: a=2\n")
    assert sweep(replace(plan, variations=plan.variations[:1]))[0] == 0
    monkeypatch.setattr(runner.subprocess, "call", lambda *_, **__: 0)  # the doctor
    for variations, warnings in ((plan.variations, 0), (plan.variations[1:], 1)):
        capsys.readouterr()
        monkeypatch.setattr(runner, "ask", lambda *_: dict(variations=[vars(v) for v in variations], forks=[]))
        assert runner.main(["v.txt", "--dry-run"]) == 0
        assert capsys.readouterr().err.count("v.txt.jsonl has no run of these programs") == warnings


@pytest.mark.parametrize("words, says", [
    ([], "the following arguments are required"), (["@tiny"], "no file of variations"),
    (["a", "b", "x=1"], "2 files of variations (a b): give one"), (["a", "--seeds", "0"], "--seeds is at least 1"),
    (["a", "--fork-from", "c", "--seeds", "2"], "--fork-from: a fork has its checkpoint's seed"),
    (["a", "--sedes", "2"], "unrecognized arguments: --sedes"), (["nowhere.txt"], "nowhere.txt: no such file")])
def test_mistakes_on_the_command_line(words, says, place):
    """Kills: a traceback, more than a line; a start in spite of it."""
    with pytest.raises(SystemExit) as end:
        runner.main(words)
    assert end.value.code.startswith("sweep: " + says) and "\n" not in end.value.code
