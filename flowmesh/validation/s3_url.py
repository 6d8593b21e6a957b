"""`s3://BUCKET/KEY`: what such an address means, and whether the operator's patterns allow it.

A key is taken literally: `%20`, `?` and `#` in it are part of the object's name, as with the command line of AWS.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "s3://"
WILD = frozenset("*?[")
MAX_KEY_BYTES = 1024
"""S3's own limit."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


class Location(NamedTuple):
    """An object, or with a key that is empty or ends in `/`, all objects whose keys begin so."""

    bucket: str
    key: str

    @property
    def url(self) -> str:
        return f"{PREFIX}{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rstrip("/").rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        return not self.key or self.key.endswith("/")

    def below(self, name: str) -> Location:
        """The object of this name below a folder."""
        return Location(self.bucket, f"{self.key.rstrip('/')}/{name}" if self.key else name)


def is_s3(text: str) -> bool:
    return text.startswith(PREFIX)


def is_url(text: str) -> bool:
    """Whether a document's text names something to download, rather than a path of the node."""
    return text.startswith(("http://", "https://", PREFIX))


def parse(url: str) -> Location:
    """The bucket and the key of an address.

    Raises:
        ValueError: it is none that can be used; says why, without what could be a password.
    """
    if not is_s3(url):
        raise ValueError("not an s3:// address")
    bucket, _, key = url.removeprefix(PREFIX).partition("/")
    if "@" in bucket or ":" in bucket:
        raise ValueError(
            "an s3 address has no login and no port; the node's credentials and endpoint are its settings "
            "cloud.credentials_file and cloud.endpoint_url"
        )
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"{bucket[:80]!r} is not the name of a bucket; write s3://BUCKET/KEY")
    if any(ord(each) < 0x20 or ord(each) == 0x7F or 0xD800 <= ord(each) <= 0xDFFF for each in key):
        raise ValueError("the key contains a control character")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"the key has more than {MAX_KEY_BYTES} bytes")
    parts = key.removesuffix("/").split("/") if key else []
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            "the key has an empty part, `.` or `..`; S3 has no folders to go up in: write the object's own key"
        )
    return Location(bucket, key)


def is_allowed(patterns: Iterable[str], location: Location) -> bool:
    """Whether one of the patterns names the object or prefix, or something that it lies below.

    Args:
        patterns: such as `s3://models`, `s3://data/train/` and `s3://data/*.jsonl`; `*` stands for any characters.
    """
    found = location.url
    for pattern in patterns:
        plain = pattern.replace("[", "[[]").rstrip("/")
        if fnmatch.fnmatchcase(found.rstrip("/"), plain) or fnmatch.fnmatchcase(found, f"{plain}/*"):
            return True
    return False


def matches(key: str, pattern: str) -> bool:
    """Whether a key matches a pattern in which `*` stays within one part and `**` is any number of parts."""
    expression = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern):
        if part == "**/":
            expression += "(?:.*/)?"
        elif part == "**":
            expression += ".*"
        elif part == "*":
            expression += "[^/]*"
        elif part == "?":
            expression += "[^/]"
        elif part.startswith("[") and part.endswith("]") and len(part) > 2:
            inner = part[1:-1].replace("\\", "\\\\")
            expression += f"[{'^' + inner[1:] if inner.startswith('!') else inner}]"
        else:
            expression += re.escape(part)
    return re.fullmatch(expression, key, re.DOTALL) is not None
