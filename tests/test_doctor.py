"""What the doctor finds, on machines that stubs stand for, and on this one."""

import itertools
import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, start, train, write_shard

import rules
import train_gpt
from aurora import RESULT_17
from bench import most_memory
from harness import doctor
from train_gpt import Hyperparameters

FIELDS = "index, uuid, driver_version, mig.mode.current, name, compute_cap, memory.total, memory.used"
NODE = "".join(f"{index}, GPU-{index}a7e, 580.65.06, Disabled, NVIDIA H100 80GB HBM3, 9.0, 81559, 4\n"
               for index in range(8))
HEALTHY = NODE[:len(NODE) // 4]
SMALL = "0, GPU-3090, 580.65.06, [N/A], NVIDIA GeForce RTX 3090, 8.6, 24576, 20\n"
RECORD = dict(batch_tokens=524288, sequence_length=1024, micro_batch=64, vocab_size=50304, num_layers=12, model_dim=768,
              mlp_dim=3072, activation="relu2", matrix_update=RESULT_17, train_steps=3200, trials=1, checkpoints=0,
              download="",  # as the trainer's defaults; of the banks, see test_what_the_default_banks_keep
              banks=[doctor.Kept(12, 3072 * 768, 8 * 3072 * 768, 22 * 3072 * 768),
                     doctor.Kept(12, 3072 * 768, 8 * 3072 * 768, 22 * 3072 * 768),
                     doctor.Kept(48, 768 * 768, 8 * 768 * 768, 20 * 768 * 768), doctor.Kept(50304 * 768, 1, 12, 0),
                     doctor.Kept(50304 * 768, 1, 6, 0), doctor.Kept(153216, 1, 12, 0)])
SOAP = ("nesterov(0.95) | soap(0.9, 0.9) | schatten4_polar | aspect | brake(0.5) | row_floor(0.3825) | step | pin"
        " | cautious_decay(0.025)")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the pinned packages, in whose nvidia-smi a test can write: the rows of FIELDS, of which it shows
    those asked for, and what it says to -L and -q. The dry run is a stub."""
    pinned = doctor.pins((ROOT / "requirements.txt").read_text())
    monkeypatch.setattr(doctor, "version", pinned.get)
    monkeypatch.setattr(doctor, "cuda_of_torch", lambda: pinned.get("CUDA", "13.0"))
    monkeypatch.setattr(doctor, "dry_run", lambda words, world: (
        RECORD, f"162,354,816 parameters, {words} in {world} processes", []))
    for name in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "MASTER_PORT", "TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def smi(rows, code=0, listing="", details=""):
        (tmp_path / "nvidia-smi").write_text(f"""#!/bin/sh
case $1 in
    -L) cat <<'END'
{listing}END
    ;;
    -q) cat <<'END'
{details}END
    ;;
    *) awk -F ', ' -v fields='{FIELDS}' -v asked="${{1#*=}}" '
        BEGIN {{ split(fields, name); for (i in name) at[name[i]] = i; n = split(asked, wanted, ",") }}
        NF == 1 {{ print }}
        NF > 1 {{ for (i = 1; i <= n; i++) printf "%s%s", $at[wanted[i]], i < n ? ", " : "\\n" }}' <<'END'
{rows}END
esac
exit {code}
""")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return pinned
    return smi


def found() -> list[str]:
    return [finding["what"] for finding in doctor.doctor([])["findings"]]


def test_a_healthy_machine(machine, capsys):
    """Kills: a finding on a machine that has none; the tiny recipe where there are GPUs; a world of one process."""
    machine(HEALTHY)
    assert doctor.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(", 2 x NVIDIA H100 80GB HBM3")
    assert said[1].endswith(" parameters, [] in 2 processes") and said[2] == "a checkpoint: 1.38 GB"
    assert said[4:] == ["nothing found: it can start"]


def test_gpus_that_are_hidden(machine, monkeypatch):
    """Kills: a plan for GPUs that the run would not see."""
    machine(HEALTHY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert doctor.doctor([])["plan"].splitlines()[0].endswith(", [] in 1 processes")
    machine("Failed to initialize NVML: Unknown Error\n", 255)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ", ['@tiny'] in 1 processes\n" in doctor.doctor([])["plan"] and not found()


def test_visible_devices(monkeypatch):
    """Kills: numbers with blanks, UUIDs or beginnings of them that are not known; words after one that CUDA does not
    find; a GPU that is named twice. PyTorch's own reading is the oracle, of all lists of up to three words in which
    "GPU-", which fits every GPU, is the last or none: it looks for words that stand there twice beyond that one."""
    uuids = ["GPU-0a7e", "GPU-1a7e", "GPU-2a7e"]
    words = "0", " 1", "2 ", "-1", "7", "", "1x", "x", "GPU-1a7e", "GPU-2a", "GPU-0", "GPU-"
    for listed in (listed for count in (1, 2, 3) for listed in itertools.product(words, repeat=count)):
        if "GPU-" not in listed[:-1]:
            asked = ",".join(listed)
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
            theirs = torch.cuda._parse_visible_devices()
            if theirs and isinstance(theirs[0], str):
                theirs = torch.cuda._transform_uuid_to_ordinals(theirs, uuids)
            assert doctor.visible(asked, uuids) == list(itertools.takewhile(lambda i: i < 3, theirs)), asked
    assert doctor.visible(None, uuids) == [0, 1, 2]


LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a7e)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1a7e)
  MIG 3g.40gb     Device  0: (UUID: MIG-77c1)
  MIG 3g.40gb     Device  1: (UUID: MIG-77d2)
"""


