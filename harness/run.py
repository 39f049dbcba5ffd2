"""A run: one command line, one process group, one log, and a trial for each seed."""

import argparse
import ctypes
import dataclasses
import fcntl
import importlib.util
import math
import os
import platform
import signal
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from harness.arguments import Experiment, complain, departures, line_of, overridden, parse, result_of
from harness.checkpoint import Signals, Writer, folder_of, read_state
from harness.heartbeat import Heartbeat
from harness.log import SEPARATOR, RunLog, ended_seeds, facts, is_fork, log_files, mirror_to_wandb, moved
from harness.log import say, source_of_run, source_sha256
from harness.ranks import Place, agree, check_place, join, meet, micro_batch_size
from harness.shards import DamagedShard, download_of, find_shards
from harness.trial import Trial

SHAPES = "batch_tokens", "vocab_size", "num_layers", "model_dim", "mlp_dim", "activation"  # a fork cannot change them


########################################
#           How a run begins           #
########################################

class Start(NamedTuple):
    """What a run begins with. `args` are those that count: of a resumed run, the ones that it began with."""
    args: argparse.Namespace
    hp: object  # the experiment's hyperparameters
    state: dict | None = None  # of the checkpoint that the first trial goes on from
    head: object = None  # of a resumed run, the hyperparameters at the head of its log; micro_batch may be another
    result: int = 0  # the published one whose curve the progress bar shows the run beside; 0 is none
    ended: dict[int, tuple[str, bool]] | None = None  # by --resume newest: {seed: (log, whether it is finished)}


def recall(experiment: Experiment, args: argparse.Namespace) -> Start:
    """What the arguments ask for, and the checkpoint that they name says. ValueError where the two do not fit."""
    if not (args.resume or args.fork_from):
        hp, recipes = overridden(experiment, args.overrides), [word for word in args.overrides if word.startswith("@")]
        result = result_of(*[word for word in recipes if result_of(word)][-1:])
        return Start(args, hp, result=shown_beside(result, hp, overridden(experiment, recipes)))
    named = [args.resume or args.fork_from, *filter(os.path.exists, args.overrides)]
    if len(named) > 1:  # of logs/*.checkpoint the shell makes all that there are
        newest = max(named, key=lambda path: os.path.exists(path) and os.path.getmtime(path))
        raise ValueError(f"a run goes on from one checkpoint, these are {len(named)}: give one; the newest is {newest}")
    folder = folder_of(named[0])
    state, before = read_run(experiment, folder)
    words = words_of(state)
    if args.resume:
        check_resume(args, state, folder)
        settled = dict(resume=str(folder), seed=state["seed"], trials=state["end"] - state["seed"],
                       neurons=state["neurons"], checkpoint_every=state["every"])
        hp = overridden(experiment, words + args.overrides)
        return Start(argparse.Namespace(**vars(args) | settled), hp, state, before, state["result"])
    hp = overridden(experiment, words + args.overrides)
    check_fork(hp, before, state, folder)
    return Start(argparse.Namespace(**vars(args) | dict(seed=state["seed"], trials=1)), hp, state,
                 result=shown_beside(state["result"], hp, before))


def shown_beside(result: int, hp, recipe) -> int:
    """The published result, or 0 where the run is to have another schedule or to claim another metric than its
    recipe, whose curve would then tell nothing of it."""
    decisive = (name for name in vars(hp) if name.endswith(("_schedule", "_steps")) or name == "metric")
    return result * all(getattr(hp, name) == getattr(recipe, name) for name in decisive)


def read_run(experiment: Experiment, folder: Path) -> tuple[dict, object]:
    """A checkpoint of this very program, and the hyperparameters of its run. ValueError for any other."""
    state = read_state(folder)
    # where the names are others, its words are unknown here
    same = state["hyperparameters"].keys() == vars(experiment.hyperparameters()).keys()
    hp = overridden(experiment, words_of(state)) if same else None
    if not same or state["source_sha256"] != source_sha256(source_of_run(experiment.script, hp)):
        raise ValueError(f"{folder} is of another version of this program: check out the commit that its log names")
    return state, hp


def words_of(state: dict) -> list[str]:
    return [f"{name}={value}" for name, value in state["hyperparameters"].items()]


