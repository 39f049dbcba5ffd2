"""Which differences would bench/parity.py see? One planted in tests/stand_in.py at a time, K seeds each, on the CPU.

    python data/local.py --encoding bytes
    python -m bench.parity_power [--seeds K] [--steps N] [NAME=VALUE ...]

ours, the stand-in and every planted difference run from the initial weights of the same seeds, two at a time, a thread
each. Three things are read from these runs, all at 5% over the whole curve:

- the effect: planted minus faithful stand-in, of equal initial weights, at the step where it is most deviations between
  runs; and the n at which PARITY would be refused in nine cases of ten, were the effect just that;
- refused at n=3: the share of all choices of three of our runs and three of the others', none of one seed, in which
  bench.parity refuses: as a script that draws weights of its own is judged;
- refused in pairs: whether K pairs of equal initial weights, ours and the script's, tell the two apart (paired t).
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import sqrt
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from bench import parity
from records.log import Trial
from records.sample import Sample, common_moments, gather
from records.statistics import Difference, paired, smallest, t_quantile
from studies import style

STAND_IN = parity.ROOT / "tests" / "stand_in.py"
TURNED = ("b * angle.cos() - a * angle.sin()", "b * angle.cos() + a * angle.sin()")
PLANTED = {
    "none": [],
    "beta .25": [("beta=0.5", "beta=0.25")],
    "floor off": [("floor=0.35", "floor=0.0")],
    "contra off": [("contra=0.4", "contra=0.0")],
    "11 Newton-Schulz steps": [("range(12)", "range(11)")],
    "weight decay .01": [("weight_decay=0.0", "weight_decay=0.01")],
    "cooldown .6": [("/ 0.7)", "/ 0.6)")],
    "rotary: one sign wrong": [TURNED],
    "rotary: turned backwards": [TURNED, ("a * angle.cos() + b * angle.sin()", "a * angle.cos() - b * angle.sin()")],
}


def planted(source: str, changes: list[tuple[str, str]]) -> str:
    for old, new in changes:
        assert source.count(old) == 1, f"{old} stands {source.count(old)} times in the stand-in"
        source = source.replace(old, new)
    return source


def train_all(hp, seeds: int, folder: Path) -> dict[str, list[Trial]]:
    """The runs of "ours" and of each planted difference, by seed."""
    words = [f"{name}={value}" for name, value in vars(hp).items() if not name.endswith("_files")]
    jobs = []
    for seed in range(seeds):
        jobs.append((folder / "ours" / f"seed{seed}", parity.ROOT / "train_gpt.py", [*words, "--seed", str(seed)]))
        for name, changes in PLANTED.items():
            seeding = ("import torch\n", f"import torch\nSEED = {seed}\ntorch.manual_seed(SEED)\n")
            source = parity.edit(planted(STAND_IN.read_text(), [*changes, seeding]), hp)
            script = folder / "scripts" / f"{name}_{seed}.py"
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(source)
            jobs.append((folder / name / f"seed{seed}", script, []))
    with ThreadPoolExecutor(2) as pool:
        for _ in tqdm(pool.map(lambda job: parity.run(job[0], folder / "data", *job[1:]), jobs), total=len(jobs),
                      unit="run", disable=None):
            pass
    return {name: [gather([str(folder / name / f"seed{seed}")]).used[0] for seed in range(seeds)]
            for name in ("ours", *PLANTED)}


def sample(trials: list[Trial]) -> Sample:
    return Sample("", 0.0, trials, trials, common_moments(trials), trials[0].train_steps)


def refused_share(ours: list[Trial], other: list[Trial], n: int) -> float:
    """Of all choices of n and n runs that share no seed."""
    seeds = range(len(ours))
    verdicts = [parity.judge(sample([ours[k] for k in a]), sample([other[k] for k in b]))["verdict"]
                for a in combinations(seeds, n) for b in combinations([k for k in seeds if k not in a], n)]
    return 1 - sum(verdicts) / len(verdicts)


def in_pairs(a: list[Trial], b: list[Trial]) -> dict[int, Difference]:
    return {step: paired([trial.losses[step] for trial in a], [trial.losses[step] for trial in b])
            for step in a[0].losses if step > 0}


def runs_needed(deviations: float, evaluations: int) -> int | None:
    """The n and n runs at which an effect of that many deviations between runs is refused in nine cases of ten."""
    level = parity.LEVEL / evaluations
    return smallest(lambda n: n > 1 and abs(deviations) * sqrt(n / 2) >= parity.detectable(2 * n - 2, level))


def study(runs: dict[str, list[Trial]], name: str) -> tuple[dict, dict[int, Difference]]:
    """A row of the table, and the effect at each step."""
    effects = in_pairs(runs[name], runs["none"])
    rows = {row["step"]: row for row in parity.judge(sample(runs["ours"]), sample(runs["none"]))["rows"]}
    judged = [step for step in effects if step > parity.JUDGED_AFTER]
    k = len(runs["ours"])
    # pooled's error is s sqrt(2 / k)
    sd = {step: rows[step]["half_width"] / t_quantile(0.975, 2 * k - 2) / sqrt(2 / k) for step in judged}
    step = max(judged, key=lambda s: abs(effects[s].value) / sd[s])
    effect = effects[step]
    known = abs(effect.value) > effect.half_width()
    bound = abs(effect.value) if known else abs(effect.value) + effect.half_width()
    needed = runs_needed(bound / sd[step], len(judged))
    found = in_pairs(runs["ours"], runs[name])
    seen = [s for s, d in found.items() if abs(d.value) > d.half_width(1 - parity.LEVEL / len(found))]
    return {
        "planted": name, "step": step, "effect, nats": f"{effect.value:+.4f} +- {effect.half_width():.4f}",
        "in deviations": f"{effect.value / sd[step]:+.2f}",
        "n for 90%": "-" if name == "none" or not bound else f"{'' if known else 'more than '}{needed or 1000}",
        "refused at n=3": f"{refused_share(runs['ours'], runs[name], 3):.0%}",
        f"refused in {k} pairs": f"at step {', '.join(map(str, seen))}" if seen else "no",
    }, effects


def draw(effects: dict[str, dict[int, Difference]], rows: list[dict]) -> Figure:
    """The effect of each planted difference along the curve, and the bands inside which it is not seen."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    judged = [row for row in rows if row["step"] > parity.JUDGED_AFTER]
    band = [row["band"] for row in judged]
    axes.fill_between([row["step"] for row in judged], [-x for x in band], band, color="0.9",
                      label="band of seed noise, all seeds")
    for i, (name, at) in enumerate(effects.items()):
        axes.errorbar(at.keys(), [d.value for d in at.values()], [d.half_width() for d in at.values()], label=name,
                      linewidth=1, capsize=2, **style(i, len(effects)))
    axes.set_xlabel("step")
    axes.set_ylabel("planted - faithful, equal initial weights, nats")
    axes.legend(fontsize=7)
    return figure


