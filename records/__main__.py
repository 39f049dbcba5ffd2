"""The desk: `python -m records VERB ...`.

Exit code 0 where the verdict is yes, 1 where it is no, 2 where the input is unusable.
"""

import argparse
import signal
import sys

from records.log import read
from records.neurons import neurons
from records.verify import verify


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError) as error:
        print(f"records: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    desk = argparse.ArgumentParser(prog="python -m records", description=__doc__)
    verbs = desk.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("verify", help="is it a record? the official rule at every step")
    verb.add_argument("logs", nargs="+", metavar="LOG", help="files, globs, folders of .txt")
    verb.add_argument("--all", action="store_true", help="show every step, not only the last")
    verb.add_argument("--mixed", action="store_true", help="judge runs of different programs too")
    verb.set_defaults(run=lambda o: 0 if verify(o.logs, o.mixed, o.all) else 1)

    verb = verbs.add_parser("extract", help="the program that ran, byte for byte")
    verb.add_argument("log", metavar="LOG")
    verb.add_argument("-o", metavar="FILE", dest="output", help="write it to a new file")
    verb.set_defaults(run=extract)

    verb = verbs.add_parser("neurons", help="which neurons of the MLPs are dead (of runs with --neurons K)")
    verb.add_argument("log", metavar="LOG")
    verb.add_argument("-o", metavar="FILE.png", dest="output", help="draw it: over time, and layer by layer")
    verb.set_defaults(run=lambda o: neurons(o.log, o.output) or 0)
    return desk


def extract(options: argparse.Namespace) -> int:
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
    sys.exit(main())
