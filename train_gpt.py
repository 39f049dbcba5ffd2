"""GPT-2 small on FineWeb to a validation loss of 3.28 in 3175 steps (result #17 of the speedrun's track 3).

    torchrun --standalone --nproc_per_node=8 train_gpt.py [@RECIPE] [NAME=VALUE ...]

runs on 8 GPUs, on any number that divides the batch, and, without a GPU, on the CPU. `python train_gpt.py` is one
process. NAME=VALUE overrides a field of Hyperparameters below; @tiny takes the overrides in records/tiny/recipe.

Published: mean 3.278845 at step 3175, n=20, 8xH100, 157 ms a step. Descends from
github.com/KellerJordan/modded-nanogpt, records/track_3_optimization/results/20260505_aurora.
Read downwards: hyperparameters, data, model, banks of parameters, initialisation and optimizers, log, neurons,
training, checkpoints.
"""

import argparse
import ast
import builtins
import fcntl
import glob
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import signal
import subprocess
import symtable
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from tqdm import tqdm

from aurora import Rule, Shares, leverage_scores, nearest, with_knob
from checkpoint import Writer, read_checkpoint
from heartbeat import Heartbeat
from kernels.bf16 import linear, runs_kernels
from kernels.cross_entropy import head_loss
from kernels.mlp import relu2_mlp
from kernels.newton_schulz import newton_schulz_path
from kernels.norm import prenorm
from kernels.qkv import qkv_heads

HERE = Path(__file__).resolve().parent


########################################
#           Hyperparameters            #
########################################

@dataclass(frozen=True)
class Hyperparameters:
    """The defaults are result #17. A run writes the values that it used into the source at the head of its log."""
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # read in sorted order, each from its start
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"
    batch_tokens: int = 8 * 64 * 1024  # tokens a step, over all ranks
    sequence_length: int = 1024  # tokens
    val_tokens: int = 20 * 524288  # tokens; the first ones of the validation shard
    micro_batch: int = 64  # sequences a forward and backward pass at most; costs memory, changes no result
    # model
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 128
    num_layers: int = 12
    model_dim: int = 768
    head_dim: int = 128
    mlp_expansion: float = 4.0  # neurons of an MLP, in model_dim
    activation: str = "relu2"  # or "swiglu", whose gate is a third matrix of the MLP
    # update rules, in the language at the head of aurora.py; STAGE.KNOB=VALUE on the command line changes one number
    matrix_update: str = "nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step"
    matrix_lr: float = 0.0375  # the matrices of the blocks
    adam_update: str = "adamw(0.8, 0.95, 1e-10, 0)"  # of all other parameters
    embed_lr: float = 0.3
    head_lr: float = 1 / 320
    vector_lr: float = 0.01  # biases and gains
    # schedule: constant, then linear to 0
    warmup_steps: int = 1  # the first step has 1 / warmup_steps of the rate: 1 is no warm-up
    train_steps: int = 3200  # the published step is 3175: the learning rate has not reached 0 there
    cooldown_frac: float = 0.7
    # validation
    val_every: int = 125  # steps
    val_every_late: int = 25  # steps, from 0.9 of train_steps
    target_loss: float = 3.28  # nats a token

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and not 1 <= value < 2**63 or f.type is float and not 0 <= value < math.inf:
                bound = "at least 1 and below 2^63" if f.type is int else "finite and not negative"
                raise ValueError(f"{f.name}={value}: it is {bound}")
        for whole, part in (("batch_tokens", "sequence_length"), ("val_tokens", "sequence_length"),
                            ("model_dim", "head_dim")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part}={getattr(self, part)} does not divide {whole}={getattr(self, whole)}")
        if self.head_dim % 4:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding needs a multiple of 4")
        if self.activation not in ("relu2", "swiglu"):
            raise ValueError(f"activation={self.activation!r}: it is one of relu2, swiglu")
        for name in ("matrix_update", "adam_update"):
            try:
                rule = Rule.of(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if not rule.alone:
            raise ValueError(f"adam_update={self.adam_update!r}: vectors and numbers have no rows; it is adamw(...)")
        if self.mlp_expansion * self.model_dim >= 2**31:
            raise ValueError(f"mlp_expansion={self.mlp_expansion}: {self.model_dim} times that is too many neurons")
        if not self.mlp_dim:
            raise ValueError(f"mlp_expansion={self.mlp_expansion}: no neuron is left of {self.model_dim} times that")
        if not 0 < self.cooldown_frac <= 1:
            raise ValueError(f"cooldown_frac={self.cooldown_frac}: it is a fraction of train_steps, above 0")

    @property
    def mlp_dim(self) -> int:
        return round(self.mlp_expansion * self.model_dim)


# What the rules of track 3 fix, at result #17's values; the data are named shard by shard in the log. The desk, which
# does without torch, reads this from the text: a literal.
RULES = {"batch_tokens": 524288, "val_tokens": 10485760, "sequence_length": 1024, "vocab_size": 50304, "num_layers": 12,
         "model_dim": 768, "head_dim": 128, "mlp_expansion": 4.0, "activation": "relu2", "target_loss": 3.28}


def departures(hp: Hyperparameters) -> list[str]:
    """At most one line: what makes this run no attempt at a record."""
    changed = [f"{name}={getattr(hp, name)}" for name in RULES if getattr(hp, name) != RULES[name]]
    return [f"not a record attempt: unlike result #17, {', '.join(changed)}"] if changed else []


def override(words: list[str]) -> Hyperparameters:
    """Hyperparameters from NAME=VALUE, STAGE.KNOB=VALUE and @RECIPE words; a later word wins. ValueError names what is
    wrong."""
    types = {f.name: f.type for f in fields(Hyperparameters)}
    values = {}
    for word in (line for word in words for line in (recipe(word[1:]) if word.startswith("@") else [word])):
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not understood: write NAME=VALUE or @RECIPE")
        if "." in name:
            name, text = change_rule(values, word)
        if name not in types:
            raise ValueError(f"{name!r} is not a hyperparameter; the nearest is {nearest(name, types)!r}")
        try:
            values[name] = types[name](text)
        except ValueError:
            raise ValueError(f"{word}: {name} takes a value of type {types[name].__name__}") from None
    return Hyperparameters(**values)


def change_rule(values: dict, word: str) -> tuple[str, str]:
    """Name and new text of the rule that STAGE.KNOB=VALUE changes: of the only one that has this stage."""
    name, _, value = word.partition("=")
    stage, _, knob = name.partition(".")
    rules = {field: values.get(field, getattr(Hyperparameters, field)) for field in ("matrix_update", "adam_update")}
    stages = {field: [part.stage.name for part in Rule.of(text).parts] for field, text in rules.items()}
    fields_of_stage = [field for field in rules if stage in stages[field]]
    if not fields_of_stage:
        known = [name for names in stages.values() for name in names]
        raise ValueError(f"{word}: no rule of this run has a stage {stage!r}; the nearest is {nearest(stage, known)!r}")
    if len(fields_of_stage) > 1:
        raise ValueError(f"{word}: {stage} is in {' and '.join(fields_of_stage)}; write the one that you mean whole")
    return fields_of_stage[0], with_knob(rules[fields_of_stage[0]], stage, knob, value)


def recipe(name: str) -> list[str]:
    """The overrides in records/NAME/recipe, or in a file of that name: one a line, # begins a comment."""
    path = next((p for p in (Path(name), HERE / "records" / name / "recipe") if p.is_file()), None)
    if path is None:
        raise ValueError(f"@{name}: there is no records/{name}/recipe and no file {name}")
    try:
        if path.stat().st_size > 2**16:
            raise ValueError
        text = path.read_text()
    except ValueError:
        raise ValueError(f"{path} is no recipe: it is a text of at most 64 KiB, one NAME=VALUE a line") from None
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


########################################
#                 Data                 #
########################################

def open_shard(path: str) -> np.ndarray:
    """Tokens of a .bin shard as a read-only map: 256 int32 of header (20240520, 1, count), then uint16 tokens."""
    header = np.fromfile(path, dtype="<i4", count=256)
    size = os.path.getsize(path)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError(f"{path} is not a token shard: delete it and make it again with the program in data/")
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f"{path} holds {(size - 1024) // 2} tokens, its header says {header[2]}: "
                         "delete it and make it again with the program in data/")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


