"""The stages of results #29 to #46 and of the claims after them: what each keeps, and the published schedules. Tests of
the whole loop are in test_whole_loop.py."""

import numpy as np
import pytest
import torch

import aurora
from aurora import (
    anneal, bimaxwell, brake, cautious_decay, hyperball, lookahead, nesterov, next_bases, pin, raw_adam, row_floor,
    schatten4, tail_average, trust_gate,
)
from rules import Rule
from train_gpt import learning_rate_factor, override

TEXT = ("nesterov(ramp(0.85, 0.95, 0, 6)) | soap(0.9) | schatten4_polar | aspect | brake(0.5) | row_floor(0.3825) | "
        "step | pin | cautious_decay(0.5)")
LR = 0.05


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_soap_does_not_depend_on():
    """Kills: a covariance or a second moment that a basis does not turn with, an epsilon that is felt. Columns of the
    bases may have either sign; gradients a thousand times as long make updates as much longer."""
    rule, seen = Rule.of("nesterov(0.9) | soap(0.9, 0.9) | step"), []
    for scale, flip in ((1, 1), (1, -1), (1000, 1)):
        W = torch.zeros(1, 5, 5, dtype=torch.float64)  # square: of a gradient of lower rank, rounding chooses bases
        state = rule.state(W)
        for step in range(8):
            rule.advance_(W, scale * draw(1, 5, 5, seed=step), state, dict(lr=1.0, t=step + 1))
            rule.after_(state, step + 1)
            for name in ("row", "column"):
                state[f"soap.{name}_basis"][..., ::2] *= flip
        seen.append(W / scale)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(seen[2], seen[0], rtol=0, atol=1e-9)


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
    """Kills: a QR at every step where every third was asked for, or none; covariances that miss the steps between. The
    first is after the first step, as in the programs of #14 to #43, where it is of eigenvectors."""
    rule, W = Rule.of("soap(0.9, 0.9, every=3) | step"), draw(1, 5, 3)
    state, seen = rule.state(W), []
    for step in range(7):
        rule.advance_(W, draw(1, 5, 3, seed=step), state, dict(lr=LR, t=step + 1))
        before = state["soap.row_covariance"].clone()
        rule.after_(state, step + 1)
        seen.append(state["soap.row_basis"].clone())
        assert before.any() and torch.equal(before, state["soap.row_covariance"])
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [True, True, False, True, True, False]
    assert seen[0].any()


def size4(X):
    return (np.linalg.svd(X, compute_uv=False) ** 4).sum() ** 0.25


