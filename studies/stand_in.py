"""A small trainer in the manner of a public track-3 script: what studies/parity.py compares train_gpt.py with.

    torchrun --standalone --nproc_per_node=1 stand_in.py [TRIALS]

Written from the formulas of result #17 (model, optimizer, schedule), and sharing no line with this project's sources.
Like such scripts it keeps its hyperparameters as literals, sets no seed, reads data/fineweb10B, and writes logs/ID.txt.
Initial weights are drawn in the order that train_gpt.py documents, so that one seed is one set of weights in both.
"""

import os
import sys
with open(sys.argv[0]) as f:
    code = f.read()
import time
import uuid
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

vocab_size, num_layers, model_dim, head_dim, seq_len = 257, 4, 64, 32, 64

# ---- data ----

def batches(pattern, batch_size):
    for file in sorted(Path.cwd().glob(pattern)):
        tokens = numpy.fromfile(file, dtype=numpy.uint16)[512:].astype(numpy.int64)  # 1024 bytes of header
        start = 0
        while start + batch_size + 1 < len(tokens):
            window = torch.from_numpy(tokens[start:start + batch_size + 1]).to(device)
            yield window[:-1].view(-1, seq_len), window[1:].view(-1, seq_len)
            start += batch_size

# ---- model: {name: parameter}, and a function of it ----

def initial_parameters():
    D, P = model_dim, {}
    def matrix(name, outputs, inputs, std):
        P[name + ".w"] = std * torch.randn(outputs, inputs) if std else torch.zeros(outputs, inputs)
        P[name + ".b"] = torch.zeros(outputs)
    P["embed"] = torch.randn(vocab_size, D).bfloat16()
    P["first.g"], P["last.g"] = torch.ones(D), torch.ones(D)
    for i in range(num_layers):
        P[f"{i}.attn.g"], P[f"{i}.mlp.g"] = torch.ones(D), torch.ones(D)
        for name in "qkv":
            matrix(f"{i}.{name}", D, D, (0.33 / D) ** 0.5)
        matrix(f"{i}.o", D, D, 0)
        matrix(f"{i}.up", 4 * D, D, (0.33 / D) ** 0.5)
        matrix(f"{i}.down", D, 4 * D, 0)
    matrix("head", vocab_size, D, 0)
    return {name: p.to(device).requires_grad_() for name, p in P.items()}

def normalise(x):
    return (x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1.19e-7).rsqrt()).to(x.dtype)

