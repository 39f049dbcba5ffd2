"""The tests that the desk applies to validation losses: official ones of the optimization track, and Student's.

Losses are in nats a token. Runs are independent and normal; their deviation is measured, save where a rule fixes it.
The rules are those of github.com/KellerJordan/modded-nanogpt, records/track_3_optimization.
"""

from collections.abc import Callable
from functools import cache
from math import atan, ceil, cos, erfc, exp, fsum, inf, lgamma, pi, sqrt
from typing import NamedTuple

# Upstream's rule 3, (3.28 - mean) * sqrt(n) >= 0.004, is a one-sided z-test at p < .001: it takes
# the deviation between runs to be 0.0013 and asks for 3.09 of them.
THRESHOLD = 0.004
ASSUMED_SD = 0.0013
# Nats per 100 steps of a re-scheduled run: result #12, 200 steps shorter, went from 3.2790 to 3.2881 (its README).
SCHEDULE_RATE = 0.0045
# The deviation of the final loss between runs of one recipe of the track: 42 recipes pooled, 478 degrees of freedom.
NOISE = 0.00111
# 3.28 - 3.278 is a hair less than 0.002 in binary; four such runs pass, as they do on paper.
ROUNDING = 1e-9


def normal_cdf(z: float) -> float:
    return erfc(-z / sqrt(2)) / 2


@cache
def t_cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's t, to 1e-6; df = inf is the normal distribution.

    With t = sqrt(df) tan(a) the density is cos(a)^(df-1), times a constant: Simpson's rule on 400 intervals of a.
    """
    if df > 1000:  # from here the two differ by less than 2e-4, and the rule would need more intervals
        return normal_cdf(t)
    step = atan(t / sqrt(df)) / 400
    weights = [1, *[4, 2] * 199, 4, 1]
    area = step / 3 * fsum(w * cos(k * step) ** (df - 1) for k, w in enumerate(weights))
    return 0.5 + area * t_constant(df)


def t_density(t: float, df: float) -> float:
    if df > 1000:
        return exp(-t * t / 2) / sqrt(2 * pi)
    return t_constant(df) / sqrt(df) * (1 + t * t / df) ** (-(df + 1) / 2)


def t_constant(df: float) -> float:
    return exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(pi)


@cache
def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p >= 0.5. Newton's method from 0: the distribution is concave there, so that it comes
    up to the root from below."""
    t, step = 0.0, 1.0
    while step > 1e-9 * (1 + t):
        step = (p - t_cdf(t, df)) / t_density(t, df)
        t += step
    return t


class Moments(NamedTuple):
    """What n losses at one step come to."""

    n: int
    mean: float
    sd: float | None  # of the sample; None for one run

    @classmethod
    def of(cls, losses: list[float]) -> "Moments":
        n, mean = len(losses), fsum(losses) / len(losses)
        return cls(n, mean, sqrt(fsum((loss - mean) ** 2 for loss in losses) / (n - 1)) if n > 1 else None)


class Judgement(NamedTuple):
    """What the rule says of n runs at one step."""

    n: int
    mean: float
    sd: float | None
    statistic: float  # (target - mean) * sqrt(n)
    z: float  # the statistic in units of the deviation that the rule assumes
    p: float  # of runs as low as these where the true mean is the target
    passes: bool
    runs_needed: int | None  # at this mean; None where it is not below the target


def judge(at: Moments, target: float) -> Judgement:
    """Apply the official rule to runs at one step."""
    margin = target - at.mean
    statistic = margin * sqrt(at.n)
    return Judgement(
        *at,
        statistic=statistic,
        z=statistic / ASSUMED_SD,
        p=normal_cdf(-statistic / ASSUMED_SD),
        passes=statistic >= THRESHOLD * (1 - ROUNDING),
        runs_needed=ceil((THRESHOLD / margin) ** 2 * (1 - ROUNDING)) if margin > 0 else None,
    )


class Claim(NamedTuple):
    """A result: the mean of n runs at the step that is claimed."""

    step: int
    mean: float
    n: int


class Pairwise(NamedTuple):
    statistic: float
    p: float
    passes: bool


