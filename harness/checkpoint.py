"""A state of tensors, numbers and text in a folder: one file and manifest.json, which tells its size and sha256.

The file before stays until the new one is whole and named, so a kill at any moment leaves one to read. A plain
torch.save of what one process has gathered. torch.distributed.checkpoint would spread that over a file a rank, which no
single hash vouches for, and needs as many steps to rename them as one.

GPT-2 small's 1.38 GB cost a training on two CPU cores at most 1.7 s: 0.1 s of waiting and 1.6 s of a core.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import sys
import threading
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

torch.serialization.set_crc32_options(False)  # the sha256 vouches for more, and each costs as much of a core


########################################
#                 File                 #
########################################

OWN = re.compile(r"seed\d+-step\d+\.(pt|part)")  # the files that a run makes beside the manifest, and may remove


class Hashed(io.BufferedWriter):
    """A file that hashes what is written to it, and brings it to the disk 64 MB at a time.

    Hashing while writing saves a second read. Flushing every 64 MB keeps the page cache small: writing back 1.4 GB at
    once takes seconds of a core that trains.
    """

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.sha256, self.cached = hashlib.sha256(), 0

    def write(self, block) -> int:
        self.sha256.update(block)
        written = super().write(block)
        self.cached += written
        if self.cached >= 2**26:
            self.sync()
        return written

    def sync(self):
        self.flush()
        os.fsync(self.fileno())
        os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.cached = 0


@contextlib.contextmanager
def replacing(path: Path):
    """A file to write, which has the name `path` once all of it is on the disk, and never stays without."""
    part = path.with_suffix(".part")
    try:
        with Hashed(part) as file:
            yield file
            file.sync()
        os.rename(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_checkpoint(folder: Path, name: str, state: dict):
    """OSError, or torch's RuntimeError, where the disk takes no more; the checkpoint before is then whole."""
    folder.mkdir(exist_ok=True)
    path, manifest = folder / name, folder / "manifest.json"
    with replacing(path) as file:
        torch.save(state, file)
    with replacing(manifest) as text:
        text.write(json.dumps(dict(file=name, bytes=path.stat().st_size, sha256=file.sha256.hexdigest())).encode())
    for other in set(folder.iterdir()) - {path, manifest}:
        if OWN.fullmatch(other.name):  # what a person keeps there, under another name, stays
            other.unlink()


class Writer:
    """Writes checkpoints in a thread, one at a time, while the training goes on."""

    def __init__(self):
        self.thread = None

    def write(self, folder: Path, name: str, state: dict):
        """After a wait(). An error is a line, and costs this checkpoint alone."""
        def attempt():
            try:
                write_checkpoint(folder, name, state)
            except (OSError, RuntimeError) as error:
                while error.__context__ and not isinstance(error, OSError):  # torch.save's hides the disk's
                    error = error.__context__
                print(f"train_gpt.py: no checkpoint {folder}/{name}: {error}", file=sys.stderr)
        self.thread = threading.Thread(target=attempt)
        self.thread.start()

    def wait(self):
        """Return when the tensors of the state may change again."""
        if self.thread:
            self.thread.join()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def file_of(folder: Path) -> tuple[str, int, str]:
    """Name, bytes and sha256 of the state's file, as manifest.json tells them."""
    try:
        with open(folder / "manifest.json", encoding="utf-8") as file:
            manifest = json.loads(file.read(4096))
        return str(manifest["file"]), manifest["bytes"], manifest["sha256"]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {folder}/manifest.json on this machine: name a checkpoint that is here; "
                                "of several machines all see one logs/") from None
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{folder}/manifest.json is no manifest of a checkpoint") from None


def read_checkpoint(folder: Path, hashed: bool = True) -> dict:
    """The state that manifest.json names; ValueError, in one line, for any other content. No code in the file runs, and
    its tensors are mapped from it: to read it takes no memory, and, where it is not `hashed`, no time."""
    name, size, sha256 = file_of(folder)
    path = folder / name
    if not re.fullmatch(r"[\w-]+\.pt", name):
        raise ValueError(f"{folder}/manifest.json names {name!r}, which is no checkpoint's file")
    if os.path.getsize(path) != size or hashed and file_sha256(path) != sha256:
        raise ValueError(f"{path} is damaged: its size or sha256 is not what manifest.json says")
    try:
        # a few bytes may become any number: by compression, and torch lets a pickle call bytearray(N)
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type for entry in archive.infolist())
        if compressed or b"bytearray" in torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"):
            raise ValueError
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception:  # whatever zipfile, torch and its unpickler raise over a file that no run has written
        raise ValueError(f"{path} is no checkpoint: it is not made of tensors, numbers and text alone") from None


########################################
#            State of a run            #
########################################
# With --checkpoint-every N the newest state is in logs/NAME.checkpoint, in the end the last step's; SIGUSR1 saves at
# the next step, SIGTERM, SIGHUP and Ctrl-C save and stop; under nohup, which asks that a run outlives its terminal,
# SIGHUP saves alone. The place in the data follows from the step; nothing is drawn at random after the initial weights.

STATE = dict(hyperparameters=dict, source_sha256=str, end=int, neurons=int, every=int, failed=bool, result=int,
             seed=int, step=int, trial=dict, banks=list, lengths=dict)  # `end`: of the seeds
SAVE, STOP = 1, 2  # what a signal asks for: a checkpoint; a checkpoint and the end
SIGNALS = {signal.SIGUSR1: SAVE, signal.SIGTERM: STOP, signal.SIGINT: STOP, signal.SIGHUP: STOP}


def folder_of(word: str) -> Path:
    """The folder of the checkpoint that a person names, by itself, a file in it, or the run's log. ValueError for
    a file in it that is not the newest state."""
    path = Path(word)
    if path.suffix in (".txt", ".jsonl"):
        return path.with_suffix(".checkpoint")
    if path.name == "manifest.json":
        return path.parent
    if path.suffix != ".pt":
        return path
    if file_of(path.parent)[0] != path.name:
        raise ValueError(f"{path} is not the file that {path.parent}/manifest.json names: give the folder")
    return path.parent


def read_state(folder: Path, hashed: bool = True) -> dict:
    """A checkpoint that a run has written; ValueError, in one line, for any other."""
    state = read_checkpoint(folder, hashed)
    if not isinstance(state, dict) or {name: type(value) for name, value in state.items()} != STATE:
        raise ValueError(f"{folder} is no checkpoint of a run, or of another version's, whose commit its log names")
    return state


class Signals:
    """What signals have requested of this process. Where they are not heeded, SIGUSR1 is ignored, Ctrl-C is Python's
    KeyboardInterrupt, and the others that stop do what they did."""

    def __init__(self, heeded: bool):
        self.heeded, self.request = heeded, 0
        if not heeded:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as train_gpt.py begins
                signal.signal(signal.SIGINT, signal.default_int_handler)
            return
        asks = SIGNALS | ({signal.SIGHUP: SAVE} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else {})
        for number in asks:
            signal.signal(number, lambda number, _: setattr(self, "request", max(self.request, asks[number])))

    def agree(self, device: torch.device) -> int:
        """Collective: the strongest request that a signal has made of any rank since the last call, or 0. Synchronises
        with the GPU."""
        if not self.heeded:
            return 0
        request, self.request = torch.tensor(self.request, device=device), 0
        dist.all_reduce(request, dist.ReduceOp.MAX)
        return request.item()
