"""Gain over Muon against the width of the MLPs: validation loss of Muon less that of Aurora, and of U-NorMuon.

    python -m studies.expansion [--quick -o FOLDER] [NAME=VALUE ...]

The paper (arXiv 2606.27715, figure 11) has the gain grow with the expansion factor. Without a GPU a model of three
layers on bytes; with one GPT-2 small. NAME=VALUE overrides train_gpt.py's.
"""

import sys
from functools import partial

from matplotlib.figure import Figure

import train_gpt
from studies import RULES, parse, publish, style
from studies.training import GPT2_SMALL, SMALL, best_rate, device, interval, shards_of, sweep, training

NAMES = ["muon", "u_normuon", "aurora"]
EXPANSIONS = [1, 2, 4, 8]
FULL = ["model_dim=64", "head_dim=32", "num_layers=3", "train_steps=500", "val_every=500", "val_every_late=500"]
QUICK = ["model_dim=16", "head_dim=8", "num_layers=2", "train_steps=10", "val_tokens=1024", "val_every=10",
         "val_every_late=10"]


def run(words: list[str], direction: str, expansion: float, rate: float, seed: int) -> list[dict]:
    hp = train_gpt.override([f"matrix_update={RULES[direction]}", *words, f"mlp_expansion={expansion}",
                             f"matrix_lr={rate}"])
    return [dict(direction=direction, mlp_expansion=expansion, matrix_lr=rate, seed=seed, step=step, val_loss=loss)
            for step, loss, _ in training(hp, seed)]


def gains(done: dict[tuple, list], seeds: int) -> list[dict]:
    """Muon's loss less another's, each at its best rate: the mean over pairs of equal seeds and its 95% interval."""
    def losses(name, expansion):
        rate = best_rate(done, (name, expansion))
        return rate, [done[name, expansion, rate, seed][-1]["val_loss"] for seed in range(seeds)]

    lines = []
    for expansion in dict.fromkeys(key[1] for key in done):
        muon_rate, muon = losses("muon", expansion)
        for name in NAMES[1:]:
            rate, other = losses(name, expansion)
            gain, half = interval([a - b for a, b in zip(muon, other)])
            lines.append({"expansion": expansion, "direction": name, "gain over Muon": gain, "low": gain - half,
                          "high": gain + half, "n": seeds, "loss": sum(other) / seeds, "Muon's loss": sum(muon) / seeds,
                          "rate": rate, "Muon's rate": muon_rate})
    return lines


def draw(lines: list[dict]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(NAMES[1:]):
        mine = [line for line in lines if line["direction"] == name]
        axes.errorbar([line["expansion"] * (1 + 0.03 * i) for line in mine], [line["gain over Muon"] for line in mine],
                      yerr=[line["high"] - line["gain over Muon"] for line in mine], capsize=4, label=name,
                      **style(2 * i, 3))
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="MLP expansion factor", ylabel="Muon's validation loss less this one's, nats a token",
             title=f"Mean of {lines[0]['n']} seeds, 95% intervals", xticks=EXPANSIONS, xticklabels=EXPANSIONS)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def paragraph(lines: list[dict], hp: train_gpt.Hyperparameters, rates: list[float]) -> str:
    found = "; ".join(f"{name} " + ", ".join(
        f"{line['gain over Muon']:.3f} ({line['low']:.3f} to {line['high']:.3f}) at {line['expansion']}"
        for line in lines if line["direction"] == name) for name in NAMES[1:])
    return f"""
        The paper's figure 11 has Aurora's gain over Muon grow with the MLP's expansion factor. Here: {hp.num_layers}
        layers, {hp.model_dim} wide, {hp.train_steps} steps of {hp.batch_tokens} tokens, without Contra-Muon and the
        floor, so that directions alone differ; each direction at each factor has the best on seed 0 of the learning
        rates {', '.join(f'{rate:g}' for rate in rates)}. Muon's validation loss less the other's, mean of
        {lines[0]['n']} seeds and 95% interval of Student's t over pairs of equal seeds (a seed sets the initial
        weights, not the data): {found}. At factor 1 the MLP's matrices are square: Aurora is Muon there, to the bit."""


def main(words: list[str]):
    args = parse("expansion", __doc__, words, trains=True)
    large = device().type == "cuda" and not args.quick
    words = [*(GPT2_SMALL if large else [*SMALL, *FULL]), *QUICK * args.quick, *args.overrides]
    rates, seeds, expansions = ([0.01], 2, EXPANSIONS[::2]) if args.quick else ([0.005, 0.01, 0.02], 4, EXPANSIONS)
    hp = train_gpt.override(words)
    shards_of(hp)
    done = sweep(partial(run, words), [(name, factor) for name in NAMES for factor in expansions], rates, seeds)
    lines = gains(done, seeds)
    publish("expansion", args, [row for rows in done.values() for row in rows], draw(lines),
            paragraph(lines, hp, rates), lines)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"studies.expansion: {error}")
