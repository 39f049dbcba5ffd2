"""The neurons of a run, from what `train_gpt.py --neurons K` writes beside its log: who takes part, and who is dead.

A neuron is a row of an MLP's fc, and of its gate where there is one. By the Aurora paper (arXiv 2606.27715) a neuron is
dead whose gradient is low, whose update is low, and which stays so. It gives no numbers; here a row is low at 0.1 of
its layer's mean or less, and stays so if it is low at every record of the second half of the run. Beside these two
norms stands the leverage score of the momentum, whose square root is the length of the neuron's row in Muon's update:
a score of 0.1 of the mean is a row of a third of the usual length.
"""

import json
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from records.log import put

TEXT_BYTES = 2**30  # of a file, at most: GPT-2 small with --neurons 4
CRITERIA = ("leverage", "gradient", "update")


@dataclass(frozen=True)
class Look:
    """One matrix at one step: a number for each neuron in each of the four lists."""

    seed: int
    step: int
    layer: int
    matrix: str  # "fc" or "gate"
    inputs: int  # n of the (m, n) matrix
    leverage: list[float]
    momentum: list[float]
    gradient: list[float]
    update: list[float]

    def mean(self, criterion: str) -> float:
        """Of the rows; of leverage scores it is n / m by definition, 1 if wide."""
        if criterion == "leverage":
            return min(1, self.inputs / len(self.leverage))
        return fmean(getattr(self, criterion))

    def cv(self, criterion: str) -> float:
        mean = self.mean(criterion)
        return pstdev(getattr(self, criterion)) / mean if mean else 0.0

    def low(self, criterion: str, below: float) -> set[int]:
        """The neurons at `below` times the mean or less."""
        bound = below * self.mean(criterion)
        return {i for i, value in enumerate(getattr(self, criterion)) if value <= bound}


