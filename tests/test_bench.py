"""What bench/ counts and predicts, and that its programs run. Nothing here is timed."""

import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import bench
import train_gpt
from bench import baseline, kernels, optimizer, roofline, step
from kernels.bf16 import linear
from kernels.cross_entropy import head_loss_reference

RECORD = train_gpt.Hyperparameters()
TINY = ["@tiny", "num_layers=2", "vocab_size=512", "batch_tokens=128", "sequence_length=32", "micro_batch=2"]
of_a_cpu = pytest.mark.skipif(kernels.GPU, reason="needs a machine without a GPU")


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table of a text."""
    lines = next(part for part in text.split("\n\n") if part.startswith("| ")).splitlines()
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(head, row)) for row in rows]


@pytest.fixture(autouse=True)
def no_process_group_stays():
    yield
    if dist.is_initialized():  # a program that ended early
        dist.destroy_process_group()


@pytest.mark.parametrize("words", [[], ["model_dim=256", "num_layers=3", "mlp_expansion=2.5", "activation=swiglu",
                                        "sequence_length=256", "batch_tokens=8192", "micro_batch=8"]])
def test_flops_of_the_model(words):
    """Kills: a product that is missing or counted twice, an attention that is not causal, a form whose work differs.

    PyTorch counts the products that the real model runs, on no device. It runs attention as products of whole
    squares: 2 forward and 4 backward, where a fused kernel does half of each, and the first again.
    """
    hp = train_gpt.override(words)
    with torch.device("meta"):
        model = train_gpt.GPT(hp)
        inputs = torch.zeros(hp.micro_batch, hp.sequence_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        x = model.activations(inputs)
        head_loss_reference(x.flatten(0, 1), model.head.weight, model.head.bias, inputs.flatten()).backward()
    counted = counter.get_flop_counts()["Global"]
    times = hp.batch_tokens // hp.sequence_length // hp.micro_batch
    found = roofline.flops(hp)
    assert found["products"] == times * (counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm])
    assert found["attention"] == pytest.approx(times * counted[torch.ops.aten.bmm] * 7 / 12, rel=1e-12)
    fused, published = (roofline.model_kernels(hp, 8, form) for form in ("fused", "published"))
    assert len(published["products"]) - len(fused["products"]) == 6 * hp.num_layers  # q, k and v are one
    assert (sum(k.count * k.flops for part in fused.values() for k in part)
            == sum(k.count * k.flops for part in published.values() for k in part))


def test_flops_of_the_record():
    """Kills: another number of iterations, one polar factor of the MLP's matrices where Aurora takes two."""
    found = roofline.flops(RECORD)
    g = 2 * 768**3  # an iteration of a square matrix is 3 g, of one four times as wide 4 g + g + 4 g
    assert found["Newton-Schulz"] == 12 * (48 * 3 * g + 2 * 24 * 9 * g)
    assert roofline.flops(replace(RECORD, direction="muon"))["Newton-Schulz"] == 12 * (48 * 3 * g + 24 * 9 * g)
    assert found["products"] + found["attention"] == pytest.approx(423.3e12, abs=0.05e12)


def test_newton_schulz_as_it_runs():
    """Kills: kernels of one form that do not add up, a triangle of tiles that is not (t + 1) / 2t of the square."""
    for form, (gram, power) in {"published": (1, 1), "fused": (21 / 36, 21 / 36)}.items():
        for m, n in ((768, 768), (3072, 768)):
            kernels = roofline.polar_kernels(3, m, n, form)
            small, large = 768, max(m, n)
            expected = 3 * 12 * (gram * 2 * small**2 * large + power * 2 * small**3 + 2 * small**2 * large)
            assert sum(k.count * k.flops for k in kernels) == pytest.approx(expected)


