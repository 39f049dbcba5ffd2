"""Each kernel: its error against float64, then its time against the torch.compile'd reference.

    python -m bench.kernels [KERNEL ...] [-o FOLDER]      default: lines newton-schulz head mlp norm qkv

On a GPU at the record's sizes, the stacks those that 1 and 8 GPUs own; without one small, and the paths in Triton
are not measured: its interpreter tells no time. An error is the largest over the outputs, relative, in the Frobenius
norm; beside it, the largest ratio to what the reference, uncompiled, in the same dtype, is off by. Nothing is timed
that is off by more than twice as much.

Times are medians and quartiles of ROUNDS calls, of all paths in turn; on a GPU each behind a flush of the L2 and a
pause in which Python's launches queue up, so at the clocks of a GPU that is not hot: good for comparing paths, better
than in a run. The budget is bench/roofline.py's: predicted, not measured. Launches are counted by torch.profiler,
memory, beyond the inputs, by the allocator; the bytes that a kernel really moves are Nsight Compute's to count
(dram__bytes.sum).
"""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train_gpt
from aurora import SIMPLE_QUINTIC_12
from bench import most_memory, parse, roofline, run
from harness.log import output_of
from kernels.cross_entropy import SOFTCAP, head_loss, head_loss_reference
from kernels.mlp import relu2_mlp, relu2_mlp_reference
from kernels.newton_schulz import NEWTON_SCHULZ_CHOICE, NEWTON_SCHULZ_LINES, newton_schulz, newton_schulz_reference
from kernels.norm import prenorm, prenorm_reference
from kernels.qkv import qkv_heads, qkv_heads_reference
from results import markdown, publish

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
ROUNDS, WARM_UP = 20, 5
PEERS = "gram_newton_schulz", "dion"
PAUSE = 20_000_000  # clock cycles, some 12 ms: longer than Python takes for the launches of any path here
UNKNOWN = "not measured"
A, B, C = SIMPLE_QUINTIC_12[0]


class Contest(NamedTuple):
    name: str
    size: str
    inputs: Callable[[bool], tuple]  # at the size that is timed, or small, for float64
    exact: Callable  # in float64
    reference: Callable  # in the dtype of the run
    paths: dict[str, Callable | None]  # torch.compile's first; inputs to outputs; None: not on this machine
    budget: list[roofline.Kernel]
    unit: float = 0  # bytes of a logits tensor, for the head's memory


########################################
#               Contests               #
########################################

def normal(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).mul_(scale).bfloat16()


def stack(K: int, M: int, N: int) -> Tensor:
    """As Newton-Schulz gets them: of Frobenius norm 1."""
    X = normal(K, M, N).float()
    return (X / X.norm(dim=(1, 2), keepdim=True)).bfloat16()


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def stacks() -> list[tuple[int, int, int]]:
    if GPU:
        return [(K, 768, N) for N, counts in ((768, (48, 6)), (3072, (24, 3))) for K in counts]
    return [(6, 64, 64), (3, 64, 256)]


def returning(call: Callable) -> Callable:
    """A function that writes to its last operand, as one that returns a new tensor like it."""
    def path(*operands):
        out = torch.empty_like(operands[-1])
        call(*operands[:-1], out)
        return (out,)
    return path


def line_contest(what: str, operands: tuple, products: dict[str, Callable], arguments: dict) -> Contest:
    """`products`: a line of NEWTON_SCHULZ_LINES, and peers'. The last operand is the place of the output."""
    def reference(*operands):
        if what == "X X^T":
            return (torch.bmm(operands[0], operands[0].mT),)
        first, second = operands[0], operands[-2]
        return (torch.baddbmm(second, first, second, beta=arguments.get("b", A), alpha=arguments.get("c", 1)),)
    paths = {name: returning(lambda *operands, f=f: f(*operands, **arguments)) for name, f in products.items()}
    if not GPU:
        paths["Triton"] = None
    (K, M, N), k = operands[-1].shape, operands[0].size(2)
    one = roofline.product(1, M, N, k)
    return Contest(what, f"{K}x{M}x{N if what == 'a X + B X' else k}",
                   lambda small: tuple(t[:3] if small else t for t in operands), reference, reference,
                   {"torch.compile": compiled(reference)} | paths,
                   [roofline.Kernel(1, K * one.flops, K * one.bytes, K * one.tiles)])


