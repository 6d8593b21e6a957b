"""Text from untrusted places on its way out: made valid for UTF-8, and harmless on a terminal.

A task's error, a file's name and a library's message may hold half surrogate pairs, which no encoder writes, and
control characters, which a terminal obeys. Files keep both as they are, as far as their format can.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()

_CONTROL = re.compile(
    r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
"""Control characters but the tab, what changes the direction of text, and half surrogate pairs."""
_SHORT = {"\n": r"\n", "\r": r"\r", "\b": r"\b", "\f": r"\f", "\v": r"\v", "\0": r"\0"}


def whole(text: str) -> str:
    """`text` as UTF-8 can encode it: two halves of a pair become their character, a lone half becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def escaped(text: str) -> str:
    """`text` on one line, with each control character written out, such as `\\x1b`. Tabs stay."""
    return _CONTROL.sub(_escape, text)


def escaped_json(text: str) -> str:
    """JSON text whose control characters are JSON escapes: the same value, harmless on a terminal."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(found: re.Match[str]) -> str:
    char = found[0]
    code = ord(char)
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def encode_json(value: Any) -> bytes:
    """JSON. Half surrogate pairs become U+FFFD, numbers that are not finite become null.

    Raises:
        TypeError, ValueError, RecursionError: `value` holds something else that JSON cannot hold, or is nested too
            deep.
    """
    return _encoded(_json.encode, value)


def encode_msgpack(value: Any) -> bytes:
    """The same as MessagePack."""
    return _encoded(_msgpack.encode, value)


def _encoded(encode: Callable[[Any], bytes], value: Any) -> bytes:
    try:
        return encode(value)
    except UnicodeEncodeError:
        return encode(_whole(msgspec.to_builtins(value)))


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        kept: dict[Any, Any] = {}
        for name, each in value.items():
            key = _whole(name)
            while key in kept and isinstance(key, str):  # two names that differ only in their halves
                key += "\ufffd"
            kept[key] = _whole(each)
        return kept
    if isinstance(value, list | tuple):
        return [_whole(each) for each in value]
    return value


def harmless(line: bytes, redact: Callable[[str], str]) -> bytes:
    """A line as a terminal may have it: without secrets and control characters; each carriage return begins a line."""
    text = redact(line.removesuffix(b"\r").decode("utf-8", "backslashreplace"))
    return "\n".join(escaped(part) for part in text.split("\r")).encode()
