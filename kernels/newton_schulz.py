"""Newton-Schulz iteration: the matrix products under every polar factor.

    A = X X^T,    B = b A + c A A,    X <- a X + B X,    for each (a, b, c) of a table

It is an odd polynomial of X, so it acts on each singular value alone and leaves the singular vectors as they
are: with X = U diag(s) V^T, one step gives U diag(a s + b s^3 + c s^5) V^T.

A and B are symmetric: the kernel computes the tiles of their lower triangle, and stores each a second time, mirrored.
"""

import torch
from torch import Tensor

from kernels.bf16 import needs_fp32, runs_kernels, tl, triton


def newton_schulz_reference(X: Tensor, coefficients, rounded=lambda product: product) -> Tensor:
    """The iteration on a stack X of shape (K, M, N), M <= N, with singular values at most about 1.

    Each of the three products is accumulated in fp32 and rounded once to X's dtype; the epilogues b A + ... and
    a X + ... ride on it. That is one rounding fewer than the compiled script of result #17: it rounds b A apart.
    """
    for a, b, c in coefficients:
        A = rounded(torch.bmm(X, X.mT))
        B = rounded(torch.baddbmm(A, A, A, beta=b, alpha=c) if c else b * A)
        X = rounded(torch.baddbmm(X, B, X, beta=a))
    return X