def turn(x):  # (sequences, time, heads, head_dim): half of the pairs turn with their position, half stand still
    half = head_dim // 2
    frequency = torch.cat([1024 ** -torch.linspace(0, 1, half // 2), torch.zeros(half // 2)])
    angle = (torch.arange(x.size(1))[:, None] * frequency).to(x.device)[:, None]
    a, b = x.float().split(half, -1)
    return torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1).to(x.dtype)

def loss_of(P, inputs, targets):  # summed over tokens
    def linear(x, name):
        return F.linear(x, P[name + ".w"].to(x.dtype), P[name + ".b"].to(x.dtype))
    def gained(x, name):
        return normalise(x) * P[name + ".g"].to(x.dtype)
    future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).triu(1)
    x = gained(P["embed"][inputs], "first")
    for i in range(num_layers):
        y = gained(x, f"{i}.attn")
        q, k, v = (linear(y, f"{i}.{name}").unflatten(-1, (-1, head_dim)) for name in "qkv")
        scores = torch.einsum("bthk,bshk->bhts", turn(normalise(q)).float(), turn(normalise(k)).float()) * 0.12
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        y = torch.einsum("bhts,bshk->bthk", weights, v.float()).to(x.dtype).flatten(2)
        x = x + linear(y, f"{i}.o")
        x = x + linear(linear(gained(x, f"{i}.mlp"), f"{i}.up").relu() ** 2, f"{i}.down")
    z = linear(gained(x, "last"), "head").float()
    return F.cross_entropy((15 * z / (z * z + 225).sqrt()).flatten(0, 1), targets.flatten(), reduction="sum")

# ---- optimizer of the hidden matrices: Aurora, Contra-Muon, floor ----

def orthogonal(G):
    X = G.bfloat16() if G.size(0) <= G.size(1) else G.bfloat16().T
    X = X / (X.norm() + 1e-7)
    for _ in range(12):
        A = X @ X.T
        X = 2 * X + (-1.5 * A + 0.5 * A @ A) @ X
    return (X if G.size(0) <= G.size(1) else X.T).float()

def even(G, beta=0.5):
    m, n = G.shape
    if m == n:
        return orthogonal(G)
    if m < n:
        return even(G.T, beta).T
    D = 1 / G.norm(dim=1, keepdim=True).clamp(min=1e-7)
    squares = orthogonal(D * G).pow(2).sum(1, keepdim=True).clamp(min=1e-14)
    return orthogonal(D * (n / m / squares) ** beta * G)

def largest_singular_value(G):
    v = torch.ones(G.size(1), device=G.device)
    for _ in range(5):
        u = F.normalize(G @ v, dim=0, eps=1e-10)
        v = F.normalize(G.T @ u, dim=0, eps=1e-10)
    return (G @ v).norm()

@torch.no_grad()
def step_matrix(W, M, lr, weight_decay=0.0, contra=0.4, floor=0.35):
    M.lerp_(W.grad, 0.05)
    N = 0.05 * W.grad + 0.95 * M
    O = even(N)
    U = O - contra / 2 * N / largest_singular_value(N).clamp(min=1e-10)
    U = U * O.norm() / U.norm().clamp(min=1e-10) * max(1, W.size(0) / W.size(1)) ** 0.5
    U = U * max(1, floor * W.norm().clamp(min=1e-8) / U.norm().clamp(min=1e-8))
    W.mul_(1 - lr * weight_decay).sub_(lr * U)

# ---- run ----

device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
assert os.environ["WORLD_SIZE"] == "1"
os.makedirs("logs", exist_ok=True)
logfile = f"logs/{uuid.uuid4()}.txt"
def print0(text):
    with open(logfile, "a") as f:
        print(text, file=f)
name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
print0(code)
print0("=" * 100)
print0(f"Running PyTorch {torch.__version__} on {name} with world_size 1")
print0("=" * 100)

val_tokens = 20 * 524288
batch_size = 512
mbs = 64
val_inputs, val_targets = next(batches("data/fineweb10B/fineweb_val_*.bin", val_tokens))

for _ in range(int(sys.argv[-1]) if len(sys.argv) > 1 else 1):
    train_steps = 3200
    P = initial_parameters()
    hidden = [p for name, p in P.items() if name[0].isdigit() and p.ndim == 2]
    momenta = [torch.zeros_like(W) for W in hidden]
    adam = torch.optim.AdamW([dict(params=[P["embed"]], lr=0.075), dict(params=[P["head.w"]], lr=1 / 640),
                              dict(params=[p for p in P.values() if p.ndim == 1], lr=0.0025)],
                             betas=(0.8, 0.95), eps=1e-10, weight_decay=0, fused=True)
    rates = [group["lr"] for group in adam.param_groups]
    train_loader = batches("data/fineweb10B/fineweb_train_*.bin", batch_size)
    training_time, last_val_step, t0 = 0, 0, time.perf_counter()
    for step in range(train_steps + 1):
        val_step_freq = 125 if step / train_steps < 0.9 else 25
        if step == train_steps or step % val_step_freq == 0:
            since = time.perf_counter() - t0
            training_time += since
            with torch.no_grad():
                val_loss = sum(loss_of(P, x, y) for x, y in zip(val_inputs.split(mbs), val_targets.split(mbs)))
            print0(f"step:{step}/{train_steps} val_loss:{val_loss / val_tokens:.5f} train_time:{training_time:.3f}s "
                   f"step_avg:{1000 * since / max(1, step - last_val_step):.2f}ms")
            last_val_step, t0 = step, time.perf_counter()
        if step == train_steps:
            break
        inputs, targets = next(train_loader)
        for x, y in zip(inputs.split(mbs), targets.split(mbs)):
            loss_of(P, x, y).backward()
        eta = min(1, (1 - step / train_steps) / 0.7)
        for group, rate in zip(adam.param_groups, rates):
            group["lr"] = rate * eta
        adam.step()
        for W, M in zip(hidden, momenta):
            step_matrix(W, M, 0.01 * eta)
        for p in P.values():
            p.grad = None
