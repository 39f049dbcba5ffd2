"""What the desk's doctor finds, on machines that stubs stand for, and on this one."""

import json
import os
from types import SimpleNamespace

import pytest
from conftest import ROOT, write_shard

from records import doctor
from records.__main__ import main

HEALTHY = "0, NVIDIA H100 80GB HBM3, 9.0, 81559, 4\n1, NVIDIA H100 80GB HBM3, 9.0, 81559, 4\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the pinned packages, in whose nvidia-smi a test can write; the dry run is a stub."""
    pinned = doctor.pins((ROOT / "requirements.txt").read_text())
    monkeypatch.setattr(doctor, "version", pinned.get)
    monkeypatch.setattr(doctor, "dry_run", lambda words, world: (f"{words} in {world} processes", []))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def smi(rows, code=0):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{rows}END\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return pinned
    return smi


def found() -> list[str]:
    return [finding["what"] for finding in doctor.doctor([])["findings"]]


def test_a_healthy_machine(machine, capsys):
    """Kills: a finding on a machine that has none; the tiny recipe where there are GPUs; a world of one process."""
    machine(HEALTHY)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(", 2 x NVIDIA H100 80GB HBM3")
    assert said[1:] == ["[] in 2 processes", "nothing found: it can start"]


def test_gpus_that_are_hidden(machine, monkeypatch):
    """Kills: a plan for GPUs that the run would not see."""
    machine(HEALTHY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert doctor.doctor([])["plan"] == "[] in 1 processes"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.doctor([])["plan"] == "['@tiny'] in 1 processes"


@pytest.mark.parametrize("rows, code, torch, what", [
    (HEALTHY.replace(", 4\n", ", 40000\n", 1), 0, None, "GPU 0: 39.1 of 79.6 GiB are in use"),
    ("Failed to initialize NVML: Driver/library version mismatch\n", 18, None,
     "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"),
    (HEALTHY.replace("9.0", "8.0"), 0, "2.10.0", "torch 2.10.0 with NVIDIA H100 80GB HBM3 (sm_80)"),
    (HEALTHY.replace("9.0", "8.6"), 0, "2.10.1+cu129", "torch 2.10.1+cu129 with NVIDIA H100 80GB HBM3 (sm_86)"),
    (HEALTHY, 0, "2.13.0+cpu", "torch 2.13.0+cpu was built without CUDA"),
    (HEALTHY, 0, "2.12.0", "torch 2.12.0, pinned is 2.13.0"),
])
def test_what_is_wrong_with_a_machine(rows, code, torch, what, machine):
    """Kills: a GPU that is taken, a driver that is broken, a package that is another, each of which is passed over."""
    pinned = machine(rows, code)
    if torch:
        pinned["torch"] = torch
    assert what in found()


@pytest.mark.parametrize("torch, capability", [("2.10.0", "9.0"), ("2.11.0", "8.0")])
def test_what_is_known_to_be_well(torch, capability, machine):
    """Kills: a warning for every version, or for every GPU."""
    machine(HEALTHY.replace("9.0", capability))["torch"] = torch
    assert found() == [f"torch {torch}, pinned is 2.13.0"]


def test_a_missing_package_and_its_remedy(machine, capsys):
    """Kills: a finding without a reason or a command; code 0 over a finding."""
    del machine(HEALTHY)["tqdm"]
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(":")[0] for line in said] == ["FOUND", "  why it matters", "  mend"]
    assert "tqdm is missing" in said[0] and "pip install -r requirements.txt" in said[2]


def test_pins_are_those_of_this_python(monkeypatch):
    """Kills: a pin for another Python held against this one."""
    text = 'a==1\nb==2.0; python_version < "3.11"\nb==2.1; python_version >= "3.11"\n# c==3\n'
    for minor, expected in ((10, "2.0"), (11, "2.1"), (14, "2.1")):
        monkeypatch.setattr(doctor.sys, "version_info", (3, minor, 0))
        assert doctor.pins(text) == {"a": "1", "b": expected}


def test_a_folder_that_takes_no_log(machine, tmp_path, monkeypatch):
    """Kills: a run that trains and cannot say so; a check that leaves a file."""
    machine(HEALTHY)
    before = sorted(os.listdir(tmp_path))

    def refuse(dir):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert found() == [f"{tmp_path} cannot be written: Permission denied"]
    monkeypatch.undo()
    assert doctor.disk(tmp_path) == [] and sorted(os.listdir(tmp_path)) == before
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    assert doctor.disk(tmp_path)[0].what.startswith("1 MiB are free")


def test_the_run_itself(small, tmp_path, monkeypatch, capsys):
    """Kills: shards that nobody looked at before the GPUs start; a damaged one without its remedy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(doctor, "packages", lambda gpus: [])
    assert main(["doctor", "--json", *small]) == 0
    assert "40 steps of 256 tokens" in json.loads(capsys.readouterr().out)["plan"]
    write_shard(tmp_path / "train_1.bin", range(2000), count=1999)
    assert main(["doctor", *small, "train_files=train_*.bin"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "FOUND: train_1.bin holds 2000 tokens, its header says 1999",
        "  why it matters: the run would end before its first step",
        "  mend: delete it and make it again with the program in data/"]
