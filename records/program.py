"""What the program at the head of a log says of its run. It is parsed, never executed."""

import ast
import hashlib
import operator
import re
import warnings
from functools import cache

SOURCE_BYTES = 2**20  # at most: the parser takes up to 600 bytes of memory for each; the largest published have 0.1 MB
UPSTREAM_TARGET = 3.28  # nats a token; upstream's programs have no field that says so

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

# A section's title between two lines of #, or upstream's parts of its training loop.
TITLE = re.compile(
    r"^ *#{10,}\n *# +(?P<title>.+?) +#\n *#{10,}$|^ *# -{5,} (?P<part>.+?) SECTION -{5,}$", re.MULTILINE
)
# Track 1's logs have a second file under such lines, which are no Python; to the parser they are comments.
SECOND = re.compile(rb"^-{20,}(?=(?:\r?\n# \S+\.py)?\r?$)", re.MULTILINE)
FILE = re.compile(r"[\w./-]+\.py")  # a title over a whole file, in a program that was put together from several
# Result #31's; `idle` passes over it. Search is a hundred times as fast for letters as for ^.
SEED = re.compile(rb"\nSEED = \d+$", re.MULTILINE)


def parse(source: bytes) -> ast.Module:
    """The program, to be read only; ValueError says why `source` is none."""
    if len(source) > SOURCE_BYTES:
        raise ValueError(f"{len(source) / 1e6:.0f} MB, larger than any")
    return parse_once(SEED.sub(b"\nSEED = 0", source))


