"""What the programs of this folder share: the .bin format, and the making of shards, whole or not at all.

A shard is 256 little-endian int32 (magic number, version, number of tokens, zeros), then its tokens as
little-endian uint16. A folder holds {prefix}_val_000000.bin, {prefix}_train_000001.bin, ... and a
manifest.json that says what made them. Format and names are those of modded-nanogpt and llm.c; the
trainer has a reader of its own.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000  # of the published FineWeb shards
END_OF_TEXT = 50256  # GPT-2's; it opens a document


def find_fault(path: Path, sha256: str | None = None) -> str | None:
    """What is wrong with a shard, which is of that sha256 if one is given; None of a whole one."""
    if not path.is_file():
        return "there is no such shard"
    with open(path, "rb") as file:
        magic, version, count = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        size, expected = os.fstat(file.fileno()).st_size, HEADER_BYTES + 2 * count
        if size < HEADER_BYTES:
            return f"its {size} bytes end within the header"
        if magic != MAGIC:
            return f"magic number {magic} where a shard has {MAGIC}"
        if version != VERSION:
            return f"version {version} where this code reads {VERSION}"
        if size != expected:
            return f"{size:,} bytes where the {count:,} tokens of its header need {expected:,}"
        file.seek(0)
        if sha256 and file_sha256(file) != sha256:
            return "its sha256 is another than the one on record"
    return None


def check_shard(path: Path, sha256: str | None = None) -> int:
    """The number of tokens of a whole shard; ValueError names the file, what is wrong, what to do."""
    if fault := find_fault(path, sha256):
        raise ValueError(f"{path}: {fault}; delete it and make or download it again")
    return (path.stat().st_size - HEADER_BYTES) // 2


def file_sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder if need be, and waits until no other process of this machine is in here with it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process is at work there; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # ENOSYS of Lustre without -o flock, ENOLCK of NFS without lockd
            print(f"{folder}: warning: it cannot be locked ({error.strerror}): let no other process work there",
                  flush=True)
        yield
    finally:
        os.close(lock)


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Writes a uint16 array as a shard, whole or not at all; returns the sha256 of the file."""
    assert tokens.dtype == np.uint16, "a wider type would wrap silently"
    raw = struct.pack("<256i", MAGIC, VERSION, len(tokens), *[0] * 253) + tokens.astype("<u2").tobytes()
    write_whole(path, raw)
    return hashlib.sha256(raw).hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    """Writes manifest.json, which says what made the shards of a folder and from what, whole or not at all."""
    write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def write_whole(path: Path, raw: bytes) -> None:
    """Writes beside the path and renames: a failure leaves what was there, and nothing else."""
    free = shutil.disk_usage(path.parent).free
    if len(raw) > free:
        raise OSError(f"{path} takes {len(raw):,} bytes and {free:,} are free there; make room")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(raw)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cut(documents: Iterable[np.ndarray], shard_tokens: int) -> Iterator[np.ndarray]:
    """Yields all tokens in shards of shard_tokens; a document may span two, the last may be shorter."""
    if shard_tokens < 1:
        raise ValueError(f"a shard of {shard_tokens} tokens: --shard-tokens must be at least 1")
    shard, filled = np.empty(shard_tokens, np.uint16), 0
    for tokens in documents:
        while filled + len(tokens) >= shard_tokens:
            room = shard_tokens - filled
            shard[filled:], tokens = tokens[:room], tokens[room:]
            yield shard
            shard, filled = np.empty(shard_tokens, np.uint16), 0
        shard[filled : filled + len(tokens)] = tokens
        filled += len(tokens)
    if filled:
        yield shard[:filled]


def make_shards(folder: Path, prefix: str, shards: Iterable[np.ndarray], making: dict) -> str:
    """Fills folder with shards, the first for validation, and a manifest: `making` and what each holds.

    The folder stays as it was until the last new shard is written. Returns a line that says what was made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as workshop:
        made = {}
        for number, tokens in enumerate(shards):
            name = f"{prefix}_{'train' if number else 'val'}_{number:06d}.bin"
            sha256 = write_shard(Path(workshop, name), tokens)
            documents = int(np.count_nonzero(tokens == END_OF_TEXT))
            made[name] = {"tokens": len(tokens), "documents": documents, "sha256": sha256}
        if len(made) < 2:
            raise ValueError("the text ends within the validation shard; give more, or make that shard smaller")
        with alone(folder):
            # The manifest goes first and comes last: a swap cut short must not look like a finished making.
            (folder / "manifest.json").unlink(missing_ok=True)
            for name in made:
                os.replace(Path(workshop, name), folder / name)
            for stale in set(folder.glob(f"{prefix}_train_*.bin")) - {folder / name for name in made}:
                stale.unlink()
            write_manifest(folder, {**making, "shards": made})
    validation, *training = (shard["tokens"] for shard in made.values())
    tokens = f"{validation:,} validation and {sum(training):,} training tokens"
    return f"{folder}: {tokens} in {len(made)} shards"


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with one line and exit code 1 where a person, a file, the machine or a signal is at fault."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, signal.default_int_handler)  # which tidies up
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{program}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: interrupted; nothing half-written is left")
