"""The matrix step of result #46, as one line of stages, against a loop over single matrices in float64 NumPy."""

import numpy as np
import pytest
import torch

import aurora
from aurora import Rule, brake, cautious_decay, hyperball, next_bases, pin, row_floor, schatten4

TEXT = ("nesterov(ramp(0.85, 0.95, 0, 6)) | soap(0.9) | schatten4_polar | aspect | brake(0.5) | row_floor(0.3825) | "
        "step | pin | cautious_decay(0.5)")
STEPS, LR = 10, 0.05
SHAPES = [(6, 4), (4, 6), (5, 5)]


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def schatten4_of(X) -> float:
    return (np.linalg.svd(X, compute_uv=False) ** 4).sum() ** 0.25


def newton_schulz(X):
    """Twelve steps of 2 x - 1.5 x^3 + .5 x^5 on the singular values."""
    u, s, vt = np.linalg.svd(X, full_matrices=False)
    s = s / max(schatten4_of(X), 1e-7)
    for _ in range(12):
        s = 2 * s - 1.5 * s**3 + 0.5 * s**5
    return u * s @ vt


def covariance(size: int, seed: int) -> torch.Tensor:
    """What a run has after some steps: of full rank, so that rounding does not choose the bases."""
    A = draw(size, 2 * size, seed=seed)
    return A @ A.mT / size


def refreshed(L, R, Q, P, v, G):
    L, R = 0.9 * L + 0.1 * G @ G.T, 0.9 * R + 0.1 * G.T @ G
    rows, columns = (np.argsort(-np.diag(B.T @ C @ B), kind="stable") for B, C in ((Q, L), (P, R)))
    Q, P = (np.linalg.qr((C @ B)[:, order])[0] for B, C, order in ((Q, L, rows), (P, R, columns)))
    return L, R, Q, P, v[rows][:, columns]


def twin(W, gradients, mistake=None):
    """Result #46's step, one matrix, in the order of its program; or with one mistake."""
    m, n = W.shape
    M, v, L, R = np.zeros((m, n)), np.zeros((m, n)), covariance(m, 1).numpy(), covariance(n, 2).numpy()
    Q, P = np.linalg.qr(L)[0], np.linalg.qr(R)[0]
    for t, G in enumerate(gradients):
        mu = 0.85 + 0.1 * min(t / 6, 1)
        M = mu * M + (1 - mu) * G
        N = mu * M + (1 - mu) * G
        if mistake == "statistics before use":
            L, R, Q, P, v = refreshed(L, R, Q, P, v, G)
        whose = G if mistake == "second moment of the gradient" else N
        v = 0.9 * v + 0.1 * (Q.T @ whose @ P) ** 2
        X = Q @ (Q.T @ N @ P / np.sqrt(np.maximum(v, 1e-16))) @ P.T
        X = X * max(schatten4_of(N), 1e-8) / max(schatten4_of(X), 1e-8)
        U = newton_schulz(X) * max(1, m / n) ** 0.5

        def braked(U):
            along = (U * W).sum() / max((W * W).sum(), 1e-12)
            outward = along > 0 if mistake == "brake on the inward side" else along < 0
            return U - 0.5 * along * W if outward else U

        def floored(U):
            rows, least = (np.linalg.norm(x, axis=1, keepdims=True) for x in (U, W))
            return U * np.maximum(1, 0.3825 * np.maximum(least, 1e-8) / np.maximum(rows, 1e-8))
        U = braked(floored(U)) if mistake == "floor before brake" else floored(braked(U))
        r = max(np.linalg.norm(W), 1e-8)
        radius = max(r - LR * (U * W).sum() / r, 1e-8)
        mask = U * W > 0
        moved = W - LR * U
        if mistake == "pin after decay":
            moved = moved * (1 - LR * 0.5 * mask)
        moved = moved * radius / max(np.linalg.norm(moved), 1e-8)
        if mistake != "pin after decay":
            moved = moved * (1 - LR * 0.5 * mask)
        W = moved
        if mistake != "statistics before use":
            L, R, Q, P, new = refreshed(L, R, Q, P, v, G)
            v = v if mistake == "second moment not reordered" else new
    return W


@pytest.fixture
def in_float64(monkeypatch):
    """The stage's polar factor computes in bf16; here in float64, so that the whole step can be held to 1e-9."""
    exact = aurora.polar
    monkeypatch.setattr(aurora, "schatten4_polar",
                        lambda G: exact(G, dtype=torch.float64, norm=lambda X: schatten4(X).clamp(min=1e-7) - 1e-7))


