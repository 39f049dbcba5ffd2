"""The recipes of this folder: what the defaults of train_gpt.py become by the NAME=VALUE lines of a file `recipe`."""

import ast
import difflib
from functools import cache
from pathlib import Path

from records.log import read_bytes
from records.program import hyperparameters, number, parse, stages

RECORDS = Path(__file__).resolve().parent
TRAINER = RECORDS.parent / "train_gpt.py"


def recipes() -> list[str]:
    """The folders that hold a recipe: in the order of their numbers, then those without one."""
    names = sorted(path.parent.name for path in RECORDS.glob("*/recipe"))
    return sorted(names, key=lambda name: int(first) if (first := name.split("_")[0]).isdecimal() else float("inf"))


def find(name: str) -> Path | None:
    """The recipe that a person means by a folder of records/, by its path or the folder's, or by @ and any of these or
    another file's; None where that is no recipe."""
    path = Path(name.removeprefix("@"))
    if path.is_file():
        return path if path.name == "recipe" or name.startswith("@") else None
    file = (path if path.is_dir() else RECORDS / path) / "recipe"
    if name.startswith("@") and not file.is_file():
        raise ValueError(f"{name}: there is no recipe of that name; `list` shows those that there are")
    return file if file.is_file() else None


@cache
def defaults() -> dict[str, str]:
    return values(read_bytes(TRAINER))


def values(source: bytes) -> dict[str, str]:
    """The fields of a program's `class Hyperparameters`, each as a person would type it."""
    return {name: str(value.value) if isinstance(value, ast.Constant) else ast.unparse(value)
            for name, value in hyperparameters(parse(source)).items()}


def read_recipe(path: Path) -> dict[str, str]:
    """All fields of a run by this recipe. A line STAGE.KNOB=VALUE, which changes a number of a rule, stays as it is:
    what stages take, aurora.py knows."""
    found = {}
    for line in read_bytes(path).decode(errors="replace").splitlines():
        if line := line.split("#")[0].strip():
            name, equals, value = (part.strip() for part in line.partition("="))
            if not equals:
                raise ValueError(f"{path} is no recipe: {line[:80]!r} is not NAME=VALUE")
            found[name] = value
    return defaults() | found


def rule(name: str) -> str:
    """The update rule of the matrices in the recipe of a folder; with that of the MLPs, where it is another, and the
    knobs that its lines change one by one."""
    fields = read_recipe(RECORDS / name / "recipe")
    mlp = [f"of MLPs {fields['mlp_update']}"] if fields["mlp_update"] else []
    return ", ".join([fields["matrix_update"], *mlp, *(f"{x}={value}" for x, value in fields.items() if "." in x)])


def nearest(fields: dict[str, str]) -> tuple[str, list[str]]:
    """The recipe from which fewest of a run's fields differ, and what does, as `changes` says it."""
    found = [(name, changes(read_recipe(RECORDS / name / "recipe"), fields)) for name in recipes()]
    return min(found, key=lambda pair: len(pair[1]))


def changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What differs of the fields that both have, micro_batch aside, as it is in `new`: `lr=0.04`, or the stage of a
    rule, `contra(0.3)`, `+ smooth(0.9)`, `- floor(0.35)`; with the rule's name where that is not `matrix_update`."""
    found = []
    for name in (name for name in old if name in new and name != "micro_batch"):
        if meaning(old[name]) == meaning(new[name]):
            continue
        try:
            rows = align(old[name], new[name]) if name.endswith("_update") else []
        except ValueError:  # what a stranger's log says is no rule
            rows = []
        of = "" if name == "matrix_update" else name.removesuffix("update").replace("_", " ")
        found += [of + (f"+ {b}" if a is None else f"- {a}" if b is None else b) for a, b in rows if a != b]
        found += [f"{name}={new[name]}"] * (not rows)
    return found


@cache
def meaning(text: str | None) -> float | str | None:
    """Equal for two spellings of one number or rule."""
    try:
        return number(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        pass
    try:
        return " | ".join(stage for _, stage in stages(text))
    except (AttributeError, ValueError):
        return text


def align(a: str, b: str) -> list[tuple[str | None, str | None]]:
    """The stages of two update rules in pairs of one name, in their order; None beside a stage that is in one alone."""
    old, new = stages(a), stages(b)
    names = ([name for name, _ in old], [name for name, _ in new])
    rows = []
    for kind, i, j, k, end in difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        left, right = [text for _, text in old[i:j]], [text for _, text in new[k:end]]
        rows += zip(left, right) if kind == "equal" else [
            *((text, None) for text in left), *((None, text) for text in right)]
    return rows


def side_by_side(rows: list[tuple[str | None, str | None]]) -> list[str]:
    """Between two stages: nothing where they are equal, ! where their knobs differ, < or > where one is alone."""
    width, lines = min(max(len(a or "") for a, _ in rows), 56), []
    for a, b in rows:
        mark = " " if a == b else "<" if b is None else ">" if a is None else "!"
        if len(a or "") > width and b:  # too long to have the other beside it
            lines += [f"  {a}", f"  {'':<{width}}  {mark}  {b}"]
        else:
            lines.append(f"  {a or '':<{width}}  {mark}  {b or ''}".rstrip())
    return lines
