"""What each part of result #46 is worth in a small model: the loss without it less the loss with all of them.

    python -m studies.leave_one_out [--quick -o FOLDER] [NAME=VALUE ...]

The rule, rates and strengths are #46's, and every number of steps in it is a tenth of #46's: 269 steps of a horizon of
290 stand for 2690 of 2900. Two layers, 32 wide, on bytes. The loss is #46's metric, in a blend of weights and average.
NAME=VALUE overrides train_gpt.py's.
"""

import sys
from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

import train_gpt
from records.statistics import paired
from studies import parse, publish
from studies.training import SMALL, shards_of, sweep, training

MOMENTUM = "nesterov(ramp(ramp(0.85, 0.95, 0, 30), 0.85, 270, 290))"
GATE = "trust_gate(ramp(0.45, 0, 137, 162), ramp(0.85, 1, 162, 163), names(0, attn_proj=1))"
MATRIX = [MOMENTUM, "soap(0.9, 0.9)", GATE, "schatten4_polar", "aspect", "brake(0.5)", "row_floor(0.3825)", "step",
          "pin", "cautious_decay(0.025)"]
FINAL = ["tail_average(240, 15, names(0.6, embed=0))", "lookahead(between(power(0.3, 290, 141, 1.2), 29, 194), 0.1)"]
SIZE = ["num_layers=2", "model_dim=32", "head_dim=16", "train_steps=290", "stop_step=269", "val_every=290",
        "val_every_late=290", "matrix_lr=0.0375", "embed_lr=0.3", "head_lr=0.003125", "vector_lr=0.01"]
OTHERS = ["matrix_schedule=power(239, 1.2)", "adam_schedule=power(141, 1.2)", "init=paired_gain_signs"]
QUICK = ["num_layers=1", "model_dim=16", "head_dim=8", "val_tokens=1024", "stop_step=36"]
WHOLE = "all of #46"


def rule(matrix=MATRIX, vectors="raw_adam(0.8, names(0.997, attn_proj_bias=0.9965, gains=0.99), 1e-10) | step",
         final=FINAL, metric="val_ema_loss") -> list[str]:
    return [f"matrix_update={' | '.join(matrix)}", "adam_update=adamw(0.8, 0.99, 1e-10, 0)", f"vector_update={vectors}",
            f"final_update={' | '.join(final)}", f"metric={metric}", *OTHERS]


def but(old: str, new: str | None = None) -> list[str]:
    """MATRIX without the stage of that name, or with another in its place."""
    return [new if stage.startswith(old) else stage for stage in MATRIX if new or not stage.startswith(old)]


PARTS = {  # what is left out, and what then stands in its place
    WHOLE: rule(),
    "soap": rule(but("soap")),
    "trust_gate": rule(but("trust_gate")),
    "brake": rule(but("brake")),
    "row_floor, for floor": rule(but("row_floor", "floor(0.3825)")),
    "pin": rule(but("pin")),
    "cautious_decay": rule(but("cautious_decay")),
    "ramps of the momentum, for .95": rule(but("nesterov", "nesterov(0.95)")),
    "lookahead": rule(final=FINAL[:1]),
    "tail_average": rule(metric="val_loss"),
    "raw_adam, for adamw": rule(vectors=""),
}


def run(words: list[str], part: str, rate: float, seed: int) -> list[dict]:
    return end_of(train_gpt.override([*PARTS[part], *words, f"matrix_lr={rate}"]), seed, without=part)


def end_of(hp: train_gpt.Hyperparameters, seed: int, **kind: str) -> list[dict]:
    """The one row of a run, its kind in the first column."""
    *_, (step, loss, _) = training(hp, seed)
    return [kind | dict(seed=seed, step=step, val_loss=loss)]


def in_pairs(run: Callable, against: dict[str, str], rate: float, seeds: int) -> tuple[list[dict], list[dict]]:
    """Every run of these kinds and of those that they are held against, as rows, and the `differences`."""
    kinds = dict.fromkeys((*against.values(), *against))
    done = sweep(run, [(kind,) for kind in kinds], [rate], seeds)
    rows = [row for rows in done.values() for row in rows]
    return rows, differences(rows, against)


def differences(rows: list[dict], against: dict[str, str]) -> list[dict]:
    """Of each key of `against`, a value of the rows' first column: its loss less that of the other there, mean over
    pairs of equal seeds. The intervals hold all together in 95% of cases, by Bonferroni's inequality."""
    kind, losses, lines = next(iter(rows[0])), {}, []
    for row in sorted(rows, key=lambda row: row["seed"]):
        losses.setdefault(row[kind], []).append(row["val_loss"])
    for name, other in against.items():
        at = paired(losses[name], losses[other])
        half = at.half_width(1 - 0.05 / len(against))
        lines.append({kind: name, "loss more by": at.value, "low": at.value - half, "high": at.value + half,
                      "n": len(losses[name]), "seen": "too small to see" if abs(at.value) <= half else "yes"})
    return lines


def draw(lines: list[dict], other: str) -> Figure:
    figure = Figure(figsize=(7, 1 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    places, kind = range(len(lines))[::-1], next(iter(lines[0]))
    axes.errorbar([line["loss more by"] for line in lines], places, fmt="o", color="black", capsize=4,
                  xerr=[line["high"] - line["loss more by"] for line in lines])
    axes.axvline(0, color="grey", linewidth=1)
    axes.set(yticks=places, yticklabels=[line[kind] for line in lines], ylabel=kind,
             xlabel=f"validation loss more than with {other}, nats a byte",
             title=f"{lines[0]['n']} pairs, 95% for all together")
    axes.grid(alpha=0.3, axis="x")
    return figure


def paragraph(lines: list[dict], hp: train_gpt.Hyperparameters) -> str:
    def named(seen):
        return "; ".join(line["without"] for line in lines if (line["seen"] == "yes") == seen) or "none"
    return f"""
        {hp.num_layers} layers, {hp.model_dim} wide, {hp.last_step} steps of {hp.batch_tokens} bytes of a horizon of
        {hp.train_steps}: #46's rule with a tenth of its steps, its rates and its strengths. The loss without a part
        less that with all of them, mean of {lines[0]['n']} pairs of equal seeds (a seed sets the initial weights, not
        the data); the intervals, by Student's t and Bonferroni's inequality, hold all together in 95% of cases. Told
        from nothing: {named(True)}. Too small to see here: {named(False)}."""


def main(words: list[str]):
    args = parse("leave_one_out", __doc__, words, trains=True)
    words, seeds = [*SMALL, *SIZE, *QUICK * args.quick, *args.overrides], 2 if args.quick else 8
    hp = train_gpt.override(words)
    shards_of(hp)
    against = {part: WHOLE for part in PARTS if part != WHOLE}
    rows, lines = in_pairs(partial(run, words), against, hp.matrix_lr, seeds)
    publish("leave_one_out", args, rows, draw(lines, "all of them"), paragraph(lines, hp), lines)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"studies.leave_one_out: {error}")
