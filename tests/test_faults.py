"""What ends a run, and what is left of it: gradients that are not finite, trials that fail."""

import json

from conftest import ROOT, start

from records.log import read

# The trainer, with a NaN planted in one parameter's gradient in one backward pass of one rank.
PLANT = """
import os, sys
import train_gpt

PARAMETER, BACKWARD, RANK = "blocks.1.mlp.fc.weight", {backward}, {rank}
passes = 0

def hook(gradient):
    global passes
    passes += 1
    planted = passes == BACKWARD and int(os.environ.get("RANK", 0)) == RANK
    return gradient * float("nan") if planted else gradient

def make_banks(model, hp, place, original=train_gpt.make_banks, hooked=[]):
    if not hooked:
        hooked.append(dict(model.named_parameters())[PARAMETER].register_hook(hook))
    return original(model, hp, place)

train_gpt.make_banks = make_banks
train_gpt.main(sys.argv[1:])
"""


def planted(folder, words, backward, rank=0, processes=0):
    script = folder / "planted.py"
    script.write_text(PLANT.format(backward=backward, rank=rank))
    return start(words, folder, script, processes, PYTHONPATH=str(ROOT))


def test_a_gradient_that_is_not_finite_is_named(quick, tmp_path):
    """Kills: a NaN found on the rank that has it alone, which leaves the other waiting; the sum over ranks searched,
    which blames rank 0; the step before or after; weights that are trained on with it.

    Two micro-batches of two sequences on each of two ranks: backward pass 7 is the first of step 4.
    """
    run = planted(tmp_path, quick, backward=7, rank=1, processes=2)
    assert run.returncode == 1
    line = "the gradient of blocks.1.mlp.fc.weight is not finite on rank 1 at step 4"
    assert run.stderr.count(f"train_gpt.py: seed 0: {line}\n") == 1 and "FloatingPointError" not in run.stderr
    (path,) = (tmp_path / "logs").glob("*.txt")
    assert path.read_text().splitlines()[-1] == f"failed: {line}"
    assert json.loads(path.with_suffix(".jsonl").read_text().splitlines()[-1])["step"] == 3
    (trial,) = read(path).trials
    assert trial.failed == line and trial.diverged


def test_a_trial_that_fails_leaves_the_next_one_clean(quick, tmp_path):
    """Kills: seeds that are never run because one failed; gradients, weights or state of the failed trial in the next;
    an exit code of 0 over a failure."""
    run = planted(tmp_path, [*quick, "--trials", "2"], backward=7)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "log: " in run.stdout
    (path,) = (tmp_path / "logs").glob("*.txt")
    failed, whole = read(path).trials
    assert failed.failed.startswith("the gradient of blocks.1.mlp.fc.weight is not") and failed.last_step == 0
    (tmp_path / "alone").mkdir()
    assert start([*quick, "--seed", "1"], tmp_path / "alone").returncode == 0
    (alone,) = (tmp_path / "alone" / "logs").glob("*.jsonl")
    values = [[(r["step"], r.get("val_loss"), r.get("loss")) for r in map(json.loads, file.read_text().splitlines())
               if r["seed"] == 1] for file in (path.with_suffix(".jsonl"), alone)]
    assert values[0] == values[1] and len(values[0]) == 8 + 3
    assert whole.complete and not whole.fault
