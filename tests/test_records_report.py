"""report and watch: what the page says, what a browser makes of it, and a run that grows under it. Every test was seen
to fail with the mistake that its docstring names."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from test_records import MACHINE, OURS, ROOT, RULE, curve, ends, write

from records import published, recipes, report, watch
from records.__main__ import main
from records.log import expand, survey

BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
PROGRAM = OURS.replace("3 * 1.0", "3.28").replace("    def", "    matrix_update: str = 'RULE'\n\n    def", 1)


def program(rule: str = recipes.defaults()["matrix_update"]) -> str:
    return PROGRAM.replace("RULE", rule)


def sets(*names: object) -> dict[str, dict]:
    """What the page says of these logs and beside them, by title and text."""
    return {f"{each['title']} {each['text']}".strip(): each
            for each in report.contents(*survey(expand(list(map(str, names)))))["sets"]}


########################################
#              The page                #
########################################

@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(folder / "<run>.txt", *ends(3.279, 3.2781), source=program("nesterov | polar | aspect | step"))
    write(folder / "b.txt", *ends(3.2765, 3.2776), source=program())
    (folder / "c.txt").write_text("no log")
    assert main(["report", str(folder), "-o", str(folder / "r.html")]) == 0
    return folder / "r.html"


def test_page_holds_all(page):
    """Kills: a result left out, #46 told without the loss that it claims; a name of a file taken for HTML; a page that
    needs a network; a file that is no log left out in silence; a half-written file."""
    text = page.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1], parse_constant=pytest.fail)
    assert {each["record"] for each in data["sets"]} >= set(range(1, 47)) and "<run>" not in text
    own = [each for each in data["sets"] if each["own"]]
    assert [each["files"] for each in own] == [[str(page.parent / name)] for name in ("<run>.txt", "b.txt")]
    assert [(each["step"], each["n"], each["mean"], each["rule"]) for each in own] == [
        (3200, 2, 3.27855, "FAIL"), (3200, 2, 3.27705, "PASS")]
    assert next(each for each in data["sets"] if each["record"] == 46)["metric"] == "val_ema_loss"
    assert data["left_out"] == [f"skipped: {page.parent}/c.txt is no log: it has no line of ="]
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", text)
    assert [path.name for path in page.parent.glob("*r*.html")] == ["r.html"]


@pytest.mark.parametrize("rule, says", [
    ("nesterov(0.95) | aurora(2, .5) | contra(0.4) | aspect | floor(0.35) | step", ""),
    ("nesterov(0.95) | aurora(2, 0.5) | contra(0.3) | aspect | floor(0.35) | step", "contra(0.3)"),
    ("nesterov(0.95) | aurora(2, 0.5) | smooth | aspect | floor(0.35) | step", "- contra(0.4), + smooth"),
])  # fmt: skip
def test_titles_say_what_a_run_changed(tmp_path, rule, says):
    """Kills: a title that is a path; another spelling taken for a change; a stage that is new or gone passed over."""
    write(tmp_path / "a.txt", *ends(3.279), source=program(rule).replace("1 / 320", "0.003125"))
    assert f"17_aurora {says}".strip() in sets(tmp_path)


def test_titles_of_other_programs(tmp_path):
    """Kills: UUIDs for titles; two programs of one folder that are not told apart, as result #11's are not by hand; one
    name for a program on two machines; results drawn for want of a recipe; two sets with one id, of which a browser
    would draw one twice."""
    name = "08cd60f9-99e2-4e28-b1ac-19136dd42a05.txt"
    for folder, source, end in (("20260501_contra", "lr = 0.0375\n", 3.27), ("20260501_contra", "lr = 0.04\n", 3.271),
                                ("20260502_other", "lr = 1\n", 3.272)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / f"{len(os.listdir(tmp_path / folder))}{name}", *ends(end), source=source)
    second = write(tmp_path / "20260502_other" / "b.txt", *ends(3.273), source="lr = 1\n")
    Path(second).write_text(Path(second).read_text().replace(" H100 ", " NVIDIA A100-SXM4-80GB "))
    write(tmp_path / name, *ends(3.274), source="lr = 2\n")
    found = sets(tmp_path)
    own = [name for name, each in found.items() if each["own"]]
    assert own == ["08cd60f9", "contra", "contra lr=0.04", "other device 8xH100", "other device 8xA100"]
    assert {each["record"] for each in found.values() if each["shown"]} == {None, *report.FIRST_SHOWN}
    assert found["contra"]["date"] == "2026-05-01" and len({each["id"] for each in found.values()}) == len(found)


def test_logs_of_a_published_result_take_its_place(tmp_path):
    """Kills: #17 shown twice, once with the name of a folder; its pull request lost; a part of its runs taken for the
    whole."""
    runs = list(published.curves(17).values())
    write(tmp_path / "a.txt", *runs)
    found = sets(tmp_path)
    assert [each["pr"] for each in found.values() if each["record"] == 17 and each["own"]] == ["284"]
    assert len([each for each in found.values() if each["record"] == 17]) == 1
    write(tmp_path / "a.txt", *runs[:4])
    found = sets(tmp_path)
    assert any("4 of the runs of #17" in name for name in found)
    assert [each["own"] for each in found.values() if each["record"] == 17] == [False]


def test_techniques_of_published_results():
    """Kills: knobs that are not the recipe's; a result without a recipe that inherits nothing from the one it names;
    "floors" of a schedule taken for the floor."""
    known, told = report.techniques_of_record(17)
    assert known["aurora"] == "2, 0.5" and told == "the rule of records/17_aurora"
    assert "lookahead" in report.techniques_of_record(41)[0]  # 41: "#40 + Circuit-Muon"
    # 19: "KL-SOAP hyperball"; 25: "#19 + PowerCool with floors"
    assert report.techniques_of_record(25)[0].keys() == {"soap", "hyperball"}


def test_a_copied_log_is_left_out(tmp_path, capsys):
    """Kills: a traceback on a folder in which one log is another's copy."""
    for name in "ab":
        write(tmp_path / f"{name}.txt", *ends(3.279))
    assert main(["list", str(tmp_path)]) == 0 and "b.txt repeats" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0


