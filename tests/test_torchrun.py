"""What ./run.sh starts in its own place: the trainer's processes, their signals, their end, the verdict."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from harness.torchrun import ended, judge
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# A worker that notes the signals that it gets; those that stop end it as the trainer ends, with code 1 and a line.
WORKER = """
import os, signal, sys, time

rank = os.environ["RANK"]

def got(number, _):
    with open(f"got.{rank}", "a") as file:
        print(signal.Signals(number).name, file=file)
    if number != signal.SIGUSR1:
        sys.exit("stopped" if rank == "0" else 1)

for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, got)
sys.stdout.write(os.environ["MASTER_ADDR"] + chr(10))  # one write: print makes two, and ranks share the pipe
open(f"got.{rank}", "w")
while True:
    time.sleep(0.1)
"""


def launch(folder, script, processes=2, before=(), words=()):
    (folder / "worker.py").write_text(script)
    command = [*before, sys.executable, "-m", "harness.torchrun", "--standalone", f"--nproc_per_node={processes}",
               "worker.py", *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH", "RANK", "WORLD", "LOCAL_", "MASTER"))}
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def wait_for(what):
    for _ in range(600):
        if what():
            return
        time.sleep(0.1)
    raise AssertionError


def got(folder) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("got.*"))]


@pytest.mark.parametrize("before, last", [((), signal.SIGHUP), (["nohup"], signal.SIGTERM)])
def test_signals_reach_the_workers(before, last, tmp_path):
    """Kills: a launcher that dies of SIGUSR1 or SIGTERM and leaves its workers; a traceback over the line that a worker
    said; a run that a closed terminal ends in spite of nohup; workers that meet under a name that no resolver knows."""
    launcher = launch(tmp_path, WORKER, before=before)
    wait_for(lambda: got(tmp_path) == ["", ""])
    launcher.send_signal(signal.SIGUSR1)
    wait_for(lambda: got(tmp_path) == ["SIGUSR1\n"] * 2)
    expected = "SIGUSR1\n"
    if before:
        launcher.send_signal(signal.SIGHUP)
        expected += "SIGUSR1\n"
        wait_for(lambda: got(tmp_path) == [expected] * 2)
    launcher.send_signal(last)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and err.removeprefix("nohup: ignoring input\n") == "stopped\n"
    assert out == "localhost\n" * 2
    assert all(text.startswith(expected + last.name + "\n") for text in got(tmp_path))


def test_a_killed_worker_is_one_line(tmp_path):
    """Kills: PyTorch's report of 25 lines; an end that does not name rank and signal; a survivor that is left."""
    launcher = launch(tmp_path, "import os, signal, time\n"
                                "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)")
    assert launcher.communicate(timeout=60) == ("", "run.sh: rank 1 was ended by SIGKILL\n")
    assert launcher.returncode == 1


def test_the_first_failure_is_told():
    """Kills: a line for a worker that has said its own; the rank blamed that only followed."""
    def failure(code, timestamp):
        found = ProcessFailure(0, 1, code, "none")
        found.timestamp = timestamp
        return found
    assert ended({0: failure(-15, 2), 1: failure(1, 1)}) == 1
    assert ended({0: failure(-9, 1), 1: failure(-15, 2)}) == "run.sh: rank 0 was ended by SIGKILL"
    assert ended({0: failure(3, 1)}) == "run.sh: rank 0 ended with exit code 3"


def test_the_log_of_the_run_is_judged(tmp_path, capfd):
    """Kills: a verdict on another log; none; one on a fork, which no verdict takes; a line lost on the way."""
    log = f"{ROOT}/records/tiny/20261124-233856-1c5c2518.txt"
    launcher = launch(tmp_path, f"print('step')\nprint('log: {log}')", 1)
    said = launcher.communicate(timeout=60)[0].splitlines()
    assert launcher.returncode == 0 and said[:2] == ["step", f"log: {log}"] and said[-1].startswith("PASS: ")
    assert judge(None, []) == judge(log, ["--fork-from", "a"]) == 0 and judge("nowhere.txt", []) == 1
    assert capfd.readouterr().out == ""
