"""Initial weights, by the results of track 3 that draw them so.

A function of a model and a generator gives a value for every parameter of GPT, by its name. All are drawn on the CPU in
fp32, so that a seed means the same weights whatever the GPU.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def zero_projections(name: str, shape: tuple, fan_in: int, generator: torch.Generator) -> Tensor:
    """Result #17's: N(0, .33 / fan_in); 0 for biases, the head, and what ends a residual branch."""
    if name.endswith("bias") or name.endswith("proj.weight") or name == "head.weight":
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * (0.33 / fan_in) ** 0.5


def length(name: str) -> float:
    """Of results #5, #8 and #37, whose matrices keep the length that they begin with: in that of the draw."""
    ending = ".".join(name.split(".")[-3:])
    return {"attn.proj.weight": 1.25, "mlp.proj.weight": 3.0, "mlp.fc.weight": 1.5}.get(ending, 1.0)


def uniform_lengths(name: str, shape: tuple, fan_in: int, generator: torch.Generator) -> Tensor:
    """Of #5 and #8: uniform in +- 1 / sqrt(fan_in), as torch draws weights and biases, times length; 0 for the head
    and the biases of projections."""
    if name.startswith("head") or name.endswith("proj.bias"):
        return torch.zeros(shape)
    return (2 * torch.rand(shape, generator=generator) - 1) * length(name) / fan_in**0.5


def normal_lengths(name: str, shape: tuple, fan_in: int, generator: torch.Generator) -> Tensor:
    """Of #37: N(0, .33 / fan_in), the head's too, times length; 0 for biases."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * length(name) * (0.33 / fan_in) ** 0.5


def uniform_zero_projections(name: str, shape: tuple, fan_in: int, generator: torch.Generator) -> Tensor:
    """Of results #9 to #29: uniform in +- 1 / sqrt(fan_in), as torch draws weights and biases; 0 for the head and for
    projections, weights and biases."""
    if name.startswith("head") or "proj" in name:
        return torch.zeros(shape)
    return (2 * torch.rand(shape, generator=generator) - 1) / fan_in**0.5


def one_by_one(draw: Callable[..., Tensor], model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Gains are 1, the embedding is N(0, 1), and `draw` decides the rest, in the order of the parameters."""
    values = {}
    for name, p in model.named_parameters():
        if name.endswith("gains"):
            values[name] = torch.ones(p.shape)
        elif name == "embed.weight":
            values[name] = torch.randn(p.shape, generator=generator)
        else:  # a bias that is drawn is of a layer that reads the stream
            fan_in = p.size(1) if p.ndim == 2 else model.embed.embedding_dim
            values[name] = draw(name, p.shape, fan_in, generator)
    return values


def gain_signs(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Of results #30 to #41: uniform_zero_projections, fc smaller from block to block, and signs s, fair and of each
    block its own, that share out the channels to attention and MLP: gains 1 - .14 s of norm1, 1 + .14 s of norm2."""
    values = one_by_one(uniform_zero_projections, model, generator)
    return with_signs(0.14, [fair_signs(model.embed.embedding_dim, generator) for _ in model.blocks], values)


def paired_gain_signs(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Of #44 to #46: gain_signs with .125 for .14, and the second half of the blocks in pairs of opposed_signs, over
    groups of channels as wide as a head."""
    values = one_by_one(uniform_zero_projections, model, generator)
    dim, blocks = model.embed.embedding_dim, len(model.blocks)
    signs = [fair_signs(dim, generator) for _ in range(blocks // 2)]
    while len(signs) < blocks:
        signs += opposed_signs(dim, model.blocks[0].attn.head_dim, generator)
    return with_signs(0.125, signs[:blocks], values)


def fair_signs(count: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (count,), generator=generator) - 1


def opposed_signs(dim: int, group: int, generator: torch.Generator) -> list[Tensor]:
    """Two rows of signs whose sums over each group of channels cancel; which channels have them is independent. A
    group's sum is half as large as that of fair signs."""
    rows = [[], []]
    for _ in range(dim // group):
        fair = int(torch.randint(2, (group,), generator=generator).sum())
        plus = round(group / 2 + 0.5 * (fair - group / 2))
        for row, count in zip(rows, (plus, group - plus)):
            row.append(torch.where(torch.randperm(group, generator=generator) < count, 1.0, -1.0))
    return [torch.cat(row) for row in rows]


def with_signs(strength: float, signs: list[Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gains of the blocks 1 -+ strength s, and fc of block l of L times 1 - .3 l / (L - 1)."""
    changed = {}
    for block, s in enumerate(signs):
        changed[f"blocks.{block}.norm1.gains"] = 1 - strength * s
        changed[f"blocks.{block}.norm2.gains"] = 1 + strength * s
        fc = f"blocks.{block}.mlp.fc.weight"
        changed[fc] = values[fc] * (1 - 0.3 * block / max(1, len(signs) - 1))
    return values | changed


# functions of the model and a generator that give a value for every parameter
INITIALISATIONS = {
    draw.__name__: partial(one_by_one, draw)
    for draw in (zero_projections, uniform_lengths, normal_lengths, uniform_zero_projections)
} | {function.__name__: function for function in (gain_signs, paired_gain_signs)}
