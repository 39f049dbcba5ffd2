"""Downloads FineWeb10B as GPT-2 tokens, ready for training:  python data/cached_fineweb10B.py [N]

The validation shard and N training shards (all 103 unless told; 100 million tokens, 200 MB each) of
the Hugging Face dataset kjj0/fineweb10B-gpt2 come into data/fineweb10B/. Whole shards are kept, so a
download that was interrupted goes on with the shard that it was at. The 3175-step record reads 17.
"""

import argparse
import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download
from shards import HEADER_BYTES, SHARD_TOKENS, check_shard, one_line_errors, write_manifest

DATASET = "kjj0/fineweb10B-gpt2"
FOLDER = Path(__file__).parent / "fineweb10B"
TRAINING_SHARDS = 103


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what the hub client raises into one OSError: its own errors share no base class."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{name} cannot be fetched ({error}); check network and disk, start again") from error


def is_whole(path: Path) -> bool:
    try:
        check_shard(path)
    except ValueError:
        return False
    return True


def fetch(name: str) -> None:
    """Downloads a shard, and once more where what lies there is damaged; ValueError if that is too."""
    path = FOLDER / name
    download = functools.partial(hf_hub_download, DATASET, name, repo_type="dataset", local_dir=FOLDER)
    with hub_errors(name):
        if not path.exists():
            download()
        if not is_whole(path):
            download(force_download=True)
    check_shard(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Download FineWeb10B as GPT-2 tokens into data/fineweb10B/.")
    parser.add_argument("count", nargs="?", type=int, default=TRAINING_SHARDS, metavar="N",
                        help=f"training shards of 100M tokens, default all {TRAINING_SHARDS}")
    count = parser.parse_args(arguments).count
    if not 1 <= count <= TRAINING_SHARDS:
        raise ValueError(f"{count} training shards; ask for 1 to {TRAINING_SHARDS}, which is all there are")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{n:06d}.bin" for n in range(1, count + 1)]
    missing = [name for name in names if not is_whole(FOLDER / name)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    needed = len(missing) * (HEADER_BYTES + 2 * SHARD_TOKENS)
    free = shutil.disk_usage(FOLDER).free
    if needed > free:
        raise ValueError(f"{len(missing)} shards need {needed / 1e9:.1f} GB and {FOLDER} has "
                         f"{free / 1e9:.1f} GB free; make room or ask for fewer")
    for number, name in enumerate(missing, 1):
        print(f"{name} ({number} of {len(missing)})", flush=True)
        fetch(name)
    manifest = {"program": "data/cached_fineweb10B.py", "dataset": DATASET,
                "shards": {name: {"tokens": check_shard(FOLDER / name)} for name in names}}
    write_manifest(FOLDER, manifest)
    print(f"{FOLDER}: validation and {count} training shards are whole, {len(missing)} of them fetched now")


if __name__ == "__main__":
    with one_line_errors("data/cached_fineweb10B.py"):
        main()
