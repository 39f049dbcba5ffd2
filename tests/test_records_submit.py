"""submit: from logs to the folder of a result. Every test was seen to fail."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from test_records import MACHINE, OURS, RULE, UPSTREAM, curve, write

from records import published
from records.__main__ import main
from records.submit import BLANK

STAGE = '''@stage(average=whole)
def smooth(U, average, beta: BelowOne = 0.9):
    """U <- the running mean of the updates."""
    average = beta * average + (1 - beta) * U
    return average, average
'''
PROGRAM = OURS.replace("3 * 1.0", "3.28\n    matrix_update: str = 'nesterov(0.95) | smooth(0.5) | step'") + STAGE
CURVES = [{step: round(loss - 0.003, 5) for step, loss in run.items()} for run in published.curves(17).values()]


def upstream_reads(readme: str, results: Path) -> dict[int, tuple[int, str, dict[int, float]]]:
    """The contract of upstream's make_figures.py: {number: (steps, evidence, mean by step)} of a table's rows of seven
    cells, over every .txt of the folder of the row's log, where a trial begins at each step 0."""
    found = {}
    for line in readme.splitlines():
        if line.startswith("| ") and line[2:3].isdigit():
            number, steps, evidence, _, _, link, _ = (cell.strip() for cell in line.strip().strip("|").split("|"))
            folder = (results.parent / re.search(r"\[log\]\((results/[^)]+)\)", link)[1]).parent
            losses: dict[int, list[float]] = {}
            for path in folder.glob("*.txt"):
                for step, loss in re.findall(r"step:(\d+)/\d+\s+val_loss:([0-9.]+)", path.read_text()):
                    losses.setdefault(int(step), []).append(float(loss))
            found[int(number)] = (int(re.match(r"\d+", steps)[0]), evidence,
                                  {step: sum(at) / len(at) for step, at in losses.items()})
    return found


def attempt(folder: Path, seeds=range(6), source: str = PROGRAM, machine: str = "H100") -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = [write(folder / f"run-{seed}.txt", f"seed: {seed}\n", CURVES[seed], source=source) for seed in seeds]
    for path in map(Path, paths):
        path.write_text(path.read_text().replace("on H100", f"on {machine}"))
    return paths


def submit(capsys, place: Path, *words: str) -> tuple[int, str, str, Path | None]:
    status = main(["submit", "--name", "smooth", "-o", str(place), *words])
    made = [path for path in place.iterdir() if path.name.endswith("_smooth")]
    assert len(made) == (status == 0) and not list(place.glob(".*"))
    return status, *capsys.readouterr(), made[0] if made else None


@pytest.fixture
def drawn(monkeypatch):
    """What figures are asked for, without the second that drawing them takes."""
    calls = []
    monkeypatch.setattr("records.submit.plot_apart", lambda *arguments: calls.append(arguments))
    return calls


def ledger_line(source: str, **values) -> str:
    run = {"line": "run", "name": "a", "overrides": [], "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
           "metric": "val_loss", "seed": 0, "fork": "", "status": "crashed", "why": "out | of memory", "log": "",
           "step": 0, "loss": None, "device": "H100", "world": 8, "seconds": 1.0, "time": "2026-11-26T00:00:00Z"}
    return json.dumps(run | values) + "\n"


