"""Kills runs of two processes under torchrun's agent, resumes them, and compares each with one that nobody killed.

    python -m tests.drills.kill [KILLS]      default: 50

SIGKILL meets the agent and both ranks at once, at a random moment; every other time while a checkpoint is being
written. Then `--resume` goes on to the end: all tensors of the last checkpoint, the log's lines, the sidecar's losses
and the neurons' file must be those of the whole run. Then a single rank is killed, and another time stopped: how long
until the job has ended, and what does a person read? Writes tests/drills/results/kill.md.

The processes are forked from this one, which has imported PyTorch already: the rest is what torchrun does.
"""

import gzip
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

import train_gpt
from harness.checkpoint import read_checkpoint
from results import publish

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
from shards import write_shard

STEPS, EVERY = 30, 3
WORDS = ["train_files=train.bin", "val_files=val.bin", "batch_tokens=128", "sequence_length=16", "val_tokens=256",
         "micro_batch=4", "vocab_size=8192", "num_layers=2", "model_dim=32", "head_dim=16", f"train_steps={STEPS}",
         "val_every=10", "val_every_late=10", "target_loss=5", "--checkpoint-every", str(EVERY), "--neurons", "10"]


def tensors(state) -> list:
    """All of a state that is a tensor, by its place."""
    if isinstance(state, torch.Tensor):
        return [((), state)]
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return [((key, *place), tensor) for key, value in items for place, tensor in tensors(value)]


def curve(folder: Path) -> list:
    """(seed, step, losses) of every line of the sidecar, the log's lines without times, and the neurons' file."""
    (path,) = (folder / "logs").glob("*.txt")
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    lines = [re.sub(r" train_time.*", "", line) for line in path.read_text().split("=" * 100)[2].splitlines()]
    return ([(row["seed"], row["step"], *(x for name, x in row.items() if name.endswith("loss"))) for row in rows],
            [line for line in lines if not line.startswith("resumed: ")],
            gzip.open(path.with_suffix(".neurons.jsonl.gz")).read())


def checkpoint_of(folder: Path) -> Path:
    (found,) = (folder / "logs").glob("*.checkpoint")
    return found


def same(folder: Path, whole: Path) -> bool:
    ours, theirs = (tensors(read_checkpoint(checkpoint_of(f))) for f in (folder, whole))
    return (curve(folder) == curve(whole) and [place for place, _ in ours] == [place for place, _ in theirs] and
            all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs)))


def trainer(words: list[str]):
    """What a worker does."""
    torch.set_num_threads(1)
    train_gpt.main(words)


def start(folder: Path, words: list[str]) -> int:
    """Fork an agent with two ranks, in a process group of their own; its number. What they say is in folder/said."""
    folder.mkdir(exist_ok=True)
    if agent := os.fork():
        return agent
    try:
        os.setsid()
        os.chdir(folder)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1), os.dup2(said, 2)
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", max_restarts=0,
                              rdzv_endpoint="localhost:0", run_id=folder.name, start_method="fork")
        elastic_launch(config, trainer)(words)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def data(folder: Path):
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, 20, 128 * (STEPS + 2)).astype(np.uint16) * 7
    write_shard(folder / "train.bin", tokens)
    write_shard(folder / "val.bin", tokens[:300])


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def reached(folder: Path, step: int) -> bool:
    logs = list(folder.glob("logs/*.jsonl"))
    return bool(logs) and f'"step": {step}, ' in logs[0].read_text()


def kill(folder: Path, moment: random.Random, writing: bool) -> bool:
    """Start a run and kill it after its first checkpoint; whether that left a checkpoint half-written."""
    data(folder)
    agent = start(folder, WORDS)
    step, delay = moment.randrange(EVERY + 2, STEPS - EVERY), moment.random() * 0.1
    wanted = ["manifest.json", "*.part"] if writing else ["manifest.json"]
    while not ended(agent) and not (reached(folder, step) and
                                    all(list(folder.glob(f"logs/*.checkpoint/{name}")) for name in wanted)):
        time.sleep(0.001)
    time.sleep(0 if writing else delay)
    if not ended(agent):
        os.killpg(agent, signal.SIGKILL)
    if os.waitpid(agent, 0)[1] != signal.SIGKILL:  # it was quicker: another moment
        assert checkpoint_of(folder), (folder / "said").read_text()
        shutil.rmtree(folder)
        return kill(folder, moment, writing)
    return bool(list(folder.glob("logs/*.checkpoint/*.part")))


def finish(folder: Path, words: list[str]):
    assert os.waitpid(start(folder, words), 0)[1] == 0, (folder / "said").read_text()


def resumed(folder: Path, whole: Path) -> bool:
    """Whether the run goes on to the same end."""
    finish(folder, ["--resume", f"logs/{checkpoint_of(folder).name}"])
    return same(folder, whole)


def kills(folder: Path, count: int, seed: int = 0) -> tuple[int, int]:
    """(runs that end as the whole one, runs killed within the writing of a checkpoint), of `count`."""
    data(folder / "whole")
    finish(folder / "whole", WORDS)
    moment, equal, halves = random.Random(seed), 0, 0
    for i in tqdm(range(count), desc="killed and resumed", disable=None):
        run = folder / f"run{i}"
        halves += kill(run, moment, writing=i % 2 == 1)
        equal += resumed(run, folder / "whole")
    return equal, halves


def lose(folder: Path, number: signal.Signals) -> tuple[float, list[str]]:
    """Send rank 1 a signal in the middle of a run. Seconds until the job has ended, and what it says of it."""
    data(folder)
    agent = start(folder, WORDS)
    while not reached(folder, STEPS // 2):
        time.sleep(0.001)
        assert not ended(agent), (folder / "said").read_text()
    before = len((folder / "said").read_text())
    rank1 = int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[1])
    os.kill(rank1, number)
    sent = time.perf_counter()
    status = os.waitpid(agent, 0)[1]
    seconds = time.perf_counter() - sent
    assert status and not Path(f"/proc/{rank1}").exists()
    said = (folder / "said").read_text()[before:]
    report = re.search(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", said[said.find("Root Cause"):])
    lines = re.findall(r"^train_gpt.py: .+$", said, re.MULTILINE)
    return seconds, [*lines, f"torchrun: rank {report[1]} ended with exit code {report[2]}"]


def main(count: str = "50"):
    began, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        equal, halves = kills(Path(folder), int(count))
        minutes = (time.perf_counter() - began) / 60
        lost = {name: lose(Path(folder, name), getattr(signal, name)) for name in ("SIGKILL", "SIGSTOP")}
        whole = [resumed(Path(folder, name), Path(folder, "whole")) for name in lost]
    what = (f"{STEPS} steps, a checkpoint every {EVERY}, two processes on the CPU under torchrun's agent; "
            f"load {load:.0f} before, {minutes:.0f} minutes.")
    lines = ["| runs killed | of them while a checkpoint was being written | resumed: equal to the whole run |",
             "|---:|---:|---:|", f"| {count} | {halves} | {equal} |", "",
             "| rank 1 is sent | the job has ended after | what is said | resumed: equal |", "|---|---:|---|---|",
             *(f"| {name} | {seconds:.0f} s | {'<br>'.join(said)} | {'yes' if equal else 'no'} |"
               for (name, (seconds, said)), equal in zip(lost.items(), whole))]
    publish("tests.drills.kill", [count], Path(__file__).parent / "results", what, "\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
