"""`lint`: what a program changed of that which the rules of the track fix.

Read from the source alone, so it says `unchanged`, `changed`, or `look` where the source does not tell; never `legal`:
whether a change is allowed is for people.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from records.diff import program, rules
from records.program import UPSTREAM_TARGET, constants, fingerprint, hyperparameters, number, parse, sections, target
from records.recipes import TRAINER

# Of upstream's train_gpt_simple.py, over its history up to commit f411b3d3: layout, comments and docstrings aside.
UPSTREAM = {"data": ("56e689ed", "ddd436d0", "a4f95bbf"), "model": ("c2accb4d", "a07c0f3b")}
# Changed, and yet accepted: results #15, #32 and #38; #2, #15, #33 and #43.
ACCEPTED = {"data": ("bb097bfa", "11ad8b90", "3e148763"), "model": ("db76247a", "776a1c74", "4e9b9058", "0329ea27")}
# What upstream's programs name of that which the rules fix: in words, and by their names, for sequences their loader's
# default. The names after the first are those of other tracks.
NUMBERS = {
    "batch_tokens": ("tokens a step", ("batch_size", "train_batch_size")),
    "val_tokens": ("validation tokens", ("val_tokens",)),
    "sequence_length": ("sequence length", ("distributed_data_generator(seq_len)", "seq_len", "train_seq_len",
                                            "train_max_seq_len")),
}
READING = "open_shard", "batches_in", "read_batches"  # the functions of our programs that make batches of shards
SHARD = re.compile(r"""(["'])([^\s"']+\.bin)\1""")
FINEWEB = re.compile(r"fineweb_(train|val)_[^/]*\.bin$")
PACKAGES = {"torch", "numpy", "tqdm", "triton", "wandb"}  # that bring no optimizer of their own, but torch's
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
            "TORCHELASTIC_USE_AGENT_STORE"}


def lint(path: str, against: str | None) -> dict:
    """The verdict is that every check says `unchanged`. `against` is a log or program whose data and model are taken
    for the unchanged ones."""
    source = program(path)
    tree = parse(source)
    checks = [*check_fixed(source, against), check_backward(tree), check_imports(tree), check_environment(tree)]
    return {"verdict": all(outcome == "unchanged" for _, outcome, _ in checks), "log": path,
            "checks": [dict(zip(("what", "outcome", "why"), check)) for check in checks]}


def check_fixed(source: bytes, against: str | None = None) -> list[tuple[str, str, str]]:
    base = against or (str(TRAINER) if ours(source) else None)
    return [check_reading(source, base) if ours(source) else check_section("data", source, base),
            check_section("model", source, base),
            *check_files(source), *check_track(source), *check_numbers(source)]


def foreign(source: bytes) -> list[str]:
    """Why the rule of the track does not judge what a program reached: the data, batch or architecture is another's.
    None for a program with a target of its own, which claims nothing here."""
    if target(source) != UPSTREAM_TARGET:
        return []
    accepted = [title for title, known in ACCEPTED.items() if section_print(title, source) in known]
    # of our programs an older version has other words for the same: there the numbers tell
    checks = check_numbers(source) if ours(source) else check_fixed(source)
    return [f"{what}: {why}" for what, outcome, why in checks if outcome == "changed" and what not in accepted]


def ours(source: bytes) -> bool:
    return "target_loss" in hyperparameters(parse(source))


def check_track(source: bytes) -> list[tuple[str, str, str]]:
    """Programs of upstream's other tracks, and none of this one, have a class of that name."""
    if ours(source) or not any(isinstance(node, ast.ClassDef) and node.name == "Hyperparameters"
                               for node in parse(source).body):
        return []
    return [("track", "changed", "class Hyperparameters without target_loss, as programs of other tracks have")]


def check_files(source: bytes) -> list[tuple[str, str, str]]:
    """The names of the shards, wherever they lie."""
    others = [name for _, name in SHARD.findall(source.decode(errors="replace")) if not FINEWEB.search(name)]
    # A quotation in a comment or a docstring is no name.
    if others:
        strings = {node.value for node in ast.walk(parse(source)) if isinstance(node, ast.Constant)}
        others = [name for name in others if name in strings]
    return [("shards", "changed", f"reads {others[0]}, the rules' are fineweb_train_*.bin and fineweb_val_*.bin")
            ] if others else []


def check_section(title: str, source: bytes, base: str | None) -> tuple[str, str, str]:
    known = {section_print(title, program(base))} if base else UPSTREAM[title]
    name = Path(base).name if base else "upstream's train_gpt_simple.py"
    found = section_print(title, source)
    if found is None:
        return title, "look", "the program has no section of that name"
    return title, "unchanged" if found in known else "changed", f"its section, against that of {name}"


def check_reading(source: bytes, base: str) -> tuple[str, str, str]:
    """Of our programs, whose older logs hold these functions in one file, newer ones and a checkout in two."""
    beside = Path(base).parent / "harness" / "shards.py"
    known = reading(program(base)) | (reading(beside.read_bytes()) if beside.is_file() else {})
    found = reading(source)
    same = "read_batches" in found and all(known.get(name) == value for name, value in found.items())
    return "data", "unchanged" if same else "changed", f"{', '.join(READING)}, against those of {Path(base).name}"


def reading(source: bytes) -> dict[str, str]:
    return {node.name: fingerprint([node]) for node in parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name in READING}


@cache
def section_print(title: str, source: bytes) -> str | None:
    lines = sections(source).get(title)
    if lines is None:
        return None
    try:
        return fingerprint(parse("\n".join(lines).encode()).body)[:8]
    except ValueError:  # inside a loop
        return None


def check_numbers(source: bytes) -> list[tuple[str, str, str]]:
    named = {name.removeprefix("Hyperparameters."): value for name, value in constants(source, bodies=False).items()}
    found = []
    for field, value in rules().items():
        what, upstreams = NUMBERS.get(field, (field, (f"GPT({field})",)))
        names = dict.fromkeys([*upstreams, field])
        given = [name for name in named if name.split(" #")[0] in names]
        if not given and (field in NUMBERS or ours(source)):
            found.append((what, "look", f"no {' or '.join(dict.fromkeys([upstreams[0], field]))} with a literal value"))
        if given:
            name = next((name for name in given if not equals(named[name], value)), given[0])
            found.append((what, "unchanged" if equals(named[name], value) else "changed",
                          f"{name} = {named[name]}, the rules' is {value}"))
    return found


def equals(expression: str, value: object) -> bool:
    try:
        return expression == repr(value) or number(ast.parse(expression, mode="eval").body) == value
    except ValueError:
        return False


def check_backward(tree: ast.Module) -> tuple[str, str, str]:
    """Rule 2: one forward and backward pass a step, so one call, in the loop over micro-batches."""
    calls = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr in ("backward", "grad")]
    where = f"backward() or grad() at line {', '.join(map(str, calls)) or 'none'}"
    return "one backward a micro-batch", "unchanged" if len(calls) == 1 else "changed", where


