"""Is it a record? The official rule of the optimization track, for one evaluated step."""

from math import ceil, sqrt
from statistics import mean, stdev
from typing import NamedTuple

# Upstream's rule 3, (3.28 - mean) * sqrt(n) >= 0.004, is a one-sided z-test at p < .001: it takes
# the deviation between runs to be 0.0013 and asks for 3.09 of them.
THRESHOLD = 0.004
# 3.28 - 3.278 is a hair less than 0.002 in binary; four such runs pass, as they do on paper.
ROUNDING = 1e-9


class Judgement(NamedTuple):
    """What the rule says of n runs at one step; losses in nats a token."""

    n: int
    mean: float
    sd: float | None  # of the sample; None for one run
    statistic: float
    passes: bool
    runs_needed: int | None  # at this mean; None where it is not below the target


def judge(losses: list[float], target: float) -> Judgement:
    """Apply the rule to the validation losses of at least one run, all taken at the same step."""
    n, average = len(losses), mean(losses)
    margin = target - average
    statistic = margin * sqrt(n)
    return Judgement(
        n=n,
        mean=average,
        sd=stdev(losses) if n > 1 else None,
        statistic=statistic,
        passes=statistic >= THRESHOLD * (1 - ROUNDING),
        runs_needed=ceil((THRESHOLD / margin) ** 2 * (1 - ROUNDING)) if margin > 0 else None,
    )
