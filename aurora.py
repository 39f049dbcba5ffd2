"""Aurora with Contra-Muon and the update/weight floor, the optimizer of result #17, and its family.

An update rule is one line of text. This is result #17's:

    nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step

rules.py says what a stage is, and what its knobs can be. The stages:

    nesterov(mu)                    M <- mu M + (1 - mu) G;  U = N = (1 - mu) G + mu M
    bimaxwell(mu, fast, slow, share) nesterov with the mean of two M's, one forgetting faster: pull request 339
    aurora(iterations, beta)        U <- balanced_polar(U): release of May 2026, result #17
    aurora_july(iterations, beta)   the same for tall matrices only, CANS-12 in fp32: release of July 2026
    aurora_paper(iterations, damping)  rows and polar factors in turn: Algorithm 3 of arXiv 2606.27715
    aurora_wide(iterations, beta)   the same for wide matrices only, Schatten-4 norm: result #30
    riemannian_aurora(steps, step_size)  nearly the update of even rows that the gradient favours most
    polar, jordan_polar             U <- polar(U): Muon; by the record's table, by github.com/KellerJordan/Muon's
    schatten4_polar                 the record's table, of an input of Schatten-4 norm 1: results #30 to #46
    soap(beta2, beta, every, least, share)  U = N <- U over a running root mean square in the gradients' eigenbases: #44
    trust_gate(floor, cap, share)   U = N <- between the momentum and U, as far as the two and the gradient agree: #44
    anneal(ratio, exponent, forget) U <- U, less of it where soap's bases show large gradients, of the same length
    contra(strength)                U <- U - strength/2 N/||N||_2, of the same length
    schatten4_contra(strength)      the same by Schatten-4 norms throughout: results #20 to #43
    normuon(beta2)                  U <- its rows over a running mean of their squares, of the same length
    normuon_lite(beta2)             the same along the longer side: results #9 to #14
    schatten4_normuon_lite(beta2)   normuon_lite that keeps the Schatten-4 norm: results #20 and #29
    u_normuon                       U <- every row of one length
    aspect                          U <- sqrt(max(1, m / n)) U
    floor(target)                   U <- U, at least target ||W||_F long
    row_floor(target)               the same row by row: result #46
    brake(outward)                  U <- U, its part that lengthens W scaled by outward: result #29
    decay(rate)                     W <- (1 - lr rate) W
    step                            W <- W - lr U
    pin                             W <- W of the length that U's part along W0 makes, to first order: result #29
    cautious_decay(rate)            W <- (1 - lr rate) W where the step shrinks it: result #46
    hyperball                       in place of step: W keeps its length, lr is the step's: result #5
    adamw(beta1, beta2, eps, decay) moves W of any shape: torch's fused kernel. A rule begins with it or has it not
    raw_adam(beta1, beta2, eps)     U <- Adam's, without correction of the moments' start at zero, of any shape: #44
    eigen_adam(beta1, beta2, eps, start, every, forget)  U <- Adam's in the eigenbasis of the rows' gradients: 2560
    lookahead(size, forget)         W <- W + size times its mean movement, which is validated without: #39, #40
    tail_average(start, steps, share)   a running mean of W, validated in a blend with W: results #45, #46
    anchored_average(start, steps, share, anchor)   the same, and gradients are taken beyond W, away from it: #377

Functions take single matrices (M, N) or stacks (K, M, N) in torch's layout (out_features, in_features). None changes
its inputs, but for adamw and those whose name ends in _.

Sources: Muon, github.com/KellerJordan/Muon; Aurora, arXiv 2606.27715 and github.com/tilde-research/aurora-release;
NorMuon, arXiv 2510.05491; Contra-Muon, nilin.github.io/contra-muon-and-soft-muon; the floor and every epsilon,
github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, result #17.
"""

import copy
from contextlib import nullcontext
from functools import partial
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from kernels.newton_schulz import newton_schulz
from rules import BelowOne, Constant, Named, Rule, UpToOne, at_least_fp32, at_once, stage, whole

RESULT_17 = "nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step"


########################################
#            Polar factors             #
########################################

def chebyshev_cubics(lowest: float, steps: int) -> tuple:
    """(a, b, 0) of the odd cubics a x + b x^3 that, one after the other, bring [lowest, 1] as near to 1 as can be.

    Each takes an interval [low, high] to one that is even around 1, the interval of the next. This closed form gives
    the table of CANS (arXiv 2506.10935) for lowest = 8.5e-4 to 14 digits.
    """
    low, high, table = lowest, 1.0, []
    for _ in range(steps):
        alpha = (3 / (high * high + low * high + low * low)) ** 0.5
        beta = 4 / (2 + low * high * (low + high) * alpha**3)
        a, b = 1.5 * alpha * beta, -0.5 * alpha**3 * beta
        table.append((a, b, 0.0))
        low = a * low + b * low**3
        high = 2 - low
    return tuple(table)


def shrunk(table, factor: float) -> tuple:
    """p(x / factor) for each (a, b, c): room for an input, or for rounding, that overshoots 1."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in table)


# Tables of (a, b, c): odd polynomials a x + b x^3 + c x^5 that, one after the other, send singular values to 1.

# The record's: fixed points 0, 1, sqrt 2; doubles a small value at each step and converges quadratically at 1.
SIMPLE_QUINTIC_12 = ((2.0, -1.5, 0.5),) * 12
# github.com/KellerJordan/Muon: steepest at 0 (3.4445^5 = 485), and content with values between .68 and 1.13.
QUINTIC_5 = ((3.4445, -4.7750, 2.0315),) * 5
# arXiv 2505.16932, github.com/NoahAmsel/PolarExpress: minimax on [1e-3, 1], cushion .02407; all but the last shrunk
# by 1.01 against rounding, and the first once more in place of a division of the input by 1.01 ||G||_F.
POLAR_EXPRESS_8 = shrunk(shrunk((
    (8.28721201814563, -23.595886519098837, 17.300387312530933),), 1.01) + (
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248)), 1.01) + (
    (1.875, -1.25, 0.375),)
# github.com/tilde-research/aurora-release, July 2026: nine optimal cubics from [8.5e-4, 1], then Newton-Schulz's own.
CANS_12 = chebyshev_cubics(8.5e-4, 9) + ((1.5, -0.5, 0.0),) * 3


def frobenius(X: Tensor) -> Tensor:
    """||X||_F of each matrix, shape (..., 1, 1), in fp32 or better."""
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=at_least_fp32(X))


def schatten4(X: Tensor) -> Tensor:
    """||X||_S4 = ||X^T X||_F^(1/2), shape (..., 1, 1): between the spectral norm and the Frobenius norm."""
    X = X.to(at_least_fp32(X))
    norm = frobenius(X.mT @ X if X.size(-2) > X.size(-1) else X @ X.mT).sqrt()
    return torch.where(norm < torch.inf, norm, frobenius(X))  # a product overflowed: ||X||_F is no smaller


# what publications divide by, never 0
def offset_frobenius(X: Tensor) -> Tensor:
    return frobenius(X) + 1e-7


def clamped_schatten4(X: Tensor) -> Tensor:
    return schatten4(X).clamp(min=1e-7)


def polar(G: Tensor, coefficients=SIMPLE_QUINTIC_12, dtype=torch.bfloat16, norm=offset_frobenius) -> Tensor:
    """U V^T of the thin SVD G = U S V^T, approximately, computed and returned in `dtype`. polar(0) = 0.

    Newton-Schulz moves each singular value s to p(...p(s / norm(G))). Those above 1e-3 norm(G) end within 5e-6 of 1
    with the record's table, 1e-14 with POLAR_EXPRESS_8 or CANS_12, .53 with QUINTIC_5, in exact arithmetic; smaller
    ones fall short of 1. Above 1e19 fp32 has no norm: 0 again. bf16 adds up to 7e-3 where G is well-conditioned; where
    it is not, rounding noise grows as small singular values do, so that an exactly low-rank G gets more rank than it
    had.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = (X / norm(X)).to(dtype)  # singular values at most 1
    X = newton_schulz(X.reshape(-1, *X.shape[-2:]), coefficients).view(X.shape)
    return X.mT if tall else X


