"""Reads the images that a document names, within what it may read, and with bounds that hold before one is decoded.

Every image is read twice: when the task's prompts are checked, and when they are encoded, so that neither files nor
pixels of all images are in memory at once. The digest of the first reading has to be that of the second.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from runners.api import BadRequest, Context, MissingDependency
from runners.data.content import ImagePart, is_data_url
from runners.data.download import fetch
from runners.data.prompts import Items, Message, Prompt
from runners.data.reading import Refused
from runners.models.sources import local_path

MAX_BYTES = 32 * 2**20
"""Of one image as it is stored."""
MAX_PIXELS = 50_000_000
MAX_SIDE = 32_768
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""As Pillow names them. It has others whose readers are seldom used, or start programs (EPS)."""
PHOTO_WITH_MORE = "MPO"
"""A JPEG with further pictures after it, such as a camera's preview or depth: what any viewer shows is the first."""
_DATA_URL = re.compile(r"data:(image/[\w.+*-]+)?(;[\w-]+=[\w.-]+)*;base64,", re.IGNORECASE)


class Images:
    """The images of one task.

    Args:
        ctx: of the task, whose document may read what its node allows.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._fetched: dict[str, Path] = {}

    def checked(self, part: ImagePart, where: str) -> ImagePart:
        """The part with its digest and size.

        Raises:
            BadRequest: it cannot be read, is no image, or is too large.
            RunnerError: its server cannot be reached.
        """
        data = self._read(part.url, where)
        with _opened(data, where) as image:
            width, height = image.size
        return msgspec.structs.replace(part, digest=hashlib.sha256(data).hexdigest(), width=width, height=height)

    def decoded(self, part: ImagePart, where: str) -> Any:
        """The image as both engines get it: in RGB, on white where it is transparent, turned as EXIF says.

        Args:
            part: as `checked` returned it.

        Raises:
            BadRequest: its data are damaged, or are others than when it was checked.
        """
        from PIL import ImageOps

        data = self._read(part.url, where)
        if hashlib.sha256(data).hexdigest() != part.digest:
            raise BadRequest(f"{where}: the image was changed while the task ran; send it again")
        with _opened(data, where) as image:
            try:
                return _in_rgb(ImageOps.exif_transpose(image))
            except Exception as error:  # each of Pillow's readers raises its own types
                raise BadRequest(f"{where}: the image's data are damaged: {_line(error)}") from error

    def _read(self, url: str, where: str) -> bytes:
        if is_data_url(url):
            return _from_data_url(url, where)
        scheme = urlsplit(url).scheme.lower() if "://" in url[:16] or url.startswith("file:") else ""
        if scheme in ("http", "https", "s3"):
            if url not in self._fetched:  # a downloaded file does not change before this process ends
                self._fetched[url] = fetch(self._ctx, url, where, by_date=False).path
            with self._fetched[url].open("rb") as file:
                return _bounded(file.read(MAX_BYTES + 1), where)
        if scheme == "file":
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise BadRequest(f"{where}: a file URL of another machine; give file:///path, or an http(s) URL")
            url = unquote(parts.path)
        elif scheme:
            raise BadRequest(f"{where}: {scheme!r:.20} is not read; give a data URL, a path, or an http(s) or s3 URL")
        return self._from_file(url, where)

    def _from_file(self, path: str, where: str) -> bytes:
        try:
            with self._ctx.reach.opened(local_path(self._ctx, path, where)) as name:
                if not name.is_file():
                    raise BadRequest(f"{where}: {path!r:.200} is no file")
                with name.open("rb") as file:
                    return _bounded(file.read(MAX_BYTES + 1), where)
        except Refused as error:
            raise BadRequest(f"{where}: {path!r:.200} {error}") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no path"
            raise BadRequest(f"{where}: {path!r:.200} cannot be read: {reason}") from None


def check_images(ctx: Context, items: Items) -> Items:
    """The rows with the digest and size of each of their images. Errors as for `Images.checked`."""
    if not any(map(images_of, items.prompts)):
        return items
    images = Images(ctx)
    prompts = [_checked(images, prompt, where) for prompt, where in zip(items.prompts, items.wheres, strict=True)]
    return msgspec.structs.replace(items, prompts=tuple(prompts))


def images_of(prompt: Prompt) -> list[ImagePart]:
    """A prompt's images, in their order."""
    if isinstance(prompt, str):
        return []
    return [part for message in prompt for part in message.parts if isinstance(part, ImagePart)]


def refuse_images(items: Items) -> None:
    """Raises BadRequest for a prompt with an image, where the task type takes texts only."""
    for prompt, where in zip(items.prompts, items.wheres, strict=True):
        if images_of(prompt):
            raise BadRequest(f"{where}: holds an image; only tasks of type inference take images")


def _checked(images: Images, prompt: Prompt, where: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    turns: list[Message] = []
    for turn, message in enumerate(prompt):
        if isinstance(message.content, str):
            turns.append(message)
            continue
        parts = tuple(
            images.checked(part, f"{where}[{turn}].content[{number}]") if isinstance(part, ImagePart) else part
            for number, part in enumerate(message.content)
        )
        turns.append(msgspec.structs.replace(message, content=parts))
    return tuple(turns)


def _from_data_url(url: str, where: str) -> bytes:
    found = _DATA_URL.match(url[:200])
    if found is None:
        raise BadRequest(f"{where}: expected a data URL of an image in base64, data:image/png;base64,…")
    if len(url) - found.end() > MAX_BYTES * 4 // 3 + 4:
        raise BadRequest(_too_many_bytes(where))
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{where}: what follows data:image/…;base64, is not base64") from None


def _bounded(data: bytes, where: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise BadRequest(_too_many_bytes(where))
    return data


def _too_many_bytes(where: str) -> str:
    return f"{where}: the image has more than {MAX_BYTES >> 20} MiB; send a smaller one"


def _opened(data: bytes, where: str) -> Any:
    """Pillow's image, whose header alone was read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("PIL", where) from error
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
    except Image.DecompressionBombError:
        raise BadRequest(_too_many_pixels(where)) from None
    except Exception:  # noqa: BLE001 - each of Pillow's readers raises its own types
        raise BadRequest(f"{where}: is no image of a format that is read here: {', '.join(FORMATS)}") from None
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or min(width, height) < 1:
        raise BadRequest(_too_many_pixels(where))
    if getattr(image, "is_animated", False) and image.format != PHOTO_WITH_MORE:
        raise BadRequest(f"{where}: an animation; send one of its frames as an image")
    return image


def _in_rgb(image: Any) -> Any:
    """In RGB, as a viewer shows it: Pillow cuts 16 bits off at 255, and shows what is hidden under transparency."""
    from PIL import Image

    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _too_many_pixels(where: str) -> str:
    return f"{where}: the image has more than {MAX_PIXELS // 10**6} million pixels; send a smaller one"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
