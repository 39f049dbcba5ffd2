"""Where the kernels of tests and drills run: on a GPU compiled, without one on CPU tensors in Triton's interpreter.

Triton decides as it is imported, so this module is imported before any kernel. The interpreter keeps bf16 as the bits,
in uint16. Triton's own casts cut numbers off where a GPU rounds, and its dot multiplies the bits: both are mended here.
Other arithmetic on bf16 stays wrong, and the kernels do none: they cast to fp32 first.
"""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        """bf16 as fp32, all else as it is."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(torch.tensor(x.data).view(torch.bfloat16).float().numpy(), tl.float32)

    def rounding_cast(builder, x: TensorHandle, dtype) -> TensorHandle:
        if dtype.scalar != tl.bfloat16:
            return cast(builder, widened(x), dtype)
        rounded = torch.tensor(widened(x).data.astype(np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.cast_impl = rounding_cast
    InterpreterBuilder.create_dot = lambda builder, a, b, *rest: dot(builder, widened(a), widened(b), *rest)