# the routines of other publications
jordan_polar = partial(polar, coefficients=QUINTIC_5)
cans_polar = partial(polar, coefficients=CANS_12, dtype=torch.float32)
polar_express = partial(polar, coefficients=POLAR_EXPRESS_8, dtype=torch.float32)
schatten4_polar = partial(polar, norm=clamped_schatten4)


def row_norms(X: Tensor) -> Tensor:
    """||X_i|| of each row, shape (..., M, 1), in fp32 or better."""
    return torch.linalg.vector_norm(X, dim=-1, keepdim=True, dtype=at_least_fp32(X))


def balanced_polar(G: Tensor, pp_iterations: int = 2, pp_beta: float = 0.5, polar=polar) -> Tensor:
    """Aurora, release of May 2026: a polar factor of D G, the positive diagonal D chosen so that rows end up even.

    Tall G (m > n):  D = 1 / ||G_i||;  U = polar(D G);  D_i <- D_i ((n / m) / ||U_i||^2)^pp_beta;  U = polar(D G); ...
    with `pp_iterations` polar factors in all. U^T U = I as far as `polar` goes, and ||U_i||^2 comes near n / m.
    Wide G is transposed, so its columns are evened; square G has even rows already and gets its polar factor.
    A zero row stays zero. With one polar factor this is MuonEq-R (arXiv 2603.28254).
    """
    m, n = G.shape[-2:]
    if m == n:
        return polar(G)
    if m < n:
        return balanced_polar(G.mT, pp_iterations, pp_beta, polar).mT
    G = G.to(at_least_fp32(G))
    D = 1 / row_norms(G).clamp(min=1e-7)
    U = polar(D * G)
    for _ in range(pp_iterations - 1):
        row_sq = U.to(G.dtype).square().sum(dim=-1, keepdim=True).clamp(min=1e-14)
        # a zero row has D grow by 5e6 a round: from the sixth it would be inf, and inf * 0 poisons all rows
        D = (D * (n / m / row_sq).pow(pp_beta)).clamp(max=1e30)
        U = polar(D * G)
    return U


def tall_balanced_polar(G: Tensor, pp_iterations: int = 2, pp_beta: float = 0.5, polar=cans_polar) -> Tensor:
    """Aurora, release of July 2026: balanced_polar for tall G, whose rows are neurons; polar for all others."""
    return balanced_polar(G, pp_iterations, pp_beta, polar) if G.size(-2) > G.size(-1) else polar(G)


def wide_balanced_polar(G: Tensor, pp_iterations: int = 3, pp_beta: float = 0.25, polar=schatten4_polar) -> Tensor:
    """Aurora as in result #30 of track 3: columns of wide G evened, in three milder rounds; polar for all others."""
    return balanced_polar(G, pp_iterations, pp_beta, polar) if G.size(-2) < G.size(-1) else polar(G)


def paper_balanced_polar(G: Tensor, pp_iterations: int = 2, pp_damping: float = 0.5, polar=cans_polar) -> Tensor:
    """Aurora, Algorithm 3 of arXiv 2606.27715: rows scaled and polar factors taken in turn, for tall G; else polar.

    X = G / ||G||_F, D = 1;   D_i <- D_i^pp_damping ||X_i||^(1 - pp_damping),  X <- polar(sqrt(n / m) D^-1 X);  ...
    The paper writes beta for pp_damping, which pulls the other way from the releases' pp_beta: at 0 each round evens
    the rows wholly. Here polar acts on the last X, there always on G: pp_damping=0 ends with the row norms of
    pp_beta=0.5, and with another U.
    Read from three ports of the algorithm, github.com/NVIDIA-NeMo/Emerging-Optimizers among them.
    """
    m, n = G.shape[-2:]
    if m <= n:
        return polar(G)
    X = G.to(at_least_fp32(G))
    X = X / frobenius(X).clamp(min=1e-7)
    D = torch.ones_like(X[..., :1])
    for _ in range(pp_iterations):
        D = D**pp_damping * row_norms(X).clamp(min=1e-7) ** (1 - pp_damping)
        X = polar((n / m) ** 0.5 * X / D).to(D.dtype)
    return X


def riemannian_balanced_polar(G: Tensor, steps: int = 3, step_size: float = 0.1, polar=polar_express) -> Tensor:
    """Riemannian Aurora: climbs from balanced_polar(G) towards the U of largest <G, U> with U^T U = I and even rows.

    A step goes along the part of G, in units of its mean singular value, that is tangent to both constraints, and
    back onto them by evening rows and taking the polar factor, twice. Wide G is transposed, square G gets `polar`.
    After riemannian_aurora.py of github.com/tilde-research/aurora-release, which starts from polar(G), steps in units
    of G itself and so depends on its scale, and regularises otherwise. 9 polar factors; for studies, not for speed.
    """
    m, n = G.shape[-2:]
    if m == n:
        return polar(G)
    if m < n:
        return riemannian_balanced_polar(G.mT, steps, step_size, polar).mT
    G = G.to(at_least_fp32(G))
    mean_sigma = inner(G, polar(G)) / n
    G = torch.where(mean_sigma == 0, 0, G / mean_sigma.clamp(min=torch.finfo(G.dtype).tiny))
    start = U = balanced_polar(G, polar=polar).to(G.dtype)
    for _ in range(steps):
        U = U + step_size * balanced_tangent(U, G)
        for _ in range(2):
            U = polar((n / m) ** 0.5 * U / row_norms(U).clamp(min=1e-7)).to(G.dtype)
    # where G is of low rank no U may meet both constraints, and the climb may end far below its start, or in NaN
    return torch.where(2 * inner(G, U) > inner(G, start), U, start)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """<X, Y> of each matrix, shape (..., 1, 1)."""
    return (X * Y).sum(dim=(-2, -1), keepdim=True)


