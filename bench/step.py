"""The whole training step: train_gpt.py against the published form of it (bench/baseline.py), in turn in one process.

    python -m bench.step [@RECIPE] [NAME=VALUE ...] [-o FOLDER]

The recipe is result #17 on a GPU, @tiny without one, where nothing is compiled. The tokens are random: what a step
takes does not depend on them. Before anything is timed both train from equal weights on one batch, and their losses
must be the same but for bf16 rounding. From then on nothing may be compiled.

Utilisation is bench/roofline.py's FLOPs of the model, attention counted causal, over the card's data-sheet peak; its
predictions stand beside the times. Memory is the allocator's peak of a program, less what the other holds, and on a CPU
what a step holds at most beyond what stays. Parts are timed in steps that wait for the GPU before and after each of
them; groups are sums of torch.profiler's times by names of kernels, or on a CPU of operators, in another one.
"""

import contextlib
import importlib
import pkgutil
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from triton import KernelInterface

import kernels
import train_gpt
from bench import RULES, in_turn, most_memory, override, parse, random_batch, roofline, run, wait
from bench.baseline import Unfused
from bench.kernels import UNKNOWN, clocks
from bench.optimizer import WARM_UP, make_gradients
from bench.optimizer import ours as optimizer_of
from harness.log import facts
from harness.ranks import Place, join
from results import markdown, publish

ROUNDS, FIRST, WAITING = 8, 4, 2  # steps that are timed, that are compared, that are timed part by part
# Of a loss, before the first step and after it: in four steps of @tiny bf16 rounding leaves 1e-7 and 9e-4
FORWARD, TRAINED = 1e-4, 2e-3
OURS, PUBLISHED = "train_gpt.py", "published form"
KERNELS = [name for file in pkgutil.iter_modules(kernels.__path__)
           for name, value in vars(importlib.import_module(f"kernels.{file.name}")).items()
           if isinstance(value, KernelInterface)]
GROUPS = {  # of what the profiler names; the first that matches. Inductor names a kernel after all that it fuses
    "communication": "nccl|c10d|gloo",
    "Triton kernels of this project": f"^({'|'.join(KERNELS)})$",
    "elementwise, compiled": "^triton_poi",
    "reductions, compiled": "^triton_(red|per)",
    "attention": "flash|fmha|sdpa|attention|cudnn",  # of cuDNN nothing else runs
    "GEMM": "gemm|gemv|nvjet|cutlass|xmma|splitK|aten::(mm|addmm|bmm|baddbmm|mv)$",
    "copies": "Memcpy|Memset|copy|aten::(cat|stack|clone)$|CatArray",
    "reductions": "reduce|norm|aten::(sum|mean|cumsum|log_softmax)|softmax",
    "elementwise": "elementwise|multi_tensor_apply|foreach|adam|aten::",
    "other": "",
}


def drawn_weights(hp: train_gpt.Hyperparameters) -> dict[str, Tensor]:
    """No zeros and no ones, with which a run begins: the first loss depends on every weight."""
    with torch.device("meta"):
        model = train_gpt.GPT(hp)
    generator, values = torch.Generator().manual_seed(0), {}
    for name, p in model.named_parameters():
        scale = 1 if name == "embed.weight" else p.size(1) ** -0.5 if p.ndim == 2 else 0.1
        values[name] = scale * torch.randn(p.shape, generator=generator) + name.endswith("gains")
    return values


class Program(NamedTuple):
    step: Callable[[], Tensor]  # trains, returns the batch's summed loss
    model: nn.Module
    updates: list[tuple[object, str]]  # (owner, name) of the methods that are the optimizer


def ours(hp: train_gpt.Hyperparameters, place: Place, weights: dict, batch: tuple) -> Program:
    with place.device:
        model = train_gpt.GPT(hp)
    if place.device.type == "cuda":
        model.compile(dynamic=False)
    banks = train_gpt.make_banks(model, hp, place)
    train_gpt.fill(banks, weights)
    steps = count()

    def step():
        loss = train_gpt.accumulate_gradients(model, banks, batch, hp)
        train_gpt.update(banks, next(steps))
        return loss
    return Program(step, model, [(bank, "advance") for bank in banks])


def published(hp: train_gpt.Hyperparameters, place: Place, weights: dict, batch: tuple) -> Program:
    program = Unfused(hp, weights, place.device)
    return Program(lambda: program.step(batch), program.model, [(each, "step") for each in program.optimizers])


def held() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def begin(make: Callable[[], Program]) -> tuple[Program, list[float], int]:
    """A program after its first steps, their losses, and its memory once everything is compiled."""
    before = held()
    program = make()
    losses = [program.step()]
    stays = held() - before
    passes = most_memory(lambda: losses.extend(program.step() for _ in range(FIRST - 1)))
    return program, [loss.item() for loss in losses], stays + passes


