"""Keys: taken from environment variables by their names, and hidden wherever a text could show them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from runners.api import BadRequest

HIDDEN = "[hidden]"
_SHORTEST = 6  # a shorter "secret" would blank out ordinary words
_SECRET_NAME = re.compile(
    r"(?i)^(?!.*[_-](file|path|dir)$).*"
    r"(token|secrets?|passwords?|passwd|passphrase|authorization|cookies?|credentials?|jwt"
    r"|(api|access|private|secret)[_-]?keys?|(?<![a-z0-9])key|(?<![a-z0-9])(pass|auth)$|[_-](pwd|pat)$)([_-]|$)"
)
"""Of an environment variable or a header; not of a path to a secret. PWD alone is a folder."""
_BEARER = re.compile(r"(?i)\b(bearer\s+)(?=\S*\d)[A-Za-z0-9._~+/=-]{16,}")
_HALVES = re.compile("[\ud800-\udfff]")
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@]+@")


def from_env(name: str, where: str) -> str:
    """The value of a variable that a configuration names.

    Raises:
        BadRequest: it is not set, with what to do.
    """
    value = os.environ.get(name)
    if not value:
        raise BadRequest(
            f"{where}: the variable {name} is not set for this task; set it where the node runs and name it in the "
            "node's tasks.pass_env"
        )
    return value


class Redactor:
    """Hides the secrets that it knows, and what looks like a credential, in any text.

    What comes out is sound UTF-8, whatever a model or the name of a file had in it: it goes into logs and results.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known: set[str] = set()
        for value in secrets:
            self.learn(value)
        self.learn_named(os.environ)

    def learn(self, value: str) -> None:
        """Hide this from now on, too."""
        tail = value.partition(" ")[2].strip()
        self._known |= {each for each in (value, tail) if len(each) >= _SHORTEST}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._known, key=lambda s: (-len(s), s)))))

    def learn_named(self, values: Mapping[str, str]) -> None:
        """Hide those whose names say that they are secret. Others are often paths or words that a model needs."""
        for name, value in values.items():
            if _SECRET_NAME.search(name):
                self.learn(value)

    _pattern = re.compile(r"(?!)")

    def __call__(self, text: str) -> str:
        text = _HALVES.sub("\ufffd", self._pattern.sub(HIDDEN, text))
        return _BEARER.sub(rf"\1{HIDDEN}", _USERINFO.sub(rf"\1{HIDDEN}@", text))

    def deep(self, value: Any) -> Any:
        """The same for all texts in JSON data."""
        match value:
            case str():
                return self(value)
            case dict():
                return {self(str(key)): self.deep(each) for key, each in value.items()}
            case list() | tuple():
                return [self.deep(each) for each in value]
        return value
