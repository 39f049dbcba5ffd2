"""A log: the program that ran, a line of `=`, facts, that line again, then one curve a trial.

Reads this project's logs and upstream's (track 3).
"""

import glob
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path

from records.program import parse

SEPARATOR = re.compile(rb"^={50,}\r?$\n?", re.MULTILINE)
# The next `name:`, which must follow a loss, rejects one whose digits are cut off or apart; a second `step:`, one that
# belongs to another line.
LINE = r"""^(?: (?:Using\ )?seed[:=]\ ?(?P<seed>\d+)$
    | failed:\ (?P<failed>.+)
    | (?P<resumed>resumed:)\ step\ \d+,\ world_size\ \d+(?:,\ micro_batch\ \d+)?(?:,\ on\ (?P<on>.+),\ PyTorch\ .*)?$
    | step:(?P<step>\d+)/(?P<train_steps>\d+)\ (?!.*step:)(?:.*\ )?
      METRIC:(?P<loss>-?(?:nan|inf|\d+(?:\.\d+)?))(?=\ +\w+:)
      (?:.*\ train_time:(?P<time>\d+(?:\.\d+)?)(?P<unit>ms|s)\b)? )"""
LOG_BYTES = 2**24  # at most; a hundred runs of a published program, validated every five steps, are a tenth of that
NOT_NAMED = "a device that the log does not name"
MACHINE = re.compile(r"^Running .* on (?P<device>.+?) +with world_size (?P<world>\d+)", re.MULTILINE)


@dataclass
class Trial:
    """One run of the program from step 0."""

    name: str = ""  # the log's path, and which of its trials where it has several
    seed: int | None = None  # None where the log does not tell
    losses: dict[int, float] = field(default_factory=dict)  # step -> validation loss
    train_steps: int = 0  # length of the schedule
    train_time: float | None = None  # seconds, at the last evaluation
    failed: str | None = None  # the reason that the program gave
    device: str = NOT_NAMED
    world: int = 0  # processes; 0 where the log does not tell
    places: list[str | None] = field(default_factory=lambda: [None])  # devices as it went on; None: the head's

    @property
    def last_step(self) -> int:
        return max(self.losses, default=0)

    @property
    def complete(self) -> bool:
        """Whether it was evaluated at the end of its schedule."""
        return self.last_step == self.train_steps > 0

    @property
    def diverged(self) -> bool:
        """Whether its losses are why it ended: a result of the recipe, not an accident."""
        said = (self.failed or "").startswith(("the validation loss", "the gradient of"))
        return said or not all(map(isfinite, self.losses.values()))

    @property
    def fault(self) -> str | None:
        """Why its losses cannot be used, or None."""
        if self.failed:
            return f"failed: {self.failed}"
        bad = [step for step, loss in self.losses.items() if not isfinite(loss)]
        return f"val_loss is {self.losses[bad[0]]} at step {bad[0]}" if bad else None


@dataclass
class Log:
    path: str
    source: bytes  # byte for byte, so that its hash is that of the program that ran
    facts: dict[str, list[str]]  # some names recur, one line a shard
    trials: list[Trial]


def read(path: Path | str, metric: str = "val_loss") -> Log:
    """The log at `path`, with the validation losses called `metric`; ValueError says why a file is none."""
    return interpret(str(path), read_bytes(path), metric)


def read_bytes(path: Path | str) -> bytes:
    """A file's content; ValueError, and no memory taken, where it is larger than any log."""
    with open(path, "rb") as file:
        content = file.read(LOG_BYTES + 1)
    if len(content) > LOG_BYTES:
        raise ValueError(f"{path} is no log: it is larger than {LOG_BYTES >> 20} MiB")
    return content


