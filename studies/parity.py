"""Does another script of the track train as train_gpt.py does? Same tokens, same schedule, same machine, two curves.

    python data/local.py --encoding gpt2 /usr/share /usr/lib/python3      text of this machine, once: 60M tokens or more
    python -m studies.parity --script OTHER.py [--steps N] [--seeds K] [--pairs] [NAME=VALUE ...]

NAME=VALUE are train_gpt.py's; OTHER.py keeps its own recipe as literals, of which a short run changes four: steps,
validation tokens, interval of evaluations, micro-batch. These edits are shown; a script in which one cannot be made is
refused. Both run under torchrun with a process a GPU, or one on the CPU, in turn: a drift of the machine's speed meets
both. Ours have the seeds 0 to K - 1; a script that takes --seed gets K to 2K - 1, one that sets none draws weights of
its own each time: all 2K runs are independent. With --pairs it gets 0 to K - 1 too, for a script that draws the weights
of a seed as train_gpt.py does: the band stays, but the difference is known more exactly, as most noise cancels.

PARITY is accepted where, at each of the J evaluations after step 25, the difference of the two means of `metric`
(val_loss, or val_ema_loss) lies inside the band of seed noise, t(1 - .05 / 2J, 2K - 2) s sqrt(2 / K), s the pooled
deviation between runs (records/statistics.py). By Bonferroni's inequality a faithful script is accepted in at least 95%
of cases over its whole curve. What an acceptance is worth, the report says with it: the difference that would have been
refused in nine cases of ten.

Exit code 0 where parity is accepted, 1 where it is refused, 2 where there is nothing to judge.
"""

import argparse
import ast
import difflib
import glob
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from itertools import accumulate
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from harness.log import output_of
from harness.shards import batches_in, check_tokens, find_shards, open_shard
from records.program import number
from records.sample import Sample, gather
from records.statistics import Moments, paired, pooled, t_quantile
from results import publish
from studies import RESULTS
from train_gpt import Hyperparameters, override

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from shards import END_OF_TEXT, write_shard

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = ["train_files=data/local/local_train_*.bin", "val_files=data/local/local_val_*.bin", "val_tokens=524288",
            "val_every=25"]
BYTES = 257  # a vocabulary of 256 bytes and END_OF_TEXT
INTERVALS = ("val_step_freq", "val_interval", "val_regular_interval")  # names in scripts of the track
JUDGED_AFTER = 25  # steps
LEVEL = 0.05  # of a faithful script's chances to be refused


########################################
#           The other script           #
########################################

def edit(source: str, hp: Hyperparameters) -> str:
    """The script with what a run of hp changes. ValueError where a place is not found."""
    program = ast.parse(source)
    values = {literal(program, "train_steps"): hp.train_steps, literal(program, "val_tokens"): hp.val_tokens,
              literal(program, "mbs"): hp.micro_batch, interval(program): hp.val_every}
    raw = source.encode()  # ast counts columns in bytes
    starts = [0, *accumulate(map(len, raw.splitlines(keepends=True)))]
    for node, value in sorted(values.items(), key=lambda place: (place[0].lineno, place[0].col_offset), reverse=True):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        raw = raw[:start] + str(value).encode() + raw[end:]
    return raw.decode()


def seed_arguments(source: str, seed: int) -> list[str]:
    """ValueError for a script that would draw the same weights again and again."""
    if "--seed" in source:
        return ["--seed", str(seed)]
    if "manual_seed" in source:
        raise ValueError("it sets a seed of its own: have it take --seed S")
    return []


def assigned(program: ast.Module, name: str) -> list[ast.expr]:
    return [node.value for node in ast.walk(program) if isinstance(node, ast.Assign) and
            [ast.unparse(target) for target in node.targets] == [name]]


def literal(program: ast.Module, name: str) -> ast.expr:
    """The number in the one assignment to a name, or to the name that stands for it."""
    values = assigned(program, name)
    if len(values) != 1:
        raise ValueError(f"{len(values) or 'no'} lines `{name} = ...`, where one is to be changed")
    if isinstance(values[0], ast.Name):
        return literal(program, values[0].id)
    try:
        number(values[0])
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None
    return values[0]