def pairwise(new: Claim, old: Claim) -> Pairwise:
    """Upstream's rule for one result against another, whose schedules may differ in length:

        (mean_old - mean_new + 0.0045 (step_old - step_new) / 100) / sqrt(1/n_old + 1/n_new) >= 0.004
    """
    gain = old.mean - new.mean + SCHEDULE_RATE * (old.step - new.step) / 100
    statistic = gain / sqrt(1 / old.n + 1 / new.n)
    return Pairwise(statistic, normal_cdf(-statistic / ASSUMED_SD), statistic >= THRESHOLD * (1 - ROUNDING))


class Difference(NamedTuple):
    """An estimated difference with its standard error, on df degrees of freedom."""

    value: float
    error: float
    df: float

    @property
    def p(self) -> float:
        """Two-sided, of the hypothesis that there is none."""
        if not self.error:
            return float(self.value == 0)
        return max(0.0, 2 * t_cdf(-abs(self.value) / self.error, self.df))

    def half_width(self, confidence: float = 0.95) -> float:
        return t_quantile((1 + confidence) / 2, self.df) * self.error


def welch(a: Moments, b: Moments) -> Difference | None:
    """mean(a) - mean(b), deviations not taken to be equal (Welch 1947); None where one of them has one run."""
    if a.sd is None or b.sd is None:
        return None
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    df = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1)) if va + vb else inf
    return Difference(a.mean - b.mean, sqrt(va + vb), df)


def pooled(a: Moments, b: Moments) -> Difference:
    """mean(a) - mean(b) for equal deviations, so that one run alone can be compared with several.

    ValueError where neither has two runs.
    """
    df = a.n + b.n - 2
    if not df:
        raise ValueError("one run against one: their spread is not known")
    squares = sum((m.n - 1) * m.sd**2 for m in (a, b) if m.n > 1)
    return Difference(a.mean - b.mean, sqrt(squares / df * (1 / a.n + 1 / b.n)), df)


def paired(a: list[float], b: list[float]) -> Difference:
    """mean(a - b) over two or more pairs of runs that share a seed."""
    n, mean, sd = Moments.of([x - y for x, y in zip(a, b)])
    return Difference(mean, sd / sqrt(n), n - 1)


def holm(ps: list[float], family: int) -> list[float]:
    """p-values adjusted for how many hypotheses were looked at (Holm 1979), of which `ps` may be a part: where those of
    at most a are rejected, a true one is among them in at most a of cases, however they depend on each other."""
    adjusted, largest = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = adjusted[i] = max(largest, min(1.0, (family - rank) * ps[i]))
    return adjusted


def crossing(curve: dict[int, float], target: float) -> float | None:
    """The step at which a curve first comes down to the target, linear between evaluations; None where it does not.

    Descriptive: a claimed step must have been evaluated.
    """
    last = None
    for step, loss in sorted(curve.items()):
        if loss <= target:
            if last is None:
                return float(step)
            before, above = last
            return before + (step - before) * (above - target) / (above - loss)
        last = step, loss
    return None


class Crossing(NamedTuple):
    """Where the mean curve meets the target, with a 95% interval; None: beyond the last evaluated step."""

    low: float | None
    step: float | None
    high: float | None


def mean_crossing(moments: dict[int, Moments], target: float) -> Crossing:
    """The interval holds every step at which a t-test does not tell the mean from the target: it is bounded by the
    crossings of mean -+ t(.975, n - 1) sd / sqrt(n). Runs that never cross bias it not at all. With one run the
    ends are None."""
    step = crossing({s: m.mean for s, m in moments.items()}, target)
    half = {s: t_quantile(0.975, m.n - 1) * m.sd / sqrt(m.n) for s, m in moments.items() if m.sd is not None}
    return Crossing(crossing({s: moments[s].mean - half[s] for s in half}, target), step,
                    crossing({s: moments[s].mean + half[s] for s in half}, target))


def smallest(condition: Callable[[int], bool], limit: int = 1000) -> int | None:
    """The smallest whole number from 1 to the limit at which a condition holds."""
    return next((n for n in range(1, limit + 1) if condition(n)), None)
