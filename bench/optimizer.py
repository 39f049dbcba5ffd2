"""The optimizer step of GPT, all of it: train_gpt.py's banks against the published form, one matrix after the other.

    python -m bench.optimizer [RULE ...] [@RECIPE] [NAME=VALUE ...] [-o FOLDER]

A RULE, a text in the language of rules.py or a name in bench.RULES (default: muon), stands beside aurora, the rule of
the recipe, which is result #17 on a GPU, @tiny without one. First all step three times from equal weights and
gradients, which are random, and aurora is held against the published form (bench/baseline.py); on a GPU the third step
is a replayed CUDA graph. Then all step in turn, in one process, with the collectives of one rank. Memory is what a step
holds at most beyond weights and gradients: the state, and what passes. A launch is a call by which the CPU has the GPU
do something; kernels are what it then does.
"""

import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import train_gpt
from bench import RULES, in_turn, most_memory, override, parse, run
from bench.baseline import separate, unfused_optimizers
from bench.kernels import UNKNOWN, clocks
from harness.ranks import Place, join
from results import markdown, publish

ROUNDS, WARM_UP = 20, 3
UNFUSED = "published form of aurora"


class Subject(NamedTuple):
    step: Callable[[], None]
    weights: dict[str, Tensor]  # masters, by their names in bench/baseline.py
    state: int = 0  # bytes of it that there are before the first step


def make_gradients(hp: train_gpt.Hyperparameters, device: torch.device) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in train_gpt.GPT(hp).named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    return {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}


def long_weights(model: nn.Module) -> dict[str, Tensor]:
    """Those that a run begins with, eight times as long: updates of all but the zeros meet the floor."""
    return {name: 8 * value for name, value in train_gpt.initial_weights(model, seed=0).items()}


def ours(hp: train_gpt.Hyperparameters, gradients: dict[str, Tensor], place: Place) -> Subject:
    with place.device:
        model = train_gpt.GPT(hp)
    banks = train_gpt.make_banks(model, hp, place)
    train_gpt.fill(banks, long_weights(model))
    weights = {}
    for bank in banks:
        for name, gradient in zip(bank.params, bank.views(bank.gradients)):
            gradient.copy_(gradients[name])
        weights |= dict(zip(bank.params, bank.views(bank.masters)))

    steps = count()

    def step():
        for bank in banks:
            bank.reduce()
        train_gpt.update(banks, next(steps))
    return Subject(step, separate(weights), sum(x.nbytes for bank in banks for x in bank.state.values()))


def published(hp: train_gpt.Hyperparameters, gradients: dict[str, Tensor], place: Place) -> Subject:
    with torch.device("meta"):
        model = train_gpt.GPT(hp)
    params = {name: nn.Parameter(value.to(place.device, torch.bfloat16 if name == "embed.weight" else torch.float32))
              for name, value in separate(long_weights(model)).items()}
    for name, gradient in separate(gradients).items():
        params[name].grad = gradient.to(params[name].dtype)
    optimizers = unfused_optimizers(params, hp)

    def step():
        for p in params.values():
            dist.all_reduce(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    return Subject(step, {name: p.detach() for name, p in params.items()})


def first_steps(subject: Subject) -> tuple[dict[str, Tensor], int]:
    """By how much three steps change each weight, and the memory that they take."""
    before = {name: w.clone() for name, w in subject.weights.items()}
    memory = most_memory(lambda: [subject.step() for _ in range(3)])
    return {name: w - before[name] for name, w in subject.weights.items()}, subject.state + memory


def compare(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two changes of a weight, relative to its length; ValueError where bf16 is no excuse."""
    off = {name: ((mine[name] - change).norm() / change.norm()).item() for name, change in theirs.items()}
    for name, x in off.items():
        if not x <= 0.05:  # bf16 leaves 3%: small singular values of random square matrices, mostly
            raise ValueError(f"the two optimizers differ by {x:.3f} of what they add to {name}")
    return max(off.values())


def launched(call: Callable) -> dict[str, int | str]:
    """What a call has the GPU do, and how."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("kernels", "launches", "CUDA graphs"), UNKNOWN)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    events = record.events()
    calls = [e.name for e in events if re.match("cu(da)?(Launch|GraphLaunch|Memcpy|Memset)", e.name)]
    return {"kernels": sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in events),
            "launches": len(calls), "CUDA graphs": sum("Graph" in name for name in calls)}


def verdict(ms: dict[str, float]) -> str:
    aim, times = 4 if torch.cuda.is_available() else 2, ms[UNFUSED] / ms["aurora"]
    return (f"aurora is {times:.2f} times as fast as its published form (aim: {aim}; "
            f"{'met' if times >= aim else 'missed'}).")


def main(words: list[str]):
    words, out = parse("optimizer", __doc__, words)
    overrides = [word for word in words if re.match(r"@|[\w.]+=", word)]
    hp = override(overrides)
    rules = [word for word in words if word not in overrides] or ["muon"]
    each = {rule: replace(hp, matrix_update=RULES.get(rule, rule)) for rule in rules} | {"aurora": hp}
    place = join(0, 0, 1, hp.head_dim)
    torch._dynamo.config.recompile_limit = 8 * len(each)  # programs, one a rule and shape: beyond it, eager
    gradients = make_gradients(hp, place.device)
    subjects = {name: ours(hp, gradients, place) for name, hp in each.items()}
    subjects[UNFUSED] = published(each["aurora"], gradients, place)
    del gradients
    changes, memory = {}, {}
    for name, subject in subjects.items():
        changes[name], memory[name] = first_steps(subject)
    difference = compare(changes["aurora"], changes[UNFUSED])
    del changes
    steps = {name: subject.step for name, subject in subjects.items()}
    ms = {name: statistics.median(times[WARM_UP:]) for name, times in in_turn(steps, WARM_UP + ROUNDS).items()}
    counts = {name: launched(step) for name, step in steps.items()}
    dist.destroy_process_group()
    publish("bench.optimizer", words, out,
            f"Medians of {ROUNDS} steps, in turn in one process. {clocks()}. Three steps of aurora and of its "
            f"published form differ by {100 * difference:.1f}% at most in what they add to a weight.",
            markdown([{"optimizer": name.replace("|", r"\|"), "ms": ms[name], "of aurora's": ms[name] / ms["aurora"],
                       "memory, MB": memory[name] / 1e6, **counts[name]} for name in steps]),
            verdict(ms))


if __name__ == "__main__":
    run("optimizer", main)
