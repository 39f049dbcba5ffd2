"""A log: the program that ran, a line of `=`, facts, that line again, then one curve a trial.

Reads this project's logs and upstream's: of track 3, and of the other tracks for their curves.
"""

import glob
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path

from records.program import SOURCE_BYTES, claimed_metric, parse

SEPARATOR = re.compile(rb"^={50,}\r?$\n?", re.MULTILINE)
# The next `name:`, which must follow a loss, rejects one whose digits are cut off or apart; a second `step:` (but not
# result #42's `ref_step:`), one that belongs to another line.
LINE = r"""^(?: (?:Using\ |trial:\d+/\d+\ )?seed[:=]\ ?(?P<seed>\d+)$
    | failed:\ (?P<failed>.+)
    | (?P<resumed>resumed:)\ step\ \d+,\ world_size\ \d+(?:,\ micro_batch\ \d+)?(?:,\ on\ (?P<on>.+),\ PyTorch\ .*)?$
    | step:(?P<step>\d+)/(?P<train_steps>\d+)\ (?!.*(?:(?<!_)step:|step:\d+/))(?:.*\ )?
      METRIC:(?P<loss>-?(?:nan|inf|\d+(?:\.\d+)?))(?=\ +\w+:)
      (?:.*\ train_time:(?P<time>\d+(?:\.\d+)?)(?P<unit>ms|s)\b)? )"""
LOG_BYTES = 2**24  # at most; a hundred runs of a published program, validated every five steps, are a tenth of that
NOT_NAMED = "a device that the log does not name"
# Upstream's two forms, the first of which is ours; the other tracks have a table, which does not tell the world.
MACHINE = re.compile(r"^Running (?:.* )?on (?:device_name=)?(?P<device>\S.*?) +with world_size[ =](?P<world>\d+)",
                     re.MULTILINE)
TABLE = re.compile(r"^(?:\| +)?\d+ +(?P<device>(?:NVIDIA|Tesla|GeForce)\b.*?) {2,}", re.MULTILINE)


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
    def short_device(self) -> str:
        """`8xH100` of 8 processes on "NVIDIA H100 80GB HBM3"; nothing where the log does not name it."""
        if self.device == NOT_NAMED:
            return ""
        name = re.match(r"(?:RTX )?[^\s-]*", re.sub("NVIDIA |GeForce |Tesla ", "", self.device))[0]
        return f"{self.world}x" * (self.world > 0 and name not in ("", "CPU")) + name

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
    unread: list[str] = field(default_factory=list)  # lines with a step and a loss that cannot be told
    metric: str = "val_loss"  # which of the losses in its lines was read
    lacking: bool = False  # whether its lines have a val_loss, and none has that


def read(path: Path | str, metric: str | None = None) -> Log:
    """The log at `path`, with the validation losses called `metric`, or else with those that its program claims;
    ValueError says why a file is none."""
    return interpret(str(path), read_bytes(path), metric)


def read_bytes(path: Path | str) -> bytes:
    """A file's content; ValueError, and no memory taken, where it is larger than any log."""
    with open(path, "rb") as file:
        content = file.read(LOG_BYTES + 1)
    if len(content) > LOG_BYTES:
        raise ValueError(f"{path} is no log: it is larger than {LOG_BYTES >> 20} MiB")
    return content


def interpret(path: str, content: bytes, metric: str | None = None) -> Log:
    source, *rest = SEPARATOR.split(content, maxsplit=2)
    if rest and not source.strip():  # the oldest of track 1 begin with the line
        source, *rest = SEPARATOR.split(content, maxsplit=3)[1:]
    if not rest:
        raise ValueError(f"{path} is no log: it has no line of =")
    source, after = split_program(path, source)
    # A program that died between the two lines of = leaves one.
    *facts, body = (part.decode(errors="replace").replace("\r\n", "\n") for part in rest)
    header = after.decode(errors="replace") + "".join(facts)
    try:
        metric = metric or claimed_metric(source)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    trials, unread = read_trials(path, body, metric)
    lacking = not any(trial.losses for trial in trials) and any(
        line["step"] for line in line_pattern("val_loss").finditer(body))
    if machine := MACHINE.search(header) or MACHINE.search(body) or TABLE.search(header) or TABLE.search(body):
        for trial in trials:
            trial.world = int(machine.groupdict().get("world", 0))
            trial.places = list(dict.fromkeys(place or machine["device"] for place in trial.places))
            trial.device = " and then ".join(trial.places)
    return Log(path, source, read_facts(header), trials, unread, metric, lacking)


