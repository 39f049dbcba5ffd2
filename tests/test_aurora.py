"""The update rules against independent float64 loops, and the algebra that each of them has to keep."""

import functools

import pytest
import torch
from conftest import UPDATES

import aurora
from aurora import (
    CANS_12, POLAR_EXPRESS_8, QUINTIC_5, Aurora, alignment, balanced_polar, balanced_tangent, cans_polar,
    clamped_schatten4, contra, leverage_scores, normuon, normuon_lite, orthogonality_defect, paper_balanced_polar,
    polar, riemannian_balanced_polar, row_norm_cv, schatten4_polar, spectral_norm, tall_balanced_polar, u_normuon,
    update_weight_floor, wide_balanced_polar,
)
from rules import STAGES, Rule

SQUARE, TALL, WIDE = (24, 24), (48, 16), (16, 40)
exact_polar = functools.partial(polar, dtype=torch.float64)


@pytest.fixture
def exact(monkeypatch):
    """Has every stage take its polar factors in float64, by the record's table."""
    for name in ("polar", "jordan_polar"):
        monkeypatch.setattr(aurora, name, exact_polar)
    for function in (balanced_polar, tall_balanced_polar, paper_balanced_polar, wide_balanced_polar,
                     riemannian_balanced_polar):
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], exact_polar))


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The rules, written again from their descriptions: one matrix, float64, nothing shared with aurora.py.

def newton_schulz_64(G):
    X = G / (sum(x * x for x in G.flatten().tolist()) ** 0.5 + 1e-7)
    for _ in range(12):
        X = 2 * X - 1.5 * (X @ X.T @ X) + 0.5 * (X @ X.T @ X @ X.T @ X)
    return X


def aurora_64(G, rounds=2, beta=0.5):
    m, n = G.shape
    if m == n:
        return newton_schulz_64(G)
    if m < n:
        return aurora_64(G.T, rounds, beta).T
    D = torch.tensor([1 / max(row.norm().item(), 1e-7) for row in G], dtype=torch.float64)
    for _ in range(rounds):
        U = newton_schulz_64(torch.diag(D) @ G)
        for i in range(m):
            D[i] *= (n / m / max((U[i] @ U[i]).item(), 1e-14)) ** beta
    return U


def paper_64(G):
    m, n = G.shape
    if m <= n:
        return newton_schulz_64(G)
    X, D = G / max(G.norm().item(), 1e-7), [1.0] * m
    for _ in range(2):
        D = [d**0.5 * max(row.norm().item(), 1e-7) ** 0.5 for d, row in zip(D, X)]
        X = newton_schulz_64(torch.stack([(n / m) ** 0.5 * row / d for d, row in zip(D, X)]))
    return X


def riemannian_64(G):
    m, n = G.shape
    if m == n:
        return newton_schulz_64(G)
    if m < n:
        return riemannian_64(G.T).T
    sigma = (G * newton_schulz_64(G)).sum().item() / n
    if sigma == 0:
        return 0 * G
    G, U = G / sigma, aurora_64(G)
    for _ in range(3):
        U = U + 0.1 * tangent_64(U, G)
        for _ in range(2):
            U = newton_schulz_64(torch.stack([(n / m) ** 0.5 * row / max(row.norm().item(), 1e-7) for row in U]))
    return U


def tangent_64(U, G):
    """The multipliers from a dense least-squares solution, not from conjugate gradients."""
    m, n = U.shape
    B = (U.T @ G + G.T @ U) / 2
    q = torch.stack([G[i] @ U[i] - U[i] @ B @ U[i] for i in range(m)])
    q = q - q.mean()
    diagonal = max(n / m, max((row @ row).item() for row in U))
    mean_free = torch.eye(m, dtype=torch.float64) - 1 / m
    operator = mean_free @ (diagonal * torch.eye(m, dtype=torch.float64) - (U @ U.T) ** 2) @ mean_free
    multiplier = torch.linalg.pinv(operator, hermitian=True) @ q
    L = torch.diag(multiplier)
    return G - U @ (B - U.T @ L @ U) - L @ U


def scaled_64(U, v, root):
    """NorMuon on a matrix whose v lists one number a row."""
    v = torch.stack([0.95 * old + 0.05 * (row @ row) / len(row) for old, row in zip(v, U)])
    Z = torch.stack([row / root(x.item()) for x, row in zip(v, U)])
    return Z * (U.norm() / max(Z.norm().item(), 1e-10)), v


