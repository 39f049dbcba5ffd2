"""What would end or spoil a run on this machine, why, and what mends it, before the run starts.

    python -m harness.doctor [--price P] [--json] [-- ARGUMENT ...]      (the arguments of train_gpt.py)

The exit code is 0 where nothing would end the run. Uses no GPU, and PyTorch only in a process of its own.

How much memory a step takes is computed, not measured, and meant as a bound: 8 bytes a parameter (weight and gradient
in bf16, the gradients' sum in fp32), and 6 for what pads a bank to equal shares; of the parameters that a GPU owns,
their masters, what the update rule keeps, and what passes while the stack that needs most is updated, as PyTorch's meta
device counts them; for each token of a micro-batch what the backward pass needs: in bf16 a layer's 8 vectors of
model_dim and 1 of mlp_dim (swiglu: 3), 8 vectors beside the layers, and the logits; RESERVE. Updates aside it is at
most a tenth above what bench/graph.py counts, whose compiled updates take less than what passes here. GPUs that do not
run the kernels keep 2 vectors of mlp_dim, and 8 bytes a logit (bf16, its gradient, an fp32 copy).
"""

import argparse
import csv
import fcntl
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOG_BYTES = 20 * 2**20  # source, lines and sidecar of a long run with --neurons
RESERVE = 2 * 2**30  # bytes of a GPU for CUDA, NCCL, workspaces and what the allocator cannot use
IN_USE = 2**30  # bytes of a GPU that something else holds; a desktop holds less
TRAINED_WITH = "torch", "triton", "numpy", "tqdm"  # packages; the others are of data/, studies/ and --wandb
INSTALL = "python -m pip install -r requirements.txt"
# {major version of CUDA: the oldest driver that runs what was built for it}, NVIDIA's "Minor Version Compatibility":
# docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
FIELDS = "index", "uuid", "driver_version", "mig.mode.current", "name", "compute_cap", "memory.total", "memory.used"
PROBE = "import sys, train_gpt; from harness.doctor import probe; probe(train_gpt, sys.argv[1:])"


class Finding(NamedTuple):
    what: str
    why: str
    mend: str
    ends: bool = True  # the run, at once or late; False: it spoils or slows it, or may end it


