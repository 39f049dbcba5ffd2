"""The whole loop of result #46, and two stages of the claims after it, against a loop over single parameters in NumPy.

Ours are the trainer's model, banks, rules and schedules, in float64 but for the model. The gradients that the model
has at our weights are handed to both: equal gradients make equal trajectories. Numbers of steps are the published ones,
scaled down to 30 steps; floor and cap are such that they bind here.
"""

from functools import cache

import numpy as np
import pytest
import torch
from conftest import one_process

import aurora
import train_gpt
from harness.ranks import Place
from train_gpt import GPT, Bank, accumulate_gradients, fill, initial_weights, make_banks, override, update

STEPS = 30
MU = "ramp(ramp(0.85, 0.95, 0, 6), 0.85, 22, 30)"
MOMENTUM = f"bimaxwell({MU}, ramp({MU}, 0.85, 10, 11), ramp({MU}, 0.98, 10, 11), 0.4385)"
AHEAD = "between(power(0.3, 30, 14.6, 1.2), 2, 19)"
RULES = {
    "matrix_update": f"{MOMENTUM} | soap(0.9, 0.8) | trust_gate(ramp(0.45, 0, 12, 18), ramp(0.5, 1, 17, 18), "
                     "names(0, attn_proj=1)) | schatten4_polar | "
                     "anneal(at_least(power(1, 30, 24.7, 1.2), 0.3), 0.25, 0.1) | aspect | brake(0.5) | "
                     "row_floor(1.75) | step | pin | cautious_decay(0.5)",
    "adam_update": "adamw(0.8, 0.99, 1e-10, 0)",
    "head_update": "eigen_adam(0.8, 0.99, 1e-10, 8, 3, 0.2) | step",
    "vector_update": "raw_adam(0.8, names(0.997, gains=0.99, attn_proj_bias=0.9965), 1e-10) | step",
    "final_update": f"tail_average(16, 5, names(0.6, embed=0)) | lookahead({AHEAD}, 0.1)",
    "matrix_schedule": "power(24.7, 1.2)", "adam_schedule": "power(14.6, 1.2)"}
SHAPE = ["num_layers=2", "model_dim=32", "head_dim=16", "vocab_size=64", "batch_tokens=256", "sequence_length=16",
         "val_tokens=256", "micro_batch=16", f"train_steps={STEPS}"]
VIEWS = "training", "val_loss", "val_ema_loss"
RATES = dict(matrix=0.0375, head=1 / 320, embed=0.3, vector=0.01)


########################################
#                 Ours                 #
########################################

def covariance(size: int) -> torch.Tensor:
    """What a run has after some steps: of full rank, so that rounding does not choose the bases."""
    A = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return 1e-3 * A @ A.mT / size


def arrays(bank, numbers) -> dict[str, np.ndarray]:
    """A tensor of a bank's slots as arrays: a matrix each, q, k and v apart, the head's parts as one, or a vector
    each."""
    apart = len({*bank.slots}) > 1
    named = (bank.slots, numbers) if apart else (bank.params, bank.views(numbers))
    return {name: x.double().numpy().copy() for name, x in zip(*named)}


def view(banks, name: str) -> dict[str, np.ndarray]:
    return {k: x for bank in banks
            for k, x in arrays(bank, bank.rule.view(name, bank.masters, bank.state, bank.knobs)).items()}


