"""`verify`: do these runs make a record, and from which evaluated step on?"""

from collections import Counter

from records.log import Log, Trial, load
from records.program import UPSTREAM_TARGET, recipe, target
from records.statistics import Judgement, judge

# From the mean and deviation of its 20 published runs: its true margin is 0.00116 nats.
FAITHFUL = "note: a faithful rerun of result #17 passes at 3175 in 0.5% of cases at n=1, 6% at n=4"


def verify(names: list[str], mixed: bool, every_step: bool) -> bool:
    """Print the verdict of the official rule on the logs that `names` mean, and return it.

    ValueError where there is no log, or where the runs are not one sample and `mixed` is False.
    """
    logs = load(names)
    trials = [trial for log in logs for trial in log.trials]
    used = usable(trials)
    difference = mixture(logs, used)
    if difference and not mixed:
        raise ValueError(f"{difference}; --mixed looks anyway")
    goal = min(target(log.source) for log in logs)
    judgements = judge_steps(used, goal)

    print(f"{len(used)} of {len(trials)} runs used, target {goal:g}")
    for trial in trials:
        if trial not in used:
            print(f"not used: {trial.name}: {trial.fault or progress(trial)}")
    if difference:
        print(f"mixed: {difference}")
    if not used:
        print("FAIL: no run can be used")
        return False
    if not used[0].complete:
        print(f"note: every run used {progress(used[0])}")
    print_table(judgements, every_step)
    print(verdict(judgements, len(trials), goal) + ("; mixed" if difference else ""))
    passes = any(at.passes for at in judgements.values())
    if not passes and len(used) <= 4 and goal == UPSTREAM_TARGET:
        print(FAITHFUL)
    return passes


def usable(trials: list[Trial]) -> list[Trial]:
    """The trials that ended as their recipe means them to."""
    sound = [trial for trial in trials if not trial.fault]
    ends = Counter(trial.last_step for trial in sound)
    furthest = max(ends, default=0)
    # Several results stop short of their schedule (#45: at 2720 of 2900), all runs at one step;
    # one run alone that does so cannot be told from one that was killed.
    by_design = furthest > 0 and ends[furthest] > 1
    return [t for t in sound if t.complete or by_design and t.last_step == furthest]


def progress(trial: Trial) -> str:
    if not trial.losses:
        return "stopped before its first validation"
    return f"stopped at step {trial.last_step} of {trial.train_steps}"


def mixture(logs: list[Log], used: list[Trial]) -> str | None:
    """Why these runs are not one sample, or None."""
    kinds = {
        "targets": {target(log.source): log.path for log in logs},
        "programs": {recipe(log.source): log.path for log in logs},
        "evaluated steps": {tuple(trial.losses): trial.name for trial in used},
    }
    for what, examples in kinds.items():
        if len(examples) > 1:
            first, second, *_ = examples.values()
            return f"{len(examples)} different {what}, as in {first} and {second}"
    return None


def judge_steps(used: list[Trial], goal: float) -> dict[int, Judgement]:
    """The judgement at every step that all runs share; ValueError where they share none."""
    if not used:
        return {}
    steps = sorted(set.intersection(*(set(trial.losses) for trial in used)))
    if not steps:
        raise ValueError("no step at which every run was evaluated")
    return {step: judge([trial.losses[step] for trial in used], goal) for step in steps}


def print_table(judgements: dict[int, Judgement], every_step: bool) -> None:
    """One line a step: by default the last tenth of the run, and the earliest that passes."""
    earliest = next((step for step, at in judgements.items() if at.passes), None)
    print("   step    n       mean       sd   statistic  rule  runs needed")
    for step, at in judgements.items():
        if every_step or step >= 0.9 * max(judgements) or step == earliest:
            sd = "-" if at.sd is None else f"{at.sd:.5f}"
            outcome = "PASS" if at.passes else "FAIL"
            print(
                f"{step:>7}{at.n:>5}{at.mean:>11.6f}{sd:>9}{at.statistic:>+12.5f}{outcome:>6}"
                f"{at.runs_needed or '-':>13}"
            )


def verdict(judgements: dict[int, Judgement], started: int, goal: float) -> str:
    """The one line to quote."""
    passing = [step for step, at in judgements.items() if at.passes]
    step = passing[0] if passing else min(judgements, key=lambda step: judgements[step].mean)
    at = judgements[step]
    runs = f"n={at.n}" if at.n == started else f"n={at.n} of {started}"
    mean = f"mean {at.mean:.6f} ({runs}, target {goal:g})"
    if passing:
        return f"PASS: {step} is the earliest step to pass, at {mean}"
    if at.runs_needed:
        return f"FAIL: no step passes; {step} would need {at.runs_needed} runs at {mean}"
    return f"FAIL: no step passes; {step} comes closest, at {mean}"
