"""The log: one runnable program, the facts beside it, then a line a validation; and its sidecar for machines."""

import ast
import builtins
import fcntl
import glob
import gzip
import hashlib
import json
import os
import re
import subprocess
import symtable
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

from harness.arguments import Experiment, departures
from harness.ranks import Place, micro_batch_size
from kernels.bf16 import runs_kernels, triton
from kernels.newton_schulz import newton_schulz_path

SEPARATOR = "=" * 100  # between program, facts and lines, as upstream's parsers know it


########################################
#               Program                #
########################################

def flatten(path: Path, root: Path) -> str:
    """A file and the files below `root` that it needs as one program: each whole, once and after those that it needs
    itself, under a banner with its name. Their imports of each other become comments, and the docstring of `path`
    comes first, as it is the program's. A file that needs no other is such a program already.
    """
    parts, meanings = {}, {name: f"builtins.{name}" for name in dir(builtins)}

    def add(path: Path):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        lines, tree = text.split("\n"), ast.parse(text)
        for node, needed in local_imports(tree, lines, name, root):
            if needed not in parts:
                add(needed)
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = f"# {lines[i]}"
        for word, meaning in names_of(text, tree, name.removesuffix(".py").replace("/", ".")).items():
            assert meanings.setdefault(word, meaning) == meaning, (
                f"{name}: {word} is {meaning} here and {meanings[word]} above; the log's program is one file")
        parts[path] = lines
        return text, tree

    text, tree = add(path)
    if len(parts) == 1:
        return text
    end = tree.body[0].end_lineno
    docstring, parts[path] = parts[path][:end], parts[path][end:]
    texts = [f"{'#' * 80}\n#{file.relative_to(root).as_posix():^78}#\n{'#' * 80}\n" + "\n".join(lines)
             for file, lines in parts.items()]
    return "\n\n".join(["\n".join(docstring), *texts])


def local_imports(tree: ast.Module, lines: list[str], name: str, root: Path) -> Iterator[tuple[ast.stmt, Path]]:
    """The statements of a file that import one of this project's, each with what it imports. AssertionError where a
    statement could not become a comment, as the names that it makes would be lost."""
    for node in ast.walk(tree):
        needed = local_files(node, root)
        if not needed and not getattr(node, "level", 0):
            continue
        plain = node.col_offset == 0 and re.fullmatch(r"from \w[\w.]* import \w+(, \w+)*", ast.unparse(node))
        assert plain and needed[0].name != "__init__.py", (
            f"{name}:{node.lineno}: {lines[node.lineno - 1].strip()}: the log's program is one file; write "
            "`from FILE import NAME`, not indented")
        yield node, needed[0]


def local_files(node: ast.AST, root: Path) -> list[Path]:
    """The files of this project that a statement imports: of a folder, its __init__.py."""
    modules = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
               [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
    places = [root / module.replace(".", "/") for module in modules]
    return [file for place in places for file in (Path(f"{place}.py"), place / "__init__.py") if file.is_file()]


def names_of(text: str, tree: ast.Module, module: str) -> dict[str, str]:
    """{name: what it stands for} of all that a module defines or imports at its top level; `tree`: its text, parsed."""
    symbols = symtable.symtable(text, module, "exec").get_symbols()
    names = {symbol.get_name(): f"{module}.{symbol.get_name()}" for symbol in symbols if symbol.is_assigned()}
    for node in tree.body:
        match node:
            case ast.ImportFrom(source, aliases):
                names |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in aliases}
            case ast.Import(aliases):
                names |= {alias.asname or alias.name.split(".")[0]:
                          alias.name if alias.asname else alias.name.split(".")[0] for alias in aliases}
    return names


