"""compare, diff, lint and plan, and what all verbs share. Every test was seen to fail."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_records import OURS, ROOT, UPSTREAM, write

import train_gpt
from harness.log import flatten
from records import leaderboard, published
from records.__main__ import VERBS, fold, main, parser
from records.diff import rules
from records.plan import extended, fresh
from records.program import constants, fingerprint, parse, sections
from records.recipes import align, side_by_side
from records.statistics import ASSUMED_SD, NOISE, Moments, judge

BANNER = "#" * 40
PROGRAM = f"""import os
import torch
from torch import nn
{BANNER}
#              Dataloader              #
{BANNER}
def distributed_data_generator(pattern, batch_size, seq_len=1024):
    yield pattern
{BANNER}
#             Architecture             #
{BANNER}
class GPT(nn.Module):
    '''A model.'''
    width = 768
{BANNER}
#                Setup                 #
{BANNER}
rank = int(os.environ["RANK"])
batch_size = 8 * 64 * 1024
val_tokens = 20 * 524288
for _ in range(3):
    {BANNER}
    #       Init & Optim Hyperparams       #
    {BANNER}
    adam = AdamW([dict(params=[embed], lr=0.3), dict(params=[head], lr=1/320)], betas=(0.8, 0.95))
    muon = Muon(matrices, lr=0.0375)
    # --------------- VALIDATION SECTION -----------------
    val_loss = 0
    # --------------- TRAINING SECTION -----------------
    loss.backward()
