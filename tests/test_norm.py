"""The pre-norm with its kernel, number by number against float64."""

import math

import pytest
import torch
from conftest import DEVICE

from kernels import norm
from kernels.norm import dprenorm_op, fused_prenorm, prenorm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# tokens, D: they end within a program, and most within a block; a block could hold more rows of 8 than a program does
SIZES = [(1, 1), (130, 8), (130, 24), (70, 768), (67, 3000)]


def normal(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def between_nan(t):
    """The same tensor, contiguous, in memory with a NaN on both sides."""
    wide = t.new_full((t.numel() + 16,), math.nan)
    wide[8:-8] = t.flatten()
    return wide[8:-8].view_as(t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, D", SIZES)
def test_gradient(M, D, dtype, poisoned):
    """Kills: the two gradients exchanged, a gain left out or used twice, a mean over the padded width, a norm that is
    not differentiated, tokens or columns that are skipped or read beyond the edge, a stride that is ignored, a gradient
    of the gains that takes x for its norm, sums of what belongs to another output, sums in fewer bits than fp32."""
    x, w = between_nan(3 * normal(M, D, dtype=dtype, seed=0)), between_nan(1 + normal(D, dtype=dtype, seed=1))
    g, dh = between_nan(normal(M, D, dtype=dtype, seed=2)), normal(D, M, dtype=dtype, seed=3).mT
    dx, (dw, db) = dprenorm_op(g, dh, x, w)

    leaves = [t.double().requires_grad_() for t in (x, w, w)]
    exact = torch.autograd.grad(prenorm_reference(*leaves), leaves, (g.double(), dh.double()))
    r = (x.double().square().mean(1, keepdim=True) + norm.EPSILON).rsqrt()
    n, u = (x.double() * r).abs(), (dh.double() * w.double()).abs()
    sizes = (g.double().abs() + r * (u + n * (n * u).mean(1, keepdim=True)), (dh.double().abs() * n).sum(0),
             g.double().abs().sum(0))  # of the terms
    for ours, true, terms in zip((dx, dw, db), exact, sizes, strict=True):
        assert ours.dtype == dtype and ours.shape == true.shape
        # computed in fp32, then one rounding to dtype
        assert ((ours.double() - true).abs() <= 1e-6 * terms + torch.finfo(dtype).eps / 2 * true.abs()).all()


def outputs_and_gradients(function, leaves):
    outputs = function(*leaves)
    gradients = [normal(*y.shape, dtype=y.dtype, seed=5 + i) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, gradients)]


def leaves_of(dtype):
    """x (2, 35, 48), gains and bias."""
    return [normal(*shape, dtype=dtype, seed=seed).requires_grad_()
            for seed, shape in enumerate([(2, 35, 48), (48,), (48,)])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_prenorm(dtype, poisoned):
    """Kills: a gradient given to the wrong input or in the wrong shape, an output that differs from the reference's by
    a bit, a norm of the stream with the bias in it."""
    leaves = leaves_of(dtype)
    true = outputs_and_gradients(prenorm_reference, [p.detach().double().requires_grad_() for p in leaves])
    torchs, ours = (outputs_and_gradients(function, leaves) for function in (prenorm_reference, fused_prenorm))
    for mine, its, exact in zip(ours, torchs, true, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert (mine - exact).norm() <= 2 * (its - exact).norm()
    assert all(map(torch.equal, ours[:2], torchs[:2]))
    x, gains, bias = (p.detach().double() for p in leaves)
    h = x / (x.square().mean(-1, keepdim=True) + norm.EPSILON).sqrt() * gains
    assert torch.allclose(true[0], x + bias) and torch.allclose(true[1], h)


def test_one_graph():
    """Kills: an operator that breaks the graph, a shape or dtype that its fake gets wrong."""
    leaves = leaves_of(torch.float16)

    def doubled(x, *others):
        return tuple(2 * y for y in fused_prenorm(2 * x, *others))

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, eager in zip(*(outputs_and_gradients(f, leaves) for f in (compiled, doubled)), strict=True):
        assert torch.equal(ours, eager)
    x, gains, _ = (p.detach() for p in leaves)
    torch.library.opcheck(dprenorm_op, (x, 2 * x, x, gains), test_utils=("test_schema", "test_faketensor"))
