"""Finds the address of a dispatch that is not valid JSON, so that it can be answered, and what is wrong with it.

Python's `json.dumps` writes NaN, Infinity and half surrogate pairs, which JSON does not have. Other writers nest deeper
than any decoder follows, or are cut off. None of that hides the few top-level fields that an answer needs.
"""

from __future__ import annotations

import json
import re
from typing import Any

MOST_TOKENS = 2_000_000
"""Strings and brackets that are looked at: about a second of the event loop for a hostile message."""

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]++|[\]}]++|NaN|-?Infinity|"', re.DOTALL)
_COLON = re.compile(rb"\s*+:\s*+")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD]([89abAB])[0-9a-fA-F]{2}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2})?|\\u[dD][c-fC-F]")
_PAIR_CHARS = 12
_BLANK = b"\xef\xbb\xbf \t\r\n"


def top_level_strings(data: bytes, names: frozenset[str]) -> dict[str, str]:
    """Those of the named top-level fields whose values are strings, as far as they can be read.

    Args:
        data: a message that a JSON decoder has refused.
    """
    found: dict[str, str] = {}
    if data.lstrip(_BLANK)[:1] != b"{":
        return found
    depth, skip_until = 0, 0
    for count, token in enumerate(_TOKEN.finditer(data)):
        text = token[0]
        if count > MOST_TOKENS or text == b'"':  # a string without an end: the message was cut off
            break
        if text[0] in b"[{":
            depth += len(text)
        elif text[0] in b"]}":
            depth -= len(text)
            if depth <= 0:
                break
        elif depth == 1 and text[:1] == b'"' and token.start() >= skip_until:
            colon = _COLON.match(data, token.end())
            value = _STRING.match(data, colon.end()) if colon is not None else None
            if value is not None:
                skip_until = value.end()
                if (name := _text(text)) in names and (read := _text(value[0])) is not None:
                    found[str(name)] = read
                    if len(found) == len(names):
                        break
    return found


def cause(data: bytes, error: str) -> str:
    """What makes `data` invalid, with the remedy; `error` where nothing better is known.

    Args:
        error: what the decoder says, such as the byte at which it stopped.
    """
    for count, token in enumerate(_TOKEN.finditer(data)):
        if count > MOST_TOKENS or token[0] == b'"':
            break
        if token[0][:1] in b"NI-":
            what = token[0].decode()
            return f"{what} (byte {token.start()}) is no JSON number; send null, or a string"
    for found in _SURROGATE.finditer(data):
        if len(found[0]) < _PAIR_CHARS:
            return f"half a surrogate pair (byte {found.start()}) is no character; send a whole one, or U+FFFD"
    return error


def _text(token: bytes) -> str | None:
    try:
        value: Any = json.loads(token)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None