class Kept(NamedTuple):
    """What the owner of a bank's slots, which are matrices or numbers, has of each of them."""
    slots: int
    numel: int  # of a slot
    bytes: int  # master, and what the update rule keeps; a checkpoint holds them too
    passing: float  # bytes that an update takes beside that, while it runs

    def share(self, world: int) -> int:
        """Slots of one of `world` processes, padding included."""
        return -(-self.slots // world)


class Gpu(NamedTuple):
    index: int
    name: str
    driver: str
    capability: str
    total: int | None  # bytes; None: nvidia-smi does not tell
    used: int | None


def doctor(words: list[str], price: float | None = None) -> dict:
    """The findings on the machine, then on the run that `train_gpt.py WORDS` would be; `price`: of a GPU for an hour.
    The verdict is that nothing would end the run."""
    gpus, findings = find_gpus()
    asked = os.environ.get("WORLD_SIZE", "")  # the dry run refuses what is no number of processes
    world = int(asked) if asked.isdecimal() and int(asked) else max(1, len(gpus))
    run, plan, complaints = dry_run(words or ([] if gpus else ["@tiny"]), world)
    findings += [*packages(gpus), *driver(gpus), *waits(gpus), *taken(gpus), *port(), *resolves(), *options()]
    saved = 0
    if run:  # its data may be missing: whether it would fit is to be known before they are fetched
        size = checkpoint_bytes(run)
        saved = 2 * size if run["checkpoints"] else 0  # the old one stays until the new is whole
        lines = plan.splitlines() + [f"a checkpoint: {size / 1e9:.3g} GB"]
        plan = "\n".join(lines + (estimate(run, plan, gpus, world, price) if plan else []))
        findings += memory(run, gpus, world)
    findings += [*disk(Path("logs"), saved), *complaints]
    return {"verdict": not any(f.ends for f in findings), "python": sys.version.split()[0], "torch": version("torch"),
            "gpus": [gpu._asdict() for gpu in gpus], "plan": plan, "findings": [f._asdict() for f in findings]}


def text(result: dict) -> str:
    gpus = result["gpus"]
    device = f"{len(gpus)} x {gpus[0]['name']}" if gpus else "no GPU"
    lines = [f"Python {result['python']}, torch {result['torch'] or 'missing'}, {device}", *result["plan"].splitlines()]
    for finding in result["findings"]:
        lines += [f"{'FOUND' if finding['ends'] else 'WARNING'}: {finding['what']}",
                  f"  why it matters: {finding['why']}", f"  mend: {finding['mend']}"]
    return "\n".join(lines if result["findings"] else [*lines, "nothing found: it can start"])


def nvidia_smi(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, errors="replace")


def visible(asked: str | None, uuids: list[str]) -> list[int]:
    """The devices that a program sees under CUDA_VISIBLE_DEVICES=`asked`, in its order, as indices of `uuids`.

    CUDA takes numbers, or UUIDs or beginnings of them that fit one device. It stops at the first word that is none of
    this machine's, such as -1, and shows no device where one is named twice.
    """
    if asked is None:
        return list(range(len(uuids)))
    kind, found = asked[:4], []
    for word in asked.split(","):
        if kind in ("GPU-", "MIG-"):
            fits = [i for i, uuid in enumerate(uuids) if word.startswith(kind) and uuid.startswith(word)]
        else:
            number = re.match(r"\s*\+?(\d+)", word)
            fits = [int(number[1])] if number else []
        if len(fits) != 1:
            break
        if fits[0] in found:
            return []
        found += fits
    return list(takewhile(lambda i: i < len(uuids), found))


def mig_devices(listing: str) -> list[tuple[str, int]]:
    """(UUID, index of its GPU) of every part of a GPU, which `nvidia-smi -L` lists below that GPU."""
    found, gpu = [], 0
    for line in listing.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            gpu = int(head[1])
        elif part := re.search(r"UUID: (MIG-[^)]+)", line):
            found.append((part[1], gpu))
    return found


def find_gpus() -> tuple[list[Gpu], list[Finding]]:
    """Those that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves. A number counts in nvidia-smi's order, which is
    CUDA's where the GPUs are alike."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked == "" or not shutil.which("nvidia-smi"):
        return [], []
    answer = nvidia_smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
    rows = [row.split(", ") for row in answer.stdout.strip().splitlines()]
    if answer.returncode or any(len(row) != len(FIELDS) for row in rows):
        reason = (answer.stdout + answer.stderr).strip().splitlines() or ["it says nothing"]
        return [], [Finding(f"nvidia-smi fails: {reason[0]}", "the run would be on the CPU, without a word",
                            "install the driver of this GPU, or restart the machine after an update of it; "
                            "CUDA_VISIBLE_DEVICES= asks for the CPU")]
    gpus = []
    for index, _, driver, mig, name, capability, *memory in rows:
        parted = mig == "Enabled"  # a program gets a part, and the memory told is that of the whole
        told = all(mib.isdigit() for mib in memory) and not parted
        total, used = (int(mib) * 2**20 if told else None for mib in memory)
        gpus.append(Gpu(int(index), name + " MIG" * parted, driver, capability, total, used))
    if asked and asked.startswith("MIG-"):
        parts = mig_devices(nvidia_smi("-L").stdout)
        seen = [gpus[parts[i][1]] for i in visible(asked, [uuid for uuid, _ in parts])][:1]
    else:
        seen = [gpus[i] for i in visible(asked, [row[1] for row in rows])]
    named = takewhile(lambda word: word and not word.startswith("-"), map(str.strip, (asked or "").split(",")))
    if len(seen) < (count := len(list(named))):
        return seen, [Finding(f"CUDA_VISIBLE_DEVICES={asked}: of {count} named a program sees {len(seen)}",
                              "CUDA stops at the first that it does not find, takes none if one is named twice, and "
                              "of MIG devices one",
                              "nvidia-smi -L lists the GPUs of this machine; CUDA_VISIBLE_DEVICES= asks for the CPU",
                              ends=not seen)]
    return seen, []


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cuda_of_torch() -> str | None:
    """The version of CUDA that the installed PyTorch was built for, if for one: torch.version.cuda, not imported."""
    source = metadata.distribution("torch").locate_file("torch/version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*= '([\d.]+)'", source, re.MULTILINE)
    return found and found[1]


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
    for name, pinned in pins((ROOT / "requirements.txt").read_text(encoding="utf-8")).items():
        installed = version(name)
        if installed is None or installed.split("+")[0] != pinned:
            findings.append(Finding(f"{name} {installed or 'is missing'}, pinned is {pinned}",
                                    "what is known of this project is known for the pinned versions", INSTALL,
                                    ends=installed is None and name in TRAINED_WITH))
    torch = version("torch") or ""
    if gpus and torch and not cuda_of_torch():
        findings.append(Finding(f"torch {torch} was built without CUDA", "it cannot see the GPUs of this machine",
                                f"python -m pip uninstall torch, then {INSTALL}"))
    bad = [gpu for gpu in gpus if gpu.capability in ("8.0", "8.6")]
    if bad and torch.startswith("2.10."):
        findings.append(Finding(f"torch {torch} with {bad[0].name} (sm_{bad[0].capability.replace('.', '')})",
                                "compiled programs of that version give NaNs there", INSTALL))
    return findings


def driver(gpus: list[Gpu]) -> list[Finding]:
    """Whether it runs what PyTorch was built for. By its number; but with NVIDIA's cuda-compat package an older driver
    may, and nvidia-smi then names the newer CUDA."""
    cuda = cuda_of_torch() if gpus and version("torch") else None
    if not cuda or not gpus[0].driver[:3].isdigit():
        return []
    major, installed = int(cuda.split(".")[0]), int(gpus[0].driver.split(".")[0])
    least = LEAST_DRIVER.get(major, 0)
    said = re.search(r"CUDA Version *: *(\d+)", nvidia_smi("-q").stdout) if installed < least else None
    if installed >= least or said and int(said[1]) >= major:
        return []
    older = max((other for other, number in LEAST_DRIVER.items() if number <= installed), default=None)
    mend = f"update the driver to {least} or newer"
    if older:
        mend += f", or install a build of torch for CUDA {older}, which this one runs (pytorch.org says how)"
    return [Finding(f"driver {gpus[0].driver} with a torch that is built for CUDA {cuda}",
                    f"CUDA {major} needs driver {least} or newer: PyTorch could not use the GPUs", mend)]


def waits(gpus: list[Gpu]) -> list[Finding]:
    """The variables that keep PyTorch's watchdog from retiring the collectives that are done."""
    return [Finding(f"{name}={value}", "no CUDA graph is captured before all collectives are retired, which may then "
                    "never happen: the run could hang in its second step", f"unset {name}", ends=False)
            for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
            if gpus and (value := os.environ.get(name, "")).lower() in ("1", "y", "yes", "t", "true")]


def taken(gpus: list[Gpu]) -> list[Finding]:
    return [Finding(f"GPU {gpu.index}: {gpu.used / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB are in use",
                    "another program runs there: both would be slow, or out of memory",
                    "nvidia-smi names it; end it, or leave the GPU out with CUDA_VISIBLE_DEVICES", ends=False)
            for gpu in gpus if gpu.total is not None and gpu.used > IN_USE]


def checkpoint_bytes(run: dict) -> int:
    """The tensors of a checkpoint: masters and states of all slots."""
    return sum(kept.slots * kept.bytes for kept in run["banks"])


def step_bytes(run: dict, sequences: int, kernels: bool, world: int) -> float:
    """The memory that a step takes with a micro-batch of so many sequences, after the model above."""
    replica = sum(kept.numel * (6 * kept.share(world) * world + 2 * kept.slots) for kept in run["banks"])
    hidden = 3 if run["activation"] == "swiglu" else 1 if kernels else 2
    layer = 8 * run["model_dim"] + hidden * run["mlp_dim"]
    token = 2 * (run["num_layers"] * layer + 8 * run["model_dim"]) + (2 if kernels else 8) * run["vocab_size"]
    owned = sum(kept.share(world) * kept.bytes for kept in run["banks"])
    passing = max(kept.share(world) * kept.passing for kept in run["banks"])
    return replica + owned + passing + sequences * run["sequence_length"] * token + RESERVE


def memory(run: dict, gpus: list[Gpu], world: int) -> list[Finding]:
    """Whether the micro-batch fits the free memory of every GPU that tells of it, and which one would."""
    silent = ", ".join(str(gpu.index) for gpu in gpus if gpu.total is None)
    found = [Finding(f"GPU {silent}: memory not told by nvidia-smi", "whether a micro-batch fits there is not known",
                     "if the run is out of memory, a smaller micro_batch=, which changes no result",
                     ends=False)] if silent else []
    sequences = run["batch_tokens"] // run["sequence_length"] // world
    sizes = [n for n in range(1, min(sequences, run["micro_batch"]) + 1) if sequences % n == 0]  # as the trainer does
    free = min((gpu.total - gpu.used for gpu in gpus if gpu.total is not None), default=sys.maxsize)
    kernels = all(gpu.capability[0].isdigit() and float(gpu.capability) >= 8 for gpu in gpus)  # or [N/A]
    needs = {n: step_bytes(run, n, kernels, world) for n in sizes}
    fitting = [n for n in sizes if needs[n] <= free]
    if fitting == sizes:
        return found
    what = (f"{free / 2**30:.1f} GiB of a GPU are free, a micro-batch of {sizes[-1]} sequences may take "
            f"{needs[sizes[-1]] / 2**30:.0f} (computed, not measured)")
    mend = f"micro_batch={fitting[-1]}, which changes no result" if fitting else "use GPUs with more memory"
    return [*found, Finding(what, "the run would be out of memory in its first step", mend, ends=False)]


def estimate(run: dict, plan: str, gpus: list[Gpu], world: int, price: float | None) -> list[str]:
    """How long the steps take and what they cost: known for result #17's model and optimizer on the H100 SXM alone,
    from its published runs on 8; fewer take longer in proportion."""
    if not gpus:
        return []
    as_17 = "not a record attempt" not in plan and "| aurora(" in run["matrix_update"]
    if not gpus[0].name.endswith("H100 80GB HBM3") or not as_17:
        return [f"time: no step of this run was published for {gpus[0].name}; python -m bench.roofline predicts one"]
    with open(ROOT / "records" / "published" / "record_17_curves.csv", newline="") as file:
        ms = statistics.median(float(row["step_avg_ms"]) for row in csv.DictReader(file) if row["step_avg_ms"])
    hours = run["trials"] * run["train_steps"] * ms * 8 / world / 3.6e6
    cost = f", {hours * world * price:.2f} at {price:g} a GPU-hour" if price is not None else ""
    return [f"time: {60 * hours:.0f} minutes of steps{cost}; after the {ms:.0f} ms a step on 8 x H100 that result #17 "
            "published, not timed by us; compiling and validations come on top"]


def port() -> list[Finding]:
    """torchrun --standalone takes a free port of this machine by itself; processes started by hand take MASTER_PORT."""
    asked = os.environ.get("MASTER_PORT", "0")
    if not asked.isdecimal() or int(asked) >= 2**16:  # the dry run says so
        return []
    number = int(asked)
    try:
        with socket.create_server(("localhost", number)):
            return []
    except OSError as error:
        return [Finding(f"port {number or 'of any number'} of localhost cannot be opened: {os.strerror(error.errno)}",
                        "the processes of a run meet there", "set MASTER_PORT to a free port" if number else
                        "bring up the loopback interface: ip link set lo up")]


def disk(folder: Path, checkpoint_bytes: int) -> list[Finding]:
    """Whether a log can be written, by writing beside where it would be, and the checkpoints too."""
    place = folder if folder.is_dir() else Path(".")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\n")
            file.flush()
            unlocked = lock(file)
    except OSError as error:
        return [Finding(f"{place.resolve()} cannot be written: {error.strerror}", "the run could not begin its log",
                        "make it writable, or start in another folder")]
    found = [Finding(f"{place.resolve()} cannot be locked: {unlocked}",
                     "two runs that resume one log would both write it",
                     "see to it that one alone does; Lustre is mounted with -o flock", ends=False)] if unlocked else []
    free, needed = shutil.disk_usage(place).free, LOG_BYTES + checkpoint_bytes
    if free < LOG_BYTES:
        why = "a log that is cut off is no evidence"
    elif free < needed:
        why = "checkpoints would be given up"
    else:
        return found
    return [*found, Finding(f"{free / 2**20:.0f} MiB are free for {place.resolve()}", why,
                    f"make {needed / 2**20:.0f} MiB free", ends=free < LOG_BYTES)]


def lock(file) -> str | None:
    """Why the file cannot be locked as the trainer locks its log, or None."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror
    return None


def resolves() -> list[Finding]:
    """Whether processes that torchrun starts on this machine would find each other by its name."""
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        return []
    except OSError as error:
        return [Finding(f"the host name {socket.gethostname()} does not resolve: {error.strerror}",
                        "torchrun --standalone would wait for minutes; ./run.sh does not need the name",
                        "torchrun --local-addr localhost, or the name in /etc/hosts", ends=False)]


def options() -> list[Finding]:
    """What torchrun by hand takes from the environment for options of its own."""
    return [Finding(f"{name}={value} in the environment", "torchrun takes it for one of its options, such as a number "
                    "of machines to wait for; ./run.sh does not", f"unset {name}", ends=False)
            for name, value in sorted(os.environ.items()) if name.startswith("PET_")]


def banks(hp) -> list[Kept]:
    """Of the trainer's banks, as it would allocate them for `hp`. Needs PyTorch; allocates nothing."""
    import torch
    from harness.ranks import Place

    trainer = sys.modules[type(hp).__module__]
    with torch.device("meta"):
        made = trainer.make_banks(trainer.GPT(hp), hp, Place(0, 1, torch.device("meta")))
    return [Kept(bank.shares.count, bank.masters[0].numel(),
                 sum(x.nbytes for x in (bank.masters, *bank.state.values())) // bank.shares.padded,
                 passing(bank) / bank.shares.padded) for bank in made]


def passing(bank) -> int:
    """Bytes of the tensors that exist at once, at most, in the first part of a bank's update and in the second: the two
    together, as on a GPU the first has memory of its own. The whole stack is updated at once, as there, but stage by
    stage: a compiled program takes no more. Meta tensors have sizes, and no content."""
    import weakref
    import torch
    from rules import advance_
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    if bank.rule.in_place:  # in place
        return 0

    class Alive(TorchDispatchMode):
        held = most = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **kwargs or {})
            for storage in {x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)}:
                if storage not in known:
                    known.add(storage)
                    weakref.finalize(storage, self.free, storage.nbytes())
                    self.held += storage.nbytes()
            self.most = max(self.most, self.held)
            return made

        def free(self, size: int):
            self.held -= size

    known = weakref.WeakSet(x.untyped_storage() for x in (bank.masters, bank.gradients, *bank.state.values()))
    knobs = {name: torch.zeros((), device="meta") for name in bank.knobs}
    with Alive() as first:
        advance_(bank.rule, bank.masters, bank.gradients, bank.state, knobs)
    with Alive() as second:
        bank.rule.after_(bank.state, 1)
    return first.most + second.most


