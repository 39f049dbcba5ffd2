"""torchrun, as ./run.sh needs it: signals reach the trainer, an end is one line, and the log is judged.

    python -m harness.torchrun --standalone --nproc_per_node=N train_gpt.py [WORD ...]

or, in place of --standalone, --nnodes=M --node-rank=R --master-addr=A --master-port=P on each of M machines, of which
that of rank 0 is at address A.

PyTorch's own answers SIGTERM and SIGHUP with a traceback, dies of SIGUSR1 and leaves its workers behind, and reports a
worker's end in 25 lines, below the one that the worker has said. Here SIGTERM, SIGINT, SIGHUP and SIGUSR1 are handed
on to the workers, which save (harness/checkpoint.py), and this process waits for them. SIGHUP under nohup asks them to
save alone.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

TOGETHER = 600  # s within which all machines have started, as PyTorch has it
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")  # of the main thread, which starts the workers


def hand_on(number: int, as_number: int):
    """From now on a signal goes to the workers, as another perhaps."""
    def handler(*_):
        for worker in CHILDREN.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), as_number)
    signal.signal(number, handler)


def end_without_workers(numbers: set[int]):
    """From now on, while there are no workers, end this process at one of these signals. In a thread: a handler waits
    until PyTorch, which may wait for another machine, comes back to Python, and its exception may get lost where
    PyTorch is being imported."""
    told, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)

    def listen():
        while number := os.read(told, 1)[0]:
            if number in numbers and not CHILDREN.read_text():
                with contextlib.suppress(OSError):  # nobody reads it any more
                    os.write(2, f"run.sh: ended by {signal.Signals(number).name}\n".encode())
                os._exit(1)
    threading.Thread(target=listen, daemon=True).start()


def reach(address: str, port: int):
    """Return when the machine of rank 0 answers. PyTorch would print a page while it waits."""
    until = time.monotonic() + TOGETHER
    while True:
        try:
            return socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > until:
                sys.exit(f"run.sh: {address}:{port}, where the machine of NODE_RANK=0 listens, does not answer "
                         f"({error}): start it within {TOGETHER} s, and see that MASTER_ADDR and MASTER_PORT are right")
        time.sleep(1)


class Heard(threading.Thread):
    """Hands on what the workers print, and keeps the name of the log, which is in their last line."""

    def __init__(self):
        super().__init__(daemon=True)
        self.log = None
        self.stdout = os.dup(1)
        self.pipe, end = os.pipe()
        os.dup2(end, 1)
        os.close(end)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        os.dup2(self.stdout, 1)  # the last end of the pipe on this side
        self.join(10)  # a process that a worker has left behind may hold another

    def run(self):
        tail = b""
        while block := os.read(self.pipe, 2**16):
            tail = (tail + block)[-2**12:]
            with contextlib.suppress(OSError):  # nobody reads it any more: the run goes on
                while block:
                    block = block[os.write(self.stdout, block):]
        if found := re.findall(rb"^log: (.+)$", tail, re.MULTILINE):
            self.log = os.fsdecode(found[-1])


def ended(failures: dict) -> str | int:
    """What to exit with: a worker that ends with 1 has said why."""
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    if first.exitcode == 1:
        return 1
    return f"run.sh: rank {rank} " + (f"was ended by {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else
                                      f"ended with exit code {first.exitcode}")


def judge(log: str | None, words: list[str]) -> int:
    """Have the desk judge the log, if a run has made one. The verdict may be no: the run is whole all the same."""
    if not log or "--fork-from" in words:  # a fork is no evidence
        return 0
    return int(subprocess.call([sys.executable, "-m", "records", "verify", log]) not in (0, 1))


def launch(words: list[str]) -> str | None:
    """Run the trainer to its end and return its log, if it names one. Where it fails, this process exits."""
    for name in filter(lambda name: name.startswith("PET_"), list(os.environ)):  # torchrun's options, of another job
        del os.environ[name]
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as nohup has it
    end_without_workers({signal.SIGTERM, signal.SIGINT} | ({signal.SIGHUP} if not ignored else set()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        hand_on(number, number)
    hand_on(signal.SIGHUP, signal.SIGUSR1 if ignored else signal.SIGHUP)
    import torch.distributed as dist  # it takes seconds, in which a signal is answered as later
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    logging.disable(logging.CRITICAL)  # of torch.distributed.elastic
    os.environ["PYTHONUNBUFFERED"] = "1"  # for the workers, whose lines go through a pipe
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a page of C++ when a store is gone, besides the error
    # --local-addr: without it all wait for minutes where the name of this machine does not resolve. PyTorch's own
    # handlers are left to one signal that nobody sends.
    words = ["--local-addr=localhost", "--signals-to-handle=SIGQUIT", *words]
    try:
        with Heard() as heard:
            options = run.parse_args(words)
            if options.node_rank:
                reach(options.master_addr, options.master_port)
            run.run(options)
    except ChildFailedError as error:
        sys.exit(ended(error.failures))
    except dist.DistError:
        sys.exit(f"run.sh: not all {options.nnodes} machines came within {TOGETHER} s, or the one of NODE_RANK=0 is "
                 "gone: start them together")
    return heard.log


if __name__ == "__main__":
    sys.exit(judge(launch(sys.argv[1:]), sys.argv[1:]))