def interval(program: ast.Module) -> ast.expr:
    """Steps between evaluations: a name's value, or the N of `step % N`."""
    found = [value for name in INTERVALS for value in assigned(program, name)]
    for node in ast.walk(program):
        match node:
            case ast.BinOp(ast.Name("step"), ast.Mod(), ast.Constant() as value):
                found.append(value)
    if len(found) != 1:
        raise ValueError(f"{len(found) or 'no'} intervals of evaluations, where one is to be changed: "
                         f"{', '.join(INTERVALS)} = ..., or step % N")
    return found[0]


########################################
#             Data and runs            #
########################################

def lay_out(hp: Hyperparameters, folder: Path) -> str:
    """Put the shards where scripts of the track look for them, folder/fineweb10B, again from the first one where the
    steps need more. Returns what the tokens are. ValueError names what is missing."""
    target = folder / "fineweb10B"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    paths = {kind: sorted(glob.glob(pattern)) for kind, pattern in (("val", hp.val_files), ("train", hp.train_files))}
    find_shards(hp.train_files, hp.batch_tokens, 1, END_OF_TEXT + 1)  # enough for one batch at least, and whole
    find_shards(hp.val_files, hp.val_tokens, 1, END_OF_TEXT + 1)
    for kind in paths:
        for i, path in enumerate(paths[kind]):
            shard = target / f"fineweb_{kind}_{i:06d}.bin"
            if hp.vocab_size == BYTES:
                tokens = np.array(open_shard(path))
                tokens[tokens == END_OF_TEXT] = BYTES - 1
                write_shard(shard, tokens)
            else:
                shard.symlink_to(Path(path).resolve())
    train = sorted(target.glob("fineweb_train_*.bin"))
    shards = [open_shard(path) for path in train]
    batches = sum(batches_in(tokens, hp.batch_tokens) for tokens in shards)
    for copy in range(1, -(-hp.train_steps // batches)):
        for i, path in enumerate(train):
            path.with_name(f"fineweb_train_{copy * len(train) + i:06d}.bin").symlink_to(path.name)
    for path in find_shards(f"{target}/fineweb_train_*.bin", hp.batch_tokens, hp.train_steps, hp.vocab_size):
        check_tokens(open_shard(path), hp.vocab_size)
    fineweb = all(Path(path).name.startswith("fineweb") for path in paths["train"])
    again = "none is seen twice" if hp.train_steps <= batches else (
        f"each is seen {hp.train_steps / batches:.1f} times, in one order")
    return (f"{'On FineWeb' if fineweb else 'On local text, not FineWeb'}: {sum(map(len, shards)):,} "
            f"{'bytes' if hp.vocab_size == BYTES else 'tokens'}, {batches} batches of {hp.batch_tokens:,}: "
            f"in {hp.train_steps} steps {again}.")


# Of a process that this one starts Linux would report at least this one's own size, so one in between asks.
LARGEST = """import pathlib, resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
pathlib.Path("largest").write_text(str(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)"""


def processes() -> int:
    return max(1, torch.cuda.device_count())


def run(folder: Path, data: Path, script: Path, words: list[str]):
    """Train in a folder of its own, unless that has been done. Beside the log lies peak_memory, in bytes.

    With GPUs: the highest memory.used of a GPU by nvidia-smi, sampled once a second, above what it was before; it
    counts CUDA's own and what the allocator keeps. Without: the largest resident set of a process.
    """
    if (folder / "peak_memory").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "data").symlink_to(data.resolve())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes()}",
               str(script.resolve()), *words]
    gpu = torch.cuda.is_available()
    before = peak = gpu_memory() if gpu else 0
    with open(folder / "output", "w") as output, subprocess.Popen(
            [sys.executable, "-c", LARGEST, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT) as process:
        while gpu and process.poll() is None:
            peak = max(peak, gpu_memory())
            time.sleep(1)
    if process.returncode:
        raise ValueError(f"{script} ended with code {process.returncode}: see {folder / 'output'}")
    (folder / "peak_memory").write_text(str(peak - before) if gpu else (folder / "largest").read_text())


def gpu_memory() -> int:
    """Bytes that are used on the fullest GPU."""
    used = output_of("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").split()
    return max(map(int, used)) << 20


def train_both(args: argparse.Namespace, hp: Hyperparameters, folder: Path):
    """K runs of each in folder/ours and folder/other, in turn."""
    words = [f"{name}={value}" for name, value in vars(hp).items() if not name.endswith("_files")]
    source, runs = args.script.read_text(), []
    script = folder / args.script.name
    script.write_text(edit(source, hp))
    for k in range(args.seeds):
        pair = [("ours", k, ROOT / "train_gpt.py", [*words, "--seed", str(k)]),
                ("other", k, script, seed_arguments(source, args.first_seed + k))]
        runs += pair if k % 2 == 0 else pair[::-1]
    for name, k, script, arguments in tqdm(runs, unit="run", disable=None):
        run(folder / name / str(k), folder / "data", script, arguments)


########################################
#               Judgement              #
########################################

def judge(ours: Sample, other: Sample, pairs: bool = False) -> dict:
    """The two curves at every common step, and the verdict; in pairs run k of each began with equal weights. ValueError
    where there is nothing to judge."""
    for sample in (ours, other):
        if sample.n < 2 or sample.diverged:
            raise ValueError(f"{sample.name}: {sample.n} runs can be used, {len(sample.diverged)} diverged: "
                             "to judge takes two that draw different weights")
    steps = [step for step in ours.moments if step in other.moments]
    count = sum(step > JUDGED_AFTER for step in steps)
    if not count:
        raise ValueError(f"no common evaluation after step {JUDGED_AFTER}: train longer, or evaluate more often")
    rows = [compare(step, [[trial.losses[step] for trial in sample.used if step in trial.losses]
                           for sample in (ours, other)], pairs, LEVEL / count) for step in steps]
    judged = [row for row in rows if row["step"] > JUDGED_AFTER]
    worst = max(judged, key=lambda row: abs(row["difference"]) / (row["band"] or 1))
    return {"verdict": all(abs(row["difference"]) <= row["band"] for row in judged), "n": (ours.n, other.n),
            "pairs": pairs, "rows": rows, "judged": count, "worst": worst}


def compare(step: int, losses: list[list[float]], pairs: bool, level: float) -> dict:
    a, b = map(Moments.of, losses)
    noise = pooled(a, b)
    at = paired(*losses) if pairs else noise
    threshold, spread = refusal(noise.df, level, at.error / (noise.error or 1))
    return {"step": step, "ours": a.mean, "other": b.mean, "difference": at.value, "half_width": at.half_width(),
            "band": threshold * noise.error, "refused_in_90%": (threshold + 1.2816 * spread) * noise.error}


def refusal(df: float, level: float, error: float = 1) -> tuple[float, float]:
    """(t, s): a two-sided t-test refuses a true difference of x standard errors with probability Phi((x - t) / s), or a
    little more often: the normal approximation of the non-central t (Johnson and Welch 1940). `error`: that of the
    difference, in those; in pairs it is smaller."""
    t = t_quantile(1 - level / 2, df)
    return t, sqrt(error * error + t * t / (2 * df))


def seconds_a_step(sample: Sample) -> float:
    """Median over the times between evaluations, but for the first of each run, which holds its compilation."""
    times = []
    for trial in sample.used:
        found = re.findall(r"^step:(\d+)/.* val_loss:.* train_time:([\d.]+)(ms|s)", Path(trial.name).read_text(), re.M)
        clock = [(int(step), float(t) / (1000 if unit == "ms" else 1)) for step, t, unit in found]
        times += [(t - before) / (step - start) for (start, before), (step, t) in zip(clock[1:], clock[2:])]
    return statistics.median(times)


def sentence(result: dict) -> str:
    at, last = result["worst"], result["rows"][-1]
    said = (f"at step {at['step']} the difference of the means is {at['difference']:+.4f} nats, "
            f"{abs(at['difference']) / (at['band'] or 1):.2f} of the band, +-{at['band']:.4f}")
    verdict = (f"PARITY: at all {result['judged']} evaluations after step {JUDGED_AFTER} the curves differ by no more "
               f"than seeds do; nearest to the edge, {said}" if result["verdict"] else f"NO PARITY: {said}")
    n = f"n={result['n'][0]} and {result['n'][1]}{', in pairs' * result['pairs']}"
    return (f"{verdict} ({n}). At the last step it is {last['difference']:+.4f} +- {last['half_width']:.4f} (95%); one "
            f"of {last['refused_in_90%']:.4f} would be refused there in nine cases of ten.")


########################################
#                Report                #
########################################

def table(result: dict) -> str:
    lines = ["| step | ours | other | difference | +- 95% | band |", "|---:|---:|---:|---:|---:|---:|"]
    for row in result["rows"]:
        band = f"{row['band']:.4f}" if row["step"] > JUDGED_AFTER else "not judged"
        lines.append(f"| {row['step']} | {row['ours']:.4f} | {row['other']:.4f} | {row['difference']:+.4f} | "
                     f"{row['half_width']:.4f} | {band} |")
    return "\n".join(lines)


def cost(ours: Sample, other: Sample) -> str:
    """Time of a step and peak memory of both, as sentences."""
    a, b = seconds_a_step(ours), seconds_a_step(other)
    memory = [max(int(Path(trial.name).parents[1].joinpath("peak_memory").read_text()) for trial in sample.used)
              for sample in (ours, other)]
    kind = "memory.used of a GPU, by nvidia-smi" if torch.cuda.is_available() else "resident set of a process"
    gpu = "" if torch.cuda.is_available() else " No GPU was at hand: time and memory on GPUs are not measured."
    return (f"A step takes {1000 * a:.1f} ms, the other's {1000 * b:.1f} ms (medians between evaluations, compilation "
            f"aside): ours is {b / a:.2f} times as fast. Peak memory ({kind}): {memory[0] / 1e9:.2f} GB, the other's "
            f"{memory[1] / 1e9:.2f} GB: ours takes {memory[0] / memory[1]:.2f} of it.{gpu}")


def draw(ours: Sample, other: Sample, result: dict) -> Figure:
    """Above, every run faint and both means with the 95% intervals of the means; below, their difference."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for sample, colour, style in ((ours, "#0072B2", "-"), (other, "#D55E00", "--")):
        for trial in sample.used:
            above.plot(trial.losses.keys(), trial.losses.values(), color=colour, alpha=0.3, linewidth=0.6)
        steps, at = zip(*sample.moments.items())
        half = [t_quantile(0.975, m.n - 1) * m.sd / sqrt(m.n) for m in at]
        means = [m.mean for m in at]
        above.plot(steps, means, color=colour, linestyle=style, label=f"{sample.name}, n={sample.n}")
        above.fill_between(steps, [m - h for m, h in zip(means, half)], [m + h for m, h in zip(means, half)],
                            color=colour, alpha=0.15, linewidth=0)
    judged = [row for row in result["rows"] if row["step"] > JUDGED_AFTER]
    late = [loss for sample in (ours, other) for trial in sample.used for step, loss in trial.losses.items()
            if step >= JUDGED_AFTER]
    margin = 0.05 * (max(late) - min(late))
    above.set_ylim(min(late) - margin, max(late) + margin)
    above.set_ylabel(f"{ours.metric}, nats a token")
    above.legend()
    steps, band = [row["step"] for row in judged], [row["band"] for row in judged]
    below.fill_between(steps, [-x for x in band], band, color="0.9", label="band of seed noise, 95% over the curve")
    below.errorbar(steps, [row["difference"] for row in judged], [row["half_width"] for row in judged],
                   color="black", marker="o", markersize=3, linewidth=1, capsize=2,
                   label=f"difference, 95% each{', in pairs' * result['pairs']}")
    below.axhline(0, color="0.5", linewidth=0.8)
    below.set_xlim(JUDGED_AFTER, 1.02 * steps[-1])
    below.set_xlabel("step")
    below.set_ylim(-1.5 * max(band), 1.5 * max(band))
    below.set_ylabel("ours - other, nats")
    below.legend(loc="upper center", ncols=2, fontsize=8)
    return figure


def conditions() -> str:
    """How many processes a run has, and what else the machine is doing; as a sentence."""
    return f"{processes()} process{'es' * (processes() > 1)} a run; load {os.getloadavg()[2]:.1f}."


def curves(sample: Sample) -> list[dict]:
    """Every loss, so that the result can be judged again."""
    return [{"runs": sample.name, "run": Path(trial.name).parents[1].name, "step": step, sample.metric: loss}
            for trial in sample.used for step, loss in trial.losses.items()]


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.parity", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE | @RECIPE",
                        help=f"of train_gpt.py, after {' '.join(DEFAULTS)}")
    parser.add_argument("--script", type=Path, required=True, metavar="OTHER.py")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="length of the schedule (default 200)")
    parser.add_argument("--seeds", type=int, default=3, metavar="K", help="runs of each (default 3)")
    parser.add_argument("--pairs", action="store_true", help="the same seeds for both, and so the same weights")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="logs go there (default: a new logs/parity-...); "
                        "runs that it already holds are not repeated")
    parser.add_argument("-o", dest="out", type=Path, default=RESULTS, metavar="FOLDER",
                        help="of the result (default studies/results)")
    args = parser.parse_intermixed_args(words)
    if args.seeds < 2:
        parser.error("--seeds: two runs at least, or there is no noise to judge by")
    args.first_seed = 0 if args.pairs else args.seeds  # of the other script
    return args


def hyperparameters(overrides: list[str], steps: int) -> Hyperparameters:
    words = [*DEFAULTS, *overrides, f"train_steps={steps}"]
    every = override(words).val_every
    if steps < 2 * every:
        raise ValueError(f"--steps {steps}: at least two intervals of val_every={every}; the first holds compilation")
    return override([*words, f"val_every_late={every}"])  # one interval, as the other has


def main(words: list[str]) -> int:
    args = parse(words)
    folder = args.runs or Path(time.strftime("logs/parity-%Y%m%d-%H%M%S"))
    try:
        hp = hyperparameters(args.overrides, args.steps)
        source = args.script.read_text()
        try:
            edited, arguments = edit(source, hp), seed_arguments(source, args.first_seed)
            if args.pairs and not arguments:
                raise ValueError("--pairs: it takes no --seed S to draw equal weights from")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{args.script}: {error}") from None
        changes = list(difflib.unified_diff(source.splitlines(), edited.splitlines(), lineterm="", n=0))[2:]
        print("\n".join([f"{' '.join([str(args.script), *arguments])}, changed:", *changes]), flush=True)
        tokens = lay_out(hp, folder / "data")
        print(tokens, flush=True)
        train_both(args, hp, folder)
        samples = [gather([str(folder / name)], metric=hp.metric) for name in ("ours", "other")]
        for sample, name in zip(samples, ("train_gpt.py", args.script.name)):
            sample.name = name
        result = judge(*samples, args.pairs)
        paragraphs = [tokens, sentence(result), table(result), cost(*samples)]
    except (OSError, ValueError) as error:
        print(f"studies.parity: {error}", file=sys.stderr)
        return 2
    publish("studies.parity", [
        "--script", str(args.script), "--steps", str(args.steps), "--seeds", str(args.seeds), *["--pairs"] * args.pairs,
        *args.overrides], args.out, conditions(), *paragraphs,
        rows=[*curves(samples[0]), *curves(samples[1])], figure=draw(*samples, result))
    return 0 if result["verdict"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
