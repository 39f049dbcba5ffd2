"""Shards of tokens: how one is read, and which ones a run needs. They are checked before the run starts."""

import glob
import os

import numpy as np


def open_shard(path: str) -> np.ndarray:
    """Tokens of a .bin shard as a read-only map: 256 int32 of header (20240520, 1, count), then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=256)
    size = os.path.getsize(path)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError(f"{path} is not a token shard: delete it and make it again with the program in data/")
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{path} holds {(size - 1024) // 2} tokens, its header says {header[2]}: "
                         "delete it and make it again with the program in data/")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def batches_in(tokens: np.ndarray, batch_tokens: int) -> int:
    """As upstream counts: a batch is read while position + batch + 1 < length, so 100M tokens give 190 of 524,288."""
    return max(0, (len(tokens) - 2) // batch_tokens)


def find_shards(pattern: str, batch_tokens: int, batches: int, vocab_size: int) -> dict[str, int]:
    """{path: tokens} of the shards, in sorted order, that the first `batches` batches come from. ValueError names
    a shard that is missing, damaged, too short, or of another vocabulary."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise ValueError(f"no file {pattern}: python data/cached_fineweb10B.py downloads FineWeb, "
                         "python data/local.py makes shards of text on this machine")
    found, available = {}, 0
    while paths and available < batches:
        tokens = open_shard(path := paths.pop(0))
        if len(tokens) and tokens.max() >= vocab_size:
            raise ValueError(f"{path} holds token {tokens.max()}, vocab_size is {vocab_size}: "
                             "delete it and make it again with the program in data/")
        found[path] = len(tokens)
        available += batches_in(tokens, batch_tokens)
    if available < batches:
        raise ValueError(f"{batches} batches of {batch_tokens} tokens are needed, {pattern} holds {available}: "
                         "make or download more shards (see data/), or ask for less")
    return found


def fineweb_shards(hp) -> int:
    """How many of FineWeb's training shards, of 100M tokens each, the run reads; 0 where it reads other files."""
    batches = (100_000_000 - 2) // hp.batch_tokens
    return -(-hp.last_step // batches) if hp.train_files == type(hp).train_files else 0