########################################
#             The browser              #
########################################

@pytest.fixture
def browser(page, tmp_path):
    browser = Browser(f"file://{page}", str(tmp_path))
    yield browser
    browser.close()


LEGEND = "[...document.querySelectorAll('#legend b')].map(e => e.textContent)"
LISTED = "[...document.querySelectorAll('#results tbody b')].map(e => e.textContent)"
COLUMN = "[...document.querySelectorAll('#results tbody tr')].map(row => Number(row.cells[4].textContent))"
FOCUS = "document.activeElement"


@BROWSER
def test_page_in_a_browser(browser, page):
    """Kills: a page that a browser complains of or that fetches anything (it runs offline); a checkbox that draws
    nothing; a filter that filters nothing; a table that sorts numbers as words; an address that does not bring the
    selection back; a chart that the keyboard does not reach."""
    means = "document.querySelectorAll('#curves .mean').length"
    assert browser.evaluate(LEGEND)[:2] == ["06_muon", "17_aurora"] and browser.evaluate(means) == 6
    browser.click("document.querySelector('tr[data-id=\"44\"] input')")
    browser.wait(f"{means} === 7")

    browser.evaluate("(e => { e.value = 'soap'; e.dispatchEvent(new Event('change')); })"
                     "(document.querySelector('[name=technique]'))")
    listed = browser.evaluate(LISTED)
    assert "#44" in listed and "#17" not in listed
    head = "[...document.querySelectorAll('#results th button')].find(e => e.textContent === 'n')"
    unsorted = browser.evaluate(COLUMN)
    browser.click(head)
    assert browser.evaluate(COLUMN) == sorted(unsorted) != unsorted
    browser.click(head)
    assert browser.evaluate(COLUMN) == sorted(unsorted, reverse=True)

    address, legend, rows = browser.evaluate("location.href"), browser.evaluate(LEGEND), browser.evaluate(LISTED)
    browser.open(address)
    assert browser.evaluate(LEGEND) == legend and browser.evaluate(LISTED) == rows != listed

    browser.evaluate("document.querySelector('[name=whole]').focus()")
    browser.key("Enter", "\r")
    assert browser.evaluate("document.querySelector('[name=whole]').getAttribute('aria-pressed')") == "true"
    browser.key("Tab")
    browser.key("Tab")
    assert browser.evaluate(f"{FOCUS}.closest('#curves') && {FOCUS}.tagName") == "svg"
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    browser.wait("document.querySelector('#at').textContent.startsWith('at step ')")
    assert re.search(r"\d\.\d{5}", browser.evaluate("document.querySelector('#legend').textContent"))
    assert browser.evaluate(f"getComputedStyle({FOCUS}).outlineStyle") == "solid"
    assert browser.complaints == []
    fetched = browser.evaluate("performance.getEntriesByType('resource').map(e => e.name)"
                               ".filter(name => !name.startsWith('data:'))")
    assert fetched == []
    browser.open(f"file://{report.TEMPLATE}")  # as it is, without data
    assert "python -m records report fills" in browser.evaluate("document.querySelector('#left_out').innerText")
    assert browser.complaints == []