def ours(rules: dict, given: list | None = None) -> tuple[list, list]:
    """Each step's gradients, a tensor a bank, the model's or those that are given; and, before all steps and after
    each, {view: {parameter: its weight}}, with the gradient that the step had as another view."""
    hp = override([*SHAPE, *(f"{name}={text}" for name, text in rules.items())])
    model = GPT(hp)
    banks = make_banks(model, hp, Place(0, 1, torch.device("cpu")))
    fill(banks, initial_weights(model, 0))
    random, gradients, seen = torch.Generator().manual_seed(1), [], [{"training": view(banks, "training")}]
    for step in range(STEPS):
        if given:
            for bank, numbers in zip(banks, given[step]):
                bank.gradients.copy_(numbers)
                bank.reduce()
        else:
            text = torch.randint(0, 64, (16, 17), generator=random).sort().values  # which can be learnt
            accumulate_gradients(model, banks, (text[:, :-1].int(), text[:, 1:]), hp)
        gradients.append([bank.gradients.clone() for bank in banks])
        update(banks, step)
        seen.append({name: view(banks, name) for name in VIEWS})
        seen[-1]["gradient"] = {k: x for bank in banks for k, x in arrays(bank, bank.gradients).items()}
    return gradients, seen


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Masters, state and knobs in float64, and the polar factor, which otherwise computes in bf16."""
    exact = aurora.polar
    monkeypatch.setattr(aurora, "schatten4_polar",
                        lambda G: exact(G, dtype=torch.float64, norm=aurora.clamped_schatten4))

    def bank(params, slot, rule, lr, dtype, pool):
        made = Bank(params, slot, rule, lr, torch.float64, pool)
        # those that go by name have fp32's rounding already
        made.knobs = {name: x if name == "t" else x.double().mul(1e6).round() / 1e6 for name, x in made.knobs.items()}
        for name, x in made.state.items():
            if name.startswith("soap") and name.endswith("covariance"):
                x.copy_(covariance(x.size(-1)))
        return made
    monkeypatch.setattr(train_gpt, "Bank", bank)
    with one_process():
        yield


########################################
#                 Twin                 #
########################################

def linear(t, before, after, start, stop):
    return float(np.interp(t, [start, stop], [before, after]))


def cooled(t, last):
    return min(1.0, ((STEPS - t) / last) ** 1.2)


def size4(X):
    return max((np.linalg.svd(X, compute_uv=False) ** 4).sum() ** 0.25, 1e-8)


def cosine(X, Y):
    return (X * Y).sum() / max(np.linalg.norm(X) * np.linalg.norm(Y), 1e-8)


def newton_schulz(X):
    """Twelve steps of 2 x - 1.5 x^3 + .5 x^5 on the singular values."""
    u, s, vt = np.linalg.svd(X, full_matrices=False)
    s = s / max((s**4).sum() ** 0.25, 1e-7)
    for _ in range(12):
        s = 2 * s - 1.5 * s**3 + 0.5 * s**5
    return u * s @ vt


def refreshed(s, G, mistake):
    """Statistics, then the bases of the next step, and the second moment in the order of their columns."""
    for C, Q, square in (("C", "Q", G @ G.T), ("D", "P", G.T @ G)):
        s[C] = 0.8 * s[C] + 0.2 * square
        order = np.argsort(-np.diag(s[Q].T @ s[C] @ s[Q]), kind="stable")
        s[Q] = np.linalg.qr((s[Q] @ s[C] if mistake == "QR of Q C" else s[C] @ s[Q])[:, order])[0]
        if mistake != "second moment not reordered":
            s["v"] = s["v"][order] if Q == "Q" else s["v"][:, order]


def annealed(U, G, s, lr, mistake):
    """Lazily, as published: nothing before the rate falls."""
    if lr >= RATES["matrix"]:
        return U
    for C, square in (("A", G @ G.T), ("B", G.T @ G)):
        s[C] = 0.9 * s.get(C, 0) + 0.1 * square if C in s or mistake == "slow statistics from zero" else square
    rows, columns = (np.log(np.maximum(np.diag(Q.T @ C @ Q), 1e-30)) for Q, C in ((s["Q"], s["A"]), (s["P"], s["B"])))
    x = rows[:, None] + columns
    x = np.clip((x - x.mean()) / max(x.std(ddof=1), 1e-6), -2, 2)
    ratio = max(lr / RATES["matrix"], 0.3)
    if mistake == "more where gradients are large":
        ratio = 1 / ratio
    Z = s["Q"] @ (s["Q"].T @ U @ s["P"] * ratio ** (0.25 * x)) @ s["P"].T
    return Z * np.linalg.norm(U) / max(np.linalg.norm(Z), 1e-10)


def momentum(G, s, t, mistake):
    mu = linear(t, 0.85, 0.95, 0, 6) if t <= 6 else linear(t, 0.95, 0.85, 22, 30)
    if t <= 10:  # two buffers begin as what the one is at the end of step 10
        s["M"] = mu * s["M"] + (1 - mu) * G
        s["fast"] = s["slow"] = s["M"]
    else:
        s["fast"], s["slow"] = 0.85 * s["fast"] + 0.15 * G, 0.98 * s["slow"] + 0.02 * G
    if mistake == "buffers exchanged":
        return mu * (0.4385 * s["slow"] + 0.5615 * s["fast"]) + (1 - mu) * G
    return mu * (0.4385 * s["fast"] + 0.5615 * s["slow"]) + (1 - mu) * G


def matrix_step(W, G, s, t, lr, gated, mistake):
    m, n = W.shape
    if not s:
        s |= dict(M=0 * W, v=0 * W, C=covariance(m).numpy(), D=covariance(n).numpy(), Q=np.eye(m), P=np.eye(n))
    N = momentum(G, s, t, mistake)
    if mistake == "statistics before use":
        refreshed(s, G, mistake)
    whose = G if mistake == "second moment of the gradient" else N
    s["v"] = 0.9 * s["v"] + 0.1 * (s["Q"].T @ whose @ s["P"]) ** 2
    X = s["Q"] @ (s["Q"].T @ N @ s["P"] / np.maximum(s["v"], 1e-16) ** 0.5) @ s["P"].T
    X = X * size4(N) / size4(X)
    if gated:
        alike = np.clip((cosine(X, N) - 0.2) / 0.8, 0, 1)
        downhill = np.clip(cosine(X, G) / max(cosine(N, G), 1e-8), 0, 1)
        g = np.clip(alike * downhill, linear(t, 0.45, 0, 12, 18), 0.5 if t < 18 else 1)
        g = 1 - g if mistake == "gate at the other end" else g
        blend = N + g * (X - N)
        X = blend * size4(N) / size4(blend)
    U = newton_schulz(X)
    U = annealed(U, G, s, lr, mistake) * max(1, m / n) ** 0.5

    def braked(U):
        along = (U * W).sum() / max((W * W).sum(), 1e-12)
        outward = along > 0 if mistake == "brake on the inward side" else along < 0
        return U - 0.5 * along * W if outward else U

    def floored(U):
        rows, least = (np.linalg.norm(x, axis=1, keepdims=True) for x in (U, W))
        return U * np.maximum(1, 1.75 * np.maximum(least, 1e-8) / np.maximum(rows, 1e-8))
    U = braked(floored(U)) if mistake == "floor before brake" else floored(braked(U))
    r = max(np.linalg.norm(W), 1e-8)
    radius = max(r - lr * (U * W).sum() / r, 1e-8)
    shrink = 1 - lr * 0.5 * (U * W > 0)
    moved = W - lr * U
    moved = moved * shrink if mistake == "pin after decay" else moved
    moved = moved * radius / max(np.linalg.norm(moved), 1e-8)
    moved = moved if mistake == "pin after decay" else moved * shrink
    if mistake != "statistics before use":
        refreshed(s, G, mistake)
    return moved


def vector_step(p, g, s, t, lr, b2, corrected):
    s["m"], s["v"] = 0.8 * s.get("m", 0) + 0.2 * g, b2 * s.get("v", 0) + (1 - b2) * g * g
    m, v = (s["m"] / (1 - 0.8 ** (t + 1)), s["v"] / (1 - b2 ** (t + 1))) if corrected else (s["m"], s["v"])
    return p - lr * m / (np.sqrt(v) + 1e-10)


def head_step(W, G, s, t, lr, mistake):
    """Adam's moments in the basis Q, which is the identity at first; the covariance of all rows begins with step 8."""
    if not s:
        s |= dict(m=0 * W, v=0 * W, Q=np.eye(W.shape[1]))

    def follow():
        if t >= 8:
            square = G.T @ G / len(G) if mistake != "covariance of a part" else G[:8].T @ G[:8]
            s["C"] = 0.8 * s["C"] + 0.2 * square if "C" in s else square * (0.2 if mistake == "C from zero" else 1)
        if t % 3 == 0 and "C" in s:
            Q = np.linalg.eigh(s["C"])[1]
            T, s["Q"] = s["Q"].T @ Q, Q
            s["m"] = s["m"] if mistake == "mean not carried over" else s["m"] @ T
            s["v"] = s["v"] if mistake == "squares not carried over" else s["v"] @ (T * T)
    if mistake == "basis of this step's gradient":
        follow()
    Y = G @ s["Q"]
    s["m"], s["v"] = 0.8 * s["m"] + 0.2 * Y, 0.99 * s["v"] + 0.01 * Y * Y
    m, v = s["m"] / (1 - 0.8 ** (t + 1)), s["v"] / (1 - 0.99 ** (t + 1))
    W = W - lr * m / (np.sqrt(v) + 1e-10) @ s["Q"].T
    if mistake != "basis of this step's gradient":
        follow()
    return W


