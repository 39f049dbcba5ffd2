"""The language of update rules: stages, which are pure functions, one after the other in a line of text.

    nesterov(0.95) | aurora(2, 0.5) | contra(0.4) | aspect | floor(0.35) | step

A stage is a function of what flows from stage to stage, by the names in its signature:

    G gradient    W weight    W0 weight before the step    U update so far (G at first)    N what U was made of
    M momentum    lr rate     t number of this step, from 1    L, R bases of rows and columns

It makes U, unless its decorator says otherwise, and returns that and then the state that the decorator declares. What
is left of its signature are its knobs: numbers; schedules of the step such as ramp(0.85, 0.95, 0, 300); or, where it
differs within a stack, names(0.6, embed=0): 0.6, and 0 where the parameter's name holds "embed" (_ stands for a dot).

    ramp(before, after, start, stop)      from one value to another, linear between two steps
    between(value, start, stop)           the value from one step up to another, else 0
    power(value, steps, last, exponent)   value, and over the `last` of `steps` steps times (steps left / last)^exponent
    at_least(value, least)                value, or `least` where that is more

The stages are in aurora.py. Nothing of a text is run: a mistake in it is one line that names the nearest right word.
"""

import ast
import difflib
import inspect
import math
import re
from collections.abc import Callable
from functools import cache, partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


########################################
#                Stages                #
########################################

FLOW = ("G", "W", "W0", "U", "N", "M", "L", "R", "lr", "t")


class BelowOne(float):
    """The type of a knob in [0, 1), such as the weight of the past in a running mean."""


class Constant(float):
    """The type of a knob that no schedule can turn: a stage may be another program for another value."""


class UpToOne(float):
    """The type of a number in (0, 1], such as a part of a run."""


class Stage(NamedTuple):
    """A pure function, and what a rule must know of it."""
    name: str
    function: Callable
    takes: tuple[str, ...]  # of FLOW, by its signature
    knobs: dict[str, inspect.Parameter]  # what its signature has beside that and its state
    makes: tuple[str, ...]  # of FLOW, what it returns first
    state: dict[str, Callable]  # {name: W -> shape} of what it keeps from step to step, zeros at first
    captured: bool  # whether a CUDA graph can hold it
    after: Callable | None  # state -> state, outside of a CUDA graph, once the step's weights are on their way; of a
    # stage with a knob `every`, after the first step and after every so many from there
    across: tuple[str, ...]  # of its state, what `after` is given summed, where slots are the parts of a matrix
    views: dict[str, Callable]  # {view: W, state and knobs, by name -> W as the model holds it meanwhile}
    any_shape: bool  # whether it takes vectors and numbers, and not matrices alone
    in_place: bool  # whether it works in place, in W's own dtype, as the first of its rule

    @property
    def moves(self) -> bool:
        """Whether it moves the weight by the update."""
        return "W" in self.makes and ("U" in self.takes or self.in_place)

    def kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Its part of a rule's state, by its own names."""
        return {name: state[f"{self.name}.{name}"] for name in self.state}

    def set_to(self, values: dict, knobs: dict) -> dict:
        """Its knobs, by its own names: of `values` the numbers, of a rule's `knobs` what is no number."""
        return {name: knobs[f"{self.name}.{name}"] if callable(value) else value for name, value in values.items()}


STAGES: dict[str, Stage] = {}


def stage(name: str | None = None, makes=("U",), captured=True, after=None, across=(), views=MappingProxyType({}),
          any_shape=False, in_place=False, **state: Callable) -> Callable:
    """Decorator: from here on, update rules can name this function, or its `name`. It stays the function it is.

    @stage(average=whole)
    def smooth(U, average, beta: BelowOne = 0.9):
        average = beta * average + (1 - beta) * U
        return average, average  # U, and then the state
    """
    def register(function: Callable) -> Callable:
        called, parameters = name or function.__name__, inspect.signature(function).parameters
        knobs = {x: p for x, p in parameters.items() if x not in (*FLOW, *state)}
        if called in STAGES:  # as where a cell of a notebook runs again
            Rule.of.cache_clear()
            compiled_rule.cache_clear()
        STAGES[called] = Stage(called, function, tuple(x for x in parameters if x in FLOW), knobs, tuple(makes),
                               state, captured, after, tuple(across), dict(views), any_shape, in_place)
        return function
    return register


