"""Queries, keys and values with the kernel, against autograd in float64: off by at most twice what PyTorch is in the
same dtype."""

import math

import pytest
import torch
from conftest import DEVICE, MATMUL_DTYPES

from kernels import qkv
from kernels.qkv import dqkv_op, fused_qkv_heads, norm_and_rotate_op, qkv_heads_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1, 4), (2, 300, 3, 24), (3, 100, 2, 128)]  # B, T, H, K: 600 tokens end within a program and a block


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def angles(T, K):
    angle = torch.outer(torch.arange(T), 1024 ** -torch.linspace(0, 1, K // 2)).to(DEVICE)
    return angle.cos(), angle.sin()


def by_token(B, T, H, K, dtype, seed):
    """(B, H, T, K) with a token's heads together, as attention leaves gradients."""
    return normal(B, T, H, K, dtype=dtype, seed=seed).transpose(1, 2)


def among_nan(*shape, dtype, seed):
    """With strides of its own, a NaN on every side."""
    wide = torch.full([n + 2 for n in shape], math.nan, dtype=dtype, device=DEVICE)
    wide[1:-1, 1:-1, 1:-1, 1:-1] = normal(*shape, dtype=dtype, seed=seed)
    return wide[1:-1, 1:-1, 1:-1, 1:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, K", SIZES)
def test_norm_and_rotation(B, T, H, K, dtype):
    """Kills: a rotation backwards, an angle of the token's place in the batch, one rms for all heads, an intermediate
    that is not rounded where the reference rounds it, tokens, heads or columns that are skipped, a write to v or past
    the end, a token of zeros that is divided by zero."""
    product, (cos, sin) = normal(B, T, 3 * H * K, dtype=dtype), angles(T, K)
    product[-1, -1] = 0
    q, k, v = qkv._heads(product, cos, sin, K)
    true = exactly(lambda *inputs: qkv._heads(*inputs, K), product, cos, sin)
    inside = product.new_full((B * T * 3 * H * K + 64,), math.nan)
    ours = inside[32:-32].view(B, T, 3, H, K)
    ours.copy_(product.view_as(ours))
    inverse_rms = norm_and_rotate_op(ours[:, :, :2], cos, sin)
    for mine, its, exact in zip(ours.transpose(2, 3).unbind(3), (q, k, v), true, strict=True):
        mine = mine.transpose(1, 2)
        assert (mine - exact).norm() <= 2 * (its - exact).norm()
        if dtype != torch.float32:  # the same roundings in the same places: mostly the same bits
            assert (mine == its).double().mean() > 0.97
    assert torch.equal(ours[:, :, 2].flatten(2), product.chunk(3, 2)[2])
    assert inside[:32].isnan().all() and inside[-32:].isnan().all()
    rms = product.double().view_as(ours)[:, :, :2].square().mean(-1).add(qkv.EPSILON).sqrt()
    assert inverse_rms.dtype == torch.float32 and (inverse_rms * rms - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, K", SIZES)
def test_gradient(B, T, H, K, dtype, poisoned):
    """Kills: a rotation that turns on, the two halves exchanged, a norm that is not differentiated, an angle of the
    token's place in the batch, q's gradient given to k, one tensor's strides taken for another's, tokens, heads or
    columns that are skipped or read beyond the edge, an intermediate that is not rounded where autograd rounds it."""
    product, (cos, sin) = normal(B, T, 3 * H * K, dtype=dtype), angles(T, K)
    gradients = [by_token(B, T, H, K, dtype, 1), among_nan(B, H, T, K, dtype=dtype, seed=2),
                 normal(B, H, T, K, dtype=dtype, seed=3)]

    def autograd(product, cos, sin):
        product = product.detach().requires_grad_()
        heads = qkv._heads(product, cos, sin, K)
        return torch.autograd.grad(heads, product, [g.to(product.dtype) for g in gradients])[0].flatten(0, 1)

    qk = product.clone().view(B, T, 3, H, K)[:, :, :2]
    inverse_rms = norm_and_rotate_op(qk, cos, sin)
    ours, sums = dqkv_op(*gradients, qk, inverse_rms, cos, sin)
    theirs, exact = autograd(product, cos, sin), exactly(autograd, product, cos, sin)
    for a, b, true in zip(ours.chunk(3, 1), theirs.chunk(3, 1), exact.chunk(3, 1)):
        assert (a - true).norm() <= 2 * (b - true).norm()
    total = ours.double().sum(0)
    # fp32 sums of what was rounded, then one rounding to dtype
    tolerance = 1e-6 * ours.double().abs().sum(0) + torch.finfo(dtype).eps / 2 * total.abs()
    assert ((sums.double() - total).abs() <= tolerance).all()
    if dtype != torch.float32:  # of what is in memory, rounded where the kernel rounds: mostly the same bits
        g = torch.stack(gradients[:2], 1).permute(0, 3, 1, 2, 4)  # (B, T, 2, H, K)
        n, h = qkv.rotate(qk.float(), cos, -sin), qkv.rotate(g, cos, -sin).float()
        dqk = inverse_rms[..., None] * (h - n * (n * h).mean(-1, keepdim=True))
        assert (ours.view(B, T, 3, H, K)[:, :, :2] == dqk.to(dtype)).double().mean() > 0.97
        assert torch.equal(ours.view(B, T, 3, H, K)[:, :, 2], gradients[2].transpose(1, 2))


def exactly(function, product, cos, sin):
    """In float64, rotation and all: rotate() works in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return function(product.double(), cos.double(), sin.double())


def leaves_of(tokens, width, dtype):
    """x (2, tokens, width) and weight, bias of three heads of 8 a part."""
    return [(normal(*shape, dtype=dtype, seed=seed) * scale).requires_grad_() for seed, (shape, scale) in enumerate(
        [((2, tokens, width), 1), ((72, width), width**-0.5), ((72,), 1)])]


def heads_and_gradients(function, leaves):
    heads = function(*leaves, *angles(leaves[0].size(1), 8), 8)
    gradients = [normal(*y.shape, seed=9 + i).to(y.dtype) for i, y in enumerate(heads)]
    return [*(y.detach() for y in heads), *torch.autograd.grad(heads, leaves, gradients)]


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
def test_heads(dtype, poisoned):
    """Kills: a gradient of the wrong product or shape, a bias's gradient in another order, heads in another order, a v
    that differs from the reference's by a bit."""
    leaves = leaves_of(70, 48, dtype)
    true = heads_and_gradients(qkv_heads_reference, [p.detach().double().requires_grad_() for p in leaves])
    torchs, ours = (heads_and_gradients(function, leaves) for function in (qkv_heads_reference, fused_qkv_heads))
    for mine, its, exact in zip(ours, torchs, true, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert (mine - exact).norm() <= 2 * (its - exact).norm()
    assert torch.equal(ours[2], torchs[2])


def test_one_graph():
    """Kills: an operator that breaks the graph, a shape or dtype that its fake gets wrong."""
    leaves = leaves_of(20, 16, torch.float16)

    def doubled(x, *others):
        return tuple(2 * y for y in fused_qkv_heads(2 * x, *others))

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, eager in zip(*(heads_and_gradients(f, leaves) for f in (compiled, doubled)), strict=True):
        assert torch.equal(ours, eager)
    gradients = [normal(2, 3, 20, 8, dtype=torch.float16, seed=i) for i in range(3)]
    qk, cos, sin = normal(2, 20, 3, 3, 8, dtype=torch.float16)[:, :, :2], *angles(20, 8)
    checks = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(norm_and_rotate_op, (qk, cos, sin), **checks)
    torch.library.opcheck(dqkv_op, (*gradients, qk, norm_and_rotate_op(qk, cos, sin), cos, sin), **checks)