"""


def run(capsys, *words: str) -> tuple[int, str]:
    status = main(list(words))
    return status, capsys.readouterr().out


def log(path: Path, *curves, old: str = "", new: str = "", source: str = PROGRAM) -> str:
    assert old in source
    return write(path, *curves, source=source.replace(old, new) if old else source)


def rerun(record: int, shift: float = 0.0, runs: int = 20) -> list[dict[int, float]]:
    return [{step: loss + shift for step, loss in losses.items()}
            for losses in list(published.curves(record).values())[:runs]]


# compare

def test_compare_published_results(capsys):
    """Kills: A and B exchanged; a crossing without an interval; a schedule of another length compared in silence; the
    exit code of a comparison that shows nothing."""
    status, out = run(capsys, "compare", "17", "11")
    assert status == 0
    assert "A      20    3175   3.27890         3156  3148 to 3165" in out
    assert "note: schedules of different length" in out
    assert "A 32 +- 11 (p = 1.4e-06) steps before B" in out
    assert out.endswith("+0.00552 (0.004 is asked), p = 1.1e-05: A is better than B\n")
    status, out = run(capsys, "compare", "11", "9")
    assert status == 1 and out.endswith("-0.00064 (0.004 is asked), p = 0.69: A is NOT shown better than B\n")


def test_compare_two_rates(capsys):
    """Kills: the rate along one curve taken for that between schedules (0.0045), or named like it."""
    out = run(capsys, "compare", "17", "11")[1]
    assert "0.0045 nats per 100 steps between schedules" in out and "nats/100 steps there" in out
    result = json.loads(run(capsys, "compare", "17", "11", "--json")[1])
    curve = published.moments(17)[1]
    # 1e-5: the table of moments has five decimals, the slope is a difference of two over a quarter of 100 steps
    assert result["sets"][0]["rate"] == pytest.approx(4 * (curve[3150].mean - curve[3175].mean), abs=4e-5)


def test_compare_several(tmp_path, capsys):
    """Kills: a verdict on the first pair alone; sets pooled; the same program compared with itself unmentioned."""
    new = log(tmp_path / "new.txt", *rerun(17, -0.002), source=UPSTREAM)
    old = log(tmp_path / "old.txt", *rerun(17), source=UPSTREAM)
    status, out = run(capsys, "compare", new, old, "17", "--all")
    assert status == 0 and out.count("A is better than") == 2
    assert "note: A and B ran the same program" in out
    assert out.count("\n   3200   3.27611   3.27811  -0.00200 0.00071") == 2
    # 1 alone has no spread
    status, out = run(capsys, "compare", new, old, "30")
    assert status == 1 and "better than B" in out and "NOT shown better than C" in out
    assert main(["compare", new, *["17"] * 26]) == 2
    assert "     of its val_ema_loss\n" in run(capsys, "compare", new, "46")[1]
    status, out = run(capsys, "compare", "17", "1")
    assert status == 0 and "     -          -" in out


def test_compare_pairs_by_seed(tmp_path, capsys):
    """Kills: runs paired by their place in the file; a seed that only one has; seeds that the logs do not name."""
    one, two, three = rerun(17, runs=3)
    shifted = zip((three, one, two), (0.001, 0.0011, 0.0009))
    noisy = [{step: loss + shift for step, loss in losses.items()} for losses, shift in shifted]
    a = write(tmp_path / "a.txt", *(part for k, c in zip((3, 1, 2), noisy) for part in (f"seed: {k}\n", c)))
    alone = ["seed: 9\n", {step: loss + 0.0001 for step, loss in one.items()}]
    b = write(tmp_path / "b.txt", *alone,
              *(part for k, c in zip((1, 2, 3), (one, two, three)) for part in (f"seed: {k}\n", c)))
    out = run(capsys, "compare", a, b)[1]
    assert "paired by seed at step 3200, 3 pairs: +0.00100 +- 0.00025, p = 0.0033" in out
    assert "at step 3200, 3 pairs: -0.00100" in run(capsys, "compare", b, a)[1]
    assert "paired" not in run(capsys, "compare", "17", b)[1]


def test_a_program_without_a_target(tmp_path, capsys):
    """Kills: FAIL for what was to reach nothing; a comparison of two that gives no verdict either."""
    source = "class Hyperparameters:\n    target_loss: float = 0.0\n    matrix_lr: float = 0.02\n"
    paths = [write(tmp_path / f"{x}.txt", {0: 10.8, 3100: x, 3200: x - 0.1}, source=source.replace("0.02", str(x)))
             for x in (3.0, 3.1)]
    status, out = run(capsys, "verify", paths[0])
    assert status == 1 and "FAIL" not in out and out.splitlines()[-1] == (
        "NO VERDICT: target_loss=0 is no target; `compare` tells two programs apart; step 3200 comes closest, at mean "
        "2.900000 (n=1, target 0)")
    assert run(capsys, "compare", *paths)[0] == 0
    assert run(capsys, "compare", *paths[::-1])[0] == 1


def test_compare_other_targets(tmp_path, capsys):
    """Kills: nats a byte compared with nats a token."""
    ours = write(tmp_path / "a.txt", {0: 10, 3200: 2.9}, source=OURS)
    assert main(["compare", ours, "17"]) == 2
    assert "not of one kind" in capsys.readouterr().err


# diff

def test_diff_names_constants_first(tmp_path, capsys):
    """Kills: a constant missed in a parameter group, a call, a default; the first of two groups for both; a comment or
    a docstring shown as a change; a change of the batch not marked."""
    a = log(tmp_path / "a.txt", {0: 10})
    changes = {"lr=0.3": "lr=0.2", "1/320": "1/300", "0.0375": "0.04", "seq_len=1024": "seq_len=2048",
               "8 * 64": "4 * 64", "'''A model.'''": "'''The model.'''  # a comment"}
    source = PROGRAM
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    status, out = run(capsys, "diff", a, write(tmp_path / "b.txt", {0: 10}, source=source))
    assert status == 1
    for line in ("  dict[[embed]](lr): 0.3 -> 0.2", "  dict[[head]](lr): 1 / 320 -> 1 / 300",
                 "  Muon(lr): 0.0375 -> 0.04",
                 "! distributed_data_generator(seq_len): 1024 -> 2048", "! batch_size: 8 * 64 * 1024 -> 4 * 64 * 1024"):
        assert f"\n{line}\n" in out
    assert out.index("Muon(lr)") < out.index("@@") and "betas" not in out[:out.index("data:")]
    assert "\ndata: 1 lines out, 1 in  ! touches what the rules fix\n" in out
    assert "\ninit & optim hyperparams: 2 lines out, 2 in\n" in out
    assert out.splitlines()[-1].startswith("DIFFERENT: 5 constants, 4 sections")


RULE_44 = "nesterov(ramp(0.85, 0.95, 0, 300)) | soap(0.9) | polar | aspect | floor(0.3825) | step | pin"
RULE_46 = "nesterov(ramp(.85, .95, 0, 300)) | soap(beta2=0.9) | polar | aspect | row_floor(0.3825) | step | pin | step"


def test_rules_are_aligned_by_stages():
    """Kills: stages paired by their place; two spellings of one number told apart; the bars of a nested call taken for
    the rule's; a stage that occurs twice, once."""
    assert align(RULE_44, RULE_46) == [
        ("nesterov(ramp(0.85, 0.95, 0, 300))", "nesterov(ramp(0.85, 0.95, 0, 300))"), ("soap(0.9)", "soap(beta2=0.9)"),
        ("polar", "polar"), ("aspect", "aspect"), ("floor(0.3825)", None), (None, "row_floor(0.3825)"),
        ("step", "step"), ("pin", "pin"), (None, "step")]
    assert align("a", "a") == [("a", "a")] and align("a(x | y) | b", "b") == [("a(x | y)", None), ("b", "b")]
    assert side_by_side([("a(1)", "a(2)"), ("b", None), (None, "c"), ("d", "d")]) == [
        "  a(1)  !  a(2)", "  b     <", "        >  c", "  d        d"]
    assert max(map(len, side_by_side([("a" * 99, "b" * 55), ("c", "c")]))) < 120
    assert align("a", "") == [("a", None)]
    for text in ("a |", "a(", "(" * 300, "-" * 900 + "1"):
        with pytest.raises(ValueError, match="is no update rule"):
            align("a", text)


