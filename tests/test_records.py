"""The desk against literal logs, and against the published figures. Every test was seen to fail with the mistake
that its docstring names."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from records import published
from records.__main__ import main
from records.log import read
from records.program import number, parse, recipe, target
from records.statistics import Moments, judge

ROOT = Path(__file__).resolve().parent.parent
RULE = "=" * 100 + "\n"
MACHINE = "Running PyTorch 2.11 compiled for CUDA 13 on H100 with world_size 8\n"
UPSTREAM = "import torch\nprint(1)\n"
OURS = '''"""Trains."""
from dataclasses import dataclass

@dataclass
class Hyperparameters:
    """Ours."""
    head_lr: float = 1 / 320
    micro_batch: int = 64
    train_steps: int = 3200
    target_loss: float = 3 * 1.0

    def check(self):
        return 0
'''


def curve(losses: dict, steps: int = 3200) -> str:
    return "".join(
        f"step:{step}/{steps} val_loss:{loss:.5f} train_time:{step * 0.15:.3f}s step_avg:nanms\n"
        for step, loss in losses.items()
    )


def ends(*finals: float) -> list[dict]:
    """Curves of 3200 steps that end at `finals`, each its own."""
    return [{0: 10.82584, 3000: final + 0.02, 3200: final} for final in finals]


def write(path: Path, *curves: dict | str, source: str = UPSTREAM) -> str:
    """A log with one trial a curve; its path."""
    body = "".join(c if isinstance(c, str) else curve(c) for c in curves)
    path.write_bytes((source + RULE + MACHINE + RULE + body).encode())
    return str(path)


def verify(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["verify", *arguments])
    return status, *capsys.readouterr()


def row(out: str, step: int) -> list[str]:
    return next(line.split() for line in out.splitlines() if line.split()[0] == str(step))


def test_result_17(tmp_path, capsys):
    """Kills: the population's sd for the sample's, a statistic without its sqrt(n), figures of other runs; a sample
    from logs judged otherwise than the same figures."""
    for seed, losses in published.curves(17).items():
        write(tmp_path / f"{seed}.txt", losses)
    status, out, err = verify(capsys, str(tmp_path))
    assert status == 0 and err == ""
    assert row(out, 3150)[-3:] == ["-0.00173", "FAIL", "-"]
    assert row(out, 3175) == ["3175", "20", "3.278845", "0.00111", "+0.00517", "PASS", "12"]
    assert row(out, 3200)[-3:] == ["+0.00843", "PASS", "5"]
    assert "19 of 20 runs cross 3.28, on average at step 3156 (sd 14)" in out
    assert "at step 3175, n=20: z = 3.97, p = 4e-05" in out
    verdict = "PASS: 3175 is the earliest step to pass, at mean 3.278845 (n=20, target 3.28)"
    assert out.splitlines()[-1] == verdict
    assert verify(capsys, "17") == (0, out.replace("20 on H100, world_size 8\n", ""), "")


@pytest.mark.parametrize("n, loss", [(1, 3.276), (4, 3.278), (16, 3.279), (100, 3.2796)])
def test_rule_at_its_edge(n, loss):
    """Kills: a comparison in binary fractions, which fails four runs at exactly 3.278."""
    at = judge(Moments.of([loss] * n), 3.28)
    assert at.passes and at.runs_needed == n
    assert not judge(Moments.of([loss + 0.00001] * n), 3.28).passes


def test_hopeless_mean_needs_no_number():
    """Kills: squaring the margin, which promises a record to a mean above the target."""
    assert judge(Moments.of([3.281, 3.282]), 3.28).runs_needed is None


def test_several_trials(tmp_path):
    """Kills: a `seed:` line and the `step:0` after it counted as two trials; a trial that is told
    only by its step falling back, run into the one before; a line that is printed twice, as the next."""
    one, two, three = ends(3.1, 3.2, 3.3)
    log = read(write(tmp_path / "ours.txt", "seed: 7\n", one, "seed: 8\n", two))
    assert [(t.seed, t.losses) for t in log.trials] == [(7, one), (8, two)]
    del three[0]
    log = read(write(tmp_path / "theirs.txt", one, two, three))
    assert [(t.seed, t.losses) for t in log.trials] == [(None, one), (None, two), (None, three)]
    assert all(t.complete for t in log.trials)
    twice = "".join(line * 2 for line in curve(one).splitlines(keepends=True))
    assert [t.losses for t in read(write(tmp_path / "twice.txt", twice)).trials] == [one]


def test_lines_of_other_shapes(tmp_path):
    """Kills: milliseconds read as seconds; a line without a loss read as one; another metric taken
    for val_loss; CRLF left in what was read; a seed of upstream's spelling missed."""
    text = (
        "Using seed=5\nstep:0/50 val_loss:10.5 train_time:0ms step_avg:nanms\n"
        "step:1/50 train_time:7ms step_avg:7.00ms\n"
        "step:25/50 val_ema_loss:1.0 val_loss:4.25 train_time:1500ms step_avg:60.00ms beta:0.9\n"
        "step:50/50 val_loss:3.5 val_ema_loss:1.0 ema_val_loss:1.0 train_time:3000ms\n"
    )
    path = tmp_path / "crlf.txt"
    text = UPSTREAM + RULE + "a: 1\na: 2\n" + RULE + text
    path.write_bytes(text.replace("\n", "\r\n").encode())
    log = read(path)
    (trial,) = log.trials
    assert (trial.seed, trial.losses) == (5, {0: 10.5, 25: 4.25, 50: 3.5})
    assert trial.complete and trial.train_time == 3.0
    assert log.facts == {"a": ["1", "2"]}
    assert read(write(tmp_path / "s.txt", *ends(3.2))).trials[0].train_time == 480.0


