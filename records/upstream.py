"""`leaderboard`: the published figures, from a newer checkout of upstream's track 3.

    git clone https://github.com/KellerJordan/modded-nanogpt
    python -m records leaderboard modded-nanogpt/records/track_3_optimization/README.md
"""

import csv
import io
import os
import re
from datetime import date
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from records import published
from records.log import Trial, drop_repeats, interpret, read_bytes
from records.published import Result
from records.sample import from_published
from records.statistics import Moments

# Between a mean in the table, which has four digits, and that of its logs: #8's are .00018 apart.
TOLERANCE = 2e-4
LOSSES = re.compile(rb"^step:\d+/\d+ (?:.* )?(\w*loss):", re.MULTILINE)
MOMENTS, TABLE = "track3_curves.csv", "track3_records.csv"


class Figures(NamedTuple):
    """The runs of a result that were read from its logs, of one schedule and one of their losses."""

    metric: str
    train_steps: int
    trials: list[Trial]

    def moments(self) -> dict[int, Moments]:
        steps = sorted({step for trial in self.trials for step in trial.losses})
        return {step: Moments.of([trial.losses[step] for trial in self.trials if step in trial.losses])
                for step in steps}

    def device(self) -> str:
        return ", ".join(sorted({trial.short_device for trial in self.trials} - {""}))


def update(name: str) -> dict:
    """Bring records/published up to the table in `name`; the verdict is that every row of it could be taken.

    Rows that are new or changed are taken, those that are gone are dropped. The figures of a row are read from its logs
    where there are none yet, or where those that there are do not have the claimed mean and number of runs, and the
    logs do. ValueError, and no file touched, where `name` is no such table.
    """
    path = Path(name) / "README.md" if Path(name).is_dir() else Path(name)
    rows, unread = read_table(path)
    old = published.results()
    gone = [record for record in old if record not in rows and record not in unread]
    if not rows or 2 * len(gone) > len(old):
        raise ValueError(f"{path} is not upstream's records/track_3_optimization/README.md: its table has "
                         f"{len(old) - len(gone)} of the {len(old)} results that are known")
    results = {record: row for record, row in old.items() if record not in gone}
    read_anew: dict[int, Figures | None] = dict.fromkeys(gone)
    changes, remarks = [f"gone: {say(old[record])}" for record in gone], []
    for record, (row, log) in sorted(rows.items()):
        known = old.get(record)
        row = row._replace(summary=known.summary, metric=known.metric, device=known.device) if known else row
        if not known or not fits(row, from_published(record).moments):
            figures = read_figures(log, row)
            if not known and not figures:
                unread[record] = f"left out: #{record}: there is no log of it at {log}"
                continue
            fitting = figures and fits(row, figures.moments())
            if fitting or not known:
                row, read_anew[record] = row._replace(metric=figures.metric, device=figures.device()), figures
            if not fitting:
                remarks.append(mismatch(row, figures))
        results[record] = row
        if not known:
            changes.append(f"new: {say(row)}")
        elif row != known:
            changes.append(f"changed: #{record}: " + ", ".join(
                f"{field} {was} -> {now}" for field, was, now in zip(Result._fields, known, row) if was != now))
        elif record in read_anew:
            changes.append(f"figures: #{record}: those of its logs, which now have what it claims")
    files = write(results, read_anew)
    return {"verdict": not unread, "changes": changes, "left_out": list(unread.values()), "remarks": remarks,
            "files": files}


def text(result: dict) -> str:
    lines = [*result["changes"], *result["left_out"], *result["remarks"]]
    if any(change.startswith("new:") for change in result["changes"]):
        lines.append(f"the words on new results are upstream's: put your own into {published.FOLDER / TABLE}")
    files = ", ".join(result["files"])
    said = f"written to {published.FOLDER}: {files}; its README.md names the commit of what was there before"
    return "\n".join([*lines, said if files else "nothing has changed"])


def say(row: Result) -> str:
    mark = "!" * row.world_record
    return f"#{row.record}: {row.step}{mark} steps, {row.mean:.4f} (n={row.n}), {row.date}, {row.summary}"


def mismatch(row: Result, figures: Figures | None) -> str:
    at = figures and figures.moments().get(row.step)
    found = f"{at.mean:.4f} (n={at.n})" if at else "none there"
    return f"look: #{row.record} claims {row.mean:.4f} (n={row.n}) at step {row.step}, its logs have {found}"


def fits(row: Result, moments: dict[int, Moments]) -> bool:
    at = moments.get(row.step)
    return at is not None and at.n == row.n and abs(at.mean - row.mean) < TOLERANCE


########################################
#                Table                 #
########################################

def read_table(path: Path) -> tuple[dict[int, tuple[Result, Path]], dict[int, str]]:
    """{record: its row, its log} of upstream's table, and {record: what is wrong with its row} of those that cannot be
    read. The row's summary is upstream's description, shortened."""
    rows, wrong = {}, {}
    lines = read_bytes(path).decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not re.match(r"\| *\d{1,6} *\|", line):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        record = int(cells[0])
        try:
            if record in rows or record in wrong:
                rows.pop(record, None)
                raise ValueError(f"number {record} is there twice")
            rows[record] = read_row(cells, path.parent)
        except ValueError as error:
            wrong[record] = f"left out: {path}:{number}: {error}"
    return rows, wrong