def test_diff_of_recipes(tmp_path, capsys):
    """Kills: a recipe held against nothing where it names no value; a rule as one line; a knob that a line changes
    alone, passed over; a folder of records/ that is known by its name alone, or by its path."""
    status, out = run(capsys, "diff", "17_aurora", "36_muon_tuned")
    assert status == 1 and out == """a: 17_aurora
b: 36_muon_tuned

matrix_update (! other knobs, < only in a, > only in b)
  nesterov(0.95)     nesterov(0.95)
  aurora(2, 0.5)  <
  contra(0.4)     <
                  >  polar
  aspect             aspect
  floor(0.35)     <
                  >  decay(0.05)
  step               step

adam_update (! other knobs, < only in a, > only in b)
  adamw(0.8, 0.95, 1e-10, 0)  !  adamw(0.8, 0.95, 1e-10, 0.001)

constants (! touches data, model, batch or evaluation, which the rules fix)
  matrix_lr: 0.0375 -> 0.025
  embed_lr: 0.3 -> 0.7
  head_lr: 1 / 320 -> 0.004
  vector_lr: 0.01 -> 0.015
  train_steps: 3200 -> 3250

DIFFERENT: 2 rules, 5 constants, 0 sections; 0 of them touch data, model, batch or evaluation
"""
    mine = tmp_path / "mine"
    mine.write_text("floor.target = 0.4  # more\nmicro_batch=2\nhead_lr=0.003125\n")
    for name in ("17_aurora", "@17_aurora", str(ROOT / "records/17_aurora"), f"@{ROOT}/records/17_aurora/recipe"):
        _, out = run(capsys, "diff", name, f"@{mine}")
        assert "\n  floor.target: - -> 0.4\n\nDIFFERENT: 1 constants" in out
        assert run(capsys, "diff", name, str(ROOT / "records/17_aurora/recipe"))[0] == 0
    mine.write_text("floor\n")
    for words, says in ((["@nine", "17_aurora"], "@nine: there is no recipe of that name"),
                        ([f"@{mine}", "17_aurora"], "is no recipe: 'floor' is not NAME=VALUE")):
        assert main(["diff", *words]) == 2 and says in capsys.readouterr().err


