"""leaderboard: the published figures from a checkout of upstream's. Every test was seen to fail."""

import random
from pathlib import Path

import pytest
from test_records import UPSTREAM, write

from records import published
from records.__main__ import main

HEAD = ("# A title\n\n| # | Steps to 3.28 | Evidence | Description | Date | Log | Contributors |\n"
        "| - | - | - | - | - | - | - |\n")


def losses(*finals: float) -> list[dict[int, float]]:
    return [{0: 10.82584, 100: round(final + 0.1, 5), 200: final} for final in finals]


def table_row(number: int, steps: str = "200(!)", evidence: str = "3.2750 (n=2)✓", day: str = "2026/04/26",
              link: str = "", about: str = "Setup from #1, plus [this](https://a.b/c)") -> str:
    link = link or f"[log](results/r{number}/a.txt)"
    return (f"| {number} | {steps} | {evidence} | {about} | {day} | {link} | "
            f"[PR](https://github.com/o/r/pull/{900 + number}) by [@x](https://github.com/x) |\n")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """Three results, and the desk with the figures of just these."""
    for number in (1, 2, 3):
        (tmp_path / "results" / f"r{number}").mkdir(parents=True)
        for name, run in zip("ab", losses(3.274 + number / 1e4, 3.276 + number / 1e4)):
            write(tmp_path / "results" / f"r{number}" / f"{name}.txt", run)
    (readme := tmp_path / "README.md").write_text(HEAD + "".join(
        table_row(n, evidence=f"{3.275 + n / 1e4:.4f} (n=2)✓") for n in (1, 2, 3)))
    (folder := tmp_path / "published").mkdir()
    (folder / "track3_records.csv").write_bytes(
        (published.FOLDER / "track3_records.csv").read_bytes().splitlines(keepends=True)[0])
    (folder / "track3_curves.csv").write_bytes(
        (published.FOLDER / "track3_curves.csv").read_bytes().splitlines(keepends=True)[0])
    (folder / "reference.csv").write_text("")
    monkeypatch.setattr(published, "FOLDER", folder)
    published.forget()
    assert main(["leaderboard", str(readme)]) == 0
    yield readme
    published.forget()


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in published.FOLDER.iterdir()}


def leaderboard(capsys, readme: Path) -> tuple[int, str, str, set[str]]:
    """Exit code, what is said on standard output and error, and which files of records/published are others now."""
    capsys.readouterr()
    before = files()
    status = main(["leaderboard", str(readme)])
    published.forget()
    after = files()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return status, *capsys.readouterr(), changed


def edit(readme: Path, old: str, new: str) -> None:
    text = readme.read_text()
    assert old in text
    readme.write_text(text.replace(old, new))


def test_nothing_new_changes_no_file(checkout, capsys):
    """Kills: a file written anew, with words of upstream's in place of ours, though no row is another."""
    path = published.FOLDER / "track3_records.csv"
    path.write_bytes(path.read_bytes().replace(b'"Setup from #1, plus this"', b"ours"))
    published.forget()
    times = {path: path.stat().st_mtime_ns for path in published.FOLDER.iterdir()}
    assert leaderboard(capsys, checkout) == (0, "nothing has changed\n", "", set())
    assert leaderboard(capsys, checkout.parent) == (0, "nothing has changed\n", "", set())  # the folder will do
    assert {path: path.stat().st_mtime_ns for path in published.FOLDER.iterdir()} == times


