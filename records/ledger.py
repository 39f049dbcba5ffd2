"""The ledger of a sweep: what was planned and how every run ended, a JSON object a line, appended and never changed.

    {"line": "plan", "time": ..., "file": ..., "starts": [[seed, fork], ...], "variations": [{...}, ...]}
    {"line": "run", "name": ..., "seed": ..., "status": ..., ...}

A plan is written before the first of its runs starts, and again where a later command asks for another; the newest is
the one that counts. The first of its variations is the one that the others are compared with. A run belongs to a
variation by `source_sha256`, since a variation that was edited is another one of the same name; two runs are a pair
where `seed` and `fork` are the same.

A run that is still going, or that was told to stop and will be resumed, has no line. One that failed has one, and so
has each attempt that crashed.
"""

import json
import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import NamedTuple, get_args, get_origin, get_type_hints

FINISHED, FAILED, CRASHED = STATUSES = "finished", "failed", "crashed"
Start = tuple[int, str]  # seed and fork of a run


@dataclass(frozen=True)
class Variation:
    name: str  # as the file of variations has it
    overrides: list[str]  # of train_gpt.py, those for all variations included, as typed
    source_sha256: str  # of the program with its values, as the head of its log has it
    metric: str  # which of its losses it claims
    last_step: int  # where it is evaluated for the last time


@dataclass(frozen=True)
class Plan:
    time: str  # UTC, ISO 8601
    file: str  # of variations
    starts: list[Start]  # of the runs of each variation
    variations: list[Variation]


@dataclass(frozen=True)
class Run:
    name: str  # of the variation, as are overrides, source_sha256 and metric
    overrides: list[str]
    source_sha256: str
    metric: str
    seed: int
    fork: str  # "step 2000 of logs/NAME.checkpoint" where the run was forked from it; '' otherwise
    status: str  # finished; failed: its losses or gradients ended it, a result; crashed: anything else ended it
    why: str  # of a failed or crashed run, in one line; '' for a finished one
    log: str  # path from the project's root; '' where the run crashed before it had one
    step: int  # the last one that was evaluated
    loss: float | None  # the metric there; None unless finished
    device: str  # as the head of the log has it; '' without a log
    world: int  # processes; 0 without a log
    seconds: float  # from the start of its processes to their end; of a run that was resumed, of its last part
    time: str  # of its end, UTC, ISO 8601

    @property
    def start(self) -> Start:
        return self.seed, self.fork


class Ledger(NamedTuple):
    path: str
    lines: list[Plan | Run]  # in the order in which they were written

    @property
    def plans(self) -> list[Plan]:
        return [line for line in self.lines if isinstance(line, Plan)]

    @property
    def runs(self) -> list[Run]:
        return [line for line in self.lines if isinstance(line, Run)]


def is_ledger(path: Path) -> bool:
    """Whether a file begins with a plan, as `sweep.append` writes it."""
    try:
        with open(path, "rb") as file:
            return file.read(14) == b'{"line": "plan'
    except OSError:
        return False


def read_ledger(path: Path | str) -> Ledger:
    """ValueError names the file and the line that is none of a ledger. A last line without its end, which a machine
    that lost its power leaves, is a warning."""
    text = Path(path).read_bytes().decode(errors="replace")
    *whole, rest = text.split("\n")
    if rest:
        print(f"skipped: {path}:{len(whole) + 1}: the line is cut off", file=sys.stderr)
    return Ledger(str(path), [interpret(line, f"{path}:{number}") for number, line in enumerate(whole, 1)])


def interpret(line: str, where: str) -> Plan | Run:
    try:
        found = json.loads(line)
        kind = {"plan": Plan, "run": Run}[found["line"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{where}: no line of a ledger: {line[:60]!r}") from None
    try:
        made = build(kind, found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if kind is Plan and not made.variations:
        raise ValueError(f"{where}: a plan has no variation")
    if kind is Run and made.status not in STATUSES:
        raise ValueError(f"{where}: status is {made.status!r}, which is none of {', '.join(STATUSES)}")
    if kind is Run and (made.status == FINISHED) != (made.loss is not None and abs(made.loss) < 1e9):
        raise ValueError(f"{where}: a {made.status} run has the loss {made.loss}")
    return made


def build(kind: type, found, name: str = "the line"):
    """A value of JSON as one of the types above. ValueError where it is another; what a later version has added is left
    out."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(found, dict):
        types = get_type_hints(kind)
        if missing := sorted(types.keys() - found.keys()):
            raise ValueError(f"{name} has no {' and no '.join(missing)}")
        return kind(**{field: build(types[field], found[field], field) for field in types})
    if origin is list and isinstance(found, list):
        return [build(inner[0], value, name) for value in found]
    if origin is tuple and isinstance(found, list) and len(found) == len(inner):
        return tuple(build(each, value, name) for each, value in zip(inner, found))
    if origin not in (list, tuple) and type(found) in (inner or (kind,)):
        return found
    if float in (kind, *inner) and type(found) is int and abs(found) < 2**53:  # 1.0 may be written as 1
        return float(found)
    raise ValueError(f"{name} is {found!r:.60}")