def interpret(path: str, content: bytes, metric: str = "val_loss") -> Log:
    source, *rest = SEPARATOR.split(content, maxsplit=2)
    if not rest:
        raise ValueError(f"{path} is no log: it has no line of =")
    try:
        parse(source)
    except ValueError as error:
        raise ValueError(f"{path} is no log: no program before its line of = ({error})") from None
    # A program that died between the two lines of = leaves one.
    *facts, body = (part.decode(errors="replace").replace("\r\n", "\n") for part in rest)
    header = "".join(facts)
    trials = read_trials(path, body, metric)
    if machine := MACHINE.search(header):
        for trial in trials:
            trial.world = int(machine["world"])
            trial.places = list(dict.fromkeys(place or machine["device"] for place in trial.places))
            trial.device = " and then ".join(trial.places)
    return Log(path, source, read_facts(header), trials)


def read_facts(text: str) -> dict[str, list[str]]:
    facts = {}
    for line in text.splitlines():
        name, colon, value = line.partition(": ")
        if colon:
            facts.setdefault(name, []).append(value)
    return facts


@cache
def line_pattern(metric: str) -> re.Pattern:
    return re.compile(LINE.replace("METRIC", re.escape(metric)), re.MULTILINE | re.VERBOSE)


def read_trials(path: str, body: str, metric: str) -> list[Trial]:
    """The trials of a log's last part: at least one, without losses where it died before any."""
    trials = [Trial()]
    for line in line_pattern(metric).finditer(body):
        trial, step = trials[-1], int(line["step"] or 0)
        last = next(reversed(trial.losses), -1)  # steps rise within a trial
        if line["step"] and step == last and float(line["loss"]) == trial.losses[step]:
            continue  # one line printed twice
        # Upstream tells trials apart by nothing but a step that falls back.
        restarts = line["step"] and step <= last
        if trial != Trial() and (line["seed"] or restarts):
            trials.append(trial := Trial(places=trial.places[-1:]))
        if line["seed"]:
            trial.seed = int(line["seed"])
        elif line["resumed"]:
            trial.places.append(line["on"])
        elif line["failed"]:
            trial.failed = line["failed"]
        else:
            trial.losses[step] = float(line["loss"])
            trial.train_steps = int(line["train_steps"])
            if line["time"]:
                trial.train_time = float(line["time"]) / (1000 if line["unit"] == "ms" else 1)
    for k, trial in enumerate(trials, 1):
        trial.name = path if len(trials) == 1 else f"{path} trial {k}"
    return trials


def expand(names: list[str]) -> list[Path]:
    """The files that `names` mean: files, globs, and folders with every .txt below them."""
    paths = []
    for name in names:
        found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not found:
            raise ValueError(f"{name}: no such file or folder")
        for path in map(Path, found):
            paths += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    return list(dict.fromkeys(paths))


def load(names: list[str], metric: str = "val_loss") -> list[Log]:
    """The logs that `names` mean, every curve once; stderr names what is left out.

    ValueError where no log is left.
    """
    logs, skipped = [], []
    for path in expand(names):
        try:
            logs.append(read(path, metric))
        except ValueError as error:
            skipped.append(str(error))
        except OSError as error:  # a folder or a dangling link of that name, somebody else's file
            skipped.append(f"{path}: {error.strerror}")
    if not logs:
        others = f" (nor are {len(skipped) - 1} other files)" if len(skipped) > 1 else ""
        raise ValueError(skipped[0] + others if skipped else f"no .txt in {' '.join(names)}")
    for reason in skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    drop_repeats(logs)
    return logs


def drop_repeats(logs: list[Log]) -> None:
    """Keep every curve once: a copied log, or a seed run twice, is not more evidence."""
    first: dict[str, Trial] = {}
    for log in logs:
        for trial in list(log.trials):
            # Step 0 is alike in all runs, and one loss of five digits may repeat by chance.
            if len(trial.losses) < 3:
                continue
            original = first.setdefault(str(trial.losses), trial)
            if original is not trial:
                log.trials.remove(trial)
                print(f"dropped: {trial.name} repeats {original.name}", file=sys.stderr)
