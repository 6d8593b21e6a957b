"""The parts of a chat message: texts and images, in OpenAI's spelling and in that of Transformers.

Lists without an image become one text, which every model takes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from runners.api import BadRequest

MAX_IMAGES = 64
"""Of one prompt."""
_IMAGE_FIELDS = {"image_url": ("image_url", "detail"), "image": ("image", "url", "path", "detail")}


class TextPart(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Some text."""

    text: str

    def shown(self) -> dict[str, Any]:
        """In JSON types, for the result."""
        return {"type": "text", "text": self.text}


class ImagePart(msgspec.Struct, frozen=True, tag_field="type", tag="image", omit_defaults=True):
    """An image, by its place."""

    url: str
    """A data URL, a path, or an http(s) URL."""
    detail: str | None = None
    """OpenAI's `low`, `high` or `auto`. Without effect: the model's processor decides about resolution."""
    digest: str = ""
    """Of its bytes, and its size in pixels; set by `images.checked`."""
    width: int = 0
    height: int = 0

    def shown(self) -> dict[str, Any]:
        """In JSON types, for the result; the bytes of a data URL by their digest."""
        url = self.url
        if is_data_url(url):
            head, _, data = url.partition(",")
            url = f"{head},<{len(data)} characters, sha256 {hashlib.sha256(data.encode()).hexdigest()}>"
        detail = {} if self.detail is None else {"detail": self.detail}
        return {"type": "image_url", "image_url": {"url": url, **detail}}


Part = TextPart | ImagePart


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def read_content(given: Sequence[Any], where: str) -> str | tuple[Part, ...]:
    """A message's `content` that is a list: its parts, or one text if none is an image.

    Raises:
        BadRequest: a part is neither a text nor an image. The message does not show the content.
    """
    parts = tuple(_part(each, f"{where}[{number}]") for number, each in enumerate(given))
    if not parts:
        raise BadRequest(f"{where}: is empty; give a text or at least one part")
    if sum(isinstance(each, ImagePart) for each in parts) > MAX_IMAGES:
        raise BadRequest(f"{where}: more than {MAX_IMAGES} images; send fewer")
    if any(isinstance(each, ImagePart) for each in parts):
        return parts
    return "\n".join(each.text for each in parts if isinstance(each, TextPart))


def _part(given: Any, where: str) -> Part:
    if not isinstance(given, dict):
        raise BadRequest(f"{where}: expected an object with a type: text, image_url or image")
    part = {name: value for name, value in given.items() if value is not None}  # a table has a cell for every field
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}.text: expected a text")
        _only(part, ("type", "text"), where)
        return TextPart(part["text"])
    if not isinstance(kind, str) or kind not in _IMAGE_FIELDS:
        raise BadRequest(f"{where}.type: expected text, image_url or image (found {kind!r:.60}); leave it out")
    fields = _IMAGE_FIELDS[kind]
    _only(part, ("type", *fields), where)
    places = [each for each in fields if each != "detail" and each in part]
    if len({str(part[each]) for each in places}) > 1:
        raise BadRequest(f"{where}.{places[1]}: another place of the image than {where}.{places[0]}; give one of them")
    name = places[0] if places else fields[0]
    value, detail = part.get(name), part.get("detail")
    inside = f"{where}.{name}"
    if isinstance(value, dict):
        value, detail, inside = _from_object(value, detail, inside)
    if isinstance(value, bytes):
        value = f"data:image/*;base64,{base64.b64encode(value).decode()}"
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(f"{inside}: expected a data URL, a path or an http(s) URL")
    if detail not in (None, "auto", "low", "high"):
        raise BadRequest(f"{where}.detail: expected auto, low or high")
    return ImagePart(value, detail)


def _from_object(value: dict[str, Any], detail: Any, where: str) -> tuple[Any, Any, str]:
    """OpenAI's `{url, detail}`, or the `{bytes, path}` of a data set's image feature."""
    given = {name: each for name, each in value.items() if each is not None}
    if "bytes" in given or "path" in given:
        _only(given, ("bytes", "path"), where)
        return given.get("bytes", given.get("path")), detail, where
    _only(given, ("url", "detail"), where)
    return given.get("url"), given.get("detail", detail), f"{where}.url"


def _only(given: dict[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise BadRequest(f"{where}.{name!s:.60}: unknown field; there are: {', '.join(known)}")
