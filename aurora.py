"""Aurora with Contra-Muon and the update/weight floor, the optimizer of result #17, and its family: Muon, NorMuon,
U-NorMuon and four more forms of Aurora.

Pure functions first; each takes single matrices (M, N) or stacks (K, M, N) in torch's layout (out_features,
in_features) and changes none of its inputs. With W a weight, G its gradient, M its momentum, a step is

    M <- mu M + (1 - mu) G,    N = (1 - mu) G + mu M               Nesterov momentum
    U  = balanced_polar(N)                                         or the polar factor of another direction
    U <- contra(U, N)
    U <- normuon(U)                                                where the direction says so
    U <- update_weight_floor(U * sqrt(max(1, m / n)), W)
    W <- (1 - lr wd) W - lr U

Sources: Muon, github.com/KellerJordan/Muon; Aurora, arXiv 2606.27715 and github.com/tilde-research/aurora-release;
NorMuon, arXiv 2510.05491; Contra-Muon, nilin.github.io/contra-muon-and-soft-muon; the floor and every epsilon,
github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, result #17.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.newton_schulz import newton_schulz

# the same function, renamed in torch 2.13
all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


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


def at_least_fp32(X: Tensor) -> torch.dtype:
    return torch.promote_types(X.dtype, torch.float32)


def schatten4(X: Tensor) -> Tensor:
    """||X||_S4 = ||X^T X||_F^(1/2), shape (..., 1, 1): between the spectral norm and the Frobenius norm."""
    X = X.to(at_least_fp32(X))
    return frobenius(X.mT @ X if X.size(-2) > X.size(-1) else X @ X.mT).sqrt()


def polar(G: Tensor, coefficients=SIMPLE_QUINTIC_12, dtype=torch.bfloat16, norm=frobenius) -> Tensor:
    """U V^T of the thin SVD G = U S V^T, approximately, computed and returned in `dtype`. polar(0) = 0.

    Newton-Schulz moves each singular value s to p(...p(s / norm(G))). Those above 1e-3 norm(G) end within 5e-6 of 1
    with the record's table, 1e-14 with POLAR_EXPRESS_8 or CANS_12, .53 with QUINTIC_5, in exact arithmetic; smaller
    ones fall short of 1. bf16 adds up to 7e-3 where G is well-conditioned; where it is not, rounding noise grows as
    small singular values do, so that an exactly low-rank G gets more rank than it had.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = (X / (norm(X) + 1e-7)).to(dtype)  # singular values at most 1
    X = newton_schulz(X.reshape(-1, *X.shape[-2:]), coefficients).view(X.shape)
    return X.mT if tall else X


# the routines of other publications
jordan_polar = partial(polar, coefficients=QUINTIC_5)
cans_polar = partial(polar, coefficients=CANS_12, dtype=torch.float32)
polar_express = partial(polar, coefficients=POLAR_EXPRESS_8, dtype=torch.float32)
schatten4_polar = partial(polar, norm=schatten4)


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


def wide_balanced_polar(G: Tensor, polar=schatten4_polar) -> Tensor:
    """Aurora as in result #30 of track 3: columns of wide G evened, in three milder rounds; polar for all others."""
    return balanced_polar(G, 3, 0.25, polar) if G.size(-2) < G.size(-1) else polar(G)


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
    mean_sigma = (G * polar(G)).sum(dim=(-2, -1), keepdim=True) / n
    G = G / mean_sigma.clamp(min=torch.finfo(G.dtype).tiny)
    U = balanced_polar(G, polar=polar).to(G.dtype)
    for _ in range(steps):
        U = U + step_size * balanced_tangent(U, G)
        for _ in range(2):
            U = polar((n / m) ** 0.5 * U / row_norms(U).clamp(min=1e-7)).to(G.dtype)
    return U


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


def spectral_norm(G: Tensor, iterations: int = 5) -> Tensor:
    """Largest singular value of each matrix, shape (..., 1, 1), from below: power iteration from the ones vector."""
    G = G.to(at_least_fp32(G))
    v = torch.full_like(G[..., :1, :], G.size(-1) ** -0.5)
    for _ in range(iterations):
        # sums of products, not BLAS: its matrix-vector product rounds a stack of one differently
        u = (G * v).sum(dim=-1, keepdim=True)
        u = u / frobenius(u).clamp(min=1e-10)
        v = (G * u).sum(dim=-2, keepdim=True)
        v = v / frobenius(v).clamp(min=1e-10)
    return frobenius((G * v).sum(dim=-1, keepdim=True))


def contra(U: Tensor, G: Tensor, strength: float = 0.4) -> Tensor:
    """Contra-Muon: U - strength/2 * G/||G||_2, scaled back to ||U||_F. It damps the directions that G favours."""
    U = U.to(at_least_fp32(U))
    Z = U - strength / 2 * G / spectral_norm(G).clamp(min=1e-10)
    return Z * frobenius(U) / frobenius(Z).clamp(min=1e-10)


