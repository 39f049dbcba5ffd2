"""GPT-2 small on FineWeb to a validation loss of 3.28 in 3175 steps (result #17 of the speedrun's track 3).

    torchrun --standalone --nproc_per_node=8 train_gpt.py [@RECIPE] [NAME=VALUE ...]

runs on 8 GPUs, on any number that divides the batch, and, without a GPU, on the CPU. `python train_gpt.py` is one
process. NAME=VALUE overrides a field of Hyperparameters below; @tiny takes the overrides in records/tiny/recipe.

Published: mean 3.278845 at step 3175, n=20, 8xH100, 157 ms a step. Descends from
github.com/KellerJordan/modded-nanogpt, records/track_3_optimization/results/20260505_aurora.
Read downwards: hyperparameters, data, model, banks of parameters, schedules of the rates, training. The optimizer is
aurora.py, its language rules.py; initial.py draws weights; what any run needs, whatever it trains, is in harness/.
"""

import math
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

if __name__ == "__main__":  # while PyTorch is imported there is nothing to save, and Ctrl-C ends without a traceback
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aurora import Shares
from harness.arguments import Experiment, overridden
from harness.graphs import Beside, Replayed
from harness.ranks import Place, micro_batch_size
from harness.run import launch
from harness.shards import batches_in, check_tokens, open_shard
from harness.trial import Trial
from initial import INITIALISATIONS
from kernels.bf16 import linear
from kernels.cross_entropy import head_loss
from kernels.mlp import relu2_mlp
from kernels.norm import prenorm
from kernels.qkv import qkv_heads
from rules import Rule, UpToOne, parse_expression, power, ramp, read_schedule


########################################
#           Hyperparameters            #
########################################