def inner_step(name, W, G, s, t, mistake):
    if name == "head.weight":
        return head_step(W, G, s, t, RATES["head"] * cooled(t, 14.6), mistake)
    if W.ndim == 2 and "blocks" in name:
        return matrix_step(W, G, s, t, RATES["matrix"] * cooled(t, 24.7), "attn.proj" in name, mistake)
    if W.ndim == 2:
        family = name.split(".")[0]
        return vector_step(W, G, s, t, RATES[family] * cooled(t, 14.6), 0.99, corrected=True)
    b2 = 0.99 if name.endswith("gains") else 0.9965 if name.endswith("attn.proj.bias") else 0.997
    return vector_step(W, G, s, t, RATES["vector"] * cooled(t, 14.6), b2, corrected=mistake == "vectors corrected")


def trajectory(name, W, gradients, mistake=None):
    """(the point where the gradient was taken, W, W as val_ema_loss sees it) of each step, as the published loop goes:
    look ahead, make a step from there, note how far W went in all, average."""
    inner, drift, average, seen = {}, 0 * W, None, []
    for t, G in enumerate(gradients):
        at = t if mistake == "the lookahead's rate of its own step" else t - 1
        ahead = W + 0.3 * cooled(at, 14.6) * drift * (3 <= t < 20)
        start = W if mistake == "lookahead undone before the step" else ahead
        new = inner_step(name, start, G, inner, t, mistake)
        drift = 0.9 * drift + 0.1 * (new - (start if mistake == "drift of the inner step" else W))
        W = new
        averaged = ahead if mistake == "average of the point ahead" else W
        if t + 1 == 16 + (mistake == "average a step late"):
            average = averaged
        elif average is not None:
            average = average + (averaged - average) / 5
        share = 0 if average is None or name.startswith("embed") else 0.6
        seen.append(dict(training=ahead, val_loss=W, val_ema_loss=W if share == 0 else 0.4 * W + 0.6 * average))
    return seen


