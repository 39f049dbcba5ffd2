"""The head: logits, softcap and cross-entropy. 50,304 logits for every token are the largest tensor of a step.

    x = h W^T + b,    z = 15 x / sqrt(x^2 + 225),    loss = sum over tokens of logsumexp(z) - z[target]
    dloss/dx = (softmax(z) - onehot(target)) * 15^3 / (x^2 + 225)^(3/2)

The gradient is known as soon as the loss is, so it is computed in the forward pass and takes the logits' place:
nothing of their size outlives the head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bf16 import assume_constant_result, linear, runs_kernels, tl, triton

SOFTCAP = 15.0
ROWS = 16  # 16 tokens' logits are 3 MB in fp32: a CPU's cache holds them from the first pass to the last


def softcapped(logits: Tensor) -> Tensor:
    """z of x, in fp32."""
    x = logits.float()
    return SOFTCAP * x * (x.square() + SOFTCAP**2).rsqrt()


def softcapped_cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss in nats, summed over tokens, fp32. logits (T, V) of any float dtype; targets (T,) int64."""
    return F.cross_entropy(softcapped(logits), targets, reduction="sum")


def head_loss_reference(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return softcapped_cross_entropy_reference(linear(x, weight, bias), targets)


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


# The kernels. Two visits to the logits: one for each row's sum of exponentials, one that writes the gradient and sums
# its columns. They read, read and write 6.6 GB per 65,536 tokens: 19.8 GB. One kernel that visits a row twice while the
# L2 cache holds it moves 13.2 GB, but a program that owns whole rows has no registers for 50,304 column sums: the
# bias's gradient is then one more visit, so also 19.8, and 13.2 only where the cache does hold the rows.

@triton.jit
def _softcapped(x, CAP: tl.constexpr):
    """r = 1 / sqrt(x^2 + CAP^2), and z in units of ln 2: exp2 is the hardware's."""
    r = tl.rsqrt(x * x + CAP * CAP)
    return r, x * r * (CAP * 1.4426950408889634)


@triton.jit
def loss_kernel(logits, targets, losses, totals, stride, V, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: its loss, and the total of exp(z): |z| < 15 cannot overflow, so no maximum is taken."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride  # 65,536 rows are 3.3e9 logits
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        r, z = _softcapped(tl.load(logits + columns, mask=columns < V, other=0).to(tl.float32), CAP)
        total += tl.where(columns < V, tl.exp2(z), 0)
    total = tl.sum(total)
    r, z = _softcapped(tl.load(logits + tl.load(targets + row)).to(tl.float32), CAP)
    tl.store(totals + row, total)
    tl.store(losses + row, (tl.log2(total) - z) * 0.6931471805599453)


@triton.jit
def gradient_kernel(logits, targets, totals, column_sums, stride, T, V, CAP: tl.constexpr,
                    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """GROUP rows of BLOCK_V columns a program: the gradient in place of the logits, and its column sums.

    column_sums (cdiv(T, GROUP), V) fp32 are sums of the rounded gradient, as a sum over the stored tensor would be.
    """
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = tl.program_id(1) * GROUP
    logits += first.to(tl.int64) * stride
    sums = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    # num_stages: the loads of later rows run ahead of the stores to earlier ones
    for start in tl.range(0, min(GROUP, T - first), BLOCK_T, num_stages=3):
        rows = start + tl.arange(0, BLOCK_T)
        mask = (first + rows < T)[:, None] & (columns < V)[None, :]
        target = tl.load(targets + first + rows, mask=first + rows < T, other=0)
        total = tl.load(totals + first + rows, mask=first + rows < T, other=1)
        here = logits + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        r, z = _softcapped(tl.load(here, mask=mask, other=0).to(tl.float32), CAP)
        r *= CAP
        softmax = tl.exp2(z) * (1 / total)[:, None]  # exp2(z - log2(total)) would round twice more
        gradient = (softmax - tl.where(columns[None, :] == target[:, None], 1.0, 0.0)) * (r * r * r)
        gradient = gradient.to(logits.dtype.element_ty)
        tl.store(here, gradient, mask=mask)
        sums += tl.where(mask, gradient.to(tl.float32), 0)
    column_sums += tl.program_id(1).to(tl.int64) * V
    tl.store(column_sums + columns, tl.sum(sums, 0), mask=columns < V)


def losses_of_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """losses (T,) in nats and totals (T,) of exp(z), fp32, of logits (T, V) whose rows are contiguous."""
    T, V = logits.shape
    losses, totals = torch.empty(2, T, dtype=torch.float32, device=logits.device)
    loss_kernel[(T,)](logits, targets, losses, totals, logits.stride(0), V, SOFTCAP, BLOCK=4096, num_warps=8)
    return losses, totals


def to_gradient_(logits: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
    """Overwrite logits (T, V) with the gradient of their summed loss; its column sums (V,), fp32, in a fixed order."""
    T, V = logits.shape
    group, block = 1024, 512
    sums = torch.empty(triton.cdiv(T, group), V, dtype=torch.float32, device=logits.device)
    gradient_kernel[(triton.cdiv(V, block), len(sums))](logits, targets, totals, sums, logits.stride(0), T, V,
                                                        SOFTCAP, group, BLOCK_T=8, BLOCK_V=block, num_warps=8)
    return sums.sum(0)


def _fp32_product(A: Tensor, B: Tensor) -> Tensor:
    """A B, summed and left in fp32. Where kernels are interpreted, on the CPU, mm has no out_dtype."""
    return torch.mm(A, B, out_dtype=torch.float32) if A.is_cuda else A.float() @ B.float()


@torch.library.custom_op("kernels::head_loss", mutates_args=())
def head_loss_op(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: int, gradients: bool) -> list[Tensor]:
    """[loss] or [loss, dx, dweight, dbias], from the logits of `rows` tokens at a time. An opaque operator: the
    compiled model is one graph around it."""
    losses, sums, dx = [], None, x.new_empty(x.shape)
    for part in (slice(start, start + rows) for start in range(0, len(x), rows)):
        logits = torch.addmm(bias, x[part], weight.mT)
        loss, totals = losses_of_rows(logits, targets[part])
        losses.append(loss)
        if gradients:
            dbias = to_gradient_(logits, targets[part], totals)
            torch.mm(logits, weight, out=dx[part])
            terms = _fp32_product(logits.mT, x[part]), dbias
            sums = [a.add_(b) for a, b in zip(sums, terms)] if sums else terms
        del logits  # before the next ones are made
    loss = torch.cat(losses).sum()
    return [loss, dx, *(p.type_as(weight) for p in sums)] if gradients else [loss]


@head_loss_op.register_fake
def _head_loss_shapes(x, weight, bias, targets, rows, gradients):
    loss = x.new_empty((), dtype=torch.float32)
    return [loss, *(t.new_empty(t.shape) for t in (x, weight, bias))] if gradients else [loss]


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: int) -> Tensor:
        loss, *gradients = head_loss_op(x, weight, bias, targets, rows, True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor):
        return *(gradient * scale for gradient in ctx.saved_tensors), None, None


@assume_constant_result
def rows_at_once(device: torch.device, row_bytes: int) -> int:
    """How many tokens' logits fit into an eighth of the GPU's memory: all 65,536 of a micro-batch on an H100."""
    return max(1, torch.cuda.get_device_properties(device).total_memory // 8 // row_bytes)


def fused_head_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: int) -> Tensor:
    """head_loss with the kernels, from the logits of at most `rows` tokens at a time."""
    rows = math.ceil(len(x) / math.ceil(len(x) / rows))  # parts of equal size
    if torch.is_grad_enabled():
        return _FusedHead.apply(x, weight, bias, targets, rows)
    return head_loss_op(x, weight, bias, targets, rows, False)[0]


def head_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Softcapped cross-entropy of the logits x W^T + b in nats, summed over tokens, fp32.

    x (T, D) activations; weight (V, D) and bias (V) in x's dtype; targets (T,) int64. The logits are rounded to x's
    dtype, everything between them and their gradient is fp32, and so are the sums over tokens; each gradient is
    rounded once.
    """
    if runs_kernels(x.device):
        return fused_head_loss(x, weight, bias, targets, rows_at_once(x.device, len(weight) * x.element_size()))
    return softcapped_cross_entropy_(linear(x, weight, bias), targets)