def settle(experiment: Experiment, args: argparse.Namespace, rank: int, store: dist.Store) -> tuple:
    """Collective: the arguments with what `--resume newest` stands for, as rank 0 sees it, and, where that is a fresh
    start, what `newest` says of the seeds that have ended."""
    if args.resume != "newest":
        return args, None
    hp, folder, ended = overridden(experiment, args.overrides), "", {}
    try:
        if rank == 0:
            folder, ended = newest(experiment, args, hp)
    finally:
        if rank == 0:
            store.set("newest", folder)
    folder = store.get("newest").decode()
    words = dict(resume=folder, overrides=[f"micro_batch={hp.micro_batch}"]) if folder else dict(resume=None)
    return argparse.Namespace(**vars(args) | words), None if folder else ended


def newest(experiment: Experiment, args: argparse.Namespace, hp) -> tuple[str, dict]:
    """The newest checkpoint in logs/ of a run of this program and these values, but micro_batch, that does all of these
    seeds that have not ended; '' where there is none. And those that have. What cannot be read, or has lost its log,
    is a line, and skipped. BlockingIOError where another process has come here with the same command, and lives."""
    def sha256_of(micro_batch: int) -> str:
        return source_sha256(source_of_run(experiment.script, dataclasses.replace(hp, micro_batch=micro_batch)))
    end = args.seed + args.trials
    if not args.dry_run:
        hold(f"logs/.newest-{sha256_of(1)[:16]}-{args.seed}-{end}")
    found = []
    for manifest in sorted(Path("logs").glob("*.checkpoint/manifest.json"), key=os.path.getmtime, reverse=True):
        try:
            state = read_state(manifest.parent, hashed=False)
            fork = is_fork(manifest.parent.with_suffix(".txt"))
        except (OSError, ValueError) as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        values = state["hyperparameters"]
        if (values | dict(micro_batch=hp.micro_batch) == vars(hp) and state["end"] == end and not fork
                and state["source_sha256"] == sha256_of(values["micro_batch"])):
            found.append((manifest.parent, state))
    ended = ended_seeds({sha256_of(hp.micro_batch), *(state["source_sha256"] for _, state in found)})
    left = [seed for seed in range(args.seed, end) if seed not in ended]
    return next((str(folder) for folder, state in found if left and state["seed"] <= left[0]), ""), ended


def hold(path: str):
    """Lock a file as long as this process lives. Where the file system cannot, RunLog's warning says so."""
    Path("logs").mkdir(exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{os.read(file, 200).decode(errors='replace')} has come first with this command, and "
                              f"lives ({path}): wait for its end, or end it") from None
    except OSError:
        return
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())


def check_resume(args: argparse.Namespace, state: dict, folder: Path):
    if any(not word.startswith("micro_batch=") for word in args.overrides):
        raise ValueError("--resume goes on as the run began, without NAME=VALUE; --fork-from starts a variation")
    for path, size in log_files(folder.stem).items():
        if size < state["lengths"].get(path, math.inf):
            raise ValueError(f"{path} is not here, or shorter than {folder} says: start where logs/ holds both")


def check_fork(hp, before, state: dict, folder: Path):
    for name in SHAPES:
        if getattr(hp, name) != getattr(before, name):
            raise ValueError(f"--fork-from: {name} is {getattr(before, name)} in {folder} and cannot change")
    for name, rule in hp.rules.items():
        if rule.keeps != before.rules[name].keeps:
            raise ValueError(f"--fork-from: {name} is {before.rules[name].text!r} in {folder}, with another state than "
                             f"{rule.text!r}: knobs may change, and stages that keep nothing")
    if hp.last_step <= state["step"]:
        raise ValueError(f"--fork-from: the last step is {hp.last_step}, and {folder} is at step {state['step']}")