@pytest.mark.parametrize("cut, last", [(" train_time:48", 3200), ("3.2", 3000), ("00 val", 3000)])
def test_cut_last_line(tmp_path, cut, last):
    """Kills: a loss whose last digits are missing, taken at its word."""
    whole = curve({0: 10.82584, 3000: 3.3}) + "step:3200/3200 val_loss:3.27815 train_time:480.0s"
    log = read(write(tmp_path / "cut.txt", whole[: whole.rindex(cut) + len(cut)]))
    assert log.trials[0].last_step == last
    assert log.trials[0].losses[last] == {3000: 3.3, 3200: 3.27815}[last]


def test_runs_left_out_are_named(tmp_path, capsys):
    """Kills: a failed, stopped or never validated run in the mean, or unmentioned."""
    good, failed = ends(3.27, 3.1)
    bodies = [good, "seed: 3\n", failed, "failed: no more memory\n"]
    log = write(tmp_path / "a.txt", *bodies, "seed: 5\n", {0: 10.8, 125: 4.6}, "seed: 6\n")
    status, out, _ = verify(capsys, log)
    assert status == 0
    assert out.startswith("1 of 4 runs used, target 3.28\n")
    for k, reason in [
        (2, "failed: no more memory"),
        (3, "stopped at step 125 of 3200"),
        (4, "stopped before its first validation"),
    ]:
        assert f"not used: {log} trial {k}: {reason}\n" in out
    assert "note: rule 5" in out
    assert out.splitlines()[-1].endswith("mean 3.270000 (n=1 of 4, target 3.28)")


@pytest.mark.parametrize(
    "ending, reason",
    [(curve({0: 10.8, 3000: math.nan, 3200: 3.1}), "val_loss is nan at step 3000"),
     (curve({0: 10.8, 3000: math.inf}), "val_loss is inf at step 3000"),
     (curve({0: 10.8, 1000: 8.1}) + "failed: the validation loss at step 1000 is 8.1\n",
      "failed: the validation loss at step 1000 is 8.1")],
)  # fmt: skip
def test_a_run_that_diverged_is_a_result(tmp_path, capsys, ending, reason):
    """Kills: a record made of the runs that did not diverge."""
    log = write(tmp_path / "a.txt", *ends(3.27), ending)
    status, out, _ = verify(capsys, log)
    assert status == 1 and f"not used: {log} trial 2: {reason}\n" in out
    start = "FAIL: 1 of 2 runs diverged; among the others, step 3200 would pass, at mean 3.270000 ("
    assert out.splitlines()[-2].startswith(start)
    assert json.loads(verify(capsys, log, "--json")[1])["diverged"] == 1


def test_runs_that_end_early_together(tmp_path, capsys):
    """Kills: upstream's records that stop short of their schedule by design, thrown out whole; one
    run that was killed, taken for a finished one."""
    one, two = {0: 10.8, 2715: 3.29, 2720: 3.27}, {0: 10.8, 2715: 3.29, 2720: 3.271}
    logs = [write(tmp_path / f"{k}.txt", c) for k, c in enumerate((one, two, {0: 10.8, 125: 4.6}))]
    status, out, _ = verify(capsys, *logs)
    assert status == 0 and "2 of 3 runs used" in out
    assert "note: every run used stopped at step 2720 of 3200, or before\n" in out
    longer = write(tmp_path / "3.txt", one | {2725: 3.26, 2730: 3.26})
    status, out, _ = verify(capsys, longer, *logs[1:])
    assert status == 0 and "2 of 3 runs used" in out and "at step 2730 of 3200" in out
    assert [row(out, step)[1] for step in (2715, 2720, 2725, 2730)] == ["2", "2", "1", "1"]
    assert "note: rule 5" in out and "(n=2 of 3, target 3.28)" in out
    status, out, _ = verify(capsys, logs[0])
    assert status == 1 and out.endswith("FAIL: no run can be used\n")


