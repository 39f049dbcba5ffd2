"""`diff`: what changed between two programs or recipes: update rules stage by stage, constants, source by section."""

import ast
import difflib
import re
from functools import cache
from pathlib import Path

from records.log import Log, expand, read, read_bytes
from records.program import constants, parse, recipe, sections
from records.recipes import TRAINER, align, find, meaning, read_recipe, side_by_side, values

# The rules of the track fix the data, the architecture, the batch and the evaluation.
FIXED_SECTIONS = ("data", "model", "evaluation")


def program(path: str) -> bytes:
    """The program at the head of a log, a .py file's text, or the one that all logs of a folder or glob ran, as its
    first log has it; ValueError says why there is none."""
    if path.isdigit() and not Path(path).exists():
        raise ValueError(f"{path}: of published results the figures are here, not the programs: "
                         "name a log or a .py file")
    if not path.endswith(".py"):
        return shared_program(path)
    source = read_bytes(path)
    try:
        parse(source)
    except ValueError as error:
        raise ValueError(f"{path} is no program: {error}") from None
    return source


def shared_program(path: str) -> bytes:
    files = expand([path])
    if len(files) == 1:
        return read(files[0]).source
    found: dict[str, Log] = {}
    for file in files:
        try:
            log = read(file)
        except ValueError:  # other files of a folder
            continue
        found.setdefault(recipe(log.source), log)
    if len(found) != 1:
        examples = f", as {' and '.join(log.path for log in list(found.values())[:2])}" if found else ""
        raise ValueError(f"{path} holds logs of {len(found)} different programs{examples}: name one log")
    return next(iter(found.values())).source


@cache
def rules() -> dict[str, object]:
    """{field of Hyperparameters: its value by the rules}, as train_gpt.py has them."""
    found = re.search(r"^RULES = (\{.*?\})$", TRAINER.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"{TRAINER} has no RULES: take it from the repository")
    return ast.literal_eval(found[1])


@cache
def fixed() -> re.Pattern:
    """Finds in a line what the rules fix, by its name here or upstream."""
    return re.compile(rf"\b({'|'.join(rules())}|batch_size|seq_len|val_\w+|validation\w*|train_files|eval)\b|fineweb")


def diff(a: str, b: str) -> dict:
    """The verdict is that both are the same. Where one is a recipe, the fields of Hyperparameters are compared."""
    if find(a) or find(b):
        old, new = fields(a), fields(b)
        names = [name for name in old | new if meaning(old.get(name, "")) != meaning(new.get(name, ""))]
        return {"verdict": not names, "a": a, "b": b, **compare_constants(old, new, names), "sections": []}
    old, new = program(a), program(b)
    before, after = constants(old), constants(new)
    parts = (sections(old), sections(new))
    titles = list(dict.fromkeys([*parts[0], *parts[1]]))
    return {
        "verdict": recipe(old) == recipe(new), "a": a, "b": b,
        **compare_constants(before, after, [name for name in before | after if before.get(name) != after.get(name)]),
        "sections": [section for title in titles
                     if (section := compare_section(title, *(part.get(title, []) for part in parts)))],
    }


def fields(name: str) -> dict[str, str]:
    """Of a recipe, or of a program's Hyperparameters; without micro_batch, which changes no result."""
    path = find(name)
    found = read_recipe(path) if path else values(program(name))
    if not found:
        raise ValueError(f"{name} has no class Hyperparameters to hold against a recipe")
    return {field: value for field, value in found.items() if field != "micro_batch"}


def compare_constants(a: dict[str, str], b: dict[str, str], names: list[str]) -> dict[str, list[dict]]:
    """What differs by name: the update rules, each with the `align`ed stages, and all else."""
    found = {"rules": [], "constants": []}
    for name in names:
        old, new = a.get(name), b.get(name)
        try:
            if not name.endswith("_update"):
                raise ValueError
            found["rules"].append({"name": name, "stages": align(unquoted(old), unquoted(new))})
        except (SyntaxError, ValueError):
            found["constants"].append({"name": name, "a": old, "b": new, "fixed": bool(fixed().search(name))})
    return found


def unquoted(text: str | None) -> str:
    """A rule as a person types it, also where it is a literal of a program."""
    return ast.literal_eval(text) if text and text[0] in "'\"" else text or ""


def compare_section(title: str, a: list[str], b: list[str]) -> dict | None:
    """None where nothing but comments and blank lines differ."""
    old, new = ([line for line in lines if line.strip() and not line.strip().startswith("#")] for lines in (a, b))
    lines = [line for line in difflib.unified_diff(old, new, lineterm="", n=1) if not line.startswith(("---", "+++"))]
    changed = [line for line in lines if line[0] in "+-"]
    if not changed:
        return None
    return {"title": title, "removed": sum(line[0] == "-" for line in changed),
            "added": sum(line[0] == "+" for line in changed), "lines": lines,
            "fixed": title in FIXED_SECTIONS or any(fixed().search(line) for line in changed)}


def text(result: dict) -> str:
    lines = [f"a: {result['a']}", f"b: {result['b']}"]
    if result["verdict"]:
        return "\n".join([*lines, "SAME: nothing differs but layout, comments, docstrings, seed and micro-batch"])
    for rule in result["rules"]:
        lines += ["", f"{rule['name']} (! other knobs, < only in a, > only in b)", *side_by_side(rule["stages"])]
    if result["constants"]:
        lines += ["", "constants (! touches data, model, batch or evaluation, which the rules fix)"]
        lines += [f"{'!' if row['fixed'] else ' '} {row['name']}: {row['a'] or '-'} -> {row['b'] or '-'}"
                  for row in result["constants"]]
    for section in result["sections"]:
        mark = "  ! touches what the rules fix" if section["fixed"] else ""
        lines += ["", f"{section['title']}: {section['removed']} lines out, {section['added']} in{mark}",
                  *section["lines"]]
    fixed = sum(part["fixed"] for part in result["constants"] + result["sections"])
    rules = f"{len(result['rules'])} rules, " * bool(result["rules"])
    return "\n".join([*lines, "", f"DIFFERENT: {rules}{len(result['constants'])} constants, {len(result['sections'])} "
                      f"sections; {fixed} of them touch data, model, batch or evaluation"])