def summary(experiment: Experiment, hp, world: int) -> str:
    """What would run, for --dry-run."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in experiment.model(hp).parameters())
    validations = sum(experiment.is_validation_step(step, hp) for step in range(hp.last_step + 1))
    size = (f"{parameters:,} parameters, {hp.last_step:,} steps of {hp.batch_tokens:,} tokens, "
            f"{validations} validations of {hp.val_tokens:,} tokens, world_size {world}")
    return "\n".join([size, *departures(hp, experiment.rules)])


########################################
#                 Run                  #
########################################

class Run:
    """What the trials of a run share. `shards` and `val_shards`: {path: tokens}."""

    def __init__(self, experiment: Experiment, start: Start, place: Place, shards: dict, val_shards: dict):
        self.experiment, self.place, self.shards, self.val_shards = experiment, place, shards, val_shards
        self.args, self.hp, self.state, head, self.result, self.ended = start
        self.head = head or self.hp
        self.root = experiment.script.parent
        self.failed = bool(self.args.resume) and self.state["failed"]  # whether a trial has
        self.log, self.writer, self.heartbeat = RunLog(None), Writer(), None

    def train(self):
        """All trials, each to its end."""
        seeds = self.seeds()
        if not seeds:
            return
        if self.place.rank == 0:
            self.log = self.open_log()
        self.signals = Signals(heeded=self.args.checkpoint_every > 0)
        with self.place.device:
            model = self.experiment.model(self.hp)
        if self.place.device.type == "cuda":
            model.compile(dynamic=False)
        with Heartbeat(self.place.rank, self.place.world, self.root) as self.heartbeat:
            for seed in seeds:
                with Trial(self, seed, self.state) as trial:
                    resumed = self.args.resume and self.state
                    if self.place.rank == 0:
                        self.log.line(self.resumed() if resumed else f"seed: {seed}")
                    self.experiment.train(model, trial)
                self.state = None
        self.writer.wait()
        if self.place.rank == 0:
            say(f"log: {self.log.text.name}")

    def resumed(self) -> str:
        """The line where a run goes on, with what is another than its log's head tells."""
        size = f", micro_batch {self.hp.micro_batch}" if self.hp != self.head else ""
        return (f"resumed: step {self.state['step']}, world_size {self.place.world}" + size +
                moved(self.log.facts(), self.place))

    def seeds(self) -> list[int]:
        """The seeds of --trials that no log holds to their end, as rank 0 sees it. A single trial is always run, and so
        is that of a checkpoint. `--resume newest`, which may be in a loop, runs none again that has failed."""
        args, ended = self.args, self.ended
        seeds = list(range(args.seed, args.seed + args.trials))
        if args.trials > 1 and self.place.rank == 0 and ended is None:
            log = f"logs/{Path(args.resume).stem}.txt" if args.resume else None
            ended = ended_seeds({source_sha256(source_of_run(self.experiment.script, self.head))}, log)
            ended = {seed: (path, finished) for seed, (path, finished) in ended.items() if finished}
        for seed in seeds[bool(args.resume):] if ended else []:
            if seed in ended:
                path, finished = ended[seed]
                print(f"seed {seed} {'is finished' if finished else 'has failed'}, in {path}: it is not run again")
                self.failed |= not finished
                seeds.remove(seed)
        decided = [seeds]
        dist.broadcast_object_list(decided)
        return decided[0]

    def open_log(self) -> RunLog:
        """A new log with its head; to resume, the run's own, truncated to where its checkpoint was."""
        name = (Path(self.args.resume).stem if self.args.resume else
                time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:8])
        # before the log: it may fail
        mirrors = [mirror_to_wandb(name, self.args.wandb, self.hp)] if self.args.wandb else []
        if self.args.resume:
            return RunLog(name, self.state["lengths"], mirrors)
        block = facts(self.experiment, self.hp, self.place, self.shards | self.val_shards)
        if self.args.fork_from:
            block += (f"\npartial: forked from step {self.state['step']} of {self.args.fork_from}, "
                      f"seed {self.state['seed']}")
        log = RunLog(name, listeners=mirrors)
        for part in (source_of_run(self.experiment.script, self.hp).rstrip("\n"), SEPARATOR, block, SEPARATOR):
            log.line(part)
        return log

    def identity(self) -> dict:
        """What a checkpoint holds of the run."""
        return dict(hyperparameters=vars(self.head), end=self.args.seed + self.args.trials, neurons=self.args.neurons,
                    source_sha256=source_sha256(source_of_run(self.experiment.script, self.head)),
                    every=self.args.checkpoint_every, failed=self.failed, result=self.result)


########################################
#         From words to an end         #
########################################