def read_row(cells: list[str], folder: Path) -> tuple[Result, Path]:
    if len(cells) != 7:
        raise ValueError(f"{len(cells)} cells, and a row has 7")
    number, steps, evidence, description, day, link, people = cells
    step, claim = re.match(r"[1-9]\d{,5}(?!\d)", steps), re.match(r"(\d\.\d+) *\(n=([1-9]\d{,4})\)", evidence)
    log = re.search(r"\[log\]\((results/[^)]+)\)", link)
    when = re.fullmatch(r"(\d{4})/(\d\d)/(\d\d)", day)
    for found, what in ((step, f"no step in {steps[:40]!r}"), (claim, f"no mean (n=...) in {evidence[:40]!r}"),
                        (log, f"no [log](results/...) in {link[:40]!r}"), (when, f"no date YYYY/MM/DD in {day[:40]!r}")):
        if not found:
            raise ValueError(what)
    path = folder / log[1]
    if not path.resolve().is_relative_to((folder / "results").resolve()):
        raise ValueError(f"the log {log[1]} is not below results/")
    pull_request = re.search(r"/pull/(\d+)", people)
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", description)
    row = Result(int(number), int(step[0]), float(claim[1]), int(claim[2]), "(!)" in steps,
                 date(*map(int, when.groups())).isoformat(), pull_request[1] if pull_request else "",
                 shorten(plain, 60, placeholder=" ..."), "val_loss", "")
    return row, path


########################################
#               Figures                #
########################################

def read_figures(log: Path, row: Result) -> Figures | None:
    """The runs in the logs of a row: those of the loss, schedule and device that have what it claims, or else the most
    runs; None where there is no log.

    As upstream's make_figures.py reads them: the log that is named, or where that is in a folder of its own, every .txt
    of the folder; if none of these is a log, those of folders below.
    """
    folder = log.parent
    places = [[log]] if folder.name == "results" else [sorted(folder.glob("*.txt")), sorted(folder.rglob("*.txt"))]
    found: dict[tuple, list[Trial]] = {}
    for metric, trial in next(filter(None, map(read_trials, places)), []):
        for kind in ((metric, trial.train_steps, None), (metric, trial.train_steps, trial.device)):
            found.setdefault(kind, []).append(trial)
    figures = [Figures(metric, train_steps, trials) for (metric, train_steps, _), trials in found.items()]
    return max(figures, default=None, key=lambda each: (
        fits(row, each.moments()), each.metric == "val_loss", len(each.trials)))


def read_trials(paths: list[Path]) -> list[tuple[str, Trial]]:
    """The runs with their losses of one name, and again with those of each other, in the logs among these files."""
    files = {path: read_bytes(path) for path in paths if path.is_file()}
    found = []
    for metric in sorted({name.decode() for content in files.values() for name in LOSSES.findall(content)}):
        logs = []
        for path, content in files.items():
            try:
                logs.append(interpret(str(path), content, metric))
            except ValueError:  # metadata and standard output
                continue
        drop_repeats(logs)
        found += [(metric, trial) for log in logs for trial in log.trials if trial.losses and not trial.fault]
    return found


########################################
#                Files                 #
########################################

def write(results: dict[int, Result], read_anew: dict[int, Figures | None]) -> list[str]:
    """The names of the files that are written; where figures are None, a result loses its own."""
    files: dict[str, str | None] = {TABLE: table_of(results), MOMENTS: moments_of(read_anew)}
    for record, figures in read_anew.items():
        files[f"record_{record:02}_curves.csv"] = curves_of(figures) if figures else None
    written = put_all(files)
    published.forget()  # the reference is made of what is there now
    return written + put_all({"reference.csv": published.references()})


def content(name: str) -> str | None:
    path = published.FOLDER / name
    return path.read_bytes().decode() if path.exists() else None


def put_all(files: dict[str, str | None]) -> list[str]:
    """Write those files of records/published that differ, all or none; None removes one. Their names."""
    files = {name: text for name, text in files.items() if text != content(name)}
    beside = {name: published.FOLDER / f"{name}.part" for name in files}
    try:
        for name, text in files.items():
            if text is not None:
                beside[name].write_bytes(text.encode())
        for name, text in files.items():
            if text is None:
                (published.FOLDER / name).unlink()
            else:
                os.replace(beside[name], published.FOLDER / name)
    except OSError:
        for path in beside.values():
            path.unlink(missing_ok=True)
        raise
    return list(files)


def table_of(results: dict[int, Result]) -> str:
    """Its columns are the fields of `Result`, in their order."""
    file = io.StringIO(content(TABLE).splitlines(keepends=True)[0], newline="")
    file.seek(0, io.SEEK_END)
    csv.writer(file).writerows([*row[:4], int(row.world_record), *row[5:]] for _, row in sorted(results.items()))
    return file.getvalue()


def moments_of(read_anew: dict[int, Figures | None]) -> str:
    """The table of moments, with those that were read anew in place of what was there."""
    head, *lines = content(MOMENTS).splitlines(keepends=True)
    lines = [line for line in lines if int(line.split(",")[0]) not in read_anew]
    for record, figures in read_anew.items():
        for step, at in figures.moments().items() if figures else ():
            losses = [trial.losses[step] for trial in figures.trials if step in trial.losses]
            sd, ends = "" if at.sd is None else f"{at.sd:.5f}", f"{min(losses)},{max(losses)}"
            lines.append(f"{record},{figures.train_steps},{step},{at.n},{at.mean:.5f},{sd},{ends}\r\n")
    return "".join([head, *sorted(lines, key=lambda line: int(line.split(",")[0]))])


def curves_of(figures: Figures) -> str:
    """Every run's own curve; `seed` is its place among the logs where these do not name one."""
    seeds = [trial.seed for trial in figures.trials]
    if None in seeds or len(set(seeds)) < len(seeds):
        seeds = range(1, len(seeds) + 1)
    return f"seed,step,{figures.metric}\n" + "".join(
        f"{seed},{step},{loss:.5f}\n"
        for seed, trial in zip(seeds, figures.trials) for step, loss in trial.losses.items())
