"""The desk on upstream's public logs: small logs in every form that occurs there, with the published numbers."""

import json

import pytest
from test_records import MACHINE, RULE, UPSTREAM, curve, row, verify, write

from harness import arguments
from records import published
from records.__main__ import main
from records.log import NOT_NAMED, read
from records.statistics import Moments

TWO_LINES = "Running PyTorch 2.11.0+cu128 compiled for CUDA 12.8\nRunning on device_name={} with world_size={}\n"
H100 = TWO_LINES.format("NVIDIA H100 80GB HBM3", 8)
OTHER_GPU = {10: ("NVIDIA H200", 10), 34: ("NVIDIA H100 NVL", 2), 44: ("NVIDIA A40", 8)}  # on how many of its logs
OTHER_PROGRAM = {11: 4, 14: 2, 23: 10}  # how many runs: a learning rate; a log folder and a print; a second author's
FAILS = {1: "by upstream's own admission", 2: "the same", 3: "the same",
         16: "7 of its 8 runs are public without their program", 41: "1 of its 20 runs is public"}
METRIC = {46: "val_ema_loss"}


def runs(record: int) -> list[dict[int, float]]:
    """Validations at the claimed step, around it and at the end: of every run, or of as many as have the published
    mean and deviation."""
    claim, (_, moments) = published.result(record), published.moments(record)
    steps = sorted({*sorted(moments, key=lambda step: abs(step - claim.step))[:4], max(moments)})
    if known := published.curves(record):
        found = [{step: run[step] for step in steps if step in run} for run in known.values()]
    else:
        n = moments[claim.step].n
        around = [k - (n - 1) / 2 for k in range(n)]
        unit = Moments.of(around).sd or 1
        found = [{step: round(moments[step].mean + x / unit * (moments[step].sd or 0), 5) for step in steps}
                 for x in around]
    return found[:1] if record == 16 else found


def lines(record: int, run: dict[int, float], steps: int) -> str:
    text = ""
    for line, (step, loss) in zip(curve(run, steps).splitlines(), run.items()):
        text += {
            34: f"{line} extrap_count:5 extrap_rel:1.2e-05 handoff:none",
            42: f"{line} ema_beta:0.3000" + " ref_gamma:-0.0750 ref_step:2375" * (step >= 2850),
            46: line.replace(f"val_loss:{loss:.5f}", f"val_loss:{loss + 0.0041:.5f} val_avg_loss:3.5 "
                                                     f"val_ema_loss:{loss:.5f}"),
        }.get(record, line) + "\n"
    return text


@pytest.mark.parametrize("record", published.results())
def test_every_result_gets_upstreams_verdict(record, tmp_path, capsys):
    """Kills: result #42 called a FAIL, as `ref_step:` drops its last two validations; #16 unreadable, as a path follows
    its program; #44's, #34's and #10's two kinds of GPU taken for one, as upstream names them in a second form."""
    claim, (steps, _) = published.result(record), published.moments(record)
    gpu, others = OTHER_GPU.get(record, ("", 0))
    texts = [lines(record, run, steps) for run in runs(record)]
    texts += [lines(record, {step: loss + 1e-5 for step, loss in run.items()}, steps) for run in runs(44)[:8]
              ] if record == 44 else []
    for k, text in enumerate(texts):
        source = UPSTREAM + "lr = 1\n" * (k < OTHER_PROGRAM.get(record, 0))
        machine = TWO_LINES.format(gpu, 8) if k >= len(texts) - others else MACHINE if record % 2 else H100
        if record == 16:
            content = source + "/workspace/logs/6d5b12b0.txt\n" + RULE + text
        elif record in (6, 12, 17, 23):  # several runs in one log
            seed = f"trial:{k + 1}/{len(texts)} seed:{k + 1}\n" * (record == 23)
            content = source + RULE + machine + RULE + seed + text
        else:
            content = source + RULE + machine + f"Using seed={k}\n" + RULE + text
        (tmp_path / f"{k:02}.txt").write_text(content)
    metric = ["--metric", METRIC.get(record, "val_loss")]
    status, out, err = verify(capsys, str(tmp_path), "--all", *metric)
    kind = "devices" if gpu else "programs" if record in OTHER_PROGRAM else None
    if kind:
        assert status == 2 and f" different {kind}: " in err
        _, out, err = verify(capsys, str(tmp_path), "--all", "--mixed", *metric)
    assert err == ""
    if record == 44:
        _, out, _ = verify(capsys, str(tmp_path / "[01]*.txt"), "--all", *metric)
    figures = row(out, claim.step)
    assert figures[5] == ("FAIL" if record in FAILS else "PASS")
    if record not in (16, 41):
        assert int(figures[1]) == claim.n and abs(float(figures[2]) - claim.mean) < 2e-4  # #8's logs say .00018 more


