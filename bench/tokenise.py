"""Speed of the tokenizer that data/fineweb.py runs on every core.

    python -m bench.tokenise [FILE ...] [-o FOLDER]      default: the sources of the standard library

One process, one core, GPT-2's encoding.
"""

import statistics
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import fineweb

from bench import markdown, parse, publish

MEGABYTES, REPEATS = 20, 3


def main(words: list[str]):
    paths, out = parse("tokenise", __doc__, words)
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
    publish("tokenise", [Path(path).name for path in paths], out,
            f"One core, tiktoken; {size / 1e6:.1f} MB of text, {len(tokens):,} tokens; median of {REPEATS}.",
            markdown([{"MB/s a core": statistics.median(rates), "lowest": min(rates), "highest": max(rates)}]))


if __name__ == "__main__":
    main(sys.argv[1:])