def step_of_20(W, G, s, t, whose, mistake):
    """The matrix step of the programs of #20 to #40 but for Soft-Muon, with the brake that #29 adds, a fade of 8 steps
    and new bases every third: one matrix, `t` steps behind it."""
    m, n = W.shape
    s["M"] = 0.95 * s.get("M", 0) + 0.05 * G
    N = 0.05 * G + 0.95 * s["M"]
    X, of_v = N, whose == "v"
    if (whose != "q" or mistake == "SOAP of q") and "Q" in s:
        Y = s["Q"].T @ N @ s["P"]
        s["v"] = 0.9 * s.get("v", 0) + 0.1 * Y * Y
        D = np.maximum(s["v"], 1e-16) ** 0.5
        if of_v:
            D = np.maximum(D, 0.55 * (D.mean() if mistake == "least of their mean" else (D * D).mean() ** 0.5))
        X = s["Q"] @ (Y / D) @ s["P"].T
        if mistake == "N of its norm":
            X = X * size4(N) / size4(X)
        X = 0.95 * X + 0.05 * N if of_v else X
        X = X * size4(N) / size4(X)
    u, singular, vt = np.linalg.svd(X, full_matrices=False)
    singular = singular / max(size4(X), 1e-7)
    for _ in range(12):
        singular = 2 * singular - 1.5 * singular**3 + 0.5 * singular**5
    U = u * singular @ vt
    norm = np.linalg.norm if mistake == "Frobenius norms" else size4
    Z = U - 0.2 * (1 - min(1, t / 8)) * (N if mistake == "contra of N" else X) / max(norm(X), 1e-10)
    U = Z * norm(U) / max(norm(Z), 1e-10) * max(1, m / n) ** 0.5
    over = 1 if m >= n else 0
    s["rows"] = 0.95 * s.get("rows", 0) + 0.05 * (U * U).mean(axis=over, keepdims=True)
    Z = U / np.maximum(s["rows"], 1e-10) ** 0.5
    U = Z * norm(U) / max(norm(Z), 1e-10)
    along = (U * W).sum() / max((W * W).sum(), 1e-12)
    U = U - 0.5 * along * W if along < 0 else U
    U = U * max(1, 0.3825 * np.linalg.norm(W) / max(np.linalg.norm(U), 1e-8))
    for C, Q, square in (("C", "Q", G @ G.T), ("D", "P", G.T @ G)):
        s[C] = 0.9 * s.get(C, 0) + 0.1 * square
        if Q not in s:
            s[Q] = np.linalg.eigh(s[C] + 1e-30 * np.eye(len(s[C])))[1][:, ::-1]
        elif t > 0 and (t + (mistake == "bases a step early")) % 3 == 0:
            order = np.argsort(-np.diag(s[Q].T @ s[C] @ s[Q]), kind="stable")
            s["v"] = np.take(s.get("v", 0 * W), order, axis="CD".index(C))
            s[Q] = np.linalg.qr(s[C] @ s[Q][:, order])[0]
    return W - LR * U


def apart_from_20(mistake=None) -> float:
    """How far rules and step_of_20 are apart, at most, after ten steps, the first of gradient zero."""
    farthest = 0
    of_v = " | soap(0.9, 0.9, 3, 0.55, 0.95) | trust_gate(names(0, attn_v=1), names(0, attn_v=1))"
    for shape, soaped, whose in (((5, 5), of_v, "qvq"), ((7, 4), " | soap(0.9, 0.9, 3)", "m"),
                                 ((4, 7), " | soap(0.9, 0.9, 3)", "m")):
        rule = Rule.of(f"nesterov(0.95){soaped} | schatten4_polar | schatten4_contra(ramp(0.4, 0, 0, 8)) | "
                       "schatten4_normuon_lite(0.95) | aspect | brake(0.5) | floor(0.3825) | step")
        named = rule.of_slots({f"blocks.{i}.attn.{x}.weight": 1 for i, x in enumerate(whose)})
        W = 3 * draw(len(whose), *shape)
        state, twins, kept = rule.state(W), list(W.numpy().copy()), [{} for _ in whose]
        for t in range(10):
            G = draw(*W.shape, seed=t) * (t > 0)
            knobs = dict(lr=LR, t=t + 1) | rule.at(t) | {x: v.double().view(-1, 1, 1) for x, v in named.items()}
            rule.advance_(W, G, state, knobs)
            rule.after_(state, t + 1)
            for i, g in enumerate(G.numpy()):
                twins[i] = step_of_20(twins[i], g, kept[i], t, whose[i], mistake)
        farthest = max(farthest, *(np.abs(w - twin).max() for w, twin in zip(W.numpy(), twins)))
    return farthest


@pytest.mark.parametrize("mistake", [None, "SOAP of q", "least of their mean", "N of its norm", "contra of N",
                                     "Frobenius norms", "bases a step early"])
def test_the_matrix_step_of_results_20_to_40(mistake, monkeypatch):
    """Kills: each of the mistakes; a stage whose knob is another's, SOAP of all squares, a norm that is not kept."""
    exact = aurora.polar
    monkeypatch.setattr(aurora, "schatten4_polar",
                        lambda G: exact(G, dtype=torch.float64, norm=aurora.clamped_schatten4))
    assert (apart_from_20(mistake) < 1e-10) == (mistake is None)


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


