"""Variations of a run, times seeds, in pairs: one command that can be repeated until all have run.

    ./run.sh sweep FILE [--seeds K] [--seed S] [--checkpoint-every N] [@RECIPE | NAME=VALUE ...]
    ./run.sh sweep FILE --fork-from CHECKPOINT [--fork-from CHECKPOINT ...] [...]

FILE has a variation a line, `NAME: OVERRIDES` as on the command line of train_gpt.py; # begins a comment. The first is
the one that the others are compared with, in pairs of runs that have a seed or a checkpoint in common. Words after FILE
are for all. FILE.jsonl is the ledger (records/ledger.py); `python -m records sweep FILE.jsonl` shows the table.

Every run has all GPUs of the machine, in turn: so it is what ./run.sh would make of its words, and the first pairs are
there early. For one run a GPU start the command once for each, with its CUDA_VISIBLE_DEVICES: sweeps of one file share
its runs. A run belongs to the sweep that holds the lock of logs/.sweep-PROGRAM-START.

Runs in the ledger are not repeated. One whose losses failed is a result. One that crashed is tried again by the next
command, three times in all. With --checkpoint-every a run that was stopped goes on from its checkpoint, which is
removed when it has finished. No run is ever stopped for its loss.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from math import inf, isfinite
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from records import sweep as desk
from records.ledger import CRASHED, FAILED, FINISHED, Ledger, Plan, Run, Start, Variation, read_ledger
from records.log import Trial, read

ROOT = Path(__file__).resolve().parent
EXAMINE = "import train_gpt; from sweep import examine; examine(train_gpt)"
TRAIN = "import sys; from harness.torchrun import launch; launch(sys.argv[1:])"  # without a verdict on each run
LIBC = ctypes.CDLL(None)
SEEDS = 4  # where the ledger has none
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
ATTEMPTS = 3  # of a run that crashes
KIND = "val_files", "val_tokens", "vocab_size"  # fields that make losses of one kind
DATA = *KIND, "train_files", "batch_tokens", "sequence_length", "last_step"  # what the check of the shards depends on


########################################
#           What a person asks         #
########################################

class Line(NamedTuple):
    """Of a file of variations."""
    number: int
    name: str
    words: list[str]


def read_variations(path: Path) -> list[Line]:
    """ValueError names the file and the line that is no variation."""
    try:
        with open(path, "rb") as file:
            text = file.read(2**16 + 1).decode("utf-8-sig")
        if len(text) > 2**16:
            raise ValueError
    except ValueError:
        raise ValueError(f"{path} is no file of variations: it is a text of at most 64 KiB, one `NAME: OVERRIDES` a "
                         "line") from None
    found = []
    for number, text in enumerate(text.split("\n"), 1):
        try:
            if line := read_variation(number, text.strip()):
                if line.name in (other.name for other in found):
                    raise ValueError(f"a second {line.name}: each variation has a name of its own")
                found.append(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no variation: write one `NAME: OVERRIDES` a line, first what the others are "
                         "compared with")
    return found


def read_variation(number: int, text: str) -> Line | None:
    """None where there is only a comment."""
    if not text.partition("#")[0].strip():
        return None
    name, _, rest = text.partition(":")
    if not re.fullmatch(r"[\w.+-]+", name) or not text.isprintable():
        raise ValueError(f"{text[:60]!r} is not understood: write NAME: OVERRIDES")
    try:
        words = shlex.split(rest, comments=True)
    except ValueError:
        raise ValueError(f"{rest.strip()[:60]!r} has a quotation mark without its partner") from None
    for word in words:
        if word.startswith("-") or not ("=" in word or word.startswith("@")):
            raise ValueError(f"{word!r} is not understood: a variation is made of NAME=VALUE, STAGE.KNOB=VALUE and "
                             "@RECIPE; options are for all, after the file's name")
    return Line(number, name, words)


def examine(train_gpt):
    """In a process of its own, which needs PyTorch: answer on stdout what plan_of() asks on stdin."""
    from harness.checkpoint import folder_of
    from harness.run import check_fork, checked, read_run, standing, words_of
    from harness.arguments import overridden
    from harness.log import source_of_run, source_sha256
    from harness.shards import download_of

    asked, experiment = json.load(sys.stdin), train_gpt.EXPERIMENT
    found, kinds, datasets, downloads = {}, {}, set(), [""]
    try:
        folders = [folder_of(checkpoint) for checkpoint in asked["checkpoints"]]
        states = {str(folder): read_run(experiment, folder) for folder in folders}
        check_alike(states)
        begun = [word for state, _ in [*states.values()][:1] for word in words_of(state)]
        for number, name, words in asked["lines"]:
            where, words = f"{asked['file']}:{number}: {name}", asked["words"] + words
            try:
                hp = overridden(experiment, begun + words)
                for folder, (state, before) in states.items():
                    check_fork(hp, before, state, folder)
                data = tuple(getattr(hp, name) for name in DATA)
                if data not in datasets and not asked["download"]:
                    checked(hp, 0, standing()[2])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            datasets.add(data)
            downloads.append(download_of(hp))
            sha256 = source_sha256(source_of_run(experiment.script, hp))
            if sha256 in found:
                raise ValueError(f"{where} is the same run as {found[sha256].name}: leave one out")
            found[sha256] = Variation(name, words, sha256, hp.metric, hp.last_step)
            for field in KIND:
                if getattr(hp, field) != kinds.setdefault(field, getattr(hp, field)):
                    raise ValueError(f"{where} has another {field} than the first variation: their losses are not of "
                                     "one kind")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(json.dumps(dict(
        variations=[asdict(variation) for variation in found.values()],
        forks=[(state["seed"], f"step {state['step']} of {folder}") for folder, (state, _) in states.items()],
        download=max(downloads, key=lambda words: int(words.split()[-1]) if words else 0))))


def check_alike(states: dict):
    """ValueError where checkpoints, {folder: (state, hyperparameters)}, are not of several seeds at one step of one
    run."""
    seeds = {}
    for folder, (state, hp) in states.items():
        first, (begun, before) = next(iter(states.items()))
        if (state["step"], hp) != (begun["step"], before):
            raise ValueError(f"--fork-from: {folder} is at step {state['step']}, {first} at {begun['step']}, or of "
                             "other values: forks are pairs where all begin at one step of one recipe")
        if (other := seeds.setdefault(state["seed"], folder)) != folder:
            raise ValueError(f"--fork-from: {folder} and {other} are both of seed {state['seed']}: give one of them")


def ask(options: argparse.Namespace, lines: list[Line]) -> dict:
    """What examine() answers. ValueError where a variation cannot run."""
    asked = dict(file=options.file, lines=lines, words=options.words, checkpoints=options.fork_from,
                 download=options.fineweb_shards)
    answer = subprocess.run([sys.executable, "-c", EXAMINE], input=json.dumps(asked), capture_output=True, text=True,
                            **APART, env=environment() | {"WORLD_SIZE": str(options.nproc_per_node)})
    if answer.returncode:
        raise ValueError(answer.stderr.strip().split("\n")[-1] or f"the trainer ended with {answer.returncode}")
    return json.loads(answer.stdout)


def environment() -> dict[str, str]:
    """With this project before what else is imported, whatever the folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def plan_of(options: argparse.Namespace, answer: dict, before: list[Plan]) -> Plan:
    """With the starts of the ledger's newest plan, if it has one: what was begun is brought to its end. ValueError
    where forks would be mixed with runs from their first step."""
    variations = [Variation(**variation) for variation in answer["variations"]]
    old = before[-1].starts if before else []
    first = options.seed or 0
    new = [(seed, fork) for seed, fork in answer["forks"]]
    if not new and (options.seeds, options.seed) == (None, None) and old and not old[0][1]:
        new = old
    new = new or [(seed, "") for seed in range(first, first + (options.seeds or SEEDS))]
    kinds = {first_step(start) for start in (*old, *new)}
    if len(kinds) > 1:
        raise ValueError(f"{options.file}.jsonl holds runs from step {first_step(old[0])}, these are from step "
                         f"{first_step(new[0])}, and they do not compare: go on as it began, or copy {options.file}")
    return Plan(now(), options.file, list(dict.fromkeys((*old, *new))), variations)


