"""FLOPs, bytes and messages of a training step from a recipe's shapes, and the time that they predict.

    python -m bench.roofline [GPU] [@RECIPE] [NAME=VALUE ...] [-o FOLDER]      GPU: A100, H100 (default), H200, B200

A kernel takes the longest of three times: its FLOPs at the sustained rate, less where its tiles do not fill the GPU;
its bytes at the sustained bandwidth; and what a launch costs. Kernels run one after the other. A collective takes
NCCL's latency and its bytes at the bus bandwidth. Two programs can be predicted: `fused`, this one, whose
reduce-scatters and all-gathers travel beside the updates (see `sharded_step`), and `published`, the script of result
#17 and its siblings.

A stage of the update rule may have a second part, as SOAP's new bases, which the next step alone needs. It is predicted
twice: after the update of its bank, where all that follows waits for it, and on a stream of its own beside the next
forward and backward passes, where the step takes what the second part takes longer than they do. That the two do not
slow each other is assumed: the second part's QR leaves most of a GPU idle, its products do not.

Every constant stands below, with its source or the word "assumed". Two of them are calibrated, SUSTAINED and
COLUMN, on one published step time each. No time that is printed was measured here.
"""

from collections.abc import Callable
from functools import cache
from math import ceil, inf
from typing import NamedTuple

import torch

import train_gpt
from bench import parse, run
from bench.baseline import separate
from harness.ranks import Place, micro_batch_size
from results import markdown, publish
from rules import Rule

NODE = 8  # GPUs that NVLink connects


class GPU(NamedTuple):
    """The first four are from NVIDIA's data sheets of the SXM cards."""
    peak: float  # TFLOP/s, dense bf16
    fp32: float  # TFLOP/s, without tensor cores
    hbm: float  # GB/s
    sms: int
    nvlink: float  # GB/s of a ring's bus bandwidth in a node
    network: float  # GB/s a GPU between nodes: its own InfiniBand card's
    attention: dict  # {backend: TFLOP/s (forward, backward)}, causal, head_dim 128, 1024 tokens


# Of the peak, by cuBLAS in large products. Calibrated: with it the published program of result #17 takes its 157.3 ms
# on 8 H100. So it holds whatever else the model leaves out there (gaps between kernels, ranks that wait, power limits),
# and is below what cuBLAS alone reaches. That it is the same for every card is assumed.
SUSTAINED = 0.579
# H100: figures 5 and 6 of FlashAttention-3 (arXiv 2407.08608), read at 1k; backward 3/4 of the non-causal one, assumed.
HOPPER = {"FA2": (260, 195), "cuDNN": (410, 306)}
GPUS = {  # nvlink: A100's is NCCL's own ceiling (tuning.cc), the others are assumed; network: an HDR or NDR card each
    "A100": GPU(312, 19.5, 2039, 108, 235, 25, {"FA2": (150, 112)}),  # attention: assumed
    "H100": GPU(989, 67, 3350, 132, 370, 50, HOPPER),
    "H200": GPU(989, 67, 4800, 132, 370, 50, HOPPER),
    "B200": GPU(2250, 75, 8000, 148, 700, 50, {"cuDNN": (933, 696)}),  # attention: H100's share of the peak, assumed
}
STREAM = 0.87  # of HBM, by elementwise kernels; assumed
TRITON = 0.85  # of cuBLAS's rate, by our products; assumed: 4.2 TFLOP/s an SM
TILE = 128  # products are cut into tiles of TILE x TILE and, to fill the GPU, into runs of K of at least SPLIT; assumed
SPLIT = 1024
FP32 = 0.75  # of the card's fp32 rate, by cuBLAS in products without TF32; assumed
# Seconds of a column of a QR on one GPU, by cuSOLVER's geqrf and orgqr, one matrix after the other whatever the stack
# (github.com/pytorch/pytorch/issues/143281): they go from column to column, and at these sizes wait more than they
# compute. Calibrated: with it the published program of result #44, which waits for all of SOAP, takes its 327.7 ms on
# 8 H100. So it holds whatever else that program has and the model leaves out. Held out is result #14, SOAP on the MLP
# with a QR every tenth step: published, it takes 10.9 ms longer than #11 on the same machine; the model says 13.7. That
# it is the same for every card is assumed.
COLUMN = 7.25e-6
LAUNCH = {"fused": 2e-6, "published": 5e-6}  # seconds a kernel of the optimizer, in a CUDA graph and without; assumed
MODEL_LAUNCH = 5e-6  # seconds a kernel of the model, which no graph replays; assumed
# NCCL's model of a ring (github.com/NVIDIA/nccl, src/graph/tuning.cc, 01afd20a): microseconds of a collective, of a hop
# over NVLink, of a hop over the network; share of the bus bandwidth. It takes the fastest of LL, LL128 and Simple.
# Left out: where it switches LL128 off, LL's slower hops with several nodes, trees and NVLink SHARP of an all-reduce.
PROTOCOLS = ((3.6, 0.47, 2.7, 1 / 4), (10.0, 1.9, 4.0, 0.92), (8.4, 3.4, 9.6, 1.0))

