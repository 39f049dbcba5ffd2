"""The desk: `python -m records VERB ...`. Every verb has --help with an example.

LOG is a file, a folder or a glob; where a set of runs is asked for, also the
number of a published result. Exit code 0 where the verdict is yes, 1 where it
is no, 2 where the input is unusable.
"""

import argparse
import gc
import json
import shutil
import signal
import sys
import textwrap


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except ImportError as error:
        print(f"records: {error}: pip install -r requirements.txt", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"records: {error}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    desk = argparse.ArgumentParser(prog="python -m records", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = desk.add_subparsers(metavar="VERB", required=True)

    def add(run, example: str, reads_runs: bool = True) -> argparse.ArgumentParser:
        verb = verbs.add_parser(run.__name__.rstrip("_"), help=run.__doc__, description=run.__doc__,
                                epilog=f"example: python -m records {example}")
        verb.set_defaults(run=run)
        if reads_runs:
            verb.add_argument("--mixed", action="store_true", help="look at runs that are not one sample")
            verb.add_argument("--metric", default="val_loss", metavar="NAME",
                              help="the loss to read (default val_loss)")
        return verb

    verb = add(verify, "verify logs/")
    verb.add_argument("logs", nargs="+", metavar="LOG")
    verb.add_argument("--all", action="store_true", help="show every step, not only the last")
    verb.add_argument("--markdown", action="store_true", help="the tables of a submission")
    verb.add_argument("--json", action="store_true")

    verb = add(reproduce, "reproduce logs/ --of 17")
    verb.add_argument("logs", nargs="+", metavar="LOG")
    verb.add_argument("--of", type=int, default=17, metavar="N", help="the published result (default 17)")
    verb.add_argument("--json", action="store_true")

    verb = add(compare, "compare 'logs/new-*.txt' logs/old 17")
    verb.add_argument("new", metavar="A")
    verb.add_argument("others", nargs="+", metavar="B")
    verb.add_argument("--all", action="store_true", help="show every common step")
    verb.add_argument("--json", action="store_true")

    verb = add(diff, "diff logs/OLD.txt logs/NEW.txt", reads_runs=False)
    verb.add_argument("a", metavar="A", help="a log, or a .py file")
    verb.add_argument("b", metavar="B")
    verb.add_argument("--json", action="store_true")

    verb = add(plan, "plan logs/ --price 2.5 --gpus 8")
    verb.add_argument("logs", nargs="+", metavar="LOG")
    verb.add_argument("--step", type=int, metavar="N", help="an evaluated step (default: the one that verify quotes)")
    verb.add_argument("--price", type=float, metavar="P", help="of a GPU for an hour")
    verb.add_argument("--gpus", type=int, default=1, metavar="G", help="GPUs that a run takes (default 1)")
    verb.add_argument("--json", action="store_true")

    verb = add(lint, "lint logs/RUN.txt --against logs/BASE.txt", reads_runs=False)
    verb.add_argument("log", metavar="LOG", help="a log, or a .py file")
    verb.add_argument("--against", metavar="BASE", help="whose data and model count as unchanged (default: this "
                      "project's train_gpt.py for its logs, upstream's baseline for others)")
    verb.add_argument("--json", action="store_true")

    verb = add(plot, "plot 'logs/new-*.txt' logs/old --over 17 -o curves.png")
    verb.add_argument("sets", nargs="+", metavar="A")
    verb.add_argument("--over", type=int, nargs="+", default=[], metavar="N", help="published results, grey behind")
    verb.add_argument("-o", metavar="FILE", dest="output", default="curves.png",
                      help=".png or .svg (default curves.png)")

    verb = add(report, "report -o report.html")
    verb.add_argument("logs", nargs="*", metavar="LOG", help="(default: the logs in records/)")
    verb.add_argument("-o", metavar="FILE", dest="output", default="report.html", help="(default report.html)")

    verb = add(list_, "list records/ logs/")
    verb.add_argument("logs", nargs="*", metavar="LOG")
    verb.add_argument("--json", action="store_true")

    verb = add(extract, "extract logs/RUN.txt -o train.py", reads_runs=False)
    verb.add_argument("log", metavar="LOG")
    verb.add_argument("-o", metavar="FILE", dest="output", help="write it to a new file")

    verb = add(neurons, "neurons logs/RUN.txt -o neurons.png", reads_runs=False)
    verb.add_argument("log", metavar="LOG")
    verb.add_argument("-o", metavar="FILE.png", dest="output", help="draw it: over time, and layer by layer")
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


# The modules of a verb are imported where it runs: none waits for what another needs.

def verify(options: argparse.Namespace) -> int:
    """is it a record? the official rule at every step that the runs share"""
    from records import verify as desk
    from records.sample import gather
    result = desk.verify(gather(options.logs, options.mixed, options.metric))
    return show(result, desk.markdown(result) if options.markdown else desk.text(result, options.all), options)


def reproduce(options: argparse.Namespace) -> int:
    """is it the same as a published result? an equivalence test, from one run on"""
    from records import reproduce as desk
    from records.sample import gather
    published = gather([str(options.of)], options.mixed)
    result = desk.reproduce(gather(options.logs, options.mixed, options.metric), published)
    return show(result, desk.text(result), options)


def compare(options: argparse.Namespace) -> int:
    """is A better than B, than C? each is a folder, a quoted glob, or a published result's number"""
    from records import compare as desk
    from records.sample import gather
    new, *others = (gather([name], options.mixed, options.metric) for name in (options.new, *options.others))
    result = desk.compare(new, others)
    return show(result, desk.text(result, options.all), options)


def diff(options: argparse.Namespace) -> int:
    """what changed between two programs: constants, then source by section; code 0 where nothing did"""
    from records import diff as desk
    result = desk.diff(options.a, options.b)
    return show(result, desk.text(result), options)


def plan(options: argparse.Namespace) -> int:
    """how likely n runs are to pass, how many more are needed, and what they cost"""
    from records import plan as desk
    from records.sample import gather
    sample = gather(options.logs, options.mixed, options.metric)
    result = desk.plan(sample, options.step, options.price, options.gpus)
    return show(result, desk.text(result), options)


def lint(options: argparse.Namespace) -> int:
    """what a program changed of that which the rules fix; code 0 where nothing did"""
    from records import lint as desk
    result = desk.lint(options.log, options.against)
    return show(result, desk.text(result), options)


def plot(options: argparse.Namespace) -> int:
    """draw sets of runs, each a folder, a quoted glob, or a published result's number"""
    from records.sample import from_published, gather
    sets = [gather([name], options.mixed, options.metric) for name in options.sets]
    background = [from_published(record) for record in options.over]
    from records import plot as desk
    desk.plot(sets, background, options.output)
    print(options.output)
    return 0


def report(options: argparse.Namespace) -> int:
    """one HTML page that needs no network: leaderboard, curves to hover, zoom and switch, tables that sort"""
    from records import report as desk
    desk.report(options.logs, options.output, options.metric)
    print(options.output)
    return 0


def list_(options: argparse.Namespace) -> int:
    """the published results and our own; or the groups of runs in LOGs, by program and device"""
    from records import leaderboard
    result = leaderboard.leaderboard(options.logs, options.metric)
    return show(result, leaderboard.text(result), options)


def neurons(options: argparse.Namespace) -> int:
    """which neurons of the MLPs take part, in a run with --neurons K"""
    from records import neurons as desk
    desk.neurons(options.log, options.output)
    return 0


def extract(options: argparse.Namespace) -> int:
    """the program that ran, byte for byte"""
    from records.log import read
    source = read(options.log).source
    if options.output:
        with open(options.output, "xb") as file:  # a program already there is never overwritten
            file.write(source)
    else:
        sys.stdout.buffer.write(source)
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows; `extract LOG | head` then ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    gc.disable()  # syntax trees are many small objects: looking for garbage among them doubles the time
    sys.exit(main())