@BROWSER
def test_page_on_a_phone_in_the_dark(browser, page):
    """Kills: a page as wide as a desk, text too small to read, a table that pushes the rest aside; black on black."""
    colours = []
    for scheme in ("light", "dark"):
        browser.look(390, 844, scheme)
        browser.open(f"file://{page}")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        small = browser.evaluate("[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
                                 "[...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && "
                                 "parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.outerHTML)")
        assert small == []
        colours.append(browser.evaluate("[document.body, document.querySelector('#legend b')].map(e => "
                                        "getComputedStyle(e)).flatMap(s => [s.backgroundColor, s.color])"))
    assert colours[0][0] == colours[1][0].replace("20, 23, 26", "255, 255, 255") != colours[1][0]
    assert colours[0][3] != colours[1][3]


########################################
#                Watch                 #
########################################

@pytest.fixture
def live(tmp_path):
    """A folder of logs, and the port at which it is watched."""
    folder = tmp_path / "logs"
    folder.mkdir()
    write(folder / "20261126-a.txt", *ends(3.279), source=program())
    with watch.listen(18317, watch.handler(watch.snapshots([str(folder)], None))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield folder, server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, path: str, **headers: str) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": "localhost"} | headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers.get("ETag", "")


def test_watch_answers_this_machine_only(live):
    """Kills: an answer to a page of a stranger whose name leads here (DNS rebinding); files served beside the page;
    data sent again though nothing changed; anything written beside the logs."""
    folder, port = live
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    for host in ("localhost:1", "127.0.0.1:18317", "[::1]:18317", "localhost"):
        assert ask(port, "/", Host=host)[0] == 200
    for host in ("evil.example", "evil.example:18317", "localhost.evil.example", "127.0.0.1.evil.example:80", ""):
        assert ask(port, "/data", Host=host)[0] == 403
    assert ask(port, "/../logs/20261126-a.txt")[0] == ask(port, "/logs")[0] == 404
    status, data, tag = ask(port, "/data")
    assert status == 200 and json.loads(data)["live"] and ask(port, "/data", **{"If-None-Match": tag})[:2] == (304, b"")
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


