"""What the studies share: their command line, and how they publish a table, a picture and a paragraph."""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

import results

RESULTS = Path(__file__).parent / "results"
RULES = {  # of those that train: each with its publication's polar routine, without Contra-Muon and the floor
    "muon": "nesterov(0.95) | polar | aspect | step",
    "normuon": "nesterov(0.95) | jordan_polar | normuon(0.95) | aspect | step",
    "u_normuon": "nesterov(0.95) | polar | u_normuon | aspect | step",
    "aurora": "nesterov(0.95) | aurora(2, 0.5) | aspect | step",
}


def parse(name: str, description: str, words: list[str], trains: bool = False) -> argparse.Namespace:
    """`quick`, `out` (a folder) and `overrides`, of train_gpt.py's hyperparameters where the study trains."""
    parser = argparse.ArgumentParser(prog=f"python -m studies.{name}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if trains:
        parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="hyperparameters of train_gpt.py")
    parser.add_argument("--quick", action="store_true", help="a minute at most, to see that it runs: not a result")
    parser.add_argument("-o", dest="out", metavar="FOLDER", type=Path, help="default: studies/results")
    args = parser.parse_intermixed_args(words)
    if args.quick and args.out is None:
        parser.error("--quick is not a result: name a folder for it with -o")
    args.out = args.out or RESULTS
    args.overrides = args.overrides if trains else []
    return args


def publish(name: str, args: argparse.Namespace, rows: list[dict], figure: Figure, paragraph: str,
            summary: list[dict] | None = None):
    """Write NAME.csv (the rows), NAME.png and NAME.md (the paragraph and the summary, or the rows)."""
    results.publish(f"studies.{name}", [*["--quick"] * args.quick, *args.overrides], args.out,
                    " ".join(paragraph.split()), results.markdown(summary or rows), rows=rows, figure=figure)


def style(index: int, of: int) -> dict:
    """Line `index` of a plot with `of` lines: told apart by colour, also in grey, by dashes and by marker."""
    return dict(color=matplotlib.colormaps["cividis"](index / max(1, of - 1) * 0.85), marker="osD^vXP*<>"[index % 10],
                linestyle=("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[index % 5], markersize=5)
