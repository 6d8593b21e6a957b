"""The prompts of a request: chat messages through the model's template, texts, and lists of token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from runners.api import BadRequest
from runners.data.content import ImagePart, read_content
from runners.data.images import Images
from runners.inference.engine import Pictures
from runners.inference.openai.bodies import ChatBody, CompletionBody
from runners.inference.openai.lines import LineFault
from runners.inference.tokens import NO_IMAGES, Texts
from runners.inference.vision import Vision

_PARTS = ("first part", "second part")


class Prompts:
    """Encodes the prompts of requests with a model's tokenizer."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._takes_parts: bool | None = None

    def chat(
        self, body: ChatBody, images: Sequence[ImagePart] = (), tools: Sequence[dict[str, Any]] = ()
    ) -> tuple[tuple[int, ...], Pictures | None]:
        """The tokens of a chat, and its images. Text is as the template gives it, so that only it decides about special
        tokens.

        Args:
            images: of its messages, as `body_images` returns them.
            tools: that the model may call.

        Raises:
            LineFault: a message has other parts than texts and images, or the template or the model refuses them.
        """
        import jinja2

        tokenizer = self._texts.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise LineFault("body.messages: the model's tokenizer has no chat template", param="messages")
        if body.continue_final_message and body.add_generation_prompt:
            raise LineFault(
                "body.continue_final_message: excludes add_generation_prompt", param="continue_final_message"
            )
        messages = [self._message(each, f"body.messages[{i}]") for i, each in enumerate(body.messages)]
        try:
            rendered = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
                continue_final_message=bool(body.continue_final_message),
                **({"tools": list(tools)} if tools else {}),
                **template_arguments(body),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            shown = " ".join(str(error).split())
            raise LineFault(f"body.messages: the chat template refuses them: {shown:.300}", param="messages") from None
        try:
            if images:
                if not isinstance(self._texts, Vision):
                    raise LineFault(f"body.messages: {NO_IMAGES}", param="messages")
                pictures = self._texts.pictured(str(rendered), images, "body.messages")
                return pictures.token_ids, pictures
            ids = tokenizer(str(rendered), add_special_tokens=bool(body.add_special_tokens))["input_ids"]
            if isinstance(self._texts, Vision):
                self._texts.check_text(ids, "body.messages")
        except BadRequest as error:
            raise LineFault(str(error), param="messages") from None
        return tuple(ids), None

    def completions(self, body: CompletionBody) -> list[tuple[int, ...]]:
        """The tokens of each of a completion's prompts.

        Raises:
            LineFault: there is none, or one is neither a text nor a list of token ids.
        """
        given: Any = body.prompt
        one = isinstance(given, str) or (bool(given) and all(_is_id(each) for each in given))
        prompts: Sequence[Any] = [given] if one else given
        if not prompts:
            raise LineFault("body.prompt: is empty", param="prompt")
        found = []
        for number, prompt in enumerate(prompts):
            where = "body.prompt" if one else f"body.prompt[{number}]"
            if isinstance(prompt, str) and prompt:
                special = body.add_special_tokens is not False
                ids = tuple(self._texts.tokenizer(prompt, add_special_tokens=special)["input_ids"])
            elif isinstance(prompt, list) and prompt and all(_is_id(each) for each in prompt):
                ids = tuple(prompt)
            else:
                raise LineFault(f"{where}: expected a text or a list of token ids, not empty", param="prompt")
            if not ids:
                raise LineFault(f"{where}: the tokenizer makes no token of it", param="prompt")
            if isinstance(self._texts, Vision):
                try:
                    self._texts.check_text(ids, where)
                except BadRequest as error:
                    raise LineFault(str(error), param="prompt") from None
            found.append(ids)
        return found

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        """A message as templates take it: its parts joined, unless the template reads parts by itself."""
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise LineFault(f"{where}.role: expected a text", param="messages")
        shown: dict[str, Any] = {"role": role, "content": content}
        if isinstance(content, list):
            for part, each in enumerate(content):
                kind = each.get("type") if isinstance(each, dict) else None
                if kind in ("image_url", "image"):
                    shown["content"] = []  # `body_images` has checked it
                elif kind != "text" or not isinstance(each.get("text"), str):
                    raise LineFault(
                        f"{where}.content[{part}]: only parts of type text and image_url are served", param="messages"
                    )
            if shown["content"] == [] and content:
                shown["content"] = [each if each["type"] == "text" else {"type": "image"} for each in content]
            elif role == "tool" or not self._reads_parts():
                shown["content"] = "\n".join(each["text"] for each in content)
        elif content is None:
            shown["content"] = ""
        elif isinstance(content, str) and isinstance(self._texts, Vision) and self._texts.reads_only_parts:
            shown["content"] = [{"type": "text", "text": content}]
        elif not isinstance(content, str):
            raise LineFault(f"{where}.content: expected a text or a list of parts", param="messages")
        if role == "assistant":
            thought = message.get("reasoning") or message.get("reasoning_content")
            if isinstance(thought, str):
                shown["reasoning"] = shown["reasoning_content"] = thought
            if calls := message.get("tool_calls"):
                shown["tool_calls"] = [_call(each, f"{where}.tool_calls[{n}]") for n, each in enumerate(calls)]
        for name in ("name", "tool_call_id"):
            if isinstance(message.get(name), str):
                shown[name] = message[name]
        return shown

    def _reads_parts(self) -> bool:
        """Whether the template writes the texts of a list of parts, and not the list."""
        if self._takes_parts is None:
            parts = [{"type": "text", "text": each} for each in _PARTS]
            try:
                shown = str(
                    self._texts.tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
                )
            except Exception:  # noqa: BLE001 - a template's own code, which was made for texts
                shown = ""
            self._takes_parts = all(each in shown for each in _PARTS) and "type" not in shown
        return self._takes_parts


def body_images(body: ChatBody, images: Images | None) -> list[ImagePart]:
    """The images of a chat's messages, read and checked.

    Args:
        images: None: the model takes none.

    Raises:
        LineFault: naming the part.
    """
    found: list[ImagePart] = []
    for turn, message in enumerate(body.messages):
        content, where = message.get("content"), f"body.messages[{turn}].content"
        if not isinstance(content, list) or not any(
            isinstance(each, dict) and each.get("type") in ("image_url", "image") for each in content
        ):
            continue
        if images is None:
            raise LineFault(f"{where}: {NO_IMAGES}", param="messages")
        try:
            for number, part in enumerate(read_content(content, where)):
                if isinstance(part, ImagePart):
                    found.append(images.checked(part, f"{where}[{number}]"))
        except BadRequest as error:
            raise LineFault(str(error), param="messages") from None
    return found


def template_arguments(body: ChatBody) -> dict[str, Any]:
    """What a request gives to the chat template, besides the messages.

    Raises:
        LineFault: it names what is not the template's.
    """
    given = dict(body.chat_template_kwargs or {})
    for name in ("tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "conversation",
                 "return_dict", "return_tensors", "tools", "documents", "tokenizer_kwargs"):  # fmt: skip
        if name in given:
            raise LineFault(f"body.chat_template_kwargs.{name}: not the template's", param="chat_template_kwargs")
    if body.reasoning_effort is not None:
        given.setdefault("reasoning_effort", body.reasoning_effort)
        given.setdefault("enable_thinking", body.reasoning_effort != "none")
    return given


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _call(call: Any, where: str) -> dict[str, Any]:
    """An earlier call of a tool, with its arguments as a mapping, which templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise LineFault(f"{where}.function: expected an object", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = {}
    return {**call, "function": {**function, "arguments": arguments if isinstance(arguments, dict) else {}}}
