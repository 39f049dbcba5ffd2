"""Which differences would parity.py see? One planted in stand_in.py at a time, K seeds each, on the CPU.

    python data/local.py --encoding bytes
    python -m studies.parity_power [--seeds K] [--steps N]

Ours, the stand-in and every planted difference run from the initial weights of the same seeds, two at a time, a thread
each. That gives the effect of a difference more exactly than PARITY can, which is told of no seed:

- effect: planted minus faithful, of equal initial weights, at the evaluation after step 25 where it is most deviations
  between runs, and its 95% interval there; in the row `none` it is ours minus faithful, which should be none;
- chance at n=3, n for 90%: how often PARITY would be refused at that step, and from which n on in nine cases of ten,
  were the true effect just that. Where the interval holds zero no n is known;
- in pairs: whether K pairs of equal initial weights, ours and the script's, tell the two apart: paired t, all steps, 5%
  over the whole curve. A script that draws its weights as train_gpt.py does can be judged so.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from records.log import Trial
from records.sample import gather
from records.statistics import Difference, Moments, normal_cdf, paired, smallest
from results import publish
from studies import RESULTS, parity, style

STAND_IN = Path(__file__).with_name("stand_in.py")
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
    # the same model with half of the rows of q and k negated, as likely at the start: no n can tell it
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


def in_pairs(a: list[Trial], b: list[Trial]) -> dict[int, Difference]:
    return {step: paired([trial.losses[step] for trial in a], [trial.losses[step] for trial in b])
            for step in a[0].losses if step > 0}


def study(runs: dict[str, list[Trial]], name: str) -> tuple[dict, dict[int, Difference]]:
    """A row of the table, and the effect at each step."""
    effects = in_pairs(runs["ours" if name == "none" else name], runs["none"])
    judged = [step for step in effects if step > parity.JUDGED_AFTER]
    level = parity.LEVEL / len(judged)
    sd = {step: Moments.of([trial.losses[step] for trial in runs["ours"]]).sd for step in judged}
    step = max(judged, key=lambda s: abs(effects[s].value) / sd[s])
    effect, deviations = effects[step], abs(effects[step].value) / sd[step]

    def chance(n: int) -> float:
        t, spread = parity.refusal(2 * n - 2, level)
        return normal_cdf((deviations * sqrt(n / 2) - t) / spread)

    needed = smallest(lambda n: n > 1 and chance(n) >= 0.9)
    known = abs(effect.value) > effect.half_width()
    found = in_pairs(runs["ours"], runs[name])
    seen = [s for s, d in found.items() if abs(d.value) > d.half_width(1 - parity.LEVEL / len(found))]
    return {
        "planted": name,
        "step": step,
        "effect, nats": "the same curves" if not any(d.value or d.error for d in effects.values()) else
                        f"{effect.value:+.4f} +- {effect.half_width():.4f}",
        "in deviations": f"{effect.value / sd[step]:+.2f}",
        "chance at n=3": f"{chance(3):.1%}",
        "n for 90%": (needed or "over 1000") if known else "not known",
        "in pairs": f"refused, step {', '.join(map(str, seen))}" if seen else "accepted",
    }, effects


def draw(effects: dict[str, dict[int, Difference]]) -> Figure:
    """The effect of each planted difference along the curve, with its 95% interval at each step."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, at) in enumerate(effects.items()):
        axes.errorbar([step + 0.6 * (i - len(effects) / 2) for step in at], [d.value for d in at.values()],
                      [d.half_width() for d in at.values()], label=name, linewidth=1, capsize=2,
                      **style(i, len(effects)))
    axes.set_xlabel("step")
    axes.set_ylabel("planted - faithful, of equal initial weights, nats")
    axes.legend(fontsize=8)
    return figure


def main(words: list[str]):
    parser = argparse.ArgumentParser(prog="python -m studies.parity_power", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="K", help="default 5")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument("--runs", type=Path, default=Path("logs/parity_power"), metavar="FOLDER",
                        help="logs go there; runs that it already holds are not repeated")
    parser.add_argument("-o", dest="out", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(words)
    if args.seeds < 2:
        parser.error("--seeds: two at least, or there is no noise to judge by")
    os.environ["OMP_NUM_THREADS"] = "1"
    hp = parity.hyperparameters([f"@{STAND_IN.with_suffix('.recipe')}"], args.steps)
    tokens = parity.lay_out(hp, args.runs / "data")
    runs = train_all(hp, args.seeds, args.runs)
    table, effects = zip(*(study(runs, name) for name in PLANTED))
    head = " | ".join(table[0])
    lines = [f"| {head} |", "|" + "---|" * len(table[0])]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in table]
    losses = [{"runs": name, "seed": seed, "step": step, "val_loss": loss} for name, trials in runs.items()
              for seed, trial in enumerate(trials) for step, loss in trial.losses.items()]
    reading = __doc__.split("\n\n", 2)[2].rstrip()
    publish("studies.parity_power", ["--seeds", str(args.seeds), "--steps", str(args.steps)], args.out,
            parity.conditions(), tokens, reading, "\n".join(lines), rows=losses, figure=draw(dict(zip(PLANTED, effects))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"studies.parity_power: {error}")
