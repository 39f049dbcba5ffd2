"""`compare`: is A better than B, than C, and how sure is that?"""

from math import inf, sqrt
from string import ascii_uppercase as LETTERS

from records.sample import Sample, another
from records.statistics import (
    SCHEDULE_RATE,
    Difference,
    mean_crossing,
    paired,
    pairwise,
    t_quantile,
    welch,
)


def compare(new: Sample, others: list[Sample]) -> dict:
    """`new` against each of the others; the verdict is that it beats them all by upstream's pairwise rule."""
    if len(others) >= len(LETTERS):
        raise ValueError(f"{len(others) + 1} sets: compare at most {len(LETTERS)} at a time")
    for sample in (new, *others):
        if not sample.moments:
            raise ValueError(f"{sample.name}: no run can be used")
    for other in others:
        if other.target != new.target:
            raise ValueError(f"{new.name} is to reach {new.target:g}, {other.name} {other.target:g}: "
                             "their losses are not of one kind")
    pairs = [describe_pair(new, other) for other in others]
    return {
        "verdict": all(pair["rule"]["passes"] for pair in pairs) and not new.diverged,
        "target": new.target,
        "sets": [describe(sample) for sample in (new, *others)],
        "pairs": pairs,
    }


def describe(sample: Sample) -> dict:
    crossing = mean_crossing(sample.moments, sample.target)
    return {"name": sample.name, "n": sample.n, "started": len(sample.trials) or sample.n,
            "diverged": len(sample.diverged), "train_steps": sample.train_steps, "claim": sample.claim()._asdict(),
            "crossing": crossing._asdict(), "rate": rate(sample), "mixed": sample.mixture, "foreign": sample.foreign,
            "metric": sample.metric}


def rate(sample: Sample) -> float | None:
    """Nats per 100 steps along the mean curve, between the two evaluations around its crossing."""
    step = mean_crossing(sample.moments, sample.target).step
    if step is None or step <= min(sample.moments):
        return None
    end = min(s for s in sample.moments if s >= step)
    start = max(s for s in sample.moments if s < end)
    return 100 * (sample.moments[start].mean - sample.moments[end].mean) / (end - start)


def describe_pair(new: Sample, old: Sample) -> dict:
    shared = [step for step in new.moments if step in old.moments and step > 0]
    same = new.recipes == old.recipes if new.recipes else False
    rule = pairwise(new.claim(), old.claim())
    if new.foreign or old.foreign:
        rule = rule._replace(passes=False)
    return {
        "new": new.name, "old": old.name, "same_program": same,
        "same_schedule": new.train_steps == old.train_steps,
        "rule": rule._asdict(),
        "foreign": {sample.name: sample.foreign for sample in (new, old) if sample.foreign},
        "crossing": crossing_difference(new, old),
        "steps": [step_difference(step, new, old) for step in shared],
        "paired": pair_by_seed(new, old, shared),
    }


def step_difference(step: int, new: Sample, old: Sample) -> dict:
    a, b = new.moments[step], old.moments[step]
    difference = welch(a, b)
    return {"step": step, "new": a.mean, "new_n": a.n, "old": b.mean, "old_n": b.n, "difference": a.mean - b.mean,
            "half_width": difference.half_width() if difference else None, "p": difference.p if difference else None}


def crossing_difference(new: Sample, old: Sample) -> dict | None:
    """Steps from old's crossing to new's, with a 95% interval where both sets have a spread.

    The standard error of a crossing is that of the loss there over the slope: half of its own interval over t. Ends
    beyond the last evaluation leave the difference without an interval.
    """
    parts = []
    for sample in (new, old):
        low, step, high = mean_crossing(sample.moments, sample.target)
        if step is None:
            return None
        df = max(sample.n - 1, 1)
        known = low is not None and high is not None
        parts.append((step, (high - low) / 2 / t_quantile(0.975, df) if known else inf, df))
    (a, va, dfa), (b, vb, dfb) = ((step, error**2, df) for step, error, df in parts)
    if max(va, vb) == inf:
        return {"steps": a - b, "half_width": None, "p": None}
    df = (va + vb) ** 2 / (va**2 / dfa + vb**2 / dfb) if va + vb else inf
    difference = Difference(a - b, sqrt(va + vb), df)
    return {"steps": a - b, "half_width": difference.half_width(), "p": difference.p}


