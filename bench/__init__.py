"""What the benchmarks share: command line, where a number was made, times and memory, tables."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train_gpt

RESULTS = Path(__file__).parent / "results"


def provenance() -> str:
    """One line: GPU and driver or CPU, threads, torch, Triton, Python, commit; dirty if more than results changed."""
    if torch.cuda.is_available():
        driver = train_gpt.output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        machine = f"{torch.cuda.get_device_name()}, driver {driver}"
    else:
        machine = train_gpt.processor()
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    git = "git", "-C", str(train_gpt.HERE)
    commit = train_gpt.output_of(*git, "describe", "--always") or "unknown"
    dirty = train_gpt.output_of(*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!*/results/*")
    return (f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, Triton {triton}, "
            f"Python {platform.python_version()}, commit {commit}{'-dirty' * bool(dirty)}")


def parse(name: str, description: str, words: list[str]) -> tuple[list[str], Path]:
    """The words of a command line, and the folder that its table goes to."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("-o", dest="out", metavar="FOLDER", type=Path, default=RESULTS, help="default: bench/results")
    args = parser.parse_intermixed_args(words)
    return args.words, args.out


def run(name: str, main: Callable[[list[str]], None]):
    """A program on the words of its command line; a ValueError ends it with one line and exit code 1."""
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench.{name}: {error}")


def publish(name: str, words: list[str], out: Path, *parts: str, package: str = "bench"):
    """Print the command, its provenance and the parts, and write them to NAME.md, whole."""
    head = f"# python -m {package}.{name} {' '.join(words)}".rstrip()
    text = "\n\n".join([head, f"{provenance()}.", *parts]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    beside = out / f".{name}.md.{os.getpid()}"
    beside.write_text(text)
    beside.replace(out / f"{name}.md")
    print(text, end="")


def override(words: list[str]) -> train_gpt.Hyperparameters:
    """Result #17's on a GPU, @tiny's without one, and then the words."""
    return train_gpt.override(words if torch.cuda.is_available() else ["@tiny", *words])


def random_batch(hp: train_gpt.Hyperparameters, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step. They are drawn: a step takes the same time for any tokens."""
    generator = torch.Generator(device).manual_seed(0)
    shape = hp.batch_tokens // hp.sequence_length, hp.sequence_length + 1
    tokens = torch.randint(hp.vocab_size, shape, generator=generator, device=device)
    return tokens[:, :-1].int().contiguous(), tokens[:, 1:].contiguous()


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call of each, in turn: a drift of the machine's speed meets all. The GPU is waited for."""
    times = {name: [] for name in calls}
    for _ in tqdm(range(rounds), disable=None):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def most_memory(work: Callable) -> int:
    """The bytes of tensors that exist at once while it works, at most, above those from before."""
    if torch.cuda.is_available():
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        wait()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    held = most = 0
    events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def shown(value, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict]) -> str:
    """A table of rows with equal keys; columns whose first value is a number are aligned to the right."""
    head = [key.replace("|", r"\|") for key in rows[0]]
    rule = ["---:" if isinstance(value, (int, float)) else "---" for value in rows[0].values()]
    lines = [head, rule] + [[shown(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
