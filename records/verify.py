"""`verify`: do these runs make a record, and from which evaluated step on?"""

import hashlib
from collections import Counter
from math import inf, sqrt

from records.log import Trial
from records.program import UPSTREAM_TARGET
from records.sample import Sample, another, progress
from records.statistics import Moments, crossing, judge, t_cdf

# From the mean and deviation of its 20 published runs: its true margin is 0.00116 nats.
FAITHFUL = "note: a faithful rerun of result #17 passes at 3175 in 0.5% of cases at n=1, 6% at n=4; see reproduce"
NO_TARGET = "target_loss=0 is no target; `compare` tells two programs apart"
RULE_5 = "note: rule 5 of the track allows no run to be left out because of its losses"


def verify(sample: Sample) -> dict:
    """The verdict of the official rule on a sample, with all that it rests on.

    A run that diverged is a result: its loss is above every target, so nothing passes. One that was killed or failed
    for another reason is an accident: it is shown and left out of the means. ValueError for a fork of a run, which
    is no evidence of any kind.
    """
    if sample.partial:
        raise ValueError(f"{sample.partial}: only runs from step 0 are evidence")
    steps = {step: judge(at, sample.target) for step, at in sample.moments.items()}
    earliest = sample.earliest()
    unjudged = another(sample.foreign) or NO_TARGET * (not sample.target)
    if unjudged:  # its curve is shown
        steps = {step: at._replace(passes=False, runs_needed=None) for step, at in steps.items()}
        earliest = None
    return {
        "verdict": earliest is not None and not sample.diverged,
        "earliest": earliest,
        "target": sample.target,
        "metric": sample.metric,
        "started": len(sample.trials) or sample.n,
        "diverged": len(sample.diverged),
        "used": len(sample.used) or sample.n,
        "train_steps": sample.train_steps,
        "source_sha256": hashlib.sha256(sample.source).hexdigest() if sample.source else None,
        "devices": Counter(trial.device + f", world_size {trial.world}" * (trial.world > 0) for trial in sample.used
                           if sample.source),
        "mixed": sample.mixture,
        "unjudged": unjudged,
        "remarks": sample.remarks,
        "steps": [{"step": step, **at._asdict()} for step, at in steps.items()],
        "crossing": crossings(sample),
        "runs": [describe(trial, sample) for trial in sample.trials],
    }


def describe(trial: Trial, sample: Sample) -> dict:
    used = any(trial is other for other in sample.used)
    finite = {step: loss if abs(loss) < float("inf") else str(loss) for step, loss in trial.losses.items()}
    return {"name": trial.name, "seed": trial.seed, "used": used, "diverged": trial.diverged,
            "why": None if used else trial.fault or progress(trial), "losses": finite}


def crossings(sample: Sample) -> dict | None:
    """Interpolated, and so descriptive: where single runs come down to the target."""
    if not sample.used:
        return None
    steps = [crossing(trial.losses, sample.target) for trial in sample.used]
    crossed = [step for step in steps if step is not None]
    if not crossed:
        return {"n": 0, "of": len(steps), "mean": None, "sd": None}
    return {**Moments.of(crossed)._asdict(), "of": len(steps)}


def text(result: dict, every_step: bool = False) -> str:
    started, used = result["started"], result["used"]
    lines = [f"{used} of {started} runs used, target {result['target']:g}"
             + f" of {result['metric']}" * (result["metric"] != "val_loss")]
    lines += [f"not used: {run['name']}: {run['why']}" for run in result["runs"] if not run["used"]]
    lines += [f"{count} on {device}" for device, count in result["devices"].items()]
    if result["mixed"]:
        lines.append(f"mixed: {result['mixed']}")
    if not used:
        return "\n".join([*lines, "FAIL: no run can be used"])
    last = result["steps"][-1]["step"]
    if last < result["train_steps"]:
        lines.append(f"note: every run used stopped at step {last} of {result['train_steps']}, or before")
    lines += table(result, every_step)
    if (at := result["crossing"]) and at["n"]:
        spread = f" (sd {at['sd']:.0f})" if at["sd"] is not None else ""
        lines.append(f"interpolated, descriptive only: {at['n']} of {at['of']} runs cross {result['target']:g}, "
                     f"on average at step {at['mean']:.0f}{spread}")
    at = next(at for at in result["steps"] if at["step"] == quoted(result))
    if not result["unjudged"]:
        lines.append(significance(at, result["target"]))
    if at["n"] < started:
        lines.append(RULE_5)
    lines += [f"note: {remark}" for remark in result["remarks"]]
    lines.append(sentence(result) + ("; mixed" if result["mixed"] else ""))
    if not result["verdict"] and not result["unjudged"] and used <= 4 and result["target"] == UPSTREAM_TARGET:
        lines.append(FAITHFUL)
    return "\n".join(lines)


