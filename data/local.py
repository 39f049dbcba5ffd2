"""Makes training shards out of text that is already on this machine:  python data/local.py [FOLDER ...]

The text is every UTF-8 file of the folders; without arguments, the Python sources of the standard
library. Tokens are GPT-2's where its vocabulary can be loaded; otherwise each byte becomes the GPT-2
token of that one byte, which needs no vocabulary and decodes with it. The same files give the same
shards, and are not tokenised a second time.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from shards import END_OF_TEXT, SHARD_TOKENS, cut, find_fault, make_shards, one_line_errors

STDLIB = Path(sysconfig.get_paths()["stdlib"]).resolve()
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
VOCABULARY_SECONDS = 15  # tiktoken downloads 1.5 MB with no time limit of its own

# GPT-2 numbers the bytes that print first, then the others: its ids 0 to 255 are this order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = bytes(PRINTABLE + sorted(set(range(256)) - set(PRINTABLE)))
BYTE_TO_ID = bytes.maketrans(BYTE_ORDER, bytes(range(256)))


def list_files(folder: Path, out: Path) -> dict[Path, tuple[str, int, int]]:
    """A folder's visible files but for those in out, sorted, each with its name, bytes and mtime (ns)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give its folder" if folder.exists() else
                         f"{folder}: there is no such folder")
    folder, out, files = folder.resolve(), out.resolve(), {}
    skipped, suffix = (NOT_THE_LIBRARY, ".py") if folder == STDLIB else ((), "")
    for root, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if n[0] != "." and n not in skipped and Path(root, n) != out]
        for path in (Path(root, n) for n in names if n[0] != "." and n.endswith(suffix)):
            if path.is_file():  # not a dangling link, a pipe or a socket
                stat = path.stat()
                files[path] = (path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns)
    return dict(sorted(files.items()))


def read_text(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, and what keeps it from being a text, or ""."""
    try:
        with open(path, "rb") as file:
            raw = file.read(8192)
            if b"\0" in raw:  # not worth reading whole
                return raw, "binary"
            raw += file.read()
        raw.decode()
    except OSError:
        return b"", "unreadable"
    except UnicodeDecodeError:
        return raw, "not UTF-8"
    return raw, "binary" if b"\0" in raw else "" if raw else "empty"


def read_texts(paths: Iterable[Path]) -> Iterator[bytes]:
    """The UTF-8 texts among the files, copies once: a text must not be on both sides of the split. Then a line says how
    many were read, and what was skipped. ValueError where there is none."""
    seen, skipped = set(), Counter()
    for path in paths:
        raw, why = read_text(path)
        digest = hashlib.sha256(raw).digest()
        if not why and digest in seen:
            why = "copies of another"
        if why:
            skipped[why] += 1
            continue
        seen.add(digest)
        yield raw
    left_out = "; skipped: " + ", ".join(f"{count} {why}" for why, count in skipped.items()) if skipped else ""
    if not seen:
        raise ValueError(f"there is no text in the folders{left_out}")
    print(f"read {len(seen)} texts{left_out}", flush=True)


def encode_bytes(raw: bytes) -> np.ndarray:
    ids = np.frombuffer(raw.translate(BYTE_TO_ID), np.uint8)
    return np.insert(ids.astype(np.uint16), 0, END_OF_TEXT)


def load_gpt2() -> Callable[[bytes], np.ndarray]:
    """The encoder for GPT-2's tokens; OSError where its vocabulary is not here in VOCABULARY_SECONDS."""
    outcome = ["it takes too long"]

    def load():
        try:
            import tiktoken

            outcome[:] = [tiktoken.get_encoding("gpt2")]
        except Exception as error:  # no package, no network, a bad download: all one here
            outcome[:] = [type(error).__name__]

    loader = threading.Thread(target=load, daemon=True)  # a hanging download must not hold up the exit
    loader.start()
    loader.join(VOCABULARY_SECONDS)
    if isinstance(outcome[0], str):
        raise OSError(f"GPT-2's vocabulary cannot be loaded: {outcome[0]}")
    return lambda raw: np.array([END_OF_TEXT, *outcome[0].encode_ordinary(raw.decode())], np.uint16)


def choose_encoding(asked: str) -> tuple[str, Callable[[bytes], np.ndarray]]:
    """The encoding's name and function, after a line that says which it is and why."""
    name, encode, why = "bytes", encode_bytes, "as asked"
    if asked != "bytes":
        try:
            name, encode, why = "gpt2", load_gpt2(), "its vocabulary is at hand"
        except OSError as error:
            if asked == "gpt2":
                raise OSError(f"{error}; check the network, or leave --encoding out") from error
            why = error
    print(f"encoding: {name} ({why})", flush=True)
    return name, encode


def split(
    documents: Iterator[np.ndarray], val_tokens: int, shard_tokens: int
) -> Iterator[np.ndarray]:
    """Yields a shard of whole documents with just over val_tokens tokens, then the training shards."""
    validation, held = [], 0
    for tokens in documents:
        validation.append(tokens)
        held += len(tokens)
        if held > val_tokens:  # over, as the last input needs its target
            yield np.concatenate(validation)
            break
    yield from cut(documents, shard_tokens)


def is_made(out: Path, making: dict) -> bool:
    """Whether the folder holds whole shards of this very making."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        whole = not any(find_fault(out / name, shard["sha256"]) for name, shard in manifest["shards"].items())
        return whole and making.items() <= manifest.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # whatever stands there
        return False


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make training shards out of text that is on this machine.")
    parser.add_argument("folders", nargs="*", type=Path, default=[STDLIB], metavar="FOLDER",
                        help="default: the Python standard library")
    parser.add_argument("--encoding", choices=["gpt2", "bytes"], default="auto",
                        help="default: gpt2 where its vocabulary can be loaded")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "local")
    parser.add_argument("--val-tokens", type=int, default=2**19, help="default %(default)s")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="default %(default)s")
    args = parser.parse_args(arguments)
    files = {}
    for folder in args.folders:
        files |= list_files(folder, args.out)
    making = {
        "program": "data/local.py",
        "folders": [folder.resolve().name for folder in args.folders],
        "files": len(files),
        "bytes": sum(size for _, size, _ in files.values()),
        "files_sha256": hashlib.sha256(json.dumps(list(files.values())).encode()).hexdigest(),
        "encoding_asked": args.encoding,
        "val_tokens": args.val_tokens,
        "shard_tokens": args.shard_tokens,
        "python": platform.python_version(),
    }
    if is_made(args.out, making):
        print(f"{args.out}: whole shards of these files are here already")
        return
    paths = list(files)
    random.Random(0).shuffle(paths)  # neighbours are alike: validation would be another distribution
    name, encode = choose_encoding(args.encoding)
    shards = split(map(encode, read_texts(paths)), args.val_tokens, args.shard_tokens)
    print(make_shards(args.out, "local", shards, {**making, "encoding": name}))


if __name__ == "__main__":
    with one_line_errors("data/local.py"):
        main()