def balanced_tangent(U: Tensor, G: Tensor) -> Tensor:
    """The part Z of G that keeps U^T U = I and ||U_i||^2 = n / m to first order: sym(U^T Z) = 0, <U_i, Z_i> = 0.

    Z = G - U S - diag(l) U  with  S = sym(U^T G) - U^T diag(l) U  and  (n / m - P o P) l = q,  P = U U^T,
    q_i = <G_i - (U sym(U^T G))_i, U_i>. Ten steps of conjugate gradients solve for l, up to the constant it is free in.
    """
    m, n = U.shape[-2:]

    def dots(X, Y):
        return (X * Y).sum(dim=-1, keepdim=True)

    def total(X):
        return X.sum(dim=-2, keepdim=True)

    B = U.mT @ G
    B = (B + B.mT) / 2
    q = dots(G - U @ B, U)
    q = q - total(q) / m  # zero but for rounding, along which the operator is nearly singular
    # P o P has row sums ||U_i||^2: with their largest the operator is positive, also where rows are not yet even
    diagonal = dots(U, U).amax(dim=-2, keepdim=True).clamp(min=n / m)
    tiny = torch.finfo(U.dtype).tiny
    solution, residual, search = torch.zeros_like(q), q, q
    for _ in range(10):
        image = diagonal * search - dots(U @ (U.mT @ (search * U)), U)
        size = total(residual**2)
        length = size / total(search * image).clamp(min=tiny)
        solution = solution + length * search
        residual = residual - length * image
        search = residual + total(residual**2) / size.clamp(min=tiny) * search
    multiplier = solution - total(solution) / m
    S = B - U.mT @ (multiplier * U)
    return G - U @ S - multiplier * U

########################################
#                Stages                #
########################################

@stage(makes=("U", "N", "M"), any_shape=True, momentum=whole)
def nesterov(G: Tensor, momentum: Tensor, mu: BelowOne = 0.95) -> tuple[Tensor, ...]:
    """Nesterov momentum: M <- mu M + (1 - mu) G; returns (1 - mu) G + mu M, as U, N and M, and then M itself."""
    # lerp would round the last numbers of a tensor, behind its last whole vector register, otherwise than the others:
    # the result would depend on how a stack is split
    momentum = mu * momentum + (1 - mu) * G
    N = (1 - mu) * G + mu * momentum
    return N, N, N, momentum


@stage(makes=("U", "N", "M"), any_shape=True, fast_momentum=whole, slow_momentum=whole)
def bimaxwell(G: Tensor, fast_momentum: Tensor, slow_momentum: Tensor, mu: BelowOne = 0.95, fast: BelowOne = 0.85,
              slow: BelowOne = 0.98, share: float = 0.4385) -> tuple[Tensor, ...]:
    """Nesterov momentum of two buffers: F <- fast F + (1 - fast) G, S <- slow S + (1 - slow) G, and in place of M
    share F + (1 - share) S. With fast = slow = mu it is nesterov.

    From pull request 339 of the speedrun, which goes over to two buffers at a step of its run: until then fast and
    slow follow mu, and the two are one.
    """
    fast_momentum = fast * fast_momentum + (1 - fast) * G
    slow_momentum = slow * slow_momentum + (1 - slow) * G
    N = (1 - mu) * G + mu * (slow_momentum + share * (fast_momentum - slow_momentum))
    return N, N, N, fast_momentum, slow_momentum


@stage("polar")
def polar_stage(U: Tensor) -> Tensor:
    """Muon (github.com/KellerJordan/Muon): the polar factor."""
    return polar(U).to(U.dtype)


@stage("jordan_polar")
def jordan_polar_stage(U: Tensor) -> Tensor:
    """The polar factor by the quintic of Muon's own code, in bf16."""
    return jordan_polar(U).to(U.dtype)


@stage("schatten4_polar")
def schatten4_polar_stage(U: Tensor) -> Tensor:
    """The polar factor, its input scaled to a Schatten-4 norm of 1, which brings small singular values nearer to 1."""
    return schatten4_polar(U).to(U.dtype)


@stage()
def aurora(U: Tensor, iterations: int = 2, beta: float = 0.5) -> Tensor:
    return balanced_polar(U, iterations, beta).to(U.dtype)


@stage()
def aurora_july(U: Tensor, iterations: int = 2, beta: float = 0.5) -> Tensor:
    return tall_balanced_polar(U, iterations, beta).to(U.dtype)


@stage()
def aurora_paper(U: Tensor, iterations: int = 2, damping: float = 0.5) -> Tensor:
    return paper_balanced_polar(U, iterations, damping).to(U.dtype)


@stage()
def aurora_wide(U: Tensor, iterations: int = 3, beta: float = 0.25) -> Tensor:
    return wide_balanced_polar(U, iterations, beta).to(U.dtype)


@stage()
def riemannian_aurora(U: Tensor, steps: int = 3, step_size: float = 0.1) -> Tensor:
    return riemannian_balanced_polar(U, steps, step_size).to(U.dtype)


def spectral_norm(G: Tensor, iterations: int = 5) -> Tensor:
    """Largest singular value of each matrix, shape (..., 1, 1), from below: power iteration from the ones vector.

    Where rows sum to zero that vector finds nothing: the result is at least ||G||_F / sqrt(min(m, n)), as the largest
    singular value is.
    """
    G = G.to(at_least_fp32(G))
    v = torch.full_like(G[..., :1, :], G.size(-1) ** -0.5)
    for _ in range(iterations):
        # sums of products, not BLAS: its matrix-vector product rounds a stack of one differently
        u = (G * v).sum(dim=-1, keepdim=True)
        u = u / frobenius(u).clamp(min=1e-10)
        v = (G * u).sum(dim=-2, keepdim=True)
        v = v / frobenius(v).clamp(min=1e-10)
    sigma = frobenius((G * v).sum(dim=-1, keepdim=True))
    least = ((G * G).sum(dim=-1, keepdim=True).sum(dim=-2, keepdim=True) / min(G.shape[-2:])).sqrt()
    return torch.where(sigma > 0.99 * least, sigma, least)  # the two may be equal, and rounding is no reason to change


@stage()
def contra(U: Tensor, N: Tensor, strength: float = 0.4) -> Tensor:
    """Contra-Muon: U - strength/2 * N/||N||_2, scaled back to ||U||_F. It damps the directions that N favours.

    Where that would go against N, as it can if a row is far longer than the others, it is U.
    """
    U = U.to(at_least_fp32(U))
    sigma = spectral_norm(N).clamp(min=1e-10)
    Z = U - strength / 2 * N / sigma
    with_N = inner(N, Z) > 0
    length = torch.where(with_N, frobenius(Z), frobenius(U)).clamp(min=1e-10)
    # from U and N anew: a compiled program need not keep Z
    return (U - strength / 2 * N / torch.where(with_N, sigma, torch.inf)) * frobenius(U) / length


def of_schatten4(X: Tensor, Z: Tensor) -> Tensor:
    """Z of X's Schatten-4 norm."""
    return Z * schatten4(X) / schatten4(Z).clamp(min=1e-10)


@stage()
def schatten4_contra(U: Tensor, N: Tensor, strength: float = 0.4) -> Tensor:
    """Contra-Muon as results #20 to #43 have it: U - strength/2 * N/||N||_S4, scaled back to ||U||_S4."""
    return of_schatten4(U, U - strength / 2 * N / schatten4(N).clamp(min=1e-10))


@stage("floor")
def update_weight_floor(U: Tensor, W: Tensor, target: float = 0.35) -> Tensor:
    """U, scaled up where it is shorter than target * ||W||_F. Stands in for weight decay: it bounds ||W||_F instead."""
    return U * (target * frobenius(W).clamp(min=1e-8) / frobenius(U).clamp(min=1e-8)).clamp(min=1)


