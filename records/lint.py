"""`lint`: what a program changed of that which the rules of the track fix.

Read from the source alone, so it says `unchanged`, `changed`, or `look` where the source does not tell; never `legal`:
whether a change is allowed is for people.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from records.diff import TRAINER, program, rules
from records.program import constants, fingerprint, hyperparameters, number, parse, sections

# Of upstream's train_gpt_simple.py, over its history up to commit f411b3d3: layout, comments and docstrings aside.
UPSTREAM = {"data": ("56e689ed", "ddd436d0", "a4f95bbf"), "model": ("c2accb4d", "a07c0f3b")}
# What upstream's programs name of that which the rules fix: in words, and by their name, for sequences their loader's
# default.
NUMBERS = {
    "batch_tokens": ("tokens a step", "batch_size"),
    "val_tokens": ("validation tokens", "val_tokens"),
    "sequence_length": ("sequence length", "distributed_data_generator(seq_len)"),
}
READING = "open_shard", "batches_in", "read_batches"  # the functions of our programs that make batches of shards
PACKAGES = {"torch", "numpy", "tqdm", "triton", "wandb"}  # that bring no optimizer of their own, but torch's
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def lint(path: str, against: str | None) -> dict:
    """The verdict is that every check says `unchanged`. `against` is a log or program whose data and model are taken
    for the unchanged ones."""
    source = program(path)
    tree = parse(source)
    base = against or (str(TRAINER) if hyperparameters(tree) else None)
    checks = [check_reading(path, base) if hyperparameters(tree) else check_section("data", source, base),
              check_section("model", source, base), *check_numbers(source),
              check_backward(tree), check_imports(tree), check_environment(tree)]
    return {"verdict": all(outcome == "unchanged" for _, outcome, _ in checks), "log": path,
            "checks": [dict(zip(("what", "outcome", "why"), check)) for check in checks]}


def check_section(title: str, source: bytes, base: str | None) -> tuple[str, str, str]:
    known = {section_print(title, program(base))} if base else UPSTREAM[title]
    name = Path(base).name if base else "upstream's train_gpt_simple.py"
    found = section_print(title, source)
    if found is None:
        return title, "look", "the program has no section of that name"
    return title, "unchanged" if found in known else "changed", f"its section, against that of {name}"


def check_reading(path: str, base: str) -> tuple[str, str, str]:
    """Of our programs, whose older logs hold these functions in one file, newer ones in two."""
    same = reading(path) == reading(base)
    return "data", "unchanged" if same else "changed", f"{', '.join(READING)}, against those of {Path(base).name}"


def reading(path: str) -> dict[str, str]:
    """{name: fingerprint} of those functions, in a log's program or, of a checkout, in train_gpt.py and harness/."""
    beside = Path(path).parent / "harness" / "shards.py"
    sources = [beside.read_bytes()] if beside.is_file() else []
    return {node.name: fingerprint([node]) for source in (*sources, program(path)) for node in parse(source).body
            if isinstance(node, ast.FunctionDef) and node.name in READING}


def section_print(title: str, source: bytes) -> str | None:
    lines = sections(source).get(title)
    if lines is None:
        return None
    try:
        return fingerprint(parse("\n".join(lines).encode()).body)[:8]
    except ValueError:  # inside a loop
        return None


def check_numbers(source: bytes) -> list[tuple[str, str, str]]:
    named = constants(source)
    ours = {name.removeprefix("Hyperparameters."): value for name, value in named.items()}
    found = []
    for field, value in rules().items():
        if field not in NUMBERS and not hyperparameters(parse(source)):
            continue
        what, upstreams = NUMBERS.get(field, (field, field))
        names = dict.fromkeys([upstreams, field])
        name = next((name for name in names if name in ours), None)
        if name is None:
            found.append((what, "look", f"no {' or '.join(names)} with a literal value"))
            continue
        try:
            same = ours[name] == repr(value) or number(ast.parse(ours[name], mode="eval").body) == value
        except ValueError:
            same = False
        found.append((what, "unchanged" if same else "changed", f"{name} = {ours[name]}, the rules' is {value}"))
    return found


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
