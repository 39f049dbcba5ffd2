"""What the benchmarks share: command line, times and memory."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train_gpt

RESULTS = Path(__file__).parent / "results"
RULES = {  # result #17's with another direction
    "muon": "nesterov(0.95) | polar | contra(0.4) | aspect | floor(0.35) | step",
    "normuon": "nesterov(0.95) | jordan_polar | contra(0.4) | normuon(0.95) | aspect | floor(0.35) | step",
}


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


def override(words: list[str]) -> train_gpt.Hyperparameters:
    """Result #17's on a GPU, @tiny's without one, and then the words. Learning rates stay at their peak."""
    hp = train_gpt.override(words if torch.cuda.is_available() else ["@tiny", *words])
    return replace(hp, warmup_steps=1, train_steps=10**9)


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