def test_diff_shows_the_rules_of_programs(tmp_path, capsys):
    """Kills: two lines of eight stages each for a person to compare; a text that is no rule, or a program without one,
    as an error; a recipe that cannot be held against a log."""
    a, b, c = (write(tmp_path / name, {0: 10}, source=f"class Hyperparameters:\n    matrix_update: str = {rule!r}\n")
               for name, rule in (("a", RULE_44), ("b", RULE_46), ("c", "no rule")))
    status, out = run(capsys, "diff", a, b)
    assert status == 1 and "\nHyperparameters.matrix_update (!" in out and f" !  {RULE_46[:8]}" not in out
    assert "\n  floor(0.3825)                       <\n" in out and "0 constants, 1 sections" in out
    assert f"  Hyperparameters.matrix_update: {RULE_44!r} -> 'no rule'\n" in run(capsys, "diff", a, c)[1]
    assert "\n  floor(0.35)     !  floor(0.3825)\n" in run(capsys, "diff", "17_aurora", a)[1]
    assert main(["diff", "17_aurora", log(tmp_path / "d", {0: 10})]) == 2
    assert "has no class Hyperparameters to hold against a recipe" in capsys.readouterr().err


def test_list_shows_every_recipes_rule(capsys, tmp_path, monkeypatch):
    """Kills: a rule that is broken within a stage, or runs past the screen; a folder left out; 2540 before 36; 3layers
    as a number."""
    names = ["9_a", "36_b", "339_c", "2540_d", "3layers"]
    for k, name in enumerate(names):
        (tmp_path / name).mkdir()
        rule = " | ".join(["polar"] * k + [RULE_46] * 3)
        (tmp_path / name / "recipe").write_text(f"matrix_update={rule}\nsoap.beta=0.{k}\n")
    assert leaderboard.RECORDS == ROOT / "records"  # it has been imported before the next line
    monkeypatch.setattr("records.recipes.RECORDS", tmp_path)
    out = run(capsys, "list")[1]
    table = out[out.index("recipe  "):out.index("\n\nprogram ")].splitlines()
    assert max(map(len, table)) <= 100 and all(line.count("(") == line.count(")") for line in table)
    assert [line[:20].split()[0] for line in table[1:] if line[:20].strip()] == names
    shown = " ".join(line[20:] for line in table[1:])
    assert shown.startswith(" | ".join([RULE_46] * 3) + ", soap.beta=0.0 polar | nesterov(")
    assert list(json.loads(run(capsys, "list", "--json")[1])["recipes"]) == names


def test_diff_of_the_same(tmp_path, capsys):
    """Kills: two runs of one recipe told apart by a comment."""
    a, b = log(tmp_path / "a.txt", {0: 10}), log(tmp_path / "b.txt", {0: 10}, old="import os", new="# a\nimport os")
    assert run(capsys, "diff", a, b) == (0, f"a: {a}\nb: {b}\nSAME: nothing differs but layout, comments, docstrings, "
                                            "seed and micro-batch\n")


def test_sections_of_both_dialects():
    """Kills: a part of upstream's training loop counted to another section; our titles and theirs under two names."""
    assert list(sections(PROGRAM.encode())) == ["head", "data", "model", "setup", "init & optim hyperparams",
                                                "evaluation", "training"]
    ours = sections((ROOT / "train_gpt.py").read_bytes())
    assert {"data", "model", "training"} <= ours.keys() and any("class GPT" in line for line in ours["model"])


TWO_FILES = f"""'''Of two files.'''
{"#" * 80}
#{"kernels/norm.py":^78}#
{"#" * 80}
x = 1
{BANNER}
#{"Model":^38}#
{BANNER}
y = 2
{"#" * 80}
#{"train_gpt.py":^78}#
{"#" * 80}
import torch
{BANNER}
#{"Model":^38}#
{BANNER}
z = 3
"""


def test_diff_names_the_file(tmp_path, capsys):
    """Kills: a change of a kernel told as one of the head, or of another file's part; a part of the program proper
    under another title than in a program of one file, which `lint` would miss."""
    assert {title: lines for title, (_, *lines) in sections(TWO_FILES.encode()).items()} == {
        "head": ["", "import torch"], "kernels/norm.py": ["x = 1"], "kernels/norm.py: model": ["y = 2"],
        "model": ["z = 3"]}
    logs = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path, value in zip(logs, "15"):
        path.write_text(f"{TWO_FILES.replace('x = 1', f'x = {value}')}{'=' * 100}\n")
    assert run(capsys, "diff", *map(str, logs))[1].splitlines()[-6:] == [
        "kernels/norm.py: 1 lines out, 1 in", "@@ -1 +1 @@", "-x = 1", "+x = 5", "",
        "DIFFERENT: 1 constants, 1 sections; 0 of them touch data, model, batch or evaluation"]