@pytest.mark.parametrize("header, device, world", [
    ("Running PyTorch 2.7.1 compiled for CUDA 12.8 on NVIDIA H800           with world_size 8\n", "NVIDIA H800", 8),
    (TWO_LINES.format("NVIDIA GH200 480GB", 1), "NVIDIA GH200 480GB", 1),
    ("Running PyTorch 2.10.0 compiled for CUDA 12.8\n| GPU  Name                 Persistence-M |\n"
     "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |                    0 |\n",
     "NVIDIA H100 80GB HBM3", 0),
    ("nvidia-smi not found. Using library functions instead.\n"
     "0   NVIDIA H100 80GB HBM3     35    117        6340            81559           0     %\n",
     "NVIDIA H100 80GB HBM3", 0),
    ("Running PyTorch 2.10.0+cu128 compiled for CUDA 12.8\n", NOT_NAMED, 0)])
def test_where_it_ran(tmp_path, capsys, header, device, world):
    """Kills: 231 public logs without a device; two unlike names of one; silence where none is named."""
    path = tmp_path / "a.txt"
    path.write_text(UPSTREAM + RULE + header + RULE + curve({0: 10.8, 3200: 3.27}))
    assert (read(path).trials[0].device, read(path).trials[0].world) == (device, world)
    out = verify(capsys, str(path))[1]
    assert out.count(f"1 on {device}" + f", world_size {world}" * (world > 0) + "\n") == 1
    path.write_text(UPSTREAM + RULE + header + curve({0: 10.8, 3200: 3.27}))  # one line of =, as #19's
    assert read(path).trials[0].device == device


@pytest.mark.parametrize("line", [
    "step:3200/3200 val_loss:3.27", "step:3200/3200 val_loss:3.2e0 train_time:1s",
    "[rank0] step:3200/3200 val_loss:3.27 train_time:1s", "step:3190/3200 train_time:1step:3200/3200 val_loss:3.2 a:1"])
def test_no_loss_is_left_out_without_a_word(tmp_path, capsys, line):
    """Kills: a line with a step and a loss that is not understood, passed over in silence."""
    path = write(tmp_path / "a.txt", {0: 10.8, 3000: 3.29}, line + "\n", line + "\n")
    status, out, err = verify(capsys, path, "--mixed")
    assert status == 1 and err == f"skipped: {path}: no whole loss in the line {line!r} and 1 more\n"
    assert read(write(tmp_path / "b.txt", {0: 10.8, 3200: 3.27})).unread == []


def test_a_line_after_the_program(tmp_path, capsysbinary):
    """Kills: a log refused for the path that follows its program; that path taken for a part of it; a program that is
    cut off inside a statement taken for a whole one."""
    path = tmp_path / "a.txt"
    path.write_text(UPSTREAM + "/workspace/logs/6d5b12b0.txt\n" + RULE + curve({0: 10.8, 3200: 3.27}))
    assert main(["extract", str(path)]) == 0 and capsysbinary.readouterr().out == UPSTREAM.encode()
    path.write_text("def f():\n    x = 1\n    return (x\n" + RULE + curve({0: 10.8, 3200: 3.27}))
    assert main(["extract", str(path)]) == 2


