"""Time to verify a shard of the published size, 100 million tokens, before a run begins.

    python -m bench.verify_shard

Header, size and token range are the trainer's check of every shard that it will read; the sha256 is held against the
hub's by data/cached_fineweb10B.py. Random tokens in a temporary folder; "read from disk" after the kernel was told to
drop the file's pages. Prints a table and writes it to bench/results/verify_shard.md.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import train_gpt
from bench import RESULTS, publish

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from shards import SHARD_TOKENS, find_fault, write_shard  # noqa: E402

REPEATS = 5


def drop_pages(path: Path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_check(check, path: Path, cold: bool) -> list[float]:
    seconds = []
    for _ in range(REPEATS):
        if cold:
            drop_pages(path)
        start = time.perf_counter()
        check()
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    tokens = np.random.default_rng(0).integers(0, 50257, SHARD_TOKENS, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train_000001.bin")
        sha256 = write_shard(path, tokens)
        checks = {"header, size, token range": lambda: train_gpt.find_shards(str(path), 524288, 190, 50304),
                  "header, size, sha256": lambda: find_fault(path, sha256)}
        assert not find_fault(path, sha256) and find_fault(path, "0")
        what = (f"A shard of {SHARD_TOKENS:,} tokens, {os.path.getsize(path):,} bytes; one process of "
                f"{os.cpu_count()} cores, numpy {np.__version__}; median of {REPEATS}, lowest to highest.")
        table = ["| check | in memory, s | read from disk, s |", "|---|---:|---:|"]
        for name, check in checks.items():
            cells = [f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
                     for seconds in (time_check(check, path, cold) for cold in (False, True))]
            table.append(f"| {name} | {' | '.join(cells)} |")
    publish("verify_shard", [], RESULTS, what, "\n".join(table))


if __name__ == "__main__":
    main()