@stage(second_moment=lambda W: (*W.shape[:-1], 1))
def normuon(U: Tensor, second_moment: Tensor, beta2: BelowOne = 0.95) -> tuple[Tensor, Tensor]:
    """NorMuon (arXiv 2510.05491 and its code): rows scaled by a running mean of their squares, ||U||_F kept.

    v <- beta2 v + (1 - beta2) mean_j U_ij^2;  Z = U / (sqrt(v) + 1e-10);  returns Z ||U||_F / ||Z||_F and v.
    v begins at zero; its shape says what it averages over: (..., M, 1) scales rows, (..., 1, N) columns.
    """
    U, second_moment = with_mean_square(U, second_moment, beta2)
    return of_length(frobenius(U), U / (second_moment.sqrt() + 1e-10)), second_moment


@stage(second_moment=lambda W: (W[..., :1] if W.size(-2) >= W.size(-1) else W[..., :1, :]).shape)
def normuon_lite(U: Tensor, second_moment: Tensor, beta2: BelowOne = 0.95) -> tuple[Tensor, Tensor]:
    """NorMuon as results #9, #10 and #11 of track 3 have it: the square root's argument is at least 1e-10."""
    U, second_moment = with_mean_square(U, second_moment, beta2)
    return of_length(frobenius(U), U / second_moment.clamp(min=1e-10).sqrt()), second_moment


@stage(second_moment=lambda W: (W[..., :1] if W.size(-2) >= W.size(-1) else W[..., :1, :]).shape)
def schatten4_normuon_lite(U: Tensor, second_moment: Tensor, beta2: BelowOne = 0.95) -> tuple[Tensor, Tensor]:
    """normuon_lite, but that U keeps its Schatten-4 norm: results #20 and #29."""
    U, second_moment = with_mean_square(U, second_moment, beta2)
    return of_schatten4(U, U / second_moment.clamp(min=1e-10).sqrt()), second_moment