def read(log: str) -> list[Look]:
    """What stands beside the log `log`, from the first momentum on; stderr says where the file is cut off."""
    path = Path(log) if log.endswith(".gz") else Path(log).with_suffix(".neurons.jsonl.gz")
    if not path.is_file():
        raise ValueError(f"{path}: no such file: train_gpt.py --neurons K writes it, every K steps")
    if path.stat().st_size > TEXT_BYTES:
        raise ValueError(f"{path} is larger than {TEXT_BYTES >> 20} MiB")
    looks, rest, room = [], path.read_bytes(), TEXT_BYTES
    try:
        while rest:
            member = zlib.decompressobj(wbits=31)  # gzip; one a step
            text = member.decompress(rest, room)
            room -= len(text)
            if room <= 0:  # a few bytes may become any number
                raise ValueError(f"more than {TEXT_BYTES >> 20} MiB of text")
            if not member.eof:
                print(f"{path} is cut off after {len(looks)} records", file=sys.stderr)
                break
            looks += [Look(**json.loads(line)) for line in text.splitlines()]
            rest = member.unused_data
    except (zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what train_gpt.py --neurons writes: {error}") from None
    looks = [look for look in looks if any(look.momentum)]  # none yet in the first two steps
    if not looks:
        raise ValueError(f"{path} holds no whole record of a step with a gradient: let the run go on")
    return looks


def half(looks: list[Look]) -> int:
    """The first step of the second half of the records."""
    steps = sorted({look.step for look in looks})
    return steps[len(steps) // 2]


def persistent(looks: list[Look], since: int, below: float = 0.1) -> dict:
    """{(seed, layer, matrix): {criterion: neurons that are low at every record from step `since` on}}."""
    low = {}
    for look in looks:
        if look.step >= since:
            always = low.setdefault((look.seed, look.layer, look.matrix), {})
            for criterion in CRITERIA:
                now = look.low(criterion, below)
                always[criterion] = always.get(criterion, now) & now
    return low


def dead(low: dict) -> dict:
    """{(seed, layer): neurons whose gradient and update are both persistently low, in gate and fc}."""
    neurons = {}
    for (seed, layer, _), always in low.items():
        both = always["gradient"] & always["update"]
        neurons[seed, layer] = neurons.get((seed, layer), both) & both
    return neurons


def table(looks: list[Look], since: int, below: float = 0.1) -> str:
    """A line for each matrix: row-norm CVs at the last record, and what share of the neurons is low; seeds pooled."""
    low = persistent(looks, since, below)
    gone = dead(low)
    last = {(look.seed, look.layer, look.matrix): look for look in looks}  # a later one of a matrix wins
    seeds = sorted({seed for seed, _, _ in low})
    lines = [f"CV: of the row norms at step {looks[-1].step}. Low: % of the neurons at {below:g} of the layer's mean",
             f"or less, at that step and at every record from step {since} on. Dead: gradient and update,",
             f"from then on, in every matrix of the layer. Seeds: {', '.join(map(str, seeds))}", "",
             "              CV                        low               low from then on",
             "layer matrix  momentum gradient update  leverage grad  upd  leverage grad  upd  dead"]
    for layer, matrix in sorted({key[1:] for key in low}):
        keys = [(seed, layer, matrix) for seed in seeds if (seed, layer, matrix) in low]
        neurons = sum(len(last[key].leverage) for key in keys)

        def percent(sets) -> float:
            return 100 * sum(map(len, sets)) / neurons

        cvs = [fmean(last[key].cv(name) for key in keys) for name in ("momentum", "gradient", "update")]
        now = [percent(last[key].low(name, below) for key in keys) for name in CRITERIA]
        always = [percent(low[key][name] for key in keys) for name in CRITERIA]
        percents = "{:8.1f} {:4.1f} {:4.1f}  {:8.1f} {:4.1f} {:4.1f}  {:4.1f}".format(
            *now, *always, percent(gone[seed, layer] for seed, _, _ in keys))
        lines.append("{:5} {:6}  {:8.3f} {:8.3f} {:6.3f}  {}".format(layer, matrix, *cvs, percents))
    return "\n".join(lines)


def draw(looks: list[Look], path: Path, since: int, below: float = 0.1):
    """For each kind of matrix: how leverage scores spread over time, where they are low, and who stays low."""
    from matplotlib.figure import Figure  # needed here alone
    kinds = sorted({look.matrix for look in looks})
    figure = Figure(figsize=(15, 4.2 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 3, squeeze=False)
    for row, kind in zip(axes, kinds):
        of_kind = [look for look in looks if look.matrix == kind]
        draw_spread(row[0], of_kind, kind, below)
        draw_low(row[1], of_kind, kind, below)
        draw_persistent(row[2], looks, kind, since, below)
    put(path, lambda beside: figure.savefig(beside, format=path.suffix[1:] or "png", dpi=110))


def grouped(looks: list[Look], *names: str) -> dict:
    groups = defaultdict(list)
    for look in looks:
        groups[tuple(getattr(look, name) for name in names)].append(look)
    return groups


def draw_spread(axis, looks: list[Look], kind: str, below: float):
    import numpy as np
    by_step = sorted(grouped(looks, "step").items())
    edges = np.logspace(-3, np.log10(max(1.5, max(len(look.leverage) / look.inputs for look in looks))), 49)
    columns = []
    for _, same in by_step:
        ratio = np.concatenate([np.divide(look.leverage, look.mean("leverage")) for look in same])
        columns.append(np.histogram(ratio.clip(edges[0], edges[-1]), edges)[0] / len(ratio))
    steps = [step for (step,), _ in by_step]
    mesh = axis.pcolormesh(steps, (edges[1:] * edges[:-1]) ** 0.5, np.transpose(columns), cmap="cividis",
                           shading="nearest", rasterized=True)
    axis.axhline(below, color="white", linestyle="--", linewidth=1)
    axis.set(yscale="log", xlabel="step", ylabel="leverage score / mean", title=f"{kind}: leverage scores, all layers")
    axis.figure.colorbar(mesh, ax=axis, label="share of neurons")


def draw_low(axis, looks: list[Look], kind: str, below: float):
    by_layer = grouped(looks, "layer", "step")
    layers, steps = (sorted(set(values)) for values in zip(*by_layer))
    share = [[fmean(len(look.low("leverage", below)) / len(look.leverage) for look in by_layer[layer, step])
              for step in steps] for layer in layers]
    mesh = axis.pcolormesh(steps, layers, share, cmap="cividis", shading="nearest", vmin=0, rasterized=True)
    axis.set(xlabel="step", ylabel="layer", yticks=layers, title=f"{kind}: leverage at {below:g} of the mean or less")
    axis.figure.colorbar(mesh, ax=axis, label="share of neurons")


def draw_persistent(axis, looks: list[Look], kind: str, since: int, below: float):
    low = persistent(looks, since, below)
    neurons = {look.layer: len(look.leverage) for look in looks}
    layers = sorted(neurons)
    series = [(name, [fmean(len(always[name]) / neurons[layer] for key, always in low.items()
                            if key[1:] == (layer, kind)) for layer in layers]) for name in CRITERIA]
    gone = dead(low)
    series.append(("dead", [fmean(len(lost) / neurons[layer] for key, lost in gone.items() if key[1] == layer)
                            for layer in layers]))
    for (name, share), style in zip(series, ("s:", "^--", "v-.", "o-")):
        axis.plot(layers, share, style, label=name, color="black" if name == "dead" else None,
                  markerfacecolor="black" if name == "dead" else "white")
    axis.set(xlabel="layer", xticks=layers, ylabel="share of neurons", ylim=(0, None),
             title=f"{kind}: low at every record from step {since} on")
    axis.legend()


def neurons(log: str, output: str | None):
    """Print the table, and draw the picture into `output`."""
    looks = read(log)
    since = half(looks)
    print(table(looks, since))
    if output:
        draw(looks, Path(output), since)
        print(f"picture: {output}")
