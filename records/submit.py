"""`submit`: a result as upstream's reviewers ask for it: logs, program, README and figures in one folder.

Its rules: https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization
"""

import ast
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

from records import diff, lint, published, verify
from records.ledger import FAILED, FINISHED, Run, read_ledger
from records.log import Log, Trial, drop_repeats, load, read
from records.plot import plot_apart
from records.program import UPSTREAM_TARGET, parse, recipe, stages
from records.published import Result
from records.recipes import RECORDS, nearest, read_recipe, recipes, values
from records.sample import Sample, from_logs, from_published, mixture, progress, usable
from records.statistics import SCHEDULE_RATE, THRESHOLD, Claim, Moments, Pairwise, judge, pairwise

BLANK = "____"  # what a person is to fill in
NOT_COUNTED = "not_counted"  # a folder of its own: upstream's make_figures.py averages every .txt of the result's
UPSTREAM = "https://github.com/KellerJordan/modded-nanogpt"
SHARED_FACTS = "driver", "triton", "threads", "attention", "kernels", "newton_schulz", "update", "commit"


class LeftOut(NamedTuple):
    """A run of the program that the mean leaves out."""

    log: str
    seed: int | None
    loss: float | None  # at the claimed step
    why: str


def submit(names: list[str], name: str, place: str, base: str | None, against: int | None, tuning: list[int],
           hardware: str | None, ledgers: list[str]) -> tuple[dict, Path | None]:
    """The verdict of the rule, and the folder, which is made whole or not at all: None where no step passes.

    The sample is every run of the program: in the logs that are named, in others of the same folders, and those of
    which a sweep's ledger knows. The mean leaves out accidents, forks, the seeds `tuning`, seeds that have counted
    before, and other devices than those of the logs that are named; README lists them. ValueError where the runs are
    not one sample; `hardware` is a person's word on runs on several devices.
    """
    folder = free_folder(place, name)
    record = published.result(against) if against is not None else published.best()
    named = load(names)
    if why := mixture(named, []):
        raise ValueError(f"{why}: a submission is of one program")
    known = ledger_runs(ledgers, named)
    logs = [*named, *same_program(named, [run.log for _, run in known])]
    for line in drop_repeats(logs):
        print(line, file=sys.stderr)
    why = reasons(logs, {trial.device for log in named for trial in log.trials}, tuning)
    sample = from_logs(name, without(logs, why), ("devices",) if hardware else ())
    if sample.mixture:
        remedy = "; --hardware 'WHY' has README say so" * (" different devices: " in sample.mixture)
        raise ValueError(f"{sample.mixture}{remedy}")
    result = verify.verify(sample)
    if not result["verdict"]:
        return result, None
    left_out = leave_out(sample, logs, why, known, tuning)
    counted = [log for log in logs if any(among(trial, sample.used) for trial in log.trials)]
    readme = describe(folder.name, sample, result, counted, left_out, base, record, hardware)
    old = from_published(record.record, sample.metric)

    def write(folder: Path) -> None:
        copy(counted, folder)
        (folder / "train_gpt.py").write_bytes(counted[0].source)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        plot_apart([sample], [old] * ((old.metric, old.target) == (sample.metric, sample.target)), folder)
        if rest := [log for log in logs if log.trials and log not in counted]:
            (folder / NOT_COUNTED).mkdir()
            copy(rest, folder / NOT_COUNTED)

    put_folder(folder, write)
    return result, folder


def text(result: dict, folder: Path | None) -> str:
    if not folder:
        return f"{verify.text(result)}\nno folder is made: a submission is of runs that pass"
    blanks = (folder / "README.md").read_text(encoding="utf-8").count(BLANK)
    return f"{verify.sentence(result)}\n{folder}: {blanks} blanks of its README.md, {BLANK}, are yours to fill in"


########################################
#           Which runs count           #
########################################

def ledger_runs(paths: list[str], logs: list[Log]) -> list[tuple[str, Run]]:
    """What ledgers know of runs of the program in these logs, each beside the ledger's path."""
    hashes = {hashlib.sha256(log.source).hexdigest() for log in logs}
    return [(path, run) for path in paths for run in read_ledger(path).runs if run.source_sha256 in hashes]


def same_program(logs: list[Log], paths: list[str]) -> list[Log]:
    """The other logs of the program in these, from their folders and from `paths`; stderr names them."""
    seen, found = {Path(log.path).resolve() for log in logs}, []
    beside = sorted({path for log in logs for path in Path(log.path).parent.glob("*.txt")})
    for path in (*beside, *map(Path, paths)):
        if path.resolve() in seen or not path.is_file():
            continue
        seen.add(path.resolve())
        try:
            log = read(path)
        except (OSError, ValueError):  # other files of a folder
            continue
        if recipe(log.source) == recipe(logs[0].source):
            print(f"ran the same program: {path}", file=sys.stderr)
            found.append(log)
    return found