def test_failing_verdict(tmp_path, capsys):
    """Kills: exit code 0 for a no; the note on result #17 given to another target or after a yes;
    a table of all steps where the last are asked for."""
    log = write(tmp_path / "a.txt", *ends(3.279))
    status, out, _ = verify(capsys, log)
    *_, verdict, note = out.splitlines()
    assert status == 1
    assert verdict.startswith("FAIL: no step passes; 3200 would need 16 runs at mean 3.279000 (")
    assert note.startswith("note: a faithful rerun of result #17") and "0.5%" in note and "6%" in note
    assert "\n      0 " not in out and "\n      0 " in verify(capsys, log, "--all")[1]
    _, out, _ = verify(capsys, write(tmp_path / "b.txt", *ends(3.1), source=OURS))
    assert out.endswith("; 3200 comes closest, at mean 3.100000 (n=1, target 3)\n")
    status, out, _ = verify(capsys, write(tmp_path / "c.txt", *ends(3.27)))
    assert status == 0 and "#17" not in out


def test_remarks_of_the_log_are_repeated(tmp_path, capsys):
    """Kills: PASS for a run whose log says that it is no attempt at a record, without that word."""
    log = Path(write(tmp_path / "a.txt", *ends(3.27)))
    why = "not a record attempt: unlike result #17, batch_tokens=256"
    log.write_text(log.read_text().replace(MACHINE, MACHINE + why + "\n"))
    status, out, _ = verify(capsys, str(log))
    assert status == 0 and f"\nnote: {why}\nPASS: " in out


def test_markdown(tmp_path, capsys):
    """Kills: a table without the step before the claim, or of another one; a row that calls FAIL a result; a run that
    was left out missing from the table."""
    log = write(tmp_path / "a.txt", "seed: 4\n", {0: 10.8, 3150: 3.281, 3175: 3.275, 3200: 3.27}, "seed: 5\n",
                {0: 10.8, 125: 4.6})
    status, out, _ = verify(capsys, log, "--markdown")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "| run | 3150 | 3175 | 3200 |"
    assert lines[2] == "| seed 4 | 3.28100 | 3.27500 | 3.27000 |"
    assert lines[3] == "| seed 5 |" + " stopped at step 125 of 3200 |" * 3
    assert lines[4] == "| **mean** | 3.281000 | 3.275000 | 3.270000 |" and lines[5] == "| **sd** | - | - | - |"
    assert lines[7] == "| **at least 0.004** | FAIL | PASS | PASS |"
    assert lines[-1] == "| | 3175 | 3.2750 (n=1)✓ | | | | |"
    status, out, _ = verify(capsys, write(tmp_path / "b.txt", *ends(3.29)), "--markdown")
    assert status == 1 and out.endswith("| | 3200 | 3.2900 (n=1) FAIL | | | | |\n")
    assert verify(capsys, write(tmp_path / "c.txt", {0: 10.8}), "--markdown")[1] == "FAIL: no run can be used\n"


def test_own_target(tmp_path, capsys):
    """Kills: 3.28 for every log; a default that is an expression refused, or evaluated as code."""
    assert target(OURS.encode()) == 3.0 and target(UPSTREAM.encode()) == 3.28
    for text, value in [("1 / 320", 1 / 320), ("8 * 64 * 1024", 524288), ("-(2 - 5)", 3)]:
        assert number(parse(text.encode()).body[0].value) == value
    with pytest.raises(ValueError, match="not a number"):
        target(b"class Hyperparameters:\n    target_loss: float = float(input())\n")
    status, out, _ = verify(capsys, write(tmp_path / "a.txt", *ends(2.99), source=OURS))
    assert status == 0 and "(n=1, target 3)" in out and "one run does not tell it" in out
    _, out, _ = verify(capsys, write(tmp_path / "b.txt", *ends(2.99, 2.97), source=OURS))
    assert "with its own, t = 2.00, p = 0.1\n" in out  # 0.02 * sqrt(2) / 0.01414, one degree of freedom: p = .148