UPDATES = "matrix_update", "mlp_update", "adam_update", "head_update", "vector_update"  # the rules among the fields


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
    # update rules, in the language of rules.py; STAGE.KNOB=VALUE on the command line changes one number. For names()
    # the matrices of a layer's q, k and v are attn_q, attn_k and attn_v
    matrix_update: str = "nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step"
    mlp_update: str = ""  # of the MLPs' matrices, where it is another
    matrix_lr: float = 0.0375  # the matrices of the blocks
    adam_update: str = "adamw(0.8, 0.95, 1e-10, 0)"  # of all other parameters
    head_update: str = ""  # of the head's matrix, where it is another
    vector_update: str = ""  # of biases and gains, where it is another
    final_update: str = ""  # stages that every one of these rules ends with: averages, lookahead
    embed_lr: float = 0.3
    head_lr: float = 1 / 320
    vector_lr: float = 0.01  # biases and gains
    embed_dtype: str = "bfloat16"  # of the embedding's master and state; or "float32"
    # schedules of the rates, of RATES below, one in another as in knobs
    matrix_schedule: str = "linear(0.7)"
    adam_schedule: str = "linear(0.7)"
    warmup_steps: int = 1  # the first step has 1 / warmup_steps of the rate: 1 is no warm-up
    train_steps: int = 3200  # the published step is 3175: the learning rate has not reached 0 there
    stop_step: int = 10**9  # the run ends here, if before train_steps; no rate knows it
    # initial weights, of INITIALISATIONS in initial.py
    init: str = "zero_projections"
    # validation
    val_every: int = 125  # steps
    val_every_late: int = 25  # steps, from val_late of train_steps on
    val_late: float = 0.9
    target_loss: float = 3.28  # nats a token
    metric: str = "val_loss"  # what is to reach it: val_loss, or val_ema_loss of an average

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
        for name, choices in (("activation", ("relu2", "swiglu")), ("init", INITIALISATIONS),
                              ("embed_dtype", ("bfloat16", "float32"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: it is one of {', '.join(choices)}")
        for name in ("matrix_schedule", "adam_schedule", *UPDATES):
            try:
                if name.endswith("_schedule"):
                    schedule_of_rates(getattr(self, name))
                elif not self.rule(name).any_shape and name in ("adam_update", "vector_update"):
                    raise ValueError("vectors and numbers have no rows; it is adamw(...) or raw_adam(...) | step")
                elif not self.rule(name).any_shape and name == "head_update" and self.vocab_size % HEAD_PARTS:
                    raise ValueError(f"the head is moved in {HEAD_PARTS} equal parts, which vocab_size="
                                     f"{self.vocab_size} does not allow: take a multiple of {HEAD_PARTS}")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if self.metric not in self.metrics:
            raise ValueError(f"metric={self.metric!r}: a run of these rules has {' and '.join(self.metrics)}")
        if self.mlp_expansion * self.model_dim >= 2**31:
            raise ValueError(f"mlp_expansion={self.mlp_expansion}: {self.model_dim} times that is too many neurons")
        if not self.mlp_dim:
            raise ValueError(f"mlp_expansion={self.mlp_expansion}: no neuron is left of {self.model_dim} times that")

    @property
    def mlp_dim(self) -> int:
        return round(self.mlp_expansion * self.model_dim)

    @property
    def last_step(self) -> int:
        return min(self.train_steps, self.stop_step)

    def rule(self, name: str) -> Rule:
        """The whole of one of UPDATES."""
        others = {"mlp_update": self.matrix_update, "head_update": self.adam_update, "vector_update": self.adam_update}
        text = getattr(self, name) or others.get(name, "")
        return Rule.of(" | ".join(filter(None, [text, self.final_update])))

    @property
    def rules(self) -> dict[str, Rule]:
        return {name: self.rule(name) for name in UPDATES}

    @property
    def metrics(self) -> list[str]:
        """The losses that a validation has: another one where a rule keeps an average."""
        averages = any("val_ema_loss" in stage.views and "val_loss" not in stage.views
                       for stage, _ in self.rule("matrix_update").parts)
        return ["val_loss"] + ["val_ema_loss"] * averages


# What the rules of track 3 fix, at result #17's values; the data are named shard by shard in the log. The desk, which
# does without torch, reads this from the text: a literal.
RULES = {"batch_tokens": 524288, "val_tokens": 10485760, "sequence_length": 1024, "vocab_size": 50304, "num_layers": 12,
         "model_dim": 768, "head_dim": 128, "mlp_expansion": 4.0, "activation": "relu2", "target_loss": 3.28}


########################################
#                 Data                 #
########################################

def read_batches(shards, batch_tokens: int, sequence_length: int, place: Place, first: int = 0,
                 vocab_size: int = 2**16):
    """Yield (inputs, targets), each (sequences, sequence_length), of this rank's contiguous part of every batch from
    the first on. DamagedShard, on all ranks alike, where a shard is come to that is not as it should be."""
    part = batch_tokens // place.world
    for tokens in map(open_shard, shards):
        batches = batches_in(tokens, batch_tokens)
        skipped = min(first, batches)
        first -= skipped
        if skipped < batches:
            check_tokens(tokens, vocab_size)
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
    """x + f(norm(x)) for f = attention, then the MLP. prenorm adds the bias of f's last product (kernels/norm.py)."""

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

# Of the head's rows, where its rule is one of matrices. A rank owns whole parts, and sums over parts are taken in their
# order, whatever the number of ranks.
HEAD_PARTS = 8


def slot_names(name: str, slots: int) -> list[str]:
    """Of a parameter's slots: those of q, k and v, which are three matrices; its own for a matrix, or for its parts."""
    return [name.replace("qkv", x) for x in "qkv"] if "qkv" in name else [name] * slots


class Bank:
    """The parameters that one update rule moves, back to back in one tensor. A slot is one matrix, all of one shape,
    or one of several parts of a matrix, or, with slot=(), one number.

    Each rank has all weights, in bf16, and its own gradients of them, summed in fp32 over micro-batches. It owns an
    equal run of the slots: their sum over ranks, masters in `dtype`, and the rule's state are there alone. So the
    number of ranks changes nothing but the order of that sum. `lr` is a function of the number of steps done.
    """

    # Numbers are padded to a multiple of this: fused AdamW handles the last few elements of a CPU tensor in a scalar
    # loop that rounds otherwise, and which ones they are would depend on the number of ranks.
    ALIGNED = 64

    def __init__(self, params: dict[str, nn.Parameter], slot: tuple, rule: Rule, lr: Callable[[int], float],
                 dtype=torch.float32, pool=None):
        self.params, self.rule, self.lr = params, rule, lr
        device = next(iter(params.values())).device
        sizes = {name: p.numel() // math.prod(slot) for name, p in params.items()}
        self.slots = [x for name, size in sizes.items() for x in slot_names(name, size)] if slot else []
        self.shares = Shares.of(sum(sizes.values()), multiple=1 if slot else self.ALIGNED)
        self.weights = torch.zeros(self.shares.padded, *slot, dtype=torch.bfloat16, device=device)
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        for p, weight in zip(params.values(), self.views(self.weights)):
            p.data = weight
        self.total = self.shares.total if len({*self.slots}) == 1 else lambda x: x  # of slots that are parts
        self.masters = torch.zeros_like(self.weights[self.shares.mine], dtype=dtype)
        self.state = rule.state(self.masters)
        # tensors, which a CUDA graph reads anew at each replay
        self.knobs = {name: torch.zeros((), device=device) for name in ("lr", "t", *rule.at(0))}
        self.knobs |= {name: (self.shares.take(x).view(-1, *[1 for _ in slot]) if x.ndim else x).to(device)
                       for name, x in rule.of_slots(Counter(self.slots) or sizes).items()}
        self.run = Replayed(pool) if device.type == "cuda" and rule.captured else lambda update: update()
        self.beside = Beside(torch.cuda.Stream(device) if device.type == "cuda" and rule.has_after else None)
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
        self.beside.wait()
        self.turn_knobs(step)
        self.advance()
        self.work = self.shares.gather(self.weights)
        # under the next forward and backward pass
        self.beside(partial(self.rule.after_, self.state, step + 1, self.total))

    def turn_knobs(self, step: int):
        """To what they are in the step that is made after `step` steps."""
        for name, value in (dict(lr=self.lr(step), t=step + 1) | self.rule.at(step)).items():
            self.knobs[name].fill_(value)

    def advance(self):
        self.run(self._advance)

    @torch.no_grad()
    def _advance(self):
        gradients = self.gradients[self.shares.mine].to(self.masters.dtype)
        self.rule.advance_(self.masters, gradients, self.state, self.knobs)
        self.weights[self.shares.mine] = self.rule.view("training", self.masters, self.state, self.knobs)

    @torch.no_grad()
    def show(self, view: str, step: int):
        """Collective: what the model holds after `step` steps while it is trained ("training") or validated (the name
        of the loss). A rule without views has one for all."""
        if self.rule.views and step:
            self.turn_knobs(step - 1)
            self.weights[self.shares.mine] = self.rule.view(view, self.masters, self.state, self.knobs)
            self.work = self.shares.gather(self.weights)
            self.arrive()

    def gather_state(self) -> dict[str, Tensor]:
        """Collective. On rank 0 returns masters and state of all ranks, (slots, ...), in host buffers that are valid
        until the next call; {} elsewhere."""
        self.beside.wait()
        whole, real = {}, len(range(self.shares.count)[self.shares.mine])  # slots of this rank that are no padding
        for name, x in dict(masters=self.masters, **self.state).items():
            if self.shares.rank:
                if real:
                    dist.send(x[:real], 0)
                continue
            if name not in self.buffers:  # kept: page faults of a fresh one cost several times the copy
                self.buffers[name] = torch.empty(self.shares.count, *x.shape[1:], dtype=x.dtype)
            whole[name] = self.buffers[name]
            for rank, share in enumerate(whole[name].split(self.shares.share)):
                if rank:
                    x = share if x.is_cpu else torch.empty_like(share, device=x.device)
                    dist.recv(x, rank)
                share.copy_(x[:len(share)])
        return whole

    @torch.no_grad()
    def load(self, whole: dict[str, Tensor]):
        """Collective. Take this rank's share of a gather_state(), of any number of ranks, and send the weights. State
        that it lacks, of a stage that another rule did not have, stays zero."""
        self.beside.wait()
        for name, x in dict(masters=self.masters, **self.state).items():
            if name in whole:
                x.copy_(self.shares.take(whole[name]))
        self.weights[self.shares.mine] = self.masters
        self.work = self.shares.gather(self.weights)
        self.arrive()


########################################
#          Weights and rates           #
########################################

def initial_weights(model: GPT, seed: int, init: str = Hyperparameters.init) -> dict[str, Tensor]:
    """A value for every parameter. Drawn on the CPU in fp32: a seed means the same weights whatever the GPU."""
    return INITIALISATIONS[init](model, torch.Generator().manual_seed(seed))


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
            rule = "mlp_update" if hp.mlp_update and ".mlp." in name else "matrix_update"
            matrices.setdefault((slot, rule), {})[name] = p
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    pool = torch.cuda.graph_pool_handle() if place.device.type == "cuda" else None

    def bank(params, slot, rule: str, rate: float, family: str = "adam", dtype=torch.float32) -> Bank:
        def lr(step: int) -> float:
            return rate * learning_rate_factor(step, hp, family)
        return Bank(params, slot, hp.rule(rule), lr, dtype, pool)
    banks = [bank(params, slot, rule, hp.matrix_lr, "matrix")
             for (slot, rule), params in sorted(matrices.items(), key=lambda x: -math.prod(x[0][0]))]
    head = () if hp.rule("head_update").any_shape else (hp.vocab_size // HEAD_PARTS, hp.model_dim)
    banks += [bank({"head.weight": model.head.weight}, head, "head_update", hp.head_lr),
              bank({"embed.weight": model.embed.weight}, (), "adam_update", hp.embed_lr,
                   dtype=getattr(torch, hp.embed_dtype)),
              bank(vectors, (), "vector_update", hp.vector_lr)]
    names = [name for bank in banks for name in bank.params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    return banks


def linear_rate(step: int, steps: int, fraction: UpToOne) -> float:
    """1, then linear over the last `fraction` of the steps: the last step's is 1 / (fraction * steps)."""
    progress = step / steps
    return 1.0 if progress < 1 - fraction else (1 - progress) / fraction


def power_rate(step: int, steps: int, last: float, exponent: float, horizon: int = 0) -> float:
    """Towards a horizon, which is train_steps where none is given."""
    return power(step, 1.0, horizon or steps, last, exponent)


def ramp_rate(step: int, steps: int, before, after, start: int, stop: int) -> float:
    """From one schedule, or number, to another."""
    return ramp(step, before, after, start, stop)


RATES = {"linear": linear_rate, "power": power_rate, "ramp": ramp_rate}


@cache
def schedule_of_rates(text: str) -> Callable[[int, int], float]:
    return read_schedule(text, parse_expression(text, "linear(0.7)"), RATES, given=2)


def learning_rate_factor(step: int, hp: Hyperparameters, family: str = "matrix") -> float:
    """After `step` steps, by matrix_schedule or adam_schedule. The first warmup_steps are scaled by 1 / warmup_steps,
    2 / warmup_steps, ... 1."""
    schedule = schedule_of_rates(getattr(hp, f"{family}_schedule"))
    return min(1.0, (step + 1) / hp.warmup_steps) * schedule(step, hp.train_steps)


def is_validation_step(step: int, hp: Hyperparameters) -> bool:
    every = hp.val_every if step / hp.train_steps < hp.val_late else hp.val_every_late
    return step % every == 0 or step == hp.last_step


########################################
#               Training               #
########################################

def micro_batches(inputs: Tensor, targets: Tensor, at_most: int):
    size = micro_batch_size(len(inputs), at_most)
    return zip(inputs.split(size), targets.split(size))


def accumulate_gradients(model: GPT, banks: list[Bank], batch: tuple[Tensor, Tensor], hp: Hyperparameters) -> Tensor:
    """Sum the micro-batches' gradients in the banks, and start to sum them over ranks. Returns this rank's summed loss.

    A micro-batch's own gradient is bf16, as the published program's; the sums are fp32, so that no number of ranks or
    micro-batches is favoured. FloatingPointError, on all ranks, where one has a gradient that is not finite.
    """
    params = [p for bank in banks for p in bank.params.values()]
    sums = [view for bank in banks for view in bank.views(bank.gradients)]
    total = torch.zeros((), device=sums[0].device, dtype=torch.float64)
    for i, micro_batch in enumerate(micro_batches(*batch, hp.micro_batch)):
        loss = model(*micro_batch)
        loss.backward()
        total += loss.detach()
        (torch._foreach_add_ if i else torch._foreach_copy_)(sums, [p.grad for p in params])
        model.zero_grad()
    flags = not_finite(sums)
    for bank in banks:
        bank.reduce()
    if flags.any():  # here the program waits for the GPU: no later place is early enough
        raise FloatingPointError(whose(flags, [name for bank in banks for name in bank.params]))
    return total


def not_finite(gradients: list[Tensor]) -> Tensor:
    """Collective: (ranks, gradients), 1 where a rank's own gradient has no finite norm.

    Before the sum over ranks, which would hide whose they are, and before the update: no weight is spoiled, and a
    checkpoint never holds a NaN.
    """
    flags = torch.zeros(dist.get_world_size(), len(gradients), device=gradients[0].device)
    flags[dist.get_rank()] = (~torch.stack(torch._foreach_norm(gradients)).isfinite()).float()
    dist.all_reduce(flags)
    return flags


def whose(flags: Tensor, names: list[str]) -> str:
    rank, first = flags.nonzero()[0].tolist()
    others = f" and of {int(flags[rank].sum()) - 1} others" if flags[rank].sum() > 1 else ""
    return f"the gradient of {names[first]}{others} is not finite on rank {rank}"


def update(banks: list[Bank], step: int):
    """A step of all banks, after `step` steps."""
    for bank in banks:
        bank.step(step)
    for bank in banks:
        bank.arrive()


def show(banks: list[Bank], view: str, step: int):
    for bank in banks:
        bank.show(view, step)


def validation_losses(model: GPT, banks: list[Bank], validation, step: int, hp: Hyperparameters) -> dict[str, float]:
    """Each of the metrics, after `step` steps."""
    losses = {}
    for metric in hp.metrics:
        show(banks, metric, step)
        losses[metric] = validation_loss(model, *validation, hp)
    show(banks, "training", step)
    return losses


@torch.no_grad()
def validation_loss(model: GPT, inputs: Tensor, targets: Tensor, hp: Hyperparameters) -> float:
    """Mean over the validation tokens of all ranks, in nats a token."""
    total = torch.zeros((), device=inputs.device, dtype=torch.float64)
    for micro_inputs, micro_targets in micro_batches(inputs, targets, hp.micro_batch):
        total += model(micro_inputs, micro_targets)
    dist.all_reduce(total)
    return total.item() / hp.val_tokens


def train(model: GPT, trial: Trial):
    """One trial, from initial weights or a checkpoint's state to its end. FloatingPointError where it fails."""
    hp = trial.hp
    banks = make_banks(model, hp, trial.place)
    first = trial.begin(banks)
    if first == 0:
        fill(banks, initial_weights(model, trial.seed, hp.init))
    show(banks, "training", first)
    model.zero_grad()  # a trial that failed leaves gradients
    validation = next(read_batches(trial.val_shards, hp.val_tokens, hp.sequence_length, trial.place,
                                   vocab_size=hp.vocab_size))
    batches = read_batches(trial.shards, hp.batch_tokens, hp.sequence_length, trial.place, first, hp.vocab_size)
    for step in trial.steps(banks, first):
        if is_validation_step(step, hp):
            with trial.validating():
                trial.validated(step, validation_losses(model, banks, validation, step, hp))
        if step == hp.last_step:
            break
        loss = accumulate_gradients(model, banks, next(batches), hp)
        with trial.updating(banks, step + 1):
            update(banks, step)
        trial.trained(step + 1, loss, banks[0].lr(step))


EXPERIMENT = Experiment(Path(__file__).resolve(), Hyperparameters, RULES, GPT, train, is_validation_step, __doc__)


def override(words: list[str]) -> Hyperparameters:
    return overridden(EXPERIMENT, words)


def main(argv: list[str]):
    launch(EXPERIMENT, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
