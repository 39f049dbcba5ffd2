"""`plot`: every run faint, the mean bold, the target, a zoom on the crossing; published results as background."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from records.log import put
from records.program import UPSTREAM_TARGET
from records.sample import Sample
from records.statistics import mean_crossing

# Okabe and Ito's colours, told apart by the colour-blind, in an order of falling and rising lightness; in greyscale the
# style of the line tells them apart.
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#000000", "-."), ("#E69F00", ":"),
          ("#009E73", (0, (5, 1, 1, 1, 1, 1))), ("#CC79A7", (0, (8, 2))))
GREY = "0.6"


def plot(sets: list[Sample], background: list[Sample], path: str) -> None:
    """Write the picture, the whole run beside a zoom, to a .png or .svg file. ValueError where there is nothing to draw
    or no way to."""
    if Path(path).suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: the file's ending says what to write, .png or .svg")
    check(sets, background)
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    whole, zoom = figure.subplots(1, 2)
    for axes in (whole, zoom):
        draw(axes, sets, background, sets[0].target)
    frame_whole(whole, sets, sets[0].target)
    frame_zoom(zoom, sets, sets[0].target)
    describe(whole, sets[0])
    save(figure, path)


def plot_apart(sets: list[Sample], background: list[Sample], folder: Path) -> None:
    """The two halves of `plot` as a submission has them: figure.png and zoomed_figure.png."""
    check(sets, background)
    for name, frame in (("figure", frame_whole), ("zoomed_figure", frame_zoom)):
        figure = Figure(figsize=(6.5, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
        draw(axes, sets, background, sets[0].target)
        frame(axes, sets, sets[0].target)
        describe(axes, sets[0])
        save(figure, folder / f"{name}.png")


def check(sets: list[Sample], background: list[Sample]) -> None:
    if len(sets) > len(STYLES):
        raise ValueError(f"{len(sets)} sets: more than {len(STYLES)} cannot be told apart in one picture")
    for sample in (*sets, *background):
        if not sample.moments:
            raise ValueError(f"{sample.name}: no run can be used")
    targets = {sample.target for sample in (*sets, *background)}
    if len(targets) > 1:
        raise ValueError(f"targets {sorted(targets)}: their losses are not of one kind")
    if len(metrics := {sample.metric for sample in (*sets, *background)}) > 1:
        raise ValueError(f"{' and '.join(sorted(metrics))}: these losses are not of one kind: --metric reads one")


def draw(axes: Axes, sets: list[Sample], background: list[Sample], target: float) -> None:
    for k, sample in enumerate(background):
        steps, means = zip(*((step, at.mean) for step, at in sample.moments.items()))
        style = STYLES[k % len(STYLES)][1]
        axes.plot(steps, means, color=GREY, linestyle=style, linewidth=1.5, label=label(sample), zorder=1)
        spread = [at.sd or 0 for at in sample.moments.values()]
        axes.fill_between(steps, [m - s for m, s in zip(means, spread)], [m + s for m, s in zip(means, spread)],
                          color=GREY, alpha=0.3, linewidth=0, zorder=0)
    for sample, (colour, style) in zip(sets, STYLES):
        for trial in sample.used:
            axes.plot(trial.losses.keys(), trial.losses.values(), color=colour, alpha=0.25, linewidth=0.6, zorder=2)
        steps, means = zip(*((step, at.mean) for step, at in sample.moments.items()))
        axes.plot(steps, means, color=colour, linestyle=style, linewidth=2.2, label=label(sample), zorder=4)
        if (claimed := sample.earliest()) is not None:
            axes.plot([claimed], [sample.moments[claimed].mean], color=colour, marker="o", markersize=7,
                      markeredgecolor="white", linestyle="none", zorder=5)
    axes.axhline(target, color="black", linewidth=0.8, linestyle=(0, (1, 1)), zorder=3)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("step")


def label(sample: Sample) -> str:
    claimed = sample.earliest()
    name = sample.name if len(sample.name) <= 40 else "..." + sample.name[-37:]
    return f"{name}, n={sample.n}" + (f", passes at {claimed}" if claimed is not None else "")


def describe(axes: Axes, sample: Sample) -> None:
    """Which loss it is, and whose the curves are."""
    axes.set_ylabel(f"{sample.metric}, nats a token" if sample.target == UPSTREAM_TARGET else sample.metric)
    axes.legend(fontsize=8, framealpha=1, edgecolor="white", loc="upper right")


def frame_whole(axes: Axes, sets: list[Sample], target: float) -> None:
    """The whole run without its first fall."""
    last = max(max(sample.moments) for sample in sets)
    late = [at.mean for sample in sets for step, at in sample.moments.items() if step >= 0.1 * last]
    low = min(min(late), target)
    axes.set_xlim(0, 1.01 * last)
    axes.set_ylim(low - 0.03 * (max(late) - low), max(late))
    axes.set_title("mean bold, runs faint, spread of published results grey", fontsize=9)


def frame_zoom(axes: Axes, sets: list[Sample], target: float) -> None:
    """The neighbourhood in which the sets meet the target."""
    last = max(max(sample.moments) for sample in sets)
    crossings = [mean_crossing(sample.moments, target).step or max(sample.moments) for sample in sets]
    centres = crossings + [step for sample in sets if (step := sample.earliest()) is not None]
    left, right = min(centres) - 0.04 * last, min(max(centres) + 0.04 * last, 1.01 * last)
    visible = [loss for sample in sets for losses in [trial.losses for trial in sample.used] or
               [{step: at.mean for step, at in sample.moments.items()}]
               for step, loss in losses.items() if left <= step <= right]
    margin = 0.1 * (max(*visible, target) - min(*visible, target)) or 0.01
    axes.set_xlim(left, right)
    axes.set_ylim(min(*visible, target) - margin, max(*visible, target) + margin)
    axes.annotate(f"target {target:g}", (left, target), xytext=(4, 3), textcoords="offset points", fontsize=8)
    axes.set_title("at the target; a dot is the earliest step to pass", fontsize=9)


def save(figure: Figure, path: str) -> None:
    put(path, lambda beside: figure.savefig(beside, metadata={"Date": None} if beside.suffix == ".svg" else None))
