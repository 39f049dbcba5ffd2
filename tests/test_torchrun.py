"""What ./run.sh starts in its own place: the trainer's processes, their signals, their end, the verdict."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, wait_for

from harness.checkpoint import read_checkpoint
from harness.torchrun import ended, judge
from tests.drills.kill import checkpoint_of
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


def launch(folder, script, processes=2, before=(), words=(), **environment):
    (folder / "worker.py").write_text(script)
    command = [*before, sys.executable, "-m", "harness.torchrun", "--standalone", f"--nproc_per_node={processes}",
               "worker.py", *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH", "RANK", "WORLD", "LOCAL_", "MASTER"))}
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=clean | {"PYTHONPATH": str(ROOT)} | environment)


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


# In place of PyTorch, which takes seconds to import
IMPORTED = """
import os, time
open("importing", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
raise SystemExit("imported")
"""


@pytest.mark.parametrize("program, says, code", [
    (["-m", "harness.torchrun"], "run.sh: ended by {}\n", (1, 1)),
    ([str(ROOT / "train_gpt.py")], "", (-signal.SIGINT, -signal.SIGTERM))])
def test_signals_while_pytorch_is_imported(program, says, code, tmp_path):
    """Kills: a traceback out of PyTorch's middle; a run that SIGUSR1 ends before it has begun."""
    (tmp_path / "torch.py").write_text(IMPORTED)
    for number, returncode in ((signal.SIGUSR1, 1), *zip((signal.SIGINT, signal.SIGTERM), code)):
        run = subprocess.Popen([sys.executable, *program], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
        wait_for((tmp_path / "importing").exists)
        run.send_signal(number)
        if number == signal.SIGUSR1:
            (tmp_path / "go").touch()
        said = run.communicate(timeout=60)[1]
        assert (said, run.returncode) == ("imported\n" if number == signal.SIGUSR1 else says.format(number.name),
                                          returncode)
        for name in ("importing", "go"):
            (tmp_path / name).unlink(missing_ok=True)


def test_what_another_job_has_left_for_torchrun(tmp_path):
    """Kills: options that torchrun reads in PET_*, such as a second machine that it waits for."""
    launcher = launch(tmp_path, "import os\nprint(os.environ['WORLD_SIZE'])", 1, PET_NNODES="2", PET_REDIRECTS="3",
                      PET_MODULE="1")
    assert launcher.communicate(timeout=60) == ("1\n", "") and launcher.returncode == 0


# The trainer, whose rank 0 kills the launcher in its fourth update
ORPHANS = """
import os, signal, sys
import train_gpt

update, parent = train_gpt.update, os.getppid()

def orphaned(banks, step):
    if step == 3 and os.environ["RANK"] == "0":
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            pass
    update(banks, step)

train_gpt.update = orphaned
train_gpt.main(sys.argv[1:])
"""


def test_ranks_do_not_outlive_their_launcher(quick, tmp_path):
    """Kills: ranks that train on when nothing is left that would end them, or end without their checkpoint."""
    launcher = launch(tmp_path, ORPHANS, words=[*quick, "--checkpoint-every", "100"], CUDA_VISIBLE_DEVICES="")
    said = launcher.communicate(timeout=60)[1]  # which ends when the last of them does
    assert launcher.returncode == -signal.SIGKILL, said
    folder = f"logs/{checkpoint_of(tmp_path).name}"
    step = read_checkpoint(tmp_path / folder)["step"]
    assert step < 8  # of all: the run did not go on
    assert said.splitlines()[-1] == f"train_gpt.py: stopped by a signal at step {step}; --resume {folder} goes on"


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