def gate(U, M, G, **bounds) -> float:
    """How much of U there is in what the gate lets through, of 1 in all."""
    through = trust_gate(U, M, G, **bounds)[0]
    torch.testing.assert_close(schatten4(through), schatten4(M))
    both = torch.stack([M.flatten(), U.flatten()], dim=1)
    of_M, of_U = torch.linalg.lstsq(both, through.flatten()).solution
    return (of_U / (of_M + of_U)).item()


def test_how_far_the_gate_opens():
    """Kills: a gate at the wrong end, a cap under the floor's place or the other way round, an agreement that is not
    measured from 0.2 on, another norm. U that is nearly M and downhill is trusted wholly, or up to the cap; its
    opposite, what is across, and what agrees by less than a cosine of 0.2, by the floor alone."""
    M, D = draw(6, 4), draw(6, 4, seed=1)
    D = D - (D * M).sum() / (M * M).sum() * M
    D = D * M.norm() / D.norm()
    alike = M + 1e-4 * D
    assert gate(alike, M, M + D) == pytest.approx(1, abs=1e-6)
    assert gate(alike, M, M + D, cap=0.85) == pytest.approx(0.85, abs=1e-6)
    for U in (-M + 1e-4 * D, D, 0.19 * M + D):
        for floor in (0, 0.225, 0.45):
            assert gate(U, M, M + D, floor=floor, cap=0.85) == pytest.approx(floor, abs=1e-6)
    # a cosine of 0.6 to M, and of 1.4 / 2^(1/2) and 1 / 2^(1/2) to G: trusted by 0.4 / 0.8
    assert gate(0.6 * M + 0.8 * D, M, M + D) == pytest.approx(0.5)
    # the same, and downhill by 0.6 of what M is
    assert gate(0.6 * M + 0.8 * D, M, M) == pytest.approx(0.5 * 0.6)
    stack = [torch.stack(x) for x in ((alike, D, M), (M, M, M), (M + D, D, M - D))]
    for one, *single in zip(trust_gate(*stack, floor=0.3)[0], *stack):
        torch.testing.assert_close(one, trust_gate(*single, floor=0.3)[0])
    assert torch.equal(trust_gate(D, M, M, share=0)[0], D)
    assert not trust_gate(0 * M, 0 * M, 0 * M)[0].any()


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 6)])
def test_annealing(shape):
    """Kills: a spectrum that is turned over, a factor whose mean is not 1, another length, a start of the covariances
    before the rate falls, a sum over the stack. The factors' logarithms are linear in x, which is standardised and
    clipped."""
    U, G = draw(*shape), draw(*shape, seed=1)
    Q, P = (torch.linalg.qr(draw(*shape[:-2], n, n, seed=n)).Q for n in shape[-2:])
    none = [torch.zeros_like(Q), torch.zeros_like(P)]
    same, *kept = anneal(U, G, Q, P, *none, 1.0)
    torch.testing.assert_close(same, U)
    assert not any(x.any() for x in kept)
    cooled, A, B = anneal(U, G, Q, P, *kept, 0.6, exponent=0.1)
    torch.testing.assert_close(A, G @ G.mT)
    torch.testing.assert_close(B, G.mT @ G)
    torch.testing.assert_close(cooled.norm(dim=(-2, -1)), U.norm(dim=(-2, -1)))
    factors = ((Q.mT @ cooled @ P) / (Q.mT @ U @ P)).log()
    factors = (factors - factors.mean((-2, -1), keepdim=True)) / 0.1 / np.log(0.6)  # x, but for what the length took
    x = (Q.mT @ G @ G.mT @ Q).diagonal(dim1=-2, dim2=-1).log().unsqueeze(-1) + \
        (P.mT @ G.mT @ G @ P).diagonal(dim1=-2, dim2=-1).log().unsqueeze(-2)
    x = (x - x.mean((-2, -1), keepdim=True)) / x.std((-2, -1), keepdim=True)
    assert x.ndim == 2 or (x.abs() > 2).any()
    x = x.clamp(-2, 2)
    torch.testing.assert_close(factors, x - x.mean((-2, -1), keepdim=True))
    _, A, _ = anneal(U, 2 * G, Q, P, A, B, 0.5, forget=0.25)
    torch.testing.assert_close(A, 1.75 * G @ G.mT)
    assert anneal(U, 0 * G, Q, P, *none, 0.5)[0].isfinite().all()