def whole(W: Tensor) -> torch.Size:
    return W.shape


########################################
#                Knobs                 #
########################################

def ramp(step: int, before, after, start: int, stop: int) -> float:
    """`before` up to step `start`, `after` from step `stop` on, linear between."""
    return before + (after - before) * min(1.0, max(0.0, (step - start) / (stop - start)))


def between(step: int, value, start: int, stop: int) -> float:
    """`value` from step `start` on and before step `stop`; 0 else."""
    return value if start <= step < stop else 0.0


def power(step: int, value, steps: int, last: float, exponent: float) -> float:
    """`value`, and over the `last` of `steps` steps value (steps left / last)^exponent: results #20 to #46."""
    return value * min(1.0, max(0, steps - step) / max(last, 1e-9)) ** exponent


def at_least(step: int, value, least) -> float:
    """`value`, or `least` where that is more."""
    return max(value, least)


# functions of the number of steps done; those arguments without a type are values of the knob, or schedules of it
SCHEDULES = {function.__name__: function for function in (ramp, between, power, at_least)}


class Schedule(NamedTuple):
    """A function of steps, with its other arguments."""
    function: Callable
    arguments: dict

    def __call__(self, *steps: int) -> float:
        values = {x: value(*steps) if callable(value) else value for x, value in self.arguments.items()}
        return self.function(*steps, **values)


class Named(NamedTuple):
    """A number for each parameter: `other`, or that of the last word of `of` that its name holds."""
    other: float
    of: dict[str, float]

    def __call__(self, name: str) -> float:
        return ([self.other] + [x for word, x in self.of.items() if word in name.replace(".", "_")])[-1]


########################################
#             Update rules             #
########################################

def at_least_fp32(X: Tensor) -> torch.dtype:
    return torch.promote_types(X.dtype, torch.float32)


class Part(NamedTuple):
    stage: Stage
    knobs: dict[str, float | Schedule | Named]  # numbers are constants of the compiled program

    @property
    def settings(self) -> dict:
        """The knobs, and the defaults of those that the text leaves out."""
        return {name: parameter.default for name, parameter in self.stage.knobs.items()} | self.knobs