def test_constants_are_literals():
    """Kills: a computed value evaluated, or taken for a constant; the second of two like names lost."""
    assert constants(b"a = (1, x)\nb = {1: x}\nc = 1 + x\n") == {}
    found = constants(b"a = 1\na = -2\nb = f(3)\nc = (1, 'x', {2: None})\ndef f(x, *, y=[1 / 2]): z = x\n")
    assert found == {"a": "1", "a #2": "-2", "c": "(1, 'x', {2: None})", "f(y)": "[1 / 2]"}


# lint

def lint(capsys, tmp_path, old="", new="", *words: str) -> dict[str, str]:
    path = log(tmp_path / "a.txt", {0: 10}, old=old, new=new)
    base = log(tmp_path / "base.txt", {0: 10})
    status, out = run(capsys, "lint", path, "--against", base, "--json", *words)
    result = json.loads(out)
    assert status == (not result["verdict"])
    return {check["what"]: check["outcome"] for check in result["checks"] if check["outcome"] != "unchanged"}


@pytest.mark.parametrize("old, new, what, outcome", [
    ("yield pattern", "yield pattern[1:]", "data", "changed"),
    ("width = 768", "width = 1024", "model", "changed"),
    ("8 * 64 * 1024", "4 * 64 * 1024", "tokens a step", "changed"),
    ("8 * 64 * 1024", "int(x)", "tokens a step", "look"),
    ("20 * 524288", "10 * 524288", "validation tokens", "changed"),
    ("loss.backward()", "loss.backward(); loss.backward()", "one backward a micro-batch", "changed"),
    ("loss.backward()", "torch.autograd.grad(loss, w)", "", ""),
    ("import torch\n", "import torch\nimport dion\n", "no third-party import", "changed"),
    ("import torch\n", "import torch\nfrom heavyball import SOAP\n", "no third-party import", "changed"),
    ('os.environ["RANK"]', 'os.environ.get("LR", 1)', "no environment reads", "changed"),
    ('os.environ["RANK"]', 'os.getenv("LR")', "no environment reads", "changed"),
    ('os.environ["RANK"]', 'os.environ[name]', "no environment reads", "look"),
    ("import torch\n", "import torch\nfrom os import environ\n", "no environment reads", "look"),
    ("Architecture", "Something", "model", "look"),
    ("'''A model.'''", "'''Of width 768.'''", "", ""),
    ("0.0375", "0.04", "", ""),
])  # fmt: skip
def test_lint_finds(tmp_path, capsys, old, new, what, outcome):
    """Kills: each check left out, or tripped by what the rules leave free."""
    assert lint(capsys, tmp_path, old, new) == ({what: outcome} if what else {})


def test_lint_of_ours(tmp_path, capsys):
    """Kills: this project's recipe called changed in data, model or batch; a tiny one called unchanged."""
    status, out = run(capsys, "lint", str(ROOT / "train_gpt.py"))
    assert not any(line.startswith("changed") and "import" not in line for line in out.splitlines())
    assert "unchanged  model: its section, against that of train_gpt.py" in out
    (tiny,) = (ROOT / "records" / "tiny").glob("*.txt")
    status, out = run(capsys, "lint", str(tiny))
    assert status == 1 and "changed    model_dim: model_dim = 64" in out
    # a log of before there was harness/, and before a run looked through each shard as it opens it
    assert out.startswith("changed    data: open_shard, batches_in, read_batches, against those of train_gpt.py")


