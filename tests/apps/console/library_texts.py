"""The texts that the library writes for people, read from its source with values in them.

A rule says what it has seen in an f-string; which one depends on a run that has the fault. Reading
the source finds all of them, without such a run for each.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from esper.contracts.percent import percent
from hosts.paths import ROOT

RULES = tuple(sorted((ROOT / "esper/diagnosis/rules").glob("[a-z]*.py")))
OTHERS = tuple(
    ROOT / "esper" / path
    for path in (
        *(
            "grafting/trained_tensors/ledger.py",
            "grafting/trained_tensors/movement.py",
            "grafting/copies.py",
            "grafting/guard.py",
        ),
        *(
            "sdk/findings.py",
            "sdk/compiler_watch.py",
            "policy/heuristic.py",
            "policy/confidence.py",
        ),
    )
)
SHOWN = ("observed", "limit", "advice", "remedy")  # fields of evidence and of findings
_BY_PLACE = {
    "_evidence": (0, 1),
    "Problem": (2, 3),
    "GuardVerdict": (3,),
    "Reason": (3,),
    "Term": (3,),
}
_NAME, _NUMBER = "net.0", 0.1234
Functions = dict[str, ast.FunctionDef]


def texts_of(path: Path) -> Iterator[str]:
    """Each text of evidence or of a finding that this file can make."""
    functions = _functions(path)
    for function in functions.values():
        for call in (one for one in ast.walk(function) if isinstance(one, ast.Call)):
            name = getattr(call.func, "id", "")
            shown = [call.args[at] for at in _BY_PLACE.get(name, ()) if at < len(call.args)]
            if name in {"Evidence", "Finding", "Check", "replace", *_BY_PLACE}:
                shown += [one.value for one in call.keywords if one.arg in SHOWN]
            for text in shown:
                yield from (one for one in _texts(text, function, functions) if one)


def returned_texts(path: Path) -> Iterator[str]:
    """Each text that a function returns, as an answer why not."""
    functions = _functions(path)
    for function in functions.values():
        if function.returns is not None and "str" in ast.unparse(function.returns):
            yield from _returned(function, functions)


def _functions(path: Path) -> Functions:
    tree = ast.parse(path.read_text())
    return {one.name: one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)}


def _texts(node: ast.expr, function: ast.FunctionDef, others: Functions) -> list[str]:
    """What this expression can be: one text for each way through its conditions."""

    def inner(one: ast.expr) -> list[str]:
        return _texts(one, function, others)

    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(one) for one in product(*map(inner, parts))]
        case ast.FormattedValue(value=value, format_spec=None):
            return inner(value) or [_NAME]
        case ast.FormattedValue(format_spec=ast.JoinedStr() as spec):
            form = ast.unparse(spec)[2:-1]
            return [format(1234 if form == "," else _NUMBER, form)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [first + second for first, second in product(inner(left), inner(right))]
        case ast.BinOp(left=left, op=ast.Mult()):  # a text where something holds
            return ["", *inner(left)]
        case ast.IfExp(body=body, orelse=orelse):
            return inner(body) + inner(orelse)
        case ast.BoolOp(values=values):
            return [text for value in values for text in inner(value)]
        case ast.Tuple(elts=parts):  # an answer with its reason
            return [text for part in parts for text in inner(part)]
        case ast.Dict(values=values):
            return [text for value in values for text in inner(value)]
        case ast.Subscript(value=value):  # any of a dict's texts
            return inner(value)
        case ast.Name(id=name):
            return _assigned(name, function, others)
        case ast.Call(func=ast.Name(id="percent" | "signed")):
            return [percent(_NUMBER)]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in others:
            rest = {one: found for one, found in others.items() if one != name}
            return _returned(others[name], rest)  # a function may call itself
    return []


def _returned(function: ast.FunctionDef, others: Functions) -> list[str]:
    returned = [one.value for one in ast.walk(function) if isinstance(one, ast.Return)]
    texts = (_texts(one, function, others) for one in returned if one is not None)
    return [text for some in texts for text in some if text]


def _assigned(name: str, function: ast.FunctionDef, others: Functions) -> list[str]:
    found: list[str] = []
    for one in ast.walk(function):
        if isinstance(one, ast.Assign):
            for target, value in _pairs(one.targets[0], one.value):
                if isinstance(target, ast.Name) and target.id == name and not _names(value, name):
                    found += _texts(value, function, others)
        elif isinstance(one, ast.AugAssign) and getattr(one.target, "id", "") == name:
            more = _texts(one.value, function, others)
            found += [text + end for text in found for end in more]
    return found


def _names(value: ast.expr, name: str) -> bool:
    return any(isinstance(one, ast.Name) and one.id == name for one in ast.walk(value))


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value
