"""The ReLU^2 MLP in kernels: bit for bit where its products are exact, and against autograd in float64.

Operands of a few bits are multiplied and summed in fp32 without rounding, to sums that fp16 and bf16 cannot hold: so
the roundings that the contract names are the only ones, and they do round. On random operands the error is at most
twice that of PyTorch in the same dtype.
"""

import math

import pytest
import torch
from conftest import DEVICE, MATMUL_DTYPES

from kernels.mlp import fused_relu2_mlp, relu2_dpre, relu2_mlp_reference, relu2_up

SIZES = [(1, 1, 1), (200, 300, 100), (1100, 257, 130)]  # rows, neurons, width: 9 rows of tiles are more than a group


def few_bits(*shape, dtype, largest=15, unit=1.0, seed=0):
    """Multiples of the unit."""
    generator = torch.Generator().manual_seed(seed)
    return (unit * torch.randint(-largest, largest + 1, shape, generator=generator)).to(DEVICE, dtype)


def weights(*shape, dtype):
    return few_bits(*shape, dtype=dtype, largest=63, unit=2**-7, seed=1)


def columns_of_nan(t):
    """The same matrix, as the middle of a wider one."""
    wide = t.new_full((len(t), t.size(1) + 7), math.nan)
    wide[:, 3:-4] = t
    return wide[:, 3:-4]


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("M, N, K", SIZES)
@pytest.mark.parametrize("strided", [lambda t: t, columns_of_nan, lambda t: t.mT.contiguous().mT],
                         ids=["contiguous", "columns", "transposed"])
def test_up_projection(M, N, K, dtype, strided, poisoned):
    """Kills: a last tile or block that is skipped or read beyond its edge, a stride taken for another, a bias added
    after the rounding of the product or without one after it, a square of what was not rounded, no relu."""
    x, weight = strided(few_bits(M, K, dtype=dtype)), strided(weights(N, K, dtype=dtype))
    bias = few_bits(N, dtype=dtype, largest=2000, unit=2**-7, seed=2)
    pre = (x.double() @ weight.double().mT + bias.double()).to(dtype)
    assert torch.equal(relu2_up(x, weight, bias), pre.relu().square())


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
@pytest.mark.parametrize("M, N, K", SIZES)
@pytest.mark.parametrize("strided", [lambda t: t, columns_of_nan, lambda t: t.mT.contiguous().mT],
                         ids=["contiguous", "columns", "transposed"])
def test_gradient_of_the_activation(M, N, K, dtype, strided, poisoned):
    """Kills: a missing factor 2, post taken for its root, a product that is not rounded before it is multiplied, column
    sums that miss the last rows or take the unrounded gradient, and the mistakes of tiles and strides."""
    dy, weight = strided(few_bits(M, K, dtype=dtype)), strided(weights(K, N, dtype=dtype))
    relu = torch.randn(M, N, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype).relu()
    relu[relu < 2**-6] = 0  # fp16's squares of less are subnormal
    dpost = (dy.double() @ weight.double()).to(dtype)
    dpre, sums = relu2_dpre(dy, weight, relu.square())
    assert torch.equal(dpre, dpost * (2 * relu))
    exact = dpre.double().sum(0)
    # fp32 sums, then one rounding to dtype
    tolerance = 1e-6 * dpre.double().abs().sum(0) + torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((sums.double() - exact).abs() <= tolerance).all()


def squarable(dtype):
    """Every number of a 16-bit dtype whose square is finite and not subnormal; some of fp32's."""
    if dtype == torch.float32:
        return torch.linspace(1, 4, 5000)
    numbers = torch.arange(2**15, dtype=torch.int16).view(dtype)
    return numbers[(numbers.square() >= torch.finfo(dtype).smallest_normal) & numbers.square().isfinite()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("error", [-(2**-14), 0, 2**-14])
def test_the_root_of_a_rounded_square_rounds_to_the_number(dtype, error):
    """Kills: the file's claim, if it is false. It leaves room for a hardware root that is off by 2^-14, of itself."""
    numbers = squarable(dtype)
    assert len(numbers) > 15000
    assert torch.equal((numbers.square().float().sqrt() * (1 + error)).to(dtype), numbers)


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
def test_the_kernel_recovers_relu_from_its_square(dtype):
    """Kills: relu(pre) recovered to less than all its bits, as by a root that is not rounded to dtype."""
    numbers = squarable(dtype).to(DEVICE)[None]
    one = numbers.new_ones(1, 1)
    dpre, _ = relu2_dpre(one, one.expand(1, numbers.numel()), numbers.square())
    assert torch.equal(dpre, 2 * numbers)


def leaves_of(tokens, width, neurons, dtype):
    """x (2, tokens, width) and the MLP's parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, tokens, width), (neurons, width), (neurons,), (width, neurons)
    leaves = [torch.randn(shape, generator=generator) / (width**0.5 if len(shape) == 2 else 1) for shape in shapes]
    return [t.to(DEVICE, dtype).requires_grad_() for t in leaves]


def output_and_gradients(function, leaves):
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", MATMUL_DTYPES)
def test_mlp(dtype, poisoned):
    """Kills: a gradient of the wrong product or shape."""
    leaves = leaves_of(70, 48, 300, dtype)
    true = output_and_gradients(relu2_mlp_reference, [p.detach().double().requires_grad_() for p in leaves])
    torchs, ours = (output_and_gradients(function, leaves) for function in (relu2_mlp_reference, fused_relu2_mlp))
    for mine, its, exactly in zip(ours, torchs, true, strict=True):
        assert mine.dtype == dtype and mine.shape == exactly.shape
        assert (mine - exactly).norm() <= 2 * (its - exactly).norm()


def test_one_graph():
    """Kills: an operator that breaks the graph, a shape or dtype that its fake gets wrong."""
    leaves = leaves_of(20, 16, 40, torch.float16)

    def doubled(x, *parameters):
        return 2 * fused_relu2_mlp(2 * x, *parameters)

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, eager in zip(*(output_and_gradients(f, leaves) for f in (compiled, doubled)), strict=True):
        assert torch.equal(ours, eager)
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), doubled(*leaves))
    x, fc_weight, fc_bias, proj_weight = (p.detach() for p in leaves)
    checks = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(relu2_up, (x[0], fc_weight, fc_bias), **checks)
    torch.library.opcheck(relu2_dpre, (x[0], proj_weight, x.new_ones(20, 40)), **checks)