def test_recipe_is_what_decides_the_result():
    """Kills: runs refused for a comment, a docstring, a literal seed or the micro-batch; runs
    pooled over another learning rate, or over a `micro_batch` that is no hyperparameter."""

    def same(old: str, new: str, source: str = OURS) -> bool:
        assert old in source
        return recipe(source.encode()) == recipe(source.replace(old, new).encode())

    assert same('"""Trains."""', '# trains\n')
    assert same('    """Ours."""\n', "")
    assert same("micro_batch: int = 64", "micro_batch: int = 8")
    assert same("SEED = 1", "SEED = 2", OURS + "SEED = 1\n")
    assert not same("1 / 320", "1 / 300")
    assert not same("return 0", "return 1")
    assert not same("micro_batch = 1", "micro_batch = 2", OURS + "micro_batch = 1\n")


@pytest.mark.parametrize(
    "what, source, other, losses",
    [
        ("programs", UPSTREAM, UPSTREAM + "lr = 1\n", {3000: 3.3, 3200: 3.27}),
        ("targets", UPSTREAM, OURS, {3000: 3.3, 3200: 3.27}),
        ("evaluated steps", UPSTREAM, UPSTREAM, {3100: 3.3, 3200: 3.27}),
        ("devices", UPSTREAM, UPSTREAM, {3000: 3.3, 3200: 3.27}),
    ],
)
def test_mixed_runs_are_refused(tmp_path, capsys, what, source, other, losses):
    """Kills: a mean over unlike runs; a refusal that `--mixed` does not lift; the looser of two
    targets; a step counted at which only some runs were evaluated."""
    a = write(tmp_path / "a.txt", {3000: 3.3, 3200: 3.271}, source=source)
    b = write(tmp_path / "b.txt", losses, source=other)
    if what == "devices":
        Path(b).write_text(Path(b).read_text().replace("on H100", "on A40"))
    on = (" on H100", " on A40") if what == "devices" else ("", "")
    reason = f"2 different {what}: 1{on[0]} as in {a} and 1{on[1]} as in {b}"
    assert verify(capsys, a, b) == (2, "", f"records: {reason}; --mixed looks anyway\n")
    status, out, _ = verify(capsys, "--mixed", a, b)
    assert status == (1 if what == "targets" else 0)
    assert f"mixed: {reason}\n" in out and out.splitlines()[-1].endswith("; mixed")
    assert all(line.split()[1] == "2" for line in out.splitlines() if line.startswith("   3"))


def test_repeated_curves_count_once(tmp_path, capsys):
    """Kills: a copied log, or a file named twice, counted as more evidence; two short runs of the
    same last digits taken for one."""
    a = write(tmp_path / "a.txt", *ends(3.279, 3.2785))
    b = write(tmp_path / "b.txt", *ends(3.2785, 3.2788))
    _, out, err = verify(capsys, a, b, a)
    assert "3 of 3 runs used" in out
    assert err == f"dropped: {b} trial 1 repeats {a} trial 2\n"
    c = write(tmp_path / "c.txt", {0: 10.82584, 3200: 3.279}, {0: 10.82584, 3200: 3.279})
    assert "2 of 2 runs used" in verify(capsys, c)[1]


def test_files_folders_and_globs(tmp_path, capsys):
    """Kills: a folder searched at its top only; what is no log skipped in silence, or fatal."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er" / "a.txt", *ends(3.27))
    write(tmp_path / "b.txt", *ends(3.271))
    stdout = tmp_path / "stdout.txt"
    stdout.write_text("step:3200/3200 val_loss:1.00000 train_time:480.0s\n")
    for names in [[str(tmp_path)], [str(tmp_path / "*.txt"), str(tmp_path / "deep")]]:
        status, out, err = verify(capsys, *names)
        assert status == 0 and "2 of 2 runs used" in out
        assert err == f"skipped: {stdout} is no log: it has no line of =\n"


def test_published_results_can_be_verified(capsys):
    """Kills: a published curve whose runs are not those of its claim, judged as if they were; a column misread. #1-3
    fail by upstream's own admission; the others with a curve pass at the claimed step."""
    outcomes = {}
    for record, result in published.results().items():
        status, out, err = verify(capsys, str(record), "--all")
        outcomes.setdefault("refused" if status == 2 else row(out, result.step)[5], []).append(record)
        assert status == 2 or abs(float(row(out, result.step)[2]) - result.mean) < 2e-4  # #8's own logs say .00018 more
    assert outcomes["refused"] == [41]  # one run of the 20 that it claims is public
    assert outcomes["FAIL"] == [1, 2, 3]
    assert len(outcomes["PASS"]) == 42
    assert main(["verify", "47"]) == 2 and "they are 1 to 46" in capsys.readouterr().err