@pytest.mark.parametrize("asked, gpus, what", [
    ("1", [1], None), (" 1, 0", [1, 0], None), ("GPU-1a7e", [1], None), ("GPU-1,GPU-0a", [1, 0], None),
    ("MIG-77d2", [1], None), ("-1", [], None), ("1,-1,0", [1], None),
    ("0,2", [0], "CUDA_VISIBLE_DEVICES=0,2: of 2 named a program sees 1"),
    ("0,0", [], "CUDA_VISIBLE_DEVICES=0,0: of 2 named a program sees 0"),
    ("GPU-f", [], "CUDA_VISIBLE_DEVICES=GPU-f: of 1 named a program sees 0"),
])
def test_gpus_that_are_named(asked, gpus, what, machine, monkeypatch):
    """Kills: the tiny recipe for GPUs named in another way than by bare numbers; a name that fits none and is passed
    over without a word."""
    machine(HEALTHY, listing=LISTING)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    result = doctor.doctor([])
    assert [gpu["index"] for gpu in result["gpus"]] == gpus
    assert [f["what"] for f in result["findings"]] == ([what] if what else [])
    assert result["verdict"] == (what is None or gpus != [])


@pytest.mark.parametrize("old, new", [
    ("81559, 4", "[N/A], [N/A]"), ("81559, 4", "81559, [Insufficient Permissions]"),
    ("81559, 4", "[Not Supported], [Not Supported]"), ("9.0, 81559, 4", "[N/A], [N/A], [N/A]"),
    ("Disabled", "Enabled")])
def test_memory_that_is_not_told(old, new, machine):
    """Kills: a ValueError; a micro-batch that is judged by a memory that nobody told, or by that of the whole GPU where
    a program gets a part; a GPU that tells of its memory and is judged no more."""
    machine(HEALTHY.replace(old, new))
    result = doctor.doctor([])
    assert [f["what"] for f in result["findings"]] == ["GPU 0, 1: memory not told by nvidia-smi"] and result["verdict"]
    assert [gpu["total"] for gpu in result["gpus"]] == [None, None]
    if new == "Enabled":
        assert "no step of this run was published for NVIDIA H100 80GB HBM3 MIG" in result["plan"]
    first, second = HEALTHY.splitlines(keepends=True)
    machine(first.replace(old, new) + second.replace(", 4\n", ", 65000\n"))
    assert "GPU 0: memory not told by nvidia-smi" in found() and "GPU 1: 63.5 of 79.6 GiB are in use" in found()
    assert any(what.startswith("16.2 GiB of a GPU are free") for what in found())


