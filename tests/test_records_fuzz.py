"""Damaged logs: 10,000 of them, with a fixed seed; and large ones. Every test was seen to fail."""

import gzip
import itertools
import json
import re
import resource
import subprocess
import sys

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from conftest import ROOT  # noqa: E402
from test_records import MACHINE, OURS, RULE, curve, write  # noqa: E402

from records import neurons  # noqa: E402
from records.__main__ import main  # noqa: E402
from records.log import interpret  # noqa: E402
from records.sample import from_logs  # noqa: E402
from records.verify import markdown, text, verify  # noqa: E402

CURVES = [{0: 10.82584, 3000: 3.30123, 3175: 3.28345, 3200: 3.27951},
          {0: 10.82584, 3000: 3.30234, 3175: 3.28456, 3200: 3.27962},
          {0: 10.82584, 3000: 3.30345, 3175: 3.28567, 3200: 3.27973}]
LOG = (OURS.replace("3 * 1.0", "3.28") + RULE + MACHINE + RULE
       + "".join(f"seed: {seed}\n" + curve(losses) for seed, losses in enumerate(CURVES))).encode()
EXAMPLES = settings(max_examples=5000, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))
# Damage that leaves no digit in another place: a cut, lines lost, repeated or exchanged, bytes that are no digits.
place = st.floats(0, 1)
noise = st.text(st.sampled_from("\0\r\n\t ;=#xyz\x85é"), min_size=1, max_size=4).map(str.encode)
damage = st.lists(st.one_of(
    st.tuples(st.just("cut"), place, st.none()), st.tuples(st.just("insert"), place, noise),
    st.tuples(st.just("lose"), place, st.none()), st.tuples(st.just("repeat"), place, st.integers(1, 6)),
    st.tuples(st.just("exchange"), place, place), st.tuples(st.just("crlf"), st.none(), st.none())), max_size=5)