def test_two_buffers():
    """Kills: a share at the wrong buffer, a Nesterov step with a buffer's rate in place of mu. Of equal rates it is
    nesterov's bits; with those of the claim a gradient is 30 steps old in the mean, where nesterov's is 19."""
    G = [draw(5, 3, seed=i).float() for i in range(8)]
    M, F, S = (torch.zeros(5, 3) for _ in range(3))
    for g in G:
        one, *_, M = nesterov(g, M, 0.95)
        two, *_, F, S = bimaxwell(g, F, S, 0.95, 0.95, 0.95)
        assert torch.equal(one, two) and torch.equal(M, F)

    def age(rule) -> float:
        """Of a gradient in what the buffers hold, of one impulse followed by nothing."""
        state, held = [torch.zeros(1, dtype=torch.float64)] * (2 - (rule is nesterov)), []
        for t in range(4000):
            U, *others = rule(torch.full((1,), float(t == 0), dtype=torch.float64), *state)
            state = others[2:]
            held.append((U / 0.95).item() if t else (U.item() - 0.05) / 0.95)
        return np.average(np.arange(4000), weights=held)
    assert age(nesterov) == pytest.approx(19) and age(bimaxwell) == pytest.approx(0.4385 * 17 / 3 + 0.5615 * 49)
    assert age(bimaxwell) == pytest.approx(30, abs=0.01)


def test_the_start_of_two_buffers():
    """Kills: a step between the momentum's rates and the buffers' own. The claim makes two of one at the end of the
    step that has 1000 before it, and from the next on they have their rates: that is a schedule of one step."""
    mu = "ramp(ramp(0.85, 0.95, 0, 300), 0.85, 2700, 2900)"
    rule = Rule.of(f"bimaxwell({mu}, ramp({mu}, 0.85, 1000, 1001), ramp({mu}, 0.98, 1000, 1001), 0.4385) | step")
    random, W = torch.Generator().manual_seed(0), torch.zeros(1, 3, 2, dtype=torch.float64)
    state, M = rule.state(W), W.clone()
    for t in range(1010):
        G = torch.randn(1, 3, 2, generator=random, dtype=torch.float64)
        at = W.clone()
        rule.advance_(W, G, state, dict(lr=1.0, t=t + 1) | rule.at(t))
        rate = min(0.85 + 0.1 * t / 300, 0.95)
        if t <= 1000:
            M = F = S = rate * M + (1 - rate) * G
        else:
            F, S = 0.85 * F + 0.15 * G, 0.98 * S + 0.02 * G
        N = rate * (0.4385 * F + 0.5615 * S) + (1 - rate) * G
        torch.testing.assert_close(at - W, N, rtol=0, atol=1e-13)  # of W's rounding, which is some 30 numbers long


def test_adam_as_it_starts():
    """Kills: a corrected moment, an epsilon under the root. Of a constant gradient every step of Adam's is 1 long: the
    ratio is what the correction is worth, 3.651 at the first step of beta2 = 0.997 and at most 5.520, at the sixth."""
    mean = square = torch.zeros(3, dtype=torch.float64)
    start = []
    for _ in range(40):
        U, mean, square = raw_adam(torch.full((3,), -7.0, dtype=torch.float64), mean, square, 0.8, 0.997)
        start.append(-U[0].item())
    expected = [(1 - 0.8**t) / (1 - 0.997**t) ** 0.5 for t in range(1, 41)]
    assert start == pytest.approx(expected, rel=1e-9)
    assert start[0] == pytest.approx(3.651, abs=5e-4) and max(start) == start[5] == pytest.approx(5.520, abs=5e-4)
    tiny = raw_adam(torch.full((1,), 1e-10, dtype=torch.float64), mean[:1] * 0, mean[:1] * 0, 0, 0)[0]
    assert tiny.item() == pytest.approx(0.5)


