"""A run on several machines: here two launchers on the loopback interface, each with a rank; and examples/."""

import ast
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, train
from test_torchrun import wait_for

from harness.log import local_files
from records.log import read

# The trainer, of which rank 1 is killed in step 6
KILLED = """
import os, signal, sys
import train_gpt

update = train_gpt.update

def killed(banks, step):
    if step == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    update(banks, step)

train_gpt.update = killed
train_gpt.main(sys.argv[1:])
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def nodes(folders, words, script=ROOT / "train_gpt.py", port: int = 0) -> list[subprocess.Popen]:
    """A launcher in each folder, of as many machines as there are folders."""
    port = port or free_port()
    unwanted = "TORCH", "RANK", "WORLD", "LOCAL_", "MASTER"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    return [subprocess.Popen(
        [sys.executable, "-m", "harness.torchrun", f"--nnodes={max(2, len(folders))}", f"--node-rank={rank}",
         "--master-addr=127.0.0.1", f"--master-port={port}", "--nproc_per_node=1", str(script), *words],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=clean | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
        for rank, folder in enumerate(folders)]


def ends(launchers) -> list[tuple[int, str]]:
    """Exit code and last words of each, without the warnings that PyTorch's store may log where a machine is gone."""
    said = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    return [(launcher.returncode, re.sub(r"^\[W.*\n(?:(?!train_gpt|run\.sh).*\n)*", "", text, flags=re.M))
            for launcher, text in zip(launchers, said)]


def test_a_machine_that_is_lost_ends_all_and_the_same_command_goes_on(quick, tmp_path):
    """Kills: a machine that waits for one that is gone; a traceback, or an end that names no rank; a rank on another
    machine that begins where this one goes on; two logs."""
    words = [*quick, "--checkpoint-every", "3", "--resume", "newest"]
    (tmp_path / "killed.py").write_text(KILLED)
    assert ends(nodes([tmp_path] * 2, words, tmp_path / "killed.py")) == [
        (1, "train_gpt.py: rank 0: rank 1 is gone: killed, or with its machine\n"),
        (1, "run.sh: rank 1 was ended by SIGKILL\n")]
    assert ends(nodes([tmp_path] * 2, words)) == [(0, "")] * 2
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert "resumed: step 3, world_size 2\n" in log.read_text() and read(log).trials[0].complete


def test_a_machine_without_the_checkpoint_ends_all(quick, tmp_path, monkeypatch):
    """Kills: a machine that waits for half an hour for one that could not begin, or that does not say for whom; one
    that begins alone what the other goes on with."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    words = [*quick, "--checkpoint-every", "3"]
    monkeypatch.setattr("train_gpt.update", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(here, words)
    (folder,) = here.glob("logs/*.checkpoint")
    line = (f"there is no logs/{folder.name}/manifest.json on this machine: name a checkpoint that is here; of several "
            "machines all see one logs/\n")
    first, second = ends(nodes([here, there], [*words, "--resume", "newest"]))
    assert first[0] == 1 and re.fullmatch(rf"train_gpt.py: rank 1, on \S+: {re.escape(line)}", first[1]), first
    assert second == (1, f"train_gpt.py: {line}") and not (there / "logs").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_waits_for_another_hears_a_signal(rank, tmp_path):
    """Kills: Ctrl-C, or a scheduler's SIGTERM, that is heard after ten minutes of waiting for a machine."""
    port = free_port()
    launchers = nodes([tmp_path] * (rank + 1), [], "nothing.py", port)
    for other in launchers[:rank]:  # before it listens
        other.kill()
        other.communicate()
    status = Path(f"/proc/{launchers[rank].pid}/status")
    caught = 1 << signal.SIGTERM - 1
    wait_for(lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & caught)
    if rank == 0:  # it waits within PyTorch when it listens
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
    launchers[rank].send_signal(signal.SIGTERM)
    assert ends(launchers[rank:]) == [(1, "run.sh: ended by SIGTERM\n")]


def stand_ins(folder):
    """run.sh in a folder where a machine has 8 GPUs, and Python notes what it is asked."""
    for name in ("run.sh", "requirements.txt"):
        (folder / name).write_text((ROOT / name).read_text())
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "requirements.txt").write_text((ROOT / "requirements.txt").read_text())
    for name in ("pip", "python"):
        path = folder / ".venv" / "bin" / name
        path.write_text('#!/bin/sh\ncase "$*" in *find_gpus*|*device_count*) echo 8; exit;; *--fineweb*) exit;; esac\n'
                        'echo "$WORLD_SIZE $MASTER_ADDR $*" >> asked\n')
        path.chmod(0o755)
    (folder / "run.sh").chmod(0o755)