def lines() -> list[Contest]:
    """Each product of the iteration alone."""
    found, dion = [], peer("dion", "dion.newton_schulz_triton")
    gram, power, advance = NEWTON_SCHULZ_LINES
    if dion:
        gram = gram | {"dion": lambda X, out: dion.ns_line_1(X, out=out)}
        power = power | {"dion": lambda S, out, b, c: dion.ns_line_2(S, c, b, out=out)}
    for K, M, N in stacks():
        X = stack(K, M, N)
        S = torch.bmm(X, X.mT).tril()
        S += S.tril(-1).mT.clone()
        found.append(line_contest("X X^T", (X, S), gram, {}))
        found.append(line_contest("a X + B X", (S, X, X), advance, dict(a=A)))
        if M == N:  # the same at every width
            found.append(line_contest("b A + c A A", (S, S), power, dict(b=B, c=C)))
    return found


def newton_schulz_contests() -> list[Contest]:
    found, gram = [], peer("gram_newton_schulz", "gram_newton_schulz")

    def reference(X):
        return (newton_schulz_reference(X, SIMPLE_QUINTIC_12),)
    for K, M, N in stacks():
        paths = {"torch.compile": compiled(reference), "ours": lambda X: (newton_schulz(X, SIMPLE_QUINTIC_12),)}
        if gram:  # two restarts: with one, twelve of these steps overflow
            theirs = gram.GramNewtonSchulz(ns_coefficients=SIMPLE_QUINTIC_12,
                                           gram_newton_schulz_reset_iterations=[4, 8])
            paths["gram-newton-schulz, fp16"] = lambda X, theirs=theirs: (theirs(X),)
        found.append(Contest("Newton-Schulz, 12 steps", f"{K}x{M}x{N}",
                             lambda small, K=K, M=M, N=N: (stack(3 if small else K, M, N),), reference, reference,
                             paths, roofline.polar_kernels(K, M, N, "fused")))
    return found


def head() -> list[Contest]:
    tokens, few, dim, vocabulary = (65536, 2048, 768, 50304) if GPU else (256, 64, 64, 50304)

    def inputs(small: bool) -> tuple:
        T = few if small else tokens
        targets = torch.randint(vocabulary, (T,), generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
        leaves = normal(T, dim), normal(vocabulary, dim, scale=3 * dim**-0.5), normal(vocabulary)
        return *(leaf.requires_grad_() for leaf in leaves), targets

    def exact(x, weight, bias, targets):
        z = x @ weight.mT + bias
        return F.cross_entropy(SOFTCAP * z / (z.square() + SOFTCAP**2).sqrt(), targets, reduction="sum")

    def step(loss_of):
        def path(*leaves_and_targets):
            loss = loss_of(*leaves_and_targets)
            return loss.detach(), *torch.autograd.grad(loss, leaves_and_targets[:3])
        return path
    logits = 2 * tokens * vocabulary
    budget = [roofline.product(1, tokens, vocabulary, dim), roofline.product(1, tokens, dim, vocabulary),
              roofline.product(1, vocabulary, dim, tokens), roofline.Kernel(2, 0, 1.5 * logits)]
    return [Contest("head, forward and backward", f"{tokens}x{dim}x{vocabulary}", inputs, step(exact),
                    step(head_loss_reference),
                    {"torch.compile": step(compiled(head_loss_reference)), "ours": step(head_loss)}, budget, logits)]


def mlp() -> list[Contest]:
    tokens, few, dim, neurons = (65536, 2048, 768, 3072) if GPU else (1024, 256, 64, 256)

    def inputs(small: bool) -> tuple:
        T = few if small else tokens
        leaves = (normal(T, dim), normal(neurons, dim, scale=dim**-0.5), normal(neurons, scale=0.1),
                  normal(dim, neurons, scale=neurons**-0.5))
        return normal(T, dim), *(leaf.requires_grad_() for leaf in leaves)

    def step(function):
        def path(dy, *leaves):
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)
        return path
    hidden = 2 * tokens * neurons
    budget = [roofline.product(1, tokens, neurons, dim, "Triton"),
              roofline.product(1, tokens, neurons, dim, "Triton", hidden),
              *(roofline.product(1, tokens, dim, neurons) for _ in range(2)),
              *(roofline.product(1, neurons, dim, tokens) for _ in range(2))]
    return [Contest("relu^2 MLP, forward and backward", f"{tokens}x{dim}x{neurons}", inputs, step(relu2_mlp_reference),
                    step(relu2_mlp_reference),
                    {"torch.compile": step(compiled(relu2_mlp_reference)), "ours": step(relu2_mlp)}, budget)]