@pytest.mark.parametrize("against", [[], ["--against", "base.py"]])
def test_lint_of_what_reads_shards(against, tmp_path, monkeypatch, capsys):
    """Kills: a log of ours that reads other tokens, or counts their batches otherwise, in whichever file; a variable of
    torchrun's that counts as the user's."""
    monkeypatch.chdir(tmp_path)
    source = flatten(ROOT / "train_gpt.py", ROOT)
    Path("base.py").write_text(source)
    for old, new, outcome in (("", "", "unchanged"), ("len(tokens) - 2", "len(tokens) - 3", "changed"),
                              ("place.rank * part", "place.rank", "changed"),
                              ("offset=1024", "offset=1026", "changed")):
        Path("a.py").write_text(source.replace(old, new))
        checks = json.loads(run(capsys, "lint", "a.py", *against, "--json")[1])["checks"]
        assert "changed" not in {check["outcome"] for check in checks[1:]}
        assert {check["what"]: check["outcome"] for check in checks[:2]} == {"data": outcome, "model": "unchanged"}


def test_the_rules_are_the_trainers(tmp_path, capsys):
    """Kills: a list of what the rules fix that is not the trainer's, or that it computes; one of its fields that lint
    passes over in our programs, or diff does not mark."""
    assert rules() == train_gpt.RULES
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    for path, suffix in ((a, ""), (b, "0")):
        fields = "".join(f"\n    {name}: x = {str(value) + suffix!r}" for name, value in rules().items())
        path.write_text(f"class Hyperparameters:\n    mu: float = .9{suffix}1{fields}\n")
    _, out = run(capsys, "diff", str(a), str(b), "--json")
    assert {row["name"] for row in json.loads(out)["constants"] if row["fixed"]} == {
        f"Hyperparameters.{name}" for name in rules()}
    _, out = run(capsys, "lint", str(b), "--json")
    words = {"batch_tokens": "tokens a step", "val_tokens": "validation tokens", "sequence_length": "sequence length"}
    changed = {row["what"] for row in json.loads(out)["checks"] if row["outcome"] == "changed"}
    assert changed >= {words.get(name, name) for name in rules()} and "mu" not in changed


def test_fingerprint_sees_values():
    """Kills: a hash of the shape of a program alone; one that differs between versions of Python, by empty fields."""
    one, two, three = (fingerprint(parse(text.encode()).body) for text in ("a = 1", "a = 2", "a  =  1  # one"))
    assert one == three != two
    assert fingerprint(parse(b"def f(x): return x").body).startswith("f8418181")


# plan

@pytest.mark.parametrize("n, chance", [(1, 0.005), (2, 0.017), (4, 0.064), (8, 0.254), (12, 0.5), (20, 0.853),
                                       (30, 0.982)])  # fmt: skip
def test_chance_of_a_faithful_set(n, chance):
    """Kills: the rule's 0.0013 for the runs' true spread; a chance without sqrt(n)."""
    assert fresh(n, 3.278845, 3.28, NOISE) == pytest.approx(chance, abs=5e-4)


def test_chance_of_an_extended_set():
    """Kills: the runs at hand counted as new ones, or as certain about the mean. 20,000 draws of a mean from what six
    runs tell of it, then of four new runs: three standard errors are 0.011."""
    source, at = random.Random(0), Moments(6, 3.2788, NOISE)
    hits = 0
    for _ in range(20000):
        truth = source.gauss(at.mean, NOISE / 6**0.5)
        total = (6 * at.mean + sum(source.gauss(truth, NOISE) for _ in range(4))) / 10
        hits += judge(Moments(10, total, None), 3.28).passes
    assert extended(10, at, 3.28, NOISE, float("inf")) == pytest.approx(hits / 20000, abs=0.011)
    assert extended(5, at, 3.28, NOISE, float("inf")) is None
    assert extended(6, at, 3.28, NOISE, float("inf")) == 0


def test_optional_stopping_is_as_told(tmp_path, capsys):
    """Kills: a warning whose numbers nobody computed. 40,000 sets whose true mean is the target, judged after every
    run: three standard errors are 0.13%, with half a digit of what is printed."""
    source, passed = random.Random(0), {4: 0, 10: 0, 20: 0}
    for _ in range(40000):
        total, first = 0.0, 99
        for n in range(1, 21):
            total += source.gauss(0, ASSUMED_SD)
            if total / n**0.5 >= 0.004:
                first = n
                break
        for n in passed:
            passed[n] += first <= n
    out = run(capsys, "plan", "17")[1]
    for n, told in ((4, 0.3), (10, 0.5), (20, 0.8)):
        assert f"{told}%" in out and abs(100 * passed[n] / 40000 - told) < 0.18