def test_a_whole_attempt(tmp_path, capsys):
    """Kills: runs of the program beside the named one left out; a killed, a tuned and a crashed run unmentioned, or in
    the mean; a log of another program in the folder; a log that upstream would average and that does not count; a row
    that upstream's parser does not read, or reads as another claim; a new stage without its source."""
    pytest.importorskip("matplotlib")
    logs = attempt(tmp_path / "logs", range(7))
    Path(logs[6]).write_text(Path(logs[6]).read_text().split("step:2000/")[0])
    write(tmp_path / "logs" / "early.txt", "seed: 8\n", {s: loss for s, loss in CURVES[8].items() if s <= 3000},
          source=PROGRAM)  # of nine tenths: it counts, though not at the claimed step
    write(tmp_path / "logs" / "tuned.txt", "seed: 9\n", CURVES[9], source=PROGRAM)
    write(tmp_path / "logs" / "other.txt", "seed: 0\n", CURVES[10], source=PROGRAM.replace("0.5", "0.6"))
    (tmp_path / "logs" / "notes.txt").write_text("not a log")
    ledger = tmp_path / "sweep.jsonl"
    ledger.write_text(ledger_line(PROGRAM, seed=11) + ledger_line(PROGRAM, seed=12, fork="step 8 of a.checkpoint")
                      + ledger_line(UPSTREAM, seed=13) + ledger_line(PROGRAM, seed=1, log="logs/run-1.txt"))
    place = tmp_path / "results"
    place.mkdir()
    status, out, err, folder = submit(capsys, place, logs[0], "--tuning-seeds", "9", "--ledger", str(ledger))
    assert status == 0 and err.count("ran the same program: ") == 8
    names = {f"run-{seed}.txt" for seed in range(6)} | {"early.txt"}
    assert {path.name for path in folder.glob("*.txt")} == names
    assert {path.name for path in (folder / "not_counted").iterdir()} == {"run-6.txt", "tuned.txt"}
    assert all((folder / name).read_bytes() == (tmp_path / "logs" / name).read_bytes() for name in names)
    assert (folder / "train_gpt.py").read_text() == PROGRAM
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("figure.png", "zoomed_figure.png"))

    readme = (folder / "README.md").read_text()
    mean = sum(run[3150] for run in CURVES[:6]) / 6
    statistic = f"n=6; (3.28 - mean) sqrt(n) = {(3.28 - mean) * 6**0.5:.5f} >= 0.004: **PASS**"
    assert f"Step 3150: mean `val_loss` {mean:.6f}, {statistic}" in readme
    assert f"| seed 5 | {CURVES[5][3125]:.5f} | {CURVES[5][3150]:.5f} |" in readme
    assert "| run-6.txt | 6 | - | stopped at step 1875 of 3200 |" in readme
    assert "6 runs count; 5 more" in readme and "| early.txt | 8 | - | stopped at step 3000 of 3200 |" in readme
    assert f"| tuned.txt | 9 | {CURVES[9][3150]:.5f} | its seed was used for tuning |" in readme
    assert r"| - | 11 | - | crashed: out \| of memory |" in readme and "| - | 12 | - | a fork of step 8" in readme
    assert "| 13 |" not in readme and readme.count("run-1.txt") == 0
    assert f"With the 1 of them that came to step 3150: mean {(6 * mean + CURVES[9][3150]) / 7:.6f}, n=7" in readme
    assert STAGE.strip() in readme and "matrix_update: nesterov(0.95) | smooth(0.5) | step" in readme
    assert "## Against " in readme and "  smooth(0.5)" in readme and "unchanged  target_loss" in readme
    assert out.count("\n") == 2 and f"{readme.count(BLANK)} blanks" in out and str(tmp_path) not in readme
    (_, (steps, evidence, means)), = upstream_reads(readme, place).items()
    assert (steps, evidence) == (3150, f"{mean:.4f} (n=6)✓") and means[3150] == pytest.approx(mean, abs=1e-9)
    assert f"p-value vs. #{published.best().record}" in readme  # at 3150 steps it is no better
    assert "(!)" not in readme and "make_figures" not in readme


@pytest.mark.parametrize("words, said", [
    (["LOGS", "OTHER", "--tuning-seeds", "7"], "2 different programs"), (["LOGS", "A40"], "--hardware 'WHY'"),
    (["LOGS", "--tuning-seeds", "7"], "--tuning-seeds 7: no run"),
    (["LOG", "--tuning-seeds", *"012345"], "no run is left"),
    (["LOGS", "--ledger", "LEDGER"], "seed 8 has finished, and its log logs/gone.txt is not here"),
    (["LOGS", "--ledger", "DIVERGED"], "seed 8 has failed, and its log (of no name) is not here"),
    (["LOGS", "--ledger", "LOG"], "no line of a ledger"), (["LOGS", "--against", "99"], "no published result 99"),
    (["LOGS", "--base", "@nothing"], "no recipe of that name"), (["NOTES"], "no log"), (["LOGS", "SAME"], "two logs"),
    (["LOGS", "--name", "../x"], "--name '../x'"), (["LOGS", "--name", "a\nb"], "--name 'a\\nb'"),
    (["LOGS", "-o", "NOWHERE"], "no such folder")])