@triton.jit
def symmetric_product_kernel(P, S, b, c, M, N, stride_k, stride_m, stride_n,
                             ADD: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    # rows r and T - 1 - r of the triangle have T + 1 tiles between them: folded, it is a rectangle
    tiles = tl.cdiv(M, TILE)
    row, column = tl.program_id(0) // (tiles + 1), tl.program_id(0) % (tiles + 1)
    i = tl.where(column <= row, row, tiles - 1 - row)
    j = tl.where(column <= row, column, column - row - 1)
    matrix = tl.program_id(1).to(tl.int64)
    P += matrix * stride_k
    S += matrix * M * M

    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    left = P + rows[:, None] * stride_m + depth[None, :] * stride_n
    right = P + columns[:, None] * stride_m + depth[None, :] * stride_n
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, N, DEPTH):
        inside = depth[None, :] < N - start
        x = tl.load(left, mask=(rows[:, None] < M) & inside, other=0.0)
        y = tl.load(right, mask=(columns[:, None] < M) & inside, other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")  # the default is TF32 for fp32
        left += DEPTH * stride_n
        right += DEPTH * stride_n

    inside = (rows[:, None] < M) & (columns[None, :] < M)
    total *= c
    if ADD:
        total += b * tl.load(P + rows[:, None] * stride_m + columns[None, :] * stride_n, mask=inside).to(tl.float32)
    tile = total.to(S.dtype.element_ty)
    mirrored = tl.trans(tile)
    if i == j:  # nothing promises that its two halves were summed in the same order
        tile = tl.where(rows[:, None] >= columns[None, :], tile, mirrored)
    else:
        tl.store(S + columns[:, None] * M + rows[None, :], mirrored,
                 mask=(columns[:, None] < M) & (rows[None, :] < M))
    tl.store(S + rows[:, None] * M + columns[None, :], tile, mask=inside)


@triton.jit
def multiply_add_kernel(B, X, Y, a, M, N, stride_k, stride_m, stride_n, TILE: tl.constexpr, DEPTH: tl.constexpr):
    i, j = tl.program_id(0) % tl.cdiv(M, TILE), tl.program_id(0) // tl.cdiv(M, TILE)
    matrix = tl.program_id(1).to(tl.int64)
    B += matrix * M * M
    X += matrix * stride_k
    Y += matrix * M * N

    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    left = B + rows[:, None] * M + depth[None, :]
    right = X + depth[:, None] * stride_m + columns[None, :] * stride_n
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, M, DEPTH):
        x = tl.load(left, mask=(rows[:, None] < M) & (depth[None, :] < M - start), other=0.0)
        y = tl.load(right, mask=(depth[:, None] < M - start) & (columns[None, :] < N), other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * stride_m

    inside = (rows[:, None] < M) & (columns[None, :] < N)
    total += a * tl.load(X + rows[:, None] * stride_m + columns[None, :] * stride_n, mask=inside).to(tl.float32)
    tl.store(Y + rows[:, None] * N + columns[None, :], total.to(Y.dtype.element_ty), mask=inside)


# modded-nanogpt's choice for 768 rows (triton_kernels.py). The stages take 128 KB of shared memory on Hopper and
# Blackwell, which have 227, and 96 KB on cards that have 99 or 163 (bench/results/compile.md): one choice fits all.
# Nothing is tuned as it starts: ranks that tuned for themselves would round differently.
PRODUCT_LAUNCH = dict(TILE=128, DEPTH=64, num_warps=8, num_stages=4)


def symmetric_product(P: Tensor, out: Tensor, b: float = 0.0, c: float = 1.0):
    """out = b P + c P P^T, exactly symmetric, of a stack P (K, M, N) of any strides; P is symmetric where b is not 0.

    Accumulated and added in fp32, rounded once to out's dtype. out is (K, M, M), contiguous, and does not overlap P.
    """
    K, M, N = P.shape
    tiles = triton.cdiv(M, PRODUCT_LAUNCH["TILE"])
    symmetric_product_kernel[tiles * (tiles + 1) // 2, K](P, out, b, c, M, N, *P.stride(), ADD=b != 0, **PRODUCT_LAUNCH)


def multiply_add(B: Tensor, X: Tensor, out: Tensor, a: float):
    """out = a X + B X of stacks B (K, M, M), contiguous, and X (K, M, N) of any strides.

    Accumulated and added in fp32, rounded once to out's dtype. out is (K, M, N), contiguous, and does not overlap X.
    """
    K, M, N = X.shape
    tiles = triton.cdiv(M, PRODUCT_LAUNCH["TILE"]) * triton.cdiv(N, PRODUCT_LAUNCH["TILE"])
    multiply_add_kernel[tiles, K](B, X, out, a, M, N, *X.stride(), **PRODUCT_LAUNCH)


# What runs each line of the iteration. Published experience, not ours: modded-nanogpt (train_gpt.py) runs the symmetric
# products in Triton and cuBLAS for the third, although baddbmm copies X before it adds to it. Against it: flash-muon's
# README has Triton slower than cuBLAS up to 1024 rows, one matrix at a time. `python -m bench.kernels` measures anew.
NEWTON_SCHULZ_CHOICE = "Triton", "Triton", "cuBLAS"
NEWTON_SCHULZ_LINES = (
    {"Triton": symmetric_product,
     "cuBLAS": lambda X, out: torch.bmm(X, X.mT, out=out)},
    {"Triton": symmetric_product,
     "cuBLAS": lambda A, out, b, c: torch.baddbmm(A, A, A, beta=b, alpha=c, out=out)},
    {"Triton": multiply_add,
     "cuBLAS": lambda B, X, out, a: torch.baddbmm(X, B, X, beta=a, out=out)},
)


def newton_schulz_fused(X: Tensor, coefficients, choice=NEWTON_SCHULZ_CHOICE) -> Tensor:
    """The reference's iteration, rounded where it rounds, with the products that `choice` names. Not differentiable.

    One launch a product for the whole stack; X alternates between two buffers, and the argument is not changed.
    A CUDA graph can capture it after a first call, which compiles.
    """
    gram, polynomial, advance = (line[name] for line, name in zip(NEWTON_SCHULZ_LINES, choice))
    K, M, N = X.shape
    A, B = X.new_empty(K, M, M), X.new_empty(K, M, M)
    buffers = X.new_empty(K, M, N), X.new_empty(K, M, N)
    with torch.cuda.device_of(X):  # Triton launches on the current device
        for step, (a, b, c) in enumerate(coefficients):
            gram(X, A)
            if c:
                polynomial(A, B, b, c)
            else:
                torch.mul(A, b, out=B)
            advance(B, X, buffers[step % 2], a)
            X = buffers[step % 2]
    return X


@torch.library.custom_op("kernels::newton_schulz", mutates_args=())
def newton_schulz_op(X: Tensor, coefficients: list[float]) -> Tensor:
    """An opaque operator, as a compiled update is one graph around it. Three coefficients a step."""
    return newton_schulz_fused(X, list(zip(*[iter(coefficients)] * 3)))


@newton_schulz_op.register_fake
def _newton_schulz_shape(X, coefficients):
    return X.new_empty(X.shape)


def newton_schulz(X: Tensor, coefficients) -> Tensor:
    """Contract of newton_schulz_reference. Stacks of 16 bits on a GPU with bf16 run as newton_schulz_path says."""
    if runs_kernels(X.device) and X.element_size() == 2:
        return newton_schulz_op(X, [number for step in coefficients for number in step])
    if needs_fp32(X):
        return newton_schulz_reference(X.float(), coefficients, lambda product: product.bfloat16().float()).bfloat16()
    return newton_schulz_reference(X, coefficients)


def newton_schulz_path(device: torch.device) -> str:
    """What runs the three lines of the iteration on a device, for 16-bit stacks; all others take the reference."""
    return ", ".join(NEWTON_SCHULZ_CHOICE) if runs_kernels(device) else "reference"