def probe(train_gpt, words: list[str]):
    """Print what the trainer makes of its arguments, as JSON, then its dry run. Needs PyTorch."""
    from harness.arguments import complain, parse
    from harness.ranks import meet
    from harness.run import recall, settle
    from harness.shards import download_of

    try:
        args, _ = settle(train_gpt.EXPERIMENT, parse(["--dry-run", *words]), 0, meet(0, 1))
        args, hp, *_ = recall(train_gpt.EXPERIMENT, args)
        print(json.dumps(vars(hp) | dict(mlp_dim=hp.mlp_dim, trials=args.trials, checkpoints=args.checkpoint_every,
                                         download=download_of(hp), banks=banks(hp))))
    except (OSError, ValueError) as error:
        complain(error)
    train_gpt.main(["--dry-run", *words])


def dry_run(words: list[str], world: int) -> tuple[dict | None, str, list[Finding]]:
    """What the trainer makes of its arguments; what it says it would do; its complaint as a finding, which names its
    remedy after a colon."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, errors="replace",
                         env={"WORLD_SIZE": str(world)} | os.environ | {"PYTHONPATH": path})
    hyperparameters, _, plan = run.stdout.strip().partition("\n")
    values = json.loads(hyperparameters) if hyperparameters else None
    if values:
        values["banks"] = [Kept(*kept) for kept in values["banks"]]
    if not run.returncode:
        return values, plan, []
    complaint = (run.stderr.strip().splitlines() or ["it says nothing"])[-1].removeprefix("train_gpt.py: ")
    what, _, remedy = complaint.partition(": ")
    if values and values["download"] and "data/fineweb" in what:
        remedy = f"python {values['download']}"
    return values, "", [Finding(what, "the run would end before its first step", remedy or "change the arguments")]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="ARGUMENT", help="of train_gpt.py; after -- also its options")
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU for an hour")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(words)
    result = doctor(options.words, options.price)
    print(json.dumps(result, indent=1) if options.json else text(result))
    return 0 if result["verdict"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
