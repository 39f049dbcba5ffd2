"""`report`: one HTML page that needs no network. report.html is its text, style and script; here are its data."""

import json
import os
import re
from collections import Counter
from functools import cache
from math import isfinite
from pathlib import Path

from records import leaderboard, published
from records.lint import ours
from records.log import Log, Trial, expand, load_aloud, put, survey
from records.program import UPSTREAM_TARGET, constants, recipe, stages, target
from records.recipes import RECORDS, nearest, read_recipe, recipes, values
from records.sample import Sample, from_logs, from_published, groups, progress
from records.statistics import mean_crossing

TEMPLATE = Path(__file__).with_name("report.html")
PLACE = '<script type="application/json" id="data">null</script>'  # of the data, in report.html
FIRST_SHOWN = {6, 17, 36, 46}  # of the published curves: the first baseline of 20, ours, the tuned one, the record
WORDS = {"polar": "Muon"}  # what upstream's table calls a stage, where it is not the stage's name
DATED = re.compile(r"(\d{4})(\d\d)(\d\d)[-_](?=.)")  # before the name of a log or of a folder of upstream's
UUID = re.compile(r"([0-9a-f]{8})-[0-9a-f]{4}-[0-9a-f-]+")


def report(names: list[str], path: str, metric: str | None = None) -> None:
    """Write the page on the logs that `names` mean, by default those in records/, and on the published results."""
    data = contents(*load_aloud(names or [str(RECORDS)], metric))
    page = filled(data if names else data | {"target": UPSTREAM_TARGET})
    put(path, lambda beside: beside.write_text(page, encoding="utf-8"))


def filled(data: dict) -> str:
    """The page with its data. `<` is escaped: no name of a file ends the element that holds them."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, PLACE.replace("null", text))


def contents(logs: list[Log], left_out: list[str]) -> dict:
    """What the page shows: the sets of runs in `logs`, and beside them the published results and the logs in records/.
    Of a result whose own logs are there, these take the place."""
    own = own_sets(logs)
    ids, bases = {each["id"] for each in own}, {each["base"] for each in own if each["base"]}
    others = [each | {"shown": each["shown"] or each["base"] in bases} for each in [*references(), *published_sets()]
              if each["id"] not in ids]
    sets = sorted(own + others, key=lambda each: (not each["own"] or each["record"] is not None,
                                                     -(each["record"] or 0)))
    return {"sets": sets, "left_out": left_out, "target": own[0]["target"] if own else UPSTREAM_TARGET,
            "best": [[row.record, row.step, row.world_record] for row in published.results().values()]}


@cache
def references() -> list[dict]:
    """What is published in records/, where it is not what the page is about."""
    logs, _ = survey(expand([str(RECORDS)]))
    return [each | {"own": False, "shown": False, "text": ", ".join(filter(None, ["in records/", each["text"]])),
                    "files": [os.path.relpath(path, RECORDS.parent) for path in each["files"]]}
            for each in own_sets(logs)]


########################################
#            Published sets            #
########################################

@cache
def published_sets() -> list[dict]:
    return [published_set(row) for row in reversed(published.results().values())]


def published_set(row: published.Result) -> dict:
    sample = from_published(row.record)
    known, told = techniques_of_record(row.record)
    return claim_of(row) | {
        "own": False, "techniques": known, "told": told, "target": UPSTREAM_TARGET, "metric": sample.metric,
        "step": row.step, "mean": row.mean, "n": row.n, "rule": "accepted", "shown": row.record in FIRST_SHOWN,
        "device": row.device, "notes": list(filter(None, [sample.mixture])), **curves(sample.moments, sample.trials),
        "near": around_target(sample)}


def claim_of(row: published.Result) -> dict:
    return {"id": str(row.record), "title": f"#{row.record}", "text": row.summary, "date": row.date,
            "pr": row.pull_request, "record": row.record, "base": recipe_of(row.record), "changes": []}


@cache
def recipe_of(record: int) -> str:
    """The recipe that begins with the number of a published result; nothing where there is none."""
    return next((name for name in recipes()
                 if f"# Result #{record} of track 3" in (RECORDS / name / "recipe").read_text(encoding="utf-8")), "")


def rule_of(name: str) -> str:
    return f"the rule of records/{name}"


def techniques_of_record(record: int) -> tuple[dict[str, str], str]:
    """{technique: its knobs} of a published result, and what tells them: its recipe, or else the words of its row,
    where `#9` stands for all that result #9 has."""
    if name := recipe_of(record):
        return techniques(read_recipe(RECORDS / name / "recipe")), rule_of(name)
    summary = published.result(record).summary
    found = {name: "" for earlier in re.findall(r"#(\d+)", summary) for name in techniques_of_record(int(earlier))[0]}
    found |= {name: "" for name in vocabulary()
              if re.search(rf"\b{WORDS.get(name, name.replace('_', '[ -]'))}\b", summary, re.IGNORECASE)}
    return found, "the words of upstream's table"