def reasons(logs: list[Log], devices: set[str], tuning: list[int]) -> dict[str, str]:
    """{name of a trial: why it does not count, whatever became of it}."""
    why, first = {}, {}
    results = usable([trial for log in logs for trial in log.trials])
    for log in sorted(logs, key=lambda log: Path(log.path).name):
        for trial in log.trials:
            if "partial" in log.facts:
                why[trial.name] = f"a fork: {log.facts['partial'][0]}"
            elif trial.seed in tuning:
                why[trial.name] = "its seed was used for tuning"
            elif trial.device not in devices:
                why[trial.name] = f"ran on {trial.device}"
            elif trial.seed is not None and (trial.diverged or among(trial, results)):
                earlier = first.setdefault(trial.seed, trial)
                if earlier is not trial:
                    why[trial.name] = f"its seed has counted, in {Path(earlier.name).name}"
    return why


def among(trial: Trial, trials: list[Trial]) -> bool:
    """Whether it is one of them: two runs without losses are equal, and yet two."""
    return any(trial is other for other in trials)


def without(logs: list[Log], why: dict[str, str]) -> list[Log]:
    kept = [Log(**vars(log) | {"trials": trials}) for log in logs
            if (trials := [trial for trial in log.trials if trial.name not in why])]
    if not kept:
        name, reason = next(iter(why.items()))
        raise ValueError(f"no run is left: {name}: {reason}")
    return kept


def leave_out(sample: Sample, logs: list[Log], why: dict[str, str], known: list[tuple[str, Run]],
              tuning: list[int]) -> list[LeftOut]:
    """Every run of the program that the mean at the claimed step leaves out. ValueError where a ledger has one that it
    should not leave out, and the log is gone."""
    step, runs = sample.earliest(), []
    for trial in (trial for log in logs for trial in log.trials):
        if not among(trial, sample.used) or step not in trial.losses:
            ended = trial.fault or (progress(trial) if step not in trial.losses else None)
            runs.append(LeftOut(Path(trial.name).name, trial.seed, trial.losses.get(step),
                                "; ".join(filter(None, [why.get(trial.name), ended])) or progress(trial)))
    here = {(Path(log.path).name, trial.seed) for log in logs for trial in log.trials}
    for path, run in known:
        if (Path(run.log).name, run.seed) in here:
            continue
        reason = f"{run.status}: {run.why}" * bool(run.why) or f"{run.status}, its log is not here"
        if run.fork:
            reason = f"a fork of {run.fork}"
        elif run.seed in tuning:
            reason = "its seed was used for tuning"
        elif run.status in (FINISHED, FAILED):  # both are results
            raise ValueError(f"{path}: seed {run.seed} has {run.status}, and its log {run.log or '(of no name)'} is not "
                             "here: no run is left out; if constants were tuned with that seed, --tuning-seeds says so")
        runs.append(LeftOut(Path(run.log).name, run.seed, None, reason))
    for seed in tuning:
        if seed not in {run.seed for run in runs}:
            raise ValueError(f"--tuning-seeds {seed}: no run of this program has that seed")
    return runs


########################################
#              The folder              #
########################################