########################################
#                Tests                 #
########################################

@cache
def base():
    return ours(RULES)


def apart(mistake: str | None = None, only: str = "") -> float:
    """How far ours and the twin are from each other at most, over all steps, parameters and views."""
    _, seen = base()
    farthest = 0
    for name, W in seen[0]["training"].items():
        gradients = [step["gradient"][name] for step in seen[1:]] if only in name else []
        for before, after, theirs in zip(seen, seen[1:], trajectory(name, W, gradients, mistake)):
            for x, here in zip(VIEWS, (before["training"], after["val_loss"], after["val_ema_loss"])):
                farthest = max(farthest, np.abs(here[name] - theirs[x]).max())
    return farthest


def test_the_loop_of_result_46():
    """Kills: an exchange of two stages or schedules, one that is a step early or late, a stage that misses a bank or
    has another's knob, a knob by name at another parameter, q, k and v as one matrix. To 1e-11, of weights up to 5:
    30 steps of float64, and QR."""
    assert apart() < 1e-11


@pytest.mark.parametrize("mistake", [
    "second moment of the gradient", "statistics before use", "second moment not reordered", "QR of Q C",
    "buffers exchanged", "gate at the other end", "slow statistics from zero", "more where gradients are large",
    "brake on the inward side", "floor before brake", "pin after decay", "vectors corrected",
    "lookahead undone before the step", "the lookahead's rate of its own step", "drift of the inner step",
    "average of the point ahead", "average a step late"])
def test_a_mistake_is_seen(mistake):
    """Kills: a comparison that cannot fail. In the first block, each mistake moves some weight by over a hundred
    thousand times what the two are apart without one."""
    assert apart(mistake, only="blocks.0") > 1e-6


@pytest.mark.parametrize("mistake", ["covariance of a part", "C from zero", "mean not carried over",
                                     "squares not carried over", "basis of this step's gradient"])
def test_a_mistake_of_the_heads_is_seen(mistake):
    """Kills: as above, of the head alone."""
    assert apart(mistake, only="head") > 1e-6


