"""A result in a folder: what a command found, and where it found that. For bench/, studies/ and tests/drills/."""

import csv
import io
import os
import platform
import shlex
from importlib import metadata
from pathlib import Path

import torch

from harness.log import output_of, processor

ROOT = Path(__file__).resolve().parent


def provenance() -> str:
    """One line: GPU and driver or CPU, threads, torch, Triton, Python, commit; dirty if more than results changed."""
    if torch.cuda.is_available():
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        machine = f"{torch.cuda.get_device_name()}, driver {driver}"
    else:
        machine = processor()
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    git = "git", "-C", str(ROOT)
    commit = output_of(*git, "describe", "--always") or "unknown"
    dirty = output_of(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!*/results/*")
    return (f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, Triton {triton}, "
            f"Python {platform.python_version()}, commit {commit}{'-dirty' * bool(dirty)}")


def shown(value, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict]) -> str:
    """A table of rows with equal keys; columns whose first value is a number are aligned to the right."""
    head = [key.replace("|", r"\|") for key in rows[0]]
    rule = ["---:" if isinstance(value, (int, float)) else "---" for value in rows[0].values()]
    lines = [head, rule] + [[shown(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(module: str, words: list[str], out: Path, *parts: str, rows: list[dict] | None = None, figure=None):
    """Print `python -m MODULE WORDS`, its provenance and the parts, and write them to NAME.md, NAME the module's last
    word; rows, if any, to NAME.csv, and a figure of matplotlib's to NAME.png. Each file is written whole."""
    name, machine, files = module.split(".")[-1], provenance(), {}
    if rows:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: shown(value, 7) for key, value in row.items()} for row in rows)
        files["csv"] = table.getvalue().encode()
    if figure:
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150, format="png")
        files["png"] = picture.getvalue()
        machine += f", matplotlib {metadata.version('matplotlib')}"
        parts = *parts, f"![{name}]({name}.png)"
    text = "\n\n".join([f"# {shlex.join(['python', '-m', module, *words])}", f"{machine}.", *parts]) + "\n"
    files["md"] = text.encode()
    out.mkdir(parents=True, exist_ok=True)
    for ending, raw in files.items():
        beside = out / f".{name}.{ending}.{os.getpid()}"
        beside.write_bytes(raw)
        beside.replace(out / f"{name}.{ending}")
    print(text, end="")