BANNER = "-" * 40
TRACK_1 = """import torch
class Hyperparameters:
    train_batch_size: int = 2048 * 16 * 8
    num_iterations: int = 1480
model = torch.nn.Linear(768, 50304)
"""
TRACK_1_LINES = "".join(f"step:{step}/1480 val_loss:{3.27 + (1480 - step) * 0.002:.4f} train_time:{step * 158}ms "
                        "step_avg:158.00ms\n" for step in range(0, 1481, 185))


@pytest.mark.parametrize("head", [
    TRACK_1, f"{TRACK_1}\n\n{BANNER}\n# triton_kernels.py\n{BANNER}\n\nimport triton\n", RULE + TRACK_1])
def test_another_track(tmp_path, capsys, head):
    """Kills: 1,108 logs of track 1 unreadable, as a second file stands below a banner or a line of = at their head; a
    PASS at its step 1480, a comparison with it or a plan made by the rule of this track."""
    path = tmp_path / "a.txt"
    path.write_text(head + RULE + MACHINE + RULE + TRACK_1_LINES)
    assert read(path).source == head.removeprefix(RULE).encode() and read(path).trials[0].losses[1480] == 3.27
    status, out, _ = verify(capsys, str(path))
    assert status == 1 and row(out, 1480)[-2:] == ["-", "-"] and "p = " not in out
    assert out.splitlines()[-1].startswith("NO VERDICT: not a program of this track (track: class Hyperparameters")
    assert "| - |" in verify(capsys, str(path), "--markdown")[1]
    assert json.loads(verify(capsys, str(path), "--json")[1])["steps"][-1]["passes"] is False
    for words in (["compare", str(path), "17"], ["compare", "17", str(path)]):
        assert main(words) == 1
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"NO VERDICT on A and B: {path} is not a program")
    assert main(["plan", str(path)]) == 2 and "not a program of this track" in capsys.readouterr().err
    assert main(["lint", str(path)]) == 1
    out = capsys.readouterr().out
    assert "changed    track: " in out and "changed    tokens a step: train_batch_size = 2048 * 16 * 8" in out
    assert main(["list", str(path)]) == 0 and "PASS" not in capsys.readouterr().out


SECTION = "#" * 40
MODEL = f"{SECTION}\n#{'Architecture':^38}#\n{SECTION}\nclass GPT:\n    width = 1024\n"
OUR_FIELDS = "class Hyperparameters:\n    target_loss: float = 3.28\n"


@pytest.mark.parametrize("source, why", [
    ("batch_size = 8 * 48 * 1024\n", "tokens a step: batch_size = 8 * 48 * 1024, the rules' is 524288"),
    ("batch_size = 8 * 64 * 1024\nbatch_size = 2 * 524288\n", "tokens a step: batch_size #2 = 2 * 524288"),
    ("val_tokens = 10485760 // 2\nval_tokens = 1024\n", "validation tokens: "),
    ("def distributed_data_generator(pattern, batch, seq_len=2048): pass\n", "sequence length: "),
    ("model = GPT(vocab_size=50304, num_layers=24, model_dim=768).cuda()\n", "num_layers: GPT(num_layers) = 24"),
    ("load('data/finewebedu10B/finewebedu_train_*.bin')\n", "shards: reads data/finewebedu10B/finewebedu_train_*.bin"),
    (MODEL, "model: its section"), (OUR_FIELDS + "    model_dim: int = 1024\n", "model_dim: model_dim = 1024"),
    (OUR_FIELDS + "    batch_tokens: int = 262144\n", "tokens a step: batch_tokens = 262144")])