def with_mean_square(U: Tensor, second_moment: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    U = U.to(at_least_fp32(U))
    over = -1 if second_moment.size(-1) == 1 else -2
    return U, second_moment.lerp(U.square().mean(dim=over, keepdim=True), 1 - beta2)


def of_length(length: Tensor, Z: Tensor) -> Tensor:
    return Z * length / frobenius(Z).clamp(min=1e-10)


@stage()
def u_normuon(U: Tensor) -> Tensor:
    """U-NorMuon, without state: every row of a polar factor gets the length that even rows have, min(1, sqrt(n / m)).

    Even rows at the cost of orthogonality: where Aurora scales rows before the polar factor, this does so after it.
    From the blog of Aurora's authors, blog.tilderesearch.com/blog/aurora, as others report it.
    """
    m, n = U.shape[-2:]
    U = U.to(at_least_fp32(U))
    return min(1, n / m) ** 0.5 * U / row_norms(U).clamp(min=1e-10)


def row_pairs(W: Tensor) -> tuple:
    return (*W.shape[:-1], W.size(-2))


def column_pairs(W: Tensor) -> tuple:
    return (*W.shape[:-2], W.size(-1), W.size(-1))


def started(Q: Tensor) -> Tensor:
    """A basis, or the identity where there is none yet: the state begins at zero."""
    none = frobenius(Q[..., :1]) == 0
    return torch.where(none, torch.eye(Q.size(-1), dtype=Q.dtype, device=Q.device), Q)


def next_bases(row_covariance, row_basis, column_covariance, column_basis, second_moment) -> dict[str, Tensor]:
    """One step of orthogonal iteration, Q <- the Q of QR(C Q), its columns ordered by falling (Q^T C Q)_jj before; the
    second moment, whose places are pairs of them, is reordered alike. The QR of 0 is the identity."""
    orders, bases = [], []
    for C, Q in ((row_covariance, started(row_basis)), (column_covariance, started(column_basis))):
        image = C @ Q
        order = (Q * image).sum(dim=-2).argsort(dim=-1, descending=True, stable=True)
        bases.append(torch.linalg.qr(image.take_along_dim(order.unsqueeze(-2), dim=-1)).Q)
        orders.append(order)
    second_moment = second_moment.take_along_dim(orders[0].unsqueeze(-1), dim=-2)
    return dict(row_basis=bases[0], column_basis=bases[1],
                second_moment=second_moment.take_along_dim(orders[1].unsqueeze(-2), dim=-1))


@stage(makes=("U", "N", "L", "R"), after=next_bases, row_covariance=row_pairs, row_basis=row_pairs,
       column_covariance=column_pairs, column_basis=column_pairs, second_moment=whole)
def soap(U: Tensor, G: Tensor, row_covariance: Tensor, row_basis: Tensor, column_covariance: Tensor,
         column_basis: Tensor, second_moment: Tensor, beta2: BelowOne = 0.9, beta: BelowOne = 0.9, every: int = 1,
         least: Constant = 0.0, share: Constant = 1.0):
    """SOAP (arXiv 2409.11321) as results #44 to #46 of track 3 have it, before a polar factor.

    In the bases L, R of the last step, Y = L^T U R,  v <- beta2 v + (1 - beta2) Y^2,  P = L (Y / sqrt(v)) R^T, which
    gets U's Schatten-4 norm. Then the covariances take in the gradient, C <- beta C + (1 - beta) G G^T, of columns
    G^T G. The second moment is of the momentum, not of the gradient, and nothing is corrected for its start at zero.
    The bases follow the covariances after the first step and every so many from there.

    For attn.v results #20 to #43 let no sqrt(v) be below `least` times their root mean square, and take share P +
    (1 - share) U before P gets U's norm: as P has no scale, U's part in it depends on the gradients'.
    """
    L, R = started(row_basis), started(column_basis)
    Y = L.mT @ U @ R
    second_moment = beta2 * second_moment + (1 - beta2) * Y.square()
    v = second_moment.clamp(min=1e-16)
    if least:
        v = torch.maximum(v, least**2 * v.mean(dim=(-2, -1), keepdim=True))
    P = L @ (Y / v.sqrt()) @ R.mT
    if share != 1:
        P = share * P + (1 - share) * U
    P = P * schatten4(U).clamp(min=1e-8) / schatten4(P).clamp(min=1e-8)
    return (P, P, L, R, beta * row_covariance + (1 - beta) * G @ G.mT, row_basis,
            beta * column_covariance + (1 - beta) * G.mT @ G, column_basis, second_moment)


@stage(makes=("U", "N"))
def trust_gate(U: Tensor, M: Tensor, G: Tensor, floor: float = 0.0, cap: float = 1.0, share: float = 1.0):
    """M + share g (U - M), of M's Schatten-4 norm, as far as U can be trusted: result #44, for attn.proj.

    g = cos(U, G) / cos(M, G), in [0, 1], times (cos(U, M) - 0.2) / 0.8, in [0, 1]; at least floor and at most cap.
    """
    def cosine(X, Y):
        return inner(X, Y) / (frobenius(X) * frobenius(Y)).clamp(min=1e-8)
    alike = ((cosine(U, M) - 0.2) / 0.8).clamp(0, 1)
    downhill = (cosine(U, G) / cosine(M, G).clamp(min=1e-8)).clamp(0, 1)
    g = (alike * downhill).clamp(min=floor).clamp(max=cap)
    P = M + g * (U - M)
    P = P * schatten4(M).clamp(min=1e-8) / schatten4(P).clamp(min=1e-8)
    U = U + share * (P - U)
    return U, U


@stage(row_covariance=row_pairs, column_covariance=column_pairs)
def anneal(U: Tensor, G: Tensor, L: Tensor, R: Tensor, row_covariance: Tensor, column_covariance: Tensor,
           ratio: UpToOne, exponent: float = 0.25, forget: BelowOne = 0.01) -> tuple[Tensor, ...]:
    """Spectral annealing: L (ratio^(exponent x) o L^T U R) R^T of U's length, x_ij: log (L^T A L)_ii + log (R^T B R)_jj
    less its mean, over its deviation and within [-2, 2]; A and B are running means of G G^T and G^T G that begin with
    the first step at which ratio is below 1. Where gradients are large, steps shrink before the rate does.

    From the open claim of 2540 steps, github.com/jn2clark/modded-nanogpt: ratio is the rate over its largest.
    """
    def averaged(C, new):
        return torch.where(frobenius(C) == 0, new, (1 - forget) * C + forget * new) * (ratio < 1)

    def log_variances(C, Q):
        return (Q * (C @ Q)).sum(dim=-2).clamp(min=1e-30).log()
    A, B = averaged(row_covariance, G @ G.mT), averaged(column_covariance, G.mT @ G)
    x = log_variances(A, L).unsqueeze(-1) + log_variances(B, R).unsqueeze(-2)
    x = x - x.mean(dim=(-2, -1), keepdim=True)
    x = (x / x.std(dim=(-2, -1), keepdim=True).clamp(min=1e-6)).clamp(-2, 2)
    return of_length(frobenius(U), L @ (L.mT @ U @ R * ratio ** (exponent * x)) @ R.mT), A, B


@stage()
def aspect(U: Tensor) -> Tensor:
    """sqrt(max(1, m / n)) U: Muon's factor for a tall matrix, whose polar factor has smaller entries."""
    return U * max(1, U.size(-2) / U.size(-1)) ** 0.5


@stage(makes=("W",), any_shape=True)
def decay(W: Tensor, lr, rate: float) -> Tensor:
    """(1 - lr rate) W: weight decay, decoupled."""
    return (1 - lr * rate) * W


@stage(makes=("W",), any_shape=True)
def step(W: Tensor, U: Tensor, lr) -> Tensor:
    """W - lr U."""
    return W - lr * U


@stage()
def row_floor(U: Tensor, W: Tensor, target: float = 0.3825) -> Tensor:
    """update_weight_floor row by row: each row is at least target times as long as its row of W."""
    return U * (target * row_norms(W).clamp(min=1e-8) / row_norms(U).clamp(min=1e-8)).clamp(min=1)


@stage()
def brake(U: Tensor, W: Tensor, outward: float = 0.5) -> Tensor:
    """U - (1 - outward) min(c, 0) W,  c = <U, W> / ||W||_F^2: W moves by -lr U, so that c < 0 lengthens it."""
    along = inner(U, W) / frobenius(W).square().clamp(min=1e-12)
    return U - (1 - outward) * along.clamp(max=0) * W


@stage(makes=("W",))
def pin(W: Tensor, W0: Tensor, U: Tensor, lr) -> Tensor:
    """W of length r - lr <U, W0> / r,  r = ||W0||_F: the part of the step across W0 does not lengthen W."""
    before = frobenius(W0).clamp(min=1e-8)
    after = (before - lr * inner(U, W0) / before).clamp(min=1e-8)
    return W * after / frobenius(W).clamp(min=1e-8)


@stage(makes=("W",), any_shape=True)
def cautious_decay(W: Tensor, W0: Tensor, U: Tensor, lr, rate: float) -> Tensor:
    """(1 - lr rate) W in the places where U W0 > 0, that is where the step shrinks the weight; W in all others."""
    return W * (1 - lr * rate * (U * W0 > 0).to(W.dtype))


@stage(makes=("W",))
def hyperball(W: Tensor, U: Tensor, lr) -> Tensor:
    """W - lr r U / ||U||_F, brought back to the length r = ||W||_F: MuonH, result #5 of track 3."""
    length = frobenius(W)
    moved = W - lr * length * U / frobenius(U).clamp(min=1e-10)
    return moved * length / frobenius(moved).clamp(min=1e-10)


@stage(makes=("W",), any_shape=True, in_place=True, exp_avg=whole, exp_avg_sq=whole)
def adamw(W: Tensor, G: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr, t,
          beta1: BelowOne = 0.9, beta2: BelowOne = 0.999, eps: float = 1e-8, decay: float = 0.01):
    """AdamW (arXiv 1711.05101), in place: torch's fused kernel, which a chain of operations would take 6 times as long
    to equal on a CPU. State is in W's dtype, as torch's. `t` is a tensor on W's device."""
    # matrix by matrix: on a CPU the last numbers of a tensor round otherwise, and a stack must round as its matrices do
    tensors = [list(X) if X.ndim == 3 else [X] for X in (W, G, exp_avg, exp_avg_sq)]
    torch_adamw(*tensors, [], [t - 1 for _ in tensors[0]], fused=True, capturable=W.is_cuda, amsgrad=False,
                lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, maximize=False)
    return W, exp_avg, exp_avg_sq


@stage(any_shape=True, mean=whole, mean_square=whole)
def raw_adam(G: Tensor, mean: Tensor, mean_square: Tensor, beta1: BelowOne = 0.8, beta2: BelowOne = 0.99,
             eps: float = 1e-10) -> tuple[Tensor, ...]:
    """Adam's update with its moments as they are: m <- beta1 m + (1 - beta1) G, v <- beta2 v + (1 - beta2) G^2,
    U = m / (sqrt(v) + eps). Result #44's of vectors. It is Adam's times (1 - beta1^t) / sqrt(1 - beta2^t): at
    beta2 = 0.997 up to 5.5 times as fast a start."""
    mean = beta1 * mean + (1 - beta1) * G
    mean_square = beta2 * mean_square + (1 - beta2) * G.square()
    return mean / (mean_square.sqrt() + eps), mean, mean_square


def next_eigenbasis(covariance, basis, mean, mean_square) -> dict[str, Tensor]:
    """The covariance's eigenvectors, and the moments in them: with T = Q_old^T Q_new, m T and v (T o T). On a GPU
    torch's eigh has the host wait, as it looks whether it has converged."""
    Q = torch.linalg.eigh(covariance).eigenvectors  # of 0 they are the identity
    T = started(basis).mT @ Q
    return dict(basis=Q, mean=mean @ T, mean_square=mean_square @ T.square())


@stage(after=next_eigenbasis, across=("covariance",), covariance=column_pairs, basis=column_pairs, mean=whole,
       mean_square=whole)
def eigen_adam(G: Tensor, covariance: Tensor, basis: Tensor, mean: Tensor, mean_square: Tensor, t,
               beta1: BelowOne = 0.8, beta2: BelowOne = 0.99, eps: float = 1e-10, start: int = 1000, every: int = 8,
               forget: BelowOne = 0.05) -> tuple[Tensor, ...]:
    """Adam in the eigenbasis Q of C, a running mean of G^T G over all rows of a parameter: SOAP of one side, for the
    head in the open claims of 2560 and 2540 steps, github.com/jn2clark/modded-nanogpt.

    Y = G Q,  m <- beta1 m + (1 - beta1) Y,  v <- beta2 v + (1 - beta2) Y^2,  and U is
    (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) Q^T.  Up to step `start` Q is the identity and U Adam's. C
    begins with the G^T G of the step after it; Q follows after step 1 and every so many from there, and takes m and v
    with it. The claim's program has Q follow C before a step, not after it.
    """
    t = torch.as_tensor(t, dtype=G.dtype)
    Q = started(basis)
    Y = G @ Q
    mean = beta1 * mean + (1 - beta1) * Y
    mean_square = beta2 * mean_square + (1 - beta2) * Y.square()
    U = mean / (1 - beta1**t) / ((mean_square / (1 - beta2**t)).sqrt() + eps)
    new = G.mT @ G
    covariance = torch.where(t > start + 1, (1 - forget) * covariance + forget * new, new * (t > start))
    return U @ Q.mT, covariance, basis, mean, mean_square


def at_point(point: Tensor) -> Tensor:
    return point


@stage(makes=("W",), any_shape=True, views=dict.fromkeys(("val_loss", "val_ema_loss"), at_point), point=whole,
       drift=whole)
def lookahead(W: Tensor, W0: Tensor, point: Tensor, drift: Tensor, t, size: float = 0.3, forget: float = 0.01):
    """W + size b: the next gradient is taken, and the next step made, ahead of W, where b is a running mean of W's
    movement, b <- (1 - forget) b + forget (W - W before). Validation sees W itself.

    EMA-Nesterov, results #39 and #40. A constant drift d becomes d / (1 - size); what oscillates is left alone. Step t
    ends with the move, whose size is the knob's after t - 1 steps: #46, which moves before the gradients of the steps
    that have 300 to 1949 before them, is between(..., 299, 1949).
    """
    before = torch.where(torch.as_tensor(t) == 1, W0, point)
    drift = (1 - forget) * drift + forget * (W - before)
    return W + size * drift, W, drift


def blended(W: Tensor, average: Tensor, share) -> Tensor:
    return W + share * (average - W)


def extrapolated(W: Tensor, average: Tensor, anchor) -> Tensor:
    return W + anchor * (W - average)


@stage(makes=(), any_shape=True, views=dict(val_ema_loss=blended), average=whole)
def tail_average(W: Tensor, average: Tensor, t, start: int = 2400, steps: int = 150, share: float = 0.6):
    """e <- e + (W - e) / steps after step `start`, where it begins with W. Validation sees W as it is, and then, as
    val_ema_loss, W + share (e - W). No step depends on it. Results #45 and #46."""
    return torch.where(torch.as_tensor(t) <= start, W, average + (W - average) / steps),


@stage(makes=(), any_shape=True, views=dict(val_ema_loss=blended, training=extrapolated), average=whole)
def anchored_average(W: Tensor, average: Tensor, t, start: int = 2040, steps: int = 150, share: float = 0.6,
                     anchor: float = 0.45):
    """tail_average, and the gradient is taken at W + anchor (W - e), to move W: pull request 377."""
    return tail_average(W, average, t, start, steps)

########################################
#               Sharing                #
########################################

# the same functions, renamed in torch 2.13
all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Shares(NamedTuple):
    """Slots, such as the matrices of a stack, shared out over the ranks: each owns an equal run of them, of `share`
    slots. Tensors of slots are padded to rank * share, so the last ranks may own padding, or nothing else."""
    count: int
    share: int
    rank: int
    world: int
    group: object = None  # a torch.distributed.ProcessGroup; None for the default one

    @classmethod
    def of(cls, count: int, multiple: int = 1, group=None) -> "Shares":
        """Of the ranks of a process group, by default of all; of one without any. `multiple` divides a share."""
        several = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(group), dist.get_world_size(group)) if several else (0, 1)
        return cls(count, -(-count // (world * multiple)) * multiple, rank, world, group)

    @property
    def mine(self) -> slice:
        return slice(self.rank * self.share, (self.rank + 1) * self.share)

    @property
    def padded(self) -> int:
        return self.world * self.share

    def reduce(self, slots: Tensor):
        """Start to sum over ranks what each owns, in place. None where there is one rank: gloo would still copy, in a
        thread that competes for the cores (on two cores a step of the tiny recipe took 166 ms, not 118)."""
        return reduce_scatter(slots[self.mine], slots, group=self.group, async_op=True) if self.world > 1 else None

    def gather(self, slots: Tensor):
        """Start to send what each owns to all ranks, in place; None where there is one rank."""
        return all_gather(slots, slots[self.mine], group=self.group, async_op=True) if self.world > 1 else None

    def total(self, mine: Tensor) -> Tensor:
        """Collective: the sum over all slots, (1, ...), of what each rank has of its own. Their order is that of the
        slots, so that the sum has the same bits for every number of ranks."""
        slots = mine.new_zeros(self.padded, *mine.shape[1:])
        slots[self.mine] = mine
        if work := self.gather(slots):
            work.wait()
        return slots[:self.count].sum(dim=0, keepdim=True)

    def take(self, slots: Tensor) -> Tensor:
        """This rank's run of `count` slots, with zeros for padding."""
        mine = slots[self.mine]
        return torch.cat([mine, mine.new_zeros(self.share - len(mine), *mine.shape[1:])])


########################################
#             torch.optim              #
########################################

class Aurora(torch.optim.Optimizer):
    """An update rule as a member of torch.optim, for the 2-D weights of hidden layers. Defaults: result #17.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 32), torch.nn.Flatten(),
    ...                             torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 100))
    >>> matrices = [layer.weight for layer in (model[2], model[4])]
    >>> others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    >>> optimizers = [Aurora(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]
    >>> cooldown = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 50) for o in optimizers]
    >>> inputs, targets = torch.randint(100, (64, 4)), torch.arange(64)
    >>> for step in range(50):
    ...     loss = torch.nn.functional.cross_entropy(model(inputs), targets)
    ...     loss.backward()  # then all-reduce the gradients, if there are several processes
    ...     for part in optimizers + cooldown:
    ...         part.step()
    ...     model.zero_grad()
    >>> loss.item() < 0.1
    True

    `update` is a rule of the language of rules.py, checked when the group is added; groups may have rules
    of their own. A convolution's filters can share their memory with a matrix that is optimized in their place: m =
    torch.nn.Parameter(conv.weight.detach().flatten(1)), and before each step m.grad = conv.weight.grad.flatten(1).

    Needs the sum, or the mean, of the ranks' gradients: all-reduce them, as DistributedDataParallel does. Parameters of
    one shape form a stack; each rank owns an equal run of the stack, keeps the state of those matrices alone, in fp32,
    updates them in batched calls, and gathers the others' weights. Only their owner reads their gradients. The number
    of ranks changes no bit of the result on the CPU, and on GPUs nothing but what a batched product may round
    differently for another size of stack. On a GPU the first step compiles, for each shape of a stack. Gradients are
    not changed.

    Where there are several ranks, step() is a collective. The first one compares their weights, as does the next one
    after any of them has added a group or loaded a state, and each one which parameters have a gradient; what does not
    fit is a ValueError on all of them. Ranks that have weights of their own say so:
    process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True).

    state_dict() is none: it returns at once on any rank. Before, all ranks call consolidate_state_dict(), which gathers
    the state on rank 0 (or `to` another, or on all: to=None) up to the next step; without it, a rank that lacks a part
    raises RuntimeError. Any number of ranks can load the result. Lightning does so by itself. accelerate needs the
    call before save_state(), and transformers' Trainer needs it in a callback, as its rank 0 saves alone:

        class Consolidate(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, optimizer, **others):
                if control.should_save:
                    optimizer.optimizer.consolidate_state_dict()
            on_epoch_end = on_step_end
    """

    process_group = None
    _compared = 0  # how many parameters the ranks had when they were last found to begin with the same
    _new = True  # whether a group or a state has been added since
    _consolidated = False  # whether the state has been, since the last step

    def __init__(self, params, lr: float = 0.0375, update: str = RESULT_17, process_group=None):
        self.process_group = process_group
        if self._shares([]).rank < 0:
            raise ValueError("this rank is not in Aurora's process_group: give the group to its members alone")
        super().__init__(params, dict(lr=lr, update=update))

    def __getstate__(self) -> dict:
        return super().__getstate__() | dict(process_group=self.process_group)

    def __deepcopy__(self, memo) -> "Aurora":
        memo[id(self)] = twin = type(self).__new__(type(self))
        memo[id(self.process_group)] = self.process_group  # it cannot be copied: the twin's ranks are the same
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            check_settings(self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                check_parameter(p)
        except ValueError:
            del self.param_groups[-1]
            raise
        self._new = True

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = self._moving()
        self._forget()
        travelling = []  # one stack's weights travel while the next one is computed
        for group in self.param_groups:
            for params in stacks(group["params"]):
                if moving.isdisjoint(params):
                    continue
                shares = self._shares(params)
                weights = params[0].new_empty(shares.padded, *params[0].shape)
                alike = {}  # by the number of their steps: parameters without a gradient stand still
                for new, p in zip(weights[shares.mine], params[shares.mine]):
                    if p in moving:
                        alike.setdefault(self._steps(p), []).append((new, p))
                for steps, pairs in alike.items():
                    for k in range(0, len(pairs), at_once(weights)):
                        self._update(*zip(*pairs[k:k + at_once(weights)]), steps, group)
                for p in moving.intersection(params):
                    self.state[p]["step"] = self._steps(p) + 1  # on every rank
                travelling.append((params, weights, moving, shares.gather(weights)))
                if len(travelling) > 1:
                    arrive(*travelling.pop(0))
        for stack in travelling:
            arrive(*stack)
        return loss

    def _update(self, out, params, steps: int, group):
        """Put the new weights of parameters of one shape, each after `steps` steps, into `out`."""
        rule = Rule.of(group["update"])
        W = torch.stack(params)
        lr = group["lr"] if W.is_cuda else float(group["lr"])  # of a tensor too; on a GPU that would wait for it
        knobs = dict(lr=lr, t=torch.tensor(steps + 1.0, dtype=torch.float32, device=W.device)) | rule.at(steps)
        if W.is_cuda:  # a number would be a constant of the program, which would be compiled again for the next one
            knobs = {name: torch.as_tensor(x, dtype=torch.float32, device=W.device).reshape(())
                     for name, x in knobs.items()}
        for p in params:
            if not self.state.get(p):
                self.state[p] = rule.state(p)
        state = {name: torch.stack([self.state[p][name] for p in params])
                 for name in self.state[params[0]] if name != "step"}
        device = W.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            rule.advance_(W, torch.stack([p.grad for p in params]), state, knobs)
            rule.after_(state, steps + 1)
        torch._foreach_copy_(list(out), list(W))
        for name, x in state.items():
            torch._foreach_copy_([self.state[p][name] for p in params], list(x))

    # What a rank owns, and what it may assume of the others

    def _shares(self, params) -> Shares:
        return Shares.of(len(params), group=self.process_group)

    def _owners(self) -> dict[Tensor, int]:
        """The rank that owns each parameter, in their order; empty ones have none."""
        owners = {p: i // self._shares(stack).share for group in self.param_groups
                  for stack in stacks(group["params"]) for i, p in enumerate(stack)}
        return {p: owners[p] for group in self.param_groups for p in group["params"] if p in owners}

    def _mine(self) -> set[Tensor]:
        rank = self._shares([]).rank
        return {p for p, owner in self._owners().items() if owner == rank}

    def _names(self) -> dict[Tensor, str]:
        """What messages call the parameters."""
        return {p: repr(group["param_names"][i]) if "param_names" in group else
                f"parameter {i} of group {g}, of shape {tuple(p.shape)},"
                for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])}

    def _steps(self, p: Tensor) -> int:
        return self.state[p].get("step", 0) if p in self.state else 0

    def _lacking(self) -> list[Tensor]:
        """Parameters that have moved and whose state is elsewhere."""
        return [p for group in self.param_groups for p in group["params"]
                if self._steps(p) and expected_state(group["update"], p).keys() - self.state[p].keys()]

    def _moving(self) -> set[Tensor]:
        """The parameters that have a gradient: all ranks agree on them, or all raise the same ValueError."""
        owners, (rank, world) = self._owners(), self._shares([])[2:4]
        flags = [(p.grad is not None, p.grad is None and owner == rank,
                  p.grad is not None and p.grad.layout != torch.strided) for p, owner in owners.items()]
        if world > 1:
            # of as many parameters as all ranks know of: where one has others by now, the first number says so
            new = self._new or len(owners) != self._compared
            some_new, sums = self._sums(new, [(0, 0, 0)] * self._compared if new else flags)
            if some_new:
                self._compare()
                _, sums = self._sums(False, flags)
            flags = sums
        for (p, owner), (has, lacks, sparse) in zip(owners.items(), flags):
            if sparse:
                raise ValueError(f"{self._names()[p]} has a sparse gradient, and Aurora takes dense ones: an embedding "
                                 "makes them with sparse=False")
            if has and lacks:
                raise ValueError(f"{self._names()[p]} has a gradient on another rank and none on rank {owner}, which "
                                 "owns it: all-reduce gradients before the step, with zeros where a rank has none")
        return {p for p, (has, _, _) in zip(owners, flags) if has}

    def _sums(self, new: bool, flags: list[tuple]) -> tuple[int, list[list[int]]]:
        """A collective: sums over the ranks, of whether one has something new and of the flags of each parameter."""
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        counts = torch.tensor([(new, 0, 0), *flags], dtype=torch.int32, device=device)
        dist.all_reduce(counts, group=self.process_group)
        (some_new, _, _), *sums = counts.tolist()
        return some_new, sums

    def _compare(self):
        """A collective: ValueError on all ranks alike where they do not begin with the same parameters."""
        names, updates = self._names(), {p: group["update"] for group in self.param_groups for p in group["params"]}
        seen = [(names[p], dict(shape=tuple(p.shape), dtype=str(p.dtype), update=updates[p], steps=self._steps(p),
                                weights=checksum(p))) for p in self._owners()]
        ranks = [None] * self._shares([]).world
        dist.all_gather_object(ranks, seen, group=self.process_group)
        for rank, theirs in enumerate(ranks):
            if len(theirs) != len(ranks[0]):
                raise ValueError(f"rank {rank} gave Aurora {len(theirs)} matrices and rank 0 {len(ranks[0])}: all "
                                 "ranks of its process_group give the same")
            for (name, first), (_, other) in zip(ranks[0], theirs):
                for what in first:
                    if first[what] != other[what]:
                        values = "" if what == "weights" else f", {other[what]!r} and not {first[what]!r}"
                        raise ValueError(f"{name} has other {what} on rank {rank} than on rank 0{values}: give all "
                                         "ranks rank 0's before the first step, or Aurora a process_group of the ranks "
                                         "that share their weights (its docstring says how)")
        self._compared, self._new = len(seen), False

    # State

    def consolidate_state_dict(self, to: int | None = 0):
        """A collective: up to the next step, state_dict() is whole on rank `to` of the group, or on all of them (None).
        What other ranks own is put into CPU memory."""
        rank, world = self._shares([])[2:4]
        if world == 1:
            return
        owners, everyone = self._owners(), [None] * world
        mine = {i: {name: x.cpu() if isinstance(x, Tensor) else x for name, x in self.state[p].items()}
                for i, (p, owner) in enumerate(owners.items()) if owner == rank and self._steps(p)}
        if to is None:
            dist.all_gather_object(everyone, mine, group=self.process_group)
        else:
            dist.gather_object(mine, everyone if rank == to else None, group=self.process_group,
                               dst=dist.get_global_rank(self.process_group or dist.group.WORLD, to))
        params = list(owners)
        for other, states in enumerate(everyone):
            if other != rank:
                for i, state in (states or {}).items():
                    self.state[params[i]] = state
        self._consolidated = True

    def _forget(self):
        """What other ranks own, where a consolidation brought it."""
        if self._consolidated:
            mine = self._mine()
            for p in self.state.keys() - mine:
                self.state[p] = dict(step=self._steps(p))
            self._consolidated = False

    def state_dict(self) -> dict:
        if not self._consolidated and (lacking := self._lacking()):
            raise RuntimeError(f"the state of {len(lacking)} of {len(self._owners())} matrices is on other ranks: have "
                               "all ranks call consolidate_state_dict() before (its docstring says how in frameworks)")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict):
        loaded = {}
        # next to torch's own reading: other hooks change the dictionary before, and see the result
        hooks = [self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(self._read(final))),
                 self.register_load_state_dict_post_hook(lambda _: self._take(loaded), prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, state_dict: dict) -> dict[Tensor, dict]:
        """The state of each parameter, by the order of the saved groups' params, which may be numbers or names.
        ValueError where it is not what the saved rule needs."""
        states, names = {}, self._names()
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            if missing := {"lr", "update"} - saved.keys():
                raise ValueError(f"that is no state of Aurora's: a group has no {min(missing)}")
            check_settings(saved)
            for p, key in zip(group["params"], saved["params"]):
                if state := state_dict["state"].get(key):
                    for name, shape in (dict(step=None) | expected_state(saved["update"], p)).items():
                        if name not in state:
                            raise ValueError(f"{names[p]} has no {name} in that state: was it saved by one rank of "
                                             "several without consolidate_state_dict(), or by another optimizer?")
                        if shape is not None and state[name].shape != shape:
                            raise ValueError(f"{names[p]} has {name} of shape {tuple(state[name].shape)} in that "
                                             f"state, not {tuple(shape)}: it is of others, or in another order")
                    states[p] = state
        return states

    def _take(self, states: dict[Tensor, dict]):
        """Keep what this rank owns. torch has cast all to the parameters' dtype, bf16 perhaps, and is overwritten."""
        mine = self._mine()
        self.state.clear()
        for p, state in states.items():
            kept = {name: x.to(p.device, copy=True) if isinstance(x, Tensor) else x
                    for name, x in state.items() if name != "step" and p in mine}
            self.state[p] = kept | dict(step=int(state["step"]))
        self._new, self._consolidated = True, False