@pytest.mark.parametrize("rows, code, version, what", [
    (HEALTHY.replace(", 4\n", ", 40000\n", 1), 0, None, "GPU 0: 39.1 of 79.6 GiB are in use"),
    ("Failed to initialize NVML: Driver/library version mismatch\n", 18, None,
     "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"),
    (HEALTHY.replace("9.0", "8.0"), 0, "2.10.0", "torch 2.10.0 with NVIDIA H100 80GB HBM3 (sm_80)"),
    (HEALTHY.replace("9.0", "8.6"), 0, "2.10.1+cu129", "torch 2.10.1+cu129 with NVIDIA H100 80GB HBM3 (sm_86)"),
    (HEALTHY, 0, "2.12.0", "torch 2.12.0, pinned is 2.13.0"),
])
def test_what_is_wrong_with_a_machine(rows, code, version, what, machine):
    """Kills: a GPU that is taken, a driver that is broken, a package that is another, each of which is passed over."""
    pinned = machine(rows, code)
    if version:
        pinned["torch"] = version
    assert what in found()


def test_a_torch_without_cuda(machine):
    """Kills: a build for the CPU, whatever its version says, beside GPUs; one that bothers a machine without them."""
    machine(HEALTHY)["CUDA"] = None
    assert found() == ["torch 2.13.0 was built without CUDA"]
    machine("")
    assert found() == []


DRIVER_570 = HEALTHY.replace("580.65.06", "570.124.06")


@pytest.mark.parametrize("rows, cuda, details, mend", [
    (HEALTHY, "13.0", "", None), (DRIVER_570, "12.6", "", None), (HEALTHY, "14.1", "", None),
    (HEALTHY.replace("580.65.06", "[N/A]"), "13.0", "", None),
    (DRIVER_570, "13.0", "Driver Version : 570.124.06\nCUDA Version   : 13.0\n", None),
    (DRIVER_570, "13.0", "Driver Version : 570.124.06\nCUDA Version   : 12.8\n",
     "update the driver to 580 or newer, or install a build of torch for CUDA 12, which this one runs"),
    (HEALTHY.replace("580.65.06", "470.82.01"), "12.9", "",
     "update the driver to 525 or newer, or install a build of torch for CUDA 11, which this one runs"),
    (HEALTHY.replace("580.65.06", "390.157"), "11.8", "", "update the driver to 450 or newer"),
])
def test_the_driver_that_torch_needs(rows, cuda, details, mend, machine):
    """Kills: a driver that is too old and named by nobody before every rank ends with a traceback; a newer one, or an
    older one with NVIDIA's compatibility package, that is refused."""
    machine(rows, details=details)["CUDA"] = cuda
    findings = doctor.doctor([])["findings"]
    assert [f["what"] for f in findings] == ([] if mend is None else [
        f"driver {rows.split(', ')[2]} with a torch that is built for CUDA {cuda}"])
    assert all(f["ends"] and f["mend"].split(" (")[0] == mend for f in findings)


def test_what_this_torch_was_built_for():
    """Kills: a version that is read where there is none, or from another line of torch/version.py."""
    assert doctor.cuda_of_torch() == torch.version.cuda


@pytest.mark.parametrize("name", ["TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"])
def test_a_wait_that_hangs(name, machine, monkeypatch):
    """Kills: a variable under which a CUDA graph may wait for ever, told of by nobody; a warning where it is off or
    where there is no GPU; one that ends the run."""
    machine(HEALTHY)
    monkeypatch.setenv(name, "0")
    assert found() == []
    monkeypatch.setenv(name, "1")
    (finding,) = doctor.doctor([])["findings"]
    assert (finding["what"], finding["mend"], finding["ends"]) == (f"{name}=1", f"unset {name}", False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert found() == []


@pytest.mark.parametrize("version, capability", [("2.10.0", "9.0"), ("2.11.0", "8.0")])
def test_what_is_known_to_be_well(version, capability, machine):
    """Kills: a warning for every version, or for every GPU."""
    machine(HEALTHY.replace("9.0", capability))["torch"] = version
    assert found() == [f"torch {version}, pinned is 2.13.0"]


def test_a_missing_package_and_its_remedy(machine, capsys):
    """Kills: a finding without a reason or a command; code 0 over one that ends the run, 1 over one that does not."""
    machine(HEALTHY)["tqdm"] = "0.1"
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.splitlines()[4] == "WARNING: tqdm 0.1, pinned is 4.70.1"
    del machine(HEALTHY)["tqdm"]
    assert doctor.main([]) == 1
    said = capsys.readouterr().out.splitlines()[4:]
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
    assert doctor.disk(tmp_path, 0) == [] and sorted(os.listdir(tmp_path)) == before
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**20))
    (finding,) = doctor.disk(tmp_path, 0)
    assert finding.ends and (finding.what[:14], finding.mend) == ("1 MiB are free", "make 20 MiB free")