def test_what_lint_knows_is_heeded(tmp_path, capsys, source, why):
    """Kills: a PASS, or `consistent`, for runs whose data, batch or architecture `lint` calls changed."""
    losses = published.curves(17)[1]
    path = write(tmp_path / "a.txt", losses, {step: loss - 0.001 for step, loss in losses.items()}, source=source)
    status, out, _ = verify(capsys, path)
    assert status == 1 and f"\nNO VERDICT: not a program of this track ({why}" in out
    assert main(["reproduce", path]) == 1
    assert f"\nNO: not a program of this track ({why}" in capsys.readouterr().out
    assert main(["lint", path]) == 1


@pytest.mark.parametrize("source", [
    "batch_size = 8 * 64 * 1024\nval_tokens = 20 * 524288\nGPT(vocab_size=50304, num_layers=12, model_dim=768)\n",
    "# not 'data/other.bin'\nload('/elsewhere/fineweb_train_*.bin')\n", "batch_size = int(os.environ['B'])\n",
    "def f():\n    batch_size = 2\n", OUR_FIELDS.replace("3.28", "3.5") + "    model_dim: int = 64\n"])
def test_what_is_unchanged_is_judged(tmp_path, capsys, source):
    """Kills: a verdict withheld for a value that the source does not tell, a name inside a function, a comment, a
    folder, or from a recipe with a target of its own."""
    path = write(tmp_path / "a.txt", {0: 10.8, 3200: 3.27}, source=source)
    assert verify(capsys, path)[0] == 0


def test_plan_prices_the_gpus_that_the_log_names(tmp_path, capsys):
    """Kills: 8 GPUs priced as one."""
    path = write(tmp_path / "a.txt", {0: 10.8, 3200: 3.27})  # 480 s on 8
    main(["plan", path, "--price", "3"])
    out = capsys.readouterr().out
    assert "a run trains for 480 s on 8 GPUs\n" in out
    assert next(line.split() for line in out.splitlines() if line.startswith("  10 "))[-1] == "32.00"
    main(["plan", path, "--price", "3", "--gpus", "1"])
    assert "480 s on 1 GPU\n" in capsys.readouterr().out


def test_a_metric_is_not_another(tmp_path, capsys):
    """Kills: raw losses held against result #46's claim, which is of averaged weights, without a word; its claim at
    2690 said of its raw losses, which pass at 2735; a metric that #44 has not, in silence."""
    path = write(tmp_path / "a.txt", {0: 10.8, 2690: 3.28, 3200: 3.27})
    assert main(["reproduce", path, "--of", "46"]) == 2
    assert capsys.readouterr().err == (
        f"records: {path}: no line has a val_ema_loss; --metric val_loss reads what it has\n")
    assert main(["reproduce", path, "--of", "44", "--metric", "val_ema_loss"]) == 2
    assert verify(capsys, "46")[1].startswith("8 of 8 runs used, target 3.28 of val_ema_loss\n")
    assert "PASS: 2735 is the earliest step to pass" in verify(capsys, "46", "--metric", "val_loss")[1]
    said = verify(capsys, "44", "--metric", "val_ema_loss")[1]
    assert "note: #44 has no val_ema_loss: this is its val_loss\n" in said


CLAIMING = UPSTREAM + "class Hyperparameters:\n    metric: str = '{}'\n    target_loss: float = 3.28\n"


def both(raw: dict[int, float], claimed: dict[int, float], steps: int) -> str:
    """Lines as our trainer and upstream's write them where a model is evaluated twice."""
    return "".join(f"{line} val_ema_loss:{claimed[step]:.5f}{colon}{rest}\n" if step in claimed else line + "\n"
                   for step, whole in zip(raw, curve(raw, steps).splitlines())
                   for line, colon, rest in [whole.partition(" train_time:")])


@pytest.mark.parametrize("record, step", [(20, 3030), (29, 2990), (30, 2930), (40, 2890), (42, 2860), (44, 2750),
                                          (45, 2720), (46, 2690)])