def stacks(params) -> list[list]:
    """Lists of parameters that are alike in shape, dtype and device; the largest first, empty ones left out."""
    alike = {}
    for p in params:
        if p.numel():
            alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
    return sorted(alike.values(), key=lambda stack: -stack[0].numel())


def arrive(params, weights: Tensor, moving: set, work):
    """Put gathered weights into the parameters that move."""
    if work is not None:
        work.wait()
    moved = [(p, w) for p, w in zip(params, weights) if p in moving]
    torch._foreach_copy_(*map(list, zip(*moved)))


def checksum(p: Tensor) -> int:
    """The sum of a tensor's bits, as whole numbers: the same in any order."""
    return p.detach().contiguous().view(WHOLE[p.dtype]).sum(dtype=torch.int64).item()


WHOLE = {torch.float64: torch.int64, torch.float32: torch.int32,
         torch.bfloat16: torch.int16, torch.float16: torch.int16}


def expected_state(text: str, p: Tensor) -> dict[str, torch.Size]:
    """{name: shape} of what a rule keeps of a parameter."""
    return {name: x.shape for name, x in Rule.of(text).state(torch.empty_like(p, device="meta")).items()}


def check_settings(group: dict):
    """ValueError where a group's settings are not what a step can use."""
    lr, update = group["lr"], group["update"]
    if not isinstance(lr, Real | Tensor) or isinstance(lr, Tensor) and lr.numel() != 1 or not 0 <= lr < float("inf"):
        raise ValueError(f"lr is a number, finite and not negative, not {lr!r}")
    if not isinstance(update, str):
        raise ValueError(f"update is a text such as {RESULT_17!r}, not {update!r}")
    rule = Rule.of(update)
    if rule.views or rule.knobs(Named):
        raise ValueError(f"update={update!r}: Aurora has no lookahead and no average, which need a model that is "
                         "another while it is validated, and no names(), in whose place groups stand")