@cache  # twenty logs of one program are parsed once, also where each has its seed as a literal
def parse_once(source: bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful escapes and the like: not for the reader of a log to mend
            try:
                program = ast.parse(source)
            except SyntaxError:
                if b"\n# " not in source or not SECOND.search(source):
                    raise
                program = ast.parse(SECOND.sub(b"#", source))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: brackets nested too deep
        raise ValueError(str(error) or type(error).__name__) from None
    if not program.body:
        raise ValueError("nothing")
    return program


def target(source: bytes) -> float:
    """The validation loss that the run was to reach, in nats a token."""
    fields = hyperparameters(parse(source))
    return number(fields["target_loss"]) if "target_loss" in fields else UPSTREAM_TARGET


def claimed_metric(source: bytes) -> str:
    """The loss that the run claims, by its name in the log's lines; upstream's programs have no field that says so."""
    match hyperparameters(parse(source)).get("metric", ast.Constant("val_loss")):
        case ast.Constant(str() as name) if re.fullmatch(r"\w+", name):
            return name
        case other:
            raise ValueError(f"Hyperparameters.metric is no name: {ast.unparse(other)}")


def hyperparameters(program: ast.Module) -> dict[str, ast.expr]:
    """The fields of `class Hyperparameters` with their defaults; none in upstream's programs."""
    fields = {}
    for node in program.body:
        if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters":
            for statement in node.body:
                match statement:
                    case ast.AnnAssign(ast.Name(name), _, ast.expr() as default):
                        fields[name] = default
    return fields


def number(expression: ast.expr) -> float:
    """The value of a number, or of + - * / between numbers; ValueError for anything else."""
    match expression:
        case ast.Constant(int() | float() as value):
            return value
        case ast.UnaryOp(ast.USub(), operand):
            return -number(operand)
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            try:
                return ARITHMETIC[type(op)](number(left), number(right))
            except ArithmeticError as error:
                raise ValueError(f"not a number: {ast.unparse(expression)} ({error})") from None
    raise ValueError(f"not a number: {ast.unparse(expression)}")


def stages(rule: str) -> list[tuple[str, str]]:
    """'a(1) | b(c=.5)' as [('a', 'a(1)'), ('b', 'b(c=0.5)')]: the name of each stage, and its text in one spelling.

    Only the grammar is read; which stages there are and what they take, aurora.py knows. An empty rule has none.
    ValueError where it is no rule.
    """
    if not rule.strip():
        return []
    try:
        node, parts = ast.parse(rule.strip(), mode="eval").body, []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            parts.append(node.right)
            node = node.left
        parts = [node, *reversed(parts)]
        return [(ast.unparse(part.func if isinstance(part, ast.Call) else part), ast.unparse(part)) for part in parts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{rule!r} is no update rule") from None


def recipe(source: bytes) -> str:
    """A hash of what decides the result: equal for programs that differ in nothing but layout, comments,
    docstrings, the seed and `Hyperparameters.micro_batch`, which only divides the work."""
    return recipe_of(parse(source))


@cache
def recipe_of(program: ast.Module) -> str:
    return fingerprint(program.body)


def fingerprint(statements: list[ast.stmt]) -> str:
    """SHA-256 of what these statements do: positions, comments and what is `idle` are passed over."""
    parts = []

    def visit(node: ast.AST) -> None:
        parts.append(type(node).__name__)
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, ast.AST):
                visit(value)
            elif isinstance(value, list) and value:  # newer Pythons have more fields, which are empty
                parts.append(name)
                for part in value:
                    if not isinstance(part, ast.AST):
                        parts.append(repr(part))
                    elif not (isinstance(part, ast.stmt) and idle(part, node)):
                        visit(part)
                parts.append("end")
            elif value not in (None, []) and name not in ("kind", "type_comment"):
                parts.append(f"{name} {value!r}")

    visit(ast.Module(statements, []))
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()


def idle(statement: ast.stmt, parent: ast.AST) -> bool:
    """Whether `recipe` passes over a statement in the body of `parent`."""
    match statement:
        case ast.Expr(ast.Constant()):
            return True
        case ast.Assign([ast.Name("SEED")], ast.Constant()):
            return True
        case ast.AnnAssign(ast.Name("micro_batch")):
            return isinstance(parent, ast.ClassDef) and parent.name == "Hyperparameters"
    return False


def sections(source: bytes) -> dict[str, list[str]]:
    """The lines of a program by the titles of its parts; what stands before the first is the `head`.

    Parts of the last file, the program proper, have their titles alone, as where it is the only one; those of a file
    above it have its name before their own.
    """
    text = source.decode(errors="replace").replace("\r\n", "\n")
    matches = list(TITLE.finditer(text))
    files = [match["title"] for match in matches if match["title"] and FILE.fullmatch(match["title"])]
    found, file, title, start = {}, "", "head", 0
    for match in matches:
        found.setdefault(title, []).extend(text[start:match.start()].splitlines())
        name, start = match["title"] or match["part"], match.end()
        if name in files:
            file = name if name != files[-1] else ""
            title = file or "head"
        else:
            title = f"{file}: {section_name(name)}" if file else section_name(name)
    found.setdefault(title, []).extend(text[start:].splitlines())
    return found


def section_name(title: str) -> str:
    """Upstream's titles and ours by one name."""
    words = title.lower()
    known = {"data": "data", "dataloader": "data", "architecture": "model", "validation": "evaluation"}
    return known.get(words, words)


def constants(source: bytes, bodies: bool = True) -> dict[str, str]:
    """Every name that is given a literal: fields, assignments, defaults of parameters, keywords of calls.

    `Muon(lr)` is the keyword lr where Muon is called; a name that recurs is numbered from its second time on.
    Without `bodies`, none from within functions and classes, but for `class Hyperparameters`.
    """
    found: dict[str, str] = {}

    def note(name: str, value: ast.expr) -> None:
        count, key = 1, name
        while key in found:
            count += 1
            key = f"{name} #{count}"
        found[key] = ast.unparse(value)

    def visit(node: ast.AST, scope: str) -> None:
        inner = scope
        match node:
            case ast.ClassDef(name):
                inner = f"{scope}{name}."
            case ast.FunctionDef(name, arguments):
                inner = f"{scope}{name}."
                for argument, value in defaults(arguments):
                    if literal(value):
                        note(f"{scope}{name}({argument})", value)
            case ast.Assign(targets, value) if literal(value):
                for place in targets:
                    note(scope + ast.unparse(place), value)
            case ast.AnnAssign(place, _, value) if literal(value):
                note(scope + ast.unparse(place), value)
            case ast.Call(function, _, keywords) if given := [word for word in keywords if literal(word.value)]:
                call = scope + ast.unparse(function) + group(keywords)
                for keyword in given:
                    note(f"{call}({keyword.arg})", keyword.value)
        if inner != scope and inner != "Hyperparameters." and not bodies:
            return
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.stmt) and idle(child, node)):
                visit(child, inner)

    visit(parse(source), "")
    return found


def defaults(arguments: ast.arguments) -> list[tuple[str, ast.expr | None]]:
    named = (arguments.posonlyargs + arguments.args)[-len(arguments.defaults):] if arguments.defaults else []
    pairs = [*zip(named, arguments.defaults), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return [(argument.arg, value) for argument, value in pairs]


def group(keywords: list[ast.keyword]) -> str:
    """What tells one parameter group of an optimizer from the next."""
    return "".join(f"[{ast.unparse(keyword.value)}]" for keyword in keywords if keyword.arg == "params")


def literal(expression: ast.expr | None) -> bool:
    """A constant, arithmetic of numbers, or a tuple, list or dictionary of such."""
    match expression:
        case ast.Constant():
            return True
        case ast.Tuple(parts) | ast.List(parts):
            return all(map(literal, parts))
        case ast.Dict(keys, values):
            return all(map(literal, [key for key in keys if key] + values))
        case ast.UnaryOp(ast.USub(), operand):
            return literal(operand)
        case ast.BinOp(left, _, right):
            return literal(left) and literal(right)
    return False
