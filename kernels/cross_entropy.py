"""Softcapped cross-entropy: the loss over the largest tensor of a step, 50,304 logits for every token.

    z = 15 x / sqrt(x^2 + 225),    loss = sum over tokens of logsumexp(z) - z[target]
    dloss/dx = (softmax(z) - onehot(target)) * 15^3 / (x^2 + 225)^(3/2)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTCAP = 15.0
ROWS = 16  # 16 tokens' logits are 3 MB in fp32: a CPU's cache holds them from the first pass to the last


def softcapped_cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss in nats, summed over tokens, fp32. logits (T, V) of any float dtype; targets (T,) int64."""
    x = logits.float()
    z = SOFTCAP * x * (x.square() + SOFTCAP**2).rsqrt()
    return F.cross_entropy(z, targets, reduction="sum")


class _RowBlocks(torch.autograd.Function):
    """Loss and gradient in one visit to each block of rows; the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        loss = torch.zeros(())
        for block, target in zip(logits.split(ROWS), targets.split(ROWS)):
            at_target = torch.arange(len(block)), target
            x = block.to(torch.float32, copy=True)
            r = (x * x).add_(SOFTCAP**2).rsqrt_()
            z = x.mul_(r).mul_(SOFTCAP)
            loss -= z[at_target].sum()
            p = z.exp_()  # |z| < 15 cannot overflow: no pass for the maximum
            total = p.sum(1, keepdim=True)
            loss += total.log().sum()
            if ctx.needs_input_grad[0]:
                p.div_(total)[at_target] -= 1
                r.mul_(SOFTCAP)
                block.copy_(p.mul_(r).mul_(r).mul_(r))  # pow is several times as slow on the CPU
        ctx.gradient = logits
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor):
        return ctx.gradient.mul_(scale), None


def softcapped_cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The reference's contract, but the logits may be overwritten: where a gradient is wanted on the CPU, it
    takes their place. There each of the reference's passes over an fp32 copy of all logits would go to memory and
    back; on a GPU torch.compile fuses them."""
    if logits.is_cuda:
        return softcapped_cross_entropy_reference(logits, targets)
    return _RowBlocks.apply(logits, targets)