def test_bytes_on_the_wire():
    """Kills: a bank that is left out, bf16 gradients, fp32 weights, padding where the GPUs divide a bank."""
    matrices, rows = 48 * 768 * 768 + 24 * 768 * 3072, 50304 * 768
    vectors = 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 2 * 768 + 50304
    reduced, gathered = roofline.wire(RECORD, 8)
    assert reduced == pytest.approx(7 / 8 * 4 * (matrices + 2 * rows + vectors), rel=1e-6)  # of vectors 1 is padded
    assert gathered == reduced / 2
    # the published 500 MB are those of a program whose embedding's gradient is bf16
    assert (reduced - 7 / 8 * 2 * rows) / 1e6 == pytest.approx(500, abs=1)
    assert gathered / 1e6 == pytest.approx(284, abs=1)
    assert roofline.wire(RECORD, 1) == (0, 0)
    mlp = next(bank for bank in roofline.banks(RECORD) if bank.name == "MLP")
    assert [mlp.share(gpus) for gpus in (8, 16, 64)] == [3, 2, 1]


def test_a_collective_by_hand():
    """Kills: trips, hops or bandwidth of one network used for the other, a protocol's columns mixed up."""
    gpu = roofline.GPUS["H100"]
    assert roofline.collective(1, 1, 1e9, gpu) == 0
    assert roofline.collective(8, 1, 1, gpu) == pytest.approx((3.6 + 7 * 0.47) * 1e-6, rel=1e-5)
    assert roofline.collective(8, 1, 8e12, gpu) == pytest.approx(7e12 / 370e9, rel=1e-3)
    assert roofline.collective(8, 1, 8e12, gpu, trips=2) == pytest.approx(14e12 / 370e9, rel=1e-3)
    assert roofline.collective(16, 2, 1, gpu) == pytest.approx((3.6 + 14 * 0.47 + 2.7) * 1e-6, rel=1e-5)
    assert roofline.collective(2, 2, 2e12, gpu) == pytest.approx(1e12 / 50e9, rel=1e-3)


def test_what_must_not_fall_or_rise():
    """Kills: a constant used upside down, work that is not divided, an update or a wire that shrinks by magic."""
    parts = {n: roofline.breakdown(RECORD, "H100", n) for n in roofline.counts(RECORD)}
    assert list(parts) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    for fewer, more in pairwise(parts.values()):
        for name in ("products", "elementwise", "attention", "softcap and loss", "updates"):
            assert fewer[name] / 2 * (1 - 1e-12) <= more[name] <= fewer[name] * (1 + 1e-12)
    for fewer, more in pairwise(roofline.counts(RECORD)):
        assert roofline.wire(RECORD, fewer)[0] < roofline.wire(RECORD, more)[0]
        assert (roofline.predict(RECORD, "A100", fewer) > roofline.predict(RECORD, "H100", fewer)
                > roofline.predict(RECORD, "H200", fewer) > roofline.predict(RECORD, "B200", fewer))
        assert roofline.predict(RECORD, "H100", fewer) < roofline.predict(RECORD, "H100", fewer, form="published")
    base = roofline.predict(RECORD, "H100", 8)
    for change in (dict(num_layers=13), dict(model_dim=896), dict(mlp_expansion=5.0), dict(vocab_size=60000)):
        assert roofline.predict(replace(RECORD, **change), "H100", 8) > base
    assert roofline.predict(RECORD, "H100", 8, attention="FA2") > base
    assert roofline.predict(replace(RECORD, direction="muon"), "H100", 8) < base
    # a byte more slowly: two nodes of 4 where one of 8 would do
    assert roofline.predict(RECORD, "H100", 8, nodes=2) > base
    with pytest.raises(ValueError, match="3 GPUs in 1 nodes"):
        roofline.predict(RECORD, "H100", 3)


def test_updates_and_wire_overlap(monkeypatch):
    """Kills: an update before its gradient is there, an all-gather before its update, one that overtakes another."""
    two = roofline.banks(RECORD)[:2]
    monkeypatch.setattr(roofline, "banks", lambda hp: two)
    # with updates of 10 s: gradients at 3 and 4, updates until 13 and 23, gathers from 13 to 18 and from 23 to 25;
    # with updates of .5 s: at 3.5 and 4.5 they are done, the wire is free at 4, gathers from 4 to 9 and 11
    for update, expected in ((10.0, (20.0, 25.0)), (0.5, (1.0, 11.0))):
        travel = iter((3.0, 1.0, 5.0, 2.0))  # in the order of the queue
        monkeypatch.setattr(roofline, "collective", lambda gpus, nodes, size, gpu: next(travel))
        monkeypatch.setattr(roofline, "seconds", lambda kernels, gpu, attention, launch: update)
        assert roofline.sharded_step(RECORD, 8, 1, roofline.GPUS["H100"]) == expected