# Of an update, beside Newton-Schulz: fp32 passes over a matrix, and kernels; contra's power iteration is 11 of the
# passes. Published: estimated from the formulas; its Muon and NorMuon have no contra. Fused: counted by bench/graph.py,
# the most over the shapes. SOAP's passes are many because a tall matrix's covariance is larger than the matrix.
TAIL = {("published", "muon"): (12, 8), ("published", "normuon"): (20, 16), ("published", "aurora"): (45, 70),
        ("published", "soap"): (62, 60), ("published", "square soap"): (52, 60),
        ("fused", "muon"): (26, 36), ("fused", "normuon"): (31, 45), ("fused", "aurora"): (28, 44),
        ("fused", "soap"): (53, 36), ("fused", "square soap"): (42, 36), ("fused", "eigen_adam"): (10, 5)}


def this_card() -> str | None:
    """The name in GPUS of this machine's GPU."""
    return next((name for name in GPUS if torch.cuda.is_available() and name in torch.cuda.get_device_name()), None)


class Kernel(NamedTuple):
    count: int
    flops: float
    bytes: float
    tiles: float = inf  # that work at once
    rate: str = "cuBLAS"  # or "Triton", "fp32" of cuBLAS, or "forward" or "backward" of attention
    least: float = 0.0  # seconds, however fast the card


def seconds(kernels: list[Kernel], gpu: GPU, attention: str, launch: float) -> float:
    forward, backward = gpu.attention[attention]
    rates = {"cuBLAS": gpu.peak * SUSTAINED, "Triton": gpu.peak * SUSTAINED * TRITON,
             "fp32": gpu.fp32 * FP32, "forward": forward, "backward": backward}
    return sum(k.count * max(launch, k.least, k.bytes / (gpu.hbm * STREAM * 1e9),
                             k.flops / (rates[k.rate] * 1e12 * min(1, k.tiles / gpu.sms))) for k in kernels)


def product(count: int, m: int, n: int, k: int, rate: str = "cuBLAS", extra: float = 0) -> Kernel:
    """C (m, n) = A (m, k) B (k, n) in bf16, with `extra` bytes of an epilogue."""
    tiles = ceil(m / TILE) * ceil(n / TILE) * max(1, k // SPLIT)
    return Kernel(count, 2 * m * n * k, 2 * (m * k + k * n + m * n) + extra, tiles, rate)


@cache
def parameters(hp: train_gpt.Hyperparameters) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in train_gpt.GPT(hp).named_parameters()}


@cache
def apart(hp: train_gpt.Hyperparameters) -> dict[str, torch.Size]:
    """The parameters with q, k and v apart, as the published program has them."""
    with torch.device("meta"):
        return {name: x.shape for name, x in separate(dict(train_gpt.GPT(hp).named_parameters())).items()}


def matrices_of_blocks(shapes: dict[str, torch.Size]) -> list[tuple[str, int, int]]:
    return [(name, *shape) for name, shape in shapes.items() if name.startswith("blocks.") and len(shape) == 2]


