"""A sample: runs of one recipe, from logs or from the published figures, or the reason why they are not one."""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from records import published
from records.lint import foreign
from records.log import Log, Trial, load
from records.program import UPSTREAM_TARGET, recipe, target
from records.statistics import Claim, Moments, judge

NO_ATTEMPT = "not a record attempt"  # a fact that train_gpt.py writes


@dataclass
class Sample:
    name: str
    target: float
    trials: list[Trial]  # all that were started
    used: list[Trial]  # those whose losses count; none where only their moments were published
    moments: dict[int, Moments]  # by step, of all used runs that came so far
    train_steps: int
    source: bytes | None = None
    mixture: str | None = None  # why these runs are not one sample
    claimed: Claim | None = None  # as published
    metric: str = "val_loss"
    recipes: Set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)  # what the logs themselves say of what they are no evidence for
    foreign: list[str] = field(default_factory=list)  # what makes the program another track's
    partial: str | None = None  # which of the logs does not begin at step 0, and where it does

    @property
    def n(self) -> int:
        return max((at.n for at in self.moments.values()), default=0)

    @property
    def diverged(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.diverged]

    def earliest(self) -> int | None:
        """The first evaluated step at which the runs pass the official rule."""
        return next((step for step, at in self.moments.items() if judge(at, self.target).passes), None)

    def claim(self) -> Claim:
        """The published claim; of logs, the mean at the earliest step to pass, or else at the last."""
        step = self.earliest() or max(self.moments)
        return self.claimed or Claim(step, self.moments[step].mean, self.moments[step].n)

    def typical(self) -> Trial | None:
        """The complete run of median training time; the first of a process may hold the compile time."""
        timed = sorted((trial for trial in self.used if trial.train_time and trial.complete),
                       key=lambda trial: trial.train_time)
        return timed[len(timed) // 2] if timed else None


def gather(names: list[str], mixed: bool = False, metric: str | None = None) -> Sample:
    """The runs that names mean: files, globs, folders, or the number of one published result; of `metric`, or else of
    the loss that they claim.

    ValueError where there is no log, where no run can be used, or where the runs are not one sample and `mixed` is
    False.
    """
    if len(names) == 1 and names[0].isdigit() and not Path(names[0]).exists():
        sample = from_published(int(names[0]), metric)
    else:
        sample = from_logs(" ".join(names), load(names, metric))
    if sample.mixture and not mixed:
        raise ValueError(f"{sample.mixture}; --mixed looks anyway")
    return sample


def from_logs(name: str, logs: list[Log], excused: tuple[str, ...] = ()) -> Sample:
    trials = [trial for log in logs for trial in log.trials]
    used = usable(trials)
    programs = {recipe(log.source): log.source for log in logs}
    return Sample(
        name,
        min(target(log.source) for log in logs),
        trials,
        used,
        common_moments(used),
        max((trial.train_steps for trial in used), default=0),
        logs[0].source,
        mixture(logs, used, excused),
        metric=logs[0].metric,
        recipes=programs.keys(),
        foreign=[why for source in programs.values() for why in foreign(source)],
        partial=next((f"{log.path} is partial: {why}" for log in logs for why in log.facts.get("partial", [])), None),
        remarks=sorted({f"{NO_ATTEMPT}: {why}" for log in logs for why in log.facts.get(NO_ATTEMPT, [])}),
    )


def from_published(record: int, metric: str | None = None) -> Sample:
    """Of every run where its own curve was published, else of n, mean and deviation a step.

    Another metric than the claimed one is read where it was published; the claim, which is not of it, is left out.
    """
    result = published.result(record)
    train_steps, moments = published.moments(record)
    claimed = result.metric
    known = published.curves(record, metric) if metric else {}
    read = metric if known else claimed
    runs = [Trial(f"#{record} run {seed}", None, losses, train_steps)
            for seed, losses in (known or published.curves(record)).items()]
    moments = common_moments(runs) if runs else moments
    claim = Claim(result.step, result.mean, result.n)
    curves = max(at.n for at in moments.values())
    if claim.step in moments:
        curves = moments[claim.step].n
    difference = None if curves == claim.n else f"#{record} claims {claim.n} runs, its published curve holds {curves}"
    remarks = [f"#{record} has no {metric}: this is its {read}"] if metric not in (None, read) else []
    return Sample(f"#{record}", UPSTREAM_TARGET, runs, runs, moments, train_steps, None, difference,
                  claim if read == claimed else None, read, remarks=remarks)


def groups(logs: list[Log]) -> list[list[Log]]:
    """The logs by what decides their result: the program, then the device. A log whose curves are all another's is in
    none."""
    found: dict[tuple, list[Log]] = {}
    for log in (log for log in logs if log.trials):
        found.setdefault((recipe(log.source), log.trials[0].device), []).append(log)
    return list(found.values())


def usable(trials: list[Trial]) -> list[Trial]:
    """The trials that ended as their recipe means them to."""
    sound = [trial for trial in trials if not trial.fault]
    # Several results stop short of their schedule (#45: at 2720 of 2900), or some of their runs do (#44, #46): what
    # they came to counts as far as they came. One run alone that does so cannot be told from one that was killed.
    furthest = max((trial.last_step for trial in sound), default=0)
    late = [trial for trial in sound if trial.last_step >= 0.9 * furthest > 0]
    return late if len(late) > 1 else [trial for trial in late if trial.complete]


def another(reasons: list[str]) -> str:
    """What a verdict says of `Sample.foreign`; nothing where there is no reason."""
    return "" if not reasons else f"not a program of this track ({reasons[0]}{'; lint has more' * (len(reasons) > 1)})"


def progress(trial: Trial) -> str:
    if not trial.losses:
        return "stopped before its first validation"
    return f"stopped at step {trial.last_step} of {trial.train_steps}"


def mixture(logs: list[Log], used: list[Trial], excused: tuple[str, ...] = ()) -> str | None:
    """Why these runs are not one sample, or None; what is `excused` by its name below is no reason."""
    grid = tuple(max(used, key=lambda trial: trial.last_step).losses) if used else ()
    kinds = {
        "targets": [(target(log.source), log.path) for log in logs],
        "metrics": [(log.metric, log.path) for log in logs],
        "programs": [(recipe(log.source), log.path) for log in logs],
        "devices": [(place or trial.device, trial.name) for trial in used for place in trial.places],
        "evaluated steps": [(tuple(trial.losses) + tuple(step for step in grid if step > trial.last_step), trial.name)
                            for trial in used],
    }
    for what, values in kinds.items():
        examples = dict(values)
        if len(examples) > 1 and what not in excused:
            counts = Counter(value for value, _ in values)
            named = " on {}" if what == "devices" else ""
            parts = " and ".join(f"{counts[value]}{named.format(value)} as in {name}"
                                 for value, name in list(examples.items())[:2])
            return f"{len(examples)} different {what}: {parts}" + " ..." * (len(examples) > 2)
    return None


def common_moments(used: list[Trial]) -> dict[int, Moments]:
    """By every step at which all runs that came so far were evaluated; ValueError where there is none."""
    found = {}
    for step in sorted({step for trial in used for step in trial.losses}):
        there = [trial for trial in used if trial.last_step >= step]
        if all(step in trial.losses for trial in there):
            found[step] = Moments.of([trial.losses[step] for trial in there])
    if used and not found:
        raise ValueError("no step at which every run was evaluated")
    return found
