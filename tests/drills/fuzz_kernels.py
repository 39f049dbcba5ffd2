"""The kernels at odd sizes drawn at random, in bf16, against float64; beside each error PyTorch's own in bf16.

    python -m tests.drills.fuzz_kernels [--seconds S] [--seed N] [-o FOLDER]      default: 300 s, seed 0, bench/results

Without a GPU the kernels are interpreted. A case is drawn from the seed and its own number, the kernels in turn,
whatever the time that is given. A ratio is the error of a kernel's output over that of the reference's, in the
Frobenius norm; or, where PyTorch is luckier, over a quarter of the output's unit, 2^-9 in bf16: what one rounding
leaves on average, so that a single number which is rounded once has at most 2. The exit code is 1 where a ratio is
above its bound:

- In one case 2, as in the tests of each kernel. Together, the root mean square over all cases of an output, 1.1: a
  kernel rounds where PyTorch does, and fp32 sums in another order hardly ever decide a rounding.
- Of q, k and v 4 in one case, 1.4 together: for the gradient of the norm PyTorch keeps z, while the kernel takes
  n = z / rms(z) back from the rotated q and k in memory, which are rounded, and n's error from that shows where
  h - n mean(n h) leaves little of h: by a third in heads of 4, and by more in few tokens, which average nothing.
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from tests.interpreter import DEVICE  # isort: skip, before Triton is imported

import train_gpt
from kernels.cross_entropy import fused_head_loss, head_loss_reference
from kernels.mlp import fused_relu2_mlp, relu2_mlp_reference
from kernels.newton_schulz import newton_schulz_fused, newton_schulz_reference
from kernels.norm import fused_prenorm, prenorm_reference
from kernels.qkv import fused_qkv_heads, qkv_heads_reference
from results import markdown, publish

RESULTS = Path(__file__).parent / "results"


class Case(NamedTuple):
    size: str
    names: str  # of the outputs
    inputs: list[Tensor]
    ours: Callable  # inputs to outputs
    reference: Callable


class Bound(NamedTuple):
    case: float
    together: float


class Found(NamedTuple):
    ratio: float
    output: str
    error: float
    reference_error: float
    size: str
    case: int


class Draw:
    """Sizes and numbers of one case."""

    def __init__(self, seed: int, case: int):
        self.random = random.Random(f"{seed} {case}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(DEVICE, torch.bfloat16)

    def odd(self, most: int) -> int:
        """Around the blocks' edges, or anything."""
        edges = [n for n in (1, 2, 3, 5, 7, 8, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129) if n <= most]
        return self.random.choice([*edges, *(self.random.randint(1, most) for _ in range(3))])


def with_gradients(function: Callable, leaves: int, gradients: list[Tensor]) -> Callable:
    """Outputs and the gradients of the first `leaves` inputs, given those of the outputs."""
    def path(*inputs):
        inputs = [t.detach().requires_grad_() if i < leaves else t for i, t in enumerate(inputs)]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        back = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)]
        return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs[:leaves], back)
    return path


def mlp(draw: Draw) -> Case:
    M, K, N = draw.odd(300), draw.odd(150), draw.odd(300)
    leaves = [draw.normal(M, K), draw.normal(N, K, scale=K**-0.5), draw.normal(N, scale=0.1),
              draw.normal(K, N, scale=N**-0.5)]
    ours, reference = (with_gradients(f, 4, [dy]) for dy in [draw.normal(M, K)]
                       for f in (fused_relu2_mlp, relu2_mlp_reference))
    return Case(f"{M}x{K}x{N}", "y dx dW db dV", leaves, ours, reference)


def norm(draw: Draw) -> Case:
    M, D = draw.odd(300), draw.random.choice([1, 2, 4, 8, 13, 16, 17, 20, 24, 33, 64, 100, 768, 1025])
    gradients = [draw.normal(M, D), draw.normal(M, D)]
    ours, reference = (with_gradients(f, 3, gradients) for f in (fused_prenorm, prenorm_reference))
    return Case(f"{M}x{D}", "y h dx dw db", [draw.normal(M, D), 1 + draw.normal(D, scale=0.1), draw.normal(D)], ours,
                reference)


def qkv(draw: Draw) -> Case:
    B, T, H = draw.random.randint(1, 3), draw.odd(150), draw.random.randint(1, 3)
    # no kernel sees x's width; of 1, q would lie along its weight and dq across: of dx only their errors would be left
    D, K = draw.random.choice([8, 20, 33]), draw.random.choice([4, 8, 12, 20, 32, 64, 96, 128])
    # with a token's heads together, as attention leaves gradients
    gradients = [draw.normal(B, T, H, K).transpose(1, 2) for _ in range(3)]
    ours, reference = (with_gradients(lambda *inputs, f=f: f(*inputs, K), 3, gradients)
                       for f in (fused_qkv_heads, qkv_heads_reference))
    inputs = [draw.normal(B, T, D), draw.normal(3 * H * K, D, scale=D**-0.5), draw.normal(3 * H * K, scale=0.1)]
    return Case(f"{B}x{T} tokens, {H}x{K} of {D}", "q k v dx dW db",
                [*inputs, *train_gpt.Rotary(K).to(DEVICE)(T)], ours, reference)


