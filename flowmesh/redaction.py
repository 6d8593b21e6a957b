"""What a secret is, and how it is taken out of text that people, logs and events will see.

One definition for settings, error messages, deliveries and agents. Where in doubt, the value is hidden.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "[hidden]"

_SHORTEST = 4
"""Characters; a shorter known secret would blank out parts of ordinary words."""
_ORDINARY = frozenset({"true", "false", "none", "null"})
"""Values that variables such as REQUIRE_AUTH have, and that would blank out ordinary text."""

_SECRET_NAME = re.compile(
    r"(?i)^(?!.*[_-](file|path|dir)$).*"
    r"(token|secrets?|passwords?|passwd|passphrase|authorization|cookies?|credentials?|jwt"
    r"|(api|access|private|secret)[_-]?keys?|(?<![a-z0-9])(key|headers)|(?<![a-z0-9])(pass|auth)$|[_-](pwd|pat)$)"
    r"([_-]|$)"
)
"""Not the path of a file that holds a secret, and not PWD, which is the working directory."""
_SECRET_PARAMETER = re.compile(r"(?i)(password|passwd|token|secret|key|sig|signature|credential)$")
"""Signed addresses have names of their own, such as X-Amz-Signature and sig."""

_SCHEME = r"\b([a-z][a-z0-9+.-]{0,30}://)"
_USERINFO = re.compile(rf"(?i){_SCHEME}[^/\s@]+@")
_URL = re.compile(rf"(?i){_SCHEME}([^\s\"'<>]+)")
_PARAMETER = re.compile(r"([?&#]([^=&#]*)=)([^&#]*)")
_CLEAN_AUTHORITY = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.%]+\])(?::\d{1,5})?", re.ASCII)
_HTTP = frozenset({"http", "https"})
"""Schemes whose paths may hold an "@", also in settings."""
_AT_IN_PATH = _HTTP | {"git+http", "git+https", "s3", "gs", "hf", "file"}
"""The same in a text, which may have hf://datasets/NAME@REVISION or git+https://HOST/NAME@TAG."""

_CREDENTIAL = re.compile(r"(?i)\b((?:bearer|basic|token)\s+)[A-Za-z0-9._~+/=-]{4,}")
_CREDENTIAL_IN_PROSE = re.compile(r"(?i)\b((?:bearer|basic|token)\s+)(?=\S*\d)[A-Za-z0-9._~+/=-]{16,}")
_AMBIGUOUS = re.compile(r"(?i)(token|key|sig)$")
_LONG_IN_PROSE = 16
"""Characters; links have parameters such as key=title or page_token=CAUQAA, which an agent needs to follow them."""
_SURROGATES = re.compile("[\ud800-\udfff]")


