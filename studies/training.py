"""Small training runs for the studies, of train_gpt.py's parts: without a GPU, two at a time on a thread each.

Their update rules, studies.RULES, differ in the direction alone; STAGE.KNOB=VALUE changes all that have the stage. The
small size reads bytes (data/local.py --encoding bytes), of which it makes a vocabulary of 257; on a GPU the size is
GPT-2 small's, on the shards that train_files names.
"""

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from statistics import mean, stdev

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import train_gpt
from harness.neurons import owned_neurons
from harness.ranks import Place
from harness.shards import check_tokens, find_shards, open_shard
from train_gpt import Bank, Hyperparameters

SMALL = ["@tiny", "vocab_size=257", "num_layers=4", "batch_tokens=512", "sequence_length=64",
         "micro_batch=16", "val_every=100", "val_every_late=100"]
GPT2_SMALL = ["batch_tokens=65536", "val_tokens=1048576", "train_steps=1000", "val_every=100",
              "val_every_late=100"]
END_OF_TEXT = 50256
# Student's t of two-sided 95% intervals, by degrees of freedom from 1
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shards_of(hp: Hyperparameters) -> tuple[list[str], list[str]]:
    """Paths of the training and the validation shards. ValueError says what is missing and what makes it."""
    byte_sized = hp.vocab_size == 257
    try:
        vocab_size = END_OF_TEXT + 1 if byte_sized else hp.vocab_size
        train = list(find_shards(hp.train_files, hp.batch_tokens, hp.last_step, vocab_size))
        val = list(find_shards(hp.val_files, hp.val_tokens, 1, vocab_size))
        for path in train + val:
            check_tokens(tokens := open_shard(path), vocab_size)
            if byte_sized and ((tokens > 255) & (tokens != END_OF_TEXT)).any():
                raise ValueError(f"{path} holds more than bytes")
    except ValueError as error:
        remedy = ". The small size reads bytes: python data/local.py --encoding bytes"
        raise ValueError(f"{error}{remedy * byte_sized}") from None
    return train, val


def batches(shards: list[str], tokens: int, hp: Hyperparameters) -> Iterator[tuple[Tensor, Tensor]]:
    for inputs, targets in train_gpt.read_batches(shards, tokens, hp.sequence_length, Place(0, 1, device())):
        # of the small size's tokens only END_OF_TEXT is above the last of its vocabulary, which is free for it
        yield inputs.clamp(max=hp.vocab_size - 1), targets.clamp(max=hp.vocab_size - 1)


def open_process():
    """train_gpt.py's sums go over a group of processes, here of one."""
    dist.init_process_group("nccl" if device().type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def open_worker():
    torch.set_num_threads(1)
    open_process()


def training(hp: Hyperparameters, seed: int) -> Iterator[tuple[int, float, list[Bank]]]:
    """Train from the initial weights of a seed, on the same batches for every seed.

    Yields, at the validation steps, the step, the metric, and the banks as they are then.
    """
    with device():
        model = train_gpt.GPT(hp)
    banks = train_gpt.make_banks(model, hp, Place(0, 1, device()))
    train_gpt.fill(banks, train_gpt.initial_weights(model, seed, hp.init))
    if device().type == "cuda":
        model.compile(dynamic=False)
    train_shards, val_shards = shards_of(hp)
    train_batches, validation = batches(train_shards, hp.batch_tokens, hp), next(batches(val_shards, hp.val_tokens, hp))
    for step in range(hp.last_step + 1):
        if train_gpt.is_validation_step(step, hp):
            yield step, train_gpt.validation_losses(model, banks, validation, step, hp)[hp.metric], banks
        if step == hp.last_step:
            return
        train_gpt.accumulate_gradients(model, banks, next(train_batches), hp)
        train_gpt.update(banks, step)


def momenta(banks: list[Bank]) -> list[Tensor]:
    """nesterov's, of each layer's up-projection."""
    return [bank.state["nesterov.momentum"][i] for bank, i in owned_neurons(banks).values()]


def sweep(run: Callable, settings: list[tuple], rates: list[float], seeds: int) -> dict[tuple, list]:
    """run(*setting, rate, seed) of each setting at each learning rate on seed 0, then, at the best, on the others.

    A run returns rows whose last has the final `val_loss`. Returns {(*setting, rate, seed): rows}.
    """
    workers = 1 if device().type == "cuda" else 2
    context = multiprocessing.get_context("spawn")  # a fork would inherit the parent's threads
    bar = tqdm(total=len(settings) * (len(rates) + seeds - 1), unit="run", disable=None)
    done = {}
    with ProcessPoolExecutor(workers, context, open_worker) as pool:
        for stage in range(2):
            jobs = [(*s, rate, 0) for s in settings for rate in rates] if stage == 0 else [
                (*s, best_rate(done, s), seed) for s in settings for seed in range(1, seeds)]
            waiting = {pool.submit(run, *job): job for job in jobs}
            for future in as_completed(waiting):
                done[waiting[future]] = future.result()
                bar.update()
    bar.close()
    return done


def best_rate(done: dict[tuple, list], setting: tuple) -> float:
    """The learning rate of the lowest final loss on seed 0; a run that ended at nan is the worst."""
    final = {key[-2]: rows[-1]["val_loss"] for key, rows in done.items() if key[:-2] == setting and key[-1] == 0}
    return min(final, key=lambda rate: final[rate] if math.isfinite(final[rate]) else math.inf)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval by Student's t."""
    return mean(values), T_95[len(values) - 2] * stdev(values) / len(values) ** 0.5
