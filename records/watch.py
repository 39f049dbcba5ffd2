"""`watch`: the page of `report` while runs go on, for a browser on this machine or at the end of an ssh tunnel.

Nothing is written, and no run notices. Only this machine can ask; and only by the names of this machine, so that no
page of a stranger can ask through a browser here (DNS rebinding).
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from errno import EADDRINUSE
from http.server import BaseHTTPRequestHandler
from math import inf, isfinite
from pathlib import Path
from socketserver import ThreadingTCPServer

from records import ledger, sweep
from records.log import Log, expand, read, survey
from records.report import contents, filled, number

NAMES = "localhost", "127.0.0.1", "[::1]"
PORTS = 20  # that are tried, one after the other
TAIL = 2**16  # bytes of a sidecar in which the last records stand
SILENT = 300  # seconds after which a run is called silent: compiling takes less
FORGOTTEN = 3600  # seconds after which a silent run is no longer listed as one that is running


def watch(names: list[str], port: int, metric: str | None = None) -> None:
    """Serve the page on the logs that `names` mean until Ctrl-C. ValueError where there is no such file or folder."""
    expand(logs_of(names))
    with listen(port, handler(snapshots(names, metric))) as server:
        port = server.server_address[1]
        try:
            tunnel = f"ssh -N -L {port}:localhost:{port} {socket.gethostname()}"
            print(f"http://localhost:{port} shows {' '.join(names)} until Ctrl-C. From another machine: {tunnel}, "
                  "then the same address", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nwatch has ended; the runs go on", file=sys.stderr)


########################################
#            What is shown             #
########################################

def snapshots(names: list[str], metric: str | None) -> Callable[[], bytes]:
    """What returns the data of the moment, as JSON: made anew when a file has changed, but once a second at most, and
    once a minute, for what time alone changes."""
    lock, read_again = threading.Lock(), reader()
    made, seen, content = -inf, None, b""

    def snapshot() -> bytes:
        nonlocal made, seen, content
        with lock:
            age = time.monotonic() - made
            if age > 60 or age > 1 and versions(names) != seen:
                seen = versions(names)
                content = json.dumps(look(names, metric, read_again), allow_nan=False).encode()
                made = time.monotonic()
            return content
    return snapshot


def versions(names: list[str]) -> dict[Path, tuple[int, int]]:
    """Of the logs that `names` mean, of their sidecars, and of the ledgers."""
    found = {}
    try:
        logs = expand(logs_of(names))
        for path in [*logs, *(log.with_suffix(".jsonl") for log in logs), *ledgers(names)]:
            if path.exists():
                found[path] = version(path)
    except (OSError, ValueError):  # what goes while one looks; `look` says so
        pass
    return found


def version(path: Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size


def look(names: list[str], metric: str | None, read: Callable[..., Log] = read) -> dict:
    """What `report` shows of these logs, the runs that go on, and the tables of sweeps."""
    try:
        logs, left_out = survey(expand(logs_of(names)), metric, read)
    except ValueError as error:  # a folder that is gone
        logs, left_out = [], [str(error)]
    now, data = time.time(), contents(logs, left_out)
    sets = {path: each for each in data["sets"] if each["own"] for path in each["files"]}
    running = [row for log in logs if log.path in sets if (row := run(log, sets[log.path], data["sets"], now))]
    return data | {"live": True, "running": running, "sweeps": [table(path) for path in ledgers(names)]}


def reader() -> Callable[..., Log]:
    """`log.read` with a memory. A last line without its end is being written, and no fault of the log."""
    known: dict[Path, tuple[tuple, Log | ValueError]] = {}

    def read_again(path: Path, metric: str | None) -> Log:
        now = version(path)
        if path not in known or known[path][0] != now:
            try:
                log = read(path, metric)
                if log.unread and log.unread[-1] == half_a_line(path):
                    log.unread.pop()
                known[path] = now, log
            except ValueError as error:
                known[path] = now, error
        found = known[path][1]
        if isinstance(found, ValueError):
            raise found
        return replace(found, trials=list(found.trials))  # `survey` takes repeated ones out
    return read_again


def half_a_line(path: Path) -> str:
    """What stands after the last end of a line."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 1000))
        return file.read().rpartition(b"\n")[2].decode(errors="replace")


########################################
#                Sweeps                #
########################################

def logs_of(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".jsonl")] or ["logs"]


def ledgers(names: list[str]) -> list[Path]:
    """The ledgers of sweeps among `names`, in the folders among them, and here."""
    places = [Path("."), *map(Path, names)]
    files = [file for place in places for file in (sorted(place.glob("*.jsonl")) if place.is_dir() else [place])]
    return [file for file in dict.fromkeys(files) if file.suffix == ".jsonl" and ledger.is_ledger(file)]


