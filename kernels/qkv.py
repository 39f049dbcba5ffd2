"""Queries, keys and values: one product, and then q and k are normalised and rotated by their position.

    (q, k, v) = x W^T + b,    z -> R_t(z / rms(z)) for z a head's q or k

R_t is the rotary embedding (arXiv 2104.09864): it turns the pairs (z_i, z_{i + K/2}) by the angles of position t. The
gradient g of its result turns back, h = R_-t g, and passes the norm: dz = r (h - z r^2 mean(z h)), r = 1 / rms(z). db
sums dq, dk and dv over the tokens.

Forwards that is one pass over memory, as torch.compile writes it. Backwards it writes three, through h in fp32
(bench/graph.py shows them); the kernel is one.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.bf16 import linear, runs_kernels

EPSILON = torch.finfo(torch.float32).eps  # of rms, as in F.rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, ..., K) by cos, sin (T, K/2) of the angles, computed in fp32."""
    cos, sin = (t.view(len(t), *[1] * (x.ndim - 3), -1) for t in (cos, sin))
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x)


def _heads(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    qk, v = qkv.unflatten(-1, (3, -1, head_dim)).split([2, 1], dim=2)  # (B, T, 2 or 1, H, K)
    qk = rotate(F.rms_norm(qk, (head_dim,), eps=EPSILON), cos, sin)
    return tuple(t.transpose(1, 2) for t in (*qk.unbind(2), v.squeeze(2)))


def qkv_heads_reference(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor,
                        head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(linear(x, weight, bias), cos, sin, head_dim)


@triton.jit
def dqkv_kernel(dq, dk, dv, qkv, cos, sin, dqkv, column_sums, M, T, H,
                stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                EPSILON: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_M: tl.constexpr,
                ROWS: tl.constexpr):
    """One head of q, k or v, ROWS of the M = B T tokens, BLOCK_M at a time: dqkv (M, 3, H, K), and its column sums over
    these rows, (cdiv(M, ROWS), 3, H, K) fp32. The two halves of K are two tiles."""
    column = tl.program_id(1)
    part, head = column // H, column % H
    g, stride_b, stride_h, stride_t = dq, stride_qb, stride_qh, stride_qt
    if part == 1:
        g, stride_b, stride_h, stride_t = dk, stride_kb, stride_kh, stride_kt
    if part == 2:
        g, stride_b, stride_h, stride_t = dv, stride_vb, stride_vh, stride_vt
    dtype = dqkv.dtype.element_ty
    i = tl.arange(0, BLOCK_HALF)
    sums1 = tl.zeros((BLOCK_M, BLOCK_HALF), tl.float32)
    sums2 = tl.zeros((BLOCK_M, BLOCK_HALF), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        m = tl.program_id(0) * ROWS + start + tl.arange(0, BLOCK_M)
        t = m % T
        mask = (m < M)[:, None] & (i < HALF)[None, :]
        token = (m // T).to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
        there = g + token[:, None] + head * stride_h + i[None, :]
        here = (m.to(tl.int64) * (6 * H * HALF))[:, None] + column * 2 * HALF + i[None, :]
        g1 = tl.load(there, mask=mask, other=0).to(tl.float32)
        g2 = tl.load(there + HALF, mask=mask, other=0).to(tl.float32)
        if part < 2:
            angle = (t * HALF)[:, None] + i[None, :]
            c = tl.load(cos + angle, mask=mask, other=0)
            s = tl.load(sin + angle, mask=mask, other=0)
            h1 = (g1 * c - g2 * s).to(dtype).to(tl.float32)  # rounded, as autograd does
            h2 = (g2 * c + g1 * s).to(dtype).to(tl.float32)
            x1 = tl.load(qkv + here, mask=mask, other=0).to(tl.float32)
            x2 = tl.load(qkv + here + HALF, mask=mask, other=0).to(tl.float32)
            r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + EPSILON)[:, None]
            mean = tl.sum(x1 * h1 + x2 * h2, 1)[:, None] / (2 * HALF)
            g1 = r * (h1 - x1 * (r * r * mean))
            g2 = r * (h2 - x2 * (r * r * mean))
        d1, d2 = g1.to(dtype), g2.to(dtype)
        tl.store(dqkv + here, d1, mask=mask)
        tl.store(dqkv + here + HALF, d2, mask=mask)
        sums1 += d1.to(tl.float32)
        sums2 += d2.to(tl.float32)
    column_sums += (tl.program_id(0).to(tl.int64) * 3 * H + column) * 2 * HALF + i
    tl.store(column_sums, tl.sum(sums1, 0), mask=i < HALF)
    tl.store(column_sums + HALF, tl.sum(sums2, 0), mask=i < HALF)


def gradient_of_qkv(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """dqkv (B T, 3 H K) of dq, dk, dv (B, H, T, K), with K contiguous, and its column sums (3 H K), added in fp32 in a
    fixed order, in its dtype. qkv (B, T, 3 H K) is the product; cos, sin (T, K/2) in fp32."""
    B, H, T, K = dq.shape
    M, block, rows = B * T, 32, 256
    dqkv = qkv.new_empty(M, 3 * H * K)
    sums = qkv.new_empty(triton.cdiv(M, rows), 3 * H * K, dtype=torch.float32)
    strides = [stride for g in (dq, dk, dv) for stride in g.stride()[:3]]
    dqkv_kernel[(len(sums), 3 * H)](dq, dk, dv, qkv, cos, sin, dqkv, sums, M, T, H, *strides, EPSILON, K // 2,
                                    triton.next_power_of_2(K // 2), block, rows)
    return dqkv, sums.sum(0).type_as(dqkv)


@torch.library.custom_op("kernels::dqkv", mutates_args=())
def dqkv_op(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return gradient_of_qkv(dq, dk, dv, qkv, cos, sin)


@dqkv_op.register_fake
def _dqkv_shapes(dq, dk, dv, qkv, cos, sin):
    return qkv.new_empty(qkv.size(0) * qkv.size(1), qkv.size(2)), qkv.new_empty(qkv.size(2))


class _FusedQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, head_dim: int):
        qkv = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, qkv, cos, sin)
        return _heads(qkv, cos, sin, head_dim)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        x, weight, *saved = ctx.saved_tensors
        dqkv, dbias = dqkv_op(*gradients, *saved)
        return (dqkv @ weight).view_as(x), dqkv.mT @ x.flatten(0, 1), dbias, None, None, None


def fused_qkv_heads(*inputs) -> tuple[Tensor, Tensor, Tensor]:
    """qkv_heads with the kernel."""
    return _FusedQKV.apply(*inputs)


def qkv_heads(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor,
              head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, K) of x (B, T, D) by weight (3 H K, D) and bias (3 H K), all of one dtype, which the product,
    the norm and the rotation are each rounded to. cos, sin (T, K/2): fp32. q and k have a root mean square of 1."""
    return (fused_qkv_heads if runs_kernels(x.device) else qkv_heads_reference)(x, weight, bias, cos, sin, head_dim)


def qkv_path(device: torch.device) -> str:
    """What qkv_heads runs, for the log."""
    return "Triton kernel" if runs_kernels(device) else "plain PyTorch"
