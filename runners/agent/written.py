"""What models write: thinking, calls as JSON in text-protocol mode, and arguments that are not a JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

_BEGIN = r"[<\[](think|thinking|thought|reasoning)[>\]]"
_END = r"[<\[]/(?:think|thinking|thought|reasoning)[>\]]"
_BLOCK = re.compile(rf"{_BEGIN}.*?(?:[<\[]/\1[>\]]|\Z)", re.DOTALL | re.IGNORECASE)
"""Thinking; where it is not closed, up to the end of the text."""
_UP_TO_END = re.compile(rf"(?:(?!{_BEGIN}).)*?^[ \t]*{_END}", re.DOTALL | re.IGNORECASE | re.MULTILINE)
"""Thinking whose begin is in the chat template. The end begins a line: inside one, it may be what the text is about."""
MAX_OPENINGS = 10_000
"""Opening brackets of one text that are tried as JSON; each may take time linear in the text's length."""
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)
_LINE_OF_OBJECT = re.compile(r"^[ \t]*(?=\{)", re.MULTILINE)
_OPENING = re.compile(r"[{\[]")
_BEGUN_CALL = re.compile(r'\{\s*"name"\s*:\s*"')
OBSERVATION = "Observation:"
"""Text after it is invented by the model: only this program writes observations."""


class Malformed(dict[str, Any]):
    """Arguments of a call that are not a JSON object. Holds their text, for the log; `why` is for the model."""

    def __init__(self, text: str, problem: str) -> None:
        super().__init__(malformed=text)
        self.why = (
            f"the call was not run: its arguments are {problem}. They were: {text[:500]}\n"
            'Call the tool again with one JSON object of its arguments, such as {"name": "value"}.'
        )


def as_object(text: str) -> dict[str, Any]:
    """The arguments of a call: a JSON object, or Malformed. Empty text means no arguments."""
    if not text.strip():
        return {}
    try:
        value = _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        return Malformed(text, _problem(error))
    return value if isinstance(value, dict) else Malformed(text, f"JSON, but not an object: {_kind(value)}")


def without_thinking(text: str) -> str:
    """A model's text without the thinking before its answer, closed or not."""
    text = text.strip()
    for pattern in (_BLOCK, _UP_TO_END):
        while (found := pattern.match(text)) is not None:
            text = text[found.end() :].lstrip()
    return text


def written_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls that a text ends with, as name and arguments.

    A call is a JSON object of `name` and `arguments` that begins a line. Only further calls may follow it. Inside a
    code fence it counts only if the fence is the whole text. Thinking holds no calls.
    """
    text = _outside_thinking(text).partition(f"\n{OBSERVATION}")[0].strip()
    if (fenced := _FENCED.fullmatch(text)) is not None:
        text = fenced[1].strip()
    for found in _LINE_OF_OBJECT.finditer(text):
        try:
            values = _objects_to_the_end(text, found.end())
        except RecursionError:
            break
        if values and all(value.keys() == {"name", "arguments"} and isinstance(value["name"], str) for value in values):
            return [(value["name"], _arguments(value["arguments"])) for value in values]
    return []


def begun_call(text: str) -> str:
    """Why a text that begins like a call cannot be parsed; empty for any other text."""
    text = _outside_thinking(text)
    if _BEGUN_CALL.match(text) is None:
        return ""
    try:
        _decoder.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return _problem(error)
    return ""


def whole_answer(text: str) -> str:
    """The answer, if the whole text is a call of final_answer; else the text itself."""
    match written_calls(text):
        case [("final_answer", {"answer": str(answer)})] if text.lstrip().startswith(("{", "```")):
            return answer
    return text


def json_values(text: str, fits: Callable[[Any], bool]) -> list[Any]:
    """The distinct JSON objects and lists in a text that fit; only fenced ones if there are any, none in thinking."""
    text = _outside_thinking(text)
    for parts in (_FENCED.findall(text), [text]):
        found: list[Any] = []
        for value in (value for part in parts for value in _values(part, fits)):
            if value not in found:
                found.append(value)
        if found:
            return found
    return []


def encodable(text: str) -> str:
    """Text without lone surrogates: pairs that arrived in two pieces are joined, others replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _outside_thinking(text: str) -> str:
    """The text without any thinking; if an end tag is left over, only what follows the last one."""
    return re.split(_END, _BLOCK.sub("", text), flags=re.IGNORECASE)[-1].strip()


def _values(text: str, fits: Callable[[Any], bool]) -> list[Any]:
    values, at = [], 0
    for _ in range(MAX_OPENINGS):
        if (opening := _OPENING.search(text, at)) is None:
            break
        at = opening.start() + 1
        try:
            value, end = _decoder.raw_decode(text, opening.start())
        except ValueError:
            continue
        except RecursionError:  # the next thousand openings are nested as deep
            break
        if fits(value):
            values.append(value)
            at = end
    return values


def _objects_to_the_end(text: str, at: int) -> list[dict[str, Any]]:
    """JSON objects from `at` to the end of the text; empty if there is anything else.

    Raises:
        RecursionError: they are nested too deep.
    """
    values = []
    while at < len(text):
        try:
            value, at = _decoder.raw_decode(text, at)
        except ValueError:
            return []
        if not isinstance(value, dict):
            return []
        values.append(value)
        while text[at : at + 1].isspace():
            at += 1
    return values


def _arguments(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else as_object(json.dumps(value))


def _problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        cut = error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())
        return f"{'cut off before their end' if cut else 'not valid JSON'} ({error})"
    return f"not valid JSON ({error})"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)
