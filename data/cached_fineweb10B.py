"""Downloads FineWeb10B as GPT-2 tokens, ready for training:  python data/cached_fineweb10B.py [N]

The validation shard and N training shards (all 103 unless told; 100 million tokens, 200 MB each) of
the Hugging Face dataset kjj0/fineweb10B-gpt2 come into data/fineweb10B/, each held against the size
and sha256 that the hub publishes; the first download notes these in manifest.json, and later ones
ask no network about what is there. A download that was interrupted goes on with the shard that it was
at: the client takes up a broken connection within a file, but keeps no part of one when it ends
(since 1.18, huggingface_hub issue 4196). The 3175-step record reads 17.
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from shards import HEADER_BYTES, alone, check_shard, find_fault, one_line_errors, write_manifest

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


def list_files(dataset: str, folder: str | None = None) -> tuple[str, dict]:
    """The dataset's newest revision, and what the hub says of each file of a folder in that revision."""
    with hub_errors(dataset):
        revision = HfApi().dataset_info(dataset).sha
        entries = HfApi().list_repo_tree(dataset, folder, repo_type="dataset", revision=revision)
        return revision, {entry.path: entry for entry in sorted(entries, key=lambda entry: entry.path)}


def published() -> dict:
    """The manifest of the dataset's newest revision: tokens and sha256 of every shard."""
    revision, files = list_files(DATASET)
    shards = {name: {"tokens": (file.size - HEADER_BYTES) // 2, "sha256": file.lfs.sha256}
              for name, file in files.items() if name.endswith(".bin")}
    return {"program": "data/cached_fineweb10B.py", "dataset": DATASET, "revision": revision, "shards": shards}


def noted(names: list[str]) -> dict | None:
    """The manifest of an earlier download; None where there is none that tells the hashes of these shards."""
    try:
        manifest = json.loads((FOLDER / "manifest.json").read_text())
        hashes = [manifest["shards"][name]["sha256"] for name in names]
        return manifest if all(hashes) and manifest["revision"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_faults(names: list[str], manifest: dict) -> dict[str, str]:
    """{name: what is wrong} of the shards that are missing or damaged."""
    with ThreadPoolExecutor() as pool:  # hashlib lets threads run side by side
        faults = pool.map(lambda name: find_fault(FOLDER / name, manifest["shards"][name]["sha256"]), names)
        return {name: fault for name, fault in zip(names, faults) if fault}


def fetch(name: str, manifest: dict) -> None:
    """Downloads a shard over what lies there, and once more if it arrives damaged; ValueError if it does again."""
    for _ in range(2):
        with hub_errors(name):
            hf_hub_download(DATASET, name, repo_type="dataset", revision=manifest["revision"], local_dir=FOLDER,
                            force_download=(FOLDER / name).exists())
        if not find_faults([name], manifest):
            return
    check_shard(FOLDER / name, manifest["shards"][name]["sha256"])


def prepare(names: list[str]) -> int:
    """Makes all these shards whole; returns how many were fetched for that."""
    try:
        manifest = noted(names) or published()
    except OSError as error:
        if any(find_fault(FOLDER / name) for name in names):
            raise
        print(f"{error}: the {len(names)} shards here are of the right size, and were not hashed")
        return 0
    faults = find_faults(names, manifest)
    for part in FOLDER.glob(".cache/huggingface/download/*.incomplete"):
        part.unlink()  # of a process that was killed
    needed = sum(HEADER_BYTES + 2 * manifest["shards"][name]["tokens"] for name in faults)
    free = shutil.disk_usage(FOLDER).free
    if needed > free:
        raise ValueError(f"{len(faults)} shards need {needed / 1e9:.1f} GB and {FOLDER} has "
                         f"{free / 1e9:.1f} GB free; make room or ask for fewer")
    if faults:
        write_manifest(FOLDER, manifest)
    for number, (name, fault) in enumerate(faults.items(), 1):
        damaged = f": {fault}; fetching it again" if (FOLDER / name).exists() else ""
        print(f"{name} ({number} of {len(faults)}){damaged}", flush=True)
        fetch(name, manifest)
    return len(faults)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Download FineWeb10B as GPT-2 tokens into data/fineweb10B/.")
    parser.add_argument("count", nargs="?", type=int, default=TRAINING_SHARDS, metavar="N",
                        help=f"training shards of 100M tokens, default all {TRAINING_SHARDS}")
    count = parser.parse_args(arguments).count
    if not 1 <= count <= TRAINING_SHARDS:
        raise ValueError(f"{count} training shards; ask for 1 to {TRAINING_SHARDS}, which is all there are")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{n:06d}.bin" for n in range(1, count + 1)]
    with alone(FOLDER):  # the hub's client deletes a file and fetches it again while another process reads it
        fetched = prepare(names)
    print(f"{FOLDER}: validation and {count} training shards are whole, {fetched} of them fetched now")


if __name__ == "__main__":
    with one_line_errors("data/cached_fineweb10B.py"):
        main()