@pytest.mark.parametrize("record", [6, 10, 17, 36])
def test_published_moments_are_those_of_the_curves(record):
    """Kills: a column of the table read as another; figures of other runs. The table has five decimals."""
    runs, table = published.curves(record).values(), published.moments(record)[1]
    for step, at in table.items():
        assert at == pytest.approx(Moments.of([run[step] for run in runs]), abs=6e-6)


def test_list(tmp_path, capsys):
    """Kills: groups made by folder instead of by program and device; a folder of which one group cannot be judged,
    given up whole; a crash over a log whose only curve is another's; the published table without all of its 46 rows."""
    a, b, c, d, e = ends(3.27, 3.271, 3.29, 3.28, 3.272)
    write(tmp_path / "a.txt", a)
    write(tmp_path / "b.txt", b)
    write(tmp_path / "c.txt", c, source=OURS)
    moved = write(tmp_path / "d.txt", d)
    Path(moved).write_text(Path(moved).read_text().replace("on H100", "on A40"))
    write(tmp_path / "e.txt", {1: 3.0}, e, source=UPSTREAM + "lr = 1\n")
    write(tmp_path / "z.txt", a)  # a copy
    assert main(["list", str(tmp_path), "--json"]) == 0
    groups = {Path(g["first"]).name: g for g in json.loads(capsys.readouterr().out)["groups"]}
    figures = {name: (g["runs"], g["used"], g.get("passes")) for name, g in groups.items()}
    assert figures == {"a.txt": (2, 2, True), "c.txt": (1, 1, False), "d.txt": (1, 1, False), "e.txt": (2, 1, True)}
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert sum(bool(re.match(r" *\d+  +\d{4}[! ] 3\.2", line)) for line in out.splitlines()) == 46
    assert "tiny/" in out


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff\xfe" * 99, b"\x00\n" + RULE.encode(), b"no program\n" + RULE.encode(),
     RULE.encode(), b"step:0/1 val_loss:1 \n", b"\xff\n" + RULE.encode(), None],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["verify", "extract"])
def test_unusable_input(tmp_path, capsys, verb, content):
    """Kills: a traceback, more than one line, or an exit code that reads as a verdict."""
    path = tmp_path / "x.txt"
    if content is not None:
        path.write_bytes(content)
    assert main([verb, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(path) in err


def test_empty_folder_is_unusable(tmp_path, capsys):
    """Kills: a verdict, or an IndexError, on no file at all."""
    assert verify(capsys, str(tmp_path)) == (2, "", f"records: no .txt in {tmp_path}\n")


@pytest.mark.parametrize("source", [OURS, OURS + "\n\n", OURS.replace("\n", "\r\n"), "a = 'é'\n"])
def test_extract_is_byte_exact(tmp_path, capsysbinary, source):
    """Kills: a newline lost, added or translated; a short rule inside the program taken for the
    end of it."""
    source += "# " + "=" * 60 + "\n" + "s = '''\n=====\n'''\n"
    log = write(tmp_path / "a.txt", *ends(3.27), source=source)
    assert main(["extract", log]) == 0
    assert capsysbinary.readouterr().out == source.encode()
    copy = tmp_path / "train_gpt.py"
    assert main(["extract", log, "-o", str(copy)]) == 0
    assert copy.read_bytes() == source.encode()


def test_extract_overwrites_nothing(tmp_path, capsys):
    """Kills: `-o` over a program that somebody is working on."""
    log = write(tmp_path / "a.txt", *ends(3.27))
    mine = tmp_path / "train_gpt.py"
    mine.write_text("precious")
    assert main(["extract", log, "-o", str(mine)]) == 2
    assert mine.read_text() == "precious" and str(mine) in capsys.readouterr().err


def test_desk_needs_the_standard_library_only(tmp_path):
    """Kills: an import of torch or numpy, by which the desk no longer starts on a laptop; a status
    that `python -m records` does not pass on."""
    log = write(tmp_path / "a.txt", *ends(3.279))
    code = (
        "import sys; from records.__main__ import main; main(sys.argv[1:]);"
        "sys.exit(bool({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, "verify", log], cwd=ROOT)
    assert run.returncode == 0
    run = subprocess.run([sys.executable, "-m", "records", "verify", log], cwd=ROOT)
    assert run.returncode == 1
