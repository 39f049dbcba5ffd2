"""torchrun, as ./run.sh needs it: signals reach the trainer, an end is one line, and the log is judged.

    python -m harness.torchrun --standalone --nproc_per_node=N train_gpt.py [WORD ...]

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
import subprocess
import sys
import threading
from pathlib import Path

CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")  # of the main thread, which starts the workers


def hand_on(number: int, as_number: int):
    """From now on a signal goes to the workers; before there are any, one that ends this process ends it."""
    def handler(*_):
        workers = CHILDREN.read_text().split()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), as_number)
        if not workers and as_number != signal.SIGUSR1:
            os.write(2, f"run.sh: ended by {signal.Signals(number).name}\n".encode())
            os._exit(1)  # an exception may get lost where PyTorch is being imported
    signal.signal(number, handler)


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


def main(words: list[str]):
    for name in filter(lambda name: name.startswith("PET_"), list(os.environ)):  # torchrun's options, of another job
        del os.environ[name]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        hand_on(number, number)
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as nohup has it
    hand_on(signal.SIGHUP, signal.SIGUSR1 if ignored else signal.SIGHUP)
    from torch.distributed import run  # it takes seconds, in which a signal is answered as later
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    logging.disable(logging.CRITICAL)  # of torch.distributed.elastic
    os.environ["PYTHONUNBUFFERED"] = "1"  # for the workers, whose lines go through a pipe
    # --local-addr: without it all wait for minutes where the name of this machine does not resolve. PyTorch's own
    # handlers are left to one signal that nobody sends.
    words = ["--local-addr=localhost", "--signals-to-handle=SIGQUIT", *words]
    try:
        with Heard() as heard:
            run.run(run.parse_args(words))
    except ChildFailedError as error:
        sys.exit(ended(error.failures))
    sys.exit(judge(heard.log, words))


if __name__ == "__main__":
    main(sys.argv[1:])
