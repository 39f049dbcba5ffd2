"""`doctor`: what would end or spoil a run on this machine, before it starts. Uses no GPU, and PyTorch only in a process
of its own."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOG_BYTES = 20 * 2**20  # source, lines and sidecar of a long run with --neurons
IN_USE = 2**30  # bytes of a GPU that something else holds; a desktop holds less
INSTALL = "python -m pip install -r requirements.txt"


class Finding(NamedTuple):
    what: str
    why: str
    mend: str


class Gpu(NamedTuple):
    index: int
    name: str
    capability: str
    total: int  # bytes
    used: int


def doctor(words: list[str]) -> dict:
    """The findings on the machine, then on the run that `train_gpt.py WORDS` would be."""
    gpus, driver = find_gpus()
    findings = [*driver, *packages(gpus), *memory(gpus), *disk(Path("logs"))]
    plan, run = dry_run(words or ([] if gpus else ["@tiny"]), max(1, len(gpus)))
    findings += run
    return {"verdict": not findings, "python": sys.version.split()[0], "torch": version("torch"),
            "gpus": [gpu._asdict() for gpu in gpus], "plan": plan, "findings": [f._asdict() for f in findings]}


def text(result: dict) -> str:
    gpus = result["gpus"]
    device = f"{len(gpus)} x {gpus[0]['name']}" if gpus else "no GPU"
    lines = [f"Python {result['python']}, torch {result['torch'] or 'missing'}, {device}", *result["plan"].splitlines()]
    for finding in result["findings"]:
        lines += [f"FOUND: {finding['what']}", f"  why it matters: {finding['why']}", f"  mend: {finding['mend']}"]
    return "\n".join(lines if result["findings"] else [*lines, "nothing found: it can start"])


def find_gpus() -> tuple[list[Gpu], list[Finding]]:
    """Those that nvidia-smi lists and CUDA_VISIBLE_DEVICES, by number, leaves."""
    if not shutil.which("nvidia-smi"):
        return [], []
    query = "--query-gpu=index,name,compute_cap,memory.total,memory.used"
    answer = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    if answer.returncode:
        reason = (answer.stdout + answer.stderr).strip().splitlines() or ["it says nothing"]
        return [], [Finding(f"nvidia-smi fails: {reason[0]}", "the run would be on the CPU, without a word",
                            "install the driver of this GPU, or restart the machine after an update of it")]
    rows = [row.split(", ") for row in answer.stdout.strip().splitlines()]
    gpus = [Gpu(int(index), name, capability, int(total) * 2**20, int(used) * 2**20)
            for index, name, capability, total, used in rows]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [gpu for gpu in gpus if visible is None or str(gpu.index) in visible.split(",")], []


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pins(requirements: str) -> dict[str, str]:
    """{package: version} that requirements.txt asks for under this Python."""
    found = {}
    for name, pinned, sign, limit in re.findall(
            r'^(\w+)==([\w.]+)(?:; python_version (<|>=) "3\.(\d+)")?$', requirements, re.MULTILINE):
        if not sign or (sys.version_info[1] < int(limit)) == (sign == "<"):
            found[name] = pinned
    return found


def packages(gpus: list[Gpu]) -> list[Finding]:
    findings = []
    for name, pinned in pins((ROOT / "requirements.txt").read_text()).items():
        installed = version(name)
        if installed is None or installed.split("+")[0] != pinned:
            findings.append(Finding(f"{name} {installed or 'is missing'}, pinned is {pinned}",
                                    "what is known of this project is known for the pinned versions", INSTALL))
    torch = version("torch") or ""
    if gpus and torch.endswith("+cpu"):
        findings.append(Finding(f"torch {torch} was built without CUDA", "it cannot see the GPUs of this machine",
                                f"python -m pip uninstall torch, then {INSTALL}"))
    bad = [gpu for gpu in gpus if gpu.capability in ("8.0", "8.6")]
    if bad and torch.startswith("2.10."):
        findings.append(Finding(f"torch {torch} with {bad[0].name} (sm_{bad[0].capability.replace('.', '')})",
                                "compiled programs of that version give NaNs there", INSTALL))
    return findings


def memory(gpus: list[Gpu]) -> list[Finding]:
    return [Finding(f"GPU {gpu.index}: {gpu.used / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB are in use",
                    "another program runs there: both would be slow, or out of memory",
                    "nvidia-smi names it; end it, or leave the GPU out with CUDA_VISIBLE_DEVICES")
            for gpu in gpus if gpu.used > IN_USE]


def disk(folder: Path) -> list[Finding]:
    """Whether a log can be written, by writing beside where it would be."""
    place = folder if folder.is_dir() else Path(".")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\n")
    except OSError as error:
        return [Finding(f"{place.resolve()} cannot be written: {error.strerror}", "the run could not begin its log",
                        "make it writable, or start in another folder")]
    free = shutil.disk_usage(place).free
    if free < LOG_BYTES:
        return [Finding(f"{free / 2**20:.0f} MiB are free for {place.resolve()}",
                        "a log that is cut off is no evidence", f"make {LOG_BYTES // 2**20} MiB free")]
    return []


def dry_run(words: list[str], world: int) -> tuple[str, list[Finding]]:
    """What the trainer says it would do; its complaint, which names its remedy after a colon, is a finding."""
    run = subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), "--dry-run", *words], capture_output=True,
                         text=True, env=os.environ | {"WORLD_SIZE": str(world)})
    if not run.returncode:
        return run.stdout.strip(), []
    complaint = (run.stderr.strip().splitlines() or ["it says nothing"])[-1].removeprefix("train_gpt.py: ")
    what, _, remedy = complaint.partition(": ")
    return "", [Finding(what, "the run would end before its first step", remedy or "change the arguments")]
