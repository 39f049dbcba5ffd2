"""Downloads FineWeb10B as GPT-2 tokens, ready for training:  python data/cached_fineweb10B.py [N]

The validation shard and N training shards (all 103 unless told; 100 million tokens, 200 MB each) of
the Hugging Face dataset kjj0/fineweb10B-gpt2 come into data/fineweb10B/, each held against the size
and sha256 that the hub publishes; the first download notes these in manifest.json, and later ones
ask no network about what is there, nor read again what has not changed since its sha256 was found
right. A download that was interrupted goes on with the shard that it was at: the client takes up a
broken connection within a file, but keeps no part of one when it ends (since 1.18, huggingface_hub
issue 4196). The 3175-step record reads 17. data/cached_fineweb100B.py does the same for ten times
as many.
"""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, hf_hub_download
from shards import HEADER_BYTES, alone, check_shard, find_fault, one_line_errors, write_manifest

DATA = Path(__file__).parent


class Published(NamedTuple):
    """A dataset of kjj0's on the hub: GPT-2 tokens of FineWeb, one shard for validation and the others to train on."""
    name: str
    training_shards: int

    @property
    def dataset(self) -> str:
        return f"kjj0/{self.name}-gpt2"

    @property
    def folder(self) -> Path:
        return DATA / self.name

    @property
    def program(self) -> str:
        return f"data/cached_{self.name}.py"


FINEWEB_10B = Published("fineweb10B", 103)


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


def manifest_of(published: Published) -> dict:
    """The manifest of the dataset's newest revision: tokens and sha256 of every shard."""
    revision, files = list_files(published.dataset)
    shards = {name: {"tokens": (file.size - HEADER_BYTES) // 2, "sha256": file.lfs.sha256}
              for name, file in files.items() if name.endswith(".bin")}
    return {"program": published.program, "dataset": published.dataset, "revision": revision, "shards": shards}


def noted(folder: Path, names: list[str]) -> dict | None:
    """The manifest of an earlier download; None where there is none that tells the hashes of these shards."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        hashes = [manifest["shards"][name]["sha256"] for name in names]
        manifest["found_right"] = dict(manifest.get("found_right", {}))
        return manifest if all(hashes) and manifest["revision"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_faults(folder: Path, names: list[str], manifest: dict) -> dict[str, str]:
    """{name: what is wrong} of the shards that are missing or damaged. manifest["found_right"] then tells of the others
    when each had last changed, by the file system's clock; one that has not since is not read: 1030 are 206 GB."""
    right = manifest.setdefault("found_right", {})

    def fault_of(name: str) -> str | None:
        path = folder / name
        changed = path.stat().st_ctime_ns if path.exists() else None  # before the reading, which takes a while
        unread = changed is not None and changed == right.get(name)
        fault = find_fault(path, None if unread else manifest["shards"][name]["sha256"])
        if not fault:
            right[name] = changed
        return fault

    with ThreadPoolExecutor() as pool:  # hashlib lets threads run side by side
        return {name: fault for name, fault in zip(names, pool.map(fault_of, names)) if fault}


def fetch(published: Published, name: str, manifest: dict) -> None:
    """Downloads a shard over what lies there, and once more if it arrives damaged; ValueError if it does again."""
    folder = published.folder
    for _ in range(2):
        with hub_errors(name):
            hf_hub_download(published.dataset, name, repo_type="dataset", revision=manifest["revision"],
                            local_dir=folder, force_download=(folder / name).exists())
        if not find_faults(folder, [name], manifest):
            return
    check_shard(folder / name, manifest["shards"][name]["sha256"])


def prepare(published: Published, names: list[str]) -> int:
    """Makes all these shards whole; returns how many were fetched for that."""
    folder = published.folder
    try:
        manifest = noted(folder, names) or manifest_of(published)
    except OSError as error:
        if any(find_fault(folder / name) for name in names):
            raise
        print(f"{error}: the {len(names)} shards here are of the right size, and were not hashed")
        return 0
    before = dict(manifest.get("found_right", {}))
    faults = find_faults(folder, names, manifest)
    for part in folder.glob(".cache/huggingface/download/*.incomplete"):
        part.unlink()  # of a process that was killed
    needed = sum(HEADER_BYTES + 2 * manifest["shards"][name]["tokens"] for name in faults)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{len(faults)} shards need {needed / 1e9:.1f} GB and {folder} has "
                         f"{free / 1e9:.1f} GB free; make room or ask for fewer")
    if faults or manifest["found_right"] != before:
        write_manifest(folder, manifest)
    for number, (name, fault) in enumerate(faults.items(), 1):
        damaged = f": {fault}; fetching it again" if (folder / name).exists() else ""
        print(f"{name} ({number} of {len(faults)}){damaged}", flush=True)
        fetch(published, name, manifest)
        write_manifest(folder, manifest)
    return len(faults)


def main(arguments: list[str] | None = None, published: Published = FINEWEB_10B) -> None:
    folder, most = published.folder, published.training_shards
    parser = argparse.ArgumentParser(description=f"Download {published.dataset} into data/{published.name}/.")
    parser.add_argument("count", nargs="?", type=int, default=most, metavar="N",
                        help=f"training shards of 100M tokens, default all {most}")
    count = parser.parse_args(arguments).count
    if not 1 <= count <= most:
        raise ValueError(f"{count} training shards; ask for 1 to {most}, which is all there are")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{n:06d}.bin" for n in range(1, count + 1)]
    with alone(folder):  # the hub's client deletes a file and fetches it again while another process reads it
        fetched = prepare(published, names)
    print(f"{folder}: validation and {count} training shards are whole, {fetched} of them fetched now")


if __name__ == "__main__":
    with one_line_errors(FINEWEB_10B.program):
        main()
