"""The training step as result #17's script does it: the form against which this project's is timed.

q, k and v are three products, every weight is fp32 and cast in every forward pass, torch.compile is left to fuse what
it can, attention is the one that PyTorch prefers, each parameter's gradient is reduced by itself, every rank runs AdamW
on all that is not a matrix, and Aurora takes one matrix after the other. bench.optimizer and bench.step check that it
computes what train_gpt.py does.

Written anew from the method (see aurora.py), not from the script, which is github.com/KellerJordan/modded-nanogpt,
records/track_3_optimization/results/20260505_aurora.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.cross_entropy import head_loss_reference
from kernels.qkv import rotate
from train_gpt import Hyperparameters, Linear, Rotary, micro_batches

EVERY_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                   SDPBackend.MATH]


########################################
#                Model                 #
########################################
# B sequences, T tokens each, H heads of size K, as in train_gpt.py. Linear casts its weight to the activations' bf16.

class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight=self.gains.type_as(x))


class Attention(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))  # (B, T, H, K)
        q, k = (rotate(F.rms_norm(y, (self.head_dim,)), *rotary) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, K)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.12, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_dim: int):
        super().__init__()
        self.fc, self.proj = Linear(dim, mlp_dim), Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x).relu().square())


class Block(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(hp.model_dim), RMSNorm(hp.model_dim)
        self.attn, self.mlp = Attention(hp.model_dim, hp.head_dim), MLP(hp.model_dim, hp.mlp_dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class UnfusedGPT(nn.Module):
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        if hp.activation != "relu2":
            raise ValueError(f"activation={hp.activation}: the published script's is relu2")
        self.embed = nn.Embedding(hp.vocab_size, hp.model_dim, dtype=torch.bfloat16)
        self.norm1, self.norm2 = RMSNorm(hp.model_dim), RMSNorm(hp.model_dim)
        self.rotary = Rotary(hp.head_dim)
        self.blocks = nn.ModuleList(Block(hp) for _ in range(hp.num_layers))
        self.head = Linear(hp.model_dim, hp.vocab_size)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.norm1(self.embed(inputs))
        rotary = self.rotary(inputs.size(1))
        for block in self.blocks:
            x = block(x, rotary)
        return head_loss_reference(self.norm2(x).flatten(0, 1), self.head.weight, self.head.bias, targets.flatten())


def separate(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """train_gpt.py's parameters, or their gradients, under the names that they have here: q, k and v apart."""
    found = {}
    for name, value in values.items():
        parts = zip("qkv", value.chunk(3)) if "qkv" in name else [("qkv", value)]
        found |= {name.replace("qkv", part): x for part, x in parts}
    return found


########################################
#              Optimizers              #
########################################

def newton_schulz(G: Tensor) -> Tensor:
    X = G.bfloat16()
    if G.size(0) > G.size(1):
        X = X.mT
    X = X / (X.norm() + 1e-7)
    a, b, c = 2.0, -1.5, 0.5
    for _ in range(12):
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    return X.mT if G.size(0) > G.size(1) else X


def operator_norm(G: Tensor) -> Tensor:
    v = torch.full((G.size(1),), G.size(1) ** -0.5, device=G.device)
    for _ in range(5):
        u = G @ v
        u = u / u.norm().clamp(min=1e-10)
        v = G.mT @ u
        v = v / v.norm().clamp(min=1e-10)
    return (G @ v).norm()


class OneByOne(torch.optim.Optimizer):
    """Result #17's update, one matrix after the other. Newton-Schulz is compiled on a GPU, as published."""

    def __init__(self, params, lr: float):
        super().__init__(params, dict(lr=lr))
        on_gpu = self.param_groups[0]["params"][0].is_cuda
        self.polar = torch.compile(newton_schulz, dynamic=False, fullgraph=True) if on_gpu else newton_schulz

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
                N = p.grad.lerp(momentum, 0.95)
                P = self.balanced(N)
                U = P - 0.2 * N / operator_norm(N).clamp(min=1e-10)
                U = U * P.norm() / U.norm().clamp(min=1e-10) * max(1, N.size(0) / N.size(1)) ** 0.5
                U = U * (0.35 * p.norm().clamp(min=1e-8) / U.norm().clamp(min=1e-8)).clamp(min=1)
                p.add_(U, alpha=-group["lr"])

    def balanced(self, G: Tensor) -> Tensor:
        m, n = G.shape
        if m == n:
            return self.polar(G)
        if m < n:
            return self.balanced(G.mT).mT
        D = 1 / G.norm(dim=1, keepdim=True).clamp(min=1e-7)
        U = self.polar(D * G)
        D = D * (n / m / U.float().square().sum(1, keepdim=True).clamp(min=1e-14)).sqrt()
        return self.polar(D * G)


def unfused_optimizers(params: dict[str, nn.Parameter], hp: Hyperparameters) -> list[torch.optim.Optimizer]:
    vectors = [p for p in params.values() if p.ndim == 1]
    adamw = torch.optim.AdamW([dict(params=[params["embed.weight"]], lr=hp.embed_lr),
                               dict(params=[params["head.weight"]], lr=hp.head_lr),
                               dict(params=vectors, lr=hp.vector_lr)], betas=(0.8, 0.95), eps=1e-10, weight_decay=0,
                              fused=True)
    matrices = [p for name, p in params.items() if p.ndim == 2 and name.startswith("blocks.")]
    return [OneByOne(matrices, lr=hp.matrix_lr), adamw]


########################################
#               Training               #
########################################

class Unfused:
    """A model with these initial weights, and its training step."""

    def __init__(self, hp: Hyperparameters, weights: dict[str, Tensor], device: torch.device):
        self.hp = hp
        with device:
            self.model = UnfusedGPT(hp)
        for name, value in separate(weights).items():
            self.model.get_parameter(name).data.copy_(value)
        if device.type == "cuda":
            self.model.compile(dynamic=False)
        self.optimizers = unfused_optimizers(dict(self.model.named_parameters()), hp)

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Train on a batch; its summed loss. Attention is chosen as if nobody had pinned it: once, as it compiles."""
        total = torch.zeros((), device=batch[0].device, dtype=torch.float64)
        with sdpa_kernel(EVERY_ATTENTION):
            for micro_batch in micro_batches(*batch, self.hp.micro_batch):
                loss = self.model(*micro_batch)
                loss.backward()
                total += loss.detach()
        for p in self.model.parameters():
            dist.all_reduce(p.grad)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        return total
