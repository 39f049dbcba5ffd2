"""Which attempts of records/ lower the loss of a small model? Each beside the recipe that it changes, from equal seeds.

    python -m studies.attempts [--quick -o FOLDER] [NAME=VALUE ...]

Rules and strengths are the recipes' own, but for the head, which moves as the embedding does; every number of steps
is a tenth of theirs, and a run ends at a tenth of the step that its base claims; every rate is a quarter of theirs,
since at their own so small a run is chaotic, and pairs of equal seeds are as far apart as others. Two layers, 64
wide, on bytes; the loss is the recipes' metric, in a blend of weights and average. NAME=VALUE overrides
train_gpt.py's.
"""

import re
import sys
from functools import partial

import train_gpt
from studies import parse, publish
from studies.leave_one_out import draw, end_of, in_pairs
from studies.training import SMALL, shards_of

ATTEMPTS = {  # and what each changes
    "attempt_auxiliary_rates": "339_bimaxwell",
    "attempt_corrected_vectors": "339_bimaxwell",
    "attempt_plain_start": "339_bimaxwell",
    "attempt_anneal_alone": "339_bimaxwell",
    "attempt_tail_heat": "2540_open_claim",
}
CLAIMED = {"339_bimaxwell": 2635, "2540_open_claim": 2540}  # steps
SIZE = ["num_layers=2", "model_dim=64", "head_dim=32", "val_every=1000", "val_every_late=1000"]
QUICK = ["num_layers=1", "model_dim=16", "head_dim=8", "val_tokens=1024", "stop_step=10"]


def tenth(rule: str) -> str:
    """A rule or a schedule with a tenth of its steps: numbers of ten and more, which in these recipes count nothing
    else. A jump from a step to the next remains one, and a running mean over a hundred steps becomes one over ten."""
    rule = re.sub(r"(?<![\w.-])\d\d+(\.\d+)?", lambda steps: str(int(float(steps[0]) / 10)), rule)
    rule = re.sub(r"(?<![\w.-])(\d+), \1\)", lambda jump: f"{jump[1]}, {int(jump[1]) + 1})", rule)
    return rule.replace("0.01)", "0.1)")


def shortened(name: str) -> list[str]:
    """The words of a recipe of records/ with a tenth of its steps and a quarter of its rates."""
    hp = train_gpt.override([f"@{name}"])
    # a head_update moves the head in eight equal parts, which 257 bytes do not allow
    rules = [f"{field}={tenth(text) * (field != 'head_update')}" for field, text in vars(hp).items()
             if field.endswith(("_update", "_schedule"))]
    rates = [f"{field}={rate / 4}" for field, rate in vars(hp).items() if field.endswith("_lr")]
    return [f"@{name}", *rules, *rates, f"train_steps={hp.train_steps // 10}",
            f"stop_step={CLAIMED[ATTEMPTS.get(name, name)] // 10}"]


def run(words: list[str], name: str, rate: float, seed: int) -> list[dict]:
    hp = train_gpt.override([*SMALL, *shortened(name), *SIZE, *words, f"matrix_lr={rate}"])
    return end_of(hp, seed, recipe=name)


def paragraph(lines: list[dict], hp: train_gpt.Hyperparameters) -> str:
    def named(found):
        return ", ".join(line["recipe"] for line in lines if found(line)) or "none"
    return f"""
        {hp.num_layers} layers, {hp.model_dim} wide, steps of {hp.batch_tokens} bytes, a tenth of the recipes' steps, a
        quarter of their rates, their strengths. The loss of an attempt less that of the recipe that it changes, mean of
        {lines[0]["n"]} pairs of equal seeds (a seed sets the initial weights, not the data), the lowest first; the
        intervals, by Student's t and Bonferroni's inequality, hold all together in 95% of cases. Better here:
        {named(lambda line: line["high"] < 0)}. Worse here: {named(lambda line: line["low"] > 0)}. Not told apart from
        their recipes: {named(lambda line: line["low"] <= 0 <= line["high"])}. What raises a rate, as larger
        rates and moments without correction do, is favoured where all are a quarter, and what lowers it, as annealing
        does, is not; what acts by the noise of gradients, on long weights or late in a long run is hardly here: an
        order in which to look, and no forecast for full size."""


def main(words: list[str]):
    args = parse("attempts", __doc__, words, trains=True)
    words, seeds = [*QUICK * args.quick, *args.overrides], 2 if args.quick else 12
    hp = train_gpt.override([*SMALL, *shortened(next(iter(CLAIMED))), *SIZE, *words])
    shards_of(hp)
    rows, found = in_pairs(partial(run, words), ATTEMPTS, hp.matrix_lr, seeds)
    lines = [{"recipe": line["recipe"], "changes": ATTEMPTS[line["recipe"]], **line}
             for line in sorted(found, key=lambda line: line["loss more by"])]
    publish("attempts", args, rows, draw(lines, "the recipe that it changes"), paragraph(lines, hp), lines)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"studies.attempts: {error}")
