"""Shards of tokens: how one is read, and which ones a run needs.

Before the run starts, header and size of each are checked, and the tokens of the first: 1,000 shards are 200 GB, which
every rank would read. Of the others the tokens are checked where the run comes to them.
"""

import glob
import os
import re

import numpy as np


PUBLISHED = re.compile(r"data/(fineweb100?B)/fineweb_train_\*\.bin")  # where data/cached_*.py put training shards


class DamagedShard(ValueError):
    """A shard that is not as it should be; the message names it. All ranks meet it at the same step."""


def open_shard(path: str) -> np.ndarray:
    """Tokens of a .bin shard as a read-only map: 256 int32 of header (20240520, 1, count), then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=256)
    size = os.path.getsize(path)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise DamagedShard(f"{path} is not a token shard: delete it and make it again with the program in data/")
    if size != 1024 + 2 * int(header[2]):
        raise DamagedShard(f"{path} holds {(size - 1024) // 2} tokens, its header says {header[2]}: "
                           "delete it and make it again with the program in data/")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def check_tokens(tokens: np.memmap, vocab_size: int):
    """DamagedShard where one is outside of the vocabulary. Reads them all."""
    if len(tokens) and tokens.max() >= vocab_size:
        raise DamagedShard(f"{tokens.filename} holds token {tokens.max()}, vocab_size is {vocab_size}: "
                           "delete it and make it again with the program in data/")


def batches_in(tokens: np.ndarray, batch_tokens: int) -> int:
    """As upstream counts: a batch is read while position + batch + 1 < length, so 100M tokens give 190 of 524,288."""
    return max(0, (len(tokens) - 2) // batch_tokens)


def find_shards(pattern: str, batch_tokens: int, batches: int, vocab_size: int) -> dict[str, int]:
    """{path: tokens} of the shards, in sorted order, that the first `batches` batches come from. ValueError names
    a shard that is missing, damaged or too short, and the first one if it is of another vocabulary."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        named = PUBLISHED.fullmatch(pattern)
        raise ValueError(f"no file {pattern}: python data/cached_{named[1] if named else 'fineweb10B'}.py downloads "
                         "FineWeb, python data/local.py makes shards of text on this machine")
    found, available = {}, 0
    while paths and available < batches:
        tokens = open_shard(path := paths.pop(0))
        if not found:
            check_tokens(tokens, vocab_size)
        found[path] = len(tokens)
        available += batches_in(tokens, batch_tokens)
    if available < batches:
        raise ValueError(f"{batches} batches of {batch_tokens} tokens are needed, {pattern} holds {available}: "
                         "make or download more shards (see data/), or ask for less")
    return found


def download_of(hp) -> str:
    """What follows `python` to download FineWeb's shards, of 100M tokens each, that the run reads: the program and how
    many. Nothing where it reads other files."""
    named, batches = PUBLISHED.fullmatch(hp.train_files), (100_000_000 - 2) // hp.batch_tokens
    return f"data/cached_{named[1]}.py {-(-hp.last_step // batches)}" if named else ""
