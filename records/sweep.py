"""`sweep`: which variations are better than the first of their file, and how sure is that?

A variation is held against the first one in pairs of runs that share a seed or a checkpoint, by their claimed losses at
their last steps: Student's t of the differences, each variation's own deviation.

- better or worse: p is at most 5% after two corrections, one for the number of variations (Holm 1979) and one for the
  number of tables. A table is a plan all of whose runs have ended; before, there is no verdict. Of the 5% a variation
  has 4% at its first table, 0.8% at the second if it has other pairs there, and so on: four fifths of what is left. So
  whoever adds pairs until he likes what he sees is wrong about any of the variations in at most 5% of cases, too.
- open: neither. `more` is the number of further pairs with which it would be decided in four cases of five, if its
  difference and deviation are what they look like now.
- failed: a run of it diverged.

All variations count that the first one was ever compared with in this ledger, those that have left the file too. The
intervals hold for all of them at once (Bonferroni); Holm's p is sharper where several are decided.
"""

from collections import defaultdict
from collections.abc import Iterator
from math import inf, sqrt

from records.compare import tell
from records.ledger import CRASHED, FAILED, FINISHED, Ledger, Plan, Run, Start, Variation
from records.statistics import Difference, Moments, holm, normal_cdf, smallest, t_quantile

LEVEL = 0.05
FIRST = 0.8  # the share of what is left of LEVEL that each table takes: small levels cost most where pairs are few
POWER = 0.8
MOST = 100  # further pairs; beyond, nobody wants to know how many

Ends = dict[str, dict[Start, list[Run]]]  # by source_sha256; of several attempts the last may be the one that finished


def sweep(ledger: Ledger) -> dict:
    """The table of the ledger's newest plan; the verdict is that a variation is better than the first."""
    if not ledger.plans:
        raise ValueError(f"{ledger.path} holds no plan: ./run.sh sweep writes one before the first run")
    plan, ends = ledger.plans[-1], by_start(ledger.runs)
    first, *others = plan.variations
    tables, family = looked_at(ledger)
    rows = [describe(variation, first, ends) for variation in others]
    if not (to_come := missing(plan, ends)):
        judge(rows, [tables[variation.source_sha256] for variation in others], family)
    return {
        "verdict": any(row["outcome"] == "better" for row in rows),
        "file": plan.file, "level": LEVEL, "family": family, "to_come": to_come,
        "planned": len(plan.starts) * len(plan.variations),
        "first": describe(first, first, ends), "variations": rows,
    }


def by_start(runs: list[Run]) -> Ends:
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run.source_sha256][run.start].append(run)
    return found


def missing(plan: Plan, ends: Ends) -> int:
    """How many runs of a plan have not ended."""
    return sum(start not in ends[variation.source_sha256] for variation in plan.variations for start in plan.starts)


def finished(runs: dict[Start, list[Run]]) -> dict[Start, Run]:
    """The first that finished of each start: one that was run twice is not more evidence."""
    return {start: whole[0] for start in sorted(runs) if (whole := [x for x in runs[start] if x.status == FINISHED])}


def pairs(variation: Variation, first: Variation, ends: Ends) -> list[tuple[Run, Run]]:
    mine, others = (finished(ends[v.source_sha256]) for v in (variation, first))
    return [(mine[start], others[start]) for start in mine if start in others]


def on_one_device(pair: tuple[Run, Run]) -> bool:
    return pair[0].device == pair[1].device


def looked_at(ledger: Ledger) -> tuple[dict[str, int], int]:
    """At how many tables each variation has shown other pairs, this one included; and how many variations the first
    was ever compared with."""
    first, shown = ledger.plans[-1].variations[0], defaultdict(set)
    for plan, ends in plans_with_ends(ledger):
        if plan.variations[0].source_sha256 == first.source_sha256:
            for variation in plan.variations[1:]:
                shown[variation.source_sha256] |= (
                    set() if missing(plan, ends) else {len(pairs(variation, first, ends))})
    return {sha256: len(counts) for sha256, counts in shown.items()}, len(shown)


def plans_with_ends(ledger: Ledger) -> Iterator[tuple[Plan, Ends]]:
    """Each plan with the runs that had ended when the next was made."""
    places = [i for i, line in enumerate(ledger.lines) if isinstance(line, Plan)] + [len(ledger.lines)]
    for place, end in zip(places, places[1:]):
        yield ledger.lines[place], by_start([line for line in ledger.lines[:end] if isinstance(line, Run)])