def damaged(log: bytes, operations) -> bytes:
    for name, where, what in operations:
        lines = log.splitlines(keepends=True) or [b""]
        at = int((where or 0) * (len(lines) - 1))
        if name == "cut":
            log = log[:int(where * len(log))]
        elif name == "insert":
            at = int(where * len(log))
            log = log[:at] + what + log[at:]
        elif name == "lose":
            log = b"".join(lines[:at] + lines[at + 1:])
        elif name == "repeat":
            log = b"".join(lines[:at + what] + lines[at:])
        elif name == "exchange":
            other = int(what * (len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
            log = b"".join(lines)
        else:
            log = log.replace(b"\n", b"\r\n")
    return log


def judged(content: bytes) -> tuple[bool, list]:
    """The verdict and the trials of a log; False where it is refused."""
    try:
        log = interpret("a.txt", content)
        trials = list(log.trials)
        sample = from_logs("", [log])
    except ValueError as error:
        assert "\n" not in str(error)
        return False, []
    result = verify(sample)
    assert text(result).strip() and markdown(result).strip() and json.dumps(result, allow_nan=False)
    return result["verdict"] and not sample.mixture, trials


@EXAMPLES
@given(operations=damage)
def test_damage_invents_nothing(operations):
    """Kills: a loss whose digits were cut off or apart, taken at its word; the step of one line with the loss of the
    next; a run counted twice; a set that fails made to pass by a lost, repeated or exchanged line. No run of these
    passes, nor do the three together."""
    passes, trials = judged(damaged(LOG, operations))
    assert not passes
    known = {(step, loss) for losses in CURVES for step, loss in losses.items()}
    assert all(set(trial.losses.items()) <= known for trial in trials)


@EXAMPLES
@given(data=st.binary(max_size=40), at=place, length=st.integers(0, 40))
def test_any_bytes_are_read_or_refused(data, at, length):
    """Kills: a traceback on bytes that are no text, no program or no number, wherever they stand."""
    start = int(at * len(LOG))
    judged(LOG[:start] + data + LOG[start + length:])


@pytest.mark.parametrize("source", [
    "(" * 5000, "-" * 100000 + "1", "a = 1 / 0\n", "class Hyperparameters:\n    target_loss: float = 1 / 0\n",
    "class Hyperparameters:\n    target_loss: float = 10 ** 10 ** 10\n", "x = '" + "\\N{NULL}" * 9 + "'\n",
    "# -*- coding: latin9 -*-\n"])
def test_hostile_programs(tmp_path, capsys, source):
    """Kills: a program that breaks its reader: nested too deep, a division by zero, a power that never ends."""
    path = write(tmp_path / "a.txt", {0: 10.8, 3200: 3.27}, source=source)
    for verb in ("verify", "lint", "list"):
        assert main([verb, path]) in (0, 1, 2)
        assert len(capsys.readouterr().err.splitlines()) <= 2


def test_a_log_is_never_executed(tmp_path, capsys):
    """Kills: an exec, eval or import of what a log holds."""
    trap = tmp_path / "executed"
    source = f"open({str(trap)!r}, 'w')\nclass Hyperparameters:\n    target_loss: float = open({str(trap)!r}, 'w')\n"
    path = write(tmp_path / "a.txt", {0: 10.8, 3200: 3.27}, source=source)
    for words in (["verify", path], ["list", path], ["diff", path, path], ["lint", path], ["extract", path],
                  ["plan", path], ["reproduce", path], ["compare", path, "17"]):
        main(words)
    assert not trap.exists() and "not a number" in capsys.readouterr().err


@pytest.mark.parametrize("content, says", [
    (b"step:1/2 val_loss:3.0 train_time:1s\n" * 2**19, "it is larger than 16 MiB"),
    (b"x" * 2**24 + LOG, "it is larger than 16 MiB"),
    (b"a = 1\n" * 2**18 + RULE.encode() + b"facts\n" + RULE.encode(), "no program before its line of = (2 MB, larger"),
])
def test_large_logs(tmp_path, capsys, content, says):
    """Kills: a log, a line or a program that takes all memory: its syntax tree is some hundred times as large."""
    (tmp_path / "a.txt").write_bytes(content)
    assert main(["verify", str(tmp_path / "a.txt")]) == 2
    assert capsys.readouterr().err.endswith(f"a.txt is no log: {says}{' than any)' if '(' in says else ''}\n")


def test_a_device_in_place_of_a_log():
    """Kills: an unbounded read. 1 GiB of address space is far more than the desk takes."""
    limit = (resource.RLIMIT_AS, (2**30, 2**30))
    run = subprocess.run([sys.executable, "-m", "records", "verify", "/dev/zero"], cwd=ROOT, capture_output=True,
                         text=True, preexec_fn=lambda: resource.setrlimit(*limit), timeout=60)
    assert (run.returncode, run.stderr) == (2, "records: /dev/zero is no log: it is larger than 16 MiB\n")


def test_a_bomb_among_the_neurons(tmp_path, monkeypatch, capsys):
    """Kills: memory for whatever a few compressed bytes, or many members of them, claim to be; a large file read."""
    path = tmp_path / "a.neurons.jsonl.gz"
    look = dict(seed=0, step=1, layer=0, matrix="fc", inputs=1, leverage=[], momentum=[], gradient=[], update=[])
    whole = gzip.compress(json.dumps(look).encode().ljust(2**19) + b"\n")
    monkeypatch.setattr(neurons, "TEXT_BYTES", 2**20)
    for content in (gzip.compress(b"{" * 2**21), whole * 2, bytes(2**20 + 1)):
        path.write_bytes(content)
        assert main(["neurons", str(path)]) == 2
        assert " 1 MiB" in capsys.readouterr().err
    path.write_bytes(whole)
    assert main(["neurons", str(path)]) == 2 and "no whole record" in capsys.readouterr().err


DIFFERENCES = [0.0010, -0.0012, 0.0003, -0.0004]  # by no two of them, nor all, is a difference shown
RUN = dict(line="run", name="b", overrides=["x=1"], source_sha256="of b", metric="val_loss", seed=0, fork="",
           status="finished", why="", log="logs/a.txt", step=3200, loss=3.28, device="a GPU", world=8, seconds=504.2,
           time="")
LEDGER = "".join(json.dumps(line) + "\n" for line in [
    dict(line="plan", time="", file="v.txt", starts=[[seed, ""] for seed in range(4)], variations=[
        dict(name=name, overrides=[], source_sha256=f"of {name}", metric="val_loss", last_step=3200) for name in "ab"]),
    *(RUN | dict(name=name, source_sha256=f"of {name}", seed=seed, loss=3.28 + difference * (name == "b"))
      for seed, difference in enumerate(DIFFERENCES) for name in "ab")]).encode()


@settings(EXAMPLES, max_examples=300)
@given(operations=damage)
def test_a_damaged_ledger_invents_nothing(tmp_path, capsys, operations):
    """Kills: a traceback; a line that is not named; a loss that was cut off; a run that counts twice, or in a pair with
    another seed's; a verdict that the whole ledger does not give."""
    path = tmp_path / "v.txt.jsonl"
    path.write_bytes(damaged(LEDGER, operations))
    code = main(["sweep", str(path), "--json"])
    out, err = capsys.readouterr()
    if code == 2:
        assert re.match(rf"(skipped: {path}:\d+: .*\n)?records: {path}(:\d+:| holds no plan).*\n$", err)
        return
    result = json.loads(out)
    assert not result["verdict"] and all(row["outcome"] in (None, "open") for row in result["variations"])
    differences = {sum(chosen) / n for n in range(1, 5) for chosen in itertools.combinations(DIFFERENCES, n)}
    assert all(row["difference"] is None or any(row["difference"] == pytest.approx(x) for x in {0, *differences})
               for row in result["variations"])