def block_matrices(hp: train_gpt.Hyperparameters) -> list[tuple[str, int, int]]:
    """(name, out, in) of the matrices that are not AdamW's; q, k and v are three."""
    return matrices_of_blocks(apart(hp))


########################################
#                Model                 #
########################################

def model_kernels(hp: train_gpt.Hyperparameters, sequences: int, form: str) -> dict[str, list[Kernel]]:
    """Forward and backward pass of a micro-batch. Bytes: `d` of an activation, `f` of the MLP's, `v` of the logits."""
    tokens, layers = sequences * hp.sequence_length, hp.num_layers
    d, f, v = (2 * tokens * width for width in (hp.model_dim, hp.mlp_dim, hp.vocab_size))
    fused = form == "fused" and hp.activation == "relu2"
    products, shapes = [], (parameters if form == "fused" else apart)(hp)
    for name, out, into in matrices_of_blocks(shapes) + [("head", hp.vocab_size, hp.model_dim)]:
        up = fused and name.endswith("fc.weight")  # relu^2 rides on it, its backward on the dx of proj
        down = fused and name.endswith("mlp.proj.weight")
        products += [product(1, tokens, out, into, "Triton" if up else "cuBLAS"),
                     product(1, tokens, into, out, "Triton" if down else "cuBLAS", f if down else 0),  # dx
                     product(1, out, into, tokens)]  # dW
    # norms and residual; norm of q and k and rotary; gradients of biases, which, fused, ride on those of the others
    elementwise = [Kernel(4 * layers, 0, 4 * d)]
    if form == "fused":
        elementwise += [Kernel(layers, 0, 4 * d), Kernel(layers, 0, 8 * d)]
    else:  # and the sum of dx of q, k, v
        elementwise += [Kernel(2 * layers, 0, 5 * d), Kernel(5 * layers, 0, d), Kernel(layers, 0, 3 * d)]
    if hp.activation == "swiglu":
        elementwise += [Kernel(layers, 0, 3 * f), Kernel(layers, 0, 5 * f), Kernel(2 * layers, 0, f)]
    elif not fused:
        elementwise += [Kernel(layers, 0, 2 * f), Kernel(layers, 0, 3 * f), Kernel(layers, 0, f)]
    passes = 3 if form == "fused" else 4  # read; read and write; and, published, read for the bias's gradient
    size = hp.sequence_length**2 * hp.model_dim * sequences
    tiles = sequences * hp.model_dim // hp.head_dim * ceil(hp.sequence_length / TILE)
    weights = sum(shape.numel() for shape in parameters(hp).values() if len(shape) == 2)
    moved = 10 if form == "fused" else 16  # bytes an element: gradient added in fp32; weight copied to bf16 or not
    return {"products": products, "elementwise": elementwise,
            "attention": [Kernel(layers, 2 * size, 4 * d, tiles, "forward"),
                          Kernel(layers, 5 * size, 8 * d, tiles, "backward")],
            "softcap and loss": [Kernel(2, 0, passes * v / 2)],
            "embedding, casts, gradient sums": [Kernel(4, 0, 1.5 * d),
                                                Kernel(len(shapes), 0, moved * weights / len(shapes))]}