def normuon_64(U, v):
    return scaled_64(U, v, lambda x: x**0.5 + 1e-10)


def lite_64(U, v):
    if len(U) >= U.size(1):
        return scaled_64(U, v, lambda x: max(x, 1e-10) ** 0.5)
    Z, v = scaled_64(U.T, v, lambda x: max(x, 1e-10) ** 0.5)
    return Z.T, v


def u_normuon_64(U, v):
    m, n = U.shape
    length = (n / m) ** 0.5 if m > n else 1
    return torch.stack([length * row / max(row.norm().item(), 1e-10) for row in U]), v


def same(U, v):
    return U, v


# name of the update: the factor, and what follows contra
LOOPS = {
    "aurora": (aurora_64, same),
    "aurora_july": (lambda G: aurora_64(G) if len(G) > G.size(1) else newton_schulz_64(G), same),
    "aurora_paper": (paper_64, same),
    "aurora_wide": (lambda G: aurora_64(G, 3, 0.25) if len(G) < G.size(1) else newton_schulz_64(G), same),
    "riemannian_aurora": (riemannian_64, same),
    "muon": (newton_schulz_64, same),
    "normuon": (newton_schulz_64, normuon_64),
    "normuon_lite": (newton_schulz_64, lite_64),
    "u_normuon": (newton_schulz_64, u_normuon_64),
}


def step_64(W, G, M, v, lr, decay, update="aurora", strength=0.4):
    m, n = G.shape
    factor, normalise = LOOPS[update]
    M = 0.95 * M + 0.05 * G
    N = 0.05 * G + 0.95 * M
    x = torch.ones(n, dtype=torch.float64) / n**0.5
    for _ in range(5):
        u = N @ x
        u = u / max(u.norm().item(), 1e-10)
        x = N.T @ u
        x = x / max(x.norm().item(), 1e-10)
    sigma = (N @ x).norm().item()
    P = factor(N)
    U = P - strength / 2 * N / max(sigma, 1e-10)
    U, v = normalise(U * P.norm() / max(U.norm().item(), 1e-10), v)
    U = U * max(1, m / n) ** 0.5
    floor = 0.35 * max(W.norm().item(), 1e-8) / max(U.norm().item(), 1e-8)
    return W - lr * decay * W - lr * max(1, floor) * U, M, v


