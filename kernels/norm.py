"""Pre-norm of a residual branch y = x + f(h) + b, with the bias b of the branch's last product.

    (x + b, h),    h = n w,    n = x r,    r = 1 / rms(x)

Backwards the two meet again. Of the gradients g and dh:

    dx = g + r (u - n mean(n u)),    u = dh w,    dw = sum of dh n,    db = sum of g

The sums are over the tokens. This kernel reads g anyway; where f's last product is, the bias gradient db would cost a
pass over memory of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bf16 import runs_kernels, tl, triton

EPSILON = torch.finfo(torch.float32).eps  # of rms, as in F.rms_norm


def prenorm_reference(x: Tensor, gains: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x + bias, F.rms_norm(x, gains.shape, gains, EPSILON)


@triton.jit
def dprenorm_kernel(g, dh, x, gains, dx, column_sums, M, D,
                    EPSILON: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    """ROWS of the M tokens, BLOCK_M at a time: dx (M, D), and the sums over these rows of dh n and of g,
    (cdiv(M, ROWS), 2, D) fp32."""
    i = tl.arange(0, BLOCK_D)
    w = tl.load(gains + i, mask=i < D, other=0).to(tl.float32)[None, :]
    dgains = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        m = tl.program_id(0) * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (i < D)[None, :]
        here = m.to(tl.int64)[:, None] * D + i[None, :]
        n = tl.load(x + here, mask=mask, other=0).to(tl.float32)
        r = tl.rsqrt(tl.sum(n * n, 1) / D + EPSILON)[:, None]
        n *= r
        dh_tile = tl.load(dh + here, mask=mask, other=0).to(tl.float32)
        g_tile = tl.load(g + here, mask=mask, other=0).to(tl.float32)
        u = dh_tile * w
        mean = tl.sum(n * u, 1)[:, None] / D
        tl.store(dx + here, (g_tile + r * (u - n * mean)).to(dx.dtype.element_ty), mask=mask)
        dgains += dh_tile * n
        dbias += g_tile
    column_sums += tl.program_id(0).to(tl.int64) * 2 * D + i
    tl.store(column_sums, tl.sum(dgains, 0), mask=i < D)
    tl.store(column_sums + D, tl.sum(dbias, 0), mask=i < D)


def gradient_of_prenorm(g: Tensor, dh: Tensor, x: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """dx like x, and dgains and dbias (2, D), added in fp32 in a fixed order, in its dtype, of g, dh and x (..., D)."""
    g, dh, x = (t.contiguous() for t in (g, dh, x))
    D, rows = x.size(-1), 64
    M, width = x.numel() // D, triton.next_power_of_2(D)
    block = min(rows, max(1, 2048 // width))  # more rows would be the next program's too
    dx = torch.empty_like(x)
    sums = x.new_empty(triton.cdiv(M, rows), 2, D, dtype=torch.float32)
    dprenorm_kernel[(len(sums),)](g, dh, x, gains, dx, sums, M, D, EPSILON, width, block, rows,
                                  num_warps=max(4, width // 512))  # 16 numbers of a tile a thread
    return dx, sums.sum(0).type_as(x)


dprenorm_op = torch.library.custom_op("kernels::dprenorm", gradient_of_prenorm, mutates_args=())


@dprenorm_op.register_fake
def _dprenorm_shapes(g, dh, x, gains):
    return x.new_empty(x.shape), x.new_empty(2, x.size(-1))


class _FusedPrenorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gains: Tensor, bias: Tensor):
        ctx.save_for_backward(x, gains)
        return prenorm_reference(x, gains, bias)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        dx, vectors = dprenorm_op(*gradients, *ctx.saved_tensors)
        return dx, *vectors


def fused_prenorm(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """prenorm with the kernel."""
    return _FusedPrenorm.apply(*inputs)


def prenorm(x: Tensor, gains: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x + bias and rms_norm(x) * gains, of x (..., D), gains (D) and bias (D), all of one dtype."""
    return (fused_prenorm if runs_kernels(x.device) else prenorm_reference)(x, gains, bias)