def flops(hp: train_gpt.Hyperparameters) -> dict[str, float]:
    """Of a step of the whole batch, by part; attention as the kernels do it, the causal half."""
    parts = model_kernels(hp, hp.batch_tokens // hp.sequence_length, "published")
    total = {name: sum(k.count * k.flops for k in kernels) for name, kernels in parts.items()}
    matrices = [(bank.count, *bank.shape, bank.rule) for bank in banks(hp) if bank.shape]
    found = {"products": total["products"], "attention": total["attention"],
             "Newton-Schulz": sum(count * polar_factors(rule, m, n) * polar_flops(m, n)
                                  for count, m, n, rule in matrices)}
    for name, part in (("fp32 products of updates", fp32_kernels), ("second parts", second_part)):
        if work := sum(k.count * k.flops for stack in matrices for k in part(*stack, "fused")):
            found[name] = work
    return found


def polar_factors(rule: Rule, m: int, n: int) -> int:
    """How many polar factors an update of an m x n matrix takes: several where its rows or columns are evened."""
    evened = {"aurora": m != n, "aurora_july": m > n, "aurora_paper": m > n, "aurora_wide": m < n,
              "riemannian_aurora": m != n}
    found = 0
    for stage, given in rule.parts:
        knobs = {name: knob.default for name, knob in stage.knobs.items()} | given
        if not evened.get(stage.name):
            found += stage.name in evened or stage.name.endswith("polar")
        else:
            found += knobs["iterations"] if "iterations" in knobs else 3 + 2 * knobs["steps"]
    return found


def polar_flops(m: int, n: int) -> float:
    m, n = sorted((m, n))
    return 12 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


########################################
#              Optimizer               #
########################################

def polar_kernels(count: int, m: int, n: int, form: str) -> list[Kernel]:
    """Twelve Newton-Schulz iterations of `count` matrices: published, one after the other, with every addend copied
    before cuBLAS adds to it; fused, batched, the symmetric products' lower tiles in Triton, cuBLAS for the third."""
    m, n = sorted((m, n))
    square, whole = 2 * m * m, 2 * m * n  # bytes
    if form == "published":
        gram, power, advance = product(12 * count, m, m, n), product(12 * count, m, m, m), product(12 * count, m, n, m)
        return [gram, power, advance, Kernel(24 * count, 0, 2 * square), Kernel(24 * count, 0, 2 * whole)]
    t = ceil(m / TILE)
    half = (t + 1) / (2 * t)

    def batched(m, n, k, share, rate):
        one = product(1, m, n, k)
        tiles = count * share * ceil(m / TILE) * ceil(n / TILE)
        return Kernel(12, one.flops * count * share, one.bytes * count, tiles, rate)

    return [batched(m, m, n, half, "Triton"), batched(m, m, m, half, "Triton"), batched(m, n, m, 1, "cuBLAS"),
            Kernel(12, 0, 2 * whole * count)]


class Work(NamedTuple):
    """What a stage does in fp32 to an m x n matrix. Of a product: (rows, columns, inner)."""
    products: Callable  # (m, n) -> those of its first part
    later: Callable = lambda m, n: []  # those of its second
    qr: Callable = lambda m, n: []  # sizes of the square matrices whose QR the second part takes
    once: bool = False  # whether these are of the stack's sum, and not of every matrix


def gram(m: int, n: int) -> tuple[int, int, int]:
    """Of the shorter side: the Schatten-4 norm's."""
    return min(m, n), min(m, n), max(m, n)


WORK = {
    "schatten4_polar": Work(lambda m, n: [gram(m, n)]),
    "soap": Work(lambda m, n: [(m, n, m), (m, n, n), (m, n, m), (m, n, n),  # into the bases and back
                               gram(m, n), gram(m, n), (m, m, n), (n, n, m)],  # two norms; covariances
                 lambda m, n: [(m, m, m), (n, n, n)], lambda m, n: [m, n]),
    # its eigenvectors are taken for two QRs: a reduction from column to column, and as much again; assumed
    "eigen_adam": Work(lambda m, n: [(m, n, n), (m, n, n), (n, n, m)],
                       lambda m, n: [(n, n, n), (m, n, n), (m, n, n)], lambda m, n: [n, n], once=True),
}


def in_fp32(count: int, shapes: list[tuple[int, int, int]], form: str) -> list[Kernel]:
    """Products of `count` matrices: published, one after the other; fused, batched."""
    found = []
    for shape in shapes:
        one = product(1, *shape, "fp32")
        calls, each = (count, 1) if form == "published" else (1, count)
        found.append(Kernel(calls, each * one.flops, 2 * each * one.bytes, each * one.tiles, "fp32"))
    return found


def fp32_kernels(count: int, m: int, n: int, rule: Rule, form: str) -> list[Kernel]:
    """The fp32 products in the stages' first parts."""
    return [kernel for stage, _ in rule.parts if stage.name in WORK
            for kernel in in_fp32(count, WORK[stage.name].products(m, n), form)]


def second_part(count: int, m: int, n: int, rule: Rule, form: str) -> list[Kernel]:
    """The stages' second parts; of one that not every step has, a step's share. Published, the diagonal of Q^T C Q is
    taken of the whole product: two more of each. ValueError where a stage's is not in WORK."""
    found = []
    for part in rule.parts:
        stage = part.stage
        if not stage.after:
            continue
        if stage.name not in WORK:
            raise ValueError(f"what {stage.name} does after a step is not in bench.roofline.WORK: add it there")
        work = WORK[stage.name]
        later = in_fp32(count, work.later(m, n) * (3 if form == "published" else 1), form)
        slow = 1 if work.once else count
        for size in work.qr(m, n):
            # geqrf and orgqr are 4/3 size^3 each; 10 passes order and copy the matrix and take the diagonal
            later += [Kernel(slow, 8 / 3 * size**3, 16 * size**2, rate="fp32", least=size * COLUMN),
                      Kernel(5, 0, 8 * size**2 * slow)]
        later.append(Kernel(3, 0, 8 * m * n * count))  # the second moment's places
        found += [kernel._replace(count=kernel.count / part.settings.get("every", 1)) for kernel in later]
    return found


def tail(m: int, n: int, rule: Rule, form: str) -> tuple[int, int]:
    """fp32 passes over a matrix and kernels of its update, beside Newton-Schulz: those of the nearest rule in TAIL."""
    names = " ".join(part.stage.name for part in rule.parts)
    if "aurora" in names and form == "fused" and m == n:  # nothing to balance, and contra stays
        return TAIL[form, "muon"]
    if "eigen_adam" in names:
        return TAIL["fused", "eigen_adam"]
    if "soap" in names:
        return TAIL[form, "square soap" if m == n else "soap"]
    return TAIL[form, "aurora" if "aurora" in names else "normuon" if "normuon" in names else "muon"]


def update_kernels(count: int, m: int, n: int, rule: Rule, form: str) -> list[Kernel]:
    """The update of `count` equal matrices that a rank owns."""
    passes, kernels = tail(m, n, rule, form)
    calls = count if form == "published" else 1
    rest = Kernel(kernels * calls, 0, 4 * m * n * passes / kernels * count / calls)
    return polar_kernels(count, m, n, form) * polar_factors(rule, m, n) + fp32_kernels(count, m, n, rule, form) + [rest]


def collective(gpus: int, nodes: int, size: float, gpu: GPU, trips: int = 1) -> float:
    """Seconds of a reduce-scatter or all-gather of `size` bytes in all; of an all-reduce with two trips."""
    if gpus == 1:
        return 0.0
    # as many rings as GPUs in a node, each leaves it by a card of its own
    bandwidth = min(gpu.nvlink, gpu.network * gpus / nodes) if nodes > 1 else gpu.nvlink
    wire = trips * size * (gpus - 1) / gpus
    return min(1e-6 * (base + trips * ((gpus - nodes) * hop + (nodes - 1) * net)) + wire / (bandwidth * share * 1e9)
               for base, hop, net, share in PROTOCOLS)


class Bank(NamedTuple):
    """Parameters that travel and are updated together, padded to equal shares: a matrix has one owner."""
    name: str  # of its first parameter
    count: int  # of what is owned whole, a matrix or a number
    numel: int  # of one
    shape: tuple[int, int] | None  # of a matrix, or of the parts of one
    rule: Rule

    def share(self, gpus: int) -> int:
        return ceil(self.count / gpus)


@cache
def banks(hp: train_gpt.Hyperparameters) -> list[Bank]:
    """The trainer's, in the order in which the step processes them."""
    with torch.device("meta"):
        made = train_gpt.make_banks(train_gpt.GPT(hp), hp, Place(0, 1, torch.device("meta")))
    return [Bank(next(iter(bank.params)), bank.shares.count, bank.masters[0].numel(),
                 tuple(bank.masters[0].shape) or None, bank.rule) for bank in made]


def wire(hp: train_gpt.Hyperparameters, gpus: int) -> tuple[float, float]:
    """Bytes that a GPU sends in the fused step: reduce-scatters of fp32 gradients, all-gathers of bf16 weights."""
    sent = sum(bank.share(gpus) * bank.numel for bank in banks(hp)) * (gpus - 1)
    return 4 * sent, 2 * sent


class Step(NamedTuple):
    """Seconds of what follows the last gradient, on the GPU that owns most."""
    updates: float
    later: float  # the stages' second parts
    whole: float  # until all is done that is not hidden


def sharded_step(hp: train_gpt.Hyperparameters, gpus: int, nodes: int, gpu: GPU, hidden: bool) -> Step:
    """All reduce-scatters are queued at once. A bank is updated when its gradient is there and the bank before is done,
    with its second part, unless that is hidden; its all-gather joins the queue after the first part. NCCL works the
    queue off in order."""
    backend = next(iter(gpu.attention))
    arrived, wires, done, busy, later, ready = [], 0.0, 0.0, 0.0, 0.0, []
    for bank in banks(hp):
        wires += collective(gpus, nodes, 4 * bank.share(gpus) * gpus * bank.numel, gpu)
        arrived.append(wires)
    for bank, arrival in zip(banks(hp), arrived):
        share, second = bank.share(gpus), []
        if bank.shape and not bank.rule.in_place:
            kernels = update_kernels(share, *bank.shape, bank.rule, "fused")
            second = second_part(share, *bank.shape, bank.rule, "fused")
        else:
            kernels = [Kernel(2, 0, 15 * share * bank.numel)]  # gradient, weight and moments in fp32, weight in bf16
        first, second = (seconds(part, gpu, backend, LAUNCH["fused"]) for part in (kernels, second))
        done, busy, later = max(done, arrival) + first, busy + first, later + second
        ready.append(done)
        done += 0 if hidden else second
    for bank, moment in zip(banks(hp), ready):
        wires = max(wires, moment) + collective(gpus, nodes, 2 * bank.share(gpus) * gpus * bank.numel, gpu)
    return Step(busy, later, max(done, wires))


def published_step(hp: train_gpt.Hyperparameters, gpus: int, nodes: int, gpu: GPU) -> Step:
    """None of the collectives travels beside other work, and no second part is hidden: an all-reduce of each parameter;
    then for each round of one matrix a rank, in the order of their shapes, the longest of its updates and an
    all-gather, and copies out of its buffer."""
    backend, rule = next(iter(gpu.attention)), Rule.of(hp.matrix_update)
    shapes = [] if rule.in_place else sorted(((m, n) for _, m, n in block_matrices(hp)), reverse=True)
    rest = sum(s.numel() for s in parameters(hp).values()) - sum(m * n for m, n in shapes)
    busy = seconds([Kernel(2, 0, 14 * rest)], gpu, backend, LAUNCH["published"])  # AdamW, of all, on every rank
    travel = sum(collective(gpus, nodes, s.numel() * (2 if name == "embed.weight" else 4), gpu, trips=2)
                 for name, s in apart(hp).items())
    first, second = ({(m, n): seconds(part(1, m, n, rule, "published"), gpu, backend, LAUNCH["published"])
                      for m, n in set(shapes)} for part in (update_kernels, second_part))
    later = 0.0
    for start in range(0, len(shapes), gpus):
        longest = max(shapes[start:start + gpus], key=lambda shape: first[shape] + second[shape])
        busy, later = busy + first[longest], later + second[longest]
        if gpus > 1:
            size = 4 * max(m * n for m, n in shapes[start:start + gpus]) * gpus
            copies = seconds([Kernel(2, 0, 2 * size)], gpu, backend, LAUNCH["published"])
            travel += collective(gpus, nodes, size, gpu) + copies
    return Step(busy, later, busy + later + travel)


########################################
#              Prediction              #
########################################

def breakdown(hp: train_gpt.Hyperparameters, name: str, gpus: int, nodes: int | None = None, form: str = "fused",
              attention: str | None = None, hidden: bool = False) -> dict[str, float]:
    """Milliseconds of a step by part; of second parts that are `hidden`, which only the fused form's can be, those
    that forward and backward leave over. ValueError where these GPUs cannot share the batch."""
    sequences = hp.batch_tokens // hp.sequence_length
    nodes = nodes or ceil(gpus / NODE)
    if sequences % gpus or gpus % nodes:
        raise ValueError(f"{gpus} GPUs in {nodes} nodes: {sequences} sequences and the nodes must share equally")
    gpu = GPUS[name]
    micro = micro_batch_size(sequences // gpus, hp.micro_batch)
    attention = attention or list(gpu.attention)[-1]
    parts = {part: 1000 * (sequences // gpus // micro) * seconds(kernels, gpu, attention, MODEL_LAUNCH)
             for part, kernels in model_kernels(hp, micro, form).items()}
    step = sharded_step(hp, gpus, nodes, gpu, hidden) if form == "fused" else published_step(hp, gpus, nodes, gpu)
    waits = step.whole - step.updates - (0 if hidden else step.later)
    later = max(0.0, 1000 * step.later - sum(parts.values())) if hidden else 1000 * step.later
    return parts | {"updates": 1000 * step.updates, "exposed communication": 1000 * waits, "second parts": later}


def predict(hp: train_gpt.Hyperparameters, gpu: str, gpus: int, nodes: int | None = None, form: str = "fused",
            attention: str | None = None, hidden: bool = False) -> float:
    """Milliseconds of a training step; validation, compilation and the first steps are not in it."""
    return sum(breakdown(hp, gpu, gpus, nodes, form, attention, hidden).values())


class Published(NamedTuple):
    program: str
    gpu: str
    gpus: int
    torch: str
    attention: str
    words: str  # or its recipe
    ms: float


# Medians of the logs of github.com/KellerJordan/modded-nanogpt, records/track_3_optimization (f411b3d3). That torch
# 2.11 takes cuDNN's attention on Hopper, and an earlier one FA2, is inferred from its rules, not seen in the logs.
# The first two lines are the calibrations, of SUSTAINED and of COLUMN. A100's line is not held out: a SUSTAINED of its
# own, .80, had been assumed, and was given up for the common one when that prediction was 12% too short.
PUBLISHED = (
    Published("#17, Aurora", "H100", 8, "2.10", "FA2", "@17_aurora", 157.3),
    Published("#44, SOAP", "H100", 8, "2.9", "FA2",
              "matrix_update=nesterov(0.95) | soap(0.9, 0.9) | schatten4_polar | aspect | brake(0.5) | floor(0.3825) "
              "| step | pin", 327.7),
    Published("#36, Muon", "H100", 8, "2.10", "FA2", "@36_muon_tuned", 154.2),
    Published("#6, Muon", "H100", 8, "2.11", "cuDNN", "@06_muon", 146.3),
    Published("#10, NorMuon", "H100", 8, "2.11", "cuDNN", "@10_normuon", 147.0),
    Published("#10, NorMuon", "H200", 8, "2.10", "FA2", "@10_normuon", 144.0),
    Published("#2, AdamW", "H100", 8, "2.10", "FA2", "@adamw", 148.5),
    Published("DynMuon, taken as Muon", "H200", 4, "2.9", "FA2", "@06_muon", 288.2),
    Published("Ortho, taken as Muon", "H200", 1, "2.11", "cuDNN", "@06_muon", 1073.9),
    Published("EMA-Nesterov, taken as Muon", "A100", 8, "2.11", "FA2", "@06_muon", 351.0),
)


def check() -> list[dict]:
    """Each published step time beside its prediction."""
    rows = []
    for index, p in enumerate(PUBLISHED):
        hp = train_gpt.override([p.words])
        ms = predict(hp, p.gpu, p.gpus, form="published", attention=p.attention)
        use = "calibration" if index < 2 else "seen" if p.gpu == "A100" else "held out"
        rows.append({"published program": p.program, "GPUs": f"{p.gpus}x{p.gpu}", "torch": p.torch,
                     "attention": p.attention, "published, ms": p.ms, "predicted, ms": round(ms, 1),
                     "off by": f"{100 * (ms / p.ms - 1):+.1f}%", "use": use})
    return rows


def counts(hp: train_gpt.Hyperparameters) -> list[int]:
    """Powers of two that can share the batch."""
    sequences = hp.batch_tokens // hp.sequence_length
    return [2**i for i in range(sequences.bit_length()) if sequences % 2**i == 0]


def row(hp: train_gpt.Hyperparameters, gpu: str, gpus: int) -> dict:
    """What a GPU of `gpus` does in a step. Lost is what a part takes above its time on one GPU, divided."""
    sequences = hp.batch_tokens // hp.sequence_length // gpus
    micro = micro_batch_size(sequences, hp.micro_batch)
    kernels = [k for part in model_kernels(hp, micro, "fused").values() for k in part]
    parts, alone = breakdown(hp, gpu, gpus), breakdown(hp, gpu, 1)
    updates, communication, later = (parts[x] for x in ("updates", "exposed communication", "second parts"))
    step, single = sum(parts.values()), sum(alone.values())
    model = step - updates - communication - later
    owned, owned_alone = updates + later, alone["updates"] + alone["second parts"]
    lost = model - (single - owned_alone) / gpus
    second = {"second parts, ms": round(later, 2),
              "step with them hidden, ms": round(predict(hp, gpu, gpus, hidden=True), 2)} if later else {}
    times = sequences // micro
    reduced, gathered = wire(hp, gpus)
    return {"GPUs": gpus, "micro-batches": f"{times} x {micro}",
            "TFLOP": sum(k.count * k.flops for k in kernels) * times / 1e12,
            "HBM, GB": sum(k.count * k.bytes for k in kernels) * times / 1e9,
            "sent, MB": f"{reduced / 1e6:.0f} + {gathered / 1e6:.0f}",
            "collectives x hops": f"{2 * len(banks(hp)) * (gpus > 1)} x {gpus - 1}",
            "step, ms": round(step, 2), "model, ms": round(model, 2), "updates, ms": round(updates, 2),
            "exposed communication, ms": round(communication, 2), **second, "efficiency": f"{single / gpus / step:.0%}",
            "lost to small kernels, ms": round(lost, 2),
            "to owned shares, ms": round(owned - owned_alone / gpus, 2)}


def stops(hp: train_gpt.Hyperparameters, name: str) -> str:
    """Where the batch stops scaling, and why."""
    every = {gpus: row(hp, name, gpus) for gpus in counts(hp)}
    fastest = min(every, key=lambda gpus: every[gpus]["step, ms"])
    half = max(gpus for gpus, at in every.items() if int(at["efficiency"][:-1]) >= 50)
    at = every[fastest]
    causes = {"kernels that no longer fill the GPU or cost a launch": at["lost to small kernels, ms"],
              "matrices that have one owner each": at["to owned shares, ms"],
              "communication that nothing hides": at["exposed communication, ms"]}
    listed = ", ".join(f"{ms:.1f} ms to {cause}" for cause, ms in sorted(causes.items(), key=lambda item: -item[1]))
    return (f"{name}: half of the GPUs' time is used up to {half} of them; the step is shortest on {fastest}, "
            f"{at['step, ms']:.1f} ms, where it loses {listed}.")


def main(words: list[str]):
    words, out = parse("roofline", __doc__, words)
    names = [word for word in words if word in GPUS] or ["H100"]
    hp = train_gpt.override([word for word in words if word not in GPUS])
    work = flops(hp)
    few = [gpus for gpus in (1, 8) if gpus in counts(hp)]
    machines = [{"GPU": name, **{f"on {gpus}, ms": round(predict(hp, name, gpus), 1) for gpus in few}} for name in GPUS]
    publish("bench.roofline", words, out,
            "Predicted, not measured. FLOPs of a step: "
            f"{', '.join(f'{part} {x / 1e12:.4g} TFLOP' for part, x in work.items())}.",
            "## The published programs", markdown(check()),
            *(part for name in names for part in (
                f"## This program, {name}: what one GPU does in a step", stops(hp, name),
                markdown([row(hp, name, gpus) for gpus in (1, 8, 16, 64, 512) if gpus in counts(hp)]))),
            "## This program, other GPUs", markdown(machines))


if __name__ == "__main__":
    run("roofline", main)
