"""The published figures of the optimization track: records/published/README.md says what they are and where from."""

import csv
from functools import cache
from math import sqrt
from pathlib import Path
from typing import NamedTuple

from records.statistics import Moments, t_quantile

FOLDER = Path(__file__).resolve().parent / "published"
METRICS = {46: "val_ema_loss"}  # what a result claims; the others claim val_loss, and #45 prints its blend as that


class Result(NamedTuple):
    """A row of upstream's table."""

    record: int
    step: int  # claimed: at which the mean passes
    mean: float  # validation loss there, to 4 digits
    n: int
    world_record: bool  # when it was accepted
    date: str
    pull_request: str
    summary: str


def rows(name: str) -> list[dict[str, str]]:
    with open(FOLDER / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def results() -> dict[int, Result]:
    return {
        int(row["record"]): Result(int(row["record"]), int(row["steps_to_3.28"]), float(row["mean_val_loss"]),
                                   int(row["n"]), row["world_record"] == "1", row["date"], row["pull_request"],
                                   row["summary"])
        for row in rows("track3_records.csv")
    }


def result(record: int) -> Result:
    if record not in results():
        raise ValueError(f"there is no published result {record}: they are 1 to {max(results())}")
    return results()[record]


def moments(record: int) -> tuple[int, dict[int, Moments]]:
    """Length of the schedule, and n, mean and deviation by step.

    Of #19 and #23, which publish two configurations, the one with the claimed number of runs at the claimed step.
    """
    found: dict[int, dict[int, Moments]] = {}
    for row in rows("track3_curves.csv"):
        if row["record"] == str(record):
            sd = float(row["std"]) if row["std"] else None
            found.setdefault(int(row["train_steps"]), {})[int(row["step"])] = Moments(
                int(row["n"]), float(row["mean"]), sd)
    claim = result(record)
    if not found:  # #46
        runs = curves(record).values()
        steps = sorted({step for run in runs for step in run})
        return steps[-1], {step: Moments.of([run[step] for run in runs if step in run]) for step in steps}
    return min(found.items(), key=lambda item: abs(item[1].get(claim.step, Moments(0, 0, None)).n - claim.n))


def curves(record: int, metric: str | None = None) -> dict[int, dict[int, float]]:
    """Every run's own curve of the metric, by default the claimed one, where it was published; by the run's place in
    the folder, or its seed."""
    name, metric = f"record_{record:02}_curves.csv", metric or METRICS.get(record, "val_loss")
    runs: dict[int, dict[int, float]] = {}
    if (FOLDER / name).exists():
        for row in rows(name):
            if row.get(metric):
                runs.setdefault(int(row["seed"]), {})[int(row["step"])] = float(row[metric])
    return runs


REFERENCE_RUNS = 8  # at least: of fewer the intervals are too wide to tell anything


def references() -> str:
    """reference.csv: `reference` of every result of which enough runs have their own curve, on the metric that it
    claims, and on val_ema_loss. `train_steps` is the length of its schedule, which some of its runs do not come to the
    end of."""
    lines = ["record,metric,train_steps,step,mean,sd,slope,half_width"]
    for record in results():
        for metric in dict.fromkeys((METRICS.get(record, "val_loss"), "val_ema_loss")):
            runs = list(curves(record, metric).values())
            if len(runs) >= REFERENCE_RUNS:
                lines += [f"{record},{metric},{moments(record)[0]},{row}" for row in reference(runs)]
    return "\n".join(lines) + "\n"


def reference(runs: list[dict[int, float]]) -> list[str]:
    """The rows of what the trainer's progress line holds a run against, from the curves of the runs that came furthest.

    By step: mean and deviation of the loss; the slope with which the final loss follows the loss here (least squares
    over the runs); half of the 95% prediction interval of one run's final loss, t(.975, n-2) s sqrt(1 + 1/n) with the
    residual deviation s. The widening for a loss far from the mean is left out: at 2 deviations it is a tenth.
    """
    runs = [run for run in runs if max(run) == max(map(max, runs))]
    steps = [step for step in sorted(set.intersection(*map(set, runs))) if step]
    finals, n = [run[steps[-1]] for run in runs], len(runs)
    center = Moments.of(finals).mean
    lines = []
    for step in steps:
        losses = [run[step] for run in runs]
        _, mean, sd = Moments.of(losses)
        slope = sum((x - mean) * (y - center) for x, y in zip(losses, finals)) / ((n - 1) * sd**2)
        squares = sum((y - center - slope * (x - mean)) ** 2 for x, y in zip(losses, finals))
        half = t_quantile(0.975, n - 2) * sqrt(squares / (n - 2) * (1 + 1 / n))
        lines.append(f"{step},{mean:.6f},{sd:.6f},{slope:.4f},{half:.6f}")
    return lines
