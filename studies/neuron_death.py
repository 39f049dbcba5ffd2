"""Whether Muon starves neurons and Aurora does not: leverage scores over a training run, each at its best rate.

    python -m studies.neuron_death [--quick -o FOLDER] [NAME=VALUE ...]

A neuron is a row of an MLP's up-projection; it counts as starved while the leverage score of its momentum is below a
tenth of the even share n / m. The paper (arXiv 2606.27715, figure 5) has more than 25% of Muon's neurons dead by step
500, for good. Without a GPU a model of four layers on bytes; with one GPT-2 small. NAME=VALUE overrides train_gpt.py's.
"""

import sys
from functools import partial

import torch
from matplotlib.figure import Figure

import train_gpt
from aurora import leverage_scores
from studies import RULES, parse, publish, style
from studies.training import GPT2_SMALL, SMALL, best_rate, device, interval, momenta, shards_of, sweep, training

FULL = ["model_dim=64", "head_dim=32", "train_steps=1000"]
QUICK = ["model_dim=16", "head_dim=8", "num_layers=2", "train_steps=20", "val_tokens=1024", "val_every=5",
         "val_every_late=5"]


def run(words: list[str], direction: str, rate: float, seed: int) -> list[dict]:
    """A row for each validation: loss, and the fraction of neurons starved then, and then and at every later look."""
    hp = train_gpt.override([f"matrix_update={RULES[direction]}", *words, f"matrix_lr={rate}"])
    rows, starved = [], []
    for step, loss, banks in training(hp, seed):
        rows.append(dict(direction=direction, matrix_lr=rate, seed=seed, step=step, val_loss=loss))
        even = min(1, hp.model_dim / hp.mlp_dim)
        # there is no momentum before the first step
        starved.append(torch.cat([leverage_scores(M) < 0.1 * even for M in momenta(banks)]).cpu() if step else None)
    still = torch.ones_like(starved[-1])
    for row, now in zip(rows[:0:-1], starved[:0:-1]):
        still = still & now
        row |= {"starved": now.double().mean().item(), "for good": still.double().mean().item()}
    rows[0] |= {"starved": "", "for good": ""}
    return rows


def summarise(done: dict[tuple, list], seeds: int) -> list[dict]:
    lines = []
    for name in RULES:
        rate = best_rate(done, (name,))
        runs = [done[name, rate, seed] for seed in range(seeds)]
        middle = next(i for i, row in enumerate(runs[0]) if row["step"] >= runs[0][-1]["step"] / 2)

        def of(index, key):
            centre, half = interval([rows[index][key] for rows in runs])
            return f"{centre:.3f} ± {half:.3f}"

        at = f"at {runs[0][middle]['step']}"
        swept = [f"{key[1]:g}: {rows[-1]['val_loss']:.3f} ({rows[middle]['starved']:.2f})"
                 for key, rows in sorted(done.items()) if key[0] == name and key[2] == 0]
        lines.append({"direction": name, "best rate": rate, "val_loss": of(-1, "val_loss"),
                      f"starved {at}": of(middle, "starved"), f"for good {at}": of(middle, "for good"),
                      "starved at the end": of(-1, "starved"), f"sweep: loss (starved {at}), seed 0": ", ".join(swept)})
    return lines


def draw(done: dict[tuple, list], seeds: int) -> Figure:
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    starved, loss, rates = figure.subplots(1, 3)
    for i, name in enumerate(RULES):
        look, best = style(i, len(RULES)), best_rate(done, (name,))
        runs = [done[name, best, seed] for seed in range(seeds)]
        steps = [row["step"] for row in runs[0]]
        for axes, key in ((starved, "starved"), (loss, "val_loss")):
            values = [[row[key] for row in rows[1:]] for rows in runs]
            for one in values:
                axes.plot(steps[1:], one, color=look["color"], linewidth=0.6, alpha=0.5)
            axes.plot(steps[1:], [sum(column) / seeds for column in zip(*values)], label=f"{name}, {best:g}", **look)
        swept = sorted((key[1], rows[-1]["val_loss"]) for key, rows in done.items() if key[0] == name and key[2] == 0)
        rates.semilogx(*zip(*swept), label=name, **look)
    starved.set(title="Neurons with leverage below n / 10m", xlabel="step", ylabel="fraction", ylim=(0, None))
    loss.set(title=f"Validation loss, {seeds} seeds and their mean", xlabel="step", ylabel="nats a token")
    rates.set(title="Sweep, seed 0", xlabel="matrix_lr", ylabel="final validation loss")
    tried = sorted({key[1] for key in done})
    rates.set_xticks(tried, [f"{rate:g}" for rate in tried])
    rates.minorticks_off()
    for axes in (starved, loss, rates):
        axes.grid(alpha=0.3)
    starved.legend()
    return figure


def paragraph(summary: list[dict], hp: train_gpt.Hyperparameters, seeds: int) -> str:
    direction, rate, loss, starved, for_good, *_ = summary[0]
    found = "; ".join(f"{line[direction]} {line[starved]} (for good {line[for_good]}), {rate} {line[rate]:g}, "
                      f"final loss {line[loss]}" for line in summary)
    return f"""
        The paper's figure 5 has more than 25% of the MLP neurons of a 340M model dead by step 500 of Muon, for good;
        its thresholds were not to be had. Here: {hp.num_layers} layers, {hp.model_dim} wide, {hp.mlp_dim} neurons
        each, {hp.train_steps} steps of {hp.batch_tokens} tokens, without Contra-Muon and the floor, so that directions
        alone differ, each with its publication's polar routine; the best learning rate of the sweep on seed 0; mean of
        {seeds} seeds (a seed sets the initial weights, not the data) and 95% intervals of Student's t. Fraction
        of neurons whose momentum has a leverage score below .1 n/m ({starved}): {found}. Starved is not silent:
        a leverage score says how small a neuron's part of the update is, not that it never fires."""


def main(words: list[str]):
    args = parse("neuron_death", __doc__, words, trains=True)
    large = device().type == "cuda" and not args.quick
    words = [*(GPT2_SMALL if large else [*SMALL, *FULL]), *QUICK * args.quick, *args.overrides]
    rates, seeds = ([0.02], 2) if args.quick else ([0.005, 0.01, 0.02, 0.04], 3)
    hp = train_gpt.override(words)
    shards_of(hp)
    done = sweep(partial(run, words), [(name,) for name in RULES], rates, seeds)
    summary = summarise(done, seeds)
    publish("neuron_death", args, [row for rows in done.values() for row in rows], draw(done, seeds),
            paragraph(summary, hp, seeds), summary)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"studies.neuron_death: {error}")