def check_parameter(p: Tensor):
    """ValueError where Aurora cannot update it."""
    if hasattr(p, "device_mesh"):
        raise ValueError(f"Aurora updates whole matrices, got a DTensor of shape {tuple(p.shape)}, in pieces "
                         "on several ranks: use DistributedDataParallel in place of fully_shard or tensor parallelism")
    if p.ndim != 2:
        raise ValueError(f"Aurora updates matrices, got a parameter of shape {tuple(p.shape)}: give vectors "
                         "and embeddings to AdamW, and convolutions as matrices (see Aurora's docstring)")
    if p.dtype not in WHOLE or p.layout != torch.strided:
        raise ValueError(f"Aurora updates dense matrices of float16, bfloat16, float32 or float64, got a parameter of "
                         f"shape {tuple(p.shape)} of {p.dtype}, {p.layout}")


########################################
#             Diagnostics              #
########################################

def leverage_scores(X: Tensor) -> Tensor:
    """diag(X (X^T X)^-1 X^T), shape (..., M): squared row norms of X's polar factor, by QR. In [0, 1], of sum rank X.

    X has full rank; a neuron's share of its layer's update. Even scores are n / m on tall X, 1 on others.
    """
    return torch.linalg.qr(X.to(at_least_fp32(X))).Q.square().sum(dim=-1)


def row_norm_cv(X: Tensor) -> Tensor:
    """Coefficient of variation of the row norms: their (population) deviation over their mean."""
    rows = row_norms(X).squeeze(-1)
    return rows.std(dim=-1, correction=0) / rows.mean(dim=-1)


def orthogonality_defect(U: Tensor) -> Tensor:
    """||U^T U - I||_F / n, of the smaller side: the paper's normalisation, which shrinks as n grows."""
    U = U.to(at_least_fp32(U))
    U = U if U.size(-2) >= U.size(-1) else U.mT
    n = U.size(-1)
    return frobenius(U.mT @ U - torch.eye(n, dtype=U.dtype, device=U.device))[..., 0, 0] / n


def alignment(U: Tensor, G: Tensor) -> Tensor:
    """<G, U> / ||G||_*: first-order decrease per unit of spectral norm, 1 for the polar factor of G and below else."""
    G = G.to(at_least_fp32(G))
    return (G * U).sum(dim=(-2, -1)) / torch.linalg.matrix_norm(G, "nuc")
