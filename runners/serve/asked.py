"""What a request to a model on Transformers asks for: the fields of batch files, and those that only a server has."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from flowmesh.validation.convert import FieldError, convert
from runners.api import BadRequest, Context
from runners.data.content import ImagePart, is_data_url
from runners.data.images import Images
from runners.data.openai_batch import Endpoint
from runners.inference.openai.bodies import Body, ChatBody, CompletionBody, Defaults, read_body, sampling
from runners.inference.openai.lines import Line, LineFault
from runners.inference.openai.prompts import body_images
from runners.inference.openai.requests import Asked
from runners.models.spec import Section

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
URLS: dict[str, Endpoint] = {CHAT: "/v1/chat/completions", COMPLETION: "/v1/completions"}
IMAGE_BYTES = 32 * 2**20
"""Of all images of a request, which are kept in memory until it is answered."""


class ServedChat(ChatBody, frozen=True, kw_only=True):
    """Of /v1/chat/completions."""

    tools: tuple[dict[str, Any], ...] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class StreamOptions(Section, frozen=True):
    """stream_options"""

    include_usage: bool = False


class OfServer(Section, frozen=True):
    """Fields that a batch file's lines do not have."""

    stream: bool = False
    stream_options: StreamOptions | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request."""

    asked: Asked
    stream: bool
    usage: bool
    """Whether the stream ends with the number of tokens."""

    @property
    def chat(self) -> ChatBody | None:
        """Its body, if it is one of a chat."""
        return self.asked.body if isinstance(self.asked.body, ChatBody) else None

    @property
    def one_call(self) -> bool:
        """Whether the model may call one tool at a time."""
        return isinstance(self.asked.body, ServedChat) and self.asked.body.parallel_tool_calls is False


class ClientImages(Images):
    """The images of one request, as data URLs: what is read now is what the model gets.

    Unlike a task's document, a client names no file of the node and no object of its stores.
    """

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx)
        self._left = IMAGE_BYTES

    def checked(self, part: ImagePart, where: str) -> ImagePart:
        """As `Images.checked`."""
        if not is_data_url(part.url) and part.url.partition("://")[0].lower() not in ("http", "https"):
            raise BadRequest(f"{where}: {part.url!r:.80} is not read for a client; send a data: or an http(s) URL")
        data = self._read(part.url, where)
        self._left -= len(data)
        if self._left < 0:
            raise BadRequest(f"{where}: the request's images have more than {IMAGE_BYTES >> 20} MiB; send fewer")
        checked = super().checked(part, where)
        if is_data_url(part.url):
            return checked
        return msgspec.structs.replace(checked, url=f"data:image/*;base64,{base64.b64encode(data).decode()}")


class AskReader:
    """Reads requests.

    Args:
        names: of the model and its runtime adapters; the first is the model's, if it is served without an adapter.
        adapters: those of them that are adapters.
        defaults: for fields that requests leave out.
        takes_images: whether the model does.
        calls_tools: whether it is known how the model writes calls of tools.
    """

    def __init__(
        self,
        ctx: Context,
        names: Sequence[str],
        adapters: Collection[str],
        defaults: Defaults,
        *,
        takes_images: bool,
        calls_tools: bool,
    ) -> None:
        self._ctx = ctx
        self._names = names
        self._adapters = adapters
        self._defaults = defaults
        self._takes_images = takes_images
        self._calls_tools = calls_tools

    def read(self, path: str, given: dict[str, Any]) -> Ask:
        """A request's body, checked as far as it can be without the model. Downloads its images.

        Raises:
            LineFault: it cannot be served.
            RunnerError: an image's server cannot be reached.
        """
        of_server = _of_server(given)
        rest = {name: value for name, value in given.items() if name not in OfServer.__struct_fields__}
        body: Body = read_body(rest, ServedChat if path == CHAT else CompletionBody)
        model = body.model or self._names[0]
        adapter = model if model in self._adapters else None
        wanted = sampling(body, self._defaults)
        if wanted.seed is None:  # a batch that is generated again has to give the same answers
            wanted = msgspec.structs.replace(wanted, seed=secrets.randbits(62))
        images: tuple[ImagePart, ...] = ()
        tools: tuple[dict[str, Any], ...] = ()
        if isinstance(body, ServedChat):
            tools = self._tools(body)
            images = tuple(body_images(body, ClientImages(self._ctx) if self._takes_images else None))
        line = Line(custom_id="", url=URLS[path], body={})
        asked = Asked(
            line=line, body=body, sampling=wanted, adapter=adapter, model=model, key="", images=images, tools=tools
        )
        usage = of_server.stream_options is not None and of_server.stream_options.include_usage
        return Ask(asked=asked, stream=of_server.stream, usage=usage)

    def _tools(self, body: ServedChat) -> tuple[dict[str, Any], ...]:
        """The tools that the model may call."""
        if not body.tools:
            if body.tool_choice not in (None, "none", "auto"):
                raise LineFault("body.tool_choice: goes with tools", param="tool_choice")
            return ()
        for number, tool in enumerate(body.tools):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
                raise LineFault(f"body.tools[{number}]: expected type function and a function's name", param="tools")
        if body.tool_choice == "none":
            return ()
        if body.tool_choice not in (None, "auto"):
            raise LineFault(
                "body.tool_choice: calls cannot be enforced on Transformers; set it to 'auto' or 'none'",
                param="tool_choice",
            )
        if not self._calls_tools:
            raise LineFault(
                "body.tools: it is not known how this model writes calls of tools (its tokenizer has no "
                "response_template); leave them out, or serve it on vLLM with serve.tool_call_parser",
                param="tools",
            )
        return body.tools


def names_images(given: dict[str, Any]) -> bool:
    """Whether a body may name images, so that reading it takes its time."""
    messages = given.get("messages")
    contents = (
        [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(each, dict) and each.get("type") != "text" for each in parts)


def _of_server(given: dict[str, Any]) -> OfServer:
    found = {name: given[name] for name in OfServer.__struct_fields__ if given.get(name) is not None}
    try:
        read: OfServer = convert(found, OfServer, where="body")
    except FieldError as error:
        raise LineFault(str(error), param=error.path.removeprefix("body.")) from None
    if read.stream_options is not None and not read.stream:
        raise LineFault("body.stream_options: goes with `stream: true`", param="stream_options")
    return read