def test_logs_of_the_published_curves(record, step, tmp_path, capsys):
    """Kills: a step that no run was claimed at, one late or early; raw losses for the metric that the program claims,
    which no word on the command line names; a result whose own curves are not here."""
    steps, runs = published.moments(record)[0], published.curves(record)
    metric = published.METRICS.get(record, "val_loss")
    for seed, claimed in runs.items():
        raw = published.curves(record, "val_loss")[seed]
        lines = both(raw, claimed, steps)
        write(tmp_path / f"{seed:02}.txt", f"seed: {seed}\n", lines, source=CLAIMING.format(metric))
    logs = str(tmp_path)
    status, out, err = verify(capsys, logs, "--all")
    assert (status, err) == (0, "") and f"PASS: {step} is the earliest step to pass" in out
    assert int(row(out, step)[1]) == published.result(record).n == len(runs)
    assert main(["reproduce", logs, "--of", str(record)]) == 0
    assert f"CONSISTENT with #{record}: off by 0.0000" in capsys.readouterr().out
    for words in (["compare", logs, str(record)], ["plan", logs]):
        main(words)
        assert f"{step}" in capsys.readouterr().out
    if record == 46:
        assert main(["list", logs]) == 0 and " (of its val_ema_loss)\n" in capsys.readouterr().out
        assert "PASS: 2735 is" in verify(capsys, logs, "--metric", "val_loss")[1]
        assert main(["reproduce", logs, "--of", "46", "--metric", "val_loss"]) == 0


def test_our_runs_of_result_45(tmp_path, capsys):
    """Kills: runs of the recipe, which print their blend as val_ema_loss and claim that, refused or held raw against
    #45's blend, which its program prints as val_loss; an empty cell of its curves read as a loss; upstream's own logs,
    or a run that claims val_ema_loss held against a result that has none, refused for it."""
    blends, printed = published.curves(45, "val_ema_loss"), published.curves(45, "val_loss")
    for folder in ("ours", "upstream"):
        (tmp_path / folder).mkdir()
    for seed, run in printed.items():
        raw = {step: loss + 0.004 * (step == 2720) for step, loss in run.items()}
        shown = {step: loss - 0.004 * (2000 < step < 2720) for step, loss in run.items()}
        assert {step: shown[step] for step in blends[seed]} == blends[seed]
        write(tmp_path / f"ours/{seed:02}.txt", f"seed: {seed}\n", both(raw, shown, 2900),
              source=CLAIMING.format("val_ema_loss"))
        write(tmp_path / f"upstream/{seed:02}.txt", f"seed: {seed}\n", curve(run, 2900))
    for words in (["ours"], ["upstream"], ["upstream", "--metric", "val_loss"]):
        assert main(["reproduce", str(tmp_path / words[0]), "--of", "45", *words[1:]]) == 0, words
        assert "CONSISTENT with #45: off by 0.0000" in capsys.readouterr().out
    assert main(["reproduce", str(tmp_path / "ours"), "--of", "45", "--metric", "val_loss"]) == 1
    assert "WORSE than #45 by 0.0040" in capsys.readouterr().out
    assert main(["reproduce", str(tmp_path / "ours"), "--of", "44"]) == 0  # raw, as far as 2700
    assert "CONSISTENT with #44" in capsys.readouterr().out


@pytest.mark.parametrize("value, says", [
    ("'val_ema_loss'", "no line has a val_ema_loss, which its program claims; --metric val_loss reads what it has"),
    ("len('x')", "Hyperparameters.metric is no name: len('x')"), ("'.*'", "Hyperparameters.metric is no name: '.*'")])
def test_a_claim_without_its_losses(tmp_path, capsys, value, says):
    """Kills: 'no run can be used' for a log whose lines lack what its program claims; raw losses in its place; a name
    that is computed, or a pattern, taken for one."""
    path = write(tmp_path / "a.txt", {0: 10.8, 2900: 3.27}, source=CLAIMING.replace("'{}'", value))
    assert verify(capsys, path)[::2] == (2, f"records: {path}: {says}\n")


