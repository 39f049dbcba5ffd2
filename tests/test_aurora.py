"""The optimizer against an independent float64 loop, and against itself on 1, 2 and 4 processes."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import aurora
from aurora import Aurora, balanced_polar, contra, polar, spectral_norm, update_weight_floor

SQUARE, TALL, WIDE = (24, 24), (48, 16), (16, 40)
exact_polar = functools.partial(polar, dtype=torch.float64)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The rule of result #17, written again from its description: one matrix, float64, nothing shared with aurora.py.

def newton_schulz_64(G):
    X = G / (sum(x * x for x in G.flatten().tolist()) ** 0.5 + 1e-7)
    for _ in range(12):
        X = 2 * X - 1.5 * (X @ X.T @ X) + 0.5 * (X @ X.T @ X @ X.T @ X)
    return X


def aurora_64(G):
    m, n = G.shape
    if m == n:
        return newton_schulz_64(G)
    if m < n:
        return aurora_64(G.T).T
    D = torch.tensor([1 / max(row.norm().item(), 1e-7) for row in G], dtype=torch.float64)
    U = newton_schulz_64(torch.diag(D) @ G)
    for i in range(m):
        D[i] *= (n / m / max((U[i] @ U[i]).item(), 1e-14)) ** 0.5
    return newton_schulz_64(torch.diag(D) @ G)


def step_64(W, G, M, lr, decay):
    m, n = G.shape
    M = 0.95 * M + 0.05 * G
    N = 0.05 * G + 0.95 * M
    v = torch.ones(n, dtype=torch.float64) / n**0.5
    for _ in range(5):
        u = N @ v
        u = u / max(u.norm().item(), 1e-10)
        v = N.T @ u
        v = v / max(v.norm().item(), 1e-10)
    sigma = (N @ v).norm().item()
    P = aurora_64(N)
    U = P - 0.2 * N / max(sigma, 1e-10)
    U = U * P.norm() / max(U.norm().item(), 1e-10) * max(1, m / n) ** 0.5
    floor = 0.35 * max(W.norm().item(), 1e-8) / max(U.norm().item(), 1e-8)
    return W - lr * decay * W - lr * max(1, floor) * U, M


def test_twenty_steps_follow_the_independent_loop():
    """Kills: momentum read before it is updated, Nesterov left out, beta .25 for .5, contra or aspect or floor
    dropped or in another order, decay after the update, a zero gradient (step 0) that gives NaN.

    Everything in float64, so that nothing but a different rule can differ; 20 steps amplify 1e-16 to below 1e-9.
    """
    shapes = [SQUARE, TALL, SQUARE, WIDE, TALL]
    # small and large weights: for the large ones the floor binds
    weights = [(3.0 if i % 2 else 100.0) * draw(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    optimizer = Aurora(params, lr=0.02, weight_decay=0.1, polar=exact_polar)
    for step in range(20):
        for i, p in enumerate(params):
            p.grad = draw(*p.shape, seed=100 * step + i, dtype=torch.float64) * (step > 0)
            weights[i], momenta[i] = step_64(weights[i], p.grad, momenta[i], 0.02, 0.1)
        optimizer.step()
    for p, w in zip(params, weights):
        assert p.isfinite().all()
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gradient", [1e-6, 1e-8, 1e-10, 1e-12, 1e-20, 1e-23])
@pytest.mark.parametrize("weight", [0, 1e-9, 1])
def test_epsilons(gradient, weight):
    """Kills: any epsilon of the record (1e-7, 1e-7, 1e-14, 1e-10, 1e-8, 1e-8) left out or of another size.

    Gradients and weights so small that each of them decides, and rows of very different length for D's and the rows'.
    """
    for shape in (SQUARE, TALL, WIDE):
        p = torch.nn.Parameter(weight * draw(*shape, dtype=torch.float64))
        spread = torch.logspace(0, -17, shape[0], dtype=torch.float64)[:, None]
        for rows in (1, spread):
            start = p.detach().clone()
            p.grad = gradient * rows * draw(*shape, seed=1, dtype=torch.float64)
            Aurora([p], lr=1.0, polar=exact_polar).step()
            expected, _ = step_64(start, p.grad, torch.zeros_like(start), 1.0, 0.0)
            assert (p - expected).norm() <= 1e-9 * (expected - start).norm()
            p.data.copy_(start)


def test_muon_is_the_polar_factor_of_the_momentum():
    """Kills: balancing under direction="muon", contra or the floor left on at 0, the aspect factor of a wide matrix."""
    for shape, aspect in ((SQUARE, 1), (TALL, 3**0.5), (WIDE, 1)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = draw(*shape)
        Aurora([p], lr=1.0, direction="muon", contra=0.0, uw_floor=0.0).step()
        expected = -aspect * polar(p.grad * (0.05 + 0.95 * 0.05))  # scale matters not, its rounding does
        torch.testing.assert_close(p.detach(), expected.float(), rtol=0, atol=2**-7)


def test_balanced_polar_is_even_and_orthogonal():
    """Kills: one polar factor instead of two, rows evened after the last one (which costs orthogonality).

    Bounds from research on 512x128: row-norm CV .0070 after two, .0268 after one, whatever the spread of the rows.
    """
    G = draw(512, 128) * (1 + 3 * draw(512, 1, seed=1)).abs()
    U = balanced_polar(G, polar=exact_polar)
    rows = U.norm(dim=1)
    assert (U.T @ U - torch.eye(128)).abs().max() < 1e-10
    assert rows.std() / rows.mean() < 0.009
    assert rows.mean().item() == pytest.approx((128 / 512) ** 0.5, rel=0.01)


def test_wide_is_the_transpose_of_tall_and_square_is_polar():
    """Kills: rows of a wide matrix evened (they are even already), its iterations or beta lost on the way, a square
    matrix scaled before its polar factor."""
    G = draw(*TALL)
    assert torch.equal(balanced_polar(G.mT, 3, 0.25), balanced_polar(G, 3, 0.25).mT)
    assert not torch.equal(balanced_polar(G, 3, 0.25), balanced_polar(G))
    assert torch.equal(balanced_polar(draw(*SQUARE)), polar(draw(*SQUARE)))


def test_row_scaling_and_rotation():
    """Kills: a D that depends on the rows' lengths, a wrong side. R(D G) = R(G) and R(G Q) = R(G) Q hold exactly."""
    G = draw(*TALL, dtype=torch.float64)
    Q = torch.linalg.qr(draw(16, 16, seed=1, dtype=torch.float64)).Q
    U = balanced_polar(G, polar=exact_polar)
    scaled = balanced_polar(torch.logspace(-3, 3, 48, dtype=torch.float64)[:, None] * G, polar=exact_polar)
    torch.testing.assert_close(scaled, U, rtol=0, atol=1e-10)
    torch.testing.assert_close(balanced_polar(G @ Q, polar=exact_polar), U @ Q, rtol=0, atol=1e-10)


