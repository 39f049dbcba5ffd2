"""Queries, keys and values: one product, and then q and k are normalised and rotated by their position.

    (q, k, v) = x W^T + b,    z -> R_t(z / rms(z)) for z a head's q or k

R_t is the rotary embedding (arXiv 2104.09864): it turns the pairs (z_i, z_{i + K/2}) by the angles of position t. The
gradient g of its result turns back, h = R_-t g, and passes the norm: dz = r (h - n mean(n h)), n = z / rms(z), r = 1 /
rms(z). db sums dq, dk and dv over the tokens.

The forward pass overwrites z with its result. The backward pass recovers n by rotating back, so only r, one number per
head and token, is saved. torch.compile would save z too, and compute h in three fp32 passes (bench/graph.py shows
such).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bf16 import linear, runs_kernels, tl, triton
from kernels.norm import EPSILON


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
def rotate_kernel(qk, cos, sin, inverse_rms, M, T, heads, stride_m,
                  EPSILON: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_M: tl.constexpr):
    """One head, BLOCK_M of the M = B T tokens, in place; inverse_rms (M, heads) fp32. The two halves of K are two
    tiles."""
    head = tl.program_id(1)
    m, i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_HALF)
    mask = (m < M)[:, None] & (i < HALF)[None, :]
    here = qk + (m.to(tl.int64) * stride_m + head * 2 * HALF)[:, None] + i[None, :]
    angle = ((m % T) * HALF)[:, None] + i[None, :]
    c = tl.load(cos + angle, mask=mask, other=0)
    s = tl.load(sin + angle, mask=mask, other=0)
    x1 = tl.load(here, mask=mask, other=0).to(tl.float32)
    x2 = tl.load(here + HALF, mask=mask, other=0).to(tl.float32)
    dtype = qk.dtype.element_ty
    r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + EPSILON)
    n1 = (x1 * r[:, None]).to(dtype).to(tl.float32)  # rounded, as rms_norm does
    n2 = (x2 * r[:, None]).to(dtype).to(tl.float32)
    tl.store(here, (n1 * c + n2 * s).to(dtype), mask=mask)
    tl.store(here + HALF, (n2 * c - n1 * s).to(dtype), mask=mask)
    tl.store(inverse_rms + m.to(tl.int64) * heads + head, r, mask=m < M)


@triton.jit
def dqkv_kernel(dq, dk, dv, qk, inverse_rms, cos, sin, dqkv, column_sums, M, T, H, stride_m,
                stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_M: tl.constexpr,
                ROWS: tl.constexpr):
    """One head of q, k or v, ROWS of the M = B T tokens, BLOCK_M at a time: dqkv (M, 3, H, K), and its column sums over
    these rows, (cdiv(M, ROWS), 3, H, K) fp32. qk, inverse_rms: rotate_kernel's."""
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
            rotated = qk + (m.to(tl.int64) * stride_m + column * 2 * HALF)[:, None] + i[None, :]
            y1 = tl.load(rotated, mask=mask, other=0).to(tl.float32)
            y2 = tl.load(rotated + HALF, mask=mask, other=0).to(tl.float32)
            n1 = y1 * c - y2 * s
            n2 = y2 * c + y1 * s
            mean = tl.sum(n1 * h1 + n2 * h2, 1)[:, None] / (2 * HALF)
            r = tl.load(inverse_rms + m.to(tl.int64) * 2 * H + column, mask=m < M, other=0)[:, None]
            g1 = r * (h1 - n1 * mean)
            g2 = r * (h2 - n2 * mean)
        d1, d2 = g1.to(dtype), g2.to(dtype)
        tl.store(dqkv + here, d1, mask=mask)
        tl.store(dqkv + here + HALF, d2, mask=mask)
        sums1 += d1.to(tl.float32)
        sums2 += d2.to(tl.float32)
    column_sums += (tl.program_id(0).to(tl.int64) * 3 * H + column) * 2 * HALF + i
    tl.store(column_sums, tl.sum(sums1, 0), mask=i < HALF)
    tl.store(column_sums + HALF, tl.sum(sums2, 0), mask=i < HALF)


def norm_and_rotate_(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Overwrite qk (B, T, 2, H, K), a slice of (B, T, 3, H, K), with what is normalised and rotated; 1 / rms of what
    was there, (B, T, 2, H) fp32. cos, sin (T, K/2) in fp32."""
    B, T, _, H, K = qk.shape
    M, block = B * T, 32
    inverse_rms = qk.new_empty(qk.shape[:4], dtype=torch.float32)
    rotate_kernel[(triton.cdiv(M, block), 2 * H)](qk, cos, sin, inverse_rms, M, T, 2 * H, qk.stride(1), EPSILON, K // 2,
                                                  triton.next_power_of_2(K // 2), block)
    return inverse_rms


def gradient_of_qkv(dq: Tensor, dk: Tensor, dv: Tensor, qk: Tensor, inverse_rms: Tensor,
                    cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """dqkv (B T, 3 H K) of dq, dk, dv (B, H, T, K), with K contiguous, and its column sums (3 H K), added in fp32 in a
    fixed order, in its dtype. qk and inverse_rms are norm_and_rotate_'s."""
    B, H, T, K = dq.shape
    M, block, rows = B * T, 32, 256
    dqkv = qk.new_empty(M, 3 * H * K)
    sums = qk.new_empty(triton.cdiv(M, rows), 3 * H * K, dtype=torch.float32)
    strides = [stride for g in (dq, dk, dv) for stride in g.stride()[:3]]
    dqkv_kernel[(len(sums), 3 * H)](dq, dk, dv, qk, inverse_rms, cos, sin, dqkv, sums, M, T, H, qk.stride(1), *strides,
                                    K // 2, triton.next_power_of_2(K // 2), block, rows)
    return dqkv, sums.sum(0).type_as(dqkv)


norm_and_rotate_op = torch.library.custom_op("kernels::norm_and_rotate_", norm_and_rotate_, mutates_args=("qk",))


@norm_and_rotate_op.register_fake
def _norm_and_rotate_shape(qk, cos, sin):
    return qk.new_empty(qk.shape[:4], dtype=torch.float32)


dqkv_op = torch.library.custom_op("kernels::dqkv", gradient_of_qkv, mutates_args=())


@dqkv_op.register_fake
def _dqkv_shapes(dq, dk, dv, qk, inverse_rms, cos, sin):
    B, T, _, H, K = qk.shape
    return qk.new_empty(B * T, 3 * H * K), qk.new_empty(3 * H * K)


class _FusedQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, head_dim: int):
        qkv = F.linear(x, weight, bias).unflatten(-1, (3, -1, head_dim))  # (B, T, 3, H, K)
        qk = qkv[:, :, :2]
        inverse_rms = norm_and_rotate_op(qk, cos, sin)
        ctx.save_for_backward(x, weight, qk, inverse_rms, cos, sin)
        return tuple(t.transpose(1, 2) for t in qkv.unbind(2))

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