def stepped(text: str, W: torch.Tensor, gradients, **total) -> torch.Tensor:
    """A stack after some steps of a rule."""
    W, rule = W.clone(), Rule.of(text)
    state = rule.state(W)
    for t, G in enumerate(gradients, 1):
        rule.advance_(W, G, state, dict(lr=LR, t=torch.tensor(float(t))))
        rule.after_(state, t, **total)
    return W


def test_adam_in_a_basis_begins_as_adamw():
    """Kills: moments that are not Adam's up to `start`, so that nothing could be taken over; a basis that turns before
    it; one that never does."""
    W, gradients = draw(2, 6, 4), [draw(2, 6, 4, seed=t) for t in range(1, 7)]
    adamw = stepped("adamw(0.8, 0.99, 1e-10, 0)", W, gradients)
    for start, apart in ((6, 0), (5, 0), (4, 1e-3)):  # what step 5 is the first to gather, step 6 is the first to use
        ours = stepped(f"eigen_adam(0.8, 0.99, 1e-10, {start}, 1) | step", W, gradients)
        assert apart <= (ours - adamw).abs().max() and (apart or torch.allclose(ours, adamw, rtol=0, atol=1e-14))


def test_parts_of_a_matrix_move_as_the_whole():
    """Kills: a covariance of a part's rows alone, or of several matrices where slots are matrices. A matrix in one
    slot, its rows in three slots whose covariances are summed, and a stack that it shares with another."""
    W, gradients = draw(6, 4), [draw(6, 4, seed=t) for t in range(1, 9)]
    text = "eigen_adam(0.8, 0.99, 1e-10, 1, 2) | step"
    whole = stepped(text, W[None], [G[None] for G in gradients])[0]
    parts = stepped(text, W.view(3, 2, 4), [G.view(3, 2, 4) for G in gradients], total=lambda x: x.sum(0, keepdim=True))
    beside = stepped(text, torch.stack([draw(6, 4, seed=9), W]), [torch.stack([2 * G.flip(0), G]) for G in gradients])
    torch.testing.assert_close(parts.view(6, 4), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(beside[1], whole, rtol=0, atol=1e-12)
    params = [torch.nn.Parameter(x.clone()) for x in (draw(6, 4, seed=9), W)]
    optimizer = aurora.Aurora(params, lr=LR, update=text)
    for G in gradients:
        params[0].grad, params[1].grad = 2 * G.flip(0), G
        optimizer.step()
    torch.testing.assert_close(torch.stack([p.detach() for p in params]), beside, rtol=0, atol=1e-12)
    assert not torch.allclose(stepped(text, W.view(3, 2, 4), [G.view(3, 2, 4) for G in gradients]).view(6, 4), whole,
                              rtol=0, atol=1e-3)


def test_lookahead_of_a_drift():
    """Kills: a movement measured from the point ahead, a running mean that forgets with the other weight, a point that
    is not the one before the move. An inner step of a constant d comes to move W by d / (1 - size)."""
    d, ahead = draw(3), draw(3, seed=1)
    point, drift, seen = torch.zeros(3).double(), torch.zeros(3).double(), [ahead]
    for t in range(1, 3001):
        ahead, point, drift = lookahead(ahead + d, ahead, point, drift, t, size=0.3)
        seen.append(point)
    torch.testing.assert_close(seen[1] - seen[0], d)
    torch.testing.assert_close(drift, d / 0.7)
    torch.testing.assert_close(seen[-1] - seen[-2], d / 0.7)
    torch.testing.assert_close(ahead, point + 0.3 * drift)


def test_an_average_of_the_tail():
    """Kills: an average that begins at zero, a step early or late, or not with W's bits; another rate than 1 / steps.
    (1 - 1/tau)^k e_0 + sum of (1 - 1/tau)^(k - j) W_j / tau, and behind a drift by tau - 1 steps."""
    W, average = [draw(4, seed=t).float() for t in range(30)], torch.zeros(4)
    for t in range(1, 30):
        average, = tail_average(W[t], average, t, 10, 5)
        if t <= 10:
            assert torch.equal(average, W[t])
    expected = 0.8**19 * W[10] + sum(0.8 ** (29 - j) * W[j] / 5 for j in range(11, 30))
    torch.testing.assert_close(average, expected)
    average = torch.zeros(1, dtype=torch.float64)
    for t in range(1, 400):
        average, = tail_average(torch.full((1,), float(t), dtype=torch.float64), average, t, 10, 5)
    assert 399 - average.item() == pytest.approx(4)


# Schedules

def test_the_published_schedules():
    """Kills: a schedule that counts from the other end or is a step off, where result #46 tells numbers. A lookahead
    stands before the gradient of step t there, and after the step before here: its number is that of t - 1."""
    rule = Rule.of("nesterov(ramp(ramp(0.85, 0.95, 0, 300), 0.85, 2700, 2900)) | soap | "
                   "trust_gate(ramp(0.45, 0, 1375, 1625), ramp(0.85, 1, 1624, 1625)) | schatten4_polar | "
                   "anneal(at_least(power(1, 2900, 2386.4, 1.2), 0.3)) | step | tail_average | "
                   "lookahead(between(power(0.3, 2900, 1413, 1.2), 299, 1949))")

    def at(name, *steps):
        return [rule.at(t)[name] for t in steps]
    assert at("nesterov.mu", 0, 150, 300, 2700, 2800, 2900) == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.9, 0.85])
    assert at("trust_gate.floor", 0, 1375, 1500, 1625, 2900) == pytest.approx([0.45, 0.45, 0.225, 0, 0])
    assert at("trust_gate.cap", 0, 1375, 1624, 1625, 2900) == [0.85, 0.85, 0.85, 1, 1]
    before = [at("lookahead.size", t - 1)[0] for t in (1, 299, 300, 1487, 1600, 1949, 1950, 2900)]
    assert [round(x, 3) for x in before] == [0, 0, 0.3, 0.3, 0.272, 0.187, 0, 0]
    assert at("anneal.ratio", 0, 513, 2900) == [1, 1, 0.3] and 0.99 < at("anneal.ratio", 514)[0] < 1
    assert at("anneal.ratio", 2024) == pytest.approx([(876 / 2386.4) ** 1.2]) and at("anneal.ratio", 2025) == [0.3]


def test_the_published_rates():
    """Kills: another exponent, a length of the cooldown that is rounded, a cooldown to another step. The programs of
    results #20 to #46 have min(rate, c (2900 - t)^1.2), with these c."""
    hp = override(["train_steps=2900", "matrix_schedule=power(2386.4, 1.2)", "adam_schedule=power(1413, 1.2)"])
    for rate, c, family in ((0.3, 4.976805410800738e-05, "adam"), (1 / 320, 5.184172302917436e-07, "adam"),
                            (0.01, 1.6589351369335795e-06, "adam"), (0.0375, 3.3169534699576625e-06, "matrix")):
        for t in (0, 513, 514, 1486, 1487, 1488, 2000, 2690, 2899, 2900):
            ours = rate * learning_rate_factor(t, hp, family)
            assert ours == pytest.approx(min(rate, c * (2900 - t) ** 1.2), rel=1e-12, abs=0)
    assert learning_rate_factor(2690, hp, "matrix") == pytest.approx(0.0541, abs=5e-5)
    assert learning_rate_factor(2690, hp, "adam") == pytest.approx(0.1015, abs=5e-5)
