"""How often is the table of a sweep wrong, and what does it find? By simulation, through records/sweep.py itself.

    python -m studies.sweep_errors [--tables N]

A run's loss is its seed's part and its own, normal, so that a run deviates by .001 and the difference of a pair by
.0004 to .001, as runs of the track do (.0009 to .0011, and .0004 to .00098 within one lineage: their published logs);
each variation has a deviation of its own, drawn from that range. `one table`: K pairs, one look. `up to 4 tables`: a person
adds the fewest pairs that the table says would decide something, at most 16 at a time, and looks again. `wrong`: sweeps
that show a table in which a variation that is as good as the first is called better or worse, or one that is not is
called its opposite. `real`: none, where most can go wrong; or half, every second variation being .001 better or worse
in turn, of which `found` are called so in the last table.

5% of `wrong` is what the desk states, and what the sum of the levels of all tables and variations comes to; N simulated
sweeps tell such a rate to +- 2 sqrt(.05 .95 / N), which is 1% for 2000.
"""

import argparse
import random
from math import sqrt
from pathlib import Path

from tqdm import tqdm

from records.ledger import FINISHED, Ledger, Plan, Run, Variation
from records.sweep import sweep
from results import markdown, publish

RESULTS = Path(__file__).resolve().parent / "results"
RUN_SD, PAIR_SDS, EFFECT = 0.001, (0.0004, 0.001), 0.001
TABLES, MORE = 4, 16


def effects_of(count: int, real: bool) -> list[float]:
    """Of the first variation, 0, and of `count` others."""
    return [0.0, *((0, EFFECT, 0, -EFFECT)[k % 4] * real for k in range(count))]


def runs_of(source: random.Random, effects: list[float], sds: list[float], starts: range) -> list[Run]:
    """`sds`: of what is a run's own; the rest of its deviation is its seed's."""
    runs = []
    for seed in starts:
        shared = source.gauss(3.279, sqrt(RUN_SD**2 - max(sds)**2))
        runs += [Run(f"v{k}", [], f"v{k}", "val_loss", seed, "", FINISHED, "", "", 3200,
                     shared + effect + source.gauss(0, sd), "", 1, 1.0, "") for k, (effect, sd) in
                 enumerate(zip(effects, sds))]
    return runs


def tables(source: random.Random, effects: list[float], pairs: int, most: int):
    """The tables that a person sees, at most so many, of one sweep."""
    variations = [Variation(f"v{k}", [], f"v{k}", "val_loss", 3200) for k in range(len(effects))]
    sds = [source.uniform(*PAIR_SDS) / sqrt(2) for _ in effects]
    lines, done = [], 0
    for _ in range(most):
        starts = range(done, done + pairs)
        done += pairs
        plan = Plan("", "", [(seed, "") for seed in range(done)], variations)
        lines += [plan, *runs_of(source, effects, sds, starts)]
        yield (table := sweep(Ledger("simulated", lines)))
        advised = [row["more"] for row in table["variations"] if row["outcome"] == "open" and row["more"]]
        if not advised:
            return
        pairs = min(min(advised), MORE)


def simulate(source: random.Random, count: int, pairs: int, most: int, real: bool, repeats: int) -> dict:
    effects = effects_of(count, real)
    wrong = found = looks = 0
    for _ in range(repeats):
        failed = False
        for table in tables(source, effects, pairs, most):
            looks += 1
            right = [row["outcome"] == ("better" if effect < 0 else "worse")
                     for row, effect in zip(table["variations"], effects[1:]) if effect]
            failed |= sum(row["outcome"] in ("better", "worse") for row in table["variations"]) > sum(right)
        wrong += failed
        found += sum(right)
    planted = repeats * sum(map(bool, effects))
    return {"variations": count, "pairs": pairs, "tables": "one" if most == 1 else f"up to {most}",
            "real": f"half, {EFFECT}" if real else "none", "wrong": f"{wrong / repeats:.1%}",
            "found": f"{found / planted:.0%}" if planted else "-", "tables seen": f"{looks / repeats:.1f}"}


def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m studies.sweep_errors", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=2000, metavar="N", help="simulated a row (default 2000)")
    parser.add_argument("-o", dest="out", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(words)
    source = random.Random(0)
    kinds = [(2, 1, False), (4, 1, False), (8, 1, False), (4, TABLES, False),
             (4, 1, True), (8, 1, True), (4, TABLES, True)]
    cases = [(count, *kind) for kind in kinds for count in (2, 8, 32)]
    rows = [simulate(source, *case, args.tables) for case in tqdm(cases, unit="row", disable=None)]
    reading = __doc__.split("\n\n", 2)[2].rstrip()
    publish("studies.sweep_errors", ["--tables", str(args.tables)], args.out, reading, markdown(rows))


if __name__ == "__main__":
    main()
