"""What the benchmarks share: their command line, the line that says where a number was made, and their tables."""

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import train_gpt

RESULTS = Path(__file__).parent / "results"


def provenance() -> str:
    """One line: GPU and driver or CPU, threads, torch, Triton, Python, commit."""
    if torch.cuda.is_available():
        driver = train_gpt.output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        machine = f"{torch.cuda.get_device_name()}, driver {driver}"
    else:
        machine = train_gpt.processor()
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    commit = train_gpt.output_of("git", "-C", str(train_gpt.HERE), "describe", "--always", "--dirty")
    return (f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, Triton {triton}, "
            f"Python {platform.python_version()}, commit {commit or 'none'}")


def parse(name: str, description: str, words: list[str]) -> tuple[list[str], Path]:
    """The words of a command line, and the folder that its table goes to."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("-o", dest="out", metavar="FOLDER", type=Path, default=RESULTS, help="default: bench/results")
    args = parser.parse_intermixed_args(words)
    return args.words, args.out


def publish(name: str, words: list[str], out: Path, *parts: str):
    """Print the command, its provenance and the parts, and write them to NAME.md, whole."""
    head = f"# python -m bench.{name} {' '.join(words)}".rstrip()
    text = "\n\n".join([head, f"{provenance()}.", *parts]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    beside = out / f".{name}.md.{os.getpid()}"
    beside.write_text(text)
    beside.replace(out / f"{name}.md")
    print(text, end="")


def shown(value, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict]) -> str:
    """A table of rows with equal keys; columns whose first value is a number are aligned to the right."""
    head = [key.replace("|", r"\|") for key in rows[0]]
    rule = ["---:" if isinstance(value, (int, float)) else "---" for value in rows[0].values()]
    lines = [head, rule] + [[shown(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
