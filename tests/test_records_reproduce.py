"""`reproduce` against simulated and published runs. Every test was seen to fail."""

import json
import random
from collections import Counter

import pytest
from test_records import write

from records import published
from records.__main__ import main
from records.reproduce import classify, consistent_probability
from records.statistics import NOISE, Moments, pooled

STEPS = 5
DRAWS = 600


def outcomes(n: int, shift: float, correlation: float = 0.95) -> dict[str, float]:
    """How often n runs, whose true mean is `shift` above that of 20 published ones, get each outcome. Both sets are
    drawn anew each time, with the published noise; late steps of a run share most of their deviation."""
    source = random.Random(n)

    def draw(n: int, shift: float) -> list[Moments]:
        common = [source.gauss(shift, NOISE * correlation**0.5) for _ in range(n)]
        return [Moments.of([c + source.gauss(0, NOISE * (1 - correlation) ** 0.5) for c in common])
                for _ in range(STEPS)]

    counts = Counter(classify({k: pooled(a, b) for k, (a, b) in enumerate(zip(draw(n, shift), draw(20, 0)))})
                     for _ in range(DRAWS))
    return Counter({outcome: count / DRAWS for outcome, count in counts.items()})


@pytest.mark.parametrize("n, consistent", [(1, 0.83), (4, 0.97), (20, 0.97)])
def test_faithful_runs_are_no_failure(n, consistent):
    """Kills: the official bar for equivalence (which 94% of faithful sets of four miss); five tests at 1% each.
    Nominal: different in at most 1%, consistent in 87%, 99.7%, 99.5%; bounds are three standard
    errors of 600 draws away."""
    rates = outcomes(n, 0)
    assert rates["worse"] + rates["better"] <= 0.022
    assert rates["consistent"] >= consistent


@pytest.mark.parametrize("n, consistent, worse", [(1, 0.04, 0.5), (2, 0.04, 0.85), (4, 0.005, 0.98), (20, 0, 1)])
def test_worse_runs_are_no_success(n, consistent, worse):
    """Kills: `no significant difference` read as sameness. 0.004 worse: consistent in at most 5% whatever n. With five
    steps it is 2% (0.04 with three standard errors) for one or two runs, 0.1% for four."""
    rates = outcomes(n, 0.004)
    assert rates["consistent"] <= consistent and rates["worse"] >= worse and rates["better"] == 0


def test_better_runs_are_named_so():
    """Kills: the sign of the difference."""
    assert outcomes(4, -0.004)["better"] >= 0.98


@pytest.mark.parametrize("n, shift", [(1, 0), (1, 0.004), (2, 0), (4, 0), (4, 0.002), (8, 0.002)])
def test_power_is_as_told(n, shift):
    """Kills: a power that is printed but not had. The formula is of one step: within 0.05, or 0.13 where the rate
    changes fastest, of five correlated ones; three standard errors are 0.04, and 0.06 there."""
    told = consistent_probability(shift, n, 20, NOISE, STEPS)
    assert abs(told - outcomes(n, shift)["consistent"]) < (0.19 if shift == 0.002 else 0.09)


def logs(tmp_path, curves, shift=0.0) -> str:
    for k, losses in enumerate(curves):
        write(tmp_path / f"{k}.txt", {step: loss + shift for step, loss in losses.items()})
    return str(tmp_path)


@pytest.mark.parametrize("run", range(1, 21))
def test_each_published_run_alone(tmp_path, capsys, run):
    """Kills: a verdict of failure on one of the very runs that were published; an exit code that is not the verdict."""
    status = main(["reproduce", logs(tmp_path, [published.curves(17)[run]]), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["outcome"] in ("consistent", "cannot tell")
    assert status == (result["outcome"] != "consistent")
    assert result["outcome"] == "consistent" or result["more_runs"] >= 1


def test_what_is_said(tmp_path, capsys):
    """Kills: a sentence without its n, step and interval; worse and better exchanged."""
    curves = list(published.curves(17).values())[:4]
    for folder, shift, status, start in (("a", 0, 0, "CONSISTENT with #17: off by "),
                                         ("b", 0.004, 1, "WORSE than #17 by 0.00"),
                                         ("c", -0.004, 1, "BETTER than #17 by 0.00")):
        (tmp_path / folder).mkdir()
        assert main(["reproduce", logs(tmp_path / folder, curves, shift)]) == status
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(start) and " +- 0.0" in last and "n=4 and 20, 95%" in last


def test_cannot_tell_says_how_many(tmp_path, capsys):
    """Kills: `cannot tell` without the number of runs that could."""
    curve = {step: at.mean + 0.003 for step, at in published.moments(17)[1].items()}
    assert main(["reproduce", logs(tmp_path, [curve])]) == 1
    out = capsys.readouterr().out
    assert "CANNOT TELL: off by 0.0030 +- 0.002" in out and out.endswith("; run 1 more\n")
    assert "at n=1 a faithful recipe is called consistent in about 9" in out


def test_diverged_runs_reproduce_nothing(tmp_path, capsys):
    """Kills: a reproduction by those that did not diverge."""
    curves = [*list(published.curves(17).values())[:3], {0: 10.8, 125: float("nan")}]
    assert main(["reproduce", logs(tmp_path, curves)]) == 1
    assert capsys.readouterr().out.endswith("NO: 1 runs diverged\n")


@pytest.mark.parametrize("of, reason", [(11, "compare judges different recipes"), (46, "no line has a val_ema_loss"),
                                        (41, "claims 20 runs, its published curve holds 1"),
                                        (99, "they are 1 to 46")])  # fmt: skip
def test_what_cannot_be_compared(tmp_path, capsys, of, reason):
    """Kills: another schedule's curve taken for the same recipe's; a KeyError."""
    folder = logs(tmp_path, [published.curves(17)[1]])
    assert main(["reproduce", folder, "--of", str(of)]) == 2
    assert reason in capsys.readouterr().err
