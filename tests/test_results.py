"""results.py: where a number was made, tables, files; and which folders may import which."""

import re

import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure

import results
from harness.log import processor
from results import markdown, provenance, publish


def test_provenance(monkeypatch):
    """Kills: a line without commit, driver or a version, or of several lines; changes that are not told of; a crash, or
    an empty word, where git is not installed or the sources are no checkout."""
    line = provenance()
    assert "\n" not in line and f"torch {torch.__version__}" in line and processor() in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card X")
    said = {"--query-gpu=driver_version": "570.1", "describe": "abc123", "status": ""}
    monkeypatch.setattr(results, "output_of", lambda *command: next(said[word] for word in command if word in said))
    assert provenance().startswith("Card X, driver 570.1, ") and provenance().endswith("commit abc123")
    said["status"] = " M train_gpt.py"
    assert provenance().endswith("commit abc123-dirty")
    monkeypatch.setattr(results, "output_of", lambda *command: "")
    assert provenance().endswith("commit unknown")


def test_markdown():
    """Kills: a column that is not aligned as its kind, a bar in a head that breaks the table."""
    assert markdown([{"a|b": "x", "n": 1.23456}, {"a|b": "y", "n": 20000}]) == (
        "| a\\|b | n |\n| --- | ---: |\n| x | 1.235 |\n| y | 20000 |")


def test_publish(tmp_path, capsys):
    """Kills: a command that a shell would read otherwise, a result without its machine, a picture or a curve that is
    not written, a digit of a loss that is lost, a file that is left beside."""
    out = tmp_path / "new"
    publish("studies.one", ["a=*", "b"], out, "Words.", rows=[{"step": 1, "loss": 10.82584}], figure=Figure())
    text = (out / "one.md").read_text()
    assert text == capsys.readouterr().out
    assert text.startswith("# python -m studies.one 'a=*' b\n\n") and f"torch {torch.__version__}" in text
    assert text.endswith("\n\nWords.\n\n![one](one.png)\n") and "matplotlib" in text
    assert (out / "one.csv").read_text() == "step,loss\n1,10.82584\n"
    assert (out / "one.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    publish("bench.two", [], out, "Words.")
    assert sorted(path.name for path in out.iterdir()) == ["one.csv", "one.md", "one.png", "two.md"]


@pytest.mark.parametrize("folder, others", [
    ("bench", "studies|tests"), ("studies", "bench|tests"), ("harness", "train_gpt|records|bench|studies|tests"),
    ("kernels", "train_gpt|harness|records|bench|studies|tests"), ("records", "harness|bench|studies|tests"),
    ("data", "train_gpt|harness|records|bench|studies|tests"), ("", "bench|studies|tests")])
def test_who_imports_whom(folder, others):
    """Kills: two folders that import each other, a program of the tests or the benches that a run needs."""
    files = list((ROOT / folder).glob("*.py"))
    assert files
    for path in files:
        found = re.search(rf"^ *(from|import) ({others})\b.*$", path.read_text(), re.M)
        assert not found, f"{path.name}: {found[0]}"


def test_the_floors_of_the_harness():
    """Kills: two files of harness/ that need each other, or one that needs a file of its own floor or above."""
    floors = ["arguments graphs ranks shards torchrun", "checkpoint heartbeat log neurons", "trial", "run", "doctor"]
    known = set()
    for floor in floors:
        for name in floor.split():
            needed = re.findall(r"^from harness\.(\w+) import", (ROOT / "harness" / f"{name}.py").read_text(), re.M)
            assert set(needed) <= known, name
        known |= set(floor.split())
    assert known == {path.stem for path in (ROOT / "harness").glob("[!_]*.py")}