def test_a_row_is_added(checkout, capsys):
    """Kills: the metric of a new result guessed, and not the one that has the claimed mean; a log in a folder of its
    own read alone; files that are no logs, a diverged run, a copy, folders below, and another device in its figures."""
    folder = checkout.parent / "results" / "r4"
    folder.mkdir()
    for k, run in enumerate(losses(3.271, 3.272, 3.273)):
        path = Path(write(folder / f"{k}.txt", {step: loss + 0.01 for step, loss in run.items()}))
        text = path.read_text()
        for step, loss in run.items():
            text = text.replace(f"step:{step}/3200 val_loss:{loss + 0.01:.5f}",
                                f"step:{step}/3200 val_loss:{loss + 0.01:.5f} val_ema_loss:{loss:.5f}")
        path.write_text(text)
    (folder / "copy.txt").write_text((folder / "0.txt").read_text())
    a40 = (folder / "0.txt").read_text().replace("on H100", "on A40").replace("3.271", "3.299")
    (folder / "A40.txt").write_text(a40)
    (folder / "nan.txt").write_text((folder / "1.txt").read_text().replace("3.27200", "nan"))
    (folder / "README.md").write_text("what it is")
    (folder / "sweep").mkdir()
    (folder / "sweep" / "other.txt").write_text((folder / "0.txt").read_text().replace("3.271", "3.298"))
    (folder / "stdout.txt").write_text("step:200/3200 val_loss:3.0 train_time:1s\n")
    checkout.write_text(checkout.read_text() + table_row(
        4, "200", "3.2720 (n=3)✓", "2026/06/01", "[log](results/r4/README.md)", r"A \| B"))
    status, out, _, changed = leaderboard(capsys, checkout)
    assert status == 0 and out.startswith("new: #4: 200 steps, 3.2720 (n=3), 2026-06-01, A \\| B\n")
    assert changed == {"track3_records.csv", "track3_curves.csv", "record_04_curves.csv"}
    assert published.result(4).metric == "val_ema_loss" and not published.result(4).world_record
    assert published.result(4).pull_request == "904"
    assert [run[200] for run in published.curves(4).values()] == [3.271, 3.272, 3.273]
    assert published.moments(4)[1][200].mean == 3.272
    assert main(["verify", "4"]) == 0


def test_a_row_is_changed(checkout, capsys):
    """Kills: figures that stay those of the old claim, or of one log of several; our words lost; a date alone that has
    the figures read anew."""
    edit(checkout, "200(!) | 3.2752 (n=2)✓", "200(!) | 3.2740 (n=3)✓")
    edit(checkout, "2026/04/26 | [log](results/r3", "2026/04/27 | [log](results/r3")
    write(checkout.parent / "results" / "r2" / "c.txt", losses(3.2716)[0])
    log = checkout.parent / "results" / "r3" / "a.txt"
    log.write_text(log.read_text().replace("step:100/3200 val_loss:3.3", "step:100/3200 val_loss:3.4"))
    status, out, _, changed = leaderboard(capsys, checkout)
    assert status == 0 and "changed: #2: mean 3.2752 -> 3.274, n 2 -> 3\n" in out
    assert "changed: #3: date 2026-04-26 -> 2026-04-27\n" in out and "new" not in out
    assert changed == {"track3_records.csv", "track3_curves.csv", "record_02_curves.csv"}
    assert published.moments(2)[1][200].n == len(published.curves(2)) == 3 == published.result(2).n


def test_a_claim_that_its_logs_do_not_have(checkout, capsys):
    """Kills: silence on it; figures of the old claim overwritten by some of another."""
    edit(checkout, "3.2752 (n=2)✓", "3.2737 (n=5)✓")
    write(checkout.parent / "results" / "r2" / "c.txt", losses(3.2722)[0])
    status, out, _, changed = leaderboard(capsys, checkout)
    assert status == 0 and changed == {"track3_records.csv"}
    assert "look: #2 claims 3.2737 (n=5) at step 200, its logs have 3.2742 (n=3)\n" in out
    for k in range(2):  # and when they have it
        write(checkout.parent / "results" / "r2" / f"late{k}.txt", losses(3.273 + k * 1e-4)[0])
    status, out, _, changed = leaderboard(capsys, checkout)
    assert status == 0 and "figures: #2" in out and published.moments(2)[1][200].n == 5