def table(path: Path) -> dict[str, str]:
    """The table of `python -m records sweep`, or why there is none."""
    try:
        return {"name": str(path), "text": sweep.text(sweep.sweep(ledger.read_ledger(path)))}
    except (OSError, ValueError) as error:
        return {"name": str(path), "text": str(error)}


########################################
#           Runs that go on            #
########################################

def run(log: Log, own: dict, sets: list[dict], now: float) -> dict | None:
    """Where the last run of a log stands; None where it has ended, or has been silent for long."""
    trial = log.trials[-1] if log.trials else None
    if trial is None or trial.complete or trial.fault:
        return None
    sidecar = Path(log.path).with_suffix(".jsonl")
    marks = [(at["step"], at["train_time"]) for at in last_records(sidecar) if at.get("seed") == trial.seed]
    marks = marks or [(trial.last_step, trial.train_time or 0.0)]
    (before, since), (step, seconds) = marks[max(0, len(marks) - 17)], marks[-1]  # of 128 records a run
    pace = max(0.0, (seconds - since) / (step - before) if step > before else seconds / step) if step else None
    silence = now - max(path.stat().st_mtime for path in (Path(log.path), sidecar) if path.exists())
    if silence > FORGOTTEN:
        return None
    loss = number(trial.losses.get(trial.last_step))
    silent = silence > max(SILENT, 5 * (pace or 0) * trial.train_steps / 128)
    return {"title": own["title"], "text": own["text"], "seed": trial.seed, "step": max(step, trial.last_step),
            "steps": trial.train_steps, "loss": loss, "against": against(trial, own, sets),
            "left": round(pace * max(0, trial.train_steps - step)) if pace is not None else None,
            "state": f"silent for {silence / 60:.0f} min" if silent else "running"}


def last_records(sidecar: Path) -> list[dict]:
    """The last whole records of a sidecar that name step and time."""
    try:
        with open(sidecar, "rb") as file:
            file.seek(max(0, os.path.getsize(sidecar) - TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:  # upstream's programs write none
        return []
    found = []
    for line in lines:
        try:
            match json.loads(line):
                case {"step": int(step), "train_time": int() | float() as seconds} as at:
                    found += [at] * (step >= 0 and isfinite(seconds))
        except (ValueError, RecursionError, OverflowError):  # the first is cut off
            continue
    return found


def against(trial, own: dict, sets: list[dict]) -> str:
    """How far the last loss is from the mean of the recipe's published runs at this step; nothing where their schedule
    is of another length: then it means nothing."""
    step = trial.last_step
    for other in sets:
        alike = not other["own"] and own["base"] and all(own[x] == other[x] for x in ("base", "metric", "target"))
        if alike and step and step in other["steps"] and other["steps"][-1] == trial.train_steps:
            mean = other["means"][other["steps"].index(step)]
            return f"{trial.losses[step] - mean:+.5f} from {other['title']}" if mean else ""
    return ""


########################################
#              The server              #
########################################

def listen(port: int, handler: type) -> ThreadingTCPServer:
    """A server on this port, or on the next that is free."""
    if not 0 < port < 2**16 - PORTS:
        raise ValueError(f"--port {port}: a port is a number from 1 to {2**16 - PORTS - 1}")
    for place in range(port, port + PORTS):
        try:
            return Server(("127.0.0.1", place), handler)
        except OSError as error:
            if error.errno != EADDRINUSE:
                raise ValueError(f"--port {place}: {(error.strerror or str(error)).lower()}") from None
    raise ValueError(f"the ports {port} to {place} are taken: --port names another")


class Server(ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a browser that went away
            super().handle_error(request, client_address)


def handler(snapshot: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a request

        def do_GET(self):
            host = self.headers.get("Host", "")
            if (host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host) not in NAMES:
                return self.answer(403, f"ask for one of {', '.join(NAMES)}\n".encode(), "text/plain")
            path = self.path.partition("?")[0]
            if path not in ("/", "/data"):
                return self.answer(404, b"there are / and /data\n", "text/plain")
            data = snapshot()
            tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            if path == "/":
                self.answer(200, filled(json.loads(data)).encode(), "text/html; charset=utf-8")
            elif self.headers.get("If-None-Match") == tag:
                self.answer(304, b"", "application/json", tag)
            else:
                self.answer(200, data, "application/json", tag)

        def answer(self, status: int, content: bytes, kind: str, tag: str = ""):
            self.send_response(status)
            for name, value in (("Content-Type", kind), ("Content-Length", len(content)), ("Cache-Control", "no-store"),
                                ("X-Content-Type-Options", "nosniff"), *([("ETag", tag)] if tag else [])):
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):  # the terminal is a person's
            pass
    return Handler
