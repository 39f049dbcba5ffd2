"""Makes training shards out of text with GPT-2's tokenizer, on all cores:  python data/fineweb.py [FILE ...]

Without arguments the text is FineWeb's 10-billion-token sample, fetched file by file into the Hugging
Face cache (some 30 GB); otherwise it is the given files: .parquet (column "text"), .jsonl (field
"text"), .txt (one document). Documents keep their order, each opened by GPT-2's end of text; the first
shard is for validation.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pyarrow.parquet
import tiktoken
from cached_fineweb10B import hub_errors, list_files
from huggingface_hub import hf_hub_download
from shards import END_OF_TEXT, SHARD_TOKENS, cut, make_shards, one_line_errors
from tqdm import tqdm

DATASET, SAMPLE = "HuggingFaceFW/fineweb", "sample/10BT"
BATCH_CHARACTERS = 1_000_000  # that a worker takes at a time: some 300 documents of FineWeb


def fetch(name: str, revision: str) -> Path:
    with hub_errors(name):
        return Path(hf_hub_download(DATASET, name, repo_type="dataset", revision=revision))


def read_parquet(path: Path) -> Iterator[tuple[str, float]]:
    file = pyarrow.parquet.ParquetFile(path)
    share = path.stat().st_size / max(file.metadata.num_rows, 1)
    for rows in file.iter_batches(columns=["text"]):
        for text in rows["text"].to_pylist():
            yield text, share


def read_jsonl(path: Path) -> Iterator[tuple[str, float]]:
    with open(path, "rb") as file:
        for line in file:
            if line.strip():  # one at the end, say, is not
                yield json.loads(line)["text"], len(line)


def read_txt(path: Path) -> Iterator[tuple[str, float]]:
    raw = path.read_bytes()
    yield raw.decode(), len(raw)


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}


def documents(path: Path) -> Iterator[tuple[str, float]]:
    """The documents of a file, each with its share of the file's bytes; ValueError names a bad one."""
    good = 0
    try:
        for text, share in READERS[path.suffix](path):
            if not isinstance(text, str):
                raise TypeError(f"{type(text).__name__} in place of text")
            yield text, share
            good += 1
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no text after {good} good documents ({error!r}); mend it") from error


def batches(paths: list[Path]) -> Iterator[tuple[list[str], float]]:
    """The documents of files in order, in lists for one worker, each list with its share of bytes."""
    texts, characters, size = [], 0, 0
    for text, share in itertools.chain.from_iterable(map(documents, paths)):
        texts.append(text)
        characters += len(text)
        size += share
        if characters >= BATCH_CHARACTERS:
            yield texts, size
            texts, characters, size = [], 0, 0
    yield texts, size


def encode(batch: tuple[list[str], float]) -> tuple[np.ndarray, float]:
    """The tokens of a batch, and its bytes. A lone surrogate becomes U+FFFD, which is tiktoken's rule."""
    texts, size = batch
    encoding = tiktoken.get_encoding("gpt2")
    tokens = []
    for text in texts:
        tokens.append(END_OF_TEXT)
        tokens += encoding.encode_ordinary(text)
    return np.array(tokens, np.uint16), size


def encode_files(groups: Iterable[list[Path]], size: int) -> Iterator[np.ndarray]:
    """Yields the tokens of all files in order; `size` is the bytes of the files, for the time left. OSError where a
    worker is killed."""
    tiktoken.get_encoding("gpt2")  # fetched once, before many workers ask for it
    workers = os.cpu_count()
    pool = ProcessPoolExecutor(workers, initializer=heed_nothing)
    waiting = deque()  # in order, a few a worker: all of FineWeb would not fit the memory
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        try:
            for batch in itertools.chain.from_iterable(map(batches, groups)):
                waiting.append(pool.submit(encode, batch))
                while len(waiting) > 4 * workers or waiting and waiting[0].done():
                    tokens, done = waiting.popleft().result()
                    bar.update(done)
                    yield tokens
            while waiting:
                tokens, done = waiting.popleft().result()
                bar.update(done)
                yield tokens
        except BrokenProcessPool:
            raise OSError("a worker was killed, perhaps because the memory was full: start again with fewer programs "
                          "beside this one") from None
        finally:
            pool.shutdown(cancel_futures=True)


def heed_nothing():
    """In a worker: a signal is the parent's to handle; SIGTERM is what the parent ends a worker with."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tokenise FineWeb, or text files, into shards for training.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE",
                        help=f"{', '.join(READERS)}; default: {SAMPLE} of {DATASET}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fineweb10B_own")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help="default %(default)s")
    args = parser.parse_args(arguments)
    for path in args.files:
        if path.suffix not in READERS:
            raise ValueError(f"{path}: give {', '.join(READERS)} files")
    if args.files:
        groups, size = [args.files], sum(path.stat().st_size for path in args.files)
        source = {"files": [path.name for path in args.files]}
    else:
        revision, found = list_files(DATASET, SAMPLE)
        groups, size = ([fetch(name, revision)] for name in found), sum(file.size for file in found.values())
        source = {"dataset": DATASET, "revision": revision, "files": list(found)}
    packages = ("huggingface_hub", "numpy", "pyarrow", "tiktoken")
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    making = {"program": "data/fineweb.py", **source, "encoding": "gpt2", "versions": versions}
    shards = cut(encode_files(groups, size), args.shard_tokens)
    print(make_shards(args.out, "fineweb", shards, making))


if __name__ == "__main__":
    with one_line_errors("data/fineweb.py"):
        main()