class Rule(NamedTuple):
    """An update rule: the stages that a line of text names, in its order."""
    text: str
    parts: tuple[Part, ...]

    @classmethod
    @cache
    def of(cls, text: str) -> "Rule":
        """Reads a rule, and runs nothing of it. ValueError, a line, names what is wrong and the nearest right word."""
        parts = tuple(read_part(node) for node in chain(text))
        names, made = [part.stage.name for part in parts], set(FLOW) - {"N", "M", "L", "R"}
        for i, (stage, _) in enumerate(parts):
            if stage.name in names[:i]:
                raise ValueError(f"{stage.name} stands twice in {text!r}: once is enough")
            if stage.in_place and i or parts[0].stage.in_place and (not stage.any_shape or "U" in stage.takes):
                adam = stage.name if stage.in_place else names[0]
                raise ValueError(f"{adam} moves the weight by itself: it stands first, and averages and lookahead "
                                 "alone may follow")
            if missing := set(stage.takes) - made:
                maker = next(other.name for other in STAGES.values() if min(missing) in other.makes)
                raise ValueError(f"{stage.name} needs {min(missing)}, which no stage before it makes: {maker} does")
            moved = [other.name for other, _ in parts[:i] if other.moves]
            if moved and "U" in stage.makes:
                raise ValueError(f"{stage.name} stands after {moved[0]}, where its update is of no use: put it before")
            if ("W0" in stage.takes or stage.views) and not moved:
                raise ValueError(f"{stage.name} looks back at the step: put it after step")
            if ahead := [other.name for other, _ in parts[:i] if other.views and "W" in other.makes]:
                raise ValueError(f"{stage.name} stands after {ahead[0]}, which goes beyond the weight: put it before")
            made |= set(stage.makes)
        if not any(stage.moves for stage, _ in parts):
            raise ValueError(f"{text!r} does not move the weight: end it with | step")
        return cls(text, parts)

    @property
    def in_place(self) -> bool:
        """Whether it is of the kind of AdamW: in place, in W's own dtype, never compiled."""
        return self.parts[0].stage.in_place

    @property
    def any_shape(self) -> bool:
        """Whether it takes vectors and numbers."""
        return all(stage.any_shape for stage, _ in self.parts)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph can hold it."""
        return all(stage.captured for stage, _ in self.parts)

    @property
    def keeps(self) -> list[str]:
        """The names of its state."""
        return [f"{stage.name}.{name}" for stage, _ in self.parts for name in stage.state]

    def dtype(self, W: Tensor) -> torch.dtype:
        """Of its state and arithmetic: fp32 or better, AdamW's W's own."""
        return W.dtype if self.in_place else at_least_fp32(W)

    def state(self, W: Tensor) -> dict[str, Tensor]:
        """{stage.name: zeros} of all that its stages keep of a stack."""
        return {f"{stage.name}.{name}": torch.zeros(shape(W), dtype=self.dtype(W), device=W.device)
                for stage, _ in self.parts for name, shape in stage.state.items()}

    def knobs(self, kind: type) -> dict:
        """{stage.knob: value} of the knobs that are of a kind: Schedule or Named."""
        return {f"{stage.name}.{name}": value for stage, knobs in self.parts
                for name, value in knobs.items() if isinstance(value, kind)}

    def at(self, step: int) -> dict[str, float]:
        """{stage.knob: value} of the knobs that a schedule changes, after `step` steps."""
        return {name: schedule(step) for name, schedule in self.knobs(Schedule).items()}

    def of_slots(self, sizes: dict[str, int]) -> dict[str, Tensor]:
        """{stage.knob: a value a slot, or one where all are equal} of the knobs that go by name; `sizes`: how many
        slots a parameter has."""
        found = {}
        for name, named in self.knobs(Named).items():
            values = [named(parameter) for parameter in sizes]
            found[name] = (torch.tensor(values[0]) if len(set(values)) == 1 else
                           torch.cat([torch.full((size,), x) for x, size in zip(values, sizes.values())]))
        return found

    def advance_(self, W: Tensor, G: Tensor, state: dict[str, Tensor], knobs: dict):
        """A step of a stack, in place: on a GPU in one call of a compiled program, on a CPU in parts, so that what a
        step needs beyond the weights does not grow with depth. `knobs`: lr, t, at(step), on a GPU as 0-d tensors, and
        of_slots(sizes), each of as many dimensions as W."""
        if self.in_place:
            advance_(self, W, G, state, knobs)
        elif W.is_cuda:
            compiled_rule(self.text)(W, G, state, knobs)
        else:
            for start in range(0, len(W), at_once(W)):
                part = slice(start, start + at_once(W))
                advance_(self, W[part], G[part], {name: x[part] for name, x in state.items()},
                         {name: x[part] if isinstance(x, Tensor) and x.ndim else x for name, x in knobs.items()})

    @property
    def has_after(self) -> bool:
        return any(stage.after for stage, _ in self.parts)

    def after_(self, state: dict[str, Tensor], t: int, total: Callable[[Tensor], Tensor] = lambda x: x):
        """The stages' second parts, in place, after step t: what no CUDA graph can hold, and the next step alone
        needs. `total`: the sum of a state over the parts of a matrix, (1, ...); where slots are matrices, itself."""
        for part in self.parts:
            if part.stage.after and (t - 1) % part.settings.get("every", 1) == 0:
                kept = part.stage.kept(state)
                summed = {name: total(kept[name]) for name in part.stage.across}
                for name, value in part.stage.after(**kept | summed).items():
                    kept[name].copy_(value)

    @property
    def views(self) -> set[str]:
        """What of W, at other times than a step, is another than W."""
        return {view for stage, _ in self.parts for view in stage.views}

    def view(self, name: str, W: Tensor, state: dict[str, Tensor], knobs: dict) -> Tensor:
        """W as the model holds it while it is trained ("training") or validated ("val_loss" or "val_ema_loss")."""
        for part in reversed(self.parts):
            if function := part.stage.views.get(name):
                known = dict(W=W, **part.stage.kept(state)) | part.stage.set_to(part.settings, knobs)
                W = function(**{x: known[x] for x in inspect.signature(function).parameters})
        return W


def advance_(rule: Rule, W: Tensor, G: Tensor, state: dict[str, Tensor], knobs: dict):
    """A step of a stack by a rule, stage by stage. W and the state are overwritten."""
    flow = dict(G=G.to(rule.dtype(W)), W=W.to(rule.dtype(W)), lr=knobs["lr"], t=knobs["t"])
    # what works in place takes W0 with it
    flow |= dict(U=flow["G"], W0=flow["W"].clone() if rule.in_place and len(rule.parts) > 1 else flow["W"])
    for stage, numbers in rule.parts:
        kept = stage.kept(state)
        made = stage.function(**{name: flow[name] for name in stage.takes}, **kept, **stage.set_to(numbers, knobs))
        made = made if isinstance(made, tuple) else (made,)
        assert len(made) == len(stage.makes) + len(kept), f"{stage.name} returns {len(made)} values"
        flow |= dict(zip(stage.makes, made))
        overwrite(kept.values(), made[len(stage.makes):])
    W.copy_(flow["W"])


def overwrite(kept, values):
    """In a function of its own, whose variables hold no tensor while the next stages run."""
    for x, value in zip(kept, values):
        x.copy_(value)


COMPILED = {"realize_reads_threshold": 1}  # has Inductor store N: else each reader of N computes it anew


@cache
def compiled_rule(text: str) -> Callable:
    """advance_ by a rule in few kernels: result #17's are some 40, which read or write the stack 27 times
    (bench/graph.py counts them). Operation by operation it would be several times as often."""
    return torch.compile(partial(advance_, Rule.of(text)), dynamic=False, options=COMPILED)


def at_once(stack: Tensor) -> int:
    """How many slots of a stack are updated in one call: on a GPU all, on a CPU as many as have 3.5 million numbers."""
    return len(stack) if stack.is_cuda else max(1, 6 * 768 * 768 // math.prod(stack.shape[1:]))


########################################
#               Reading                #
########################################

def chain(text: str) -> list[ast.expr]:
    """'a(1) | b' as the nodes of a(1) and b."""
    node, nodes = parse_expression(text, "nesterov(0.95) | polar | aspect | step"), []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        nodes.append(node.right)
        node = node.left
    return [node, *reversed(nodes)]


def parse_expression(text: str, example: str) -> ast.expr:
    if len(text) > 1000:
        raise ValueError(f"an update rule has at most 1000 characters, this one {len(text)}")
    try:
        if not re.fullmatch(r"[\w.,=()|+ -]*", text, re.ASCII):
            raise ValueError
        node = ast.parse(text.strip(), mode="eval").body
        if depth(node) > 100:  # ast.unparse, which the messages below need, recurses
            raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not understood: write it as {example}") from None
    return node


def depth(node: ast.AST) -> int:
    level, levels = [node], 0
    while level:
        level, levels = [child for x in level for child in ast.iter_child_nodes(x)], levels + 1
    return levels


def nearest(word: str, words) -> str:
    return difflib.get_close_matches(word, words, n=1, cutoff=0)[0]


def read_part(node: ast.expr) -> Part:
    name, arguments = read_call(node, STAGES, "stage")
    stage, where = STAGES[name], ast.unparse(node)
    types = {x: float if p.annotation is p.empty else p.annotation for x, p in stage.knobs.items()}
    required = [x for x, p in stage.knobs.items() if p.default is p.empty]
    given = bind(where, name, arguments, list(types), required)
    return Part(stage, {x: schedule_or_number(f"{where}: {x}", value, types[x], stage) for x, value in given.items()})


def read_call(node: ast.expr, known: dict, kind: str) -> tuple[str, list[tuple[str | None, ast.expr]]]:
    """Name and (name or None, value) of the arguments of f(1, b=2), or of f alone."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    name = ast.unparse(call.func)
    if name not in known:
        raise ValueError(f"there is no {kind} {name!r}; the nearest is {nearest(name, known)!r}")
    return name, [(None, x) for x in call.args] + [(x.arg, x.value) for x in call.keywords]


