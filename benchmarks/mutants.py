"""Mutants of a Python file: every small change of its syntax tree, compiled.

Strings, annotations, decorators and the texts of errors and logs stay as they are.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

SWAPS = [  # operators, and names of functions and methods
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn),
    (ast.Is, ast.IsNot), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr),
    (ast.And, ast.Or),
]  # fmt: skip
OPERATORS: dict[Any, Any] = {a: b for pair in SWAPS for a, b in (pair, pair[::-1])} | {
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
RENAMED = [("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all"),
           ("floor", "ceil"), ("sin", "cos"), ("minimum", "maximum")]  # fmt: skip
NAMES = {a: b for pair in RENAMED for a, b in (pair, pair[::-1])}
DROPPED = {"clamp", "clamp_min", "clamp_max", "clamp_", "abs", "flip", "sqrt", "square", "exp",
           "log", "masked_fill", "masked_fill_", "nan_to_num", "detach"}  # fmt: skip
SYMMETRIC = {"min", "max", "minimum", "maximum", "isinstance", "zip", "getattr"}
ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
SPEECH = {"info", "warning", "print", "debug"}


class Mutant(NamedTuple):
    """A changed module: stable key, first line, lines whose tests are run, function, code.

    ``source`` is a hash of the unchanged function around it, or of the statement outside functions.
    """

    key: str
    line: int
    source: str
    lines: set[int]
    function: tuple[str, int] | None  # name and first line, to exchange its code alone
    code: CodeType


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Compare(ops=operators):
            for i, operator in enumerate(operators):
                new = [*operators[:i], OPERATORS[type(operator)](), *operators[i + 1 :]]
                yield ast.Compare(node.left, new, node.comparators)
        case ast.BinOp(op=operator) if type(operator) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(operator)](), node.right)
        case ast.BoolOp(op=operator):
            yield ast.BoolOp(OPERATORS[type(operator)](), node.values)
        case ast.UnaryOp():
            yield node.operand
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.Continue() | ast.Break() | ast.AugAssign():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.If() | ast.While() | ast.IfExp() if not negated_otherwise(node.test):
            fields = dict(ast.iter_fields(node))
            yield type(node)(**fields | {"test": ast.UnaryOp(ast.Not(), node.test)})
        case ast.Attribute(attr="mT" | "T"):
            yield node.value
        case ast.Call():
            yield from call_changes(node)


def negated_otherwise(test: ast.expr) -> bool:
    """Whether another change of a condition is its negation."""
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and not isinstance(test.ops[0], ORDER)
    return isinstance(test, ast.UnaryOp)


def call_changes(node: ast.Call) -> Iterator[ast.AST]:
    """Another function, no call of a method, or two arguments exchanged."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in NAMES and isinstance(node.func, ast.Attribute):
        function = ast.Attribute(node.func.value, NAMES[name], ast.Load())
        yield ast.Call(function, node.args, node.keywords)
    elif name in NAMES:
        yield ast.Call(ast.Name(NAMES[name], ast.Load()), node.args, node.keywords)
    if name in DROPPED and isinstance(node.func, ast.Attribute):
        yield node.func.value
    for i in range(len(node.args) - 1 if name not in SYMMETRIC else 0):
        pair = node.args[i : i + 2]
        if not any(isinstance(argument, ast.Starred) for argument in pair):
            yield ast.Call(
                node.func, [*node.args[:i], *pair[::-1], *node.args[i + 2 :]], node.keywords
            )


def spoken(node: ast.AST) -> bool:
    """Whether a node is the text of an error or of a log, or is checked by nothing."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", "")) in SPEECH
    return isinstance(node, (ast.Raise, ast.Assert))


def slots(
    node: ast.AST, path: tuple[ast.AST, ...] = ()
) -> Iterator[tuple[ast.AST, Callable[[ast.AST], None], tuple[ast.AST, ...]]]:
    """Every node that may change, a function that replaces it, and its ancestors."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "format_spec", "ops", "op"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or getattr(child, "arg", "") == "strict":
                continue  # zip's strict only checks

            def put(new: ast.AST, value: Any = value, i: int = i, field: str = field) -> None:
                if isinstance(value, list):
                    value[i] = new
                else:
                    setattr(node, field, new)

            yield child, put, (*path, node)
            if not spoken(child):
                yield from slots(child, (*path, node))


def reach(node: ast.AST, path: tuple[ast.AST, ...]) -> tuple[set[int], tuple[str, int] | None]:
    """Lines whose tests may see a change of a node; and the function whose code it changes."""
    chain = (*path, node)
    outer = next((n for n in chain if isinstance(n, (ast.FunctionDef, ast.Lambda))), None)
    if not isinstance(outer, ast.FunctionDef):
        return set(), None
    inside = chain[chain.index(outer) + 1]
    if isinstance(inside, ast.arguments):  # a default
        return set(range(outer.body[0].lineno, outer.end_lineno or 0)), None
    statement = [n for n in chain if isinstance(n, (ast.stmt, ast.comprehension))][-1]
    if not isinstance(statement, ast.stmt):
        statement = [n for n in chain if isinstance(n, ast.stmt)][-1]
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno
    first = min([outer.lineno, *(d.lineno for d in outer.decorator_list)])
    return set(range(statement.lineno, max(end or 0, statement.lineno) + 1)), (outer.name, first)


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file."""
    tree = ast.parse(path.read_text())
    seen: Counter[str] = Counter()
    for node, put, ancestors in slots(tree):
        shown = context(node, ancestors)
        before, source = line_of(shown), digest(node, ancestors)
        for new in changes(node):
            put(ast.fix_missing_locations(ast.copy_location(new, node)))
            code = compile(tree, str(path), "exec", dont_inherit=True)
            names = [str(n.name) for n in ancestors if isinstance(n, (ast.ClassDef, FUNCTION))]
            after = line_of(new if shown is node else shown)
            put(node)
            start = max(0, len(os.path.commonprefix([before, after])) - 60)
            key = ".".join(names) + f": {before[start:][:120]} → {after[start:][:120]}"
            seen[key] += 1
            number = f" ({seen[key]})" if seen[key] > 1 else ""
            lines, function = reach(node, ancestors)
            line = getattr(node, "lineno", 0)
            yield Mutant(key + number, line, source, lines, function, code)


def digest(node: ast.AST, path: tuple[ast.AST, ...]) -> str:
    """Hash of the outermost function around a node, or of the innermost statement without one."""
    chain = (*path, node)
    functions = [n for n in chain if isinstance(n, FUNCTION)]
    statement = functions[0] if functions else [n for n in chain if isinstance(n, ast.stmt)][-1]
    return hashlib.sha256(ast.unparse(statement).encode()).hexdigest()[:12]


def context(node: ast.AST, ancestors: tuple[ast.AST, ...]) -> ast.AST:
    """A node, or the part around it that is long enough to be recognised."""
    for outer in reversed(ancestors):
        if len(ast.unparse(node)) > 24 or isinstance(node, ast.stmt):
            break
        if isinstance(outer, ast.arguments):
            break
        if isinstance(outer, (ast.expr, ast.stmt, ast.keyword)):
            node = outer
    return node


def line_of(node: ast.AST) -> str:
    """A node in one line: of a block, its head."""
    return ast.unparse(node).partition("\n")[0]