def test_what_reviewers_refuse(tmp_path, capsys, drawn, words, said):
    """Kills: programs or kinds of GPU pooled in silence; a seed that is known to have finished or diverged left out of a
    mean; a traceback or a part of a folder for what a person mistypes."""
    logs = attempt(tmp_path / "logs")
    (other := tmp_path / "other").mkdir()
    (ledger := tmp_path / "l.jsonl").write_text(ledger_line(PROGRAM, seed=8, status="finished", loss=3.27, why="",
                                                            log="logs/gone.txt"))
    (diverged := tmp_path / "d.jsonl").write_text(ledger_line(PROGRAM, seed=8, status="failed"))
    files = {"LOGS": str(tmp_path / "logs"), "LOG": logs[0], "LEDGER": str(ledger), "DIVERGED": str(diverged),
             "NOWHERE": str(tmp_path / "no"), "NOTES": str(tmp_path / "notes.txt"),
             "OTHER": write(other / "x.txt", "seed: 7\n", CURVES[7], source=UPSTREAM),
             "A40": attempt(tmp_path / "a40", [7], machine="A40")[0],
             "SAME": write(other / "run-0.txt", "seed: 6\n", CURVES[6], source=PROGRAM)}
    (tmp_path / "notes.txt").write_text("no log")
    (place := tmp_path / "results").mkdir()
    status, out, err, _ = submit(capsys, place, *(files.get(word, word) for word in words))
    errors = [line for line in err.splitlines() if not line.startswith("ran the same program")]
    assert status == 2 and out == "" and len(errors) == 1 and said in errors[0]
    assert list(place.iterdir()) == []


def test_no_record_no_folder(tmp_path, capsys, drawn):
    """Kills: a folder for runs that fail the rule, or of which one diverged; an exit code that reads as a record."""
    logs = attempt(tmp_path / "logs")
    (place := tmp_path / "results").mkdir()
    Path(logs[0]).write_text(Path(logs[0]).read_text() + "failed: the validation loss is nan\n")
    status, out, _, _ = submit(capsys, place, logs[1])
    assert status == 1 and "1 of 6 runs diverged" in out and "no folder is made" in out
    for path in logs:
        text = Path(path).read_text().replace("val_loss:3.2", "val_loss:3.3").replace("failed:", "note:")
        Path(path).write_text(text)
    status, out, _, _ = submit(capsys, place, *logs)
    assert status == 1 and "FAIL: no step passes" in out