def test_published_times():
    """Kills: a model that misses what is published. Held-out lines of the same program on 8 GPUs are within 3%; the
    others did more than is modelled, or on a card whose constants are assumed."""
    rows = roofline.check()
    off = {(row["published program"], row["GPUs"]): abs(float(row["off by"][:-1])) for row in rows}
    assert [row["use"] for row in rows].count("held out") == 7 and rows[0]["use"] == "calibration"
    assert rows[0]["predicted, ms"] == pytest.approx(rows[0]["published, ms"], rel=2e-3)  # SUSTAINED has three digits
    for (program, gpus), percent in off.items():
        assert percent < (10 if "taken as" in program else 3), (program, gpus)


def test_roofline_prints(tmp_path, capsys):
    """Kills: a program that does not run, a table that does not say what it is, an override that is lost."""
    roofline.main(["B200", "num_layers=6", "-o", str(tmp_path)])
    text = (tmp_path / "roofline.md").read_text()
    assert text == capsys.readouterr().out
    assert text.startswith("# python -m bench.roofline B200 num_layers=6\n") and "Predicted, not measured" in text
    assert f"{roofline.predict(replace(RECORD, num_layers=6), 'B200', 1):.4g}" in text.split("B200: half")[1]


def test_provenance(monkeypatch):
    """Kills: a line without commit, driver or a version, or of several lines; changes that are not told of."""
    line = bench.provenance()
    assert "\n" not in line and f"torch {torch.__version__}" in line and train_gpt.processor() in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card X")
    said = {"--query-gpu=driver_version": "570.1", "describe": "abc123", "status": ""}
    monkeypatch.setattr(train_gpt, "output_of", lambda *command: next(said[word] for word in command if word in said))
    assert bench.provenance().startswith("Card X, driver 570.1, ") and bench.provenance().endswith("commit abc123")
    said["status"] = " M train_gpt.py"
    assert bench.provenance().endswith("commit abc123-dirty")


def test_a_commit_that_nobody_knows(monkeypatch):
    """Kills: a crash, or an empty word, where git is not installed or the sources are no checkout."""
    monkeypatch.setattr(train_gpt, "output_of", lambda *command: "")
    assert bench.provenance().endswith("commit unknown")


def test_markdown():
    """Kills: a column that is not aligned as its kind, a bar in a head that breaks the table."""
    assert bench.markdown([{"a|b": "x", "n": 1.23456}, {"a|b": "y", "n": 20000}]) == (
        "| a\\|b | n |\n| --- | ---: |\n| x | 1.235 |\n| y | 20000 |")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """bench.kernels as a GPU would run it, at the sizes of a CPU: the kernels interpreted, in fp16, events that tell 1,
    2, 3 ... ms, nothing compiled."""
    event = iter(range(1, 10**6))
    sizes = kernels.stacks()[:1]
    monkeypatch.setattr(kernels, "stacks", lambda: sizes)
    for name, value in dict(GPU=True, ROUNDS=3, WARM_UP=1, compiled=lambda f: f, launches=lambda call: 7,
                            clocks=lambda: "1 MHz", peer=lambda package, module: None).items():
        monkeypatch.setattr(kernels, name, value)
    stack = kernels.stack
    monkeypatch.setattr(kernels, "stack", lambda K, M, N: stack(K, M, N).half())
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: SimpleNamespace(
        record=lambda: None, elapsed_time=lambda end: float(next(event))))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")


def test_only_the_call_is_timed(as_on_a_gpu, monkeypatch):
    """Kills: a pause or a warm-up call within what is timed, one path's time under another's name."""
    clock = 0

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock

        def elapsed_time(self, end):
            return end.at - self.at

    def spend(ms):
        nonlocal clock
        clock += ms
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: spend(1000))
    calls, spent = [], {"a": iter([50, 1, 3, 2]), "b": iter([60, 10, 30, 20])}  # the first warms up
    work = {name: lambda name=name: (calls.append(name), spend(next(spent[name]))) for name in spent}
    assert kernels.timed(work) == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert "".join(calls) == "ab" * 4


