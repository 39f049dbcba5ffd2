"""The published figures of the optimization track: records/published/README.md says what they are and where from."""

import csv
from functools import cache
from math import sqrt
from pathlib import Path
from typing import NamedTuple

from records.statistics import Moments, t_quantile

FOLDER = Path(__file__).resolve().parent / "published"
METRICS = {46: "val_ema_loss"}  # what a result claims; the others claim val_loss


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


def curves(record: int) -> dict[int, dict[int, float]]:
    """Every run's own curve, where it was published; by its place in the folder, or its seed."""
    name = f"record_{record:02}_curves.csv"
    runs: dict[int, dict[int, float]] = {}
    if (FOLDER / name).exists():
        for row in rows(name):
            runs.setdefault(int(row["seed"]), {})[int(row["step"])] = float(row[METRICS.get(record, "val_loss")])
    return runs


def reference(runs: list[dict[int, float]]) -> str:
    """CSV of what the trainer's progress line holds a run against, made from the curves of n runs; reference_17.csv
    is that of #17's 20.

    By step: mean and deviation of the loss; the slope with which the final loss follows the loss here (least squares
    over the runs); half of the 95% prediction interval of one run's final loss, t(.975, n-2) s sqrt(1 + 1/n) with the
    residual deviation s. The widening for a loss far from the mean is left out: at 2 deviations it is a tenth.
    """
    steps = [step for step in sorted(set.intersection(*map(set, runs))) if step]
    finals, n = [run[steps[-1]] for run in runs], len(runs)
    center = Moments.of(finals).mean
    lines = ["step,mean,sd,slope,half_width"]
    for step in steps:
        losses = [run[step] for run in runs]
        _, mean, sd = Moments.of(losses)
        slope = sum((x - mean) * (y - center) for x, y in zip(losses, finals)) / ((n - 1) * sd**2)
        squares = sum((y - center - slope * (x - mean)) ** 2 for x, y in zip(losses, finals))
        half = t_quantile(0.975, n - 2) * sqrt(squares / (n - 2) * (1 + 1 / n))
        lines.append(f"{step},{mean:.6f},{sd:.6f},{slope:.4f},{half:.6f}")
    return "\n".join(lines) + "\n"