def check_imports(tree: ast.Module) -> tuple[str, str, str]:
    names = {name.split(".")[0] for name in imports(tree)}
    others = sorted(names - PACKAGES - set(sys.stdlib_module_names))
    known = ["the standard library", *sorted(names & PACKAGES)]
    return "no third-party import", "changed" if others else "unchanged", f"imports {', '.join(others or known)}"


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(str() as module, _, 0):
                yield module
            case ast.ImportFrom():
                yield "a local module"


def check_environment(tree: ast.Module) -> tuple[str, str, str]:
    """os.environ[...], os.environ.get(...), os.getenv(...), `... in os.environ`; torchrun's own variables aside."""
    read, computed = [], []
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(ast.Attribute(ast.Name("os"), "environ"), key):
                pass
            case ast.Call(ast.Attribute(ast.Attribute(ast.Name("os"), "environ"), "get"), [key, *_]):
                pass
            case ast.Call(ast.Attribute(ast.Name("os"), "getenv"), [key, *_]):
                pass
            case ast.Call(ast.Attribute(ast.Attribute(ast.Name("os"), "environ"))):
                key = None
            case ast.ImportFrom("os", names) if {"environ", "getenv"} & {alias.name for alias in names}:
                key = None
            case _:
                continue
        if isinstance(key, ast.Constant):
            read.append(key.value)
        else:
            computed.append(str(node.lineno))
    others = sorted(set(map(str, read)) - TORCHRUN)
    if others:
        shown = ", ".join(others[:8]) + f" and {len(others) - 8} more" * (len(others) > 8)
        return "no environment reads", "changed", f"reads {shown}"
    if computed:
        return "no environment reads", "look", f"names that are computed, at line {', '.join(computed)}"
    return "no environment reads", "unchanged", "torchrun's variables only"


def text(result: dict) -> str:
    lines = [f"{check['outcome']:<10} {check['what']}: {check['why']}" for check in result["checks"]]
    counts = {name: sum(check["outcome"] == name for check in result["checks"]) for name in ("changed", "look")}
    last = "UNCHANGED in everything that is checked" if result["verdict"] else (
        f"CHANGED: {counts['changed']} of {len(lines)}" if counts["changed"] else "")
    if counts["look"]:
        last = f"{last}; " * bool(last) + f"LOOK at {counts['look']}: the source does not tell"
    return "\n".join([*lines, last])