@pytest.mark.skipif(kernels.GPU, reason="needs a machine without a GPU, as it stands in for one")
def test_lines_as_on_a_gpu(as_on_a_gpu, tmp_path):
    """Kills: a Triton product called with wrong operands or arguments, a path that is left out, the wrong winner."""
    kernels.main(["lines", "-o", str(tmp_path)])
    text = (tmp_path / "kernels.md").read_text()
    found = table(text)
    assert [(row["kernel"], row["path"]) for row in found] == [
        (line, path) for line in ("X X^T", "a X + B X", "b A + c A A")
        for path in ("torch.compile", "Triton", "cuBLAS")]
    # three rounds of three paths each: 1 to 3 ms are torch.compile's, 4 to 6 Triton's, 7 to 9 cuBLAS's, and so on
    assert [float(row["GPU, ms"]) for row in found] == [2 + 3 * i for i in range(9)]
    assert all(row["CPU, ms"] == "not measured" and row["launches"] == "7" for row in found)
    assert all(float(row["of the reference's"]) <= 2 and 0 < float(row["error"]) < 1e-3 for row in found)
    # so small that the launch is what it costs
    assert all(float(row["budget, ms"]) == 1000 * roofline.LAUNCH["fused"] for row in found)
    assert "X X^T: Triton by 1.60 at 6x64x64" in text and "a X + B X: Triton by 1.21" in text


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    """Kills: a check that cannot fail: here a product that is 1% too long, in one output of two."""
    exact = torch.randn(8, 8, dtype=torch.float64)
    contest = kernels.Contest("X", "8", lambda small: (exact.float().bfloat16(),), lambda x: (exact, exact),
                              lambda x: (x, x), {"ours": lambda x: (x, (1.01 * x.float()).bfloat16())}, [])
    with pytest.raises(ValueError, match="X 8, ours: off by"):
        kernels.errors(contest)
    assert kernels.errors(contest._replace(paths={"ours": lambda x: (x, x), "Triton": None}))["ours"][1] == 1


def test_kernels_on_a_cpu(tmp_path, monkeypatch):
    """Kills: a program that does not run without a GPU, or that names a time there which nothing measured."""
    for name, value in dict(ROUNDS=2, WARM_UP=1, compiled=lambda f: f).items():
        monkeypatch.setattr(kernels, name, value)
    kernels.main(["newton-schulz", "head", "mlp", "-o", str(tmp_path)])
    text = (tmp_path / "kernels.md").read_text()
    measured = "CPU, ms" if not kernels.GPU else "GPU, ms"
    for row in table(text):
        assert float(row[measured]) > 0 and float(row["of the reference's"]) <= 2
        assert {row["CPU, ms"], row["GPU, ms"]} == {row[measured], "not measured"}
        assert (float(row["of the logits"]) > 1) if row["kernel"].startswith("head") else row["of the logits"] == ""
    with pytest.raises(ValueError, match="'heads' is not one of lines, newton-schulz, head, mlp"):
        kernels.main(["heads"])


########################################
#          Optimizer and step          #
########################################

@of_a_cpu
def test_most_memory():
    """Kills: memory that is summed but not given back, or of which only the last is seen."""
    def work():
        a = torch.empty(2**20, dtype=torch.uint8)
        b = torch.empty(2**20, dtype=torch.uint8)
        del a
        return b, torch.empty(2**18, dtype=torch.uint8)
    assert bench.most_memory(work) == 2**21


def test_in_turn(monkeypatch):
    """Kills: one program's time under another's name, programs that do not take turns, seconds for milliseconds."""
    clock, calls = iter(range(100)), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) ** 2)
    assert bench.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 2) == {
        "a": [1000, 9000], "b": [5000, 13000]}
    assert calls == list("abab")


@of_a_cpu
def test_optimizer_on_a_cpu(tmp_path):
    """Kills: a bench that does not run, a direction that is lost, a number of a GPU that nothing measured."""
    optimizer.main([*TINY, "muon", "normuon", "-o", str(tmp_path)])
    text = (tmp_path / "optimizer.md").read_text()
    rows = table(text)
    assert [row["optimizer"] for row in rows] == ["muon", "normuon", "aurora", optimizer.UNFUSED]
    assert all(float(row["ms"]) > 0 < float(row["memory, MB"]) and row["launches"] == "not measured" for row in rows)
    assert "(aim: 2; m" in text


