"""Mutations of a module's source: small changes that a test should notice.

Each is one place of the syntax tree written differently: a comparison, a number, an operator, a
name such as floor, a call or keyword left out, what is returned. Texts, types, messages of errors
and what only type checkers read are left alone: they have no behaviour that tests are for. So is
what makes no difference that a test on a CPU could see: devices, numbers taken out of tensors of
one number, and whether a bound such as 0.05 belongs to what it bounds; 0.0 and 1.0 are drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
_PAIRS = (
    ("floor", "ceil"),
    ("all", "any"),
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("expm1", "exp"),
    ("log1p", "log"),
    ("isneginf", "isinf"),
    ("isfinite", "isnan"),
    ("zeros_like", "ones_like"),
    ("add", "sub"),
    ("add_", "sub_"),
)
_OTHER_NAME = dict(_PAIRS) | {b: a for a, b in _PAIRS}
# Methods whose call may be left out: x.abs() -> x.
_DROPPED = (
    "abs detach neg neg_ clamp clip masked_fill to float double half long contiguous clone "
    "reshape flatten squeeze unsqueeze movedim nan_to_num nan_to_num_ round sqrt square log exp "
    "where cumsum copy any all sort sum mean prod"
)


class Mutation(NamedTuple):
    """One place of a source, written differently."""

    line: int
    before: str  # the lines it touches, and what becomes of them, white space made single:
    after: str  # what an excuse is known by, for numbers of lines move
    begin: int  # bytes of the source that are replaced
    end: int
    new: str

    def applied(self, source: str) -> str:
        """The source with this change."""
        raw = source.encode()
        return (raw[: self.begin] + self.new.encode() + raw[self.end :]).decode()


def mutations(source: str) -> list[Mutation]:
    """Every mutation of a source that still compiles, in order of lines."""
    found = {}
    for node, new in _visit(ast.parse(source), None):
        mutation = _at(source, node, new)
        key = (mutation.begin, mutation.end, mutation.new)
        if mutation.before != mutation.after and _compiles(mutation.applied(source)):
            found.setdefault(key, mutation)
    return [found[key] for key in sorted(found)]


def hand_made(source: str, old: str, new: str) -> Mutation | None:
    """The mutation that writes the only place of ``old`` as ``new``; None where it is not there."""
    if source.count(old) != 1:
        return None
    begin = len(source[: source.index(old)].encode())
    return _replacement(source, begin, begin + len(old.encode()), new)


def _at(source: str, node: ast.AST, new: str) -> Mutation:
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    first, last = node.lineno, node.end_lineno  # type: ignore[attr-defined]
    begin = starts[first - 1] + node.col_offset  # type: ignore[attr-defined]
    end = starts[last - 1] + node.end_col_offset  # type: ignore[attr-defined]
    return _replacement(source, begin, end, new)


def _replacement(source: str, begin: int, end: int, new: str) -> Mutation:
    raw = source.encode()
    line_begin = raw.rfind(b"\n", 0, begin) + 1
    line_end = raw.find(b"\n", end)
    before = raw[line_begin : line_end if line_end >= 0 else len(raw)].decode()
    left, right = raw[line_begin:begin].decode(), raw[end : line_begin + len(before.encode())]
    after = left + new + right.decode()
    line = raw[:begin].count(b"\n") + 1
    return Mutation(line, " ".join(before.split()), " ".join(after.split()), begin, end, new)


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def _visit(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[ast.AST, str]]:
    """Places and what is written there instead."""
    yield from _changes(node, parent)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or _is_left_alone(node, field):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _visit(child, node)


def _is_left_alone(node: ast.AST, field: str) -> bool:
    """What is no behaviour: messages, imports, declarations of types."""
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.If):
        return field in ("test", "body") and _is_for_types(node)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return any(ast.unparse(d) == "overload" for d in node.decorator_list)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return name == "cast" and field == "args" and isinstance(node.args[0], ast.Constant)
    return False


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _changes(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.Compare):
        yield from _comparison(node)
    elif isinstance(node, ast.Constant):
        yield from ((node, repr(v)) for v in _numbers(node.value))
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        other = _OPERATORS[type(node.op)]()
        yield node, _written(ast.BinOp(node.left, other, node.right), parent)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        yield node, ast.unparse(ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value))
    elif isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, _written(ast.BoolOp(other_op, node.values), parent)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node, _written(node.operand, parent)
    elif isinstance(node, ast.Call):
        yield from _call(node, parent)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield node, "return None"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass"
    tested = isinstance(node, (ast.If, ast.IfExp, ast.While)) and not _is_for_types(node)
    if tested and isinstance(node.test, (ast.Name, ast.Attribute, ast.Call)):
        yield node.test, f"(not {ast.unparse(node.test)})"


def _comparison(node: ast.Compare) -> Iterator[tuple[ast.AST, str]]:
    for i, op in enumerate(node.ops):
        others = _COMPARISONS[type(op)]
        for other in others[1:] if len(others) == 2 and _is_of_fractions(node) else others:
            ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
            yield node, f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})"


def _is_of_fractions(node: ast.AST) -> bool:
    constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return any(isinstance(value, float) and not value.is_integer() for value in constants)


def _numbers(value: object) -> tuple[object, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return value + 1, value - 1
    if isinstance(value, float):
        return (value * 10, value * 2) if value else (1.0,)
    return ()


def _call(node: ast.Call, parent: ast.AST | None) -> Iterator[tuple[ast.AST, str]]:
    for i, keyword in enumerate(node.keywords):
        if keyword.arg == "device":
            continue
        fewer = [*node.keywords[:i], *node.keywords[i + 1 :]]
        yield node, ast.unparse(ast.Call(node.func, node.args, fewer))
    if isinstance(node.func, ast.Attribute):
        name, value = node.func.attr, node.func.value
        of_module = isinstance(value, ast.Name) and value.id in ("torch", "math", "np")
        if name in _OTHER_NAME:
            other = ast.Attribute(value, _OTHER_NAME[name], ast.Load())
            yield node, ast.unparse(ast.Call(other, node.args, node.keywords))
        if name in _DROPPED.split() and not of_module and not isinstance(parent, ast.Expr):
            yield node, _written(value, parent)
    elif isinstance(node.func, ast.Name) and node.func.id in _OTHER_NAME:
        other = ast.Name(_OTHER_NAME[node.func.id], ast.Load())
        yield node, ast.unparse(ast.Call(other, node.args, node.keywords))


def _written(node: ast.expr, parent: ast.AST | None) -> str:
    """The text of a node, in brackets where what is around it could bind tighter."""
    text = ast.unparse(node)
    plain = isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant))
    alone = isinstance(parent, (ast.Assign, ast.Return, ast.Expr))
    return text if plain or alone else f"({text})"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