def test_zero_row_stays_zero_and_harms_no_other():
    """Kills: an epsilon left out of a row norm. Twelve steps of the others stay orthogonal."""
    G = draw(*TALL, dtype=torch.float64)
    G[5] = 0
    U = balanced_polar(G, polar=exact_polar)
    assert U[5].abs().max() == 0
    assert (U.T @ U - torch.eye(16)).abs().max() < 1e-9


def test_spectral_norm_comes_from_below():
    """Kills: a norm of the wrong side, fewer iterations. Five from the ones vector reach .9 of it on Gaussians."""
    for shape in (SQUARE, TALL, WIDE):
        G = draw(3, *shape, dtype=torch.float64)
        ratio = spectral_norm(G).flatten() / torch.linalg.matrix_norm(G, 2)
        assert (0.85 < ratio).all() and (ratio <= 1 + 1e-12).all()


def test_contra_keeps_the_length_and_damps_the_largest_direction():
    """Kills: a sign, a strength not halved. With U the polar factor, the value of sigma_i becomes ~ 1 - .2 s_i/s_1."""
    s = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)
    Q = torch.linalg.qr(draw(4, 4, dtype=torch.float64)).Q
    G = torch.diag(s) @ Q  # u_1 is a unit vector that ones has a part of: the power iteration finds s_1
    Z = contra(Q, G, 0.4)
    sigma = spectral_norm(G, 5).item()
    expected = 1 - 0.2 * s / sigma
    assert Z.norm().item() == pytest.approx(2.0)
    torch.testing.assert_close((Z @ Q.T).diagonal(), expected * 2 / expected.norm(), rtol=1e-12, atol=0)


