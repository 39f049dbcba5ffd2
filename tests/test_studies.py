"""The studies at their quick settings: that they run end to end, and that their numbers show what they are about."""

import csv
import math
import re

import numpy as np
import pytest
from conftest import EOT, write_shard

from studies import alignment, attempts, expansion, leave_one_out, neuron_death, orthogonality, training, transfer


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    """Overrides that name shards of bytes: sentences over twelve words of five letters."""
    folder = tmp_path_factory.mktemp("bytes")
    random = np.random.default_rng(0)
    words = random.integers(0, 256, (12, 5))
    tokens = np.concatenate([np.append(EOT, words[random.integers(0, 12, 40)]) for _ in range(220)])
    write_shard(folder / "val_000000.bin", tokens[:3000])
    write_shard(folder / "train_000001.bin", tokens[3000:])
    return [f"train_files={folder}/train_*.bin", f"val_files={folder}/val_*.bin"]


def quick(study, folder, overrides=()) -> list[dict]:
    """The rows of a study's table, numbers as floats, after its quick setting has run through main."""
    name = study.__name__.removeprefix("studies.")
    study.main(["--quick", "-o", str(folder), *overrides])
    assert {path.name for path in folder.iterdir()} == {f"{name}.csv", f"{name}.md", f"{name}.png"}
    assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"python -m studies.{name} --quick" in (folder / f"{name}.md").read_text()

    def number(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(folder / f"{name}.csv") as file:
        return [{key: number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_transfer(tmp_path):
    """Kills: a method under another's name, a transfer function that skips a step, precisions mixed up."""
    every = quick(transfer, tmp_path)
    rows = {(row["method"], row["on"].split()[-1]): row for row in every if "Gaussian" in row["on"]}
    worst = {row["method"]: row["largest"] for row in every if "scalars" in row["on"]}
    assert len(rows) == 12
    for name in transfer.METHODS:
        fp64, fp32, bf16 = (rows[name, precision]["defect F/n"] for precision in ("fp64", "fp32", "bf16"))
        if name == "quintic-5":  # published as .03; on [1e-3, 1] it is worst at 1e-3
            assert 0.02 < min(fp64, fp32, bf16) and max(fp64, fp32, bf16) < 0.05
            assert worst[name] == pytest.approx(0.5295, abs=1e-4)
        else:  # each within ten of its roundings: 1e-16, 6e-8, 4e-3, spread over n = 128 singular values
            assert fp64 < 1e-15 < fp32 < 1e-7 < 1e-4 < bf16 < 1e-3
            assert worst[name] < (5.1e-6 if name == "simple quintic 12" else 1e-14)


def test_orthogonality(tmp_path):
    """Kills: rows that stay even as the spread grows, one direction under another's name, a running mean
    that does not run, another norm of the defect."""
    rows = quick(orthogonality, tmp_path)
    for routine, peak in zip(orthogonality.ROUTINES, (0.0608, 0.0450)):
        found = {(row["direction"], row["spread"]): row for row in rows if row["polar"] == routine}
        defect = {key: row["defect F/n"] for key, row in found.items()}
        # .0608 and .0450 are means of five other draws, whose means of two differ by .003
        assert defect["U-NorMuon", 0] < defect["U-NorMuon", 1.5] < defect["U-NorMuon", 3]
        assert defect["U-NorMuon", 3] == pytest.approx(peak, abs=0.006)
        # Aurora does not see the scale of rows, but for the rounding, which at 1e-8 is all there is
        assert defect["Aurora", 3] == pytest.approx(defect["Aurora", 0], rel=0.1)
        assert found["Muon", 3]["row norm CV"] > 0.5 > 0.03 > found["Aurora", 3]["row norm CV"]
        assert found["NorMuon, step 20", 3]["row norm CV"] > 0.03 > 1e-6 > found["U-NorMuon", 3]["row norm CV"]
    assert defect["Aurora", 3] < 1e-7 < defect["U-NorMuon", 0]
    # even rows of an orthogonal matrix have one length; quintic-5's are shorter, and NorMuon's stay so
    assert defect["NorMuon, step 1", 3] == pytest.approx(defect["U-NorMuon", 3], rel=1e-3)


def test_alignment(tmp_path, text):
    """Kills: an alignment that Muon does not lead, a rotation that is not the best or moves rows, momentum of the
    wrong run, an iteration count that is not passed on."""
    rows = quick(alignment, tmp_path, text)
    at = {(row["input"], row["method"], row["iterations"]): row for row in rows}
    assert len({row["input"] for row in rows}) == 6
    for name in dict.fromkeys(row["input"] for row in rows):
        kept = {(method, k): row["alignment"] for (i, method, k), row in at.items() if i == name}
        even = {(method, k): row["row norm CV"] for (i, method, k), row in at.items() if i == name}
        assert kept["Muon", 1] == pytest.approx(1, abs=1e-5)  # six digits are written
        for k in range(1, 6):
            assert kept["Aurora, release", k] < kept[alignment.ROTATED, k] < 1
            assert even["Aurora, release", k] == pytest.approx(even[alignment.ROTATED, k], rel=1e-4)
            assert k == 1 or even["Aurora, release", k] < even["Aurora, release", k - 1]
        assert kept["Aurora, July", 2] == pytest.approx(kept["Aurora, release", 2], abs=1e-3)  # fp32, ill-conditioned
        assert kept[alignment.ROTATED, 5] < kept["Riemannian Aurora", 3] < kept["Riemannian Aurora", 5]
        assert even["Riemannian Aurora", 5] < 0.1 * even["Muon", 1]
    assert at["rows x |1 + 3z|", "Aurora, release", 2]["alignment"] == pytest.approx(0.844, abs=0.02)  # of 5 seeds
    assert at["momentum, muon", "Muon", 1]["row norm CV"] > at["momentum, aurora", "Muon", 1]["row norm CV"]


def test_neuron_death(tmp_path, text):
    """Kills: a direction or seed that does not reach the run, weights that go on from an earlier one, a persistence
    that looks backwards or forgets a look, leverage of all layers but one."""
    rows = quick(neuron_death, tmp_path, text)
    assert len(rows) == 4 * 2 * 5
    runs = {}
    for row in rows:
        runs.setdefault((row["direction"], row["seed"]), []).append(row)
    for looks in runs.values():
        assert [row["step"] for row in looks] == [0, 5, 10, 15, 20]
        assert looks[0]["val_loss"] == pytest.approx(math.log(257), abs=1e-4)  # the head is zero
        assert looks[0]["starved"] == ""
        assert all(math.isfinite(row["val_loss"]) for row in looks)
        for row, later in zip(looks[1:], looks[2:]):
            assert row["for good"] <= min(row["starved"], later["for good"])
            assert row["starved"] * 128 == pytest.approx(round(row["starved"] * 128), abs=1e-3)  # 2 layers of 64
        assert looks[-1]["for good"] == looks[-1]["starved"]
    assert any(round(row["starved"] * 128) % 2 for looks in runs.values() for row in looks[1:])
    assert len({tuple(row["val_loss"] for row in looks) for looks in runs.values()}) == 8
    assert "0.02" in (tmp_path / "neuron_death.md").read_text()


def test_expansion(tmp_path, text):
    """Kills: an expansion that does not reach the model, pairs of unequal seeds, a gain of the wrong sign."""
    rows = quick(expansion, tmp_path, [*text, "train_steps=15", "val_every=15", "val_every_late=15"])
    assert len(rows) == 3 * 2 * 2 * 2
    last = {(row["direction"], row["mlp_expansion"], row["seed"]): row["val_loss"] for row in rows if row["step"]}
    for seed in (0, 1):
        assert last["aurora", 1, seed] == last["muon", 1, seed] != last["u_normuon", 1, seed]  # square is square
        assert len({last[name, 4, seed] for name in expansion.NAMES}) == 3
    assert all(row["val_loss"] == pytest.approx(math.log(257), abs=1e-4) for row in rows if not row["step"])


def test_gains_are_of_pairs_at_each_ones_best_rate():
    """Kills: a best rate that another seed or setting decides, one that diverged, unpaired or one-sided intervals."""
    losses = {("muon", 2, 0.01): [2.0, 9.0, 2.6], ("muon", 2, 0.02): [2.1, 1.0, 1.0],
              ("u_normuon", 2, 0.01): [math.nan], ("u_normuon", 2, 0.02): [1.9, 8.8, 2.3],
              ("aurora", 2, 0.01): [1.0, 8.0, 1.6], ("aurora", 2, 0.02): [math.nan, 0, 0]}
    done = {(*key, seed): [dict(val_loss=5.0), dict(val_loss=loss)]
            for key, values in losses.items() for seed, loss in enumerate(values)}
    normuon, aurora = expansion.gains(done, 3)
    assert (normuon["rate"], normuon["Muon's rate"], aurora["rate"]) == (0.02, 0.01, 0.01)
    assert [aurora[key] for key in ("gain over Muon", "low", "high")] == pytest.approx([1, 1, 1])
    # of .1, .2, .3: deviation .1, t = 4.303 with two degrees of freedom
    assert [normuon[key] for key in ("gain over Muon", "low", "high")] == pytest.approx(
        [0.2, 0.2 - 0.4303 / 3**0.5, 0.2 + 0.4303 / 3**0.5])


def test_leave_one_out(tmp_path, text):
    """Kills: a part that is left in, or another's name on it; a rule that does not reach the run, pairs of unequal
    seeds. After 36 steps the average has not begun."""
    rows = quick(leave_one_out, tmp_path, text)
    losses = {(row["without"], row["seed"]): row["val_loss"] for row in rows}
    assert len(rows) == len(losses) == 11 * 2 and all(row["step"] == 36 for row in rows)
    pairs = {part: (losses[part, 0], losses[part, 1]) for part in leave_one_out.PARTS}
    assert len(set(pairs.values())) == 10 and pairs["tail_average"] == pairs[leave_one_out.WHOLE]
    assert losses[leave_one_out.WHOLE, 0] != losses[leave_one_out.WHOLE, 1]


def test_every_part_is_left_out_once():
    """Kills: two parts left out at once, or the wrong one, where it does not show in 36 steps."""
    whole, *others = (set(re.findall(r"[a-z_]\w*", " ".join(words))) for words in leave_one_out.PARTS.values())
    assert [whole - words for words in others] == [
        {"soap"}, {"trust_gate", "attn_proj"}, {"brake"}, {"row_floor"}, {"pin"}, {"cautious_decay"}, set(),
        {"lookahead", "between"}, {"val_ema_loss"}, {"raw_adam", "attn_proj_bias", "gains"}]


def test_differences_are_of_pairs():
    """Kills: a difference of the other sign, unpaired or one-sided intervals, intervals of one look where there are
    ten, rows paired as they came, a part that is called seen within its interval, another base than the named one."""
    rows = [dict(without=part, seed=seed, val_loss=seed + gain * (seed + 1)) for gain, part in
            enumerate(leave_one_out.PARTS) for seed in range(3)]
    soap, *others = [part for part in leave_one_out.PARTS if part != leave_one_out.WHOLE]
    lines = leave_one_out.differences(rows[::-1], {soap: leave_one_out.WHOLE} | dict.fromkeys(others, soap))
    # of 1, 2, 3: deviation 1, and 14.09 is t of .05 / 10, two-sided, with two degrees of freedom
    assert [lines[0][key] for key in ("loss more by", "low", "high")] == pytest.approx(
        [2, 2 - 14.089 / 3**0.5, 2 + 14.089 / 3**0.5], abs=1e-2)
    assert [line["loss more by"] for line in lines[1:]] == pytest.approx([2 * gain for gain in range(1, 10)])
    assert lines[0]["seen"] == "too small to see" and len(lines) == 10


def test_attempts(tmp_path, text):
    """Kills: an attempt whose own words do not reach its run, the words of one under another's name, a run of another
    length. In ten steps no floor rises."""
    rows = quick(attempts, tmp_path, text)
    losses = {}
    for row in rows:
        assert row["step"] == 10
        losses.setdefault(row["recipe"], {})[row["seed"]] = row["val_loss"]
    assert set(losses) == {*attempts.CLAIMED, *attempts.ATTEMPTS} and len(rows) == 2 * len(losses)
    assert losses["attempt_tail_heat"] == losses["2540_open_claim"] != losses["339_bimaxwell"]
    changed = ("attempt_auxiliary_rates", "attempt_corrected_vectors", "attempt_plain_start")
    assert len({str(losses[name]) for name in (*changed, "339_bimaxwell")}) == 4


def test_a_tenth_of_the_steps():
    """Kills: a schedule left at full length, which never acts in a short run; an epsilon or a share taken for steps; a
    jump that would divide by zero."""
    whole = training.train_gpt.override(["@46_rowfloor_cwd"])
    assert attempts.tenth(whole.final_update) == " | ".join(leave_one_out.FINAL)
    gate = "trust_gate(ramp(0.45, 0, 1375, 1625), ramp(0.85, 1, 1624, 1625), names(0, attn_proj=1))"
    assert gate in whole.matrix_update and attempts.tenth(gate) == leave_one_out.GATE
    assert attempts.tenth("adamw(0.8, 0.99, 1e-10, 0)") == "adamw(0.8, 0.99, 1e-10, 0)"
    assert attempts.tenth("power(2386.4, 1.2)") == "power(238, 1.2)"
    words = dict(word.split("=", 1) for word in attempts.shortened("attempt_tail_heat") if "=" in word)
    assert "row_floor(ramp(0.3825, 0.75, 224, 254))" in words["matrix_update"] and words["stop_step"] == "254"
    assert "names(0.55, blocks_0_=0.8, bias=1" in words["final_update"] and words["train_steps"] == "284"


@pytest.mark.parametrize("overrides, says", [
    (["train_files=none/*.bin"], "no file none/.*: .*python data/local.py --encoding bytes"),
    (["train_steps=100000"], "100000 batches of 512 tokens are needed.*python data/local.py --encoding bytes"),
    (["matrix_rl=1"], "'matrix_rl' is not a hyperparameter; the nearest is 'matrix_lr'"),
])
@pytest.mark.parametrize("study", [alignment, neuron_death, expansion])
def test_what_cannot_run_says_so_and_writes_nothing(study, overrides, says, text, tmp_path):
    """Kills: a wrong argument or missing data told without its remedy, or leaving a half result."""
    with pytest.raises(ValueError, match=says):
        study.main(["--quick", "-o", str(tmp_path / "out"), *text, *overrides])
    assert not (tmp_path / "out").exists()


def test_tokens_that_are_not_bytes(tmp_path):
    """Kills: a GPT-2 encoding that is clamped to the vocabulary of bytes and trained on in silence."""
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}_000000.bin", np.r_[EOT, np.arange(3000) % 257])
    hp = training.train_gpt.override([*training.SMALL, "train_steps=2", "val_tokens=1024",
                                      *(f"{name}_files={tmp_path}/{name}_*.bin" for name in ("train", "val"))])
    with pytest.raises(ValueError, match="train_000000.bin holds more than bytes.*data/local.py --encoding bytes"):
        training.shards_of(hp)


def test_tokens_of_another_vocabulary(tmp_path):
    """Kills: a shard behind the first whose tokens are clamped to the vocabulary and trained on in silence."""
    for name, last in (("train_0", 7), ("train_1", 600), ("val_0", 7)):
        write_shard(tmp_path / f"{name}.bin", np.r_[np.arange(1500) % 7, last])
    hp = training.train_gpt.override([*training.SMALL, "train_steps=4", "val_tokens=1024", "vocab_size=512",
                                      *(f"{name}_files={tmp_path}/{name}_*.bin" for name in ("train", "val"))])
    with pytest.raises(ValueError, match="train_1.bin holds token 600, vocab_size is 512: delete it"):
        training.shards_of(hp)


def test_a_quick_run_is_no_result(capsys):
    """Kills: numbers of a quick run in place of studies/results; words after a study that takes none, unread."""
    for words, says in ((["--quick"], "name a folder for it with -o"), (["seeds=3"], "unrecognized arguments: seeds")):
        with pytest.raises(SystemExit):
            transfer.main(words)
        assert says in capsys.readouterr().err
