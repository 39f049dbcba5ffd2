"""Runs bench/gpu.sh to its end without a GPU, so that its own mistakes show before an hour of one is paid.

    python -m tests.drills.rehearse_gpu

The script runs in a temporary folder of links to this project's files, with a `python` of its own in .venv, which says
that there is a GPU, has two processes of pytest in place of eight, and trains a small model for a few steps. All else
is real: every command, path, table and summary, the text in its full size, the tests in Triton's interpreter, the
benches at the size that they take on a CPU. Then it runs once more, with a mistake in the arguments of one bench: that
stage must be told of as failed, the others must run, and the exit code must be 1. The drill writes
tests/drills/results/rehearse_gpu.md, after some five minutes on two idle cores.

What it cannot tell: whether anything that runs on a GPU alone is right.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# no GPU, and one thread: two processes of tests with two threads each on two cores come near the limit of their stage
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

from results import markdown, provenance, publish  # after PyTorch has been told

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
STAGES = "tests", "kernels", "optimizer", "step", "text", "training"
TABLES = {"kernels.md", "optimizer.md", "step.md"}
SMALL = ["batch_tokens=256", "sequence_length=128", "micro_batch=2", "num_layers=2", "model_dim=64", "head_dim=32",
         "train_steps=20", "val_tokens=2048"]
PYTHON = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if any('device="cuda"' in word for word in words):
    sys.exit()
if "pytest" in words and "-n" in words:
    words[words.index("-n") + 1] = "2"
if words[0].endswith("train_gpt.py"):
    words += {SMALL}
if os.environ["PLANTED"] in words:
    words += ["no_such_rule"]
os.execv({sys.executable!r}, [{sys.executable!r}, *words])
"""


def rehearse(planted: str = "") -> tuple[list[dict], list[str]]:
    """A row for each stage, and what is wrong; `planted`: the bench that is given a mistake, if any."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name, "out")
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
        for top in {line.split("/")[0] for line in tracked.splitlines()}:
            (folder / top).symlink_to(ROOT / top)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        run = subprocess.run(["bash", folder / "bench" / "gpu.sh", out],
                             env=os.environ | {"PLANTED": f"bench.{planted}" if planted else "nothing"})
        summary, printed = (out / "gpu.md").read_text(), (out / "gpu.txt").read_text()
        files = {path.name for path in out.glob("*.md")}
        log = [path.read_text() for path in out.glob("logs/*.txt")]
    found = {stage: (outcome, seconds) for stage, outcome, seconds in
             re.findall(r"^- (\w+): (\w+), (\d+) s$", summary, re.MULTILINE)}
    rows = [{"planted": planted or "nothing", "stage": stage, "outcome": outcome,
             "s": int(seconds)} for stage, (outcome, seconds) in found.items()]
    expected = {stage: "failed" if stage == planted else "passed" for stage in STAGES}
    checks = {
        "the outcomes of the stages": {stage: outcome for stage, (outcome, _) in found.items()} == expected,
        "the exit code": run.returncode == bool(planted),
        "the tables": files == TABLES - {f"{planted}.md"} | {"gpu.md"},
        "the machine in the summary": f"{provenance()}." in summary,
        "text for 200 steps": "train_steps=200" in printed,
        "one log, to its last step": len(log) == 1 and "step:20/20 val_loss:" in log[0],
        "the verdict and the curve in the summary": re.search(r"n=1.*\n\nstep:0/20 val_loss:", summary, re.DOTALL),
    }
    return rows, [f"{what}, {planted or 'nothing'} planted" for what, right in checks.items() if not right]


def main():
    rows, wrong = rehearse()
    more, also_wrong = rehearse("optimizer")
    rows, wrong = rows + more, wrong + also_wrong
    publish("tests.drills.rehearse_gpu", [], RESULTS,
            "bench/gpu.sh, every stage, without a GPU: tests in Triton's interpreter, benches at the size for a CPU, the "
            f"text in full, training with {' '.join(SMALL)}. Then with a mistake planted in the arguments of "
            "bench.optimizer.", markdown(rows),
            f"Wrong: {'; '.join(wrong)}." if wrong else
            "As they should be: outcomes, exit codes (0 and 1), tables, logs, summaries.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