OFF = {
    "ramp of the momentum": ((MU, "0.95"), "matrix"),
    "second buffer": ((MOMENTUM, f"nesterov({MU})"), "matrix"),
    "bases that follow": (("soap(0.9, 0.8)", "soap(0.9, 0.8, 1000)"), "matrix"),
    "second moment": (("soap(0.9, 0.8)", "soap(0, 0.8)"), "matrix"),
    "gate": (("names(0, attn_proj=1)", "0"), "attn.proj"),
    "floor of the gate": (("ramp(0.45, 0, 12, 18)", "0"), "attn.proj"),
    "cap of the gate": (("ramp(0.5, 1, 17, 18)", "1"), "attn.proj"),
    "polar factor": (("schatten4_polar | ", ""), "matrix"),
    "annealing": (("anneal(at_least(power(1, 30, 24.7, 1.2), 0.3), 0.25, 0.1) | ", ""), "matrix"),
    "least of the annealing": (("at_least(power(1, 30, 24.7, 1.2), 0.3)", "power(1, 31, 24.7, 1.2)"), "matrix"),
    "aspect": (("aspect | ", ""), "fc.weight"),
    "brake": (("brake(0.5) | ", ""), "matrix"),
    "floor of rows": (("row_floor(1.75)", "row_floor(0)"), "from the start"),
    "pin": (("pin | ", ""), "matrix"),
    "cautious decay": ((" | cautious_decay(0.5)", ""), "matrix"),
    "rate's cooldown": (("power(24.7, 1.2)", "power(1, 1.2)"), "matrix"),
    "rate's cooldown of the others": (("power(14.6, 1.2)", "power(1, 1.2)"), "other"),
    "basis of the head": (("1e-10, 8, 3, 0.2)", "1e-10, 1000, 3, 0.2)"), "head.weight"),
    "beta2 of gains": (("gains=0.99", "gains=0.997"), "gains"),
    "beta2 of the projections' bias": (("attn_proj_bias=0.9965", "attn_proj_bias=0.997"), "attn.proj.bias"),
    "uncorrected vectors": (("raw_adam(0.8, names(0.997, gains=0.99, attn_proj_bias=0.9965), 1e-10) | step",
                             "adamw(0.8, 0.997, 1e-10, 0)"), "vector"),
    "lookahead": ((f" | lookahead({AHEAD}, 0.1)", ""), ""),
    "lookahead's cooldown": ((AHEAD, "between(0.3, 2, 19)"), ""),
    "lookahead's start": ((AHEAD, "between(power(0.3, 30, 14.6, 1.2), 5, 19)"), ""),
    "lookahead's end": ((AHEAD, "between(power(0.3, 30, 14.6, 1.2), 2, 18)"), ""),
}
FAMILIES = {"matrix": lambda name: "blocks" in name and "weight" in name, "vector": lambda name: "weight" not in name,
            # projections begin at zero
            "from the start": lambda name: "blocks" in name and "weight" in name and "proj" not in name,
            "other": lambda name: not ("blocks" in name and "weight" in name)}


def changed(rules: dict, loss: str) -> set[str]:
    """The parameters that other rules move to another place, from the same gradients."""
    given, seen = base()
    _, other = ours(rules, given)
    return {name for name, W in seen[-1][loss].items() if np.abs(W - other[-1][loss][name]).max() > 1e-7}


@pytest.mark.parametrize("lever", OFF)
def test_each_lever_moves_what_it_should(lever):
    """Kills: a stage or a knob that does nothing, or that reaches parameters of others."""
    (text, instead), whose = OFF[lever]
    rules = {name: rule.replace(text, instead) for name, rule in RULES.items()}
    assert rules != RULES
    of = FAMILIES.get(whose, lambda name: whose in name and (whose != "attn.proj" or "weight" in name))
    assert changed(rules, "val_loss") == set(filter(of, base()[1][0]["training"]))


def test_the_average_moves_no_training():
    """Kills: a step, or the raw loss, that depends on an average; an average that reaches the embedding, or not the
    others. Without it, weights are the same bits."""
    average = "tail_average(16, 5, names(0.6, embed=0)) | "
    rules = RULES | {"final_update": RULES["final_update"].replace(average, "")}
    given, seen = base()
    _, without = ours(rules, given)
    for a, b in zip(seen[1:], without[1:]):
        assert all(np.array_equal(a[x][name], b[x][name]) for x in ("training", "val_loss") for name in a[x])
    assert changed(rules, "val_ema_loss") == set(seen[0]["training"]) - {"embed.weight"}