def batches_in(tokens: np.ndarray, batch_tokens: int) -> int:
    """As upstream counts: a batch is read while position + batch + 1 < length, so 100M tokens give 190 of 524,288."""
    return max(0, (len(tokens) - 2) // batch_tokens)


def find_shards(pattern: str, batch_tokens: int, batches: int, vocab_size: int) -> dict[str, int]:
    """{path: tokens} of the shards, in sorted order, that the first `batches` batches come from. ValueError names
    a shard that is missing, damaged, too short, or of another vocabulary."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise ValueError(f"no file {pattern}: python data/cached_fineweb10B.py downloads FineWeb, "
                         "python data/local.py makes shards of text on this machine")
    found, available = {}, 0
    while paths and available < batches:
        tokens = open_shard(path := paths.pop(0))
        if len(tokens) and tokens.max() >= vocab_size:
            raise ValueError(f"{path} holds token {tokens.max()}, vocab_size is {vocab_size}: "
                             "delete it and make it again with the program in data/")
        found[path] = len(tokens)
        available += batches_in(tokens, batch_tokens)
    if available < batches:
        raise ValueError(f"{batches} batches of {batch_tokens} tokens are needed, {pattern} holds {available}: "
                         "make or download more shards (see data/), or ask for less")
    return found


def fineweb_shards(hp: Hyperparameters) -> int:
    """How many of FineWeb's training shards, of 100M tokens each, the run reads; 0 where it reads other files."""
    batches = (100_000_000 - 2) // hp.batch_tokens
    return -(-hp.train_steps // batches) if hp.train_files == Hyperparameters.train_files else 0


class Place(NamedTuple):
    """Where this process stands."""
    rank: int
    world: int
    device: torch.device
    attention: str = "PyTorch"  # whose


def read_batches(shards, batch_tokens: int, sequence_length: int, place: Place, first: int = 0):
    """Yield (inputs, targets), each (sequences, sequence_length), of this rank's contiguous part of every batch from
    the first on."""
    part = batch_tokens // place.world
    for tokens in map(open_shard, shards):
        batches = batches_in(tokens, batch_tokens)
        skipped = min(first, batches)
        first -= skipped
        for batch in range(skipped, batches):
            start = batch * batch_tokens + place.rank * part
            window = torch.from_numpy(tokens[start:start + part + 1].astype(np.int32))
            if place.device.type == "cuda":
                window = window.pin_memory()  # a copy from pageable memory would wait for the GPU's queue
            window = window.to(place.device, non_blocking=True)
            yield window[:-1].view(-1, sequence_length), window[1:].long().view(-1, sequence_length)


########################################
#                Model                 #
########################################
# B sequences, T tokens each, D model_dim, H heads of size K, V vocab_size.
# Activations and weights are bf16. The fp32 masters of the weights live in the banks below, each with its owner.

class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight=self.gains)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Rotary(nn.Module):
    """Half-truncated rotary embedding: half of the angles turn, with wavelengths up to 2 pi 1024, half stand still."""

    def __init__(self, head_dim: int):
        super().__init__()
        turning = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("frequency", torch.cat([turning, torch.zeros_like(turning)]))  # (K/2)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(length, device=self.frequency.device), self.frequency)
        return angle.cos(), angle.sin()  # (T, K/2) each, fp32


class Attention(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = qkv_heads(x, self.qkv.weight, self.qkv.bias, *rotary, self.head_dim)  # (B, H, T, K)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.12, is_causal=True)
        return linear(y.transpose(1, 2).flatten(2), self.proj.weight)


class MLP(nn.Module):
    """relu2: proj(relu(fc x)^2). swiglu: proj(silu(gate x) * fc x). Without the bias of proj, as Attention."""

    def __init__(self, dim: int, mlp_dim: int, activation: str):
        super().__init__()
        self.gate = Linear(dim, mlp_dim) if activation == "swiglu" else None
        self.fc = Linear(dim, mlp_dim)
        self.proj = Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return relu2_mlp(x, self.fc.weight, self.fc.bias, self.proj.weight)
        return linear(F.silu(self.gate(x)) * self.fc(x), self.proj.weight)


class Block(nn.Module):
    """x -> x + b + f(norm(x)), f attention and then the MLP, b the bias of its last product (see kernels/norm.py)."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(hp.model_dim), RMSNorm(hp.model_dim)
        self.attn = Attention(hp.model_dim, hp.head_dim)
        self.mlp = MLP(hp.model_dim, hp.mlp_dim, hp.activation)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x, h = prenorm(x, self.norm1.gains, self.attn.proj.bias)
        x = x + self.attn(h, rotary)
        x, h = prenorm(x, self.norm2.gains, self.mlp.proj.bias)
        return x + self.mlp(h)


class GPT(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.embed = nn.Embedding(hp.vocab_size, hp.model_dim, dtype=torch.bfloat16)
        self.norm1, self.norm2 = RMSNorm(hp.model_dim), RMSNorm(hp.model_dim)
        self.rotary = Rotary(hp.head_dim)
        self.blocks = nn.ModuleList(Block(hp) for _ in range(hp.num_layers))
        self.head = Linear(hp.model_dim, hp.vocab_size)

    def activations(self, inputs: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, D) in bf16, which the head reads."""
        x = self.norm1(self.embed(inputs))
        rotary = self.rotary(inputs.size(1))
        for block in self.blocks:
            x = block(x, rotary)
        return self.norm2(x)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the tokens: sums of micro-batches and ranks are sums of the batch."""
        x = self.activations(inputs).flatten(0, 1)
        return head_loss(x, self.head.weight, self.head.bias, targets.flatten())


########################################
#         Banks of parameters          #
########################################
# A step moves each number twice: its gradient to the rank that owns it, its new weight from there to all ranks.


class Replayed:
    """Runs an update as one CUDA graph: one launch in place of hundreds.

    The first call runs the update as it is, which compiles its kernels. The second captures the
    update, in the pool of memory that all graphs share, and every call from then on replays what was captured. The
    update is handed in at each call, not kept: a Bank that kept itself alive would outlive its trial, with its GBs.
    """

    def __init__(self, pool):
        self.pool, self.graph, self.called = pool, None, False

    def __call__(self, update: Callable[[], None]):
        if not self.called:
            self.called = True
            update()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog makes calls of its own meanwhile, from its thread
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                update()
            self.graph = graph
        self.graph.replay()


class Bank:
    """The parameters that one update rule moves, back to back in one tensor. A slot is one matrix (all of one shape) or,
    with slot=(), one number.

    Each rank has all weights, in bf16, and its own gradients of them, summed in fp32 over micro-batches. It owns an
    equal run of the slots: their sum over ranks, masters in `dtype`, and the rule's state are there alone. So the
    number of ranks changes nothing but the order of that sum. `lr` is a function of the number of steps done.
    """

    # Numbers are padded to a multiple of this: fused AdamW handles the last few elements of a CPU tensor in a scalar
    # loop that rounds otherwise, and which ones they are would depend on the number of ranks.
    ALIGNED = 64

    def __init__(self, params: dict[str, nn.Parameter], slot: tuple, rule: Rule, lr: Callable[[int], float],
                 device: torch.device, dtype=torch.float32, pool=None):
        self.params, self.rule, self.lr = params, rule, lr
        sizes = [p.numel() // math.prod(slot) for p in params.values()]
        self.slots = [name for name, size in zip(params, sizes) for _ in range(size if slot else 0)]
        self.shares = Shares.of(sum(sizes), multiple=1 if slot else self.ALIGNED)
        self.weights = torch.zeros(self.shares.padded, *slot, dtype=torch.bfloat16, device=device)
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        for p, weight in zip(params.values(), self.views(self.weights)):
            p.data = weight
        self.masters = torch.zeros_like(self.weights[self.shares.mine], dtype=dtype)
        self.state = rule.state(self.masters)
        self.knobs = {name: torch.zeros((), device=device) for name in ("lr", "t", *rule.at(0))}  # a CUDA graph reads them
        captured = device.type == "cuda" and rule.captured
        self.run = Replayed(pool) if captured else lambda update: update()
        self.buffers = {}

    def views(self, slots: Tensor) -> list[Tensor]:
        """A tensor of slots as tensors of the parameters' shapes."""
        sizes = [p.numel() for p in self.params.values()]
        return [x.view_as(p) for x, p in zip(slots.flatten()[:sum(sizes)].split(sizes), self.params.values())]

    def reduce(self):
        """Start to sum over ranks what each owns."""
        self.work = self.shares.reduce(self.gradients)

    def arrive(self):
        if self.work:
            self.work.wait()

    def step(self, step: int):
        """Update this rank's share after `step` steps, and start to send it to all ranks."""
        self.arrive()
        for name, value in (dict(lr=self.lr(step), t=step + 1) | self.rule.at(step)).items():
            self.knobs[name].fill_(value)
        self.advance()
        self.work = self.shares.gather(self.weights)
        self.rule.after_(self.state)

    def advance(self):
        self.run(self._advance)

    @torch.no_grad()
    def _advance(self):
        gradients = self.gradients[self.shares.mine].to(self.masters.dtype)
        self.rule.advance_(self.masters, gradients, self.state, self.knobs)
        self.weights[self.shares.mine] = self.masters

    def gather_state(self) -> dict[str, Tensor]:
        """Collective. On rank 0 returns masters and state of all ranks, (slots, ...), in host buffers that the next call
        writes to; {} elsewhere."""
        whole = {}
        for name, x in dict(masters=self.masters, **self.state).items():
            if self.shares.rank:
                dist.send(x, 0)
                continue
            if name not in self.buffers:  # kept: page faults of a fresh one cost several times the copy
                self.buffers[name] = torch.empty(self.shares.padded, *x.shape[1:], dtype=x.dtype)
            for rank, share in enumerate(self.buffers[name].chunk(self.shares.world)):
                if rank:
                    x = share if x.is_cpu else torch.empty_like(x)
                    dist.recv(x, rank)
                share.copy_(x)
            whole[name] = self.buffers[name][:self.shares.count]
        return whole

    @torch.no_grad()
    def load(self, whole: dict[str, Tensor]):
        """Collective. Take this rank's share of a gather_state(), of any number of ranks, and send the weights. State
        that it lacks, of a stage that another rule did not have, stays zero."""
        for name, x in dict(masters=self.masters, **self.state).items():
            if name in whole:
                x.copy_(self.shares.take(whole[name]))
        self.weights[self.shares.mine] = self.masters
        self.work = self.shares.gather(self.weights)
        self.arrive()


########################################
#     Initialisation & optimizers      #
########################################

def initial_weights(model: GPT, seed: int) -> dict[str, Tensor]:
    """A value for every parameter. Drawn on the CPU in fp32: a seed means the same weights whatever the GPU."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, p in model.named_parameters():
        if name.endswith("gains"):
            values[name] = torch.ones(p.shape)
        elif name.endswith("bias") or name.endswith("proj.weight") or name == "head.weight":
            values[name] = torch.zeros(p.shape)
        elif name == "embed.weight":
            values[name] = torch.randn(p.shape, generator=generator)
        else:
            values[name] = torch.randn(p.shape, generator=generator) * (0.33 / p.size(1)) ** 0.5
    return values


def fill(banks: list[Bank], values: dict[str, Tensor]):
    for bank in banks:
        numbers = torch.cat([values[name].flatten() for name in bank.params])
        bank.load({"masters": numbers.view(bank.shares.count, *bank.masters.shape[1:])})


def make_banks(model: GPT, hp: Hyperparameters, place: Place) -> list[Bank]:
    """Largest matrices first: while they are updated, the other banks' gradients are still being reduced."""
    matrices = {}
    for name, p in model.blocks.named_parameters(prefix="blocks"):
        if p.ndim == 2:  # q, k and v are three matrices
            slot = (p.size(1), p.size(1)) if name.endswith("qkv.weight") else tuple(p.shape)
            matrices.setdefault(slot, {})[name] = p
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    pool = torch.cuda.graph_pool_handle() if place.device.type == "cuda" else None

    def bank(params, slot, update: str, rate: float, dtype=torch.float32) -> Bank:
        return Bank(params, slot, Rule.of(update), lambda step: rate * learning_rate_factor(step, hp), place.device,
                    dtype, pool)
    banks = [bank(params, slot, hp.matrix_update, hp.matrix_lr)
             for slot, params in sorted(matrices.items(), key=lambda x: -math.prod(x[0]))]
    banks += [bank({"head.weight": model.head.weight}, (), hp.adam_update, hp.head_lr),
              bank({"embed.weight": model.embed.weight}, (), hp.adam_update, hp.embed_lr, torch.bfloat16),
              bank(vectors, (), hp.adam_update, hp.vector_lr)]
    names = [name for bank in banks for name in bank.params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    return banks


def learning_rate_factor(step: int, hp: Hyperparameters) -> float:
    """1, then linear over the last cooldown_frac of the steps: the last step's is 1 / (cooldown_frac * train_steps).
    The first warmup_steps are scaled by 1 / warmup_steps, 2 / warmup_steps, ... 1."""
    progress = step / hp.train_steps
    cooldown = 1.0 if progress < 1 - hp.cooldown_frac else (1 - progress) / hp.cooldown_frac
    return min(1.0, (step + 1) / hp.warmup_steps) * cooldown


def is_validation_step(step: int, hp: Hyperparameters) -> bool:
    every = hp.val_every if step / hp.train_steps < 0.9 else hp.val_every_late
    return step % every == 0 or step == hp.train_steps


########################################
#                 Log                  #
########################################

def flatten(path: Path) -> str:
    """A file and the files of this project that it needs as one program: each whole, once and after those that it needs
    itself, under a banner with its name. Their imports of each other become comments, and the docstring of `path`
    comes first, as it is the program's. A file that needs no other is such a program already.
    """
    parts, meanings = {}, {name: f"builtins.{name}" for name in dir(builtins)}

    def add(path: Path):
        name, text = path.relative_to(HERE).as_posix(), path.read_text()
        lines, tree = text.split("\n"), ast.parse(text)
        for node in ast.walk(tree):
            needed = local_files(node)
            if not needed and not getattr(node, "level", 0):
                continue
            plain = node.col_offset == 0 and re.fullmatch(r"from \w[\w.]* import \w+(, \w+)*", ast.unparse(node))
            assert plain and needed[0].name != "__init__.py", (
                f"{name}:{node.lineno}: {lines[node.lineno - 1].strip()}: the log's program is one file; write "
                "`from FILE import NAME`, not indented")
            if needed[0] not in parts:
                add(needed[0])
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = f"# {lines[i]}"
        for word, meaning in names_of(text, tree, name.removesuffix(".py").replace("/", ".")).items():
            assert meanings.setdefault(word, meaning) == meaning, (
                f"{name}: {word} is {meaning} here and {meanings[word]} above; the log's program is one file")
        parts[path] = lines
        return text, tree

    text, tree = add(path)
    if len(parts) == 1:
        return text
    end = tree.body[0].end_lineno
    docstring, parts[path] = parts[path][:end], parts[path][end:]
    texts = [f"{'#' * 80}\n#{file.relative_to(HERE).as_posix():^78}#\n{'#' * 80}\n" + "\n".join(lines)
             for file, lines in parts.items()]
    return "\n\n".join(["\n".join(docstring), *texts])


def local_files(node: ast.AST) -> list[Path]:
    """The files of this project that a statement imports: of a folder, its __init__.py."""
    modules = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
               [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
    places = [HERE / module.replace(".", "/") for module in modules]
    return [file for place in places for file in (Path(f"{place}.py"), place / "__init__.py") if file.is_file()]


def names_of(text: str, tree: ast.Module, module: str) -> dict[str, str]:
    """{name: what it stands for} of all that a module, its text parsed to `tree`, defines or imports at its top level."""
    symbols = symtable.symtable(text, module, "exec").get_symbols()
    names = {symbol.get_name(): f"{module}.{symbol.get_name()}" for symbol in symbols if symbol.is_assigned()}
    for node in tree.body:
        match node:
            case ast.ImportFrom(source, aliases):
                names |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in aliases}
            case ast.Import(aliases):
                names |= {alias.asname or alias.name.split(".")[0]:
                          alias.name if alias.asname else alias.name.split(".")[0] for alias in aliases}
    return names


def render(source: str, hp: Hyperparameters) -> str:
    """The source with the values of this run as the defaults of Hyperparameters; those that differ are written anew."""
    lines = source.splitlines(keepends=True)
    body = next(node.body for node in ast.parse(source).body
                if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters")
    for node in body:
        if isinstance(node, ast.AnnAssign) and getattr(hp, node.target.id) != getattr(Hyperparameters, node.target.id):
            i, value = node.value.lineno - 1, repr(getattr(hp, node.target.id))
            # ast counts columns in bytes of UTF-8; these lines are ASCII up to their comment
            lines[i] = lines[i][:node.value.col_offset] + value + lines[i][node.value.end_col_offset:]
    return "".join(lines)


@cache  # a run that goes on asks twice
def program(hp: Hyperparameters) -> str:
    """All of this program, with the values of the run: what stands at the head of its log."""
    return render(flatten(Path(__file__).resolve()), hp)


def source_sha256(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


class RunLog:
    """logs/NAME.txt, the source and then what upstream's parsers read, and logs/NAME.jsonl, the same for machines.

    Rank 0 writes; on other ranks nothing happens. Files are line-buffered: a killed run leaves whole lines.
    Every `neurons_every` steps, 0 for never, logs/NAME.neurons.jsonl.gz grows by a look at the neurons.
    `lengths`, of a log that goes on, are those to which its files are cut first. OSError where another
    process writes it.
    """

    def __init__(self, name: str | None, neurons_every: int = 0, lengths: dict[str, int] | None = None):
        self.text = self.json = None
        self.neurons_every = neurons_every
        if name is not None:
            Path("logs").mkdir(exist_ok=True)
            self.text, self.json = (open(f"logs/{name}.{ending}", "a" if lengths else "x", buffering=1)
                                    for ending in ("txt", "jsonl"))
            try:
                fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as this process lives
            except BlockingIOError:
                raise BlockingIOError(f"logs/{name}.txt belongs to a run that lives: wait for its end, or end it"
                                      ) from None
            for path, length in log_files(name).items():
                if lengths and length:
                    os.truncate(path, lengths[path])

    def line(self, text: str):
        if self.text:
            self.text.write(text + "\n")

    def record(self, **values):
        if self.json:
            self.json.write(json.dumps(values) + "\n")

    def record_neurons(self, records: list[dict]):
        # a gzip member of its own each time: what a killed run has written can be read
        with gzip.open(f"{self.text.name.removesuffix('.txt')}.neurons.jsonl.gz", "at") as file:
            file.writelines(json.dumps(values) + "\n" for values in records)


def finished_seeds(sha256: str, cut: str | None) -> dict[int, str]:
    """{seed: log} of the trials in logs/ of this source that began at step 0 and ended, with a finite loss; but for
    those of the log that is to be cut to where it goes on."""
    finished = {}
    for path in sorted(set(glob.glob("logs/*.txt")) - {cut}):
        _, facts, body, *_ = *Path(path).read_text(errors="replace").split("=" * 100 + "\n"), "", ""
        if f"source_sha256: {sha256}" in facts.splitlines() and "\npartial: " not in facts:
            _, *trials = re.split(r"^seed: (\d+)\n", body, flags=re.MULTILINE)
            finished |= {int(seed): path for seed, curve in zip(trials[::2], trials[1::2])
                         if re.search(r"^step:(\d+)/\1 val_loss:\d.*\n(?!failed: )", curve, re.MULTILINE)}
    return finished


def log_files(name: str) -> dict[str, int]:
    """{path: bytes} of a run's files, 0 for one that is not there."""
    paths = [f"logs/{name}.{ending}" for ending in ("txt", "jsonl", "neurons.jsonl.gz")]
    return {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}


def facts(hp: Hyperparameters, place: Place, shards: dict[str, int], source: str) -> str:
    """The block after the source: upstream's sentence, then `name: value` lines for whatever else a run depends on."""
    gpu = place.device.type == "cuda"
    device = torch.cuda.get_device_name(place.device) if gpu else processor()
    lines = [f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {device} "
             f"with world_size {place.world}"]
    if gpu:
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        lines.append(f"driver: {driver}")
        lines.append(f"triton: {triton.__version__}")
    else:
        lines.append(f"threads: {torch.get_num_threads()}")
    rule = Rule.of(hp.matrix_update)
    lines += [f"attention: {place.attention}",
              f"kernels: {'Triton' if runs_kernels(place.device) else 'plain PyTorch'}",
              f"newton_schulz: {newton_schulz_path(place.device)}",
              f"update: {'compiled, ' * (not rule.alone) + 'a CUDA graph a bank' * rule.captured if gpu else 'eager'}"]
    dirty = output_of("git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no")
    lines += [f"commit: {output_of('git', '-C', str(HERE), 'rev-parse', 'HEAD') or 'none'}{' (dirty)' * bool(dirty)}",
              f"source_sha256: {source_sha256(source)}",
              f"micro_batch: {micro_batch_size(hp.batch_tokens // hp.sequence_length // place.world, hp.micro_batch)}"]
    lines += departures(hp)
    lines += [f"shard: {path} {count}" for path, count in shards.items()]
    lines += [f"env: {name}={value}" for name, value in sorted(os.environ.items())
              if name.startswith(("TORCH", "TRITON", "NCCL", "CUDA"))]
    return "\n".join(lines)


def output_of(*command: str) -> str:
    """What a program prints, stripped; nothing where it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    names = re.findall(r"^model name\s*: (.+)$", output_of("cat", "/proc/cpuinfo"), re.MULTILINE)
    return f"CPU {names[0]}" if names else "CPU"


########################################
#               Neurons                #
########################################
# --neurons K looks at the MLPs' neurons every K steps, for `python -m records neurons`. It changes no result, and
# costs nothing at the other steps. Neuron i is row i of fc and, where there is one, of the gate.

def owned_neurons(banks: list[Bank]) -> dict[str, tuple[Bank, int]]:
    """{name of a weight (neurons, model_dim): its bank and its index there} of those that this rank owns."""
    return {name: (bank, i) for bank in banks for i, name in enumerate(bank.slots[bank.shares.mine])
            if name.endswith(("mlp.fc.weight", "mlp.gate.weight"))}


@torch.no_grad()
def neuron_rows(bank: Bank, i: int, before: Tensor) -> dict[str, list[float]]:
    """Leverage scores of the momentum (the first state that the rule keeps), and row norms: of the momentum, of the
    gradient of the batch's summed loss, and of this step's change of the weights, its learning rate, decay and floor
    included."""
    momentum = next(iter(bank.state.values()))[i]
    rows = dict(leverage=leverage_scores(momentum), momentum=momentum.norm(dim=1),
                gradient=bank.gradients[bank.shares.mine][i].norm(dim=1),
                update=(bank.masters[i] - before).norm(dim=1))
    return {name: [float(f"{x:.4g}") for x in values.tolist()] for name, values in rows.items()}


def record_neurons(banks: list[Bank], before: dict[str, Tensor], seed: int, step: int, place: Place, log: RunLog):
    """Collect what the owner of each matrix knows of its neurons; a line for each matrix."""
    mine = {name: neuron_rows(bank, i, before[name]) | dict(inputs=bank.masters.size(-1))
            for name, (bank, i) in owned_neurons(banks).items()}
    shares = [None] * place.world if place.rank == 0 else None
    dist.gather_object(mine, shares)
    if place.rank == 0:
        rows = [(int(name.split(".")[1]), name.split(".")[3], values) for share in shares
                for name, values in share.items()]
        log.record_neurons([dict(seed=seed, step=step, layer=layer, matrix=matrix, **values)
                            for layer, matrix, values in sorted(rows, key=lambda row: row[:2])])


########################################
#               Training               #
########################################

class Clock:
    """Seconds of training, every rank and the GPU's queue waited for. From a read() to a resume() nothing counts."""

    def __init__(self, place: Place):
        self.place, self.seconds = place, 0.0
        self.mark = self.now()

    def now(self) -> float:
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    def read(self) -> float:
        now = self.now()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        return self.seconds

    def resume(self):
        self.mark = self.now()


def micro_batch_size(sequences: int, at_most: int) -> int:
    """The largest divisor of a rank's sequences that is at_most."""
    return max(d for d in range(1, at_most + 1) if sequences % d == 0)


def micro_batches(inputs: Tensor, targets: Tensor, at_most: int):
    size = micro_batch_size(len(inputs), at_most)
    return zip(inputs.split(size), targets.split(size))


def accumulate_gradients(model: GPT, banks: list[Bank], batch: tuple[Tensor, Tensor], hp: Hyperparameters) -> Tensor:
    """Sum the micro-batches' gradients in the banks, and start to sum them over ranks. Returns this rank's summed loss.

    A micro-batch's own gradient is bf16, as the published program's; the sums are fp32, so that no number of ranks or
    micro-batches is favoured. FloatingPointError, on all ranks, where one has a gradient that is not finite.
    """
    names = [name for bank in banks for name in bank.params]
    params = [p for bank in banks for p in bank.params.values()]
    sums = [view for bank in banks for view in bank.views(bank.gradients)]
    put = torch._foreach_copy_  # the first; the others are added
    total = torch.zeros((), device=sums[0].device, dtype=torch.float64)
    for micro_batch in micro_batches(*batch, hp.micro_batch):
        loss = model(*micro_batch)
        loss.backward()
        total += loss.detach()
        put(sums, [p.grad for p in params])
        put = torch._foreach_add_
        model.zero_grad()
    flags = not_finite(sums)
    for bank in banks:
        bank.reduce()
    if flags.any():  # here the program waits for the GPU: no later place is early enough
        rank, first = flags.nonzero()[0].tolist()
        others = f" and of {int(flags[rank].sum()) - 1} others" if flags[rank].sum() > 1 else ""
        raise FloatingPointError(f"the gradient of {names[first]}{others} is not finite on rank {rank}")
    return total


def not_finite(gradients: list[Tensor]) -> Tensor:
    """(ranks, gradients): 1 where a rank's own gradient has no finite norm.

    Before the sum over ranks, which would hide whose they are, and before the optimizers: no weight is spoiled, and a
    checkpoint never holds a NaN.
    """
    flags = torch.zeros(dist.get_world_size(), len(gradients), device=gradients[0].device)
    flags[dist.get_rank()] = (~torch.stack(torch._foreach_norm(gradients)).isfinite()).float()
    dist.all_reduce(flags)
    return flags


def update(banks: list[Bank], step: int):
    """A step of all banks, after `step` steps."""
    for bank in banks:
        bank.step(step)
    for bank in banks:
        bank.arrive()


@torch.no_grad()
def validation_loss(model: GPT, inputs: Tensor, targets: Tensor, hp: Hyperparameters) -> float:
    """Mean over the validation tokens of all ranks, in nats a token."""
    total = torch.zeros((), device=inputs.device, dtype=torch.float64)
    for micro_inputs, micro_targets in micro_batches(inputs, targets, hp.micro_batch):
        total += model(micro_inputs, micro_targets)
    dist.all_reduce(total)
    return total.item() / hp.val_tokens


def peak_memory(place: Place) -> int:
    """Bytes: the most that this process has held on its GPU, or resident without one."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_reference(hp: Hyperparameters) -> dict[int, tuple]:
    """{step: (mean, sd, slope, half_width)} of result #17 (records/published), for display; empty for another recipe
    and where the file is not there."""
    path = HERE / "records" / "published" / "reference_17.csv"
    if hp.target_loss != 3.28 or not path.is_file():
        return {}
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return {int(step): tuple(map(float, row)) for step, *row in rows} if rows[-1][0] == str(hp.train_steps) else {}


def against_reference(step: int, val_loss: float, reference: dict[int, tuple]) -> str:
    """How far the loss is from result #17's, in deviations between its runs; after 60% of the steps also the final
    loss that this foretells, +- 95%: too wide to be of use before, and no ground to stop a run at any time."""
    if step not in reference:
        return ""
    (mean, sd, slope, half_width), last = reference[step], max(reference)
    final = f", final {reference[last][0] + slope * (val_loss - mean):.4f} +- {half_width:.4f}"
    return f" #17 {(val_loss - mean) / sd:+.1f} sd" + final * (0.6 * last <= step < last)


def mirror_to_wandb(log: RunLog, mode: str, hp: Hyperparameters):
    """Send to Weights & Biases, too, whatever the sidecar gets from here on; a trial's curves are named by its seed."""
    import wandb  # not in requirements.txt: only --wandb needs it
    run = wandb.init(project="track-3", name=Path(log.text.name).stem, dir="logs", mode=mode, config=vars(hp))
    run.define_metric("*", step_metric="step")  # W&B's own step may not fall back, as it does from trial to trial
    write = log.record

    def record(seed: int, step: int, **values):
        write(seed=seed, step=step, **values)
        run.log({"step": step} | {f"{name}/seed {seed}": value for name, value in values.items()})
    log.record = record


class Trial:
    """What a run tells on its way: lines to its log, values to the sidecar, progress to the terminal."""

    def __init__(self, hp: Hyperparameters, seed: int, place: Place, log: RunLog):
        self.hp, self.seed, self.place, self.log = hp, seed, place, log
        self.bar = tqdm(total=hp.train_steps, desc=f"seed {seed}", disable=None if place.rank == 0 else True,
                        leave=False,
                        bar_format="{desc} {percentage:3.0f}%|{bar:10}| {n}/{total}{postfix} [{elapsed}<{remaining}]")
        self.reference = read_reference(hp)
        self.initial = math.inf  # the validation loss before the first step
        self.clock = Clock(place)
        self.validated = self.logged = (0, 0.0)  # step, seconds

    def after_validation(self, step: int, seconds: float, val_loss: float):
        """FloatingPointError where the loss is not finite or, a tenth of the way on, above that of step 0."""
        step_avg = (seconds - self.validated[1]) / (step - self.validated[0]) if step else math.nan
        self.validated = (step, seconds)
        line = (f"step:{step}/{self.hp.train_steps} val_loss:{val_loss:.5f} "
                f"train_time:{seconds:.3f}s step_avg:{1000 * step_avg:.2f}ms")
        self.log.line(line)
        self.log.record(seed=self.seed, step=step, val_loss=val_loss, train_time=seconds)
        if self.place.rank == 0:
            self.bar.write(line)
        self.bar.set_description_str(f"seed {self.seed}" + against_reference(step, val_loss, self.reference))
        if step == 0:
            self.initial = val_loss
        diverged = step >= 0.1 * self.hp.train_steps and val_loss > self.initial
        if diverged or not math.isfinite(val_loss):
            raise FloatingPointError(f"the validation loss at step {step} is {val_loss}")

    def state(self) -> dict:
        return dict(initial=self.initial, seconds=self.clock.seconds, validated=self.validated, logged=self.logged)

    def go_on(self, step: int, initial: float, seconds: float, validated: tuple, logged: tuple):
        self.initial, self.clock.seconds, self.validated, self.logged = initial, seconds, validated, logged
        self.bar.initial = self.bar.n = step

    def fail(self, error: FloatingPointError):
        """The last line of this trial; another may follow."""
        self.bar.close()
        self.log.line(f"failed: {error}")
        if self.place.rank == 0:
            print(f"train_gpt.py: seed {self.seed}: {error}", file=sys.stderr)

    def after_step(self, step: int, loss: Tensor, lr: float):
        """`loss`: this rank's, summed over the tokens of the step's batch."""
        self.bar.update()
        if step % max(1, self.hp.train_steps // 128):  # to read a loss is to wait for the GPU
            return
        dist.all_reduce(loss)
        loss = loss.item() / self.hp.batch_tokens
        seconds = self.clock.read()
        step_time = (seconds - self.logged[1]) / (step - self.logged[0])
        self.logged = (step, seconds)
        tokens_per_second = self.hp.batch_tokens / step_time
        self.log.record(seed=self.seed, step=step, loss=loss, lr=lr, train_time=seconds,
                        tokens_per_second=tokens_per_second, peak_memory=peak_memory(self.place))
        self.bar.set_postfix_str(f"loss {loss:.3f}, {1000 * step_time:.0f} ms/step, {tokens_per_second:,.0f} tok/s",
                                 refresh=False)


########################################
#             Checkpoints              #
########################################
# --checkpoint-every N keeps the newest state in logs/NAME.checkpoint, for --resume and --fork-from, and so do signals
# from then on. The place in the data follows from the step; nothing is drawn at random after the initialisation.

STATE = dict(hyperparameters=dict, source_sha256=str, end=int, neurons=int, every=int, failed=bool, seed=int, step=int,
             trial=dict, banks=list, lengths=dict)  # `end`: of the seeds
SIGNALS = {signal.SIGUSR1: 1, signal.SIGTERM: 2, signal.SIGINT: 2}  # ask for a checkpoint; 2: and for the end


class Checkpoints:
    """`run` is what stays the same in a run: its hyperparameters, its source's hash, how it was started."""

    def __init__(self, run: dict, log: RunLog, place: Place):
        self.run, self.every, self.log, self.place, self.asked = run, run["every"], log, place, 0
        self.writer = Writer()
        for number in SIGNALS if self.every else ():
            signal.signal(number, lambda number, _: setattr(self, "asked", max(self.asked, SIGNALS[number])))

    def agree(self) -> int:
        """What a signal to any rank has asked for since the last call. A collective, where the GPU is waited for."""
        if not self.every:
            return 0
        asked, self.asked = torch.tensor(self.asked, device=self.place.device), 0
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return asked.item()

    def save(self, step: int, banks: list[Bank], trial: Trial, stop: bool):
        """A collective, not counted as training. The file is written while the training goes on."""
        trial.clock.read()
        self.writer.wait()
        banks = [bank.gather_state() for bank in banks]
        if self.place.rank == 0:
            name = Path(self.log.text.name).stem
            state = self.run | dict(seed=trial.seed, step=step, trial=trial.state(), banks=banks,
                                    lengths=log_files(name))
            self.writer.write(Path("logs", f"{name}.checkpoint"), f"seed{trial.seed}-step{step}.pt", state)
            if stop:
                self.log.line(f"stopped: by a signal at step {step}")
        if stop:
            self.writer.wait()
            # NCCL's sends only queue, and torchrun ends rank 0 soon after another rank has left: all leave together
            dist.barrier()
            complain(f"stopped by a signal at step {step}; --resume logs/*.checkpoint goes on")
        trial.clock.resume()


def restore(state: dict, banks: list[Bank], trial: Trial) -> int:
    """Put a checkpoint's state in place, and return its step."""
    for bank, whole in zip(banks, state["banks"], strict=True):
        bank.load(whole)
    trial.go_on(state["step"], **state["trial"])
    return state["step"]


def recall(args: argparse.Namespace) -> tuple[Hyperparameters, dict]:
    """The hyperparameters and state to go on from; to resume, `args` become those that the run began with."""
    folder = Path(args.resume or args.fork_from)
    state = read_checkpoint(folder)
    if not isinstance(state, dict) or {name: type(value) for name, value in state.items()} != STATE:
        raise ValueError(f"{folder} is no checkpoint of a run")
    words = [f"{name}={value}" for name, value in state["hyperparameters"].items()]
    same = state["hyperparameters"].keys() == vars(Hyperparameters()).keys()  # else the words are of another program
    before = override(words) if same else None
    if not same or state["source_sha256"] != source_sha256(program(before)):
        raise ValueError(f"{folder} is of another version of this program: check out the commit that its log names")
    if args.resume:
        args.seed, args.trials = state["seed"], state["end"] - state["seed"]
        args.neurons, args.checkpoint_every = state["neurons"], state["every"]
        if args.overrides:
            raise ValueError("--resume goes on as the run began, without NAME=VALUE; --fork-from starts a variation")
        for path, size in log_files(folder.stem).items():
            if size < state["lengths"].get(path, math.inf):
                raise ValueError(f"{path} is not here, or shorter than {folder} says: start where logs/ holds both")
        return before, state
    hp, args.seed, args.trials = override(words + args.overrides), state["seed"], 1
    for name in ("batch_tokens", "vocab_size", "num_layers", "model_dim", "mlp_dim", "activation"):
        if getattr(hp, name) != getattr(before, name):
            raise ValueError(f"--fork-from: {name} is {getattr(before, name)} in {folder} and cannot change")
    if Rule.of(hp.matrix_update).alone != Rule.of(before.matrix_update).alone:
        raise ValueError(f"--fork-from: matrix_update is {before.matrix_update!r} in {folder}: to or from adamw it cannot "
                         "change")
    if hp.train_steps <= state["step"]:
        raise ValueError(f"--fork-from: train_steps={hp.train_steps}, and {folder} is at step {state['step']}")
    return hp, state


def train(model: GPT, trial: Trial, shards, validation, checkpoints: Checkpoints, heartbeat: Heartbeat,
          state: dict | None):
    """One trial, from a wholly fresh state or that of a checkpoint, to its log. FloatingPointError where it fails."""
    hp, log = trial.hp, trial.log
    banks = make_banks(model, hp, trial.place)
    if state:
        first = restore(state, banks, trial)
    else:
        fill(banks, initial_weights(model, trial.seed))
        first = 0
    model.zero_grad()  # a trial that failed leaves gradients
    asked = 0
    batches = read_batches(shards, hp.batch_tokens, hp.sequence_length, trial.place, first)
    trial.clock.resume()
    for step in range(first, hp.train_steps + 1):
        save = asked or checkpoints.every and step > first and step % checkpoints.every == 0
        validate = is_validation_step(step, hp)
        heartbeat.begin(step + 1, usual=step > first and not save and not validate)
        if save:
            checkpoints.save(step, banks, trial, stop=asked == 2)
        if validate:
            seconds = trial.clock.read()
            trial.after_validation(step, seconds, validation_loss(model, *validation, hp))
            trial.clock.resume()
        if step == hp.train_steps:
            break

        try:
            loss = accumulate_gradients(model, banks, next(batches), hp)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at step {step + 1}") from None
        asked = checkpoints.agree()
        look = log.neurons_every and (step + 1) % log.neurons_every == 0
        before = {name: bank.masters[i].clone() for name, (bank, i) in owned_neurons(banks).items() if look}
        update(banks, step)
        if look:
            trial.clock.read()
            record_neurons(banks, before, trial.seed, step + 1, trial.place, log)
            trial.clock.resume()
        trial.after_step(step + 1, loss, banks[0].lr(step))
    trial.bar.close()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_gpt.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE | @RECIPE")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default 0)")
    parser.add_argument("--trials", type=int, default=1, help="runs in one process, of seeds SEED, SEED + 1, ...")
    parser.add_argument("--neurons", type=int, default=0, metavar="K",
                        help="every K steps, write what the neurons do to logs/NAME.neurons.jsonl.gz; "
                             "changes no result")
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N",
                        help="every N steps, and on SIGUSR1, SIGTERM and SIGINT, put the newest state into "
                             "logs/NAME.checkpoint; changes no result")
    parser.add_argument("--resume", metavar="logs/NAME.checkpoint", help="go on with that run and its log")
    parser.add_argument("--fork-from", metavar="CHECKPOINT", help="begin there, with other values; no evidence")
    parser.add_argument("--dry-run", action="store_true", help="check arguments and data, say what would run, and stop")
    parser.add_argument("--fineweb-shards", action="store_true", help="say how many the run reads, and stop")
    parser.add_argument("--wandb", choices=("online", "offline"), help="mirror logs/NAME.jsonl to Weights & Biases")
    parser.error = complain
    args = parser.parse_intermixed_args(argv)
    if args.trials < 1 or not 0 <= args.seed < 2**63 - args.trials:
        parser.error(f"--seed {args.seed} --trials {args.trials}: seeds are 0 to 2^63 - 1, trials at least 1")
    for name in ("neurons", "checkpoint_every"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: a number of steps, or 0 for never")
    if args.resume and args.fork_from:
        parser.error("--resume goes on with a run, --fork-from starts another: give one")
    return args


def complain(message):
    """End with one line a node, exit code 1: what a person did is told once, not by each rank."""
    sys.exit(f"train_gpt.py: {' '.join(str(message).split())}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def plan(hp: Hyperparameters, world: int) -> str:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(hp).parameters())
    validations = sum(is_validation_step(step, hp) for step in range(hp.train_steps + 1))
    size = (f"{parameters:,} parameters, {hp.train_steps:,} steps of {hp.batch_tokens:,} tokens, "
            f"{validations} validations of {hp.val_tokens:,} tokens, world_size {world}")
    return "\n".join([size, *departures(hp)])


def check_place(hp: Hyperparameters, local_rank: int, world: int):
    """ValueError where these processes cannot train this recipe."""
    if 0 < torch.cuda.device_count() <= local_rank:
        raise ValueError(f"process {local_rank} of this machine has no GPU: start {torch.cuda.device_count()}")
    for name in ("batch_tokens", "val_tokens"):
        sequences = getattr(hp, name) // hp.sequence_length
        if sequences % world:
            fewer = max(n for n in range(1, world) if sequences % n == 0)
            raise ValueError(f"{name}={getattr(hp, name)} is {sequences} sequences, which {world} processes cannot "
                             f"share equally: start {fewer}, or change {name}")


def fastest_attention(capability: tuple[int, int], head_dim: int, cudnn: int, cuda: tuple[int, ...]) -> str:
    """The backend of scaled_dot_product_attention to use on a card, of those that take heads of this size there.

    On H100 and B200 that is cuDNN's, as PyTorch itself prefers there (arXiv 2407.08608 has figures), from the versions
    on that are right: cuDNN 9.15.1, CUDA 12.9 (pytorch #169849, #171627). Which sizes PyTorch hands to a backend stands
    in its sdp_utils.cpp; for flash attention it pads them to a multiple of 8.
    """
    if (capability in ((9, 0), (10, 0)) and cudnn > 91500 and cuda >= (12, 9)
            and head_dim <= 128 and head_dim % 8 == 0):
        return "cudnn"
    if capability >= (8, 0) and head_dim <= 256:
        return "flash"
    return "mem_efficient" if head_dim % 8 == 0 else "math"


def pin_attention(device: torch.device, head_dim: int) -> str:
    """Allow the fastest attention of this card alone, so that no other is taken in silence. Returns its name."""
    if device.type == "cpu":
        return "PyTorch"
    cuda = tuple(map(int, torch.version.cuda.split(".")))
    fastest = fastest_attention(torch.cuda.get_device_capability(device), head_dim, torch.backends.cudnn.version(), cuda)
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == fastest)
    return fastest


def join(rank: int, local_rank: int, world: int, head_dim: int) -> Place:
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    place = Place(rank, world, device, pin_attention(device, head_dim))
    if gpus:
        torch.cuda.set_device(place.device)
    # by default cuBLAS may add the parts of a long product, such as a weight's gradient over 65,536 tokens, in bf16
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    dist.init_process_group("nccl" if gpus else "gloo", store=dist.HashStore() if world == 1 else None,
                            rank=rank, world_size=world, device_id=place.device if gpus else None)
    return place


def open_log(args: argparse.Namespace, state: dict | None, hp: Hyperparameters, facts: str) -> RunLog:
    """Rank 0's: a new one with its head, or that of the run to go on with, cut to where its checkpoint was."""
    if args.resume:
        return RunLog(Path(args.resume).stem, args.neurons, state["lengths"])
    if args.fork_from:
        facts += f"\npartial: forked from step {state['step']} of {args.fork_from}, seed {state['seed']}"
    log = RunLog(time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:8], args.neurons)
    for part in (program(hp).rstrip("\n"), "=" * 100, facts, "=" * 100):
        log.line(part)
    return log


def seeds_to_run(args: argparse.Namespace, hp: Hyperparameters, rank: int) -> list[int]:
    """Those of --trials that no log holds to their end, as rank 0 sees it; a single trial is always run."""
    seeds = list(range(args.seed, args.seed + args.trials))
    if args.trials > 1 and rank == 0:
        log = f"logs/{Path(args.resume).stem}.txt" if args.resume else None
        finished = finished_seeds(source_sha256(program(hp)), log)
        for seed in seeds[bool(args.resume):]:  # the checkpoint's own goes on
            if seed in finished:
                print(f"seed {seed} is finished, in {finished[seed]}: it is not run again")
                seeds.remove(seed)
    decided = [seeds]
    dist.broadcast_object_list(decided)
    return decided[0]


def out_of_memory(hp: Hyperparameters, rank: int, world: int) -> str:
    """The run ends, and does not lower micro_batch by itself: that rounds otherwise, and stands in the log's source."""
    size = micro_batch_size(hp.batch_tokens // hp.sequence_length // world, hp.micro_batch)
    remedy = f"try micro_batch={size // 2}" if size > 1 else "no smaller one is left: take more GPUs or a smaller model"
    return f"train_gpt.py: rank {rank}: the GPU has not enough memory for micro_batch={size}; {remedy}"


def run(args: argparse.Namespace, hp: Hyperparameters, state: dict | None, place: Place, shards, val_shards) -> bool:
    """All trials; whether one failed."""
    seeds = seeds_to_run(args, hp, place.rank)
    if not seeds:
        return False
    log = RunLog(None, args.neurons)
    if place.rank == 0:
        log = open_log(args, state, hp, facts(hp, place, shards | val_shards, program(hp)))
        if args.wandb:
            mirror_to_wandb(log, args.wandb, hp)
    fixed = dict(hyperparameters=vars(hp), source_sha256=source_sha256(program(hp)), end=args.seed + args.trials,
                 neurons=args.neurons, every=args.checkpoint_every, failed=bool(args.resume) and state["failed"])
    checkpoints = Checkpoints(fixed, log, place)
    with place.device:
        model = GPT(hp)
    if place.device.type == "cuda":
        model.compile(dynamic=False)
    validation = next(read_batches(val_shards, hp.val_tokens, hp.sequence_length, place))
    with Heartbeat(place.rank, place.world) as heartbeat:
        for seed in seeds:
            trial = Trial(hp, seed, place, log)
            resumed = args.resume and state
            log.line(f"resumed: step {state['step']}, world_size {place.world}" if resumed else f"seed: {seed}")
            try:
                train(model, trial, shards, validation, checkpoints, heartbeat, state)
            except FloatingPointError as error:  # on all ranks alike
                trial.fail(error)
                fixed["failed"] = True
            state = None
    checkpoints.writer.wait()
    if place.rank == 0:
        print(f"log: {log.text.name}")
    return fixed["failed"]


def main(argv: list[str]):
    args = parse(argv)
    # torchrun sets these; without it there is one process
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        hp, state = recall(args) if args.resume or args.fork_from else (override(args.overrides), None)
        if args.fineweb_shards:
            print(fineweb_shards(hp))
            return
        if args.wandb and not importlib.util.find_spec("wandb"):
            raise ValueError("--wandb needs the package: pip install wandb")
        check_place(hp, local_rank, world)
        shards = find_shards(hp.train_files, hp.batch_tokens, hp.train_steps, hp.vocab_size)
        val_shards = find_shards(hp.val_files, hp.val_tokens, 1, hp.vocab_size)
        if args.dry_run:
            print(plan(hp, world))
            return
        if world > 1 and "MASTER_ADDR" not in os.environ:
            raise ValueError(f"WORLD_SIZE={world} but no MASTER_ADDR: start the processes with torchrun")
    except (OSError, ValueError) as error:
        complain(error)

    place = join(rank, local_rank, world, hp.head_dim)
    try:
        failed = run(args, hp, state, place, shards, val_shards)
    except torch.OutOfMemoryError:
        sys.exit(out_of_memory(hp, rank, world))
    except OSError as error:  # a log that cannot be written
        sys.exit(f"train_gpt.py: rank {rank}: {error}")
    except RuntimeError:
        time.sleep(3)  # it may be the echo of another rank's end: torchrun blames the one that ends first
        raise
    dist.barrier()  # a process that is gone while another still talks to it aborts that one
    dist.destroy_process_group()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