@cache
def vocabulary() -> list[str]:
    """The stages of all recipes' rules, in the order of a rule."""
    rules = [read_recipe(RECORDS / name / "recipe") for name in recipes()]
    return list(dict.fromkeys(name for fields in rules for name in techniques(fields)))


def techniques(fields: dict[str, str]) -> dict[str, str]:
    """{stage: its knobs} of the rules that move the matrices."""
    found: dict[str, list[str]] = {}
    for rule in ("matrix_update", "mlp_update", "final_update"):
        try:
            for name, text in stages(fields.get(rule, "")):
                found.setdefault(name, []).append(text.removeprefix(name).removeprefix("(").removesuffix(")"))
        except ValueError:  # what a stranger's log says is no rule
            continue
    return {name: "; ".join(dict.fromkeys(knobs)) for name, knobs in found.items()}


########################################
#               Own sets               #
########################################

def own_sets(logs: list[Log]) -> list[dict]:
    """One a program and device, each named by what it changed: of a recipe, or of the first program in its folder."""
    found = groups(logs)
    sets, first = [own_set(group) for group in found], {}  # the first program by folder
    for each, group, (title, date) in zip(sets, found, names_and_dates(found)):
        if each["record"]:
            continue
        source = group[0].source
        if ours(source):
            title, altered = nearest(values(source))
            each["base"] = title
            if not each["techniques"] and not altered:  # an older program has no rule that is a line of text
                each |= {"techniques": techniques(read_recipe(RECORDS / title / "recipe")), "told": rule_of(title)}
        else:
            before = constants(first.setdefault(os.path.dirname(group[0].path), source))
            after = constants(source)
            altered = [f"{name}={value}" for name, value in after.items() if before.get(name) != value]
        each |= {"title": title, "date": date, "changes": altered}
    shared = Counter((each["title"], change) for each in sets for change in each["changes"])
    for each in sets:  # what tells a set from the others comes first, what they have in common last
        altered = sorted(each["changes"], key=lambda change: shared[each["title"], change])
        more = f"and {len(altered) - 4} more" * (len(altered) > 4)
        each["text"] = ", ".join(filter(None, [each["text"], *altered[:4], more]))
    for what in ("device", "program"):  # until all names differ
        alike: dict[tuple, list[dict]] = {}
        for each in sets:
            alike.setdefault((each["title"], each["text"]), []).append(each)
        for each in (each for same in alike.values() if len({one[what] for one in same}) > 1 for each in same):
            each["text"] += ", " * bool(each["text"]) + f"{what} {each[what]}"
    ids = Counter()
    for k, each in enumerate(sets):
        each["shown"] = each["record"] in FIRST_SHOWN if each["record"] else k >= len(sets) - 8  # the newest
        if count := ids[each["id"]]:  # on another device
            each["id"] += f".{count + 1}"
        ids[each["program"]] += 1
    return sets