def first_step(start: Start) -> int:
    return int(start[1].split()[1]) if start[1] else 0


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


########################################
#               Ledger                 #
########################################

def append(path: str, line: Plan | Run):
    """One whole line more, on the disk. What a machine that lost its power has left of one goes."""
    with open(path, "a+b") as file:
        with contextlib.suppress(OSError):  # a file system that cannot lock
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        kind = {Plan: "plan", Run: "run"}[type(line)]
        file.write(json.dumps(dict(line=kind) | asdict(line)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def ledger_of(path: str) -> Ledger:
    return read_ledger(path) if os.path.exists(path) else Ledger(path, [])


def over(runs: list[Run]) -> bool:
    """Whether a start needs no further attempt."""
    return any(run.status != CRASHED for run in runs) or len(runs) >= ATTEMPTS


########################################
#                 Runs                 #
########################################

class Signals:
    """SIGTERM, SIGINT and SIGHUP end the run that is going, which may save, and then the sweep; SIGUSR1 has the run
    save."""

    def __init__(self):
        self.child, self.stop = None, False
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGUSR1:  # nohup ignores SIGHUP
                signal.signal(number, self.hand_on)

    def hand_on(self, number: int, _):
        self.stop |= number != signal.SIGUSR1
        if self.child:
            self.child.send_signal(number)


class Bar(tqdm):
    monitor_interval = 0  # no thread, as processes are forked (APART)


def claim(variation: Variation, start: Start) -> BinaryIO | None:
    """A file in logs/, locked as long as this sweep or a process of the run lives; None where another has the lock. It
    takes what the run says on stderr, and the name of its log, which is how a later sweep finds its checkpoint."""
    Path("logs").mkdir(exist_ok=True)
    place = re.sub(r"\W+", "-", start[1]) or f"seed-{start[0]}"
    file = open(f"logs/.sweep-{variation.source_sha256[:16]}-{place}", "a+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        print(f"sweep: warning: logs/ cannot be locked ({error.strerror}): start no second sweep", file=sys.stderr)
    return file


def content(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def named_log(file: BinaryIO) -> str:
    """The log of the last attempt at this run; '' where it did not get so far."""
    return (re.findall(r"^log: (logs/[\w-]+\.txt)$", content(file), re.MULTILINE) or [""])[-1]


def take(plan: Plan, path: str, tried: set) -> tuple[Variation, Start, BinaryIO] | None:
    """The next run of the plan that needs one, was not tried before, and is nobody else's."""
    for variation, start in to_come(plan, path):
        if (variation.source_sha256, start) not in tried and (file := claim(variation, start)):
            if (variation, start) in to_come(plan, path):  # nobody has ended it meanwhile
                return variation, start, file
            file.close()
    return None


def to_come(plan: Plan, path: str) -> list[tuple[Variation, Start]]:
    """First all variations of the first start: pairs are complete early."""
    ends = desk.by_start(ledger_of(path).runs)
    return [(variation, start) for start in plan.starts for variation in plan.variations
            if not over(ends[variation.source_sha256][start])]


def steps_of(runs: list[tuple[Variation, Start]]) -> int:
    return sum(variation.last_step - first_step(start) for variation, start in runs)


def train(trainer: list[str], variation: Variation, start: Start, every: int, file: BinaryIO, signals: Signals,
          reached: Callable[[int, str], None]) -> Run | None:
    """Start a run, or go on with it, and wait for its end. `reached` gets the step and the losses of each validation.
    None where the run was told to stop before its end."""
    folder = Path(named_log(file) or "logs/none").with_suffix(".checkpoint")
    if (folder / "manifest.json").is_file():
        words = ["--resume", str(folder)]
    else:
        file.truncate(0)
        words = [*origin(start), *variation.overrides, *(["--checkpoint-every", str(every)] if every else [])]
    began = time.time()
    child = subprocess.Popen([*trainer, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file,
                             text=True, errors="replace", env=environment(), **APART)
    signals.child = child
    if signals.stop:  # since before there was a child
        child.terminate()
    for line in child.stdout:
        if found := re.match(r"step:(\d+)/\d+ (.*?) train_time:", line):
            name_log(file, variation, start, began)
            reached(int(found[1]), found[2])
    code = child.wait()
    signals.child = None
    name_log(file, variation, start, began)
    run = ended(variation, start, named_log(file), code, content(file), time.time() - began)
    return None if signals.stop and run.status == CRASHED else run


def origin(start: Start) -> list[str]:
    """The words of train_gpt.py for it."""
    return ["--fork-from", start[1].partition(" of ")[2]] if start[1] else ["--seed", str(start[0])]


def own_signals():
    """In a new process: Ctrl-C comes from the sweep alone (APART), and so does SIGTERM, from Linux where the sweep is
    gone, whatever ended it. Until the trainer has something to save, SIGUSR1 is nothing."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


APART = dict(start_new_session=True, preexec_fn=own_signals)


def name_log(file: BinaryIO, variation: Variation, start: Start, began: float):
    """Write down which of the logs that have changed since is the run's, once there is one."""
    if named_log(file):
        return
    for path in Path("logs").glob("*.txt"):
        if path.stat().st_mtime >= began - 1:  # the clock of a file system may be coarse
            parts = path.read_text(encoding="utf-8", errors="replace").split("=" * 100 + "\n", 2)
            partial = f"\npartial: forked from {start[1]}, seed {start[0]}" if start[1] else ""
            if (len(parts) == 3 and f"\nsource_sha256: {variation.source_sha256}\n" in parts[1] and partial in parts[1]
                    and parts[2].startswith(f"seed: {start[0]}\n")):
                file.write(f"log: {path}\n".encode())


def ended(variation: Variation, start: Start, log: str, code: int, said: str, seconds: float) -> Run:
    """The line of the ledger. What ended a crashed run stands last in what it said."""
    trial = Trial()
    words = [line for line in said.splitlines() if line.strip() and not line.startswith("log: ")]
    why = re.sub(r"^(train_gpt.py|run.sh): ", "", words[-1]) if words else f"exit code {code} without a word"
    try:
        *_, trial = read(log).trials if log else [trial]
    except ValueError as error:  # a log that the desk does not read
        why = str(error)
    loss = last_loss(log, variation.metric, trial)
    status, why = ((FAILED, trial.failed) if trial.failed else
                   (FINISHED, "") if trial.last_step == variation.last_step and loss is not None else (CRASHED, why))
    return Run(variation.name, variation.overrides, variation.source_sha256, variation.metric, *start, status, why, log,
               trial.last_step, loss if status == FINISHED else None, trial.device if log else "", trial.world,
               round(seconds, 1), now())


def last_loss(log: str, metric: str, trial: Trial) -> float | None:
    """At the last step: with all digits, as the log's sidecar has it; None where it is not finite, or not there."""
    loss = trial.losses.get(trial.last_step, inf)
    with contextlib.suppress(OSError, ValueError):
        for line in Path(log).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("step") == trial.last_step and metric in record:
                loss = record[metric]
    return loss if isfinite(loss) else None


def sweep(plan: Plan, path: str, trainer: list[str], every: int) -> int:
    """Run what the plan asks for and the ledger lacks, then show the table. The exit code is 0 where every run has
    ended as its losses have it."""
    signals, tried, stopped = Signals(), set(), ""
    shown = "{desc} {percentage:3.0f}%|{bar:10}| {n}/{total} steps{postfix} [{elapsed}<{remaining}]"
    with Bar(total=steps_of(to_come(plan, path)), leave=False, disable=None, smoothing=0, bar_format=shown) as bar:
        while not signals.stop and not stopped and (taken := take(plan, path, tried)):
            variation, start, file = taken
            tried.add((variation.source_sha256, start))
            left = to_come(plan, path)
            before, bar.total = bar.n, bar.n + steps_of(left)
            bar.set_description_str(f"{variation.name} {said_of(start)}, {count(len(left), 'run')} to come")

            def reached(step: int, losses: str):
                bar.set_postfix_str(losses, refresh=False)
                bar.update(before + step - first_step(start) - bar.n)
                bar.refresh()  # validations are rare

            with file:
                run = train(trainer, variation, start, every, file, signals, reached)
                if run:
                    append(path, run)
                    if run.status == FINISHED and run.log:
                        shutil.rmtree(Path(run.log).with_suffix(".checkpoint"), ignore_errors=True)
            if run:
                bar.write(line_of(run))
                if run.status == CRASHED:
                    bar.write(f"  all that it said: {file.name}")
                    if variation == plan.variations[0]:
                        stopped = "the first variation has crashed, and the others are compared with it"
    print(desk.text(desk.sweep(ledger_of(path))))
    left = {(variation.source_sha256, start) for variation, start in to_come(plan, path)}
    if left:
        why = ("stopped" if signals.stop else stopped or (
            f"another sweep, which lives, has {count(len(left - tried), 'run')}" if left - tried else
            f"{count(len(left), 'run')} crashed"))
        print(f"sweep: {why}; the same command goes on", file=sys.stderr)
    return int(bool(left))


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def said_of(start: Start) -> str:
    return f"seed {start[0]}" + f", {start[1]}" * bool(start[1])


def line_of(run: Run) -> str:
    end = f"{run.metric} {run.loss:.5f}" if run.status == FINISHED else f"{run.status}: {run.why}"
    return ", ".join(filter(None, [f"{run.name} {said_of(run.start)}: {end}", f"step {run.step}",
                                   f"{run.seconds:.0f} s", run.log]))


########################################
#          From words to an end        #
########################################

def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run.sh sweep", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="FILE | NAME=VALUE | STAGE.KNOB=VALUE | @RECIPE")
    parser.add_argument("--seeds", type=int, metavar="K",
                        help=f"pairs of each variation (default {SEEDS}, or those of the ledger, which more are added "
                             "to); every table that they are added to costs certainty: choose before")
    parser.add_argument("--seed", type=int, metavar="S", help="the first of them (default 0)")
    parser.add_argument("--fork-from", action="append", default=[], metavar="CHECKPOINT",
                        help="begin there; several times: one checkpoint for each of some seeds, at one step")
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="steps; lets a run go on")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and stop")
    parser.add_argument("--fineweb-shards", action="store_true", help="say what downloads those of all, and stop")
    parser.add_argument("--nproc_per_node", type=int, default=1, metavar="N", help="GPUs; run.sh counts them")
    parser.error = complain
    options = parser.parse_intermixed_args(words)
    files = [word for word in options.words if "=" not in word and not word.startswith("@")]
    if len(files) != 1:
        complain(f"{len(files)} files of variations ({' '.join(files)}): give one" if files else
                 "no file of variations: write one with a line `NAME: OVERRIDES` for each, and give its name")
    options.file, options.words = files[0], [word for word in options.words if word != files[0]]
    if options.fork_from and (options.seeds, options.seed) != (None, None):
        complain("--fork-from: a fork has its checkpoint's seed, and every checkpoint is one pair; leave --seeds out")
    if options.seeds is not None and options.seeds < 1 or (options.seed or 0) < 0 or options.checkpoint_every < 0:
        complain("--seeds is at least 1, --seed and --checkpoint-every are not negative")
    return options


def complain(message):
    if isinstance(message, OSError):
        message = f"{message.filename or 'a file'}: {(message.strerror or str(message)).lower()}"
    sys.exit(f"sweep: {message}")


def main(words: list[str]) -> int:
    options = parse(words)
    path = f"{options.file}.jsonl"
    try:
        lines, ledger = read_variations(Path(options.file)), ledger_of(path)
        answer = ask(options, lines)
        if options.fineweb_shards:
            print(answer["download"])
            return 0
        plan = plan_of(options, answer, ledger.plans)
    except (OSError, ValueError) as error:
        complain(error)
    if ledger.runs and not {v.source_sha256 for v in plan.variations} & {run.source_sha256 for run in ledger.runs}:
        print(f"sweep: warning: {path} has no run of these programs: the words after {options.file} were others, or "
              "the code was", file=sys.stderr)
    left = to_come(plan, path)
    print(f"{count(len(plan.variations), 'variation')} x {count(len(plan.starts), 'start')}, "
          f"{count(len(left), 'run')} to come; ledger {path}")
    if left:
        first = plan.variations[0].overrides
        if subprocess.call([sys.executable, "-m", "harness.doctor", "--", *origin(plan.starts[0]), *first],
                           **APART, env=environment() | {"WORLD_SIZE": str(options.nproc_per_node)}):
            return 1
    if options.dry_run:
        return 0
    trainer = [sys.executable, "-c", TRAIN, "--standalone", f"--nproc_per_node={options.nproc_per_node}",
               str(ROOT / "train_gpt.py")]
    try:
        if not ledger.plans or replace(plan, time="") != replace(ledger.plans[-1], time=""):
            append(path, plan)
        return sweep(plan, path, trainer, options.checkpoint_every)
    except (OSError, ValueError) as error:  # a full disk, a ledger that somebody has edited; the run ends with this
        complain(error)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before there is a run to end, Ctrl-C ends without a traceback
    sys.exit(main(sys.argv[1:]))
