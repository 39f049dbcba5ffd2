"""plot and report: what is drawn, and what a browser makes of it. Every test was seen to fail."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest
from test_records import ends, write

import records
from records import published
from records.__main__ import main
from records.recipes import recipes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


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


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("report")
    write(folder / "<run>.txt", *ends(3.279, 3.2781))
    assert main(["report", str(folder), "-o", str(folder / "r.html")]) == 0
    return str(folder / "r.html")


def test_report_holds_all(page):
    """Kills: a result left out, #46 told without the loss that it claims; a recipe without its rule;
    a name of a file taken for HTML; a page that needs a network."""
    text = open(page, encoding="utf-8").read()
    body = text[text.rindex("<h2>Runs</h2>"):]
    assert len(re.findall(r"<tr><td", body)) == 1 + len(recipes()) + 46
    assert "<td>17_aurora</td><td>nesterov(0.95) | aurora(2, 0.5) | " in body and "#46 (val_ema_loss)" in text
    assert "&lt;run&gt;.txt" in body and "3.27810" not in body and "3.27855" in body
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", text)
    assert not list(os.scandir(os.path.dirname(page))) == [] and not os.path.exists(page + ".part")


class Browser:
    """A page in headless Chromium, over the pipe of its DevTools protocol (file descriptors 3 and 4)."""

    def __init__(self, path: str, folder: str):
        into, self.write = os.pipe()
        self.read, out = os.pipe()
        code = f'exec {CHROMIUM} --headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir="$0" ' \
               f"--window-size=1300,1000 about:blank 3<&{into} 4>&{out}"
        self.process = subprocess.Popen(["bash", "-c", code, folder], pass_fds=(into, out), stderr=subprocess.DEVNULL)
        os.close(into)
        os.close(out)
        self.count, self.buffer, self.complaints, self.session = 0, b"", [], None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        self.call("Page.navigate", url=f"file://{path}")
        self.wait("document.readyState === 'complete' && document.querySelectorAll('.legendtoggle').length > 20")

    def call(self, method: str, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.read, 1 << 20)
                assert part, "the browser is gone"
                self.buffer += part
            answer, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(answer)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            kind, parameters = answer["method"], answer["params"]
            if kind in ("Runtime.exceptionThrown", "Log.entryAdded") or parameters.get("type") in ("error", "warning"):
                self.complaints.append(parameters)

    def evaluate(self, code: str):
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str):
        for _ in range(200):
            if self.evaluate(condition):
                return
            time.sleep(0.1)
        raise AssertionError(f"never came true: {condition}")

    def click(self, selector: str):
        """With the mouse, in the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const e = {selector}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: str) -> bytes:
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        with open(path, "wb") as file:
            file.write(data)
        return data

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def browser(page, tmp_path):
    browser = Browser(page, str(tmp_path))
    yield browser
    browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_report_in_a_browser(browser, tmp_path):
    """Kills: a page that a browser complains of or that fetches anything; a legend that switches nothing; a table that
    does not sort, or sorts numbers as words. It runs offline."""
    visible = "document.querySelectorAll('.js-plotly-plot')[1].querySelectorAll('.scatterlayer .trace').length"
    toggle = "[...document.querySelectorAll('.js-plotly-plot')[1].querySelectorAll('.traces')].find(e => " \
             "e.textContent.startsWith('#17')).querySelector('.legendtoggle')"
    before, count = browser.picture(str(tmp_path / "before.png")), browser.evaluate(visible)
    browser.click(toggle)
    browser.wait(f"{visible} === {count - 42}")  # 20 runs and their mean, in two panels
    assert browser.picture(str(tmp_path / "after.png")) != before
    browser.click(toggle)
    browser.wait(f"{visible} === {count}")

    head = "[...document.querySelectorAll('th')].filter(e => e.textContent === 'n').pop()"
    column = f"[...{head}.closest('table').tBodies[0].rows].map(row => Number(row.cells[3].textContent))"
    unsorted = browser.evaluate(column)
    browser.click(head)
    assert browser.evaluate(column) == sorted(unsorted) != unsorted
    browser.click(head)
    assert browser.evaluate(column) == sorted(unsorted, reverse=True)
    assert browser.complaints == []
    fetched = browser.evaluate("performance.getEntriesByType('resource').map(e => e.name)"
                               ".filter(name => !name.startsWith('data:'))")
    assert fetched == []


@pytest.mark.parametrize("verb", ["plot", "report"])
def test_a_missing_library_is_named(verb, runs, tmp_path, capsys, monkeypatch):
    """Kills: a traceback where a person has not installed what draws."""
    for name in ("matplotlib.axes", "plotly.graph_objects"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("records.plot", "records.report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(records, name.partition(".")[2], raising=False)
    assert main([verb, runs, "-o", str(tmp_path / "a.png")]) == 2
    assert "pip install -r requirements.txt" in capsys.readouterr().err