def test_a_row_is_gone(checkout, capsys):
    """Kills: a withdrawn result that is still listed, or whose curves stay; a wrong file that takes all away."""
    row = next(line for line in checkout.read_text().splitlines(keepends=True) if line.startswith("| 2 |"))
    edit(checkout, row, "")
    status, out, _, changed = leaderboard(capsys, checkout)
    assert status == 0 and out.startswith("gone: #2: 200! steps, 3.2752 (n=2), 2026-04-26, Setup from #1, plus this\n")
    assert changed == {"track3_records.csv", "track3_curves.csv", "record_02_curves.csv"}
    assert sorted(published.results()) == [1, 3] and b"\n2," not in files()["track3_curves.csv"]
    for text in ("", "# Another README\n", HEAD + table_row(9)):
        checkout.write_text(text)
        status, out, err, changed = leaderboard(capsys, checkout)
        assert (status, out, changed, err.count("\n")) == (2, "", set(), 1) and str(checkout) in err


@pytest.mark.parametrize("bad, said", [
    ("| 4 | 200 | 3.2750 (n=2) | text |\n", "4 cells"), (table_row(4, steps="soon"), "no step in 'soon'"),
    (table_row(4, evidence="good"), "no mean (n=...) in 'good'"),
    (table_row(4, evidence="3.2750 (n=0)✓"), "no mean (n=...)"), (table_row(4, steps="0"), "no step in '0'"),
    (table_row(4, day="2026/13/01"), "month must be in 1..12"),
    (table_row(4, day="May"), "no date YYYY/MM/DD"), (table_row(4, link="none"), "no [log](results/...)"),
    (table_row(4, link="[log](results/../../etc/a.txt)"), "is not below results/"),
    (table_row(4) * 2, "is there twice"),
    (table_row(4), "no log of it"), (table_row(2), "number 2 is there twice")])
def test_a_malformed_row(checkout, capsys, bad, said):
    """Kills: a traceback; a row that cannot be read taken in part, or one that is known taken to be gone; the others
    given up."""
    edit(checkout, "2026/04/26 | [log](results/r3", "2026/04/27 | [log](results/r3")
    checkout.write_text(checkout.read_text() + bad)
    status, out, err, changed = leaderboard(capsys, checkout)
    assert status == 1 and err == "" and out.count("left out: ") == 1 and said in out
    assert changed == {"track3_records.csv"} and sorted(published.results()) == [1, 2, 3]
    assert published.result(3).date == "2026-04-27" and "gone" not in out


def test_a_full_disk_changes_nothing(checkout, capsys, monkeypatch):
    """Kills: a table whose curves could not be written."""
    edit(checkout, "3.2752 (n=2)✓", "3.2740 (n=3)✓")
    write(checkout.parent / "results" / "r2" / "c.txt", losses(3.2716)[0])
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith("record_02"):
            raise OSError(28, "No space left on device", str(path))
        return real(path, content)
    monkeypatch.setattr(Path, "write_bytes", full)
    status, out, err, changed = leaderboard(capsys, checkout)
    assert (status, out, changed) == (2, "", set()) and err.endswith("record_02_curves.csv: no space left on device\n")


def test_damaged_tables(checkout, capsys):
    """Kills: a traceback, or figures that no verb can read afterwards."""
    draw, whole = random.Random(0), checkout.read_text()
    for _ in range(40):
        text = list(whole)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(text))
            text[at:at + draw.randrange(3)] = draw.choice(["", "|", "\n", "9", "(", "\0", "é", "/..", "e9"])
        checkout.write_text("".join(text))
        status, _, err, _ = leaderboard(capsys, checkout)
        assert status in (0, 1, 2) and err.count("\n") == (status == 2)
        assert main(["list", str(checkout.parent / "results" / "r1")]) == 0
        assert all(main(["verify", str(record)]) in (0, 1, 2) for record in published.results())
    capsys.readouterr()