def free_folder(place: str, name: str) -> Path:
    """Where the result goes; names of upstream's folders begin with the day. ValueError where that cannot be."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{,79}", name):
        raise ValueError(f"--name {name!r}: letters, digits, _ . and - make the name of a folder, 80 at most")
    if not Path(place).is_dir():
        raise ValueError(f"-o {place}: there is no such folder")
    folder = Path(place) / f"{date.today():%Y%m%d}_{name}"
    if os.path.lexists(folder):
        raise ValueError(f"{folder} is there already, and is not overwritten: take another --name, or remove it")
    return folder


def put_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside, which then takes this one's name; where that fails, nothing stays."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir()
    try:
        write(beside)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside)
        raise


def log_name(log: Log) -> str:
    return f"{Path(log.path).stem}.txt"


def copy(logs: list[Log], folder: Path) -> None:
    for log in logs:
        place = folder / log_name(log)
        if place.exists():
            raise ValueError(f"{log.path}: two logs of one folder would be called {place.name}: rename one")
        shutil.copyfile(log.path, place)


########################################
#              README.md               #
########################################

def describe(folder: str, sample: Sample, result: dict, counted: list[Log], left_out: list[LeftOut], base: str | None,
             record: Result, hardware: str | None) -> str:
    claim = sample.claim()
    versus = pairwise(claim, Claim(record.step, record.mean, record.n)) if sample.target == UPSTREAM_TARGET else None
    parts = [
        f"# {sample.name}: {claim.step} steps to {sample.target:g}",
        f"## TL;DR\n\n{BLANK} (in a sentence: what is new)",
        summary(sample, record, versus, hardware),
        "![the whole run](figure.png)\n\n![at the target](zoomed_figure.png)",
        f"## The rule\n\n{rules_of(counted[0].source)}",
        difference(counted[0], base),
        f"## Runs\n\n{verify.table_by_seed(result, [run for run in result['runs'] if run['used']])}",
        list_left_out(sample, left_out),
        f"{BLANK} (how many runs were planned before the first was looked at; with which seeds constants were tuned)",
        f"## What the rules fix\n\nBy `python -m records lint`, from the source alone:\n\n"
        f"{fenced(lint.text(lint.lint(counted[0].path, None)))}",
        f"## Hardware\n\n{hardware_of(sample, result, counted, hardware)}",
        f"## Run it again\n\n{commands(folder, counted[0], sample)}",
        f"## Who made this\n\n{BLANK} (author)\n\n{BLANK} (which AI took part, and in what; or that none did)\n\n"
        f"{BLANK} (whose work this builds on, by pull request)",
        row_for_upstream(folder, sample, counted, record, versus),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def fenced(text: str) -> str:
    """A block of code, whatever the text holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def summary(sample: Sample, record: Result, versus: Pairwise | None, hardware: str | None) -> str:
    claim = sample.claim()
    at = judge(sample.moments[claim.step], sample.target)
    lines = [f"Step {claim.step}: mean `{sample.metric}` {at.mean:.6f}, n={at.n}; ({sample.target:g} - mean) sqrt(n) = "
             f"{at.statistic:.5f} >= {THRESHOLD}: **PASS**. It is the earliest evaluated step whose mean passes.",
             *(f"**{remark}**" for remark in sample.remarks)]
    if versus:
        metric = f" of `{record.metric}`" * (record.metric != sample.metric)
        lines.append(
            f"Against result #{record.record} ({record.step} steps, {record.mean:.4f}{metric}, n={record.n}) by the "
            f"pairwise rule, with {SCHEDULE_RATE} nats per 100 steps: {versus.statistic:.5f}, p = {versus.p:.2g}, "
            + (f"at least {THRESHOLD}, so it is better." if versus.passes else
               f"less than {THRESHOLD}, so it is not shown to be better."))
    if hardware:
        lines.append(f"Mixed hardware: {hardware}")
    return "\n\n".join(lines)


def rules_of(source: bytes) -> str:
    """The update rules of the program, and the source of the stages that no recipe of this project names."""
    rules = {name: rule for name, rule in values(source).items() if name.endswith("_update") and rule}
    if not rules:
        return f"{BLANK} (the program has no update rule of text: say it in words and formulas)"
    new = stage_names(rules).difference(*(stage_names(read_recipe(RECORDS / name / "recipe")) for name in recipes()))
    parts = [fenced("\n".join(f"{name}: {rule}" for name, rule in rules.items()))]
    if functions := [function for name, function in stage_functions(source).items() if name in new]:
        parts.append(f"Stages that no recipe here has:\n\n{fenced(f'{chr(10) * 3}'.join(functions))}")
    return "\n\n".join(parts)


def stage_names(fields: dict[str, str]) -> set[str]:
    return {stage for name, rule in fields.items() if name.endswith("_update") for stage, _ in stages(rule)}


def stage_functions(source: bytes) -> dict[str, str]:
    """{name that rules know: source} of the functions that a program declares with `@stage`."""
    lines, found = source.decode(errors="replace").splitlines(), {}
    for node in parse(source).body:
        match node:
            case ast.FunctionDef(name, decorator_list=[ast.Call(ast.Name("stage"), words) as call]):
                known = words[0].value if words and isinstance(words[0], ast.Constant) else name
                found[known] = "\n".join(lines[call.lineno - 1:node.end_lineno])
    return found


def difference(log: Log, base: str | None) -> str:
    """What the program has unlike its base: by default the nearest recipe of this project."""
    if base is None and "matrix_update" not in values(log.source):
        return f"## Against its base\n\n{BLANK} (`--base LOG` of `python -m records submit` writes the difference)"
    found = diff.diff(base or str(RECORDS / nearest(values(log.source))[0]), log.path)
    name = Path(found["a"]).name
    shown = fenced(diff.text(found | {"a": name, "b": "this program"}))
    if shown.count("\n") > 60:
        shown = f"<details>\n<summary>the difference, line by line</summary>\n\n{shown}\n\n</details>"
    return f"## Against {name}\n\n{shown}"