def bind(where: str, name: str, arguments: list, names: list[str], required: list[str]) -> dict[str, ast.expr]:
    """{name: value} of the arguments of a stage or schedule."""
    bound, takes = {}, f"it takes {', '.join(names)}" if names else "it takes nothing"
    for i, (key, value) in enumerate(arguments):
        if key is None and i >= len(names):
            raise ValueError(f"{where}: that is more than {name} takes; {takes}")
        key = key or names[i]
        if key not in names:
            raise ValueError(f"{where}: {name} has no {key!r}; "
                             + (f"the nearest is {nearest(key, names)!r}" if names else takes))
        if key in bound:
            raise ValueError(f"{where}: {key} is given twice")
        bound[key] = value
    for key in required:
        if key not in bound:
            raise ValueError(f"{where}: {key} is missing; {takes}")
    return bound


def schedule_or_number(where: str, node: ast.expr, kind: type, stage: Stage) -> float | Schedule | Named:
    if not isinstance(node, ast.Call):
        return number(where, node, kind)
    if kind in (int, Constant) or stage.in_place:
        raise ValueError(f"{where} is a constant of the program: it takes a number, not {ast.unparse(node)}")
    if ast.unparse(node.func) == "names":
        return read_names(where, node, kind)
    return read_schedule(where, node, SCHEDULES, kind)