def test_floor_lifts_short_updates_and_leaves_long_ones():
    """Kills: a ceiling for a floor, a ratio upside down, an epsilon of another size."""
    U, W = draw(2, *TALL), draw(2, *TALL, seed=1) * torch.tensor([0.1, 100.0])[:, None, None]
    lifted = update_weight_floor(U, W, 0.35)
    assert torch.equal(lifted[0], U[0])
    torch.testing.assert_close(lifted[1], U[1] * 0.35 * W[1].norm() / U[1].norm())
    tiny = 1e-9 * U[0] / U[0].norm()
    lifted = update_weight_floor(tiny, 0 * W[0], 3.0)  # both lengths count as 1e-8
    torch.testing.assert_close(lifted, 3 * tiny, rtol=1e-5, atol=0)


def test_gradients_and_inputs_are_left_as_they_were():
    """Kills: grad.lerp_, an in-place scaling of the caller's tensors (upstream overwrites p.grad)."""
    p = torch.nn.Parameter(draw(*TALL))
    p.grad = draw(*TALL, seed=1)
    before = p.grad.clone()
    Aurora([p], weight_decay=0.1).step()
    assert torch.equal(p.grad, before)
    U, W = draw(*TALL, seed=2), draw(*TALL, seed=3)
    copies = U.clone(), W.clone()
    contra(balanced_polar(U), U), update_weight_floor(U, W), contra(U, W)
    assert torch.equal(U, copies[0]) and torch.equal(W, copies[1])


def test_refusals_and_parameters_without_gradient():
    """Kills: a vector or a convolution that is silently flattened, an unknown direction, a frozen matrix that moves."""
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\)"):
        Aurora([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="direction='sgd'"):
        Aurora([torch.nn.Parameter(torch.ones(3, 3))], direction="sgd")
    frozen = torch.nn.Parameter(torch.ones(4, 4))
    Aurora([frozen]).step()
    assert torch.equal(frozen.detach(), torch.ones(4, 4))


def train_from_equal_gradients() -> list[torch.Tensor]:
    shapes = [SQUARE] * 5 + [TALL] * 3 + [WIDE]
    params = [torch.nn.Parameter(draw(*s, seed=i)) for i, s in enumerate(shapes)]
    optimizer = Aurora([dict(params=params[:6]), dict(params=params[6:], lr=0.01)])
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = draw(*p.shape, seed=1000 * step + i)
        optimizer.step()
    owned = sum(bool(optimizer.state[p]) for p in params)
    return [p.detach() for p in params] + [torch.tensor(owned)]


def one_of_several(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(train_from_equal_gradients(), f"{folder}/{rank}.pt")
    dist.barrier()  # a process that is gone while another still talks to it aborts that one
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_size_gives_the_same_bits(world, tmp_path):
    """Kills: a rank that misses or doubles a matrix, a batched product whose rounding depends on the stack's size,
    momentum kept by ranks that do not own it.

    5, 3 and 1 matrices of a shape: with 4 ranks some own two, some one, some none.
    """
    *alone, _ = train_from_equal_gradients()
    mp.spawn(one_of_several, (world, str(tmp_path)), nprocs=world)
    owned = 0
    for rank in range(world):
        *weights, count = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, weights, strict=True))
        owned += count
    assert owned == len(alone)


def test_stack_of_equal_shapes_is_updated_in_one_call(monkeypatch):
    """Kills: a loop over matrices where a batched call was promised: 3 shapes are 3 calls."""
    calls = []
    monkeypatch.setattr(aurora, "contra", lambda U, G, s: calls.append(U.shape) or contra(U, G, s))
    params = [torch.nn.Parameter(draw(*s)) for s in [SQUARE, TALL] * 4 + [WIDE]]
    for p in params:
        p.grad = draw(*p.shape, seed=1)
    Aurora(params).step()
    assert sorted(calls) == [(1, *WIDE), (4, *SQUARE), (4, *TALL)]