def run(shape, seed=0) -> tuple[np.ndarray, list]:
    """The stages' weight after some steps, and the gradients: of unlike scale along rows and columns, the first zero.
    """
    scale = torch.logspace(0, -1, shape[0], dtype=torch.float64)[:, None] * torch.logspace(0, 1, shape[1])
    gradients = [draw(*shape, seed=100 + i) * scale * (i > 0) for i in range(STEPS)]
    rule, W = Rule.of(TEXT), draw(*shape, seed=seed)[None]
    state = rule.state(W)
    for name, size, seed in (("row", shape[0], 1), ("column", shape[1], 2)):
        state[f"soap.{name}_covariance"].copy_(covariance(size, seed))
        state[f"soap.{name}_basis"].copy_(torch.linalg.qr(covariance(size, seed)).Q)
    for step, G in enumerate(gradients):
        rule.advance_(W, G[None], state, dict(lr=LR, t=step + 1) | rule.at(step))
        rule.after_(state, step + 1)
    return W[0].numpy(), [G.numpy() for G in gradients]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_of_result_46(shape, in_float64):
    """Kills: an exchange of two stages, a second moment that is not reordered with its bases, statistics that see this
    step's gradient before they are used, a gate or a floor at the wrong end. Ten steps, exact to 1e-8: the bases' signs
    are free, and QR rounds."""
    ours, gradients = run(shape)
    np.testing.assert_allclose(ours, twin(draw(*shape).numpy(), gradients), rtol=0, atol=1e-8)


@pytest.mark.parametrize("mistake", [
    "second moment of the gradient", "statistics before use", "second moment not reordered",
    "brake on the inward side", "floor before brake", "pin after decay"])
def test_a_mistake_is_seen(mistake, in_float64):
    """Kills: a comparison that cannot fail. Every mistake moves the weight of some shape by more than a thousandth."""
    def distance(shape):
        ours, gradients = run(shape)
        return np.abs(ours - twin(draw(*shape).numpy(), gradients, mistake)).max()
    assert max(map(distance, SHAPES)) > 1e-3


def test_bases_find_the_eigenvectors():
    """Kills: bases that stand still (the QR of Q C or a polar factor in place of QR), order by rising variance."""
    A = draw(5, 5, seed=1)
    C = A @ torch.diag(torch.tensor([16.0, 8, 4, 2, 1]).double()) @ A.inverse()
    C = C @ C.mT
    state = dict(row_covariance=C, row_basis=torch.zeros(5, 5).double(), column_covariance=C[:4, :4] * 0,
                 column_basis=torch.zeros(4, 4).double(), second_moment=torch.zeros(5, 4).double())
    for _ in range(200):
        state |= next_bases(**state)
    values, vectors = torch.linalg.eigh(C)
    found = (state["row_basis"].mT @ vectors.flip(-1)).abs()
    torch.testing.assert_close(found, torch.eye(5).double(), rtol=0, atol=1e-6)
    assert torch.equal(state["column_basis"], torch.eye(4).double())  # of covariance zero: no direction is better


def test_bases_stand_still_between():
    """Kills: a QR at every step where every third was asked for, or none; covariances that miss the steps between."""
    rule, W = Rule.of("soap(0.9, 0.9, every=3) | step"), draw(1, 5, 3)
    state, seen = rule.state(W), []
    for step in range(7):
        rule.advance_(W, draw(1, 5, 3, seed=step), state, dict(lr=LR, t=step + 1))
        before = state["soap.row_covariance"].clone()
        rule.after_(state, step + 1)
        seen.append(state["soap.row_basis"].clone())
        assert before.any() and torch.equal(before, state["soap.row_covariance"])
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [True, False, True, True, False, True]
    assert not seen[1].any() and seen[2].any()


def test_zero_gradients_do_no_harm():
    """Kills: 0 / 0 in a basis, a second moment or a length where all gradients are zero, as at step 0."""
    rule, W = Rule.of(TEXT), draw(2, 5, 3)
    start, state = W.clone(), rule.state(W)
    for step in range(3):
        rule.advance_(W, torch.zeros_like(W), state, dict(lr=LR, t=step + 1) | rule.at(step))
        rule.after_(state, step + 1)
    torch.testing.assert_close(W, start, rtol=1e-12, atol=0)
    assert all(x.isfinite().all() for x in state.values())


@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 7)])
def test_what_keeps_a_length(shape):
    """Kills: a pin or a sphere of another radius, a norm over a whole stack, a brake or a decay in the wrong places."""
    W, U = draw(*shape), draw(*shape, seed=1)
    across = U - (U * W).sum((-2, -1), keepdim=True) / (W * W).sum((-2, -1), keepdim=True) * W

    def length(X):
        return X.square().sum((-2, -1)).sqrt()
    torch.testing.assert_close(length(hyperball(W, U, 0.1)), length(W))
    torch.testing.assert_close(length(pin(W - 0.1 * across, W, across, 0.1)), length(W))
    torch.testing.assert_close(length(pin(W - 0.1 * W, W, W, 0.1)), 0.9 * length(W))
    torch.testing.assert_close(brake(across - 2 * W, W, 0.25), across - 0.5 * W)
    torch.testing.assert_close(brake(across + 2 * W, W, 0.25), across + 2 * W)
    decayed = cautious_decay(W, W, U, 0.1, 0.5)
    torch.testing.assert_close(decayed, torch.where(U * W > 0, 0.95 * W, W), rtol=1e-15, atol=0)
    rows = row_floor(1e-3 * U, W, 0.5).norm(dim=-1)
    torch.testing.assert_close(rows, 0.5 * W.norm(dim=-1))
    assert torch.equal(row_floor(100 * U, W, 0.5), 100 * U)