def pair_by_seed(new: Sample, old: Sample, shared: list[int]) -> dict | None:
    """At the last shared step, over the seeds that both name; None for fewer than two."""
    a, b = ({trial.seed: trial for trial in sample.used if trial.seed is not None} for sample in (new, old))
    if not shared:
        return None
    step = shared[-1]
    seeds = sorted(seed for seed in a.keys() & b.keys() if step in a[seed].losses and step in b[seed].losses)
    if len(seeds) < 2:
        return None
    difference = paired([a[seed].losses[step] for seed in seeds], [b[seed].losses[step] for seed in seeds])
    return {"step": step, "pairs": len(seeds), "difference": difference.value,
            "half_width": difference.half_width(), "p": difference.p}


def tell(p: float, equals: str = "") -> str:
    return f"{equals}{p:.2g}" if p >= 1e-6 else "< 1e-6"  # Student's p is computed to that


def text(result: dict, every_step: bool = False) -> str:
    lines = [f"target {result['target']:g}; 95% intervals; crossings are interpolated: descriptive, not claimable",
             "set     n   claim      mean   crosses at  interval        nats/100 steps there"]
    for letter, at in zip(LETTERS, result["sets"]):
        low, step, high = (("beyond" if x is None else f"{x:.0f}") for x in at["crossing"].values())
        interval = f"{low} to {high}" if at["n"] > 1 else "-"
        slope = f"{at['rate']:.4f}" if at["rate"] is not None else "-"
        lines.append(f"{letter:<4}{at['n']:>5}{at['claim']['step']:>8}{at['claim']['mean']:>10.5f}{step:>13}  "
                     f"{interval:<16}{slope}")
        missing = at["started"] - at["claim"]["n"]
        lines.append(f"     {at['name']}" + f": {missing} of {at['started']} runs not used" * (missing > 0))
        lines += [f"     mixed: {at['mixed']}"] * bool(at["mixed"])
        lines += [f"     of its {at['metric']}"] * (at["metric"] != "val_loss")
    for letter, pair in zip(LETTERS[1:], result["pairs"]):
        lines += ["", *pair_text("A", letter, pair, every_step)]
    return "\n".join(lines)


def pair_text(a: str, b: str, pair: dict, every_step: bool) -> list[str]:
    lines = []
    if pair["same_program"]:
        lines.append(f"note: {a} and {b} ran the same program")
    if not pair["same_schedule"]:
        lines.append("note: schedules of different length: before the end their losses do not compare")
    if pair["steps"]:
        lines.append(f"   step    mean {a}    mean {b}     {a} - {b}      +-  p (Welch)")
    last = pair["steps"][-1]["step"] if pair["steps"] else 0
    quarters = {min((at["step"] for at in pair["steps"]), key=lambda s: abs(s - last * k / 4)) for k in (1, 2, 3)
                } if pair["steps"] else set()
    for at in pair["steps"]:
        if every_step or at["step"] >= 0.97 * last or at["step"] in quarters:
            spread = f"{at['half_width']:>8.5f}{tell(at['p']):>11}" if at["p"] is not None else "       -          -"
            lines.append(f"{at['step']:>7}{at['new']:>10.5f}{at['old']:>10.5f}{at['difference']:>+10.5f}{spread}")
    if at := pair["crossing"]:
        spread = f" +- {at['half_width']:.0f} (p {tell(at['p'], '= ')})" if at["p"] is not None else ""
        order = "before" if at["steps"] < 0 else "after"
        lines.append(f"crossing: {a} {abs(at['steps']):.0f}{spread} steps {order} {b}")
    if at := pair["paired"]:
        lines.append(f"paired by seed at step {at['step']}, {at['pairs']} pairs: {at['difference']:+.5f} +- "
                     f"{at['half_width']:.5f}, p {tell(at['p'], '= ')}")
    if pair["foreign"]:
        name, reasons = next(iter(pair["foreign"].items()))
        return [*lines, f"NO VERDICT on {a} and {b}: {name} is {another(reasons)}"]
    rule = pair["rule"]
    return [*lines, f"official pairwise rule, {SCHEDULE_RATE} nats per 100 steps between schedules:",
            f"{rule['statistic']:+.5f} (0.004 is asked), p = {rule['p']:.2g}: "
            f"{a} is {'' if rule['passes'] else 'NOT shown '}better than {b}"]