def describe(variation: Variation, first: Variation, ends: Ends) -> dict:
    runs, both = ends[variation.source_sha256], pairs(variation, first, ends)
    losses = [run.loss for run in finished(runs).values()]
    differences = [run.loss - other.loss for run, other in filter(on_one_device, both)]
    last = [attempts[-1].status for attempts in runs.values()]
    return {
        "name": variation.name, "metric": variation.metric, "step": variation.last_step,
        "n": len(losses), "mean": Moments.of(losses).mean if losses else None,
        "failed": last.count(FAILED), "crashed": last.count(CRASHED),
        "pairs": len(differences), "apart": len(both) - len(differences),
        "difference": Moments.of(differences).mean if differences else None,
        "sd": Moments.of(differences).sd if differences else None,
        "half_width": None, "p": None, "outcome": None, "more": None,
    }


def judge(rows: list[dict], tables: list[int], family: int) -> None:
    """Fill in half_width, p, outcome and more of a table that is whole."""
    shares = [max(FIRST * (1 - FIRST) ** (k - 1), 1e-9) for k in tables]  # about as fine as t_cdf is
    known = [i for i, row in enumerate(rows) if row["sd"] is not None]
    errors = {i: Difference(rows[i]["difference"], rows[i]["sd"] / sqrt(rows[i]["pairs"]), rows[i]["pairs"] - 1)
              for i in known}
    adjusted = holm([min(1.0, errors[i].p / shares[i]) for i in known], family)
    for row in rows:
        row["outcome"] = "open"
    for i, p in zip(known, adjusted):
        row, share = rows[i], shares[i] * LEVEL / family
        row["p"], row["half_width"] = p, errors[i].half_width(1 - share)
        if p <= LEVEL:
            row["outcome"] = "better" if row["difference"] < 0 else "worse"
        elif row["difference"]:
            row["more"] = more_pairs(row, share * (1 - FIRST))
    for row in rows:
        if row["failed"]:
            row["outcome"] = "failed"


def more_pairs(row: dict, level: float) -> int | None:
    """After how many further pairs the t-test at `level` rejects with a chance of POWER, if mean and deviation of the
    differences are what they are now; None beyond MOST."""
    def decides(more: int) -> bool:
        n = row["pairs"] + more
        return normal_cdf(abs(row["difference"]) * sqrt(n) / row["sd"] - t_quantile(1 - level / 2, n - 1)) >= POWER
    return smallest(decides, MOST)


def text(result: dict) -> str:
    first, rows = result["first"], result["variations"]
    width = max(len(row["name"]) for row in (first, *rows))
    lines = [f"{'':<{width}}  pairs      mean  difference       +-         p  verdict"]
    lines.append(f"{first['name']:<{width}}{'':>7}{number(first['mean'], '.5f', 10)}" + ended(first))
    for row in sorted(rows, key=lambda row: inf if row["difference"] is None else row["difference"]):
        lines.append(
            f"{row['name']:<{width}}{row['pairs']:>7}{number(row['mean'], '.5f', 10)}"
            f"{number(row['difference'], '+.5f', 12)}{number(row['half_width'], '.5f', 9)}"
            f"{'-' if row['p'] is None else tell(row['p']):>10}  {row['outcome'] or '-'}" + ended(row))
    return "\n".join([*lines, *notes(result)])


def number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def ended(row: dict) -> str:
    found = [f"{row[kind]} {kind}" for kind in ("failed", "crashed") if row[kind]]
    return f" ({', '.join(found)})" if found else ""


def notes(result: dict) -> list[str]:
    first, rows, family = result["first"], result["variations"], result["family"]
    losses = defaultdict(list)
    for row in (first, *rows):
        losses[f"{row['metric']} at step {row['step']}"].append(row["name"])
    said = [f"loss: {loss}" + f" ({', '.join(names)})" * (len(losses) > 1) for loss, names in losses.items()]
    if apart := sum(row["apart"] for row in rows):
        said.append(f"{apart} pair{'s' * (apart > 1)} left out, of runs on different devices")
    if first["n"] == 0 and not result["to_come"]:
        said.append(f"{first['name']}, which the others are compared with, has no run that finished")
    if result["to_come"]:
        return [*said, f"{result['to_come']} of {result['planned']} runs are to come; no verdict before"]
    if rows:
        said.append(f"p and +- are corrected for {family} variation{'s' * (family > 1)} looked at: in at most "
                    f"{result['level']:.0%} of such tables is one called better or worse that is neither")
    more = [f"{row['name']} {row['more'] or f'over {MOST}'}" for row in rows
            if row["outcome"] == "open" and row["difference"] and row["sd"] is not None]
    if more:
        said.append(f"further pairs that would decide it, in {POWER:.0%} of cases if it is as it looks: "
                    + ", ".join(more))
    return said
