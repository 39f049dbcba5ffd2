"""A state of tensors, numbers and text in a folder: one file and manifest.json, which tells its size and sha256.

The file before stays until the new one is whole and named, so a kill at any moment leaves one to read. A plain
torch.save of what one process has gathered: 1.4 GB for GPT-2 small with its optimizers. torch.distributed.checkpoint
would spread that over a file a rank, which no single hash vouches for, and needs as many steps to rename them as one.
"""

import hashlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch


def write_checkpoint(folder: Path, name: str, state: dict):
    """OSError, or torch's RuntimeError, where the disk takes no more; the checkpoint before is then whole."""
    folder.mkdir(exist_ok=True)
    part, path, manifest = folder / f"{name}.part", folder / name, folder / "manifest.json"
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        written = dict(file=name, bytes=os.path.getsize(part), sha256=file_sha256(part))
        os.rename(part, path)
        part.write_text(json.dumps(written))
        os.rename(part, manifest)
    finally:
        part.unlink(missing_ok=True)
    for other in set(folder.iterdir()) - {path, manifest}:
        other.unlink()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_checkpoint(folder: Path) -> dict:
    """The state that manifest.json names; ValueError, in one line, for any other content. No code in the file runs, and
    its tensors are mapped from it: to read it takes no memory."""
    try:
        with open(folder / "manifest.json") as file:
            manifest = json.loads(file.read(4096))
        name, size, sha256 = str(manifest["file"]), manifest["bytes"], manifest["sha256"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{folder}/manifest.json is no manifest of a checkpoint") from None
    path = folder / name
    if not re.fullmatch(r"[\w-]+\.pt", name):
        raise ValueError(f"{folder}/manifest.json names {name!r}, which is no checkpoint's file")
    if os.path.getsize(path) != size or file_sha256(path) != sha256:
        raise ValueError(f"{path} is damaged: its size or sha256 is not what manifest.json says")
    try:
        if any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError(f"{path} is compressed, which no checkpoint is")  # a few bytes may become any number
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise ValueError(f"{path} is no checkpoint: it is not made of tensors, numbers and text alone") from None
    return state
