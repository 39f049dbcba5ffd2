"""The README's worked technique: a stage that aurora.py lacks, added as a reader would, in a copy of the project."""

import re
import shutil

import pytest
import torch
from conftest import ROOT, start

EXAMPLE = re.search(r"## Add a technique\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)[1]
FUNCTION = re.search(r"```python\n(.*?)```", EXAMPLE, re.DOTALL)[1]
RULE = re.search(r'matrix_update="(.*smooth.*)"', EXAMPLE)[1].replace("300", "6")  # the runs below have 8 steps


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The program, with one more function at the end of aurora.py, and a recipe of one line."""
    folder = tmp_path_factory.mktemp("project")
    for path in (*ROOT.glob("*.py"), ROOT / "kernels", ROOT / "harness"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    with open(folder / "aurora.py", "a") as file:
        file.write(f"\n\n{FUNCTION}")
    (folder / "records" / "smooth").mkdir(parents=True)
    (folder / "records" / "smooth" / "recipe").write_text(f"matrix_update={RULE}\n")
    return folder


STOPPED = """
import os, signal, sys
import train_gpt

original = train_gpt.update

def update(banks, step):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    original(banks, step)

train_gpt.update = update
train_gpt.main(sys.argv[1:])
"""


def state(folder) -> dict:
    path, = folder.glob("logs/*.checkpoint/*.pt")
    return torch.load(path, weights_only=True)


def test_a_technique_is_one_function(project, quick, tmp_path):
    """Kills: a state that a checkpoint lacks, a schedule that begins anew where a run goes on, a stage that two ranks
    cannot share, a log whose program lacks the stage.

    8 steps at once, and 4 that SIGTERM ends and 4 more in another process, end with the same bits. Two ranks sum the
    gradients in another order: they come to the same loss within a thousandth of a nat, and the same step twice.
    """
    words = ["@smooth", *quick, "--checkpoint-every", "8"]
    whole, parts, two, again = (tmp_path / name for name in ("whole", "parts", "two", "again"))
    for folder in (whole, parts, two, again):
        folder.mkdir()
    (project / "stopped.py").write_text(STOPPED)

    def run(folder, *words, script=project / "train_gpt.py", processes=0, code=0) -> float:
        ran = start([*words], folder, script, processes)
        assert ran.returncode == code, ran.stderr
        return float(re.findall(r"val_loss:(\S+)", ran.stdout)[-1])
    loss = run(whole, *words)
    bank = state(whole)["banks"][0]
    assert bank["smooth.average"].shape == bank["masters"].shape and bank["smooth.average"].any()

    run(parts, *words, script=project / "stopped.py", code=1)
    run(parts, "--resume", *map(str, (path.relative_to(parts) for path in parts.glob("logs/*.checkpoint"))))
    for mine, other in zip(state(parts)["banks"], state(whole)["banks"], strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in mine.items())

    assert abs(run(two, *words, processes=2) - loss) < 1e-3
    (log,) = whole.glob("logs/*.txt")
    (again / "program.py").write_text(log.read_text().split("=" * 100)[0])
    assert run(again, script=again / "program.py") == loss