def significance(at: dict, target: float) -> str:
    """By the deviation that the rule assumes; for another kind of loss, by the sample's own."""
    where = f"at step {at['step']}, n={at['n']}"
    if target == UPSTREAM_TARGET:
        return f"{where}: z = {at['z']:.2f}, p = {at['p']:.1g} for the rule's sd of 0.0013"
    if at["sd"] is None:
        return f"{where}: the rule's sd of 0.0013 is not this recipe's, and one run does not tell it"
    t = (target - at["mean"]) * sqrt(at["n"]) / at["sd"] if at["sd"] else inf
    return (f"{where}: the rule's sd of 0.0013 is not this recipe's; with its own, "
            f"t = {t:.2f}, p = {t_cdf(-t, at['n'] - 1):.1g}")


def shown(result: dict, every_step: bool) -> list[dict]:
    """The last tenth of the run and the earliest step that passes, or all."""
    last = result["steps"][-1]["step"]
    return [at for at in result["steps"]
            if every_step or at["step"] >= 0.9 * last or at["step"] == result["earliest"]]


def table(result: dict, every_step: bool) -> list[str]:
    lines = ["   step    n       mean       sd   statistic  rule  runs needed"]
    for at in shown(result, every_step):
        sd = "-" if at["sd"] is None else f"{at['sd']:.5f}"
        lines.append(f"{at['step']:>7}{at['n']:>5}{at['mean']:>11.6f}{sd:>9}{at['statistic']:>+12.5f}"
                     f"{'-' if result['unjudged'] else 'PASS' if at['passes'] else 'FAIL':>6}"
                     f"{at['runs_needed'] or '-':>13}")
    return lines


def quoted(result: dict) -> int:
    """The earliest step to pass, or else the one that comes closest."""
    return result["earliest"] or min(result["steps"], key=lambda at: at["mean"])["step"]


def sentence(result: dict) -> str:
    """The one line to quote."""
    step = quoted(result)
    at = next(at for at in result["steps"] if at["step"] == step)
    started = result["started"]
    runs = f"n={at['n']}" if at["n"] == started else f"n={at['n']} of {started}"
    mean = f"mean {at['mean']:.6f} ({runs}, target {result['target']:g})"
    if result["unjudged"]:
        return f"NO VERDICT: {result['unjudged']}; step {step} comes closest, at {mean}"
    if result["diverged"]:
        passing = f"; among the others, step {step} would pass" if result["earliest"] else ""
        return f"FAIL: {result['diverged']} of {started} runs diverged{passing}, at {mean}"
    if result["earliest"]:
        return f"PASS: {step} is the earliest step to pass, at {mean}"
    if at["runs_needed"]:
        return f"FAIL: no step passes; {step} would need {at['runs_needed']} runs at {mean}"
    return f"FAIL: no step passes; {step} comes closest, at {mean}"


def markdown(result: dict) -> str:
    """What a submission shows: the losses by seed at up to four steps, the rule below, the row of the leaderboard."""
    if not result["steps"]:
        return "FAIL: no run can be used"
    claimed = next((at for at in result["steps"] if at["step"] == result["earliest"]), result["steps"][-1])
    evidence = f"{claimed['mean']:.4f} (n={claimed['n']}){'✓' if result['verdict'] else ' FAIL'}"
    return "\n".join([table_by_seed(result, result["runs"]), "", sentence(result), "",
                      "| # | Steps to 3.28 | Evidence | Description | Date | Log | Contributors |",
                      "| - | - | - | - | - | - | - |", f"| | {claimed['step']} | {evidence} | | | | |"])


def table_by_seed(result: dict, runs: list[dict]) -> str:
    """From the step before the claimed one, or else the last: losses of these runs, and the rule on all that count."""
    places = [at["step"] for at in result["steps"]]
    start = max(0, places.index(result["earliest"] or places[-1]) - 1)
    steps = result["steps"][start:start + 4]
    rows = [["run", *(at["step"] for at in steps)], ["---"] * (len(steps) + 1)]
    for k, run in enumerate(runs, 1):
        losses = [run["why"]] * len(steps) if run["why"] else [
            f"{run['losses'][at['step']]:.5f}" if at["step"] in run["losses"] else "-" for at in steps]
        rows.append([f"run {k}" if run["seed"] is None else f"seed {run['seed']}", *losses])
    rows += [["**mean**", *(f"{at['mean']:.6f}" for at in steps)],
             ["**sd**", *("-" if at["sd"] is None else f"{at['sd']:.5f}" for at in steps)],
             ["**(target - mean) sqrt(n)**", *(f"{at['statistic']:+.5f}" for at in steps)],
             ["**at least 0.004**", *("-" if result["unjudged"] else "PASS" if at["passes"] else "FAIL"
                                      for at in steps)]]
    return markdown_table(rows)


def markdown_table(rows: list[list]) -> str:
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |" for cells in rows)