def newton_schulz(draw: Draw) -> Case:
    K, M = draw.random.randint(1, 2), draw.odd(150)
    N = M + draw.random.randint(0, 100)
    X = draw.normal(K, M, N).float()
    X = (X / X.norm(dim=(1, 2), keepdim=True)).bfloat16()
    if draw.random.random() < 0.5:
        X = X.mT.contiguous().mT
    steps = ((2.0, -1.5, 0.5),) * draw.random.randint(1, 3)
    return Case(f"{K}x{M}x{N}, {len(steps)} steps", "X", [X],
                lambda X: [newton_schulz_fused(X, steps, ("Triton",) * 3)],
                lambda X: [newton_schulz_reference(X, steps)])


def head(draw: Draw) -> Case:
    # one class alone has the loss 0 and no gradient: all of an answer would be error
    T, D = draw.random.choices([1, 7, 33, 100, 1025], [2, 2, 2, 2, 1])[0], draw.odd(40)
    V = draw.random.choice([2, 5, 100, 511, 513, 700])
    rows = draw.random.choice([T, max(1, T // 3), 50])
    targets = torch.randint(V, (T,), generator=draw.generator).to(DEVICE)
    ours, reference = (with_gradients(f, 3, [torch.ones((), device=DEVICE)]) for f in (
        lambda *inputs: fused_head_loss(*inputs, targets, rows), lambda *inputs: head_loss_reference(*inputs, targets)))
    return Case(f"{T}x{D}x{V}, {rows} rows at once", "loss dx dW db",
                [draw.normal(T, D), draw.normal(V, D, scale=3 * D**-0.5), draw.normal(V)], ours, reference)


KERNELS = {"mlp": mlp, "norm": norm, "qkv": qkv, "newton-schulz": newton_schulz, "head": head}
BOUNDS = dict.fromkeys(KERNELS, Bound(2, 1.1)) | {"qkv": Bound(4, 1.4)}


def exactly(reference: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The reference in float64, also where it asks for fp32."""
    with mock.patch.object(Tensor, "float", Tensor.double):
        return reference(*(t.double() for t in inputs))


def judge(case: Case, number: int) -> list[Found]:
    """The ratio of each output; infinite where it is not finite, or where PyTorch alone finds an exact 0."""
    found = []
    outputs = case.ours(*case.inputs), case.reference(*case.inputs), exactly(case.reference, case.inputs)
    for name, ours, torchs, exact in zip(case.names.split(), *outputs, strict=True):
        assert ours.shape == exact.shape and ours.dtype == torchs.dtype
        off, its = ((y.double() - exact).nan_to_num(nan=math.inf).norm().item() for y in (ours, torchs))
        size = exact.norm().item()
        assert math.isfinite(its + size), "a case that PyTorch cannot answer"
        yardstick = max(its, torch.finfo(ours.dtype).eps / 4 * size)
        ratio = 0.0 if off == 0 else off / yardstick if yardstick else math.inf
        found.append(Found(ratio, name, off / (size or 1), its / (size or 1), case.size, number))
    return found


def measure(seed: int, rounds: int = 1, seconds: float = 0) -> dict[str, list[list[Found]]]:
    """{kernel: the ratios of each case}: so many rounds of all kernels, and more until the time is up."""
    found, end, number = {name: [] for name in KERNELS}, time.perf_counter() + seconds, 0
    while number < rounds * len(KERNELS) or time.perf_counter() < end:
        for name, draw in KERNELS.items():
            found[name].append(judge(draw(Draw(seed, number)), number))
            number += 1
    return found


def together(cases: list[list[Found]]) -> float:
    """The root mean square of the ratios of an output, the largest."""
    return max(statistics.fmean(found.ratio**2 for found in output) ** 0.5 for output in zip(*cases))


def rows(found: dict[str, list[list[Found]]]) -> tuple[list[dict], list[str]]:
    """The table, and a line for each bound that is exceeded."""
    table, wrong = [], []
    for name, cases in found.items():
        worst, mean, bound = max(sum(cases, [])), together(cases), BOUNDS[name]
        table.append({"kernel": name, "cases": len(cases), "worst ratio": worst.ratio, "bound": bound.case,
                      "of": worst.output, "error": worst.error, "PyTorch's": worst.reference_error, "at": worst.size,
                      "case": worst.case, "together": mean, "its bound": bound.together})
        if not worst.ratio <= bound.case:
            wrong.append(f"{name}: {worst.output} at {worst.size}, case {worst.case}, is off by {worst.error:.2g}, "
                         f"{worst.ratio:.2f} times PyTorch's error or one rounding; the bound is {bound.case}")
        elif not mean <= bound.together:
            wrong.append(f"{name}: {mean:.2f} times PyTorch's error over all cases; the bound is {bound.together}")
    return table, wrong


def main(words: list[str]):
    parser = argparse.ArgumentParser(prog="python -m tests.drills.fuzz_kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, metavar="S")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("-o", dest="out", metavar="FOLDER", type=Path, default=RESULTS,
                        help="default: tests/drills/results")
    args = parser.parse_args(words)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nothing has been written to holds NaN
    table, wrong = rows(measure(args.seed, seconds=args.seconds))
    run = "Interpreted" if DEVICE.type == "cpu" else "Compiled"
    publish("tests.drills.fuzz_kernels", ["--seconds", f"{args.seconds:g}", "--seed", str(args.seed)], args.out,
            f"{run}, in bf16, {sum(row['cases'] for row in table)} cases.", markdown(table),
            __doc__.split("\n\n", 2)[2].strip(), *(f"**{line}**" for line in wrong))
    if wrong:
        sys.exit("\n".join(f"fuzz_kernels: {line}" for line in wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