@pytest.mark.parametrize("name", ["head.weight", "blocks.1.mlp.fc.weight", "blocks.0.attn.qkv.weight"])
def test_another_optimizer_is_not_timed(name, tmp_path, monkeypatch):
    """Kills: a check of the two optimizers that cannot fail, or that looks at some of the weights."""
    published = optimizer.published

    def other(hp, gradients, place):
        return published(hp, gradients | {name: gradients[name].flip(0)}, place)
    monkeypatch.setattr(optimizer, "published", other)
    with pytest.raises(ValueError, match=name.replace("qkv", "[qkv]")):
        optimizer.main([*TINY, "matrix_lr=0.01", "-o", str(tmp_path)])  # steps that are short, beside the weights
    assert not list(tmp_path.iterdir())


def test_launches(monkeypatch):
    """Kills: kernels of a replayed graph counted as launches, an annotation or an operator counted as either."""
    def event(name, gpu=False, annotation=False):
        return SimpleNamespace(name=name, device_type=DeviceType.CUDA if gpu else DeviceType.CPU,
                               is_user_annotation=annotation)
    events = [event("aten::add"), event("cudaGraphLaunch"), event("cuLaunchKernelEx"), event("cudaMemcpyAsync"),
              event("cudaStreamSynchronize"), event("Optimizer.step", True, True)] + [event("a_kernel", True)] * 5

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *error):
            pass
    monkeypatch.setattr(optimizer, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert optimizer.launched(lambda: None) == {"kernels": 5, "launches": 3, "CUDA graphs": 1}


@of_a_cpu
def test_step_on_a_cpu(tmp_path):
    """Kills: a published form that computes something else, a bench that does not run, a number of a GPU that nothing
    measured, shares that are not of the whole."""
    step.main([*TINY, "-o", str(tmp_path)])
    text = (tmp_path / "step.md").read_text()
    rows = table(text)
    assert [row["program"] for row in rows] == [step.OURS, step.PUBLISHED]
    for row in rows:
        # a column has four digits
        assert float(row["tokens/s"]) == pytest.approx(128 / (float(row["step, ms"]) / 1000), rel=2e-3)
        assert row["utilisation"] == "not measured" and row["predicted, ms"] == "none"
    assert "(aim on a GPU: 1.5; not measured)" in text and "None" not in text
    for part in text.split("\n## ")[1:]:
        for name in (step.OURS, step.PUBLISHED):
            assert sum(float(row[f"{name}, %"]) for row in table(part)) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("mistake", ["k and v exchanged", "another rate", "a bias lost"])
def test_another_program_is_not_timed(mistake, tmp_path, monkeypatch):
    """Kills: a check of the two programs that cannot fail."""
    separate, optimizers = baseline.separate, baseline.unfused_optimizers

    def exchanged(values):
        names = {"k": "v", "v": "k"}
        return {re.sub(r"\.([kv])\.", lambda match: f".{names[match[1]]}.", name): value
                for name, value in separate(values).items()}
    monkeypatch.setattr(*{
        "k and v exchanged": (baseline, "separate", exchanged),
        "another rate": (baseline, "unfused_optimizers", lambda ps, hp: optimizers(ps, replace(hp, head_lr=1 / 250))),
        "a bias lost": (baseline.MLP, "forward",
                        lambda mlp, x: linear(mlp.fc(x).relu().square(), mlp.proj.weight, 0 * mlp.proj.bias)),
    }[mistake])
    with pytest.raises(ValueError, match="the two programs are not the same"):
        step.main([*TINY, "-o", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_losses_are_compared():
    """Kills: a first loss, which rounding hardly reaches, judged like the later ones, or one that is not judged."""
    assert step.compare([10.0, 5.0], [10.0005, 5.005]) == pytest.approx(1e-3, rel=1e-2)
    for theirs in ([10.002, 5.0], [10.0, 5.02], [float("nan"), 5.0], [10.0, float("nan")]):
        with pytest.raises(ValueError, match="not the same"):
            step.compare([10.0, 5.0], theirs)


@of_a_cpu
def test_what_compiles_again_is_not_published(tmp_path, monkeypatch):
    """Kills: times with a compilation in them."""
    in_turn = step.in_turn

    def compiling(calls, rounds):
        counters["stats"]["unique_graphs"] += 1
        return in_turn(calls, rounds)
    monkeypatch.setattr(step, "in_turn", compiling)
    with pytest.raises(AssertionError, match="compiled again"):
        step.main([*TINY, "-o", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_parts_of_a_step(monkeypatch):
    """Kills: a part under another's name, a second bank or a second micro-batch that is not counted, time lost."""
    clock = [0.0]

    def spend(seconds):
        clock[0] += seconds

    class Model(nn.Module):
        def forward(self, x):
            spend(3)
            return x.sum()

    class Bank:
        def update(self):
            spend(7)
    model, banks, x = Model(), [Bank(), Bank()], torch.ones(2, requires_grad=True)
    x.register_hook(lambda gradient: spend(5))

    def program():
        for _ in range(2):
            model(x).backward()
        for bank in banks:
            bank.update()
        spend(1)
    monkeypatch.setattr(step.time, "perf_counter", lambda: clock[0])
    assert step.parts(step.Program(program, model, [(bank, "update") for bank in banks])) == {
        "forward": 6000, "backward": 10000, "optimizer": 14000, "gradient sums, collectives, the rest": 1000}
    assert "update" not in vars(banks[0]) and Model.__call__ is nn.Module.__call__


@pytest.mark.parametrize("name, group", [
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("loss_kernel", "Triton kernels of this project"), ("dpre_kernel", "Triton kernels of this project"),
    ("triton_poi_fused__scaled_dot_product_cudnn_attention_clone_3", "elementwise, compiled"),
    ("triton_red_fused__to_copy_mm_sum_5", "reductions, compiled"),
    ("triton_per_fused_rms_norm_2", "reductions, compiled"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<cutlass::bfloat16_t>>",
     "attention"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 64, 128, 128>(...)", "attention"),
    ("void cudnn::fusion::convert_dq_to_16bits<false, __nv_bfloat16, 128>(...)", "attention"),
    ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "GEMM"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_64x3_nt_align8>(...)", "GEMM"),
    ("Memcpy DtoD (Device -> Device)", "copies"), ("Memset (Device)", "copies"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(...)", "reductions"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(...)", "elementwise"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "elementwise"),
    ("aten::addmm", "GEMM"), ("aten::add", "elementwise"), ("autograd::engine::evaluate_function: MmBackward", "other"),
])
def test_groups_of_kernels(name, group):
    """Kills: a kernel in another's group: Inductor names kernels after operators, attention is built with cutlass."""
    assert step.group_of(name) == group


def test_the_group_of_this_projects_kernels():
    """Kills: a file of kernels/ that is left out, whose kernels are then counted as reductions or as other things."""
    names = [name for path in (ROOT / "kernels").glob("*.py")
             for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text())]
    assert len(names) >= 9 and {step.group_of(name) for name in names} == {"Triton kernels of this project"}


def test_step_as_on_a_gpu(monkeypatch):
    """Kills: another work or peak in the utilisation, the prediction of the other program, an aim judged backwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    times, memory = {step.OURS: [700.0] * 3, step.PUBLISHED: [1100.0] * 3}, {step.OURS: 6e9, step.PUBLISHED: 10e9}
    ours, published = step.rows(RECORD, times, memory)
    assert float(ours["utilisation"][:-1]) == pytest.approx(100 * 423.3 / 0.7 / 989, abs=0.06)
    assert ours["tokens/s"] == round(524288 / 0.7)
    assert ours["predicted, ms"] == roofline.predict(RECORD, "H200", 1)
    assert published["predicted, ms"] == roofline.predict(RECORD, "H200", 1, form="published")
    assert step.verdict(times, memory, {"aurora": 12.0, "muon": 4.0}) == (
        "train_gpt.py is 1.57 times as fast (aim on a GPU: 1.5; met), in 0.60 of the memory (aim: 0.5; missed). Aurora "
        "costs 1.16% of a step more than Muon (aim: 1%; missed).")


########################################
#               gpu.sh                 #
########################################

def gpu_sh(folder, **environment):
    return subprocess.run(["bash", str(folder / "bench" / "gpu.sh"), "out"], cwd=folder, text=True, capture_output=True,
                          env={"PATH": f"{folder}:/usr/bin:/bin"} | environment)


@pytest.fixture
def stub(tmp_path):
    """A folder with gpu.sh and a Python that notes what it is asked for, fails where $BAD is in it, and hangs where
    $HANGS is."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    (tmp_path / "python3").write_text(f'''#!/bin/sh
[ -z "$BAD" ] || case "$*" in *$BAD*) exit 1;; esac
[ -z "$HANGS" ] || case "$*" in *$HANGS*) exec sleep 60;; esac
case "$*" in
    *provenance*) echo Card X, commit unknown;;
    *sysconfig*) printf "/lib a\\n/lib b\\n";;
    *batches_in*) echo 180;;
    *train_gpt.py*) mkdir logs; echo step:0/180 val_loss:9.1 > logs/run.txt; echo log: logs/run.txt;;
    *verify*) echo FAIL; exit 1;;
