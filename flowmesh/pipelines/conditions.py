"""The expressions of `when`: comparisons of references and literals. A walk over the syntax tree; nothing is executed.

Allowed: `and`, `or`, `not`, `== != < <= > >= in`, texts, numbers, lists, true, false, null, `len(x)`, and
`has(${…})`: whether there is such a value.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from typing import Any

from flowmesh.pipelines.fields import MAX_WHEN_CHARS
from flowmesh.pipelines.references import REFERENCE, as_text
from flowmesh.validation.json_paths import PathError

MAX_NODES = 200
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_NAMED_TRUTHS = frozenset(("true", "false", "yes", "no", "on", "off", "1", "0", "null", "none"))
_REFERENCE_NAME = "_reference_{}"
_IN_TEXT = re.compile(r" _reference_(\d{1,3}) ")


class ConditionError(Exception):
    """An expression cannot be read or evaluated."""


def equal(left: Any, right: Any) -> bool:
    """Whether two values are equal.

    Raises:
        ConditionError: one is a text that spells the other, such as '5' and 5: never equal, and hardly meant so.
    """
    text, other = (left, right) if isinstance(left, str) else (right, left)
    if isinstance(text, str) and isinstance(other, int | float) and _spells(text, other):
        found = json.dumps(other)
        raise ConditionError(f"the text {text!r} is compared with {found}, which is no text, so it is never equal")
    return bool(left == right)


def _spells(text: str, value: float) -> bool:
    if isinstance(value, bool):
        return text.strip().lower() == str(value).lower()
    try:
        return float(text) == value
    except ValueError:
        return False


def _among(item: Any, group: Any) -> bool:
    return any(equal(item, each) for each in group) if isinstance(group, list) else item in group


def _truth(value: Any) -> bool:
    """
    Raises:
        ConditionError: it is a text that names a truth value: it would be true as any other text, `'false'` too.
    """
    if isinstance(value, str) and value.strip().lower() in _NAMED_TRUTHS:
        raise ConditionError(f"the text {value!r} is neither true nor false; compare it, as in ${{…}} == {value!r}")
    return bool(value)


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: equal,
    ast.NotEq: lambda left, right: not equal(left, right),
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: _among,
    ast.NotIn: lambda item, group: not _among(item, group),
}
_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.Constant, ast.List,
    ast.Tuple, ast.Name, ast.Load, ast.Call, *_COMPARE,
)  # fmt: skip


class Condition:
    """A parsed expression.

    Raises:
        ConditionError: it is not one; says what is allowed.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_WHEN_CHARS:
            raise ConditionError(f"an expression has at most {MAX_WHEN_CHARS} characters (found {len(text)})")
        self.references: list[str] = []

        def place(match: Any) -> str:
            self.references.append(match["expr"])
            return f" {_REFERENCE_NAME.format(len(self.references) - 1)} "

        try:
            self._tree = ast.parse(REFERENCE.sub(place, text).strip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ConditionError(f"{text!r} is no expression; write it like ${{a.result.score}} >= 0.5") from None
        nodes = list(ast.walk(self._tree))
        if len(nodes) > MAX_NODES:
            raise ConditionError(f"an expression has at most {MAX_NODES} parts (found {len(nodes)})")
        for node in nodes:
            self._check(node)

    def _check(self, node: ast.AST) -> None:
        if not isinstance(node, _NODES):
            raise ConditionError(
                f"{type(node).__name__} is not allowed; allowed are and, or, not, == != < <= > >= in, texts, numbers, "
                "lists, true, false, null, len(…), has(${…}) and references ${stage.result.x}"
            )
        if isinstance(node, ast.Constant) and not isinstance(node.value, str | int | float | bool | None):
            raise ConditionError(f"{node.value!r} is not allowed; use a text, a number, true, false or null")
        if isinstance(node, ast.Name) and self._index(node) is None and node.id not in (*_WORDS, "len", "has"):
            raise ConditionError(
                f"the name {node.id!r} means nothing here; put texts in quotes, and references in ${{…}}"
            )
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name not in ("len", "has") or len(node.args) != 1 or node.keywords:
                raise ConditionError("the only calls are len(…) and has(${…})")
            if name == "has" and not (isinstance(node.args[0], ast.Name) and self._index(node.args[0]) is not None):
                raise ConditionError("has(…) takes one reference, like has(${a.result.x})")

    def holds(self, resolve: Callable[[str], Any]) -> bool:
        """Whether it is true.

        Args:
            resolve: the value of a reference; raises PathError where there is none.

        Raises:
            PathError: a reference has no value.
            ConditionError: values of these types cannot be compared.
        """
        try:
            return _truth(self._value(self._tree.body, resolve))
        except TypeError as error:
            raise ConditionError(str(error)) from None

    def _value(self, node: ast.expr, resolve: Callable[[str], Any]) -> Any:
        match node:
            case ast.Constant(value=str() as text):
                return _IN_TEXT.sub(lambda match: as_text(resolve(self.references[int(match[1])])), text)
            case ast.Constant():
                return node.value
            case ast.Name():
                index = self._index(node)
                if index is not None:
                    return resolve(self.references[index])
                if node.id not in _WORDS:
                    raise ConditionError(f"{node.id} has to be called: {node.id}(…)")
                return _WORDS[node.id]
            case ast.List() | ast.Tuple():
                return [self._value(item, resolve) for item in node.elts]
            case ast.BoolOp():
                wanted = isinstance(node.op, ast.Or)
                return next(
                    (wanted for each in node.values if _truth(self._value(each, resolve)) is wanted), not wanted
                )
            case ast.UnaryOp():
                value = self._value(node.operand, resolve)
                return -value if isinstance(node.op, ast.USub) else not _truth(value)
            case ast.Compare():
                return self._compared(node, resolve)
            case ast.Call(func=ast.Name(id="len")):
                return len(self._value(node.args[0], resolve))
            case ast.Call():
                return self._exists(node.args[0], resolve)
        raise ConditionError(f"{type(node).__name__} is not allowed")

    def _compared(self, node: ast.Compare, resolve: Callable[[str], Any]) -> bool:
        left = self._value(node.left, resolve)
        for sign, other in zip(node.ops, node.comparators, strict=True):
            right = self._value(other, resolve)
            if not _COMPARE[type(sign)](left, right):
                return False
            left = right
        return True

    def _exists(self, node: ast.expr, resolve: Callable[[str], Any]) -> bool:
        try:
            return self._value(node, resolve) is not None
        except PathError:
            return False

    def _index(self, node: ast.Name) -> int | None:
        """Which reference a name stands for."""
        prefix = _REFERENCE_NAME.format("")
        number = node.id.removeprefix(prefix)
        if node.id.startswith(prefix) and number.isdecimal() and int(number) < len(self.references):
            return int(number)
        return None