def test_whole_or_not_at_all(tmp_path, capsys, drawn, monkeypatch):
    """Kills: an existing folder written into; a half-written one that stays where the disk is full."""
    attempt(tmp_path / "logs")
    (place := tmp_path / "results").mkdir()

    def full(*arguments):
        raise OSError(28, "No space left on device", "figure.png")
    with monkeypatch.context() as patch:
        patch.setattr("records.submit.plot_apart", full)
        status, _, err, _ = submit(capsys, place, str(tmp_path / "logs"))
        assert status == 2 and "no space left" in err and list(place.iterdir()) == []
    _, _, _, folder = submit(capsys, place, str(tmp_path / "logs"))
    (folder / "README.md").write_text("mine")
    assert main(["submit", str(tmp_path / "logs"), "--name", "smooth", "-o", str(place)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine" and list(place.iterdir()) == [folder]


def test_repeated_seeds_and_several_devices(tmp_path, capsys, drawn):
    """Kills: two runs of one seed counted as two; the better one chosen; a run that nobody named taken from another
    kind of GPU; mixed hardware that README is silent on; a copy that is left out without a word."""
    logs = attempt(tmp_path / "logs")
    write(tmp_path / "logs" / "their-copy.txt", "seed: 1\n", CURVES[1], source=PROGRAM)
    write(tmp_path / "logs" / "run-0-again.txt", "seed: 3\n", CURVES[12], source=PROGRAM)  # sorts before run-3
    other = attempt(tmp_path / "a40", [7], machine="A40")[0]
    Path(other).rename(beside := tmp_path / "logs" / "run-7.txt")
    (place := tmp_path / "results").mkdir()
    _, _, err, folder = submit(capsys, place, logs[0])
    assert re.search(r"^dropped: .*their-copy.txt repeats .*run-1.txt$", err, re.MULTILINE)
    readme = (folder / "README.md").read_text()
    step = int(re.search(r"Step (\d+)", readme)[1])
    assert f"| run-3.txt | 3 | {CURVES[3][step]:.5f} | its seed has counted, in run-0-again.txt |" in readme
    assert "| run-7.txt | 7 |" in readme and "ran on A40" in readme and "n=6" in readme
    main(["submit", logs[0], str(beside), "--hardware", "one of each was free", "--name", "both", "-o", str(place)])
    readme = next(place.glob("*_both/README.md")).read_text()
    assert "Mixed hardware: one of each was free" in readme and "n=7" in readme
    assert re.search(r"- on A40: mean 3\.\d+, n=1\n", readme)


def test_what_upstream_would_draw(tmp_path, capsys, drawn):
    """Kills: silence where upstream's make_figures.py draws another loss than the claimed one."""
    source = PROGRAM.replace("target_loss", "metric: str = 'val_ema_loss'\n    target_loss")
    folder = tmp_path / "logs"
    folder.mkdir()
    for seed in range(4):
        lines = curve({step: loss + 0.004 for step, loss in CURVES[seed].items()}).splitlines()
        text = "".join(re.sub(r"(val_loss:\S+)", rf"\1 val_ema_loss:{loss:.5f}", line) + "\n"
                       for line, loss in zip(lines, CURVES[seed].values()))
        (folder / f"{seed}.txt").write_text(source + RULE + MACHINE + RULE + f"seed: {seed}\n" + text)
    (place := tmp_path / "results").mkdir()
    _, _, _, made = submit(capsys, place, str(folder))
    readme = (made / "README.md").read_text()
    (_, (steps, _, means)), = upstream_reads(readme, place).items()
    assert f"`val_ema_loss` {means[steps] - 0.004:.6f}" in readme
    assert f"at step {steps} it draws {means[steps]:.5f} (n=4), which is not the claim" in readme


def test_damaged_attempts(tmp_path, capsys, drawn):
    """Kills: a traceback; a folder whose logs, as upstream reads them, do not pass the rule as README says they do."""
    draw, place, made = random.Random(0), tmp_path / "results", 0
    place.mkdir()
    for k in range(25):
        folder = tmp_path / f"logs{k}"
        for path in map(Path, attempt(folder, range(3))):
            lines = path.read_text().splitlines(keepends=True)
            for _ in range(draw.choice((0, 0, 1, 2))):
                at = draw.randrange(len(lines))
                lines[at:at + draw.randrange(3)] = draw.choice(
                    [[], [lines[at]] * 2, [lines[at][:9] + "\n"], ["|`_x`|\n"]])
            path.write_text("".join(lines)[:draw.choice((10**9, 10**9, draw.randrange(4000)))])
        status = main(["submit", str(folder), "--name", f"n{k}", "-o", str(place)])
        captured = capsys.readouterr()
        assert status in (0, 1, 2) and "Traceback" not in captured.err
        if status == 0:
            made += 1
            readme = next(place.glob(f"*_n{k}/README.md")).read_text()
            ((steps, evidence, means),) = upstream_reads(readme, place).values()
            n = int(re.search(r"n=(\d+)", evidence)[1])
            assert "not the claim" in readme or (3.28 - means[steps]) * n**0.5 >= 0.004
    assert 5 < made < 25
