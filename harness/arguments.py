"""What a person types: NAME=VALUE, @RECIPE and options. A mistake there ends in one line, which names the remedy."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from rules import nearest, stages_of, with_knob


class Experiment(NamedTuple):
    """What the harness is told of the program that it runs. The folder of `script` is the project's root."""
    script: Path
    hyperparameters: type  # a frozen dataclass; hp below is one of these
    rules: dict  # {field of the hyperparameters: its value in an attempt at a record}
    model: Callable  # of hp
    train: Callable  # (model, trial): one trial, by the methods of harness.trial.Trial
    is_validation_step: Callable  # (step, hp)
    description: str  # for --help


def overridden(experiment: Experiment, words: list[str]):
    """Hyperparameters from NAME=VALUE, STAGE.KNOB=VALUE and @RECIPE words; a later word wins. ValueError names what is
    wrong."""
    root = experiment.script.parent
    types = {f.name: f.type for f in fields(experiment.hyperparameters)}
    values = {}
    for word in (line for word in words for line in (recipe(word[1:], root) if word.startswith("@") else [word])):
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not understood: write NAME=VALUE or @RECIPE")
        if "." in name:
            rules = {f: values.get(f, getattr(experiment.hyperparameters, f)) for f in types if f.endswith("_update")}
            name, text = change_rule(rules, word)
        if name not in types:
            raise ValueError(f"{name!r} is not a hyperparameter; the nearest is {nearest(name, types)!r}")
        try:
            values[name] = types[name](text)
        except ValueError:
            raise ValueError(f"{word}: {name} takes a value of type {types[name].__name__}") from None
    return experiment.hyperparameters(**values)


def change_rule(rules: dict[str, str], word: str) -> tuple[str, str]:
    """Name and new text of the update rule that STAGE.KNOB=VALUE changes: of the only one that has this stage."""
    name, _, value = word.partition("=")
    stage, _, knob = name.partition(".")
    stages = {field: stages_of(text) for field, text in rules.items()}
    having = [field for field in rules if stage in stages[field]]
    if not having:
        known = sum(stages.values(), [])
        raise ValueError(f"{word}: no rule of this run has a stage {stage!r}; the nearest is {nearest(stage, known)!r}")
    if len(having) > 1:
        raise ValueError(f"{word}: {stage} is in {' and '.join(having)}; write the one that you mean whole")
    return having[0], with_knob(rules[having[0]], stage, knob, value)


def recipe(name: str, root: Path) -> list[str]:
    """The overrides in records/NAME/recipe, or in a file of that name: one a line, # begins a comment."""
    path = next((p for p in (Path(name), root / "records" / name / "recipe") if p.is_file()), None)
    if path is None:
        raise ValueError(f"@{name}: there is no records/{name}/recipe and no file {name}")
    try:
        if path.stat().st_size > 2**16:
            raise ValueError
        text = path.read_text(encoding="utf-8")
    except ValueError:
        raise ValueError(f"{path} is no recipe: it is a text of at most 64 KiB, one NAME=VALUE a line") from None
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def result_of(word: str = "@17_aurora") -> int:
    """The number of the published result whose recipe a word names, 0 for none; without a word there are the defaults.
    """
    numbered = re.fullmatch(r"@(?:.*/)?(\d+)_[^/]*(?:/recipe)?", word)
    return int(numbered[1]) if numbered else 0


def departures(hp, rules: dict) -> list[str]:
    """What makes this run no attempt at a record, in one line; no line where nothing does."""
    changed = [f"{name}={getattr(hp, name)}" for name in rules if getattr(hp, name) != rules[name]]
    return [f"not a record attempt: unlike result #17, {', '.join(changed)}"] if changed else []


def parse(argv: list[str], description: str = "") -> argparse.Namespace:
    args = make_parser(description).parse_intermixed_args(argv)
    if args.trials < 1 or not 0 <= args.seed < 2**63 - args.trials:
        complain(f"--seed {args.seed} --trials {args.trials}: seeds are 0 to 2^63 - 1, trials at least 1")
    for name in ("neurons", "checkpoint_every"):
        if getattr(args, name) < 0:
            complain(f"--{name.replace('_', '-')} {getattr(args, name)}: a number of steps, or 0 for never")
    if args.resume == "newest" and not args.checkpoint_every:
        complain("--resume newest without --checkpoint-every N finds nothing to go on from: give both")
    if args.resume and args.fork_from:
        complain("--resume goes on with a run, --fork-from starts another: give one")
    return args


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_gpt.py", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE | STAGE.KNOB=VALUE | @RECIPE")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default 0)")
    parser.add_argument("--trials", type=int, default=1, help="runs in one process, of seeds SEED, SEED + 1, ...")
    parser.add_argument("--neurons", type=int, default=0, metavar="K",
                        help="every K steps, write what the neurons do to logs/NAME.neurons.jsonl.gz; "
                             "changes no result")
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N",
                        help="every N steps, after the last, and on SIGUSR1, SIGTERM, SIGHUP and SIGINT, put the "
                             "newest state into logs/NAME.checkpoint; changes no result")
    parser.add_argument("--checkpoint-last", dest="checkpoint_every", action="store_const", const=10**9,
                        help="the same after the last step, and on signals, alone")
    parser.add_argument("--resume", metavar="logs/NAME.checkpoint | newest",
                        help="go on with that run and its log; with micro_batch=N, in parts of another size; newest: "
                             "with the newest unfinished one of this command, or begin, or say that it is finished")
    parser.add_argument("--fork-from", metavar="CHECKPOINT", help="begin there, with other values; no evidence")
    parser.add_argument("--dry-run", action="store_true", help="check arguments and data, say what would run, and stop")
    parser.add_argument("--fineweb-shards", action="store_true", help="say what downloads those of the run, and stop")
    parser.add_argument("--wandb", choices=("online", "offline"), help="mirror logs/NAME.jsonl to Weights & Biases")
    parser.error = lambda message: complain(message + nearest_option(parser, message))
    return parser


def nearest_option(parser: argparse.ArgumentParser, message: str) -> str:
    """What argparse's message on an option that there is not leaves out."""
    _, unknown, words = message.partition("unrecognized arguments: ")
    word = words.split(" ")[0].partition("=")[0]
    return f"; the nearest is {nearest(word, parser._option_string_actions)}" if unknown and word[:1] == "-" else ""


def complain(message):
    """End this process with exit code 1; the first of a machine's ranks prints the message, in one line."""
    sys.exit(line_of(message) or 1)


def line_of(message) -> str:
    """What the first of a machine's ranks says of what is wrong; nothing for the others."""
    other = os.environ.get("LOCAL_RANK", "0") != "0" and {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    return "" if other else f"train_gpt.py: {' '.join(str(message).split())}"