def test_what_pads_the_banks():
    """Kills: weights and gradients counted once where shares are padded. By hand: 512 processes own a slot each of 12,
    12 and 48 matrices, 6 bytes a number, where one process has 8 a parameter; of 1024 tokens one has as many bytes."""
    alone, many = (doctor.step_bytes(RECORD, 1, True, world) for world in (1, 512))
    matrices = 24 * 3072 * 768 + 48 * 768 * 768
    rest = 2 * 50304 * 768 + 153216
    owned = {1: 8 * matrices + 18 * 50304 * 768 + 12 * 153216 + 12 * 22 * 3072 * 768,
             512: 2 * 8 * 3072 * 768 + 8 * 768 * 768 + 18 * 75456 + 12 * 300 + 22 * 3072 * 768}
    replica = {1: 8 * (matrices + rest), 512: 6 * 512 * (2 * 3072 * 768 + 768 * 768) + 2 * matrices + 8 * rest}
    assert many - alone == pytest.approx(replica[512] + owned[512] - replica[1] - owned[1], abs=6 * 512)


def test_room_for_checkpoints(machine, monkeypatch):
    """Kills: a first checkpoint that fits and a second that does not, as the one before stays until it is whole. One is
    1.38 GB, for 8 processes too: they own 16 slots where there are 12, and none of the padding is saved."""
    machine(NODE)
    monkeypatch.setitem(RECORD, "checkpoints", 250)
    for free, what in ((2.77e9, ["2642 MiB are free for"]), (2.78e9, [])):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=int(free)))
        assert [line[:len("2642 MiB are free for")] for line in found()] == what
    monkeypatch.setitem(RECORD, "checkpoints", 0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**8))
    assert found() == []


def test_what_the_default_banks_keep():
    """Kills: a master, a momentum or one of AdamW's two that is left out; fp32 for what the embedding keeps in bf16;
    an update whose tensors are counted for what they were before, for matrices without balancing, or not at all."""
    found = doctor.banks(Hyperparameters())
    for kept, expected in zip(found, RECORD["banks"], strict=True):
        assert kept[:3] == expected[:3] and kept.passing == pytest.approx(expected.passing, rel=1e-3)


