"""The row-blocked loss against autograd through the reference in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import ROWS, softcapped_cross_entropy_, softcapped_cross_entropy_reference


def exact(logits, targets):
    x = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(15 * x / (x.square() + 225).sqrt(), targets, reduction="sum")
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("tokens", [1, ROWS, 3 * ROWS + 5])
def test_loss_and_gradient(tokens):
    """Kills: a last block that is skipped, a softcap whose derivative is dropped, a onehot in the wrong row.

    Logits up to 60 saturate the cap. fp32 sums of 1000 terms: 1e-5 relative.
    """
    generator = torch.Generator().manual_seed(tokens)
    logits = (20 * torch.randn(tokens, 1000, generator=generator)).requires_grad_()
    targets = torch.randint(1000, (tokens,), generator=generator)
    true_loss, true_gradient = exact(logits, targets)
    (3 * softcapped_cross_entropy_reference(logits, targets)).backward()
    torch.testing.assert_close(logits.grad.double(), 3 * true_gradient, rtol=1e-4, atol=1e-6)

    leaf = logits.detach().clone().requires_grad_()
    loss = softcapped_cross_entropy_(leaf * 1, targets)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), 3 * true_gradient, rtol=1e-4, atol=1e-6)


def test_bf16_gradient_is_the_exact_one_rounded_once():
    """Kills: an intermediate kept in bf16. One rounding is 2^-9 relative; 2^-8 leaves room for nothing else."""
    generator = torch.Generator().manual_seed(0)
    leaf = (5 * torch.randn(40, 1000, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(1000, (40,), generator=generator)
    softcapped_cross_entropy_(leaf * 1, targets).backward()
    torch.testing.assert_close(leaf.grad.double(), exact(leaf, targets)[1], rtol=2**-8, atol=1e-30)


def test_validation_leaves_the_logits_alone():
    """Kills: a gradient written where none is wanted. Equal logits have loss ln(vocabulary)."""
    logits = torch.zeros(20, 64)
    with torch.no_grad():
        loss = softcapped_cross_entropy_(logits, torch.arange(20))
    assert torch.equal(logits, torch.zeros(20, 64))
    assert loss.item() == pytest.approx(20 * math.log(64), rel=1e-6)
