"""A small corpus and a small run, shared by the tests of the trainer.

Every process of a test computes on one thread: pytest's workers fill the cores, and OpenMP's threads spin while they
wait for a core. On two cores, two threads a worker made tests of small tensors ten times as slow.

Tests of kernels put their tensors on DEVICE; those of kernels that multiply matrices take their dtypes from
MATMUL_DTYPES.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # isort: split, before PyTorch is imported

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.interpreter import DEVICE  # isort: skip, before Triton is imported

import train_gpt
from harness.checkpoint import SIGNALS

# on a GPU fp32 products are cuBLAS's
needs_interpreter = pytest.mark.skipif(DEVICE.type == "cuda", reason="needs Triton's interpreter")
MATMUL_DTYPES = [torch.float16, torch.bfloat16, pytest.param(torch.float32, marks=needs_interpreter)]

ROOT = Path(__file__).resolve().parent.parent
EOT = 50256


def matrix_rule(direction: str, normalise: str = "") -> str:
    """The text of a rule of the record's family, by its direction and by what follows contra."""
    return " | ".join(["nesterov(0.95)", direction, "contra(0.4)", *filter(None, [normalise]), "aspect", "floor(0.35)",
                       "step"])


# the published members of the family, and AdamW
UPDATES = {
    "aurora": matrix_rule("aurora(2, 0.5)"),
    "aurora_july": matrix_rule("aurora_july(2, 0.5)"),
    "aurora_paper": matrix_rule("aurora_paper(2, 0.5)"),
    "aurora_wide": matrix_rule("aurora_wide(3, 0.25)"),
    "riemannian_aurora": matrix_rule("riemannian_aurora(3, 0.1)"),
    "muon": matrix_rule("polar"),
    "normuon": matrix_rule("jordan_polar", "normuon(0.95)"),
    "normuon_lite": matrix_rule("polar", "normuon_lite(0.95)"),
    "u_normuon": matrix_rule("polar", "u_normuon"),
    "adamw": "adamw(0.9, 0.95, 1e-10, 0.1)",
}
# all that result #46 has, and what claims after it add, at steps of a short run
SOAP_MUON = [
    "matrix_update=bimaxwell(ramp(0.85, 0.95, 0, 4), 0.85, ramp(0.95, 0.98, 1, 2)) | soap(0.9, 0.9) | "
    "trust_gate(0, 0.85, names(0, attn_proj=1)) | schatten4_polar | anneal(at_least(power(1, 6, 4, 1.2), 0.3)) | "
    "aspect | brake(0.5) | row_floor(1.75) | step | pin | cautious_decay(0.5)",
    "adam_update=adamw(0.8, 0.99, 1e-10, 0)",
    "head_update=eigen_adam(0.8, 0.99, 1e-10, 1, 1) | step",
    "vector_update=raw_adam(0.8, names(0.997, gains=0.99, attn_proj_bias=0.9965), 1e-10) | step",
    "final_update=anchored_average(1, 2, names(0.6, embed=0), ramp(0, 0.45, 0, 2)) | lookahead(between(0.3, 1, 5))"]


def write_shard(path: Path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def poisoned():
    """Memory that nothing has been written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Two training shards and a validation shard of a text that is easy to learn: sentences over twelve words."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = random.integers(0, 400, (12, 5))
    text = np.concatenate([np.append(400, words[random.integers(0, 12, 40)]) for _ in range(150)])
    write_shard(folder / "val_000000.bin", text[:3000])
    write_shard(folder / "train_000001.bin", text[3000:13000])
    write_shard(folder / "train_000002.bin", text[13000:])
    return folder


@pytest.fixture(scope="session")
def small(corpus) -> list[str]:
    """Overrides for a run of seconds: 8 sequences of 32 tokens a step, 2 layers of width 32."""
    return [f"train_files={corpus}/train_*.bin", f"val_files={corpus}/val_*.bin", "batch_tokens=256",
            "sequence_length=32", "val_tokens=512", "micro_batch=2", "vocab_size=512", "num_layers=2",
            "model_dim=32", "head_dim=16", "train_steps=40", "val_every=10", "val_every_late=2", "target_loss=5"]


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> list[str]:
    """Overrides for a run of 8 steps that take milliseconds: 8 sequences of 16 tokens, of 512, a step."""
    folder = tmp_path_factory.mktemp("quick")
    random = np.random.default_rng(1)
    for name, tokens in (("val", 300), ("train_1", 600), ("train_2", 900)):
        write_shard(folder / f"{name}.bin", random.integers(0, 20, tokens) * 7)
    return [f"train_files={folder}/train_*.bin", f"val_files={folder}/val.bin", "batch_tokens=128",
            "sequence_length=16", "val_tokens=256", "micro_batch=2", "vocab_size=512", "num_layers=2",
            "model_dim=32", "head_dim=16", "train_steps=8", "val_every=4", "val_every_late=4", "target_loss=5"]


def sliced(x, index):
    """x[index] of slices, and perhaps an ellipsis, by the operator alone."""
    index = index if isinstance(index, tuple) else (index, ...)
    first, last = index[:index.index(...)], index[index.index(...) + 1:]
    for dim, part in (*enumerate(first), *enumerate(last, -len(last))):
        x = torch.ops.aten.slice(x, dim, part.start, part.stop)
    return x


class Unguarded(TorchFunctionMode):
    """Slices and copies by their operators alone: Python's own ask for a guard of the device first, which a PyTorch
    that is built without CUDA lacks. Fake tensors of a GPU need none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return sliced(*args)
        if function is torch.Tensor.__setitem__:
            return torch.ops.aten.copy_(sliced(*args[:2]), args[2])
        return (torch.ops.aten.copy_ if function is torch.Tensor.copy_ else function)(*args, **(kwargs or {}))


@contextlib.contextmanager
def one_process():
    """A process group of this process alone, such as the trainer's sums go over."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def train(folder: Path, words):
    """In this process, which is quicker, and which no step may end, however long a loaded machine takes for what a test
    does in it. The signals' handlers are put back."""
    folder.mkdir(exist_ok=True)
    before, handlers = Path.cwd(), {number: signal.getsignal(number) for number in SIGNALS}
    os.chdir(folder)
    try:
        with mock.patch("harness.heartbeat.STALLED", math.inf):
            train_gpt.main(list(words))
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(words: list[str], folder: Path, script: Path = ROOT / "train_gpt.py", processes: int = 0, **environment):
    """Run the trainer in a folder: alone, or as a number of processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    unwanted = "TORCH", "TRITON", "RANK", "WORLD", "LOCAL_", "MASTER"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    # on the CPU also where there is a GPU: the same bits are asked for, and more processes than it may have GPUs
    return subprocess.run([sys.executable, *launcher, str(script), *words], cwd=folder, text=True, capture_output=True,
                          env=clean | {"CUDA_VISIBLE_DEVICES": ""} | environment, timeout=120)


def wait_for(what):
    """Another process to get so far, for a minute at most."""
    for _ in range(3000):
        if what():
            return
        time.sleep(0.02)
    raise AssertionError