def test_plan(tmp_path, capsys):
    """Kills: cost of one GPU for eight; hours of one run for n; a plan for runs that diverged."""
    path = write(tmp_path / "a.txt", *rerun(17, runs=4))
    status, out = run(capsys, "plan", path, "--step", "3200", "--price", "3", "--gpus", "8")
    assert "deviation between runs: 0.00111 (published for this track)" in out
    line = next(line.split() for line in out.splitlines() if line.startswith("  10 "))
    assert line[0] == "10" and line[3:] == ["1.3", "32.00"]  # 480 s a run
    assert status == (judge(Moments.of([c[3200] for c in rerun(17, runs=4)]), 3.28).passes is False)
    assert main(["plan", path, "--step", "3190"]) == 2
    status, out = run(capsys, "plan", write(tmp_path / "b.txt", {0: 10, 3200: 3.1}, {0: float("nan")}))
    assert "1 runs diverged: with them no number passes" in out


def test_plan_of_other_targets(tmp_path, capsys):
    """Kills: the track's noise for a recipe of another kind."""
    assert main(["plan", write(tmp_path / "a.txt", {0: 10, 3200: 2.99}, source=OURS)]) == 2
    assert "make a second run" in capsys.readouterr().err
    two = write(tmp_path / "b.txt", {0: 10, 3200: 2.99}, {0: 10, 3200: 2.97}, source=OURS)
    assert "0.01414 (of these 2 runs)" in run(capsys, "plan", two)[1]


# all verbs

@pytest.mark.parametrize("verb", [run.__name__.rstrip("_") for run, *_ in VERBS])
def test_help_fits_a_screen(verb, capsys, monkeypatch):
    """Kills: a verb without an example; help that scrolls away; an example that is not understood."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 80
    example = out[out.index("example: python -m records ") + 27:].replace("'", "").split()
    parser().parse_args(example)


def test_sentences_fit_the_terminal(monkeypatch):
    """Kills: a sentence broken within a word; a table or a line of source broken at all."""
    monkeypatch.setenv("COLUMNS", "30")
    table, source = "   3175   20   3.278845  0.00111", "+    " + "x" * 40
    sentence = "one word after another, and then more"
    assert fold(f"{table}\n{source}\n{sentence}\n\nshort") == (
        f"{table}\n{source}\none word after another, and\n  then more\n\nshort")


@pytest.mark.parametrize("words", [["verify", "17"], ["reproduce", "17"], ["compare", "17", "1"], ["plan", "17"],
                                   ["list"], ["diff", "LOG", "LOG"], ["lint", "LOG"]])  # fmt: skip
def test_json_is_json(words, tmp_path, capsys):
    """Kills: NaN or a bare object in what a machine is to read; a verdict that is not the exit code."""
    path = write(tmp_path / "a.txt", {0: 10.8, 125: float("nan")}, source=PROGRAM)
    for arguments in (words, [path if w in ("17", "LOG") else w for w in words]):
        if arguments[0] in ("verify", "list", "diff", "lint") or "17" in arguments:
            status = main([path if word == "LOG" else word for word in arguments] + ["--json"])
            out = capsys.readouterr().out
            result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            assert status == (not result["verdict"])


@pytest.mark.parametrize("words", [["verify", "17"], ["reproduce", "17"], ["compare", "17", "11"], ["plan", "17"],
                                   ["list"], ["diff", "TINY", "TINY"], ["lint", "TINY"], ["extract", "TINY"],
                                   ["diff", "17_aurora", "36_muon_tuned"], ["report", "TINY", "-o", "/dev/stdout"]])
def test_verbs_need_the_standard_library_only(words):
    """Kills: an import at the top of a module, by which a verb waits for what it does not use."""
    (tiny,) = (ROOT / "records" / "tiny").glob("*.txt")
    code = ("import sys; from records.__main__ import main; main(sys.argv[1:]); heavy = {'torch', 'numpy', 'triton',"
            "'matplotlib', 'wandb'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else 0)")
    words = [str(tiny) if word == "TINY" else word for word in words]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