def update_weight_floor(U: Tensor, W: Tensor, target: float = 0.35) -> Tensor:
    """U, scaled up where it is shorter than target * ||W||_F. Stands in for weight decay: it bounds ||W||_F instead."""
    return U * (target * frobenius(W).clamp(min=1e-8) / frobenius(U).clamp(min=1e-8)).clamp(min=1)


def normuon(U: Tensor, second_moment: Tensor, beta2: float = 0.95) -> tuple[Tensor, Tensor]:
    """NorMuon (arXiv 2510.05491 and its code): rows scaled by a running mean of their squares, ||U||_F kept.

    v <- beta2 v + (1 - beta2) mean_j U_ij^2;  Z = U / (sqrt(v) + 1e-10);  returns Z ||U||_F / ||Z||_F and v.
    v begins at zero; its shape says what it averages over: (..., M, 1) scales rows, (..., 1, N) columns.
    """
    U, second_moment = with_mean_square(U, second_moment, beta2)
    return of_length(frobenius(U), U / (second_moment.sqrt() + 1e-10)), second_moment


def normuon_lite(U: Tensor, second_moment: Tensor, beta2: float = 0.95) -> tuple[Tensor, Tensor]:
    """NorMuon as results #9, #10 and #11 of track 3 have it: the square root's argument is at least 1e-10."""
    U, second_moment = with_mean_square(U, second_moment, beta2)
    return of_length(frobenius(U), U / second_moment.clamp(min=1e-10).sqrt()), second_moment