def main(words: list[str]):
    parser = argparse.ArgumentParser(prog="python -m bench.parity_power", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--seeds", type=int, default=6, metavar="K", help="default 6, which is the least")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument("--runs", type=Path, default=Path("logs/parity_power"), metavar="FOLDER",
                        help="logs go there; runs that it already holds are not repeated")
    parser.add_argument("-o", dest="out", type=Path, default=parity.ROOT / "bench" / "results", metavar="FOLDER")
    args = parser.parse_intermixed_args(words)
    if args.seeds < 6:
        parser.error("--seeds: three and three of different seeds take six")
    os.environ["OMP_NUM_THREADS"] = "1"
    hp = parity.hyperparameters([f"@{STAND_IN.with_suffix('.recipe')}", *args.overrides], args.steps)
    tokens = parity.lay_out(hp, args.runs / "data")
    runs = train_all(hp, args.seeds, args.runs)
    table, effects = zip(*(study(runs, name) for name in PLANTED))
    rows = parity.judge(sample(runs["ours"]), sample(runs["none"]))["rows"]
    head = " | ".join(table[0])
    lines = [f"| {head} |", "|" + "---|" * len(table[0])]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in table]
    losses = [{"runs": name, "seed": seed, "step": step, "val_loss": loss} for name, trials in runs.items()
              for seed, trial in enumerate(trials) for step, loss in trial.losses.items()]
    parity.publish("parity_power", args.out, [f"# python -m bench.parity_power {' '.join(words)}".rstrip(), tokens,
                   "\n".join(lines)], losses, draw(dict(zip(PLANTED, effects)), rows))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"bench.parity_power: {error}")
