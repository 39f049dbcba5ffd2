"""Speed of the tokenizer that data/fineweb.py runs on every core.

    python -m bench.tokenise [FILE ...]      default: the sources of the standard library

One process, one core, GPT-2's encoding. Prints a table and writes it to bench/results/tokenise.md.
"""

import platform
import statistics
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import fineweb

MEGABYTES, REPEATS = 20, 3
RESULT = Path(__file__).parent / "results" / "tokenise.md"


def main(paths: list[str]):
    files = map(Path, paths) if paths else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(errors="replace") for path in files)
    size = len(text.encode())
    copies = max(1, MEGABYTES * 1_000_000 // size)
    fineweb.encode(([text[:1000]], 0))  # the vocabulary is loaded here
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(copies):
            tokens, _ = fineweb.encode(([text], 0))
        rates.append(size * copies / (time.perf_counter() - start) / 1e6)
    table = [f"# python -m bench.tokenise {' '.join(Path(p).name for p in paths)}".rstrip(), "",
             f"One core, Python {platform.python_version()}, tiktoken; {size / 1e6:.1f} MB of text, "
             f"{len(tokens):,} tokens; median of {REPEATS}.", "",
             "| MB/s a core | lowest | highest |", "|---:|---:|---:|",
             f"| {statistics.median(rates):.1f} | {min(rates):.1f} | {max(rates):.1f} |"]
    RESULT.write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main(sys.argv[1:])
