"""Aurora with Contra-Muon and the update/weight floor: the optimizer of result #17, for any stack of matrices.

Pure functions first; each takes single matrices (M, N) or stacks (K, M, N) in torch's layout (out_features,
in_features) and changes none of its inputs. With W a weight, G its gradient, M its momentum, a step is

    M <- mu M + (1 - mu) G,    N = (1 - mu) G + mu M               Nesterov momentum
    U  = balanced_polar(N)     ("aurora")  or  polar(N)  ("muon")
    U <- contra(U, N) * sqrt(max(1, m / n))
    U <- update_weight_floor(U, W)
    W <- (1 - lr wd) W - lr U

Sources: Muon, github.com/KellerJordan/Muon; Aurora, arXiv 2606.27715 and github.com/tilde-research/aurora-release
(its release of May 2026, which result #17 uses); Contra-Muon, nilin.github.io/contra-muon-and-soft-muon; the floor
and every epsilon, github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, result #17.
"""

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


def polar(G: Tensor, coefficients=SIMPLE_QUINTIC_12, dtype=torch.bfloat16) -> Tensor:
    """U V^T of the thin SVD G = U S V^T, approximately, computed and returned in `dtype`. polar(0) = 0.

    Newton-Schulz moves each singular value s to p(...p(s / ||G||_F)). Those above 1e-3 ||G||_F end within 5e-6 of 1
    with the record's table, 1e-14 with POLAR_EXPRESS_8 or CANS_12, .53 with QUINTIC_5, in exact arithmetic; smaller
    ones fall short of 1. bf16 adds up to 7e-3 where G is well-conditioned.
    """
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = (X / (frobenius(X) + 1e-7)).to(dtype)  # singular values at most 1
    X = newton_schulz(X.reshape(-1, *X.shape[-2:]), coefficients).view(X.shape)
    return X.mT if tall else X


def balanced_polar(G: Tensor, pp_iterations: int = 2, pp_beta: float = 0.5, polar=polar) -> Tensor:
    """Aurora, release of May 2026: a polar factor of D G, the positive diagonal D chosen so that rows end up even.

    Tall G (m > n):  D = 1 / ||G_i||;  U = polar(D G);  D_i <- D_i ((n / m) / ||U_i||^2)^pp_beta;  U = polar(D G); ...
    with `pp_iterations` polar factors in all. U^T U = I as far as `polar` goes, and ||U_i||^2 comes near n / m.
    Wide G is transposed, so its columns are evened; square G has even rows already and gets its polar factor.
    A zero row stays zero. (The paper's own pp_beta means the opposite: there larger is more damping.)
    """
    m, n = G.shape[-2:]
    if m == n:
        return polar(G)
    if m < n:
        return balanced_polar(G.mT, pp_iterations, pp_beta, polar).mT
    G = G.to(at_least_fp32(G))
    D = 1 / G.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    U = polar(D * G)
    for _ in range(pp_iterations - 1):
        row_sq = U.to(G.dtype).square().sum(dim=-1, keepdim=True).clamp(min=1e-14)
        D = D * (n / m / row_sq).pow(pp_beta)
        U = polar(D * G)
    return U


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


DIRECTIONS = ("aurora", "muon")


class Aurora(torch.optim.Optimizer):
    """The update rule at the head of this file, for the 2-D weights of hidden layers. Defaults: result #17.

    Needs the same gradients on every rank (all-reduced). Parameters of one shape form a stack; each rank owns an
    equal run of the stack, keeps the momentum of those matrices alone, updates them in one batched call, and
    gathers the others' weights. The number of ranks changes no bit of the result on the CPU, and on GPUs nothing
    but what a batched product may round differently for another size of stack. Gradients are not changed.
    `polar` is any function from a stack to its polar factors.
    """

    def __init__(self, params, lr: float = 0.0375, weight_decay: float = 0.0, mu: float = 0.95,
                 direction: str = "aurora", pp_iterations: int = 2, pp_beta: float = 0.5,
                 contra: float = 0.4, uw_floor: float = 0.35, polar=polar):
        self.polar = polar
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, mu=mu, direction=direction,
                                      pp_iterations=pp_iterations, pp_beta=pp_beta,
                                      contra=contra, uw_floor=uw_floor))

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["direction"] not in DIRECTIONS:
            raise ValueError(f"direction={group['direction']!r}: it is one of {', '.join(DIRECTIONS)}")
        for p in group["params"]:
            if p.ndim != 2:
                raise ValueError(f"Aurora updates matrices, got a parameter of shape {tuple(p.shape)}: give "
                                 "vectors and embeddings to AdamW, and convolutions as views (out, -1)")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        gathers = []  # one stack's weights travel while the next one is computed
        for group in self.param_groups:
            for params in stacks([p for p in group["params"] if p.grad is not None]):
                share = -(-len(params) // world)  # the last owners may have less, or nothing
                mine = params[rank * share:(rank + 1) * share]
                shard = params[0].new_empty(share, *params[0].shape)
                if mine:
                    shard[:len(mine)] = self._updated(mine, group)
                weights, work = shard, None
                if world > 1:
                    weights = shard.new_empty(world * share, *shard.shape[1:])
                    work = all_gather(weights, shard, async_op=True)
                gathers.append((params, weights, work))
        for params, weights, work in gathers:
            if work is not None:
                work.wait()
            torch._foreach_copy_(params, list(weights[:len(params)]))
        return loss

    def _updated(self, params, group) -> Tensor:
        """The new weights of the matrices that this rank owns, as one stack."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = [p.grad for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - group["mu"])
        N = torch.stack(torch._foreach_lerp(gradients, momenta, group["mu"]))
        W = torch.stack(params)
        if group["direction"] == "muon":
            U = self.polar(N)
        else:
            U = balanced_polar(N, group["pp_iterations"], group["pp_beta"], self.polar)
        U = contra(U, N, group["contra"]) * max(1, N.size(-2) / N.size(-1)) ** 0.5
        U = update_weight_floor(U, W, group["uw_floor"])
        return W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(U, alpha=group["lr"])


def stacks(params) -> list:
    """Lists of parameters that are alike in shape, dtype and device; the largest matrices first."""
    alike = {}
    for p in params:
        alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
    return sorted(alike.values(), key=lambda stack: -stack[0].numel())