def norm() -> list[Contest]:
    tokens, few, dim = (65536, 2048, 768) if GPU else (1024, 256, 64)

    def inputs(small: bool) -> tuple:
        T = few if small else tokens
        leaves = normal(T, dim), 1 + normal(dim, scale=0.1), normal(dim, scale=0.1)
        return *(leaf.requires_grad_() for leaf in leaves), normal(T, dim), normal(T, dim)

    def step(function):
        def path(x, gains, bias, *gradients):
            y = function(x, gains, bias)
            return *(t.detach() for t in y), *torch.autograd.grad(y, (x, gains, bias), gradients)
        return path
    d = 2 * tokens * dim
    return [Contest("pre-norm, forward and backward", f"{tokens}x{dim}", inputs, step(prenorm_reference),
                    step(prenorm_reference),
                    {"torch.compile": step(compiled(prenorm_reference)), "ours": step(prenorm)},
                    [roofline.Kernel(1, 0, 3 * d), roofline.Kernel(1, 0, 4 * d)])]


def qkv() -> list[Contest]:
    sequences, few, length, heads, head_dim = (64, 2, 1024, 6, 128) if GPU else (8, 2, 128, 2, 32)
    dim = heads * head_dim
    cos, sin = train_gpt.Rotary(head_dim).to(DEVICE)(length)

    def inputs(small: bool) -> tuple:
        B = few if small else sequences
        leaves = normal(B, length, dim), normal(3 * dim, dim, scale=dim**-0.5), normal(3 * dim, scale=0.1)
        # with a token's heads together, as attention leaves gradients
        gradients = (normal(B, length, heads, head_dim).transpose(1, 2) for _ in range(3))
        return *(leaf.requires_grad_() for leaf in leaves), *gradients

    def step(function):
        def path(x, weight, bias, *gradients):
            y = function(x, weight, bias, cos, sin, head_dim)
            return *(t.detach() for t in y), *torch.autograd.grad(y, (x, weight, bias), gradients)
        return path
    tokens = sequences * length
    d = 2 * tokens * dim
    budget = [roofline.product(1, tokens, 3 * dim, dim), roofline.product(1, tokens, dim, 3 * dim),
              roofline.product(1, 3 * dim, dim, tokens), roofline.Kernel(1, 0, 4 * d), roofline.Kernel(1, 0, 8 * d)]
    return [Contest("q, k, v, forward and backward", f"{tokens}x{dim}x{3 * dim}", inputs, step(qkv_heads_reference),
                    step(qkv_heads_reference),
                    {"torch.compile": step(compiled(qkv_heads_reference)), "ours": step(qkv_heads)}, budget)]


CONTESTS = {"lines": lines, "newton-schulz": newton_schulz_contests, "head": head, "mlp": mlp, "norm": norm,
            "qkv": qkv}


def peer(package: str, module: str):
    return importlib.import_module(module) if GPU and importlib.util.find_spec(package) else None


########################################
#             Measurements             #
########################################

def errors(contest: Contest) -> dict[str, tuple[float, float]]:
    """{path: (error, largest ratio to the reference's)}; ValueError where a path is off by more than twice as much."""
    inputs = contest.inputs(True)
    doubles = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]
    exact = contest.exact(*doubles)

    def off(outputs):
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(outputs, exact, strict=True)]
    reference, found = off(contest.reference(*inputs)), {}
    for name, path in contest.paths.items():
        if path:
            mine = off(path(*inputs))
            # a sum of fp32 may be exact to the last bit by chance
            found[name] = max(mine), max(x / max(y, 2**-20) for x, y in zip(mine, reference))
            if not found[name][1] <= 2:
                raise ValueError(f"{contest.name} {contest.size}, {name}: off by {mine}, the reference by {reference}")
    return found


