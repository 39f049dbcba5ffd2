"""`plan`: how likely n runs are to pass the official rule, how many more are needed, and what they cost."""

from math import inf, sqrt

from records.program import UPSTREAM_TARGET
from records.sample import Sample, another
from records.statistics import NOISE, THRESHOLD, Moments, judge, normal_cdf, smallest, t_cdf

SIZES = (1, 2, 4, 6, 8, 10, 12, 16, 20, 30, 40)
# By simulation (tests/test_records_verbs.py): runs whose true mean is the target, judged after every run up to n.
STOPPING = ("note: the rule's p < .001 is for one look. Looked at after every run, it passes runs that are not below "
            "the target in 0.3% of cases by n = 4, 0.5% by 10, 0.8% by 20. Fix n first, or say that runs were added")


def plan(sample: Sample, step: int | None, price: float | None, gpus: int | None = None) -> dict:
    """At one evaluated step: by default the earliest to pass, or else the last; on as many GPUs as the log says."""
    if not sample.moments:
        raise ValueError(f"{sample.name}: no run can be used")
    if sample.foreign:
        raise ValueError(f"{sample.name} is {another(sample.foreign)}: its rule does not apply")
    step = sample.claim().step if step is None else step
    if step not in sample.moments:
        raise ValueError(f"step {step} was not evaluated by all runs: the last is {max(sample.moments)}")
    at = sample.moments[step]
    sd, df = spread(at, sample.target)
    typical = sample.typical()
    seconds = typical and typical.train_time
    gpus = gpus or (typical and typical.world) or 1
    rows = [row(n, at, sample.target, sd, df) for n in sorted({*SIZES, at.n})]
    needed = {goal: smallest(lambda n: fresh(n, at.mean, sample.target, sd) >= goal) for goal in (0.5, 0.9)}
    for line in rows:
        line["hours"] = line["n"] * seconds / 3600 if seconds else None
        line["cost"] = line["hours"] * price * gpus if price is not None and seconds else None
    verdict = judge(at, sample.target)
    return {"verdict": verdict.passes, "target": sample.target, "step": step, **at._asdict(),
            "statistic": verdict.statistic, "noise": sd, "noise_df": None if df == inf else df,
            "seconds": seconds, "price": price, "gpus": gpus, "needed": needed, "mixed": sample.mixture, "sizes": rows,
            "diverged": len(sample.diverged)}


def spread(at: Moments, target: float) -> tuple[float, float]:
    """The deviation between runs, and its degrees of freedom.

    Recipes of the track share theirs, known from 478 degrees of freedom; of others only the sample's is known.
    """
    if target == UPSTREAM_TARGET:
        return NOISE, inf
    if at.sd is None:
        raise ValueError(f"one run tells no spread, and for target {target:g} none is published: make a second run")
    return at.sd, at.n - 1


def fresh(n: int, mean: float, target: float, sd: float) -> float:
    """P(n new runs pass) if their true mean is `mean`: Phi(((target - mean) sqrt(n) - 0.004) / sd)."""
    return normal_cdf(((target - mean) * sqrt(n) - THRESHOLD) / sd)


def extended(n: int, at: Moments, target: float, sd: float, df: float) -> float | None:
    """P(the runs at hand, extended to n, pass), their true mean being known from them alone.

    They pass if the mean of the n - m new ones is at most c = (n (target - 0.004 / sqrt(n)) - m mean) / (n - m); the
    new mean is distributed about the old one with variance sd^2 (1/m + 1/(n - m)), Student's where sd is the sample's.
    None for n below m.
    """
    more = n - at.n
    if more < 0:
        return None
    if not more:
        return float(judge(at, target).passes)
    bound = (n * (target - THRESHOLD / sqrt(n)) - at.n * at.mean) / more
    return t_cdf((bound - at.mean) / (sd * sqrt(1 / at.n + 1 / more)), df)


def row(n: int, at: Moments, target: float, sd: float, df: float) -> dict:
    return {"n": n, "fresh": fresh(n, at.mean, target, sd), "extended": extended(n, at, target, sd, df)}


def text(result: dict) -> str:
    at = Moments(result["n"], result["mean"], result["sd"])
    source = "published for this track" if result["noise_df"] is None else f"of these {at.n} runs"
    lines = [f"step {result['step']}: mean {at.mean:.6f} (n={at.n}, target {result['target']:g}), "
             f"statistic {result['statistic']:+.5f}",
             f"deviation between runs: {result['noise']:.5f} ({source})"]
    if result["seconds"]:
        lines.append(f"a run trains for {result['seconds']:.0f} s"
                     + f" on {result['gpus']} GPU{'s' * (result['gpus'] > 1)}" * (result["price"] is not None))
    lines += [f"mixed: {result['mixed']}"] * bool(result["mixed"])
    lines.append("   n  P(pass), all new  P(pass), added to these" + "     hours" * bool(result["seconds"])
                 + "      cost" * (result["sizes"][0]["cost"] is not None))
    for line in result["sizes"]:
        added = "-" if line["extended"] is None else f"{line['extended']:.1%}"
        lines.append(f"{line['n']:>4}{line['fresh']:>18.1%}{added:>25}"
                     + (f"{line['hours']:>10.1f}" if line["hours"] is not None else "")
                     + (f"{line['cost']:>10.2f}" if line["cost"] is not None else ""))
    half, most = (f"{n} runs" if n else "no number of runs up to 1000" for n in result["needed"].values())
    lines.append(f"if the true mean is this one, {half} pass in half of all cases, {most} in nine of ten")
    if result["diverged"]:
        lines.append(f"{result['diverged']} runs diverged: with them no number passes")
    return "\n".join([*lines, STOPPING])