def launch(experiment: Experiment, argv: list[str]):
    """A command line, from its words to the exit code."""
    args = parse(argv, experiment.description)
    store, why = None, ""
    try:
        rank, local_rank, world = standing()
        end_with_launcher()
        alone = args.dry_run or args.fineweb_shards or "MASTER_ADDR" not in os.environ
        store = meet(rank, 1 if alone else world)
        args, ended = settle(experiment, args, 0 if alone else rank, store)
        start = recall(experiment, args)._replace(ended=ended)
        if args.fineweb_shards:
            print(download_of(start.hp))
            return
        if args.wandb and not importlib.util.find_spec("wandb"):
            raise ValueError("--wandb needs the package: python -m pip install -r requirements.txt")
        shards = checked(start.hp, local_rank, world)
        if args.dry_run:
            print(summary(experiment, start.hp, world))
            if not torch.cuda.is_available():
                print("not checked, for want of a GPU: memory, kernels, compilation, what GPUs send each other, speed")
            return
        if world > 1 and alone:
            raise ValueError(f"WORLD_SIZE={world} but no MASTER_ADDR: start the processes with torchrun")
    except (OSError, ValueError) as error:
        why = str(error)
    if store and not alone:  # all end where one must: the others would wait for it
        why = agree(store, rank, world, why)
    if why:
        complain(why)
    place = join(rank, local_rank, world, start.hp.head_dim, store)
    finish(Run(experiment, start, place, *shards))


def standing() -> tuple[int, int, int]:
    """Rank, rank on this machine and number of processes, which torchrun says; without it there is one process.
    ValueError names a variable that another job has left behind."""
    said = []
    for name, default, least, most in (("RANK", 0, 0, 2**31), ("LOCAL_RANK", 0, 0, 2**31), ("WORLD_SIZE", 1, 1, 2**31),
                                       ("MASTER_PORT", 0, 0, 2**16 - 1)):
        text = os.environ.get(name, str(default))
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise ValueError(f"{name}={text} in the environment: torchrun sets it to a number of at least {least}"
                             f"{' and at most 65535' * (most < 2**16)}; unset {name}")
        said.append(int(text))
    rank, local_rank, world, _ = said
    if rank >= world:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={world} in the environment: torchrun sets both; unset RANK")
    if local_rank > rank:
        raise ValueError(f"LOCAL_RANK={local_rank} with RANK={rank} in the environment: torchrun sets both; "
                         "unset LOCAL_RANK")
    return rank, local_rank, world


def end_with_launcher():
    """Ask Linux for a SIGTERM when torchrun is gone, whatever ended it: a worker that stays holds its GPU. ValueError
    where it is gone already: it kept the store at which the ranks meet, and they would wait half an hour for it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "MASTER_ADDR" in os.environ:
        address = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "0"))
        try:
            with socket.create_connection(address, timeout=10):
                pass
        except ConnectionRefusedError:
            raise ValueError(f"torchrun is gone: nobody answers at {address[0]}:{address[1]}, where it keeps the store "
                             "of this job; by hand, unset TORCHELASTIC_USE_AGENT_STORE") from None
        except OSError:
            pass  # joining tells


def checked(hp, local_rank: int, world: int) -> tuple[dict[str, int], dict[str, int]]:
    """The shards to train on and to validate on. ValueError where these processes cannot share them, or they are not as
    they should be."""
    check_place(hp, local_rank, world)
    return (find_shards(hp.train_files, hp.batch_tokens, hp.last_step, hp.vocab_size),
            find_shards(hp.val_files, hp.val_tokens, 1, hp.vocab_size))


def finish(run: Run):
    """Train, leave together, and end with code 1 where something failed."""
    rank = run.place.rank
    try:
        run.train()
    except torch.OutOfMemoryError:
        sys.exit(out_of_memory(run.hp, rank, run.place.world))
    except OSError as error:  # a log that cannot be written
        sys.exit(f"train_gpt.py: rank {rank}: {error}")
    except DamagedShard as error:  # on all ranks: they leave together
        if line := line_of(error):
            print(line, file=sys.stderr, flush=True)
        run.failed = True
    except KeyboardInterrupt:
        complain("interrupted; with --checkpoint-every N, Ctrl-C saves first")
    except RuntimeError:  # it may be the echo of another rank's end
        if run.heartbeat and (gone := run.heartbeat.gone(3)):  # torchrun blames the one that ends first
            complain(f"rank {rank}: {gone}")
        raise
    dist.barrier()  # a process that is gone while another still talks to it aborts that one
    dist.destroy_process_group()
    if run.failed:
        sys.exit(1)


def out_of_memory(hp, rank: int, world: int) -> str:
    """micro_batch is not lowered automatically: that would change rounding, and the value that the log's source
    states."""
    size = micro_batch_size(hp.batch_tokens // hp.sequence_length // world, hp.micro_batch)
    remedy = f"try micro_batch={size // 2}" if size > 1 else "no smaller one is left: take more GPUs or a smaller model"
    return f"train_gpt.py: rank {rank}: the GPU has not enough memory for micro_batch={size}; {remedy}"