def timed(calls: dict[str, Callable]) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile of the milliseconds of each, in turn."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    times = {name: [] for name in calls}
    flush = torch.empty(2**28 if GPU else 0, dtype=torch.int8, device=DEVICE)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if GPU:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                torch.cuda._sleep(PAUSE)
                start.record()
                call()
                end.record()
                times[name].append((start, end))
            else:
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
    if GPU:
        torch.cuda.synchronize()
        times = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in times.items()}
    return {name: statistics.quantiles(t, n=4) for name, t in times.items()}


def launches(call: Callable) -> int | str:
    """Kernels, copies and fills that a call queues."""
    if not GPU:
        return UNKNOWN
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in record.events())


def clocks() -> str:
    """Of the GPU while it works through a queue; of a CPU how busy it was, with others' work too."""
    if not GPU:
        return f"No GPU; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    X = stack(24, 768, 3072)
    for _ in range(2000):
        torch.bmm(X, X.mT)
    found = output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.draw,power.limit",
                                "--format=csv,noheader", "-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    torch.cuda.synchronize()
    return f"Under load, afterwards: SM clock, its maximum, power, its limit: {found}"


def rows(contest: Contest) -> list[dict]:
    torch._dynamo.reset()  # it compiles a function for so many sizes, and then no more
    off = errors(contest)
    inputs = contest.inputs(False)
    calls = {name: lambda path=path: path(*inputs) for name, path in contest.paths.items() if path}
    times = timed(calls)
    gpu = next((g for name, g in roofline.GPUS.items() if GPU and name in torch.cuda.get_device_name()), None)
    budget = 1000 * roofline.seconds(contest.budget, gpu, "cuDNN", roofline.LAUNCH["fused"]) if gpu else UNKNOWN
    moved = sum(k.count * k.bytes for k in contest.budget) / 1e9
    found = []
    for name in contest.paths:
        row = {"kernel": contest.name, "size": contest.size, "path": name}
        row |= dict.fromkeys(("error", "of the reference's", "CPU, ms", "GPU, ms", "quartiles", "of torch.compile's"),
                             UNKNOWN)
        row |= {"budget, ms": budget, "launches": UNKNOWN, "budget": sum(k.count for k in contest.budget),
                "memory, MB": UNKNOWN, "of the logits": "", "budget, GB": moved}
        if name in calls:
            memory = most_memory(calls[name])
            low, ms, high = times[name]
            row |= {"error": off[name][0], "of the reference's": off[name][1], "GPU, ms" if GPU else "CPU, ms": ms,
                    "quartiles": f"{low:.4g} to {high:.4g}", "of torch.compile's": ms / times["torch.compile"][1],
                    "launches": launches(calls[name]), "memory, MB": memory / 1e6,
                    "of the logits": f"{memory / contest.unit:.2f}" if contest.unit else ""}
        found.append(row)
    return found


def verdict(found: list[dict]) -> str:
    """Which of the two ran each line faster, where both did: what NEWTON_SCHULZ_CHOICE should say."""
    if not GPU:
        return "Which product runs each line faster: not measured."
    winners = []
    for what in ("X X^T", "b A + c A A", "a X + B X"):
        by_size = {}
        for r in found:
            if r["kernel"] == what and r["path"] in ("Triton", "cuBLAS"):
                by_size.setdefault(r["size"], {})[r["path"]] = r["GPU, ms"]
        winners.append(f"{what}: " + ", ".join(
            f"{min(t, key=t.get)} by {max(t.values()) / min(t.values()):.2f} at {size}" for size, t in by_size.items()))
    return f"Faster: {'; '.join(winners)}. The dispatch is {', '.join(NEWTON_SCHULZ_CHOICE)}."


def main(words: list[str]):
    words, out = parse("kernels", __doc__, words)
    names = words or list(CONTESTS)
    for name in names:
        if name not in CONTESTS:
            raise ValueError(f"{name!r} is not one of {', '.join(CONTESTS)}")
    contests = [contest for name in names for contest in CONTESTS[name]()]
    found = [r for contest in tqdm(contests, disable=None) for r in rows(contest)]
    missing = [package for package in PEERS if not importlib.util.find_spec(package)]
    publish("bench.kernels", words, out, f"{clocks()}. Not installed: {', '.join(missing) or 'none'}.", markdown(found),
            *([verdict(found)] if "lines" in names else []))


if __name__ == "__main__":
    run("kernels", main)