@pytest.mark.parametrize("update", LOOPS)
@pytest.mark.parametrize("strength", [0.4, 0.0])
def test_twenty_steps_follow_the_independent_loop(update, strength, exact):
    """Kills: momentum read before it is updated, Nesterov left out, beta .25 for .5, contra or aspect or floor
    dropped or in another order, decay after the update, a zero gradient (step 0) that gives NaN; a stage under
    another's name, NorMuon before contra, its mean over columns for rows, its state lost between steps.

    Everything in float64, so that nothing but a different rule can differ; 20 steps amplify 1e-16 to below 1e-9,
    the ten conjugate gradients of the Riemannian form leave 1e-6 of a step, on weights of 3 to 100.
    """
    assert {*LOOPS, "adamw"} == set(UPDATES)
    shapes = [SQUARE, TALL, SQUARE, WIDE, TALL]
    # small and large weights: for the large ones the floor binds
    weights = [(3.0 if i % 2 else 100.0) * draw(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    moments = [torch.zeros(max(s) if update == "normuon_lite" else s[0], dtype=torch.float64) for s in shapes]
    text = UPDATES[update].replace("| step", "| decay(0.1) | step")
    optimizer = Aurora(params, lr=0.02, update=text if strength else text.replace("| contra(0.4) ", ""))
    for step in range(20):
        for i, p in enumerate(params):
            p.grad = draw(*p.shape, seed=100 * step + i, dtype=torch.float64) * (step > 0)
            weights[i], momenta[i], moments[i] = step_64(weights[i], p.grad, momenta[i], moments[i], 0.02, 0.1,
                                                         update, strength)
        optimizer.step()
    tolerance = 1e-4 if update == "riemannian_aurora" else 1e-9
    for p, w in zip(params, weights):
        assert p.isfinite().all()
        torch.testing.assert_close(p.detach(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", [1e-6, 1e-8, 1e-10, 1e-12, 1e-20, 1e-23])
@pytest.mark.parametrize("weight", [0, 1e-9, 1])
def test_epsilons(gradient, weight, exact):
    """Kills: any epsilon of the record (1e-7, 1e-7, 1e-14, 1e-10, 1e-8, 1e-8) left out or of another size.

    Gradients and weights so small that each of them decides, and rows of very different length for D's and the rows'.
    """
    for shape in (SQUARE, TALL, WIDE):
        p = torch.nn.Parameter(weight * draw(*shape, dtype=torch.float64))
        spread = torch.logspace(0, -17, shape[0], dtype=torch.float64)[:, None]
        for rows in (1, spread):
            start = p.detach().clone()
            p.grad = gradient * rows * draw(*shape, seed=1, dtype=torch.float64)
            Aurora([p], lr=1.0).step()
            expected, *_ = step_64(start, p.grad, torch.zeros_like(start), None, 1.0, 0.0)
            assert (p - expected).norm() <= 1e-9 * (expected - start).norm()
            p.data.copy_(start)


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


# stages that give a polar factor, evened or not: all that stand second in a rule of the family
FACTORS = sorted({Rule.of(text).parts[1].stage.name for name, text in UPDATES.items() if name != "adamw"})


def test_each_name_has_its_publications_routine():
    """Kills: a table or a precision of another publication under a stage's name.

    Compared bit for bit with the routine that each publication states, on all three shapes.
    """
    cans = functools.partial(polar, coefficients=CANS_12, dtype=torch.float32)
    quintic = functools.partial(polar, coefficients=QUINTIC_5)
    express = functools.partial(polar, coefficients=POLAR_EXPRESS_8, dtype=torch.float32)
    schatten = functools.partial(polar, norm=clamped_schatten4)
    own = {"aurora": (balanced_polar, polar), "aurora_july": (tall_balanced_polar, cans),
           "aurora_paper": (paper_balanced_polar, cans), "aurora_wide": (wide_balanced_polar, schatten),
           "riemannian_aurora": (riemannian_balanced_polar, express)}
    routines = {name: functools.partial(factor, polar=routine) for name, (factor, routine) in own.items()}
    routines |= {"polar": polar, "jordan_polar": quintic, "cans_polar": cans}
    assert sorted(routines.keys() - {"cans_polar"}) == FACTORS
    for name, routine in routines.items():
        for shape in (SQUARE, TALL, WIDE):
            G = draw(2, *shape)
            assert torch.equal(STAGES[name].function(G), routine(G).to(G.dtype)), (name, shape)
    others = {name: STAGES[name].function(draw(*SQUARE)) for name in own}
    assert not torch.equal(others["aurora"], others["aurora_july"])  # the routines do differ
    assert not torch.equal(others["aurora"], others["aurora_wide"])


def test_schatten_norm_decides_where_the_iteration_starts():
    """Kills: a Schatten-4 norm without its root, of the wrong Gram matrix, or not passed on; 1e-7 added to it where the
    published programs have it at least 1e-7. With known singular values the result is W diag(p(...p(s / ||s||_4))) V^T
    for p(x) = 2 x - 1.5 x^3 + .5 x^5. The second matrix is as the first gradients of q, k and v are, behind
    projections that are 1e-8 long."""
    W = torch.linalg.qr(draw(48, 16, dtype=torch.float64)).Q
    V = torch.linalg.qr(draw(16, 16, seed=1, dtype=torch.float64)).Q
    for s in (torch.logspace(0, -4, 16, dtype=torch.float64), torch.logspace(-8, -12, 16, dtype=torch.float64)):
        x = s / max((s**4).sum().item() ** 0.25, 1e-7)
        for _ in range(12):
            x = 2 * x - 1.5 * x**3 + 0.5 * x**5
        for G, expected in ((W * s @ V.T, W * x @ V.T), (V * s @ W.T, V * x @ W.T)):
            U = schatten4_polar(G, dtype=torch.float64)
            torch.testing.assert_close(U, expected, rtol=0, atol=1e-10)


def test_evenness_by_rounds_and_beta():
    """Kills: a beta of the other convention, a round more or fewer, D forgotten between rounds.

    Row-norm CV on 512x128 as computed for this project with exact polar factors (release at beta .5: .0268, .0070,
    .0019; at .25 and two rounds .0168; the paper's form on rows of spread 3: .345, .041, and worse, .174, with a
    third). Other draws of the matrix move the second digit.
    """
    G = draw(512, 128, dtype=torch.float64)
    spread = G * (1 + 3 * draw(512, 1, seed=1, dtype=torch.float64)).abs()
    for rounds, beta, cv in ((1, 0.5, 0.0268), (2, 0.5, 0.0070), (3, 0.5, 0.0019), (2, 0.25, 0.0168)):
        assert row_norm_cv(balanced_polar(spread, rounds, beta, exact_polar)).item() == pytest.approx(cv, rel=0.1)
    for rounds, cv in ((1, 0.345), (2, 0.041), (3, 0.174)):
        U = paper_balanced_polar(spread, rounds, 0.5, exact_polar)
        assert row_norm_cv(U).item() == pytest.approx(cv, rel=0.15)
    undamped = paper_balanced_polar(spread, 2, 0.0, exact_polar)
    release = balanced_polar(spread, 2, 0.5, exact_polar)
    torch.testing.assert_close(undamped.norm(dim=1), release.norm(dim=1))  # one column space, one set of row norms
    assert (undamped - release).norm() > 0.01
    tiny = paper_balanced_polar(1e-9 * spread, 2, 0.5, exact_polar)  # X begins at length 1
    torch.testing.assert_close(tiny, paper_balanced_polar(spread, 2, 0.5, exact_polar), rtol=0, atol=1e-3)


def test_scopes():
    """Kills: the July release or the paper evening a wide matrix's columns, result #30 evening a tall one's rows."""
    tall, wide = draw(*TALL), draw(*WIDE)
    for factor in (tall_balanced_polar, paper_balanced_polar):
        assert torch.equal(factor(wide, polar=cans_polar), cans_polar(wide))
        assert not torch.equal(factor(tall, polar=cans_polar), cans_polar(tall))
    assert torch.equal(wide_balanced_polar(tall, polar=cans_polar), cans_polar(tall))
    assert torch.equal(wide_balanced_polar(wide, polar=cans_polar), balanced_polar(wide, 3, 0.25, cans_polar))


def balanced_frame(m, n):
    """A U with U^T U = I and even rows, to rounding: the fixed point of the release's iteration."""
    return balanced_polar(draw(m, n, dtype=torch.float64), 100, 0.5, exact_polar)


def test_tangent_is_the_orthogonal_projection():
    """Kills: a sign or a factor in the multipliers, too few conjugate gradients, a constraint forgotten.

    The projection onto the null space of the constraints' own matrix, 16 x 4 entries, 16 + 10 constraints.
    """
    U, G = balanced_frame(16, 4), draw(16, 4, seed=1, dtype=torch.float64)
    constraints = [torch.zeros_like(U) for _ in range(16)]
    for i in range(16):
        constraints[i][i] = U[i]
    for i in range(4):
        for j in range(i + 1):
            C = torch.zeros_like(U)
            C[:, i] += U[:, j]
            C[:, j] += U[:, i]
            constraints.append(C)
    C = torch.stack([c.flatten() for c in constraints])
    expected = G.flatten() - torch.linalg.pinv(C) @ (C @ G.flatten())
    torch.testing.assert_close(balanced_tangent(U, G).flatten(), expected, rtol=0, atol=1e-6)


def test_riemannian_climbs_within_both_constraints():
    """Kills: a step downhill, a retraction that leaves a constraint, a result that depends on the gradient's scale.

    Rows of spread 3, and rank 8 with noise and uneven rows, as momentum often is: there the climb is worth most.
    """
    spread = draw(512, 128) * (1 + 3 * draw(512, 1, seed=1)).abs()
    low_rank = draw(512, 1, seed=3).exp() * (draw(512, 8) @ draw(8, 128, seed=1) + 0.1 * draw(512, 128, seed=2))
    for G, gain in ((spread, 0.003), (low_rank, 0.1)):
        U = riemannian_balanced_polar(G)
        assert orthogonality_defect(U) < 1e-6
        assert row_norm_cv(U) < 0.01
        assert alignment(U, G) > alignment(balanced_polar(G, 3, polar=cans_polar), G) + gain
        torch.testing.assert_close(riemannian_balanced_polar(1e4 * G), U, rtol=0, atol=1e-3)
        torch.testing.assert_close(riemannian_balanced_polar(G.mT).mT, U, rtol=0, atol=0)


def test_zero_and_tiny_rows():
    """Kills: an epsilon left out of a row norm; a zero row's D that overflows in later rounds and poisons all rows.

    In fp32 and bf16, 20 rounds. Rows scaled by 1e-6 and 1e6 count as others do; one of norm below 1e-7 lags: .897 of
    the even length after two rounds (method notes of this project).
    """
    G = draw(512, 128)
    G[5] = 0
    for rounds in (2, 20):
        U = balanced_polar(G, rounds).float()
        assert U[5].abs().max() == 0
        assert orthogonality_defect(U) < 1e-3  # bf16
    even = (128 / 512) ** 0.5
    G = draw(512, 128) * torch.cat([torch.tensor([1e-10, 1e-6, 1e6]), torch.ones(509)])[:, None]
    rows = balanced_polar(G, polar=cans_polar).norm(dim=1) / even
    assert rows[0].item() == pytest.approx(0.897, abs=0.005)
    assert (rows[1:] - 1).abs().max() < 0.04
    assert balanced_polar(1e-9 * draw(512, 128)).isfinite().all()
    assert row_norm_cv(balanced_polar(1e8 * draw(512, 128))) < 0.008


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_rank_deficient(rank):
    """Kills: an update along directions that the gradient does not have. In fp32 CANS-12 keeps the rank; bf16 does not
    (its rounding noise is amplified 4096 times, 118 directions for 8), which polar's docstring says."""
    G = draw(512, rank) @ draw(rank, 128, seed=1)
    assert balanced_polar(G, polar=cans_polar).square().sum().item() == pytest.approx(rank, rel=0.01)
    if rank == 8:
        assert (torch.linalg.svdvals(balanced_polar(G).float()) > 0.5).sum() > 100


def test_rows_that_cannot_be_even():
    """Kills: nothing by itself; it shows that 256 equal rows of 512, which no D evens (Tyler), still give U^T U = I."""
    G = draw(512, 128)
    G[:256] = G[0]
    U = balanced_polar(G, polar=cans_polar)
    assert orthogonality_defect(U) < 1e-6
    assert row_norm_cv(U) > 0.8


@pytest.mark.parametrize("name", FACTORS)
def test_zero_gradient_and_not_a_number(name):
    """Kills: a division by zero at step 0, where every gradient is zero; a NaN that is hidden and trained on."""
    for shape in (SQUARE, TALL, WIDE):
        factor = STAGES[name].function
        assert factor(torch.zeros(2, *shape)).abs().max() == 0
        broken = draw(2, *shape)
        broken[0, 3, 3] = torch.nan
        U = factor(broken)
        assert U[0].isnan().all()
        assert U[1].isfinite().all()


def test_normuon_keeps_length_and_evens_what_it_averages():
    """Kills: a mean over the wrong side, a length not kept, a second moment changed in place or not moved at all."""
    U = draw(3, *TALL)
    for scale in (normuon, normuon_lite):
        for shape, dim in (((3, 48, 1), -1), ((3, 1, 16), -2)):
            start = torch.zeros(shape)
            Z, moment = scale(U, start)
            assert torch.equal(start, torch.zeros(shape))
            torch.testing.assert_close(moment, 0.05 * U.square().mean(dim, keepdim=True))
            torch.testing.assert_close(Z.norm(dim=(1, 2)), U.norm(dim=(1, 2)))
            rows = Z.norm(dim=dim)
            torch.testing.assert_close(rows, rows.mean(dim=1, keepdim=True).expand_as(rows))
    dead = torch.cat([torch.full((1, 16), 1e-7), torch.ones(47, 16)])  # below lite's floor for a root, 1e-5
    ratio = [scale(dead, torch.zeros(48, 1))[0].norm(dim=1) for scale in (normuon, normuon_lite)]
    assert (ratio[0][0] / ratio[0][1]).item() == pytest.approx(1, rel=1e-2)  # 1e-10 against 2e-8
    assert (ratio[1][0] / ratio[1][1]).item() == pytest.approx(1e-7 * 0.05**0.5 / 1e-5, rel=1e-2)


def test_u_normuon_rows():
    """Kills: unit rows on tall matrices (they would be sqrt(m / n) too long), rows beyond 1 on wide ones."""
    for shape, length in ((TALL, 3**-0.5), (SQUARE, 1), (WIDE, 1)):
        rows = u_normuon(draw(2, *shape)).norm(dim=2)
        torch.testing.assert_close(rows, torch.full_like(rows, length))
    assert u_normuon(torch.zeros(TALL)).abs().max() == 0


def test_diagnostics():
    """Kills: leverage of the row space for the column space, a sample deviation, a defect of another normalisation,
    an alignment that is a cosine. Against the hat matrix, numpy's definition, and matrices of known answer."""
    X = draw(2, *TALL, dtype=torch.float64)
    hat = X @ torch.linalg.inv(X.mT @ X) @ X.mT
    torch.testing.assert_close(leverage_scores(X), hat.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(leverage_scores(X), exact_polar(X).square().sum(dim=2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leverage_scores(X.mT), torch.ones(2, 16, dtype=torch.float64))
    assert row_norm_cv(torch.diag(torch.tensor([1.0, 3.0]))).item() == pytest.approx(0.5)
    stretched = 1.1 * torch.linalg.qr(X).Q
    torch.testing.assert_close(orthogonality_defect(stretched), torch.full((2,), 0.21 * 16**0.5 / 16).double())
    torch.testing.assert_close(orthogonality_defect(stretched.mT), orthogonality_defect(stretched))
    U, s, V = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(alignment(U @ V, X), torch.ones(2, dtype=torch.float64))
    first = U[:, :, :1] @ V[:, :1]
    torch.testing.assert_close(alignment(first, X), s[:, 0] / s.sum(dim=1))


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


def structured_gradients(m, n):
    """Finite gradients of every kind that a layer can meet, and some that it should not."""
    random, a, b = draw(m, n), draw(m, 1, seed=1), draw(1, n, seed=2)
    half_zero, opposite, spiked, single = random.clone(), random.clone(), random.clone(), torch.zeros(m, n)
    half_zero[::2] = 0
    opposite[:, 1::2] = -opposite[:, : n // 2 * 2 : 2]
    spiked[0] *= 1e6
    single[m // 2, n // 2] = 1
    whole = torch.randint(-3, 4, (m, n), generator=torch.Generator().manual_seed(3)).float()
    whole[:, -1] -= whole.sum(1)
    signs = torch.cat([torch.ones(1, n // 2), -torch.ones(1, n - n // 2)], 1)
    return dict(random=random, half_zero=half_zero, opposite=opposite, spiked=spiked, spiked_column=spiked.flip(0) * b,
                single=single, whole=whole, ones=torch.ones(m, n), rank_1=a @ b, rank_1_signs=a @ signs,
                faint_signs=1e-8 * a @ signs, centred=random - random.mean(1, keepdim=True), zero=0 * random,
                tiny=1e-30 * random, tiny_rank_1=1e-30 * a @ b, large=1e20 * random, huge=1e30 * random,
                huge_rank_1=1e30 * a @ b, huge_signs=1e25 * a @ signs, wide_range=random * torch.logspace(-30, 30, n))


@pytest.mark.parametrize("name", sorted(UPDATES.keys() - {"adamw"}))
def test_every_direction_is_finite_and_downhill(name):
    """Kills: a direction that climbs, as Contra's did where rows sum to zero and power iteration found nothing; NaN
    from a norm that overflows, from zero rows or from one column. A first step, without the floor."""
    text = UPDATES[name].replace(" | floor(0.35)", "")
    for shape in (SQUARE, TALL, WIDE, (1, 8), (8, 1), (1, 1), (200, 2), (2, 200), (64, 1), (128, 64)):
        for kind, G in structured_gradients(*shape).items():
            p = torch.nn.Parameter(torch.zeros(shape))
            p.grad = G
            Aurora([p], lr=1.0, update=text).step()
            down, G = -p.detach().double(), G.double()
            assert down.isfinite().all(), (shape, kind)
            assert (down * G).sum() >= -1e-6 * down.norm() * G.norm(), (shape, kind)
            if 1e-12 < G.norm() < 1e19:  # beyond, the epsilons rule, or fp32 has no norm
                assert down.any(), (shape, kind)


def test_spectral_norm_of_rows_that_sum_to_zero():
    """Kills: power iteration that starts where it finds nothing, and gives zero, which Contra divides by; a bound that
    changes what power iteration finds elsewhere, as where all singular values are equal."""
    for shape in (SQUARE, TALL, WIDE, (3, 2)):
        for kind, G in structured_gradients(*shape).items():
            if "huge" in kind or "tiny" in kind or kind in ("large", "wide_range"):
                continue
            frobenius = G.norm().item()
            assert 0.98 * frobenius / min(shape) ** 0.5 <= spectral_norm(G).item() <= 1.001 * frobenius, (shape, kind)
    Q = torch.linalg.qr(draw(64, 64)).Q
    v = torch.full((1, 64), 1 / 8.0)
    for _ in range(5):
        u = (Q * v).sum(1, keepdim=True)
        v = (Q * (u / u.norm())).sum(0, keepdim=True)
        v = v / v.norm()
    assert spectral_norm(Q).item() == pytest.approx((Q * v).sum(1).norm().item(), rel=1e-6)
