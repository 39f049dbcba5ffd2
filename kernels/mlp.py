"""The ReLU^2 MLP: two thirds of the blocks' arithmetic.

    y = relu(x W^T + b)^2 V^T

    pre = x W^T + b,    post = relu(pre)^2,    dpost = dy V,    dpre = dpost * 2 relu(pre),    db = sum of dpre

Only x and post are kept for the backward pass. relu(pre) is sqrt(post), rounded: in binary floating point the square
root of a rounded square rounds to the number that was squared (half a ulp of the square is at most 0.71 half ulps of
the root), where the square neither overflows nor is subnormal. So the gradient is the reference's, to the bit, given
the same sums.
"""

import torch
from torch import Tensor

from kernels.bf16 import linear, runs_kernels, tl, triton


def relu2_mlp_reference(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor) -> Tensor:
    return linear(linear(x, fc_weight, fc_bias).relu().square(), proj_weight)


@triton.jit
def _tile_product(a, b, m, n, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The BLOCK_M x BLOCK_N tile of A B that begins at (m, n), in fp32. A (M, K), B (K, N), any strides and sizes."""
    rows, columns, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a += m.to(tl.int64) * stride_am + rows[:, None] * stride_am + ks[None, :] * stride_ak
    b += n.to(tl.int64) * stride_bn + ks[:, None] * stride_bk + columns[None, :] * stride_bn
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        A = tl.load(a, mask=(m + rows < M)[:, None] & (k + ks < K)[None, :], other=0)
        B = tl.load(b, mask=(k + ks < K)[:, None] & (n + columns < N)[None, :], other=0)
        product = tl.dot(A, B, product, input_precision="ieee")
        a += BLOCK_K * stride_ak
        b += BLOCK_K * stride_bk
    return product


@triton.jit
def _tile_corner(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where this program's tile begins. Eight rows of tiles go column by column: their operands stay in the L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def up_projection_kernel(x, weight, bias, post, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """post (M, N) = relu(x weight^T + bias)^2, rounded where the reference rounds: after the bias and the square."""
    m, n = _tile_corner(M, N, BLOCK_M, BLOCK_N)
    pre = _tile_product(x, weight, m, n, M, N, K, stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K)
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    pre += tl.load(bias + columns, mask=columns < N, other=0).to(tl.float32)[None, :]
    dtype = post.dtype.element_ty
    relu = tl.maximum(pre, 0).to(dtype).to(tl.float32)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(post + rows.to(tl.int64)[:, None] * N + columns[None, :], (relu * relu).to(dtype), mask=mask)


@triton.jit
def dpre_kernel(dy, weight, post, dpre, column_sums, M, N, K, stride_ym, stride_yk, stride_wk, stride_wn,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dpre (M, N) = dy weight * 2 sqrt(post), and the column sums of each row of tiles, (cdiv(M, BLOCK_M), N) fp32."""
    m, n = _tile_corner(M, N, BLOCK_M, BLOCK_N)
    dpost = _tile_product(dy, weight, m, n, M, N, K, stride_ym, stride_yk, stride_wk, stride_wn,
                          BLOCK_M, BLOCK_N, BLOCK_K)
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    here = rows.to(tl.int64)[:, None] * N + columns[None, :]
    dtype = dpre.dtype.element_ty
    relu = tl.sqrt(tl.load(post + here, mask=mask, other=0).to(tl.float32)).to(dtype).to(tl.float32)
    gradient = (dpost.to(dtype).to(tl.float32) * (2 * relu)).to(dtype)
    tl.store(dpre + here, gradient, mask=mask)
    # rows beyond M are zeros in dy and in post
    tl.store(column_sums + (m // BLOCK_M).to(tl.int64) * N + columns, tl.sum(gradient.to(tl.float32), 0),
             mask=columns < N)


def mlp_tiles(capability: tuple[int, int], itemsize: int) -> dict[str, int]:
    """Tile and launch for a GPU. The operands take 144 KB of shared memory on the H100, H200 and B200, 96 elsewhere.

    The sizes are the usual first choices; no other has been timed. BLOCK_K is 128 bytes, the width in which the tensor
    cores' operands are swizzled.
    """
    if capability[0] in (9, 10):
        return dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=128 // itemsize, num_warps=8, num_stages=3)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=128 // itemsize, num_warps=8, num_stages=4)


def up_projection(x: Tensor, weight: Tensor, bias: Tensor, capability: tuple[int, int]) -> Tensor:
    """post (M, N) = relu(x weight^T + bias)^2 of x (M, K), weight (N, K), bias (N)."""
    (M, K), N = x.shape, len(weight)
    post = x.new_empty(M, N)
    tiles = mlp_tiles(capability, x.element_size())
    grid = (triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(N, tiles["BLOCK_N"]),)
    up_projection_kernel[grid](x, weight, bias, post, M, N, K, *x.stride(), *weight.stride(), **tiles)
    return post


def activation_gradient(dy: Tensor, weight: Tensor, post: Tensor, capability: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """dpre (M, N) = dy weight * 2 sqrt(post) of dy (M, K), weight (K, N), post (M, N), contiguous; and dpre's column
    sums (N), added in fp32 in a fixed order, in its dtype."""
    (M, K), N = dy.shape, weight.size(1)
    dpre = dy.new_empty(M, N)
    tiles = mlp_tiles(capability, dy.element_size())
    rows = triton.cdiv(M, tiles["BLOCK_M"])
    sums = dy.new_empty(rows, N, dtype=torch.float32)
    dpre_kernel[(rows * triton.cdiv(N, tiles["BLOCK_N"]),)](dy, weight, post, dpre, sums, M, N, K,
                                                          *dy.stride(), *weight.stride(), **tiles)
    return dpre, sums.sum(0).type_as(dpre)


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)  # in the interpreter, an H100's


# Opaque operators: the compiled model is one graph around them.

@torch.library.custom_op("kernels::relu2_up", mutates_args=())
def relu2_up(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return up_projection(x, weight, bias, _capability(x))


@relu2_up.register_fake
def _relu2_up_shape(x, weight, bias):
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("kernels::relu2_dpre", mutates_args=())
def relu2_dpre(dy: Tensor, weight: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    return activation_gradient(dy, weight, post, _capability(dy))


@relu2_dpre.register_fake
def _relu2_dpre_shapes(dy, weight, post):
    return dy.new_empty(post.shape), dy.new_empty(post.size(1))


class _FusedReLU2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor) -> Tensor:
        post = relu2_up(x, fc_weight, fc_bias)
        ctx.save_for_backward(x, fc_weight, proj_weight, post)
        return post @ proj_weight.mT

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, fc_weight, proj_weight, post = ctx.saved_tensors
        dpre, dfc_bias = relu2_dpre(dy, proj_weight, post)
        return dpre @ fc_weight, dpre.mT @ x, dfc_bias, dy.mT @ post


def fused_relu2_mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    """relu2_mlp with the kernels."""
    return _FusedReLU2.apply(x.flatten(0, -2), *parameters).unflatten(0, x.shape[:-1])


def relu2_mlp(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor) -> Tensor:
    """y = relu(x fc_weight^T + fc_bias)^2 proj_weight^T. The last product's bias is kernels/norm.py's to add.

    x (..., D), fc_weight (F, D), fc_bias (F), proj_weight (D, F), all of one dtype. Products are summed in fp32; relu's
    argument, its square and y are rounded to that dtype.
    """
    return (fused_relu2_mlp if runs_kernels(x.device) else relu2_mlp_reference)(x, fc_weight, fc_bias, proj_weight)
