"""A transformer whose blocks fully_shard cuts, trained by ShardedAurora and AdamW, saved and resumed by
torch.distributed.checkpoint on any number of ranks. It learns to spell this very file; with GPUs it trains on them.

    export PYTHONPATH=.
    torchrun --standalone --nproc_per_node=2 examples/fsdp2.py FOLDER 50    # 50 steps; FOLDER keeps their last state
    torchrun --standalone --nproc_per_node=4 examples/fsdp2.py FOLDER 80    # goes on from there, to step 80
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from fsdp import ShardedAurora

WIDTH, HEADS, DEPTH, SEQUENCES, LENGTH = 48, 3, 2, 24, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def batch(text: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """This rank's inputs and targets, of a step's that do not depend on the number of ranks."""
    starts = torch.randint(len(text) - LENGTH, (SEQUENCES,), generator=torch.Generator().manual_seed(step))
    tokens = torch.stack([text[start:start + LENGTH + 1] for start in starts])[dist.get_rank()::dist.get_world_size()]
    return tokens[:, :-1], tokens[:, 1:]


def save(folder: Path, model: nn.Module, optimizers: list, step: int):
    parts = get_state_dict(model, optimizers)
    dcp.save(dict(zip(("model", "optimizers"), parts)), checkpoint_id=folder / f"{step:06}")


def resume(folder: Path, model: nn.Module, optimizers: list) -> int:
    """The number of steps of the newest state in a folder, which is loaded; 0 where there is none."""
    whole = sorted(folder.glob("*/.metadata"))  # written last
    if not whole:
        return 0
    state = dict(zip(("model", "optimizers"), get_state_dict(model, optimizers)))
    dcp.load(state, checkpoint_id=whole[-1].parent)  # in place, each rank the rows that it has now
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"])
    return int(whole[-1].parent.name)


def train(folder: Path, steps: int) -> list[float]:
    """The losses of the steps that the state in `folder` lacks; it is there in the end."""
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    torch.manual_seed(0)
    model = Transformer().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # after fully_shard, which puts other parameters in the model
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [ShardedAurora(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]

    text, losses = torch.tensor(list(Path(__file__).read_bytes())), []
    for step in range(resume(folder, model, optimizers), steps):
        loss = model(*(x.to(device) for x in batch(text, step)))
        loss.backward()  # the mean over the ranks
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
        if dist.get_rank() == 0:
            print(f"step {step + 1} loss {losses[-1]:.4f}")
    if losses:
        save(folder, model, optimizers, steps)
    return losses


def main(folder: str, steps: str):
    if SEQUENCES % int(os.environ["WORLD_SIZE"]):
        sys.exit(f"{SEQUENCES} sequences are not shared equally by {os.environ['WORLD_SIZE']} ranks: start 1, 2, 3 or 4")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    train(Path(folder), int(steps))
    dist.barrier()  # a process that ends while another still talks to it may abort that one
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