def split_program(path: str, head: bytes) -> tuple[bytes, bytes]:
    """The program, and the line after it where there is one that is none of its own: result #16's log has a path."""
    try:
        parse(head)
        return head, b""
    except ValueError as error:
        reason = error
    program, newline, line = head.rstrip().rpartition(b"\n")
    try:
        if line[:1].isspace() or len(head) > SOURCE_BYTES:  # a statement that is cut off
            raise ValueError
        parse(program + newline)
        return program + newline, head[len(program + newline):]
    except ValueError:
        raise ValueError(f"{path} is no log: no program before its line of = ({reason})") from None


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


def read_trials(path: str, body: str, metric: str) -> tuple[list[Trial], list[str]]:
    """The trials of a log's last part: at least one, without losses where it died before any; and the lines whose loss
    cannot be told."""
    trials, losses = [Trial()], 0
    for line in line_pattern(metric).finditer(body):
        losses += line["step"] is not None
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
    return trials, unread(body, metric) if body.count(f" {metric}:") > losses else []


def unread(body: str, metric: str) -> list[str]:
    """The lines with a step and this loss from which `LINE` takes none: it is cut off, or two lines became one."""
    known, said = line_pattern(metric), re.compile(rf"step:\d+/\d+ (?:.* )?{re.escape(metric)}:")
    return [line for line in body.splitlines() if said.search(line) and not known.match(line)]


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


def load(names: list[str], metric: str | None = None) -> list[Log]:
    """The logs that `names` mean, every curve once, of `metric` or of what their programs claim; stderr names what is
    left out.

    ValueError where no log is left.
    """
    return load_aloud(names, metric)[0]


def load_aloud(names: list[str], metric: str | None = None) -> tuple[list[Log], list[str]]:
    """What `load` returns, and the lines that it wrote to stderr."""
    logs, left_out = survey(expand(names), metric)
    if not logs:
        others = f" (nor are {len(left_out) - 1} other files)" if len(left_out) > 1 else ""
        nothing = f"no .txt in {' '.join(names)}"
        raise ValueError(left_out[0].removeprefix("skipped: ") + others if left_out else nothing)
    for line in left_out:
        print(line, file=sys.stderr)
    return logs, left_out


def survey(paths: list[Path], metric: str | None = None, read: Callable[..., Log] = read
           ) -> tuple[list[Log], list[str]]:
    """The logs among these files, every curve once; and a line for each file, loss or curve that is left out."""
    logs, left_out = [], []
    for path in paths:
        try:
            log = read(path, metric)
            if log.lacking:
                claimed = ", which its program claims" * (metric is None)
                raise ValueError(f"{path}: no line has a {log.metric}{claimed}; --metric val_loss reads what it has")
            logs.append(log)
        except ValueError as error:
            left_out.append(f"skipped: {error}")
        except OSError as error:  # a folder or a dangling link of that name, somebody else's file
            left_out.append(f"skipped: {path} cannot be read: {error.strerror}")
    for log in logs:
        if log.unread:
            more = f" and {len(log.unread) - 1} more" * (len(log.unread) > 1)
            left_out.append(f"skipped: {log.path}: no whole loss in the line {log.unread[0][:80]!r}{more}")
    return logs, left_out + drop_repeats(logs)


def drop_repeats(logs: list[Log]) -> list[str]:
    """Keep every curve once: a copied log, or a seed run twice, is not more evidence. A line for each that is
    dropped."""
    first: dict[str, Trial] = {}
    dropped = []
    for log in logs:
        for trial in list(log.trials):
            # Step 0 is alike in all runs, and one loss of five digits may repeat by chance.
            if len(trial.losses) < 3:
                continue
            original = first.setdefault(str(trial.losses), trial)
            if original is not trial:
                log.trials.remove(trial)
                dropped.append(f"dropped: {trial.name} repeats {original.name}")
    return dropped


def put(path: Path | str, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, which then takes its place; where that fails, nothing stays."""
    beside = Path(path).with_suffix(f".part{Path(path).suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
