"""Newton-Schulz against a scalar polynomial on known singular values, and the polar factor against the SVD."""

import torch

from aurora import polar
from kernels.newton_schulz import newton_schulz

RECORD = [(2.0, -1.5, 0.5)] * 12


def orthogonal(rows: int, columns: int, generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


def with_singular_values(s: torch.Tensor, m: int, n: int, generator) -> tuple[torch.Tensor, ...]:
    U, V = orthogonal(m, len(s), generator), orthogonal(n, len(s), generator)
    return U * s @ V.T, U, V


def scalar_map(s: torch.Tensor) -> torch.Tensor:
    s = s / s.norm()
    for a, b, c in RECORD:
        s = a * s + b * s**3 + c * s**5
    return s


def test_each_singular_value_moves_as_the_scalar_polynomial_says():
    """Kills: a coefficient off by 0.001, 11 or 13 steps, a wrong transposition, a Frobenius norm left out.

    fp32 with singular values over 3.5 decades: right code is within 4e-6 of the exact answer, b = -1.499 is off by
    2.7e-4 and a missing step by more; 2e-5 stands between.
    """
    generator = torch.Generator().manual_seed(0)
    s = torch.logspace(0, -3.5, 48, dtype=torch.float64)
    for m, n in ((48, 96), (96, 48), (48, 48)):
        G, U, V = with_singular_values(s, m, n, generator)
        exact = U * scalar_map(s) @ V.T
        ours = polar(G.float(), dtype=torch.float32).double()
        assert (ours - exact).abs().max() < 2e-5


def test_polar_factor_of_a_well_conditioned_matrix_is_that_of_the_svd():
    """Kills: convergence to another orthogonal matrix, to another sign, or to a multiple. float64 reaches 1e-12."""
    generator = torch.Generator().manual_seed(1)
    G, U, V = with_singular_values(torch.linspace(0.2, 3, 40, dtype=torch.float64), 40, 100, generator)
    assert (polar(G, dtype=torch.float64) - U @ V.T).abs().max() < 1e-12


def test_bf16_rounds_at_three_points_only():
    """Kills: an epilogue rounded apart from its product, accumulation in bf16.

    The exact step in float64, rounded after each product. fp32 sums may fall on the other side of a tie: 1%.
    """
    X = torch.randn(3, 64, 192, generator=torch.Generator().manual_seed(2)).bfloat16() / 16
    A = (X.double() @ X.double().mT).bfloat16().double()
    B = (-1.5 * A + 0.5 * A @ A).bfloat16().double()
    exact = (2 * X.double() + B @ X.double()).bfloat16()
    assert (newton_schulz(X, RECORD[:1]) == exact).double().mean() > 0.99


def test_a_stack_is_its_matrices_one_by_one():
    """Kills: a batch stride or a norm that mixes matrices of a stack."""
    G = torch.randn(5, 40, 24, generator=torch.Generator().manual_seed(3))
    G[2] *= 1e3
    assert torch.equal(polar(G), torch.stack([polar(g) for g in G]))


def test_zero_stays_zero():
    """Kills: a division without its epsilon; at step 0 every matrix of the model has a zero gradient."""
    assert torch.equal(polar(torch.zeros(2, 8, 24)), torch.zeros(2, 8, 24, dtype=torch.bfloat16))