def is_secret_name(name: str) -> bool:
    """Whether a field, environment variable, header or parameter of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


_is_secret_variable = functools.lru_cache(maxsize=512)(is_secret_name)
"""For the environment, whose names are few and looked at for every task."""


def is_secret(path: Sequence[str | int]) -> bool:
    """Whether the value at `path` is a secret, or lies inside one: an item of a list, or one of several headers."""
    return any(isinstance(step, str) and is_secret_name(step) for step in path)


class Redactor:
    """Replaces known secrets, and what looks like a credential, by `[hidden]` in any text.

    The result is valid Unicode text: lone surrogates, which model output and file names can contain, are replaced.

    Args:
        secrets: the known ones; empty and very short ones are ignored.
        exact: hide the known secrets only, and leave all other text as it is: for results.
        prose: the text is written or read by a model: ordinary words follow "basic" and "token", and links have
            parameters such as key=title. Only what is long and has a digit counts as a credential there. Known secrets,
            passwords and the user part of addresses are hidden all the same.
    """

    def __init__(self, secrets: Iterable[str | None] = (), *, exact: bool = False, prose: bool = False) -> None:
        self._exact = exact
        self._prose = prose
        self._known: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        for secret in secrets:
            self.learn(secret)

    @classmethod
    def of_request(cls, url: str, headers: Mapping[str, str], token: str | None) -> Redactor:
        """A redactor that knows the secrets in an address and its headers, and the node's token."""
        return cls([token, *in_request(url, headers)])

    @property
    def known(self) -> frozenset[str]:
        """The secrets that it knows, in all their forms."""
        return frozenset(self._known)

    def learn(self, secret: str | None) -> None:
        """Hide this value from now on, too."""
        if secret and secret.strip().lower() not in _ORDINARY:
            self._known |= {form for form in _forms(secret) if len(form) >= _SHORTEST}
            self._pattern = None

    def learn_named(self, values: Mapping[str, str]) -> None:
        """Hide the values whose names mark them as secret. The others are often paths, or words that a text needs."""
        for name, value in values.items():
            if is_secret_name(name):
                self.learn(value)

    def __call__(self, text: str) -> str:
        if self._known:
            if self._pattern is None:
                longest_first = sorted(self._known, key=lambda form: (-len(form), form))
                self._pattern = re.compile("|".join(map(re.escape, longest_first)))
            text = self._pattern.sub(HIDDEN, text)
        if self._exact:
            return text
        if not text.isascii():
            text = _SURROGATES.sub("\ufffd", text)
        if "://" in text:  # both patterns need it, and cost most of the time
            text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
            text = _URL.sub(self._address, text)
        return (_CREDENTIAL_IN_PROSE if self._prose else _CREDENTIAL).sub(rf"\1{HIDDEN}", text)

    def _address(self, match: re.Match[str]) -> str:
        rest = _without_userinfo(match[1].removesuffix("://"), match[2], _AT_IN_PATH)
        return match[1] + _without_parameters(rest, prose=self._prose)

    def deep(self, value: Any) -> Any:
        """JSON data with the secrets replaced in every text and key."""
        match value:
            case str():
                return self(value)
            case dict():  # no comprehensions: each would take a second frame of the recursion limit for a level
                hidden = {}
                for key, item in value.items():
                    hidden[self(str(key))] = self.deep(item)
                return hidden
            case list() | tuple():
                items = []
                for item in value:
                    items.append(self.deep(item))
                return items
        return value