def compare(mine: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two losses. ValueError where the programs do not compute the same."""
    off = [abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)]
    if not all(x <= (TRAINED if i else FORWARD) for i, x in enumerate(off)):
        raise ValueError(f"the two programs are not the same: their losses are {mine} and {theirs}")
    return max(off)


########################################
#           Where time goes            #
########################################

def parts(program: Program) -> dict[str, float]:
    """Milliseconds of a step by part, each waited for."""
    ms = Counter()

    def timed(name, call):
        def waited_for(*args):
            wait()
            start = time.perf_counter()
            result = call(*args)
            wait()
            ms[name] += 1000 * (time.perf_counter() - start)
            return result
        return waited_for
    methods = [(type(program.model), "__call__", "forward"), (Tensor, "backward", "backward"),
               *((owner, name, "optimizer") for owner, name in program.updates)]
    with contextlib.ExitStack() as stack:
        for owner, name, part in methods:
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        program.step()  # takes up to 0.4 s longer on a CPU, somewhere
        ms.clear()
        for _ in range(WAITING):
            timed("whole", program.step)()
    mean = {name: total / WAITING for name, total in ms.items()}
    whole = mean.pop("whole")
    return mean | {"gradient sums, collectives, the rest": whole - sum(mean.values())}


def group_of(name: str) -> str:
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


def profiled(program: Program) -> dict[str, Counter]:
    """{group: milliseconds of each kernel, or on a CPU operator}, of a step."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as record:
        program.step()
        wait()
    found = {group: Counter() for group in GROUPS}
    for event in record.events():
        if gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[group_of(event.name)][event.name] += event.time_range.elapsed_us() / 1000
        elif not gpu:
            found[group_of(event.name)][event.name] += event.self_cpu_time_total / 1000
    return found


def share_table(shares: dict[str, dict[str, float]], head: str) -> str:
    """Milliseconds and shares of {program: {part: ms}}, without the parts that no program has."""
    rows = []
    for part in next(iter(shares.values())):
        row = {head: part}
        for program, ms in shares.items():
            row |= {f"{program}, ms": ms[part], f"{program}, %": round(100 * ms[part] / sum(ms.values()), 1)}
        rows += [row] if any(ms[part] for ms in shares.values()) else []
    return markdown(rows)


def attention_that_ran(groups: dict[str, Counter]) -> str:
    return ", ".join(sorted({name[:60] for name in groups["attention"]}))


########################################
#               Results                #
########################################

def rows(hp: train_gpt.Hyperparameters, times: dict[str, list], memory: dict[str, int]) -> list[dict]:
    card = roofline.this_card()
    found = []
    for (name, each), form in zip(times.items(), ("fused", "published")):
        low, ms, high = statistics.quantiles(each, n=4)
        flops = roofline.flops(hp)["products"] + roofline.flops(hp)["attention"]
        utilisation = f"{flops / (ms / 1000) / (roofline.GPUS[card].peak * 1e12):.1%}" if card else UNKNOWN
        found.append({"program": name, "step, ms": ms, "quartiles": f"{low:.4g} to {high:.4g}",
                      "tokens/s": round(hp.batch_tokens / (ms / 1000)), "utilisation": utilisation,
                      "memory, GB": memory[name] / 1e9,
                      "predicted, ms": roofline.predict(hp, card, 1, form=form) if card else "none"})
    return found


def verdict(times: dict[str, list], memory: dict[str, int], updates: dict[str, float]) -> str:
    """`updates`: milliseconds of the optimizer by its rule. On a CPU no aim is met or missed."""
    gpu = torch.cuda.is_available()
    ms = statistics.median(times[OURS])
    faster, share = statistics.median(times[PUBLISHED]) / ms, memory[OURS] / memory[PUBLISHED]
    extra = updates["aurora"] - updates["muon"]
    cost = extra / (ms - extra)

    def judged(met: bool) -> str:
        return ("met" if met else "missed") if gpu else UNKNOWN
    return (f"{OURS} is {faster:.2f} times as fast (aim on a GPU: 1.5; {judged(faster >= 1.5)}), in {share:.2f} of the "
            f"memory (aim: 0.5; {judged(share <= 0.5)}). Aurora costs {100 * cost:.2f}% of a step more than Muon (aim: "
            f"1%; {judged(cost <= 0.01)}).")


def main(words: list[str]):
    words, out = parse("step", __doc__, words)
    hp = override(words)
    place = join(0, 0, 1, hp.head_dim)
    weights, batch = drawn_weights(hp), random_batch(hp, place.device)
    programs, losses, memory = {}, {}, {}
    for name, make in ((OURS, ours), (PUBLISHED, published)):
        programs[name], losses[name], memory[name] = begin(lambda: make(hp, place, weights, batch))
    difference = compare(*losses.values())
    graphs = counters["stats"]["unique_graphs"]
    times = in_turn({name: program.step for name, program in programs.items()}, ROUNDS)
    by_part = {name: parts(program) for name, program in programs.items()}
    groups = {name: profiled(program) for name, program in programs.items()}
    assert counters["stats"]["unique_graphs"] == graphs, "something was compiled again"
    gradients = make_gradients(hp, place.device)
    each = {"aurora": hp, "muon": replace(hp, matrix_update=RULES["muon"])}
    updates = in_turn({name: optimizer_of(hp, gradients, place).step for name, hp in each.items()}, WARM_UP + ROUNDS)
    ran = [line for line in facts(train_gpt.EXPERIMENT, hp, place, {}).splitlines()
           if line.startswith(("attention", "kernels", "newton", "update", "micro_batch"))]
    dist.destroy_process_group()
    publish("bench.step", words, out,
            f"Medians of {ROUNDS} steps of {hp.batch_tokens:,} random tokens, in turn in one process. {clocks()}. The "
            f"losses of the first {FIRST} steps differ by {difference:.1g} of themselves at most. {graphs} graphs were "
            f"compiled before, none since.", markdown(rows(hp, times, memory)),
            verdict(times, memory, {name: statistics.median(ms[WARM_UP:]) for name, ms in updates.items()}),
            f"{OURS} ran {'; '.join(ran)}. "
            + " ".join(f"Attention of {name}: {attention_that_ran(found)}." for name, found in groups.items()),
            "## By part, each waited for", share_table(by_part, "part"),
            "## By kernel" if torch.cuda.is_available() else "## By operator",
            share_table({name: {group: ms.total() for group, ms in found.items()} for name, found in groups.items()},
                        "group"))


if __name__ == "__main__":
    run("step", main)
