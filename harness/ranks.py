"""The processes of a run: how they meet, where each stands, on which device, and with which attention."""

import os
import platform
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

MEETING = timedelta(minutes=10)  # for all ranks to have read their arguments, data and checkpoint


class Place(NamedTuple):
    """Where this process stands."""
    rank: int
    world: int
    device: torch.device
    attention: str = "PyTorch"  # the backend of scaled_dot_product_attention, for the log


def check_place(hp, local_rank: int, world: int):
    """ValueError where these processes cannot train this recipe."""
    if 0 < torch.cuda.device_count() <= local_rank:
        raise ValueError(f"process {local_rank} of this machine has no GPU: start {torch.cuda.device_count()}")
    for name in ("batch_tokens", "val_tokens"):
        sequences = getattr(hp, name) // hp.sequence_length
        if sequences % world:
            fewer = max(n for n in range(1, world) if sequences % n == 0)
            raise ValueError(f"{name}={getattr(hp, name)} is {sequences} sequences, which {world} processes cannot "
                             f"share equally: start {fewer}, or change {name}")


def meet(rank: int, world: int) -> dist.Store:
    """Where the ranks tell each other what comes before the process group. ConnectionError where nobody keeps it."""
    if world == 1:
        return dist.HashStore()
    try:
        return next(rendezvous("env://", rank, world, timeout=MEETING))[0]
    except dist.DistError:
        raise ConnectionError(f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')} does not answer: rank 0's "
                              "machine keeps the store of this job there") from None


def agree(store: dist.Store, rank: int, world: int, complaint: str) -> str:
    """Collective: this rank's complaint, or another's that has one; nothing where none has."""
    if complaint:
        store.set("complaint", f"rank {rank}, on {platform.node()}: {complaint}")
    try:
        if store.add("ranks that are here", 1) == world:  # the last one
            store.set("verdict", store.get("complaint") if store.check(["complaint"]) else "")
        store.wait(["verdict"], MEETING)
        return complaint or store.get("verdict").decode()
    except dist.DistError:
        return complaint or f"not all {world} ranks came within {MEETING}, or the machine of rank 0 is gone"


def join(rank: int, local_rank: int, world: int, head_dim: int, store: dist.Store | None = None) -> Place:
    """`store`: that at which the ranks have met; one process alone needs none."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    place = Place(rank, world, device, pin_attention(device, head_dim))
    if gpus:
        torch.cuda.set_device(place.device)
    # by default cuBLAS may add the parts of a long product, such as a weight's gradient over 65,536 tokens, in bf16
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    dist.init_process_group("nccl" if gpus else "gloo", store=store or dist.HashStore(),
                            rank=rank, world_size=world, device_id=place.device if gpus else None)
    return place


def pin_attention(device: torch.device, head_dim: int) -> str:
    """Allow the fastest attention of this card alone, so that no other is taken in silence. Returns its name."""
    if device.type == "cpu":
        return "PyTorch"
    cuda, cudnn = tuple(map(int, torch.version.cuda.split("."))), torch.backends.cudnn.version()
    fastest = fastest_attention(torch.cuda.get_device_capability(device), head_dim, cudnn, cuda)
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == fastest)
    return fastest


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


def micro_batch_size(sequences: int, at_most: int) -> int:
    """The largest divisor of a rank's sequences that is at_most."""
    return max(d for d in range(1, at_most + 1) if sequences % d == 0)
