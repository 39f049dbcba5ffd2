"""`reproduce`: are these runs of the same recipe as a published result?

The official rule does not answer this: a faithful set of four runs of result #17 passes it in 6% of cases. Here the
mean of n new runs is held against the mean of the published ones, at up to five steps from 0.6 of the schedule on (at
earlier steps runs of one recipe spread twice as far and do not yet foretell the end):

- worse or better: at some step the difference is not zero by a two-sided t-test with pooled deviation, at level
  0.01 / (number of steps), so that a faithful set is called different in at most 1% of cases, whatever n.
- consistent: no such step, and at every step the 90% interval of the difference lies inside +-0.004 nats: two one-sided
  tests (Schuirmann 1987), joined by intersection and union, which needs no correction. A recipe that is 0.004 worse is
  called consistent in at most 5% of cases, whatever n.
- cannot tell: neither. More runs narrow the interval.

0.004 nats is what the official rule asks of one run, 3.6 deviations between runs, and 90 steps at the rule's rate of
exchange; it is the narrowest round margin at which one run can speak at all: its 90% interval has a half-width of
0.0020 against 20 published runs, so that a faithful one is called consistent in about nine cases of ten. From n = 4 on
it is the test for a difference that draws the line, and closer: near 0.002 at n = 4, near 0.0012 at n = 20. The levels
hold for one look at the runs.
"""

from math import sqrt

from records.compare import tell
from records.sample import Sample, another
from records.statistics import Difference, Moments, normal_cdf, pooled, smallest, t_quantile

MARGIN = 0.004
DIFFERENT = 0.01
FRACTIONS = (0.6, 0.75, 0.9, 1)  # of the schedule; and the claimed step


def reproduce(new: Sample, old: Sample) -> dict:
    """The verdict with its figures; ValueError where the two cannot be compared."""
    if not new.moments:
        raise ValueError(f"{new.name}: no run can be used")
    if new.metric != old.metric:
        raise ValueError(f"{old.name} claims {old.metric}, {new.name} was read for {new.metric}: --metric {old.metric}")
    if new.train_steps != old.train_steps:
        raise ValueError(f"{new.name} has a schedule of {new.train_steps} steps, {old.name} one of {old.train_steps}: "
                         "compare judges different recipes")
    steps = chosen_steps(new, old)
    differences = {step: pooled(new.moments[step], old.moments[step]) for step in steps}
    verdict = classify(differences)
    step = decisive(differences) if verdict in ("worse", "better") else steps[-1]
    at, reference = new.moments[step], old.moments[step]
    sd = differences[step].error / sqrt(1 / at.n + 1 / reference.n)
    count = len(steps)
    needed = smallest(lambda n: n > at.n and consistent_probability(0, n, reference.n, sd, count) >= 0.95)
    return {
        "verdict": verdict == "consistent" and not new.diverged and not new.foreign,
        "outcome": verdict, "of": old.name, "n": at.n, "published_n": reference.n, "margin": MARGIN,
        "diverged": len(new.diverged), "step": step, "difference": differences[step].value,
        "half_width": differences[step].half_width(), "mixed": new.mixture, "foreign": new.foreign,
        "more_runs": needed - at.n if verdict == "cannot tell" and needed else None,
        "power": {shift: consistent_probability(shift, at.n, reference.n, sd, count) for shift in (0, 0.002, MARGIN)},
        "steps": [describe(step, new.moments[step], old.moments[step], differences[step]) for step in steps],
    }


def chosen_steps(new: Sample, old: Sample) -> list[int]:
    """The evaluated steps nearest to FRACTIONS of the schedule, and the claimed one, of those that both share."""
    shared = [step for step in new.moments if step in old.moments and step >= 0.5 * old.train_steps]
    if not shared:
        raise ValueError(f"{new.name} and {old.name} share no evaluated step in the second half of the schedule")
    wanted = [fraction * old.train_steps for fraction in FRACTIONS]
    nearest = {min(shared, key=lambda step: abs(step - place)) for place in wanted}
    return sorted(nearest | {old.claim().step} & set(shared))


