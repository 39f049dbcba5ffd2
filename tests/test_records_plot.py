"""plot: what is drawn. Every test was seen to fail."""

import sys
import xml.etree.ElementTree as ET

import pytest
from test_records import ends, write

import records
from records import published
from records.__main__ import main


@pytest.fixture
def runs(tmp_path) -> str:
    pytest.importorskip("matplotlib")
    return write(tmp_path / "runs.txt", *list(published.curves(17).values())[11:14])


def test_plot_draws_every_run(runs, tmp_path, capsys):
    """Kills: a run or the mean left out; a panel without the target; a background that was not asked for."""
    from records import plot
    from records.sample import from_published, gather
    figure = plot.Figure()
    plot.draw(axes := figure.subplots(), [gather([runs])], [from_published(36)], 3.28)
    drawn = [list(zip(*line.get_data())) for line in axes.lines]
    curves = list(published.curves(17).values())[11:14]
    assert all([*curve.items()] in drawn for curve in curves)
    assert [(s, pytest.approx(sum(c[s] for c in curves) / 3)) for s in curves[0]] in drawn
    assert any({y for _, y in line} == {3.28} for line in drawn)
    means = [(step, at.mean) for step, at in from_published(36).moments.items()]
    assert means in drawn and len(axes.collections) == 1  # with its spread
    assert [text.get_text() for text in axes.legend().get_texts()] == [
        "#36, n=10, passes at 3250", f"...{runs[-37:]}, n=3, passes at 3175"]


def test_plot_zooms_on_the_crossing(runs, tmp_path):
    """Kills: a zoom elsewhere; an end of the curve cut off the whole picture."""
    from records import plot
    from records.sample import gather
    whole, zoom = plot.Figure().subplots(1, 2)
    plot.draw(whole, [gather([runs])], [], 3.28)
    plot.frame_whole(whole, [gather([runs])], 3.28)
    plot.frame_zoom(zoom, [gather([runs])], 3.28)
    left, right = zoom.get_xlim()
    assert left < 3150 < 3175 < right and right - left < 500
    assert zoom.get_ylim()[0] < 3.28 < zoom.get_ylim()[1] and zoom.get_ylim()[1] - zoom.get_ylim()[0] < 0.05
    assert whole.get_xlim()[0] == 0 and whole.get_xlim()[1] > 3200


def test_plot_files(runs, tmp_path, capsys):
    """Kills: a picture of another kind than its name says; a half-written file left; one that says when it was made."""
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert main(["plot", runs, "17", "--over", "6", "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    assert b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert not list(tmp_path.glob("*.part*"))
    capsys.readouterr()
    assert main(["plot", runs, "-o", str(tmp_path / "a.jpg")]) == 2
    assert main(["plot", *[runs] * 7, "-o", str(tmp_path / "b.png")]) == 2
    assert main(["plot", runs, "--over", "46", "-o", str(tmp_path / "b.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3 and not (tmp_path / "b.png").exists()


def test_a_missing_library_is_named(runs, tmp_path, capsys, monkeypatch):
    """Kills: a traceback where a person has not installed what draws."""
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "records.plot", raising=False)
    monkeypatch.delattr(records, "plot", raising=False)
    assert main(["plot", runs, "-o", str(tmp_path / "a.png")]) == 2
    assert "pip install -r requirements.txt" in capsys.readouterr().err