def read_schedule(where: str, node: ast.expr, schedules: dict[str, Callable], kind: type = float, given: int = 1):
    """One of some functions with its arguments after the first `given`, which it takes when it is called."""
    name, arguments = read_call(node, schedules, "schedule")
    parameters = list(inspect.signature(schedules[name]).parameters.values())[given:]
    types, required = {p.name: p.annotation for p in parameters}, [p.name for p in parameters if p.default is p.empty]
    values = {x: read_schedule(f"{where}: {x}", value, schedules, kind, given)
              if types[x] is inspect.Parameter.empty and isinstance(value, ast.Call) else
              number(f"{where}: {x}", value, kind if types[x] is inspect.Parameter.empty else types[x], least=0)
              for x, value in bind(where, name, arguments, list(types), required).items()}
    if not values.get("start", 0) < values.get("stop", 1):
        raise ValueError(f"{where}: start={values['start']} is not before stop={values['stop']}")
    return Schedule(schedules[name], values)


def read_names(where: str, node: ast.Call, kind: type) -> Named:
    if len(node.args) != 1 or not all(x.arg for x in node.keywords):
        raise ValueError(f"{where}: write names(VALUE, PART_OF_A_NAME=VALUE, ...), not {ast.unparse(node)}")
    return Named(number(where, node.args[0], kind), {x.arg: number(f"{where}: {x.arg}", x.value, kind)
                                                     for x in node.keywords})


def number(where: str, node: ast.expr, kind: type, least: int = 1) -> float:
    """A literal, of the knob's type: whole and at least `least`, or in [0, 1), or finite and not negative."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        value = None
    if kind is int:
        right, words = type(value) is int and least <= value < 2**31, f"a whole number, at least {least}"
    elif kind is BelowOne:
        right, words = type(value) in (int, float) and 0 <= value < 1, "a number at least 0 and below 1"
    elif kind is UpToOne:
        right, words = type(value) in (int, float) and 0 < value <= 1, "a number above 0 and at most 1"
    else:
        right, words = type(value) in (int, float) and 0 <= value < 1e30, "a number, finite and not negative"
    if not right:
        raise ValueError(f"{where} is {words}, not {ast.unparse(node)}")
    return int(value) if kind is int else float(value)


def stages_of(text: str) -> list[str]:
    """The names of the stages in a rule, or in a part of one."""
    return [read_call(node, STAGES, "stage")[0] for node in chain(text)] if text else []


def with_knob(text: str, name: str, knob: str, value: str) -> str:
    """A rule's text with another value of a stage's knob. ValueError as Rule.of."""
    nodes, new = chain(text), parse_expression(value, "a number or a schedule")
    calls = [read_call(node, STAGES, "stage") for node in nodes]
    index = [called for called, _ in calls].index(name)
    names = list(STAGES[name].knobs)
    bound = (bind(name, name, calls[index][1], names, [])
             | bind(f"{name}.{knob}={value}", name, [(knob, new)], names, []))
    in_order = [x for x in names if x in bound]
    positional = in_order if in_order == names[:len(in_order)] else []
    nodes[index] = ast.Call(ast.Name(name), [bound[x] for x in positional],
                            [ast.keyword(x, bound[x]) for x in in_order if x not in positional])
    read_part(nodes[index])
    return " | ".join(ast.unparse(node) for node in nodes)
