"""What the programs of data/ and the doctor say on a full and on a read-only disk, and what they leave there.

    sudo python -m tests.drills.faults_data      (it mounts small file systems in memory, for which it must be root)

Each case is a fresh tmpfs of 1 MiB with 1.2 MB of text beside it. Prints a table and writes it to
tests/drills/results/faults_data.md. Two processes in one folder are in tests/test_data.py.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import publish

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ["data/local.py", "TEXTS", "--encoding", "bytes", "--val-tokens", "1000", "--out", "DISK/out"]
FINEWEB = ["data/fineweb.py", "TEXTS/a.txt", "TEXTS/b.txt", "--shard-tokens", "100000", "--out", "DISK/out"]
DOCTOR = ["-m", "harness.doctor"]


@contextlib.contextmanager
def disk(folder: Path, read_only: bool):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def attempt(words: list[str], read_only: bool, folder: Path) -> list[str]:
    """The exit code, the first line that names what is wrong, and the files that are left."""
    words = [word.replace("TEXTS", f"{folder}/texts").replace("DISK", f"{folder}/disk") for word in words]
    program = [sys.executable, *(str(ROOT / word) if word.startswith("data/") else word for word in words)]
    with disk(folder / "disk", read_only):
        run = subprocess.run(program, cwd=folder / "disk", capture_output=True, text=True,
                             env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
        left = sorted(str(path.relative_to(folder)) for path in (folder / "disk").rglob("*") if path.is_file())
    found = [line for line in run.stdout.splitlines() if line.startswith("FOUND")] or run.stderr.splitlines()
    assert "Traceback" not in run.stderr, run.stderr
    return [str(run.returncode), f"`{found[0].replace(f'{folder}/', '')}`", ", ".join(left) or "nothing"]


def main():
    table = ["| program | disk | exit | first line | left there |", "|---|---|---:|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder, "texts")
        texts.mkdir()
        for name, letter in (("a", "b"), ("b", "c")):
            (texts / f"{name}.txt").write_text(f"{name} {letter} " * 150_000)
        for words in (LOCAL, FINEWEB, DOCTOR):
            for read_only in (False, True):
                cells = attempt(words, read_only, Path(folder))
                table.append(f"| {' '.join(words[:1] if words != DOCTOR else words[1:])} | "
                             f"{'read-only' if read_only else '1 MiB'} | {' | '.join(cells)} |")
    publish("tests.drills.faults_data", [], Path(__file__).parent / "results",
            "A tmpfs of 1 MiB and 1.2 MB of text; paths are shortened.", "\n".join(table))


if __name__ == "__main__":
    main()