def document_without_secrets(document: dict[str, Any], redact: Redactor) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A copy of a task document for people: without secrets, also short ones in fields that are named for them.

    Args:
        redact: knows the node's secrets and the document's.

    Returns:
        The copy, and the dotted paths of the fields that hold `[hidden]` in place of a secret.
    """
    hidden: list[str] = []

    def copied(value: Any, path: str, name: str, inside: str) -> Any:
        match value:
            case str():
                shown = HIDDEN if value and _is_secret_field(inside, name, value) else redact(value)
                if shown != value:
                    hidden.append(path)
                return shown
            case dict():
                inside = "headers" if name.lower().endswith("headers") else "env" if name == "env" else ""
                dotted = f"{path}." if path else ""
                return {redact(key): copied(item, f"{dotted}{redact(key)}", key, inside) for key, item in value.items()}
            case list() | tuple():
                return [copied(item, f"{path}[{index}]", name, inside) for index, item in enumerate(value)]
        return value

    return copied(document, "", "", ""), tuple(hidden)


def _is_secret_field(inside: str, name: str, value: str) -> bool:
    """Whether the field `name` of a document holds a secret, whatever its value is; `inside` is what it lies in."""
    if inside == "headers":
        return _is_secret_header(name, value)
    if inside == "env":
        return is_secret_name(name)
    return _SECRET_FIELD.fullmatch(name) is not None and _NO_SECRET_FIELD.fullmatch(name) is None


def in_request(url: str, headers: Mapping[str, str]) -> list[str | None]:
    """What may be secret in an address and its headers: user, password, parameters, and all but the content type."""
    from urllib.parse import parse_qsl, urlsplit  # a third of a light process's import time

    parts = urlsplit(url)
    query = [value for _, value in parse_qsl(parts.query)]
    query += [part.partition("=")[2] or part for part in parts.query.split("&")]  # before URL escapes are undone
    values = [value for name, value in headers.items() if name.lower() != "content-type"]
    return [*values, parts.username, parts.password, *query]


_PLAIN_HEADERS = re.compile(r"(?i)(accept|content)(-.*)?|user-agent|cache-control|connection|range")
_SECRET_FIELD = re.compile(r"(?i)(\w+_)?(api_?key|token|password|passwd|secret|access_?key|credential)")
_NO_SECRET_FIELD = re.compile(r"(?i)(\w+_)?(pad|eos|bos|unk|sep|cls|mask|stop|end|start|image|special)_?token")
_SHORTEST_IN_DOCUMENT = 8
"""Characters; the values of such fields are often words, and a result must not lose its own."""


def in_document(value: Any, env: Mapping[str, str]) -> Iterator[str | None]:
    """What may be secret in a task document: headers, keys and passwords by name, environment variables, addresses.

    Args:
        value: the document, or a part of it.
        env: the environment of the task, of which variables with secret names count.
    """
    yield from (env[name] for name in env if _is_secret_variable(name))  # os.environ decodes what is read
    for found in _walk(value):
        if len(found) >= _SHORTEST_IN_DOCUMENT:
            yield found


def _walk(value: Any) -> Iterator[str]:
    open_: list[tuple[str, Any]] = [("", value)]
    while open_:
        name, item = open_.pop()
        match item:
            case dict() if name.lower().endswith("headers"):
                yield from (text for key, text in item.items() if _is_secret_header(key, text))
            case dict() if name == "env":
                yield from (text for key, text in item.items() if isinstance(text, str) and is_secret_name(str(key)))
            case dict():
                open_ += ((str(key), inner) for key, inner in item.items())
            case list() | tuple():
                open_ += ((name, inner) for inner in item)
            case str() if _SECRET_FIELD.fullmatch(name) and not _NO_SECRET_FIELD.fullmatch(name):
                yield item
            case str() if "://" in item and not any(map(str.isspace, item)):
                yield from in_address(item)


def _is_secret_header(name: Any, value: Any) -> bool:
    return isinstance(value, str) and _PLAIN_HEADERS.fullmatch(str(name)) is None


def in_address(url: str) -> Iterator[str]:
    """The password of an address, and its parameters with secret names."""
    from urllib.parse import parse_qsl, urlsplit

    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError:
        return
    if password:
        yield password
    for name, value in parse_qsl(parts.query):
        if _SECRET_PARAMETER.search(name) or is_secret_name(name):
            yield value


def bare_url(url: str) -> str:
    """An address without user, password, query and fragment."""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redact_url(url: str) -> str:
    """An address for display: without its password, its tokens, and whatever could be part of an unescaped one."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return HIDDEN
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in rest and authority and not _is_clean(authority) and not re.fullmatch(r":\d{1,5}", authority):
        return f"{scheme}://{HIDDEN}"  # "redis://:pa" of a password with a bare "/"
    return f"{scheme}://{_without_parameters(_without_userinfo(scheme, rest, _HTTP))}"


def _without_userinfo(scheme: str, rest: str, at_in_path: frozenset[str]) -> str:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" not in rest or (_is_clean(authority) and scheme.lower() in at_in_path):
        return rest
    # A password with a bare "/" or "#" moves its "@" behind what reads as the authority: the last "@" counts.
    secret, _, rest = rest.rpartition("@")
    user, colon, _ = secret.partition(":")
    return f"{user if colon else ''}{colon}{HIDDEN}@{rest}"


def _is_clean(authority: str) -> bool:
    """Whether this can only be host and port."""
    return _CLEAN_AUTHORITY.fullmatch(authority) is not None


def _without_parameters(rest: str, *, prose: bool = False) -> str:
    def shown(match: re.Match[str]) -> str:
        named = _SECRET_PARAMETER.search(match[2]) is not None or is_secret_name(match[2])
        long = len(match[3]) >= _LONG_IN_PROSE and re.search(r"\d", match[3])
        part_of_link = prose and _AMBIGUOUS.search(match[2]) is not None and not long
        return match[1] + HIDDEN if named and not part_of_link else match[0]

    return _PARAMETER.sub(shown, rest)


def _forms(secret: str) -> Iterable[str]:
    """A secret as it may turn up: whole, line by line, without its scheme (`Bearer x`), URL-escaped and unescaped."""
    from urllib.parse import quote, unquote

    whole = secret.strip()
    after_scheme = whole.partition(" ")[2]
    for form in (secret, whole, after_scheme.strip(), *map(str.strip, whole.splitlines())):
        yield form
        yield unquote(form)
        if form.isprintable():  # lone surrogates cannot be escaped
            yield quote(form, safe="")