esac
echo "$*" >> {tmp_path}/calls
''')
    (tmp_path / "python3").chmod(0o755)
    return tmp_path


def test_gpu_sh_without_a_gpu(stub):
    """Kills: a start without a GPU, more than a line about it, files left behind."""
    run = gpu_sh(stub, BAD="cuda")
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "finds no GPU; on a CPU run ./run.sh test" in run.stderr and not (stub / "out").exists()


def test_gpu_sh_without_pytest(stub):
    """Kills: a GPU that is paid for while the first stage says that there is no pytest, as where only ./run.sh ran."""
    run = gpu_sh(stub, BAD="xdist")
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "./run.sh test --version installs them" in run.stderr and not (stub / "out").exists()


def test_gpu_sh_that_cannot_write(stub):
    """Kills: stages that run for nothing, and an exit code of 0, where the summary cannot be written."""
    (stub / "out" / "gpu.md").mkdir(parents=True)
    run = gpu_sh(stub)
    assert run.returncode == 1 and "gpu.md: Is a directory" in run.stdout
    assert "bench.kernels" not in (stub / "calls").read_text()


def test_gpu_sh_and_stages_that_hang(stub):
    """Kills: a limit that a slow stage meets; a stage that hangs, and ends the others or passes."""
    timeout, real = stub / "timeout", shutil.which("timeout")
    timeout.write_text(f'''#!/bin/sh
