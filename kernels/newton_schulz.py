"""Newton-Schulz iteration: the matrix products under every polar factor.

    X <- a X + (b A + c A A) X,    A = X X^T,    for each (a, b, c) of a table

It is an odd polynomial of X, so it acts on each singular value alone and leaves the singular vectors as they
are: with X = U diag(s) V^T, one step gives U diag(a s + b s^3 + c s^5) V^T.
"""

import torch
from torch import Tensor

from kernels.bf16 import needs_fp32


def newton_schulz_reference(X: Tensor, coefficients, rounded=lambda product: product) -> Tensor:
    """The iteration on a stack X of shape (K, M, N), M <= N, with singular values at most about 1.

    Each of the three products is accumulated in fp32 and rounded once to X's dtype; the epilogues b A + ... and
    a X + ... ride on it. That is one rounding fewer than the compiled script of result #17: it rounds b A apart.
    """
    for a, b, c in coefficients:
        A = rounded(torch.bmm(X, X.mT))
        B = rounded(torch.baddbmm(A, A, A, beta=b, alpha=c) if c else b * A)
        X = rounded(torch.baddbmm(X, B, X, beta=a))
    return X


def newton_schulz(X: Tensor, coefficients) -> Tensor:
    """Contract of newton_schulz_reference. Plain PyTorch on every device so far: no fused kernel has been measured."""
    if needs_fp32(X):
        return newton_schulz_reference(X.float(), coefficients, lambda product: product.bfloat16().float()).bfloat16()
    return newton_schulz_reference(X, coefficients)