def with_mean_square(U: Tensor, second_moment: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    U = U.to(at_least_fp32(U))
    over = -1 if second_moment.size(-1) == 1 else -2
    return U, second_moment.lerp(U.square().mean(dim=over, keepdim=True), 1 - beta2)


def of_length(length: Tensor, Z: Tensor) -> Tensor:
    return Z * length / frobenius(Z).clamp(min=1e-10)


def u_normuon(U: Tensor) -> Tensor:
    """U-NorMuon, without state: every row of a polar factor gets the length that even rows have, min(1, sqrt(n / m)).

    Even rows at the cost of orthogonality: where Aurora scales rows before the polar factor, this does so after it.
    From the blog of Aurora's authors, blog.tilderesearch.com/blog/aurora, as others report it.
    """
    m, n = U.shape[-2:]
    U = U.to(at_least_fp32(U))
    return min(1, n / m) ** 0.5 * U / row_norms(U).clamp(min=1e-10)


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


def muon(G: Tensor, polar=polar) -> Tensor:
    """Muon (github.com/KellerJordan/Muon): the polar factor."""
    return polar(G)


class Direction(NamedTuple):
    """What of a step differs between the optimizers of this family."""
    factor: Callable  # (N, polar=its publication's) -> U
    normalise: Callable | None = None  # after contra: U -> U, or (U, second moment) -> both
    second_moment: Callable | None = None  # (m, n) -> its shape, where `normalise` keeps one
    balances: bool = False  # `factor` takes pp_iterations and pp_beta


DIRECTIONS = {
    "aurora": Direction(balanced_polar, balances=True),  # result #17
    "aurora_july": Direction(tall_balanced_polar, balances=True),
    "aurora_paper": Direction(paper_balanced_polar),
    "aurora_wide": Direction(wide_balanced_polar),  # result #30
    "riemannian_aurora": Direction(riemannian_balanced_polar),
    "muon": Direction(muon),
    "normuon": Direction(partial(muon, polar=jordan_polar), normuon, lambda m, n: (m, 1)),
    # results #9, #10 and #11: along the longer side
    "normuon_lite": Direction(muon, normuon_lite, lambda m, n: (m, 1) if m >= n else (1, n)),
    "u_normuon": Direction(muon, u_normuon),
}


def check_direction(name: str, pp_iterations: int, pp_beta: float):
    """ValueError for an unknown name, and for pp_iterations or pp_beta changed where a direction has none."""
    if name not in DIRECTIONS:
        raise ValueError(f"direction={name!r}: it is one of {', '.join(DIRECTIONS)}")
    if not DIRECTIONS[name].balances and (pp_iterations, pp_beta) != (2, 0.5):
        raise ValueError(f"pp_iterations={pp_iterations} pp_beta={pp_beta} have no meaning for direction={name!r}: "
                         f"they belong to {' and '.join(d for d in DIRECTIONS if DIRECTIONS[d].balances)}")


def advance_(weight: Tensor, gradient: Tensor, momentum: Tensor, lr, weight_decay, mu, direction: str, options: dict,
             contra_strength: float, uw_floor: float, second_moment: Tensor | None = None):
    """A step, as at the head of this file, of a stack; all but the gradient are overwritten."""
    way, (m, n) = DIRECTIONS[direction], weight.shape[-2:]
    G = gradient.to(momentum.dtype)
    # products and sums, not lerp: it rounds otherwise what is left over where a CPU's vector registers end
    momentum.mul_(mu).add_((1 - mu) * G)
    N = (1 - mu) * G + mu * momentum
    U = way.factor(N, **options).to(N.dtype)
    if contra_strength:
        U = contra(U, N, contra_strength)
    if way.second_moment:
        U, moments = way.normalise(U, second_moment)
        second_moment.copy_(moments)
    elif way.normalise:
        U = way.normalise(U)
    W = weight.to(N.dtype)
    U = update_weight_floor(U * max(1, m / n) ** 0.5, W, uw_floor)
    weight.copy_((1 - lr * weight_decay) * W - lr * U)


COMPILED = {"realize_reads_threshold": 1}  # N is written once: else its two operands are read in place of it, each time


@cache
def compiled_advance() -> Callable:
    """advance_ in some 40 kernels that read or write the stack 28 times (bench/graph.py counts them); operation by
    operation it would be several times as often."""
    return torch.compile(advance_, dynamic=False, options=COMPILED)


def at_once(stack: Tensor) -> int:
    """How many matrices of a stack are updated in one call: on a GPU all. On a CPU as many as have 3.5 million numbers:
    what a step needs beyond the weights does not grow with depth."""
    return len(stack) if stack.is_cuda else max(1, 6 * 768 * 768 // (stack.size(1) * stack.size(2)))


class Aurora(torch.optim.Optimizer):
    """The update rule at the head of this file, for the 2-D weights of hidden layers. Defaults: result #17.

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

    `direction` names what is done to the momentum. Contra-Muon (`contra=`) and the update/weight floor (`uw_floor=`) go
    with every one, and 0 turns them off.

        aurora              polar factor after the rows (of wide matrices: columns) are evened, two rounds, bf16:
                            release of May 2026, result #17
        aurora_july         the same for tall matrices only, CANS-12 in fp32: release of July 2026
        aurora_paper        rows and polar factors in turn, Algorithm 3 of arXiv 2606.27715
        aurora_wide         wide matrices only, three rounds at .25, Schatten-4 norm: result #30
        riemannian_aurora   the update of even rows that the gradient favours most, nearly: after the authors' code
        muon                polar factor
        normuon             polar factor, then rows scaled by a running mean of their squares: arXiv 2510.05491
        normuon_lite        the same along the longer side: results #9 to #11
        u_normuon           polar factor, then all rows given the same length: the blog of Aurora's authors

    `polar` is any function from a stack to its polar factors, in place of the direction's own. A convolution's filters
    can share their memory with a matrix that is optimized in their place: m =
    torch.nn.Parameter(conv.weight.detach().flatten(1)), and before each step m.grad = conv.weight.grad.flatten(1).

    Needs, on the rank that owns a matrix, the sum of the ranks' gradients: all-reduce them. Parameters of one shape
    form a stack; each rank owns an equal run of the stack, keeps the state of those matrices alone, in fp32, updates
    them in batched calls, and gathers the others' weights. The number of ranks changes no bit of the result on the
    CPU, and on GPUs nothing but what a batched product may round differently for another size of stack. On a GPU the
    first step compiles, for each shape of a stack. Gradients are not changed. state_dict() is a collective: every rank
    calls it, each gets the whole, and any number of ranks can load it. A parameter (K, m, n) is a stack that this rank
    updates whole and sends to nobody, for callers that share the weights out themselves, as train_gpt.py's banks do;
    its state is this rank's own.
    """

    def __init__(self, params, lr: float = 0.0375, weight_decay: float = 0.0, mu: float = 0.95,
                 direction: str = "aurora", pp_iterations: int = 2, pp_beta: float = 0.5,
                 contra: float = 0.4, uw_floor: float = 0.35, polar=None):
        self.polar = polar
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, mu=mu, direction=direction,
                                      pp_iterations=pp_iterations, pp_beta=pp_beta,
                                      contra=contra, uw_floor=uw_floor))

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_direction(group["direction"], group["pp_iterations"], group["pp_beta"])
        for p in group["params"]:
            if p.ndim not in (2, 3):
                raise ValueError(f"Aurora updates matrices, got a parameter of shape {tuple(p.shape)}: give vectors "
                                 "and embeddings to AdamW, and convolutions as matrices (see Aurora's docstring)")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        travelling = None  # one stack's weights travel while the next one is computed
        for group in self.param_groups:
            for params in stacks(group["params"]):
                if all(p.grad is None for p in params):
                    continue
                if params[0].ndim == 3:
                    for tensors in (self._tensors(p, group) for p in params if p.grad is not None):
                        some = at_once(tensors["weight"])
                        for part in zip(*(x.split(some) for x in tensors.values()), strict=True):
                            self._advance(dict(zip(tensors, part)), group)
                    continue
                owned, share = owned_by_this_rank(params)
                shard = params[0].new_empty(share, *params[0].shape)
                moving = [(new, p) for new, p in zip(shard, owned) if p.grad is not None]
                for i in range(0, len(moving), at_once(shard)):
                    self._update(*zip(*moving[i:i + at_once(shard)]), group)
                arrive(travelling)
                travelling = send(params, shard)
        arrive(travelling)
        return loss

    def _tensors(self, p, group) -> dict[str, Tensor]:
        """Weight, gradient and state of p; state in fp32 or better, at first zero."""
        direction, (*stack, m, n) = DIRECTIONS[group["direction"]], p.shape
        shapes = {"momentum": (m, n)}
        if direction.second_moment:
            shapes["second_moment"] = direction.second_moment(m, n)
        for name, shape in shapes.items():
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros(*stack, *shape, dtype=at_least_fp32(p), device=p.device)
        return dict(weight=p, gradient=p.grad) | {name: self.state[p][name] for name in shapes}

    def _update(self, out, params, group):
        """Put the new weights of parameters of one shape into `out`."""
        matrices = [self._tensors(p, group) for p in params]
        stack = {name: torch.stack([matrix[name] for matrix in matrices]) for name in matrices[0]}
        self._advance(stack, group)
        torch._foreach_copy_(list(out), list(stack["weight"]))
        for name in stack.keys() - {"weight", "gradient"}:
            torch._foreach_copy_([matrix[name] for matrix in matrices], list(stack[name]))

    def _advance(self, tensors: dict[str, Tensor], group):
        """advance_ a stack, compiled on a GPU. There what a schedule may change is a tensor: a number would be a
        constant of the program, which is compiled once."""
        advance, numbers = advance_, {name: group[name] for name in ("lr", "weight_decay", "mu")}
        if tensors["weight"].is_cuda:
            advance, zero = compiled_advance(), tensors["momentum"].new_zeros(())
            numbers = {name: x if isinstance(x, Tensor) else zero + x for name, x in numbers.items()}
        options = dict(polar=self.polar) if self.polar else {}
        if DIRECTIONS[group["direction"]].balances:
            options |= dict(pp_iterations=group["pp_iterations"], pp_beta=group["pp_beta"])
        advance(**tensors, **numbers, direction=group["direction"], options=options, contra_strength=group["contra"],
                uw_floor=group["uw_floor"])

    def state_dict(self) -> dict:
        whole = super().state_dict()
        if dist.is_initialized() and dist.get_world_size() > 1:
            shares = [None] * dist.get_world_size()
            # by way of the CPU: a tensor would be unpacked on the sender's GPU
            mine = {index: {name: x.cpu() for name, x in state.items()} for index, state in whole["state"].items()}
            dist.all_gather_object(shares, mine)
            whole["state"] = {index: state for share in shares for index, state in share.items()} | mine
        return whole

    def load_state_dict(self, state_dict: dict):
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, bf16 perhaps, and gives every rank the state of all
        owned = {p for group in self.param_groups for params in stacks(group["params"])
                 for p in owned_by_this_rank(params)[0]}
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for index, state in state_dict["state"].items():
            if (p := params[index]) in owned:
                self.state[p] = {name: x.to(p.device, copy=True) for name, x in state.items()}


def stacks(params) -> list:
    """Lists of parameters that are alike in shape, dtype and device; the largest matrices first."""
    alike = {}
    for p in params:
        alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
    return sorted(alike.values(), key=lambda stack: -stack[0].numel())


def send(params, shard: Tensor):
    """Start to gather every rank's shard of a stack's new weights; what arrive() needs to finish."""
    weights, work = shard, None
    if dist.is_initialized() and dist.get_world_size() > 1:
        weights = shard.new_empty(dist.get_world_size() * len(shard), *shard.shape[1:])
        work = all_gather(weights, shard, async_op=True)
    return params, weights, work


def arrive(travelling):
    """Put gathered weights into the parameters that have a gradient."""
    if travelling is not None:
        params, weights, work = travelling
        if work is not None:
            work.wait()
        moved = [(p, w) for p, w in zip(params, weights) if p.grad is not None]
        torch._foreach_copy_(*map(list, zip(*moved)))


def owned_by_this_rank(params) -> tuple[list, int]:
    """This rank's equal run of like parameters, and how long a run is; the last ranks may own less, or nothing. What is
    itself a stack is every rank's own."""
    if params[0].ndim == 3:
        return params, len(params)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = -(-len(params) // world)
    return params[rank * share:(rank + 1) * share], share