def test_run_sh_on_several_machines(tmp_path):
    """Kills: the ranks of one machine alone for the doctor; a machine that starts without the others, or under the
    number of one that there is; a master that another job has left behind, for one machine."""
    stand_ins(tmp_path)

    def asked(**environment):
        (tmp_path / "asked").unlink(missing_ok=True)
        run = subprocess.run(["bash", "run.sh", "a=1"], cwd=tmp_path, text=True, capture_output=True,
                             env={"PATH": os.environ["PATH"]} | environment)
        return (run.stderr or (tmp_path / "asked").read_text()).splitlines()
    both = dict(NNODES="2", MASTER_ADDR="10.0.0.1")
    assert asked(**both, NODE_RANK="1") == [
        "16 10.0.0.1 -m harness.doctor -- a=1",
        " 10.0.0.1 -m harness.torchrun --nnodes=2 --node-rank=1 --master-addr=10.0.0.1 --master-port=29500 "
        "--nproc_per_node=8 train_gpt.py a=1"]
    assert "--master-port=1234 " in asked(**both, NODE_RANK="0", MASTER_PORT="1234")[1]
    assert asked(MASTER_ADDR="10.0.0.1", MASTER_PORT="1")[1] == (
        "  -m harness.torchrun --standalone --nproc_per_node=8 train_gpt.py a=1")
    line = "run.sh: NNODES=2: each machine needs its NODE_RANK, 0 to 1, and as MASTER_ADDR the address of 0"
    for wrong in (both, both | dict(NODE_RANK="2"), dict(NNODES="2", NODE_RANK="0")):
        assert asked(**wrong) == [line]
    assert asked(NNODES="two") == ["run.sh: NNODES=two NODE_RANK=: both are numbers"]


def test_slurm(tmp_path):
    """Kills: machines of one number; .venv that two make at once; words lost on the way, or cut at spaces; a requeued
    job that begins anew."""
    stand_ins(tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", 'test "$*" = "show hostnames n[3-4]" && printf "n3\\nn4\\n"'),
                       ("srun", 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = dict(SLURM_NNODES="2", SLURM_JOB_NODELIST="n[3-4]", SLURM_JOB_ID="12345678")
    subprocess.run(["bash", ROOT / "examples" / "slurm.sh", "matrix_update=polar | step"], cwd=tmp_path, check=True,
                   env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | job)
    words = "--checkpoint-every 250 --resume newest matrix_update=polar | step"
    once, *lines = (tmp_path / "asked").read_text().splitlines()
    assert once == "8  -m harness.doctor -- --dry-run matrix_update=polar | step"
    assert lines == [line for rank in (0, 1) for line in (
        f"16 n3 -m harness.doctor -- {words}",
        f" n3 -m harness.torchrun --nnodes=2 --node-rank={rank} --master-addr=n3 --master-port=25678 "
        f"--nproc_per_node=8 train_gpt.py {words}")]


def test_a_container_has_what_a_run_needs():
    """Kills: a pin of its own, beside those of requirements.txt; a file of the program, of the desk that judges the
    log, or of what run.sh starts, that is not copied; a copy of gigabytes of shards, logs or .venv."""
    text = (ROOT / "examples" / "Dockerfile").read_text()
    assert "==" not in text and "pip install --no-cache-dir -r requirements.txt" in text
    copied = [shlex.split(line)[1:-1] for line in re.findall(r"^COPY .*$", text, re.MULTILINE)]
    here = {path.relative_to(ROOT).as_posix() for names in copied for name in names for path in ROOT.glob(name)}
    assert {"train_gpt.py", "run.sh", "requirements.txt", "harness", "records"} <= here
    assert not here & {".", "data", "logs", ".venv"}
    files = {path for name in here for path in [ROOT / name, *(ROOT / name).rglob("*.py")] if path.suffix == ".py"}
    needed = {path for file in files for path in imported(file)}
    assert needed <= files and len(files) > 30
    for program in re.findall(r"[\w/]+\.py", (ROOT / "run.sh").read_text()):
        assert ROOT / program in files, program


def imported(path: Path) -> list[Path]:
    return [file for node in ast.walk(ast.parse(path.read_text())) for file in local_files(node, ROOT)]
