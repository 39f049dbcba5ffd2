"""Time of a training step with aurora.py and with the optimizer as the published script writes it.

    python -m bench.optimizer [@RECIPE] [NAME=VALUE ...] [-o FOLDER]      default: @tiny

Both optimizers step in turn on the same model and gradients, in one process, so that a drift of the machine's speed
meets both.
"""

import statistics
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

import train_gpt
from bench import markdown, parse, publish

STEPS, WARM_UP = 30, 3


def newton_schulz(G):
    X = G.bfloat16()
    if G.size(0) > G.size(1):
        X = X.mT
    X = X / (X.norm() + 1e-7)
    a, b, c = 2.0, -1.5, 0.5
    for _ in range(12):
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if G.size(0) > G.size(1) else X


def balanced(G):
    m, n = G.shape
    if m == n:
        return newton_schulz(G)
    if m < n:
        return balanced(G.mT).mT
    D = 1 / G.norm(dim=1, keepdim=True).clamp(min=1e-7)
    U = newton_schulz(D * G)
    D = D * (n / m / U.float().square().sum(1, keepdim=True).clamp(min=1e-14)).sqrt()
    return newton_schulz(D * G)


def operator_norm(G):
    v = torch.full((G.size(1),), G.size(1) ** -0.5, device=G.device)
    for _ in range(5):
        u = G @ v
        u = u / u.norm().clamp(min=1e-10)
        v = G.mT @ u
        v = v / v.norm().clamp(min=1e-10)
    return (G @ v).norm()


class OneByOne(torch.optim.Optimizer):
    """Result #17's update (see aurora.py), one matrix after the other: 12 separate Newton-Schulz steps for each."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                N = p.grad.lerp(momentum, 0.95)
                P = balanced(N)
                U = P - 0.2 * N / operator_norm(N).clamp(min=1e-10)
                U = U * P.norm() / U.norm().clamp(min=1e-10) * max(1, N.size(0) / N.size(1)) ** 0.5
                U = U * (0.35 * p.norm().clamp(min=1e-8) / U.norm().clamp(min=1e-8)).clamp(min=1)
                p.add_(U, alpha=-group["lr"])


def main(words: list[str]):
    words, out = parse("optimizer", __doc__, words)
    hp = train_gpt.override(words or ["@tiny"])
    shards = train_gpt.find_shards(hp.train_files, hp.batch_tokens, STEPS, hp.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = train_gpt.Place(0, 1, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    with device:
        model = train_gpt.GPT(hp)
    train_gpt.initialise(model, seed=0)
    adamw, batched = train_gpt.make_optimizers(model, hp)
    one_by_one = OneByOne(batched.param_groups[0]["params"], dict(lr=hp.matrix_lr))
    batches = train_gpt.read_batches(shards, hp.batch_tokens, hp.sequence_length, place)
    if device.type == "cuda":
        model.compile(dynamic=False)
    clock = train_gpt.Clock(place)
    train_gpt.accumulate_gradients(model, *next(batches), hp)
    difference = compare(batched, one_by_one)
    work = {"forward and backward": lambda: train_gpt.accumulate_gradients(model, *next(batches), hp),
            "AdamW": adamw.step, "Aurora, one matrix at a time": one_by_one.step, "Aurora, batched": batched.step}
    times = {name: [] for name in work}
    for _ in tqdm(range(STEPS), disable=None):
        for name, part in work.items():
            clock.resume()
            before = clock.seconds
            part()
            times[name].append(clock.read() - before)
        model.zero_grad()
    dist.destroy_process_group()
    ms = {name: 1000 * statistics.median(t[WARM_UP:]) for name, t in times.items()}
    rest = ms["forward and backward"] + ms["AdamW"]
    old, new = ms["Aurora, one matrix at a time"], ms["Aurora, batched"]
    ms |= {"whole step, one matrix at a time": rest + old, "whole step, batched": rest + new}
    publish("optimizer", words, out,
            f"Medians of {STEPS - WARM_UP} steps, in turn in one process. From equal weights the two updates differ by "
            f"{100 * difference:.1f}% at most.",
            markdown([{"part of a step": name, "ms": t} for name, t in ms.items()]),
            f"Optimizer {old / new:.2f}x as fast, whole step {(rest + old) / (rest + new):.2f}x as fast.")


def compare(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> float:
    """Step both from the same weights; the largest difference of two updates of one matrix, relative to their length.

    On random gradients, since those of step 0 are zero. ValueError where they are not the same to bf16 rounding.
    """
    params = a.param_groups[0]["params"]
    start = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.device)
    updates = []
    for optimizer in (a, b):
        optimizer.step()
        updates.append([p.detach() - w for p, w in zip(params, start)])
        for p, w in zip(params, start):
            p.data.copy_(w)
    difference = max(((u - v).norm() / v.norm()).item() for u, v in zip(*updates))
    if difference > 0.05:  # bf16 leaves 2%: small singular values of random square matrices, mostly
        raise ValueError(f"the two optimizers differ by {difference:.3f} of an update")
    return difference


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench.optimizer: {error}")