def own_set(group: list[Log]) -> dict:
    source, trials = group[0].source, [trial for log in group for trial in log.trials]
    program, known = recipe(source)[:8], techniques(values(source)) if ours(source) else {}
    found = {"id": program, "own": True, "title": "", "text": "", "date": "", "pr": "", "record": None, "base": "",
             "changes": [], "techniques": known, "told": "the rule in its log" * bool(known), "program": program,
             "device": trials[0].short_device, "target": target(source), "metric": group[0].metric, "n": 0,
             "devices": sorted({trial.device for trial in trials}), "files": [log.path for log in group], "notes": [],
             "near": [], "commits": sorted({value for log in group for value in log.facts.get("commit", [])})}
    try:
        sample = from_logs("", group)
    except ValueError as error:  # no step in common
        return found | curves({}, trials) | {"notes": [str(error)]}
    found |= curves(sample.moments, trials)
    found["notes"] = [*filter(None, [sample.partial]), *sample.remarks]
    if not sample.moments:
        return found | {"notes": ["no finished run", *found["notes"]]}
    row = leaderboard.figures(sample)
    found |= {"step": row["step"], "mean": number(row["mean"]), "sd": number(sample.moments[row["step"]].sd),
              "n": row["used"], "rule": leaderboard.RULE[row["passes"]], "near": around_target(sample),
              "notes": [*filter(None, [row["note"]]), *found["notes"]]}
    if known := published_as(sample):
        record, whole = known
        techniques_there, told = techniques_of_record(record)
        found |= {"techniques": techniques_there, "told": told}
        found |= claim_of(published.result(record)) if whole else {"text": f"{sample.n} of the runs of #{record}"}
    return found


def published_as(sample: Sample) -> tuple[int, bool] | None:
    """The published result that has these runs, and whether these are all of them."""
    for record, means in published_means().items():
        runs = list(published.curves(record).values())
        if agree({step: at.mean for step, at in sample.moments.items()}, means):
            return record, True
        if runs and all(any(agree(trial.losses, run) for run in runs) for trial in sample.used):
            return record, False
    return None


@cache
def published_means() -> dict[int, dict[int, float]]:
    return {record: {step: at.mean for step, at in from_published(record).moments.items()}
            for record in published.results()}


def agree(a: dict[int, float], b: dict[int, float]) -> bool:
    """Whether two curves are one, to the digits that a log has."""
    shared = a.keys() & b.keys()
    return len(shared) > 2 and all(abs(a[step] - b[step]) < 2e-5 for step in shared)


def names_and_dates(found: list[list[Log]]) -> list[tuple[str, str]]:
    """For each group a name and a date: of the folder that holds it alone, or else of its first log."""
    if not found:
        return []
    folders = [os.path.commonpath([os.path.dirname(os.path.abspath(log.path)) for log in group]) for group in found]
    root = os.path.commonpath(folders)
    named = []
    for folder, group in zip(folders, found):
        name, stem = os.path.relpath(folder, root), Path(group[0].path).stem
        if name == ".":
            name = os.path.basename(folder) if len(found) == 1 else stem
        date = DATED.match(name) or DATED.match(stem)
        named.append((UUID.sub(r"\1", DATED.sub("", name)), "-".join(date.groups()) if date else ""))
    return named


########################################
#                Curves                #
########################################

def curves(moments: dict, trials: list[Trial]) -> dict:
    """The mean and every run, by step; null where it was not evaluated, or diverged."""
    steps = sorted({*moments, *(step for trial in trials for step in trial.losses)})
    return {"steps": steps,
            "means": [number(moments[step].mean) if step in moments else None for step in steps],
            "runs": [{"seed": trial.seed, "step": trial.last_step, "seconds": trial.train_time, "state": ending(trial),
                      "losses": [number(trial.losses.get(step)) for step in steps]} for trial in trials]}


def ending(trial: Trial) -> str:
    return trial.fault or ("finished" if trial.complete else progress(trial))


def number(value: float | None) -> float | None:
    """What JSON can hold, to the digits that a log has."""
    return round(value, 5) if value is not None and isfinite(value) else None


def around_target(sample: Sample) -> list[float]:
    """Where the mean crosses the target, or else its last step; and the earliest step to pass."""
    places = mean_crossing(sample.moments, sample.target).step or max(sample.moments), sample.earliest()
    return [round(step, 1) for step in places if step is not None]
