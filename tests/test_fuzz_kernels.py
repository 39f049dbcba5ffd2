"""Two seconds of the drill that fuzzes the kernels, and what the drill says of wrong ones."""

import math

import pytest
import torch

from tests.drills import fuzz_kernels
from tests.drills.fuzz_kernels import KERNELS, Case, Found


def test_kernels_at_odd_sizes(poisoned):
    """Kills: a block larger than a program's rows, an edge at a size of no other test, half a percent of an output.

    Four cases a kernel: of this seed the norm's have 2, 13, 2 and 8 numbers a token, q's heads 12, 4, 4 and 4.
    """
    table, wrong = fuzz_kernels.rows(fuzz_kernels.measure(seed=254, rounds=4))
    assert [row["cases"] for row in table] == [4] * len(KERNELS) and wrong == []


def ratios(ours, reference, x):
    return [found.ratio for found in fuzz_kernels.judge(Case("2", "y", [x], ours, reference), 0)]


def test_a_ratio():
    """Kills: NaN that passes, or an error where PyTorch and the answer are exactly 0; a 0 that is met but fails;
    PyTorch's lucky exactness held against a rounding; an error divided by another's, or by none."""
    x = torch.full((2,), 1.0, dtype=torch.bfloat16)

    def returning(*values):
        return lambda x: [x * torch.tensor(values, dtype=x.dtype)]
    same = returning(1, 1)
    assert ratios(same, same, x) == [0] and ratios(same, same, 0 * x) == [0]
    assert ratios(lambda x: [x * math.nan], same, x) == [math.inf]
    assert ratios(lambda x: [x + 1], same, 0 * x) == [math.inf]
    # two units of 2^-7 in one number of two, over a quarter of a unit of both
    assert ratios(returning(1 + 2**-6, 1), same, x) == pytest.approx([8 / 2**0.5])

    def exact_in_float64(x):
        return [x * (1 if x.dtype == torch.float64 else 1 + 2**-6)]
    assert ratios(returning(1 + 2**-4, 1 + 2**-4), exact_in_float64, x) == [4]


@pytest.mark.parametrize("kernel, ratio, others, said", [
    ("qkv", 4.5, 1, "qkv: dx at 2x3, case 7, is off by 0.1, 4.50 times PyTorch's error"),
    ("norm", 2.5, 1, "norm: dx at 2x3, case 7, is off by 0.1, 2.50 times PyTorch's error"),
    ("mlp", math.inf, 1, "mlp: dx"), ("head", 1.5, 1.5, "head: 1.50 times PyTorch's error over all cases"),
    ("qkv", 3, 1, None), ("head", 1.5, 0.9, None)])
def test_a_bound_ends_the_drill_with_1(kernel, ratio, others, said, tmp_path, monkeypatch, capsys):
    """Kills: an exit code of 0 or a silence where a bound is exceeded, one kernel's bound used for another, a worst
    case that is not shown, a table without where it was made."""
    def measured(seed, seconds):
        assert (seed, seconds) == (3, 0)
        return {name: [[Found(ratio if name == kernel else 1.0, "dx", 0.1, 0.04, "2x3", 7)],
                       *[[Found(others if name == kernel else 1.0, "dx", 0.1, 0.1, "4x5", 9)]] * 9] for name in KERNELS}
    monkeypatch.setattr(fuzz_kernels, "measure", measured)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
    words = ["--seconds", "0", "--seed", "3", "-o", str(tmp_path)]
    if said:
        with pytest.raises(SystemExit) as end:
            fuzz_kernels.main(words)
        assert str(end.value).startswith(f"fuzz_kernels: {said}") and "\n" not in str(end.value)
    else:
        fuzz_kernels.main(words)
    text = (tmp_path / "fuzz_kernels.md").read_text()
    assert text.startswith("# python -m tests.drills.fuzz_kernels --seconds 0 --seed 3\n") and "commit" in text
    assert f"| {kernel} | 10 | {ratio:.4g} |" in text and ("**" in text) == bool(said)
