"""`list`: the published results, the recipes, and every group of runs below a folder."""

import textwrap
from pathlib import Path

from records import published
from records.log import Log, load
from records.program import recipe
from records.recipes import RECORDS, recipes, rule
from records.sample import Sample, another, from_logs, groups
from records.statistics import judge

RULE = {True: "PASS", False: "FAIL", None: "-"}  # None: the rule is not for this program


def leaderboard(names: list[str], metric: str | None = None) -> dict:
    """The groups in the logs that `names` mean; without names, the published results, and the recipes and runs in
    records/."""
    logs = load(names or [str(RECORDS)], metric)
    return {
        "verdict": True,
        "published": [] if names else [row._asdict() for row in published.results().values()],
        "recipes": {} if names else {name: rule(name) for name in recipes()},
        "groups": [describe(group) for group in groups(logs)],
    }


def describe(group: list[Log]) -> dict:
    """One recipe on one device: what stands in a row of the table."""
    row = {"program": recipe(group[0].source)[:8], "device": group[0].trials[0].device, "first": group[0].path,
           "logs": len(group), "runs": sum(len(log.trials) for log in group)}
    try:
        sample = from_logs("", group)
    except ValueError as error:  # no step in common
        return row | {"used": 0, "note": str(error)}
    return row | figures(sample)


def figures(sample: Sample) -> dict:
    if not sample.moments:
        return {"used": 0, "note": "no finished run"}
    claim, passes = sample.claim(), sample.earliest() is not None and not sample.diverged
    if sample.foreign:
        passes = None
    notes = (f"of its {sample.metric}" * (sample.metric != "val_loss"),
             f"{len(sample.diverged)} diverged" * bool(sample.diverged), sample.mixture, another(sample.foreign))
    return {"used": claim.n, "target": sample.target, "step": claim.step, "mean": claim.mean,
            "statistic": judge(sample.moments[claim.step], sample.target).statistic, "passes": passes,
            "note": "; ".join(filter(None, notes))}


def text(result: dict) -> str:
    lines = []
    if result["published"]:
        lines.append("  #  steps    mean    n  accepted results of upstream (! then the fewest steps)")
    for row in result["published"]:
        mark = "!" if row["world_record"] else " "
        lines.append(f"{row['record']:>3}  {row['step']:>5}{mark} {row['mean']:.4f}{row['n']:>4}  "
                     f"{row['date']}  {row['summary']}")
    if result["recipes"]:
        lines += ["", f"{'recipe':<20}update rule of the matrices"]
    for name, rule in result["recipes"].items():
        lines += wrapped(name, rule)
    lines += [""] * bool(lines)
    lines.append("program   runs  used   step      mean  rule  target  logs")
    for row in result["groups"]:
        place = Path(row["first"])
        where = f"{place.parent.name}/{place.name}" + f" and {row['logs'] - 1} more" * (row["logs"] > 1)
        figures = "      -         -     -       -"
        if row["used"]:
            figures = (f"{row['step']:>7}{row['mean']:>10.5f}{RULE[row['passes']]:>6}"
                       f"{row['target']:>8g}")
        lines.append(f"{row['program']}{row['runs']:>6}{row['used']:>6}{figures}  {where}"
                     + f" ({row['note']})" * bool(row["note"]))
    return "\n".join(lines)


def wrapped(name: str, rule: str) -> list[str]:
    """A rule beside its recipe's name, broken between its stages alone."""
    whole = rule.replace(" ", "\xa0").replace("\xa0|\xa0", "\xa0| ")  # textwrap breaks at no such space
    first, *others = textwrap.wrap(whole, 78, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\xa0", " ") for line in [f"{name:<19} {first}", *(" " * 20 + line for line in others)]]
