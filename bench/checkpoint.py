"""What a checkpoint of GPT-2 small costs a training on the CPU.

    python -m bench.checkpoint

Training waits while the state is copied; after that it shares the cores with the thread that writes, and loses at
most the time that this one spends on a core. Their sum is what a checkpoint costs at most, whoever else uses the
machine. The same forward and backward passes are also timed with and without a checkpoint at their beginning, in turn,
until its file is whole: on a machine at rest the difference says the same. Writes bench/results/checkpoint.md.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import train_gpt
from bench import RESULTS
from checkpoint import Writer, read_checkpoint
from results import publish

REPEATS = 5
HP = train_gpt.override(["batch_tokens=128", "sequence_length=128", "val_tokens=128"])


def prepare() -> tuple:
    """The model and its banks as after a step: masters and moments; and a batch."""
    place = train_gpt.Place(0, 1, torch.device("cpu"))
    model = train_gpt.GPT(HP)
    banks = train_gpt.make_banks(model, HP, place)
    train_gpt.fill(banks, train_gpt.initial_weights(model, 0))
    for bank in banks:
        for x in bank.state.values():
            x.fill_(1e-3)
    batch = torch.randint(HP.vocab_size, (2, 1, HP.sequence_length), generator=torch.Generator().manual_seed(0))
    return model, banks, batch


def passes(model, banks, batch, count: int):
    for _ in range(count):
        train_gpt.accumulate_gradients(model, banks, tuple(batch), HP)


def save(banks, writer: Writer, folder: Path) -> float:
    """Seconds that the training waits for it."""
    start = time.perf_counter()
    writer.wait()
    writer.write(folder, "seed0-step1.pt", dict(banks=[bank.gather_state() for bank in banks]))
    return time.perf_counter() - start


def measure(folder: Path) -> tuple[list, list]:
    """(seconds without, with, of them waiting) of each repeat, and seconds on a core and in all of each writing."""
    model, banks, batch = prepare()
    writer, writings, write = Writer(), [], checkpoint.write_checkpoint

    def timed(*arguments):
        start = time.perf_counter(), time.thread_time()
        write(*arguments)
        writings.append((time.thread_time() - start[1], time.perf_counter() - start[0]))
    checkpoint.write_checkpoint = timed
    passes(model, banks, batch, 2)
    start = time.perf_counter()
    passes(model, banks, batch, 3)
    one = (time.perf_counter() - start) / 3
    first = save(banks, writer, folder)
    writer.wait()
    rows, count = [], max(3, round(1.5 * writings[0][1] / one))
    for _ in tqdm(range(REPEATS), disable=None):
        start = time.perf_counter()
        passes(model, banks, batch, count)
        without = time.perf_counter() - start
        start = time.perf_counter()
        waited = save(banks, writer, folder)
        passes(model, banks, batch, count)
        rows.append((without, time.perf_counter() - start, waited))
        writer.wait()
    assert len(read_checkpoint(folder)["banks"]) == len(banks)
    return [(0, 0, first), *rows], writings


def row(values) -> str:
    return f"{statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |"


def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        (first, *rows), writings = measure(Path(folder, "run.checkpoint"))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.pt"))
    core = [core for core, _ in writings[1:]]
    what = (f"GPT-2 small with its optimizers: {size / 1e9:.2f} GB; {os.cpu_count()} cores, load {load:.1f} before and "
            f"{os.getloadavg()[0]:.1f} after, of which this program is at most {torch.get_num_threads() + 1}. "
            f"Seconds, of {REPEATS} checkpoints after a first one, which waits {first[2]:.1f} s.")
    lines = ["| | median | lowest | highest |", "|---|---:|---:|---:|",
             f"| training waits | {row([waited for _, _, waited in rows])}",
             f"| the writing thread is on a core | {row(core)}",
             f"| **cost at most**, their sum | {row([r[2] + c for r, c in zip(rows, core)])}",
             f"| the file is whole after | {row([r[2] + w for r, (_, w) in zip(rows, writings[1:])])}",
             f"| measured: passes with it take longer by | {row([b - a for a, b, _ in rows])}",
             f"| where they take | {row([a for a, _, _ in rows])}"]
    publish("bench.checkpoint", [], RESULTS, what, "\n".join(lines))


if __name__ == "__main__":
    main()
