"""Which hardware multiplies bf16 matrices, and how.

GPUs of compute capability 8.0 and later do, and run the kernels beside this file. On CPUs without AVX-512 PyTorch
falls back to loops that are five to fifty times as slow as an fp32 product. So there the fp32 product of the same
bf16 numbers is taken and rounded: the same sums and the same rounding, in fp32's time.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # as on macOS: no kernel can run, and this is what the files beside ask for as they are read
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)

# what PyTorch itself asks before it hands a bf16 product to oneDNN
CPU_MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def assume_constant_result(function):
    """torch.compiler's decorator of that name. That one imports Dynamo, which takes nearly half of the time in which a
    run on a CPU starts, and which such a run does not need."""
    function._dynamo_marked_constant = True
    return function


@assume_constant_result
def runs_kernels(device: torch.device) -> bool:
    """Whether tensors there go to the Triton kernels. There is no other path on such a GPU: a kernel runs or raises."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def needs_fp32(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and not x.is_cuda and not CPU_MULTIPLIES_BF16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with W (out, in) and b (out) cast to the dtype of x (..., in), accumulated in fp32, rounded once."""
    parameters = [p.type_as(x) for p in (weight, bias) if p is not None]
    if needs_fp32(x):
        return F.linear(x.float(), *(p.float() for p in parameters)).type_as(x)
    return F.linear(x, *parameters)
