"""The desk: `python -m records VERB ...`. Every verb has --help with an example.

LOG is a file, a folder or a glob; where a set of runs is asked for, also the
number of a published result. Exit code 0 where the verdict is yes, 1 where it
is no, 2 where the input is unusable.
"""

import argparse
import gc
import json
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except ImportError as error:
        print(f"records: {error}: pip install -r requirements.txt", file=sys.stderr)
    except OSError as error:
        # What is written is written beside first, under a name with .part, which is no person's file.
        name = re.sub(r"\.part(?=\.\w+$|$)", "", str(error.filename or "a file"))
        print(f"records: {name}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    except ValueError as error:
        print(f"records: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    desk = argparse.ArgumentParser(prog="python -m records", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    places = desk.add_subparsers(metavar="VERB", required=True)
    for run, example, arguments in VERBS:
        place = places.add_parser(run.__name__.rstrip("_"), help=run.__doc__, description=run.__doc__,
                                  epilog=f"example: python -m records {example}")
        place.set_defaults(run=run)
        for names, settings in arguments:
            place.add_argument(*names, **settings)
    return desk


def show(result: dict, text: str, options: argparse.Namespace) -> int:
    print(json.dumps(result, indent=1) if options.json else fold(text) if sys.stdout.isatty() else text)
    return 0 if result["verdict"] else 1


def fold(text: str) -> str:
    """Break sentences at the width of the terminal; tables, which are narrow, and source lines stay."""
    width = shutil.get_terminal_size().columns
    lines = (textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
             if len(line) > width and line[0].isalnum() else [line] for line in text.split("\n"))
    return "\n".join(part for parts in lines for part in parts)


def free(output: str | None) -> str | None:
    """The file that -o names, in a folder that exists, before there is work to lose."""
    if output and Path(output).is_dir():
        raise ValueError(f"-o {output} is a folder: name a file in it")
    if output and not Path(output).parent.is_dir():
        raise ValueError(f"-o {output}: there is no folder {Path(output).parent}")
    return output


VERBS = []


def verb(example: str, *arguments: tuple[tuple, dict]):
    """The decorated function is a verb: its name, its first line of help, and what it takes."""
    def add(run):
        VERBS.append((run, example, arguments))
        return run
    return add


def argument(*names: str, **settings) -> tuple[tuple, dict]:
    return names, settings


LOGS = argument("logs", nargs="+", metavar="LOG")
JSON = argument("--json", action="store_true", help="for machines")
ALL = argument("--all", action="store_true", help="show every common step, not only the last")
READING = (
    argument("--mixed", action="store_true", help="look at runs that are not one sample"),
    argument("--metric", metavar="NAME", help="the loss to read (default: the one that the program claims)"),
)


# The modules of a verb are imported where it runs: none waits for what another needs.

@verb("verify logs/", LOGS, *READING, ALL, JSON,
      argument("--markdown", action="store_true", help="the tables of a submission"))
def verify(options: argparse.Namespace) -> int:
    """is it a record? the official rule at every step that the runs share"""
    from records import verify as desk
    from records.sample import gather
    result = desk.verify(gather(options.logs, options.mixed, options.metric))
    return show(result, desk.markdown(result) if options.markdown else desk.text(result, options.all), options)


@verb("reproduce logs/ --of 17", LOGS, *READING, JSON,
      argument("--of", type=int, default=17, metavar="N", help="the published result (default 17)"))
def reproduce(options: argparse.Namespace) -> int:
    """is it the same as a published result? an equivalence test, from one run on"""
    from records import reproduce as desk
    from records.published import METRICS
    from records.sample import gather
    new = gather(options.logs, options.mixed, options.metric or METRICS.get(options.of))
    published = gather([str(options.of)], options.mixed, options.metric or new.metric)
    if new.metric != published.metric and not options.metric:  # it has no average
        new = gather(options.logs, options.mixed, published.metric)
    result = desk.reproduce(new, published)
    return show(result, desk.text(result), options)


@verb("compare 'logs/new-*.txt' logs/old 17", argument("new", metavar="A"),
      argument("others", nargs="+", metavar="B"), *READING, ALL, JSON)
def compare(options: argparse.Namespace) -> int:
    """is A better than B, than C? each is a folder, a quoted glob, or a published result's number"""
    from records import compare as desk
    from records.sample import gather
    new, *others = (gather([name], options.mixed, options.metric) for name in (options.new, *options.others))
    result = desk.compare(new, others)
    return show(result, desk.text(result, options.all), options)


@verb("diff 17_aurora 36_muon_tuned", argument("a", metavar="A", help="a log, a .py file, or a recipe's folder"),
      argument("b", metavar="B"), JSON)
def diff(options: argparse.Namespace) -> int:
    """what changed between two programs or recipes: update rules, constants, source; code 0 where nothing did"""
    from records import diff as desk
    result = desk.diff(options.a, options.b)
    return show(result, desk.text(result), options)


@verb("lint logs/RUN.txt --against logs/BASE.txt", argument("log", metavar="LOG", help="a log, or a .py file"),
      argument("--against", metavar="BASE", help="whose data and model count as unchanged (default: this project's "
               "train_gpt.py for its logs, upstream's baseline for others)"), JSON)
def lint(options: argparse.Namespace) -> int:
    """what a program changed of that which the rules fix; code 0 where nothing did"""
    from records import lint as desk
    result = desk.lint(options.log, options.against)
    return show(result, desk.text(result), options)


@verb("plan logs/ --price 2.5", LOGS, *READING, JSON,
      argument("--step", type=int, metavar="N", help="an evaluated step (default: the one that verify quotes)"),
      argument("--price", type=float, metavar="P", help="of a GPU for an hour"),
      argument("--gpus", type=int, metavar="G", help="that a run takes (default: as the log says)"))
def plan(options: argparse.Namespace) -> int:
    """how likely n runs are to pass, how many more are needed, and what they cost"""
    from records import plan as desk
    from records.sample import gather
    sample = gather(options.logs, options.mixed, options.metric)
    result = desk.plan(sample, options.step, options.price, options.gpus)
    return show(result, desk.text(result), options)


@verb("plot 'logs/new-*.txt' logs/old --over 17 -o curves.png", argument("sets", nargs="+", metavar="A"), *READING,
      argument("--over", type=int, nargs="+", default=[], metavar="N", help="published results, grey behind"),
      argument("-o", metavar="FILE", dest="output", default="curves.png", help=".png or .svg (default curves.png)"))
def plot(options: argparse.Namespace) -> int:
    """draw sets of runs, each a folder, a quoted glob, or a published result's number"""
    from records import plot as desk
    from records.sample import from_published, gather
    output = free(options.output)
    sets = [gather([name], options.mixed, options.metric) for name in options.sets]
    desk.plot(sets, [from_published(record, options.metric) for record in options.over], output)
    print(options.output)
    return 0


@verb("report -o report.html", argument("logs", nargs="*", metavar="LOG", help="(default: the logs in records/)"),
      argument("-o", metavar="FILE", dest="output", default="report.html", help="(default report.html)"), READING[1])
def report(options: argparse.Namespace) -> int:
    """one HTML page that needs no network: leaderboard, curves to hover, zoom and switch, tables that sort"""
    from records import report as desk
    desk.report(options.logs, free(options.output), options.metric)
    print(options.output)
    return 0


@verb("list records/ logs/", argument("logs", nargs="*", metavar="LOG"), READING[1], JSON)
def list_(options: argparse.Namespace) -> int:
    """the published results and our own; or the groups of runs in LOGs, by program and device"""
    from records import leaderboard
    result = leaderboard.leaderboard(options.logs, options.metric)
    return show(result, leaderboard.text(result), options)


@verb("neurons logs/RUN.txt -o neurons.png", argument("log", metavar="LOG"),
      argument("-o", metavar="FILE.png", dest="output", help="draw it: over time, and layer by layer"))
def neurons(options: argparse.Namespace) -> int:
    """which neurons of the MLPs take part, in a run with --neurons K"""
    from records import neurons as desk
    desk.neurons(options.log, free(options.output))
    return 0


@verb("extract logs/RUN.txt -o train.py", argument("log", metavar="LOG"),
      argument("-o", metavar="FILE", dest="output", help="write it to a new file"))
def extract(options: argparse.Namespace) -> int:
    """the program that ran, byte for byte"""
    from records.diff import program
    source = program(options.log)
    if free(options.output):
        if Path(options.output).exists():
            raise ValueError(f"-o {options.output} is there already, and is not overwritten: name another file")
        with open(options.output, "xb") as file:
            file.write(source)
    else:
        sys.stdout.buffer.write(source)
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows; `extract LOG | head` then ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding ends no verb
        stream.reconfigure(errors="backslashreplace")
    gc.disable()  # syntax trees are many small objects: looking for garbage among them doubles the time
    sys.exit(main())
