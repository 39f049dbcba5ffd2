"""Damaged logs: 10,000 of them, with a fixed seed. Every test was seen to fail."""

import json

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_records import MACHINE, OURS, RULE, curve, write  # noqa: E402

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
