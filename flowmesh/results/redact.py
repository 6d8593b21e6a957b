"""Takes secrets out of text that people, logs and events will see (promise P10)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

HIDDEN = "[hidden]"
_SHORTEST = 4  # below that a "secret" would blank out ordinary words
_CREDENTIALS = re.compile(r"(?i)\b((?:bearer|basic|token)\s+)[A-Za-z0-9._~+/=-]{4,}")
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@]+@")


class Redactor:
    """Knows some secrets and hides them, and whatever looks like a credential, in any text."""

    def __init__(self, secrets: Iterable[str | None] = ()) -> None:
        found = {s for secret in secrets if secret for s in _forms(secret) if len(s) >= _SHORTEST}
        longest_first = sorted(found, key=lambda s: (-len(s), s))
        self._known = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @classmethod
    def of_request(cls, url: str, headers: Mapping[str, str], token: str | None) -> Redactor:
        """One that knows what a destination's address, its headers and the node's token hold."""
        return cls([token, *in_request(url, headers)])

    def __call__(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
        return _CREDENTIALS.sub(rf"\1{HIDDEN}", text)


def in_request(url: str, headers: Mapping[str, str]) -> list[str | None]:
    """What may be secret in an address and its headers."""
    parts = urlsplit(url)
    query = [value for _, value in parse_qsl(parts.query)]
    query += [part.partition("=")[2] or part for part in parts.query.split("&")]  # as they stand there
    values = [value for name, value in headers.items() if name.lower() != "content-type"]
    return [*values, parts.username, parts.password, *query]


def bare_url(url: str) -> str:
    """An address without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _forms(secret: str) -> Iterable[str]:
    """A secret as it may turn up: whole, without its scheme (`Bearer x`), and with URL escapes undone."""
    yield secret
    scheme, _, rest = secret.strip().partition(" ")
    if rest and scheme.isalnum():
        yield rest.strip()
    yield unquote(secret)