def describe(step: int, new: Moments, old: Moments, difference: Difference) -> dict:
    half = difference.half_width(0.9)
    return {"step": step, "n": new.n, "mean": new.mean, "published": old.mean, "difference": difference.value,
            "low": difference.value - half, "high": difference.value + half, "p": difference.p}


def decisive(differences: dict[int, Difference]) -> int:
    """The step at which the difference is largest in units of its error."""
    return max(differences, key=lambda step: abs(differences[step].value) / (differences[step].error or 1))


def classify(differences: dict[int, Difference]) -> str:
    """worse, better, consistent or cannot tell: see above."""
    found = differences[decisive(differences)]
    if abs(found.value) > found.half_width(1 - DIFFERENT / len(differences)):
        return "worse" if found.value > 0 else "better"
    inside = all(abs(d.value) + d.half_width(0.9) < MARGIN for d in differences.values())
    return "consistent" if inside else "cannot tell"


def consistent_probability(shift: float, n: int, published: int, sd: float, steps: int) -> float:
    """Of n runs whose true mean is `shift` higher and whose true deviation is sd, as if there were one step: late steps
    are correlated by .9 and more, and several say consistent a little less often (87% for 91% at n = 1).

    The estimated deviation is sd, to first order, give or take sd / sqrt(2 df): three points of Gauss and Hermite."""
    error, df = sd * sqrt(1 / n + 1 / published), n + published - 2
    total = 0.0
    for weight, place in ((1 / 6, -sqrt(3)), (2 / 3, 0), (1 / 6, sqrt(3))):
        estimate = error * max(0, 1 + place / sqrt(2 * df))
        bound = min(MARGIN - t_quantile(0.95, df) * estimate, t_quantile(1 - DIFFERENT / steps / 2, df) * estimate)
        total += weight * max(0, normal_cdf((bound - shift) / error) - normal_cdf((-bound - shift) / error))
    return total


def text(result: dict) -> str:
    n, of = result["n"], result["of"]
    lines = [f"{n} run{'s' * (n > 1)} against {of}'s {result['published_n']}",
             "   step    n       mean  published  difference       90% interval        p"]
    for at in result["steps"]:
        lines.append(f"{at['step']:>7}{at['n']:>5}{at['mean']:>11.6f}{at['published']:>11.6f}{at['difference']:>+12.5f}"
                     f"   {at['low']:+.5f} {at['high']:+.5f}{tell(at['p']):>9}")
    same, half, far = result["power"].values()
    lines.append(f"at n={n} a faithful recipe is called consistent in {percent(same)} of cases, "
                 f"one 0.002 worse in {percent(half)}, one {MARGIN} worse in {percent(far)}")
    if result["mixed"]:
        lines.append(f"mixed: {result['mixed']}")
    return "\n".join([*lines, sentence(result)])


def percent(chance: float) -> str:
    """To a digit that the approximation can bear."""
    return "less than 1%" if chance < 0.01 else "more than 99%" if chance > 0.99 else f"about {chance:.0%}"


def sentence(result: dict) -> str:
    where = f"(step {result['step']}, n={result['n']} and {result['published_n']}, 95%)"
    by = f"{abs(result['difference']):.4f} +- {result['half_width']:.4f} nats {where}"
    if result["foreign"]:
        return f"NO: {another(result['foreign'])}; off by {by}"
    if result["diverged"]:
        return f"NO: {result['diverged']} runs diverged"
    if result["outcome"] == "consistent":
        return f"CONSISTENT with {result['of']}: off by {by}"
    if result["outcome"] == "cannot tell":
        return f"CANNOT TELL: off by {by}; " + (
            f"run {result['more_runs']} more" if result["more_runs"] else "no number of runs would, against so few")
    return f"{result['outcome'].upper()} than {result['of']} by {by}"
