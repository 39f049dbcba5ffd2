"""Time and memory of an optimizer step over the 72 matrices of GPT-2 small, for some directions.

    python -m bench.directions [DIRECTION ...] [NAME=VALUE ...] [-o FOLDER]      default: muon aurora

NAME=VALUE overrides Hyperparameters, such as model_dim=256. `one matrix at a time` is result #17 as its script
writes it (bench/optimizer.py); aurora is checked against it first. All step in turn in one process, on equal
gradients, so that a drift of the machine's speed meets all.
"""

import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train_gpt
from aurora import Aurora, stacks
from bench import markdown, parse, publish
from bench.optimizer import OneByOne, compare

ROUNDS = 2  # of minutes each on two cores


def matrices(hp: train_gpt.Hyperparameters, device: torch.device) -> list[torch.nn.Parameter]:
    """Weights of the blocks' shapes, each with a gradient, both random."""
    with torch.device("meta"):
        shapes = [p.shape for p in train_gpt.GPT(hp).blocks.parameters() if p.ndim == 2]
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).mul_(0.02).to(device)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return params


def measure(work, device: torch.device) -> tuple[float, int]:
    """Seconds, and the bytes of tensors that exist at once, at most, above those from before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    held = most = 0
    events = (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return seconds, most


def main(words: list[str]):
    words, out = parse("directions", __doc__, words)
    names = [word for word in words if "=" not in word] or ["muon", "aurora"]
    hp = train_gpt.override([word for word in words if "=" in word])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = matrices(hp, device)
    group = dict(lr=1e-6)  # so small that the weights stay what they are
    # of one block, the first six: on the CPU a step over all takes minutes
    difference = compare(Aurora(params[:6], **group), OneByOne(params[:6], group))
    optimizers = {name: Aurora(params, direction=name, **group) for name in names}
    optimizers["one matrix at a time"] = OneByOne(params, group)
    times, memory = {name: [] for name in optimizers}, {}
    largest = max(sum(4 * p.numel() for p in stack) for stack in stacks(params))
    with tqdm(total=ROUNDS * len(optimizers), disable=None) as bar:
        for _ in range(ROUNDS):
            for name, optimizer in optimizers.items():
                seconds, most = measure(optimizer.step, device)
                times[name].append(seconds)
                memory[name] = most / largest  # of the last round: the first allocates the state
                bar.update()
    seconds = {name: statistics.mean(t) for name, t in times.items()}
    first = next(iter(seconds.values()))
    parts = [f"{len(params)} matrices, means of {ROUNDS} steps, in turn in one process. On one block aurora and one "
             f"matrix at a time differ by {100 * difference:.1f}% of an update at most (bf16). Memory: the most that a "
             "step holds at once beyond weights, gradients and state, in fp32 copies of the largest stack.",
             markdown([{"direction": name, "s a step": t, "of the first": t / first, "memory": memory[name]}
                       for name, t in seconds.items()])]
    if "aurora" in seconds:
        faster = seconds["one matrix at a time"] / seconds["aurora"]
        parts.append(f"aurora is {faster:.2f} times as fast as one matrix at a time.")
    publish("directions", words, out, *parts)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench.directions: {error}")
