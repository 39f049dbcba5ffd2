"""`report`: one HTML page, readable from disk without a network: leaderboard, curves, tables. Charts are plotly's."""

import textwrap
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from records import leaderboard, published
from records.log import load, put
from records.recipes import RECORDS, recipes, rule
from records.sample import Sample, from_logs, from_published, groups
from records.statistics import mean_crossing

# Okabe and Ito's colours; a dash tells apart what shares one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot")
FIRST_SHOWN = {6, 17, 36, 40}  # of the published curves: the first baseline of 20, ours, the tuned one, a late one
HOW_TO = """Click a name to switch its curve on or off, drag to zoom, double-click to zoom out. Bold: mean over the
runs; faint: single runs."""
TICKS = [2700, 3000, 3500, 4000, 5000, 6000, 8000]
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: left; }
td.number, th.number { text-align: right; }
th { cursor: pointer; }
th[aria-sort=ascending]::after { content: " \\25B2"; } th[aria-sort=descending]::after { content: " \\25BC"; }"""
SORT = """document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  head.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].textContent;
  const order = (a, b) => value(a).localeCompare(value(b), "en", {numeric: true});
  [...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)).forEach(row => body.append(row));
}));"""


def report(names: list[str], path: str, metric: str | None = None) -> None:
    """Write the page on the logs that `names` mean, by default those in records/, and on the published results."""
    logs = load(names or [str(RECORDS)], metric)
    own = [from_logs(short_name(group[0].path), group) for group in groups(logs)]
    own = [sample for sample in own if sample.moments]
    parts = ["<h1>Steps to the target loss</h1>", progress_chart().to_html(full_html=False, include_plotlyjs=True),
             "<h2>Validation loss</h2>", f"<p>{HOW_TO}</p>"]
    by_target: dict[float, list[Sample]] = {}
    for sample in own + [from_published(record) for record in published.results()]:
        by_target.setdefault(sample.target, []).append(sample)
    parts += [curves(samples, target).to_html(full_html=False, include_plotlyjs=False)
              for target, samples in sorted(by_target.items(), reverse=True)]
    parts += ["<h2>Runs</h2>", own_table(logs), "<h2>Recipes</h2>", recipe_table(),
              "<h2>Published results</h2>", published_table()]
    page = (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Steps to the target loss</title>'
            f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>\n'
            + "\n".join(parts) + f"\n<script>{SORT}</script></body></html>\n")
    put(path, lambda beside: beside.write_text(page, encoding="utf-8"))


def short_name(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def progress_chart() -> go.Figure:
    """Claimed steps in the order of acceptance, and the record of the day."""
    rows = published.results().values()
    hover = [f"#{row.record}: {row.summary}<br>{row.step} steps, {row.mean:.4f} (n={row.n})" for row in rows]
    best = [row for row in rows if row.world_record]
    figure = go.Figure([
        go.Scatter(x=[row.record for row in rows], y=[row.step for row in rows], mode="markers", name="accepted",
                   text=hover, hoverinfo="text", marker={"color": COLOURS[0], "symbol": "circle-open", "size": 9}),
        go.Scatter(x=[row.record for row in best], y=[row.step for row in best], mode="lines+markers", name="record",
                   line={"shape": "hv", "color": COLOURS[1]}, hoverinfo="skip")])
    figure.update_layout(template="plotly_white", height=380, xaxis_title="published result",
                         yaxis={"title": "steps to 3.28", "type": "log", "tickvals": TICKS}, margin={"t": 20})
    return figure


def curves(samples: list[Sample], target: float) -> go.Figure:
    """All curves with one target: the whole run, and a zoom on the crossing."""
    figure = make_subplots(1, 2, subplot_titles=("whole run", f"around {target:g}"), horizontal_spacing=0.07)
    drawn = [sample for sample in samples if sample.source is not None or int(sample.name[1:]) in FIRST_SHOWN]
    for k, sample in enumerate(drawn + [sample for sample in samples if sample not in drawn]):
        shown = k < len(drawn)
        line = {"color": COLOURS[k % len(COLOURS)], "dash": DASHES[(k + k // 12) % len(DASHES)]}
        for column in (1, 2):
            for trace in traces(sample, line, column == 1):
                figure.add_trace(trace.update(visible=True if shown else "legendonly"), 1, column)
    ends = [step for sample in drawn for step in around_target(sample)]
    last = max(max(sample.moments) for sample in drawn)
    left, right = min(ends) - 0.06 * last, max(ends) + 0.06 * last
    falls = [at.mean for sample in drawn for step, at in sample.moments.items() if step >= 0.1 * last]
    near = [at.mean for sample in drawn for step, at in sample.moments.items() if left <= step <= right]
    low = min(*near, target) - 0.002
    high = min(max(*near, target), target + 4 * (target - low)) + 0.002
    figure.add_hline(y=target, line={"dash": "dot", "width": 1, "color": "black"})
    figure.update_xaxes(title="step", range=[0, last], col=1)
    figure.update_yaxes(title="validation loss", range=[min(*falls, target) - 0.02, max(falls)], col=1)
    figure.update_xaxes(title="step", range=[left, right], col=2)
    figure.update_yaxes(range=[low, high], col=2)
    figure.update_layout(template="plotly_white", height=560, margin={"t": 40}, legend={"groupclick": "togglegroup"})
    return figure


def around_target(sample: Sample) -> list[float]:
    """Where the mean crosses the target, or else its last step; and the earliest step to pass."""
    places = mean_crossing(sample.moments, sample.target).step or max(sample.moments), sample.earliest()
    return [step for step in places if step is not None]


def traces(sample: Sample, line: dict, in_legend: bool) -> list[go.Scatter]:
    """The mean, and every run where its own curve is known; all switched by one name in the legend."""
    steps = list(sample.moments)
    hover = [f"{sample.name}, step {step}: {at.mean:.5f}" + (f" (sd {at.sd:.5f})" if at.sd is not None else "")
             + f", n={at.n}" for step, at in sample.moments.items()]
    runs = [go.Scatter(x=list(trial.losses), y=list(trial.losses.values()), mode="lines", showlegend=False,
                       legendgroup=sample.name, opacity=0.3, line=line | {"width": 0.7, "dash": "solid"},
                       hoverinfo="skip") for trial in sample.used]
    name = sample.name + f" ({sample.metric})" * (sample.metric != "val_loss")
    if sample.source is None:
        name += " " + textwrap.shorten(published.result(int(sample.name[1:])).summary, 26, placeholder=" ...")
    mean = go.Scatter(x=steps, y=[at.mean for at in sample.moments.values()], mode="lines", name=name,
                      legendgroup=sample.name, showlegend=in_legend, line=line | {"width": 2.5}, text=hover,
                      hoverinfo="text")
    return [*runs, mean]


def own_table(logs: list) -> str:
    rows = []
    for group in groups(logs):
        row = leaderboard.describe(group)
        used = row["used"] > 0
        rows.append([short_name(row["first"]), row["program"], row["device"], row["runs"], row["used"],
                     row["step"] if used else "", f"{row['mean']:.5f}" if used else "",
                     leaderboard.RULE[row["passes"]] if used else "", f"{row['target']:g}" if used else "",
                     row["note"]])
    return table(["first log", "program", "device", "runs", "used", "step", "mean", "rule", "target", "note"], rows)


def recipe_table() -> str:
    return table(["recipe", "update rule of the matrices"], [[name, rule(name)] for name in recipes()])


def published_table() -> str:
    rows = [[f"{row.record}", row.step, f"{row.mean:.4f}", row.n, "yes" if row.world_record else "", row.date,
             row.pull_request, row.summary] for row in published.results().values()]
    return table(["#", "steps", "mean", "n", "record then", "date", "PR", "what it is"], rows)


def table(head: list[str], rows: list[list]) -> str:
    numeric = [bool(rows) and all(str(row[k]).replace(".", "").isdigit() for row in rows) for k in range(len(head))]
    marks = [' class="number"' if number else "" for number in numeric]
    cells = "".join(f"<th{mark}>{escape(name)}</th>" for mark, name in zip(marks, head))
    body = "\n".join("<tr>" + "".join(f"<td{mark}>{escape(str(cell))}</td>" for mark, cell in zip(marks, row)) + "</tr>"
                     for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
