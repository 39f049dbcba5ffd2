"""The benchmarks run, and time nothing that is wrong; bench/gpu.sh runs them all. Nothing here is timed."""

import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import bench
from bench import baseline, kernels, optimizer, step
from kernels.bf16 import linear

TINY = ["@tiny", "num_layers=2", "vocab_size=512", "batch_tokens=128", "sequence_length=32", "micro_batch=2"]
of_a_cpu = pytest.mark.skipif(kernels.GPU, reason="needs a machine without a GPU")


def table(text: str) -> list[dict[str, str]]:
    """The rows of the first table of a text."""
    lines = next(part for part in text.split("\n\n") if part.startswith("| ")).splitlines()
    head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [dict(zip(head, row)) for row in rows]


@pytest.fixture(autouse=True)
def no_process_group_stays():
    yield
    if dist.is_initialized():  # a program that ended early
        dist.destroy_process_group()


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
    """Kills: a bench that does not run, a rule that is lost or taken for a hyperparameter, a number of a GPU that
    nothing measured."""
    optimizer.main([*TINY, "muon", "normuon", "nesterov | floor(target=0.3) | step", "-o", str(tmp_path)])
    text = (tmp_path / "optimizer.md").read_text()
    rows = table(text)
    assert [row["optimizer"] for row in rows] == ["muon", "normuon", r"nesterov \| floor(target=0.3) \| step", "aurora",
                                                   optimizer.UNFUSED]
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


@of_a_cpu
def test_step_on_a_cpu(tmp_path):
    """Kills: a published form that computes something else, a bench that does not run, a number of a GPU that nothing
    measured, shares that are not of the whole."""
    step.main([*TINY, "-o", str(tmp_path)])
    text = (tmp_path / "step.md").read_text()
    rows = table(text)
    assert [row["program"] for row in rows] == [step.OURS, step.PUBLISHED]
    for row in rows:
        # a column has four digits or, where a slow machine trains few tokens a second, whole numbers
        assert float(row["tokens/s"]) == pytest.approx(128 / (float(row["step, ms"]) / 1000), rel=2e-3, abs=0.5)
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