def test_two_metrics_are_not_one_sample(tmp_path, capsys):
    """Kills: the mean of raw losses and of averaged weights'."""
    for name, metric in (("a", "val_loss"), ("b", "val_ema_loss")):
        lines = both({0: 10.8, 3200: 3.27}, {0: 10.8, 3200: 3.26 - len(metric) / 1e4}, 3200)
        write(tmp_path / f"{name}.txt", lines, source=CLAIMING.format(metric))
    status, _, err = verify(capsys, str(tmp_path))
    assert status == 2 and err.startswith("records: 2 different metrics: 1 as in ")


@pytest.mark.parametrize("words", [["lint", "17"], ["extract", "17"], ["diff", "17", "18"]])
def test_figures_are_no_programs(words, capsys):
    """Kills: 'no such file' for a number that the other verbs take."""
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "records: 17: of published results the figures are here, not the programs: name a log or a .py file\n")


def test_the_program_of_a_folder(tmp_path, capsysbinary):
    """Kills: '[Errno 21] Is a directory'; the first of several programs taken for all."""
    (tmp_path / "notes.txt").write_text("no log\n")
    write(tmp_path / "a.txt", {0: 10.8})
    write(tmp_path / "b.txt", {0: 10.9})
    assert main(["extract", str(tmp_path)]) == 0 and capsysbinary.readouterr().out == UPSTREAM.encode()
    assert main(["diff", str(tmp_path), str(tmp_path / "*.txt")]) == 0 and main(["lint", str(tmp_path)]) == 1
    write(tmp_path / "c.txt", {0: 10.8}, source=UPSTREAM + "lr = 1\n")
    capsysbinary.readouterr()
    assert main(["lint", str(tmp_path)]) == 2
    assert b"holds logs of 2 different programs" in capsysbinary.readouterr().err


@pytest.mark.parametrize("words, says", [
    (["report", "-o", "DIR"], "-o DIR is a folder: name a file in it"),
    (["plot", "17", "-o", "DIR/none/a.png"], "-o DIR/none/a.png: there is no folder DIR/none"),
    (["extract", "DIR/a.txt", "-o", "DIR/a.txt"],
     "-o DIR/a.txt is there already, and is not overwritten: name another file"),
    (["lint", "DIR/none.py"], "DIR/none.py: no such file or directory"),
    (["diff", "DIR/a.txt", "DIR/none.txt"], "DIR/none.txt: no such file or folder")])
def test_errors_are_words(tmp_path, capsys, words, says):
    """Kills: an [Errno ..]; a .part, which nobody named and which stays behind."""
    write(tmp_path / "a.txt", {0: 10.8})
    assert main([word.replace("DIR", str(tmp_path)) for word in words]) == 2
    assert capsys.readouterr().err == f"records: {says}\n".replace("DIR", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and not list(tmp_path.parent.glob("*.part"))


def test_an_error_while_writing_names_the_file_that_was_asked_for(tmp_path, capsys, monkeypatch):
    """Kills: the name of the file beside, where a disk is full; that file left behind."""
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "a.part.png"))
    monkeypatch.setattr("os.replace", full)
    pytest.importorskip("matplotlib")
    assert main(["plot", "17", "-o", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == f"records: {tmp_path / 'a.png'}: no space left on device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("typed, meant", [("--trial", "--trials"), ("--dryrun", "--dry-run"), ("--seeds=3", "--seed")])
def test_an_option_that_there_is_not_names_the_nearest(typed, meant):
    """Kills: argparse's 'unrecognized arguments', which leaves a person to look for the right one."""
    with pytest.raises(SystemExit) as end:
        arguments.parse([typed])
    assert str(end.value) == f"train_gpt.py: unrecognized arguments: {typed}; the nearest is {meant}"
