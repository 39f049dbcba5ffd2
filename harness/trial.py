"""A trial, the part of a run that has one seed, as the training loop sees it. All that the loop asks of the harness, it
asks of its Trial."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from harness.arguments import complain
from harness.checkpoint import STOP
from harness.log import log_files, say
from harness.neurons import owned_neurons, record_neurons
from harness.ranks import Place


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

    @contextlib.contextmanager
    def stopped(self):
        """What happens inside does not count. An exception leaves the clock stopped."""
        self.read()
        yield
        self.resume()


class Diverged(FloatingPointError):
    """The validation loss says so. The message names the step."""


class Trial:
    """One seed of a run: where it begins, what comes between two steps, its lines, records, bar and end.

    A FloatingPointError ends the trial and not the run. `state`: of the checkpoint to go on from, if any.
    """

    def __init__(self, run, seed: int, state: dict | None):
        self.run, self.seed, self.state = run, seed, state
        self.hp, self.place, self.log = run.hp, run.place, run.log
        self.shards, self.val_shards = run.shards, run.val_shards
        self.bar = tqdm(total=self.hp.last_step, desc=f"seed {seed}", leave=False,
                        disable=None if self.place.rank == 0 else True,
                        bar_format="{desc} {percentage:3.0f}%|{bar:10}| {n}/{total}{postfix} [{elapsed}<{remaining}]")
        self.reference = read_reference(self.hp, run.result, run.root)
        self.initial = math.inf  # the validation loss before the first step
        self.clock = Clock(self.place)
        self.validated_at = self.logged_at = (0, 0.0)  # step, seconds
        self.step = 0  # the one that is being made, counted from 1
        self.request = 0  # of a signal to any rank

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        """The failure, on all ranks alike, is the last line of this trial; another may follow."""
        self.bar.close()
        if not isinstance(error, FloatingPointError):
            return False
        why = str(error) if isinstance(error, Diverged) else f"{error} at step {self.step}"
        self.run.failed = True
        self.log.line(f"failed: {why}")
        if self.place.rank == 0:
            print(f"train_gpt.py: seed {self.seed}: {why}", file=sys.stderr)
        return True

    def begin(self, banks: list) -> int:
        """Collective: the number of steps that are done, 0 or a checkpoint's, whose state the banks then have."""
        if self.state is None:
            return 0
        for bank, whole in zip(banks, self.state["banks"], strict=True):
            bank.load(whole)
        progress = self.state["trial"]
        self.initial, self.clock.seconds = progress["initial"], progress["seconds"]
        self.validated_at, self.logged_at = progress["validated_at"], progress["logged_at"]
        self.bar.initial = self.bar.n = self.state["step"]
        return self.state["step"]

    def steps(self, banks: list, first: int) -> Iterator[int]:
        """How many steps are done, from `first` to all of them, where only a validation is left. Starts the clock;
        between two steps heartbeat and checkpoint have their turn."""
        every = self.run.args.checkpoint_every
        self.clock.resume()
        for done in range(first, self.hp.last_step + 1):
            save = self.request or every and done > first and done % every == 0
            self.step = done + 1
            self.run.heartbeat.begin(self.step, usual=done > first and not save)
            if save:
                with self.clock.stopped():
                    self.save(done, banks)
            yield done

    def save(self, step: int, banks: list):
        """Collective. The file is written while the training continues; where a signal says stop, the process ends."""
        self.run.writer.wait()
        banks = [bank.gather_state() for bank in banks]
        stop = self.request == STOP
        if self.place.rank == 0:
            progress = dict(initial=self.initial, seconds=self.clock.seconds, validated_at=self.validated_at,
                            logged_at=self.logged_at)
            state = self.run.identity() | dict(seed=self.seed, step=step, trial=progress, banks=banks,
                                               lengths=log_files(self.log.name))
            self.run.writer.write(Path("logs", f"{self.log.name}.checkpoint"), f"seed{self.seed}-step{step}.pt", state)
            if stop:
                self.log.line(f"stopped: by a signal at step {step}")
        if stop:
            self.run.writer.wait()
            # NCCL's sends only queue, and torchrun ends rank 0 soon after another rank has left: all leave together
            dist.barrier()
            if self.place.rank:
                sys.exit(1)
            complain(f"stopped by a signal at step {step}; --resume logs/{self.log.name}.checkpoint goes on")

    @contextlib.contextmanager
    def validating(self):
        """Around a validation: the clock stands still, and the step may take as long as it takes."""
        self.run.heartbeat.unusual()
        with self.clock.stopped():
            yield

    def validated(self, step: int, losses: dict[str, float]):
        """Diverged where the first loss is not finite or, from a tenth of the steps on, above that of step 0."""
        val_loss = next(iter(losses.values()))
        seconds, (before, since) = self.clock.seconds, self.validated_at
        step_avg = (seconds - since) / (step - before) if step else math.nan
        self.validated_at = step, seconds
        said = " ".join(f"{name}:{loss:.5f}" for name, loss in losses.items())
        line = f"step:{step}/{self.hp.last_step} {said} train_time:{seconds:.3f}s step_avg:{1000 * step_avg:.2f}ms"
        self.log.line(line)
        self.log.record(seed=self.seed, step=step, **losses, train_time=seconds)
        if self.place.rank == 0:
            say(line, self.bar.write)
        beside = against_reference(step, losses[self.hp.metric], self.run.result, self.reference)
        self.bar.set_description_str(f"seed {self.seed}" + beside)
        if step == 0:
            self.initial = val_loss
        diverged = step >= 0.1 * self.hp.train_steps and val_loss > self.initial
        if diverged or not math.isfinite(val_loss):
            raise Diverged(f"the validation loss at step {step} is {val_loss}")

    @contextlib.contextmanager
    def updating(self, banks: list, step: int):
        """Around the update of step `step`, counted from 1, when the GPU has been waited for already: first the ranks
        agree on signals; with --neurons the neurons are looked at before and after. Collective."""
        self.request = self.run.signals.agree(self.place.device)
        every = self.run.args.neurons
        looks = every and step % every == 0
        before = {name: bank.masters[i].clone() for name, (bank, i) in owned_neurons(banks).items() if looks}
        yield
        if looks:
            with self.clock.stopped():
                record_neurons(banks, before, self.seed, step, self.place, self.log)

    def trained(self, step: int, loss: Tensor, lr: float):
        """`loss`: this rank's, summed over the tokens of the step's batch."""
        self.bar.update()
        if step % max(1, self.hp.train_steps // 128):  # to read a loss is to wait for the GPU
            return
        dist.all_reduce(loss)
        loss = loss.item() / self.hp.batch_tokens
        seconds, (before, since) = self.clock.read(), self.logged_at
        step_time = (seconds - since) / (step - before)
        self.logged_at = step, seconds
        tokens_per_second = self.hp.batch_tokens / step_time
        self.log.record(seed=self.seed, step=step, loss=loss, lr=lr, train_time=seconds,
                        tokens_per_second=tokens_per_second, peak_memory=peak_memory(self.place))
        self.bar.set_postfix_str(f"loss {loss:.3f}, {1000 * step_time:.0f} ms/step, {tokens_per_second:,.0f} tok/s",
                                 refresh=False)


def peak_memory(place: Place) -> int:
    """Bytes: the most that this process has held on its GPU, or resident without one."""
    if place.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_reference(hp, result: int, root: Path) -> dict[int, tuple]:
    """{step: (mean, sd, slope, half_width)} of a published result (records/published), for display; empty where its
    curves are not of the run's metric and length, by the schedule or by the end, and where the file is not there."""
    path = root / "records" / "published" / "reference.csv"
    if hp.target_loss != 3.28 or not path.is_file():
        return {}
    lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [line[2:] for line in lines if line[:2] == [str(result), hp.metric]]
    found = {int(step): tuple(map(float, row)) for _, step, *row in rows}
    lengths = {int(length) for length, *_ in rows} | {max(found, default=0)}  # #45 ends at 2720 of 2900
    return found if lengths & {hp.train_steps, hp.last_step} else {}


def against_reference(step: int, loss: float, result: int, reference: dict[int, tuple]) -> str:
    """How far the loss that the run claims is from the published result's, in deviations between its runs; after 60% of
    the steps also the final loss that this foretells, +- 95%. Before that the interval is too wide to be useful.
    Neither is a reason to stop."""
    if step not in reference:
        return ""
    (mean, sd, slope, half_width), last = reference[step], max(reference)
    final = f", final {reference[last][0] + slope * (loss - mean):.4f} +- {half_width:.4f}"
    return f" #{result} {(loss - mean) / sd:+.1f} sd" + final * (0.6 * last <= step < last)