echo $1 >> {stub}/limits
shift
case "$*" in *bench.optimizer*) exec {real} .1 "$@";; esac
exec "$@"
''')
    timeout.chmod(0o755)
    run = gpu_sh(stub, HANGS="bench.optimizer")
    assert run.returncode == 1
    assert (stub / "limits").read_text().split() == ["300", "300", "600", "600", "300", "600"]
    outcomes = re.findall("^- .*: (passed|failed)", (stub / "out" / "gpu.md").read_text(), re.MULTILINE)
    assert outcomes == ["passed", "passed", "failed", "passed", "passed", "passed"]


@pytest.mark.parametrize("bad", ["", "bench.step", "train_gpt.py"])
def test_gpu_sh(stub, bad):
    """Kills: a stage that is left out or ends the others, a failure that the exit code hides, a summary without the
    machine, times, curve or verdict, a verdict of no that is taken for a failure, results in another folder."""
    run = gpu_sh(stub, BAD=bad)
    assert run.returncode == bool(bad), run.stderr
    summary = (stub / "out" / "gpu.md").read_text()
    assert summary.startswith("# bench/gpu.sh\n\nCard X, commit unknown.\n\n- tests: passed, ")
    outcomes = [line.split(": ")[1].split(",")[0] for line in summary.splitlines() if line.startswith("- ")]
    stages = ["pytest", "bench.kernels", "bench.optimizer", "bench.step", "data/local.py", "train_gpt.py"]
    assert outcomes == ["failed" if stage == bad else "passed" for stage in stages]
    assert ("\n\nFAIL\n\nstep:0/180" in summary) == (bad != "train_gpt.py")
    calls = (stub / "calls").read_text()
    assert f"bench.kernels -o {stub}/out\n" in calls and "train_steps=180" in calls.split("bench.kernels")[1] or bad
    assert summary.splitlines()[-1] in run.stdout == (stub / "out" / "gpu.txt").read_text()
