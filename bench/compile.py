"""Every Triton kernel compiled ahead of time, for cards that need not be there: registers, spills, shared memory.

    python -m bench.compile [-o FOLDER]

What is compiled is what is launched. An entry of LAUNCHES calls a kernel file's own launcher on meta tensors, and where
the launcher would start a kernel, Triton compiles it for a card that only its driver is told of. So types, tiles,
warps, stages, and what Triton specialises on (strides of 1, multiples of 16), are those of a run.

To add kernels: one entry, a function of the card's compute capability, such as (9, 0), that launches them. A launcher
is any function that ends in kernel[grid](...); where it chooses by card, it takes the capability as an argument.
"""

import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from aurora import SIMPLE_QUINTIC_12
from bench import parse
from kernels.cross_entropy import losses_of_rows, to_gradient_
from kernels.mlp import activation_gradient, up_projection
from kernels.newton_schulz import newton_schulz_fused
from kernels.norm import gradient_of_prenorm
from kernels.qkv import gradient_of_qkv, norm_and_rotate_
from results import markdown, publish

# KB of shared memory that a block may have (CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability"): A100, RTX 40 (and 30), H100 and H200, B200, RTX 50
LIMITS = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
MATRIX_UNITS = "wgmma.mma_async", "tcgen05.mma", "mma.sync"


def newton_schulz_triton(X: torch.Tensor):
    """All three lines in Triton, whichever of them a run takes from cuBLAS."""
    return lambda capability: newton_schulz_fused(X, SIMPLE_QUINTIC_12[:2], ("Triton",) * 3)


def head(logits: torch.Tensor):
    targets = torch.empty(len(logits), dtype=torch.int64, device="meta")
    return lambda capability: to_gradient_(logits, targets, losses_of_rows(logits, targets)[1])


def mlp(x: torch.Tensor, fc_weight: torch.Tensor, fc_bias: torch.Tensor, proj_weight: torch.Tensor):
    return lambda capability: activation_gradient(
        x, proj_weight, up_projection(x, fc_weight, fc_bias, capability), capability)


def prenorm(M: int, D: int):
    return lambda capability: gradient_of_prenorm(*(bf16(M, D) for _ in range(3)), bf16(D))


def qkv(B: int, T: int, H: int, K: int):
    by_token = [bf16(B, T, H, K).transpose(1, 2) for _ in range(3)]  # as attention leaves gradients
    angles = [torch.empty(T, K // 2, device="meta") for _ in range(2)]
    qk = bf16(B, T, 3, H, K)[:, :, :2]
    return lambda capability: gradient_of_qkv(*by_token, qk, norm_and_rotate_(qk, *angles), *angles)


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


LAUNCHES = {
    "Newton-Schulz, wide": newton_schulz_triton(bf16(24, 768, 3072)),
    "Newton-Schulz, tall": newton_schulz_triton(bf16(24, 3072, 768).mT),
    "head": head(bf16(65536, 50304)),
    "pre-norm": prenorm(65536, 768),
    "q, k, v": qkv(64, 1024, 6, 128),
    "MLP": mlp(bf16(65536, 768), bf16(3072, 768), bf16(3072), bf16(768, 3072)),
}


class Compiled(NamedTuple):
    launch: str
    kernel: str
    dtype: str  # of its first pointer
    card: int  # 90: sm_90
    constants: str
    warps: int
    stages: int
    registers: int  # a thread
    spilled: int  # bytes of stack a thread: local memory is where registers spill to
    shared: int  # bytes a block
    limit: int  # of the card
    multiplies: bool  # has a tl.dot
    unit: str  # the matrix instruction in its PTX


def kernels_of(launch, card: int) -> list:
    """The kernels that a launch would start on a card, compiled, each once."""
    kernels, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        kernels.append(run(kernel, *args, grid=grid, warmup=True, **options))

    # Triton keeps its kernels by device: a number for each card
    only_told = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", card, 32),
                                get_current_device=lambda: card, get_current_stream=lambda device: 0)
    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(driver, "_active", only_told):
        launch(divmod(card, 10))
    assert kernels, "nothing was launched; Triton's interpreter (TRITON_INTERPRET) compiles nothing"
    return list(dict.fromkeys(kernels))


def resources(cubin: bytes) -> dict[str, int]:
    """{"REG": registers a thread, "STACK": bytes a thread, ...} of a binary with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", said)}


def describe(name: str, kernel, card: int) -> Compiled:
    source, ptx, used = kernel.src, kernel.asm["ptx"], resources(kernel.asm["cubin"])
    dtype = next(kind[1:] for kind in source.signature.values() if kind.startswith("*"))
    constants = " ".join(f"{source.fn.arg_names[i]}={value}" for (i,), value in source.constants.items())
    return Compiled(name, kernel.name, dtype, card, constants, kernel.metadata.num_warps, kernel.metadata.num_stages,
                    used["REG"], used["STACK"] + used["LOCAL"], kernel.metadata.shared, LIMITS[card] * 1024,
                    "tt.dot" in kernel.asm["ttir"], next((unit for unit in MATRIX_UNITS if unit in ptx), "none"))


def compiled() -> list[Compiled]:
    """Every kernel of LAUNCHES for every card, each under the first entry that launches it."""
    rows = {}
    with tqdm(total=len(LAUNCHES) * len(LIMITS), disable=None) as bar:
        for name, launch in LAUNCHES.items():
            for card in LIMITS:
                for kernel in kernels_of(launch, card):
                    rows.setdefault(kernel.hash, describe(name, kernel, card))
                bar.update()
    return list(rows.values())


def main(words: list[str]):
    _, out = parse("compile", __doc__, words)
    table = markdown([{
        "launch": r.launch, "kernel": r.kernel, "dtype": r.dtype, "card": f"sm_{r.card}", "constants": r.constants,
        "warps": r.warps, "stages": r.stages, "registers": r.registers, "spilled": r.spilled,
        "shared KB": r.shared // 1024, "limit KB": r.limit // 1024, "matrix unit": r.unit} for r in compiled()])
    publish("bench.compile", [], out,
            f"Compiled, not run, by ptxas {knobs.nvidia.ptxas.version}, from sm_100 on "
            f"{knobs.nvidia.ptxas_blackwell.version}. Registers and spilled bytes are a thread's; shared memory is a "
            "block's, limit the most that the card gives a block.", table)


if __name__ == "__main__":
    main(sys.argv[1:])