def test_watch_takes_the_next_port_and_ends_in_a_line(live, tmp_path):
    """Kills: a traceback where the port is taken or at Ctrl-C; a line without the address, or without ssh."""
    folder, port = live
    desk = subprocess.Popen([sys.executable, "-m", "records", "watch", str(folder), "--port", str(port)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = desk.stdout.readline()
    desk.send_signal(signal.SIGINT)
    rest, err = desk.communicate(timeout=30)
    other = int(re.match(r"http://localhost:(\d+) shows ", line)[1])
    assert port < other < port + watch.PORTS and f"ssh -N -L {other}:localhost:{other} " in line
    assert (desk.returncode, rest, err) == (0, "", "\nwatch has ended; the runs go on\n")


@pytest.mark.parametrize("words, says", [
    (["no/such/folder"], "no/such/folder: no such file or folder"),
    (["--port", "70000", "."], "--port 70000: a port is a number from 1 to 65515")])
def test_watch_refuses_in_a_line(words, says, capsys, monkeypatch):
    """Kills: a traceback, or a server of nothing."""
    monkeypatch.setattr(watch.Server, "serve_forever", lambda server: pytest.fail("it serves"))
    assert main(["watch", *words]) == 2 and capsys.readouterr().err == f"records: {says}\n"


GROWING = curve({0: 10.82584, 125: 4.64419, 250: 4.10243})
SIDECAR = "".join(json.dumps({"seed": 3, "step": step, "loss": 4.1, "train_time": step * 0.2}) + "\n"
                  for step in range(25, 276, 25))


@pytest.mark.parametrize("cut", range(0, len(GROWING), 9))
def test_half_a_line_does_no_harm(tmp_path, cut):
    """Kills: a loss whose digits are not all there yet, or a line that names it a fault of the log; a line in the
    middle of which something is missing that is no longer named."""
    bad = "step:1/3200 val_loss:4.6 4419 train_time:1s\n"
    write(tmp_path / "a.txt", "seed: 3\n" + bad + GROWING[:cut], source=program())
    data = watch.look([str(tmp_path)], None, watch.reader())
    own = next(each for each in data["sets"] if each["own"])
    assert {*own["runs"][0]["losses"]} <= {10.82584, 4.64419, 4.10243}
    assert data["left_out"] == [f"skipped: {tmp_path}/a.txt: no whole loss in the line {bad[:-1]!r}"]


def test_runs_that_go_on(tmp_path):
    """Kills: a finished run called running; the time left from the last validation, not the last record of the sidecar;
    a distance from the wrong step of the reference; a run that died an hour ago called running."""
    write(tmp_path / "a.txt", "seed: 2\n", *ends(3.279), "seed: 3\n", GROWING, source=program())
    (tmp_path / "a.jsonl").write_text(SIDECAR + '{"seed": 3, "step": 300, "train_t')
    (row,) = watch.look([str(tmp_path)], None)["running"]
    assert (row["seed"], row["step"], row["steps"], row["left"]) == (3, 275, 3200, (3200 - 275) // 5)
    mean = published.moments(17)[1][250].mean
    assert row["against"] == f"{4.10243 - mean:+.5f} from #17" and row["state"] == "running"
    for age, states in ((900, ["silent for 15 min"]), (4000, [])):
        for path in tmp_path.iterdir():
            os.utime(path, (os.path.getmtime(path) - age,) * 2)
        assert [row["state"] for row in watch.look([str(tmp_path)], None)["running"]] == states


def test_the_table_of_a_sweep(tmp_path, capsys):
    """Kills: a sweep that is not shown, or otherwise than by `sweep`; a ledger taken for a log; a traceback on a ledger
    that is damaged."""
    variation = {"overrides": [], "metric": "val_loss", "last_step": 3200}
    plan = {"line": "plan", "time": "", "file": "lr.txt", "starts": [[1, ""]], "variations": [
        variation | {"name": "first", "source_sha256": "a"}, variation | {"name": "other", "source_sha256": "b"}]}
    ledger = tmp_path / "lr.txt.jsonl"
    ledger.write_text(json.dumps(plan) + "\n")
    (tmp_path / "a.jsonl").write_text(SIDECAR)
    data = watch.look([str(tmp_path)], None)
    main(["sweep", str(ledger)])
    assert data["sweeps"] == [{"name": str(ledger), "text": capsys.readouterr().out.rstrip("\n")}]
    ledger.write_text(json.dumps(plan) + "\n{}\n")
    assert ": no line of a ledger" in watch.look([str(tmp_path)], None)["sweeps"][0]["text"]


@BROWSER
def test_a_run_grows_under_the_page(live, tmp_path):
    """Kills: a page that must be loaded again; a new run that is not drawn; a selection, an open row or the focus lost
    when it is; a page that does not say that the desk has gone."""
    folder, port = live
    browser = Browser(f"http://localhost:{port}/#show=17,36", str(tmp_path), offline=False)
    try:
        browser.evaluate("window.same = true; document.querySelector('tr[data-id=\"17\"] details').open = true; "
                         "document.querySelector('[name=find]').focus()")
        log = folder / "20261126-b.txt"
        write(log, "seed: 3\n" + GROWING[:-30], source=program("nesterov | polar | aspect | step"))
        running = "document.querySelector('#running ul').textContent"
        browser.wait(f"{running}.includes('125 of 3200')")
        with open(log, "a") as file:
            file.write(GROWING[-30:])
        browser.wait(f"{running}.includes('250 of 3200') && {running}.includes('4.10243')")
        assert browser.evaluate(LEGEND) == ["#36", "#17"] and browser.evaluate(f"{FOCUS}.name") == "find"
        assert browser.evaluate("window.same && document.querySelector('tr[data-id=\"17\"] details').open")
        browser.evaluate("choose({show: null})")
        assert len(browser.evaluate(LEGEND)) > 4
        with open(log, "a") as file:
            file.write(curve({3200: 3.2}))
        browser.wait("document.querySelector('#running').hidden")
        assert [c for c in browser.complaints if "ERR_CONNECTION" not in str(c)] == []
    finally:
        browser.close()


hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@hypothesis.settings(max_examples=150, derandomize=True, deadline=None, database=None,
                     suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(data=st.binary(max_size=40), at=st.floats(0, 1), length=st.integers(0, 60),
                  line=st.one_of(st.binary(max_size=60), st.recursive(
                      st.none() | st.floats() | st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(
                          st.sampled_from(["seed", "step", "train_time"]), inner, max_size=3)).map(
                              lambda value: json.dumps(value).encode())))
def test_any_bytes_make_a_page(tmp_path_factory, data, at, length, line):
    """Kills: a traceback on a damaged log or sidecar; a number in the page that JSON does not have; bytes that end the
    page's own script."""
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    log = (program() + RULE + MACHINE + RULE + "seed: 3\n" + GROWING + curve({375: float("nan")})).encode()
    start = int(at * len(log))
    (folder / "a.txt").write_bytes(log[:start] + data + log[start + length:])
    (folder / "a.jsonl").write_bytes(SIDECAR.encode() + line + b"\n")
    found = watch.look([str(folder)], None)
    assert report.filled(found).count("</script>") == report.TEMPLATE.read_text(encoding="utf-8").count("</script>")
    assert any(each["own"] for each in found["sets"]) or found["left_out"]