def list_left_out(sample: Sample, runs: list[LeftOut]) -> str:
    n = sample.moments[sample.earliest()].n
    if not runs:
        return f"All {n} runs of this program that are known count."
    rows = [["log", "seed", f"at {sample.earliest()}", "why it is left out"], ["---"] * 4]
    rows += [[run.log or "-", "-" if run.seed is None else run.seed, "-" if run.loss is None else f"{run.loss:.5f}",
              run.why] for run in runs]
    known = [trial.losses[sample.earliest()] for trial in sample.used if sample.earliest() in trial.losses]
    told = [run.loss for run in runs if run.loss is not None]
    lines = [f"{n} runs count; {len(runs)} more of this program are known:", verify.markdown_table(rows)]
    if told:
        at = judge(Moments.of(known + told), sample.target)
        lines.append(f"With the {len(told)} of them that came to step {sample.earliest()}: mean {at.mean:.6f}, "
                     f"n={at.n}, statistic {at.statistic:.5f}: {'PASS' if at.passes else 'FAIL'}.")
    return "\n\n".join(lines)


def hardware_of(sample: Sample, result: dict, counted: list[Log], why_mixed: str | None) -> str:
    lines = [f"- {count} on {device}" for device, count in result["devices"].items()]
    if why_mixed:
        lines += [f"- on {device}: mean {at.mean:.6f}, n={at.n}" for device, at in by_device(sample).items()]
    if typical := sample.typical():
        lines.append(f"- a run trains for {typical.train_time:.0f} s")
    shared = [(name, counted[0].facts.get(name)) for name in SHARED_FACTS]
    lines += [f"- {name}: {', '.join(value)}" for name, value in shared
              if value and all(log.facts.get(name) == value for log in counted)]
    return "\n".join(lines)


def by_device(sample: Sample) -> dict[str, Moments]:
    losses: dict[str, list[float]] = {}
    for trial in sample.used:
        if sample.earliest() in trial.losses:
            losses.setdefault(trial.device, []).append(trial.losses[sample.earliest()])
    return {device: Moments.of(values) for device, values in losses.items()}


def commands(folder: str, log: Log, sample: Sample) -> str:
    """The program is that of the first log; logs of one program may differ in their seed and micro-batch."""
    seeds = sorted({trial.seed for trial in sample.used if trial.seed is not None})
    seed = " --seed S" * ("matrix_update" in values(log.source))
    said = f"\n\nSeeds: {', '.join(map(str, seeds))}." if seeds else "\n\nThe logs name no seeds."
    return fenced(f"torchrun --standalone --nproc_per_node=$(nvidia-smi -L | wc -l) "
                  f"records/track_3_optimization/results/{folder}/train_gpt.py{seed}") + said


def row_for_upstream(folder: str, sample: Sample, logs: list[Log], record: Result, versus: Pairwise | None) -> str:
    """In the form that upstream's make_figures.py reads. What that draws is the mean of `val_loss` over all runs in the
    folder, which is said where it is not the claim."""
    claim = sample.claim()
    if versus is None:
        return f"## Row\n\nNone: upstream's table is of the target {UPSTREAM_TARGET:g}, this one is {sample.target:g}."
    note = "" if versus.passes else f" (note: p-value vs. #{record.record} is p={versus.p:.2g})"
    cells = [max(published.results()) + 1, f"{claim.step}{'(!)' * (claim.step < published.best().step)}",
             f"{claim.mean:.4f} (n={claim.n})✓", f"{BLANK}{note}", f"{folder[:4]}/{folder[4:6]}/{folder[6:8]}",
             f"[log](results/{folder}/{log_name(logs[0])})",
             f"[PR]({UPSTREAM}/pull/{BLANK}) by [@{BLANK}](https://github.com/{BLANK})"]
    drawn = [trial.losses[claim.step] for log in logs for trial in read(log.path, "val_loss").trials
             if claim.step in trial.losses]
    mean = f"{Moments.of(drawn).mean:.5f} (n={len(drawn)})" if drawn else "nothing"
    said = "" if mean == f"{claim.mean:.5f} (n={claim.n})" else (
        f"\n\nUpstream's make_figures.py reads the `val_loss` of all runs in these logs: at step {claim.step} it draws "
        f"{mean}, which is not the claim.")
    return f"## Row\n\n{fenced(verify.markdown_table([cells]))}{said}"