def test_what_a_rule_keeps(monkeypatch):
    """Kills: a list of names of states, or of stages, in place of the rule; a state's shape taken for the weight's. By
    hand: each of SOAP's sides keeps a covariance and a basis, the weight two moments and a master. Another stage is
    counted as soon as a rule can name it."""
    m, n = 3072, 768
    found = doctor.banks(Hyperparameters(matrix_update=SOAP))
    assert [kept.bytes for kept in found[:3]] == [4 * (3 * m * n + 2 * (m * m + n * n))] * 2 + [4 * 7 * n * n]
    assert found[3:] == RECORD["banks"][3:]
    head = doctor.banks(Hyperparameters(head_update="eigen_adam | step"))[3]  # a master, moments, covariance and basis
    assert (head.slots, head.bytes) == (8, 4 * (3 * 50304 // 8 * n + 2 * n * n)) and head.passing > 0
    monkeypatch.setattr(rules, "STAGES", dict(rules.STAGES))

    @rules.stage("remember", three_rows=lambda W: (*W.shape[:-2], 3, W.size(-1)))
    def remember(U, three_rows):
        return U, three_rows
    fc, proj, square = doctor.banks(Hyperparameters(matrix_update="nesterov | remember | step"))[:3]
    assert [kept.bytes for kept in (fc, proj, square)] == [8 * m * n + 12 * n, 8 * m * n + 12 * m, 8 * n * n + 12 * n]


@pytest.mark.parametrize("shape", [(4, 128, 64), (4, 64, 128), (4, 96, 96)])
@pytest.mark.parametrize("text", [RESULT_17, SOAP, "nesterov | step"])
def test_what_passes_in_an_update(text, shape):
    """Kills: what is freed taken for what exists; states and weights counted once more; a second part that is left out.
    PyTorch's profiler sees the same update run. On meta tensors Newton-Schulz may need half a stack less."""
    rule, W, meta = rules.Rule.of(text), torch.randn(shape), torch.empty(shape, device="meta")
    state, knobs = rule.state(W), dict(lr=0.1, t=torch.ones(()))
    ran = (most_memory(lambda: rules.advance_(rule, W, torch.randn(shape), state, knobs)) - W.nbytes
           + most_memory(lambda: rule.after_(state, 1)))
    bank = SimpleNamespace(masters=meta, gradients=meta.clone(), state=rule.state(meta), rule=rule, knobs=knobs)
    assert ran - 0.6 * W.nbytes < doctor.passing(bank) < 1.01 * ran


@pytest.mark.parametrize("processes", [1, 2])
def test_the_checkpoint_is_as_large_as_foretold(quick, processes, tmp_path):
    """Kills: a state or a master that is not foretold; the padding that makes two processes' shares of three matrices
    equal, saved too. Beside its tensors the file has its directory and the run's words: below 40 kB."""
    words = [*quick, "num_layers=3", "model_dim=64", f"matrix_update={SOAP}"]
    words_of_run = [*words, "--checkpoint-every", "4"]
    if processes == 1:
        train(tmp_path, words_of_run)
    else:
        assert start(words_of_run, tmp_path, processes=processes).returncode == 0
    (file,) = tmp_path.glob("logs/*.checkpoint/*.pt")
    banks = doctor.banks(train_gpt.override(words))
    foretold = doctor.checkpoint_bytes(dict(banks=banks))
    assert foretold > 3e6 and 0 <= file.stat().st_size - foretold < 40e3


@pytest.mark.parametrize("rows, free, mend", [
    (NODE, None, None), (SMALL, "24.0", "micro_batch=32"), (SMALL.replace("24576", "12288"), "12.0", "micro_batch=16"),
    (NODE.replace("81559, 4\n", "81559, 65000\n", 1), "16.2", "micro_batch=32"),
    (SMALL.replace("24576", "4096"), "4.0", "use GPUs with more memory"),
    (SMALL.replace("8.6", "7.5"), "24.0", "micro_batch=16")])
def test_the_micro_batch_that_fits(rows, free, mend, machine):
    """Kills: the total memory taken for the free one; the roomiest GPU taken for all; a size that does not divide the
    batch; a warning that would end the run; a GPU without the kernels taken for one with them. By hand, for 64
    sequences: 8 bytes x 162.3M = 1.3 GB; masters and states 1.4 GB; 12 x 22 x 3072 x 768 bytes = 0.6 GB of an update;
    1024 tokens x 2 bytes x (12 layers x 9216 + 8 x 768 + 50304) = 0.342 GB a sequence; 2.1 GB: 27.3 GB or 25 GiB. One
    of 8 GPUs keeps 0.2 GB for 1.4, and needs 24. Without kernels 12288 a layer, 4 x 50304: 0.727 GB, and 48 GiB."""
    machine(rows)
    findings = [f for f in doctor.doctor([])["findings"] if "micro-batch" in f["what"]]
    assert not any(f["ends"] for f in findings)
    needs = 48 if "7.5" in rows else 24 if "7, GPU" in rows else 25
    assert [f["what"] for f in findings] == ([] if free is None else [
        f"{free} GiB of a GPU are free, a micro-batch of 64 sequences may take {needs} (computed, not measured)"])
    assert not findings or findings[0]["mend"].startswith(mend)


def test_what_does_not_fit_is_told_before_its_data_are_there(machine, monkeypatch):
    """Kills: a micro-batch that is judged after 206 GB were fetched; a process that the batch has no sequence for."""
    machine(SMALL)
    monkeypatch.setattr(doctor, "dry_run", lambda words, world: (RECORD, "", []))
    assert [what[:8] for what in found()] == ["24.0 GiB"] and doctor.doctor([])["plan"] == "a checkpoint: 1.38 GB"
    monkeypatch.setenv("WORLD_SIZE", "1024")
    assert found() == []


@pytest.mark.parametrize("rows, words, says", [
    (NODE, [], "time: 8 minutes of steps, 2.80 at 2.5 a GPU-hour; after the 157 ms a step on 8 x H100"),
    (HEALTHY, [], "time: 34 minutes of steps, 2.80 at 2.5 a GPU-hour; after the 157 ms a step on 8 x H100"),
    (SMALL, [], "time: no step of this run was published for NVIDIA GeForce RTX 3090"),
    (NODE, ["not a record attempt"], "time: no step of this run was published for NVIDIA H100 80GB HBM3"),
])
def test_time_and_cost(rows, words, says, machine):
    """Kills: a time for GPUs or models of which none is known; one for 8 GPUs told of 2; the price of a GPU taken for
    that of the node. 3200 steps of 157.3 ms are 503 s: 1.12 GPU-hours."""
    machine(rows)
    assert doctor.doctor(words, 2.5)["plan"].splitlines()[2].startswith(says)


def test_a_port_that_is_taken(machine, monkeypatch):
    """Kills: processes started by hand that wait for each other on a port of another program."""
    machine(HEALTHY)
    with doctor.socket.create_server(("localhost", 0)) as taken:
        number = taken.getsockname()[1]
        assert found() == []
        monkeypatch.setenv("MASTER_PORT", str(number))
        assert found() == [f"port {number} of localhost cannot be opened: Address already in use"]


def test_what_another_job_has_left(machine, monkeypatch):
    """Kills: a traceback of the doctor over a variable that the trainer then names."""
    machine(HEALTHY)
    for name, value in (("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "99999"), ("MASTER_PORT", "abc")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert doctor.doctor([])["plan"].splitlines()[0].endswith(", [] in 2 processes")


def test_options_that_another_job_has_left(machine, monkeypatch):
    """Kills: a torchrun by hand that waits for a second machine, of which the doctor has said nothing."""
    machine(HEALTHY)
    monkeypatch.setenv("PET_NNODES", "2")
    assert found() == ["PET_NNODES=2 in the environment"]


def test_the_dry_run_has_the_persons_environment(monkeypatch):
    """Kills: a PYTHONPATH of the machine's modules that the doctor drops and the run has; a variable of another job
    that the doctor writes over, and the run stumbles on."""
    monkeypatch.setattr(doctor, "PROBE", "import os, sys; print('{}', os.environ['WORLD_SIZE'], sep='\\n'); "
                                         "print(os.environ['PYTHONPATH'])")
    monkeypatch.setenv("WORLD_SIZE", "abc")
    monkeypatch.setenv("PYTHONPATH", "/modules")
    assert doctor.dry_run([], 2)[1].split() == ["abc", f"{ROOT}{os.pathsep}/modules"]


def test_a_name_and_a_folder_that_torchrun_stumbles_on(machine, monkeypatch, tmp_path):
    """Kills: "nothing found" where torchrun waits for minutes, or where two runs may write one log."""
    machine(HEALTHY)
    def fail(*_):
        raise OSError(-2, "Name or service not known")
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "nodns")
    monkeypatch.setattr(doctor.socket, "getaddrinfo", fail)
    assert found() == ["the host name nodns does not resolve: Name or service not known"]
    monkeypatch.undo()
    monkeypatch.setattr(doctor.fcntl, "flock", fail)
    (finding,) = doctor.disk(tmp_path, 0)
    assert not finding.ends and finding.what == f"{tmp_path} cannot be locked: Name or service not known"


def test_a_package_that_a_training_does_without(machine):
    """Kills: a run that ends because what only --wandb or a figure needs is missing."""
    pinned = machine(HEALTHY)
    pinned["wandb"] = None
    assert doctor.doctor([])["verdict"] and found() == ["wandb is missing, pinned is 0.31.0"]
    pinned["numpy"] = None
    assert not doctor.doctor([])["verdict"]


def test_the_run_itself(small, tmp_path, monkeypatch, capsys):
    """Kills: shards that nobody looked at before the GPUs start; a damaged one without its remedy; a size that is told
    after the data have been fetched alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(doctor, "packages", lambda gpus: [])
    assert doctor.main(["--json", *small]) == 0
    assert "40 steps of 256 tokens" in json.loads(capsys.readouterr().out)["plan"]
    assert doctor.main(["--", *small, "--trials", "0"]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "FOUND: --seed 0 --trials 0"
    assert doctor.main(["train_steps=4000"]) == 1
    assert capsys.readouterr().out.splitlines()[1::3] == ["a checkpoint: 1.38 GB",
                                                          "  mend: python data/cached_fineweb10B.py 22"]
    write_shard(tmp_path / "train_1.bin", range(2000), count=1999)
    assert doctor.main([*small, "train_files=train_*.bin"]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "FOUND: train_1.bin holds 2000 tokens, its header says 1999",
        "  why it matters: the run would end before its first step",
        "  mend: delete it and make it again with the program in data/"]