def render(source: str, hp) -> str:
    """The source with the values of this run as the defaults of Hyperparameters; those that differ are written anew."""
    lines = source.splitlines(keepends=True)
    body = next(node.body for node in ast.parse(source).body
                if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters")
    for node in body:
        if isinstance(node, ast.AnnAssign) and getattr(hp, node.target.id) != getattr(type(hp), node.target.id):
            i, value = node.value.lineno - 1, repr(getattr(hp, node.target.id))
            # ast counts columns in bytes of UTF-8; these lines are ASCII up to their comment
            lines[i] = lines[i][:node.value.col_offset] + value + lines[i][node.value.end_col_offset:]
    return "".join(lines)


@cache  # a run asks several times
def source_of_run(script: Path, hp) -> str:
    """All of the program, with the values of the run: what stands at the head of its log."""
    return render(flatten(script, script.parent), hp)


def source_sha256(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


########################################
#                Facts                 #
########################################

def facts(experiment: Experiment, hp, place: Place, shards: dict[str, int]) -> str:
    """The block after the source: upstream's sentence, then `name: value` lines for whatever else a run depends on."""
    size = micro_batch_size(hp.batch_tokens // hp.sequence_length // place.world, hp.micro_batch)
    lines = [*machine(place), *paths(hp, place), f"commit: {commit(experiment.script.parent)}",
             f"source_sha256: {source_sha256(source_of_run(experiment.script, hp))}", f"micro_batch: {size}",
             *departures(hp, experiment.rules)]
    lines += [f"shard: {path} {count}" for path, count in shards.items()]
    lines += [f"env: {name}={value}" for name, value in sorted(os.environ.items())
              if name.startswith(("TORCH", "TRITON", "NCCL", "CUDA"))]
    return "\n".join(lines)


def machine(place: Place) -> list[str]:
    """What the run stands on; it may be another machine when it is resumed."""
    gpu = place.device.type == "cuda"
    device = torch.cuda.get_device_name(place.device) if gpu else processor()
    first = (f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda} on {device} "
             f"with world_size {place.world}")
    if not gpu:
        return [first, f"threads: {torch.get_num_threads()}"]
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    return [first, f"driver: {driver}", f"triton: {triton.__version__}"]


def moved(before: list[str], place: Place) -> str:
    """What the line of a resumed run says where this machine is not that of the head, whose facts are `before`:
    nothing where it is the same."""
    def alone(lines):
        return [line.rpartition(" with world_size")[0] or line for line in lines]
    first, *others = alone(machine(place))
    if {first, *others} <= set(alone(before)):
        return ""
    device = first.rpartition(" on ")[2]
    return ", ".join([f", on {device}", f"PyTorch {torch.__version__}", *(other.replace(":", "") for other in others)])


def paths(hp, place: Place) -> list[str]:
    """Which of the ways to compute the same this run takes on its device."""
    kernels = "Triton" if runs_kernels(place.device) else "plain PyTorch"
    if kernels == "Triton" and hp.activation == "swiglu":  # the kernels of the MLP are relu2's
        kernels += ", MLP plain PyTorch"
    rule = hp.rule("matrix_update")
    graph = "compiled, " * (not rule.in_place) + ("a CUDA graph a bank" if rule.captured else "no CUDA graph")
    return [f"attention: {place.attention}", f"kernels: {kernels}",
            f"newton_schulz: {newton_schulz_path(place.device)}",
            f"update: {graph if place.device.type == 'cuda' else 'eager'}"]


def commit(root: Path) -> str:
    """Of this project's own repository: one around a copy without .git says nothing of it."""
    git = "git", "-C", str(root)
    if Path(output_of(*git, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
        return "none"
    dirty = output_of(*git, "status", "--porcelain", "--untracked-files=no")
    return (output_of(*git, "rev-parse", "HEAD") or "none") + " (dirty)" * bool(dirty)


def output_of(*command: str) -> str:
    """What a program prints, stripped; nothing where it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="replace").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    names = re.findall(r"^model name\s*: (.+)$", output_of("cat", "/proc/cpuinfo"), re.MULTILINE)
    return f"CPU {names[0]}" if names else "CPU"


########################################
#                Files                 #
########################################

class RunLog:
    """logs/NAME.txt, the source and then what upstream's parsers read, and logs/NAME.jsonl, the same for machines.

    Rank 0 writes; on other ranks nothing happens. Files are line-buffered: a killed run leaves whole lines.
    `listeners` are called with each record of the sidecar. To continue a log, pass the `lengths` that its files are
    truncated to first. OSError where another process writes the log; a file system that cannot lock is a warning.
    """

    def __init__(self, name: str | None, lengths: dict[str, int] | None = None, listeners: list[Callable] = ()):
        self.name, self.listeners = name, listeners
        self.text = self.json = None
        if name is not None:
            Path("logs").mkdir(exist_ok=True)
            # a path on the command line may be bytes that are no UTF-8
            self.text, self.json = (open(f"logs/{name}.{ending}", "a" if lengths else "x", buffering=1,
                                         encoding="utf-8", errors="surrogateescape") for ending in ("txt", "jsonl"))
            try:
                fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as this process lives
            except BlockingIOError:
                raise BlockingIOError(f"logs/{name}.txt belongs to a run that lives: wait for its end, or end it"
                                      ) from None
            except OSError as error:  # ENOSYS of Lustre without -o flock, ENOLCK of NFS without lockd
                print(f"train_gpt.py: warning: logs/ cannot be locked ({error.strerror}): see to it that no other run "
                      "resumes this log", file=sys.stderr)
            for path, length in log_files(name).items():
                if lengths and length:
                    os.truncate(path, lengths[path])

    def facts(self) -> list[str]:
        """The lines of the log's head."""
        text = Path(self.text.name).read_text(encoding="utf-8", errors="surrogateescape")
        return text.split(SEPARATOR + "\n")[1].splitlines()

    def line(self, text: str):
        if self.text:
            self.text.write(text + "\n")

    def record(self, **values):
        if self.json:
            self.json.write(json.dumps(values) + "\n")
        for listener in self.listeners:
            listener(**values)

    def record_neurons(self, records: list[dict]):
        # a gzip member of its own each time: what a killed run has written can be read
        with gzip.open(f"logs/{self.name}.neurons.jsonl.gz", "at", encoding="utf-8") as file:
            file.writelines(json.dumps(values) + "\n" for values in records)


def say(line: str, write: Callable = print):
    """Print what the log has too. The run goes on where nobody reads it any more: `| head`, a launcher that is gone."""
    try:
        write(line)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is in the buffer, and for all that follows


def log_files(name: str) -> dict[str, int]:
    """{path: bytes} of a run's files, 0 for one that is not there."""
    paths = [f"logs/{name}.{ending}" for ending in ("txt", "jsonl", "neurons.jsonl.gz")]
    return {path: os.path.getsize(path) if os.path.exists(path) else 0 for path in paths}


def is_fork(path: Path) -> bool:
    """Whether a log says so."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return any("\npartial: " in facts for facts in text.split(SEPARATOR)[1:2])


def ended_seeds(sha256s: set[str], cut: str | None = None) -> dict[int, tuple[str, bool]]:
    """{seed: (path, whether it is finished)} of the trials of these exact programs in logs/ that are finished, with a
    finite loss, or have failed. Forks do not count, nor does `cut`, the log that is about to be truncated and resumed.
    What cannot be read is a line, and skipped."""
    ended = {}
    for path in sorted(set(glob.glob("logs/*.txt")) - {cut}):
        try:
            parts = Path(path).read_text(encoding="utf-8", errors="replace").split(SEPARATOR + "\n")
        except OSError as error:
            print(f"skipped: {path}: {error.strerror}", file=sys.stderr)
            continue
        if (len(parts) < 3 or "\npartial: " in parts[1] or
                sha256s.isdisjoint(line.removeprefix("source_sha256: ") for line in parts[1].splitlines())):
            continue
        _, *trials = re.split(r"^seed: (\d+)\n", parts[2], flags=re.MULTILINE)
        for seed, curve in zip(map(int, trials[::2]), trials[1::2]):
            if re.search(r"^step:(\d+)/\1 val_loss:\d.*\n(?!failed: )", curve, re.MULTILINE):
                ended[seed] = path, True
            elif re.search(r"^failed: ", curve, re.MULTILINE):
                ended.setdefault(seed, (path, False))
    return ended


def mirror_to_wandb(name: str, mode: str, hp) -> Callable:
    """What sends a record of the sidecar to W&B; curves carry the trial's seed in their name. ConnectionError
    where W&B does not take them."""
    import wandb  # only --wandb needs it
    try:
        run = wandb.init(project="track-3", name=name, dir="logs", mode=mode, config=vars(hp))
    except wandb.Error as error:
        raise ConnectionError(f"--wandb {mode}: {error}; --wandb offline needs neither") from None
    run.define_metric("*", step_metric="step")  # W&B's own step may not fall back, as it does from trial to trial

    def mirror(seed: int, step: int, **values):
        run.log({"step": step} | {f"{name}/seed {seed}": value for name, value in values.items()})
    return mirror
