"""One task's share of the batch, and its result. Each merged task has one part."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import msgspec

from runners.api import BadRequest
from runners.data.content import ImagePart
from runners.data.images import images_of
from runners.data.prompts import Items, Message, Prompt, to_json, with_system
from runners.inference.engine import Completion, Engine, Output, Request, Same
from runners.inference.export import Export
from runners.inference.identity import Identity
from runners.inference.options import Sampling
from runners.inference.reasoning import Splitter
from runners.inference.routing import adapter_of, ends_of
from runners.inference.tokens import Texts
from runners.models.adapters import LocalAdapter
from runners.models.limits import check_token_ids
from runners.models.sources import Source
from runners.rows.keys import key_of
from runners.rows.log import RowLog


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One task's items and options."""

    task_id: str | None
    """None: the parent, into which the others were merged."""
    folder: Path
    items: Items
    samplings: tuple[Sampling, ...]
    """Of each item."""
    system_prompt: str | None
    chat: bool
    parser: str | None = None
    """Of reasoning, which stands apart from the answers then."""
    export: Export | None
    requests: dict[int, Request] = {}
    """Set by `prepare`: by item, of those that are to be computed."""

    def one(self, index: int) -> tuple[Any, Prompt]:
        """An item's prompt as the result shows it, and as it goes to the tokenizer."""
        return self._asked(self.items.prompts[index])

    @property
    def shown(self) -> list[Any]:
        """Each prompt as the result shows it: with its system prompt, as text or as messages."""
        return [self._asked(prompt)[0] for prompt in self.items.prompts]

    @property
    def asked(self) -> list[Prompt]:
        """Each prompt as it goes to the tokenizer."""
        return [self._asked(prompt)[1] for prompt in self.items.prompts]

    @property
    def blank(self) -> frozenset[int]:
        """Items whose own prompt is empty or white space, such as an empty cell of a table. They get no answer."""
        return frozenset(i for i, prompt in enumerate(self.items.prompts) if _is_blank(prompt))

    def _asked(self, prompt: Prompt) -> tuple[Any, Prompt]:
        if self.chat and isinstance(prompt, str) and not self.items.system_last:
            return prompt, with_system((Message("user", prompt),), self.system_prompt)
        text = with_system(prompt, self.system_prompt, last=self.items.system_last)
        return to_json(text), (Message("user", text),) if self.chat and isinstance(text, str) else text

    def check_export(self, sampling: Sampling) -> None:
        """Raises BadRequest if the export needs what an answered item might not have."""
        if self.export is None:
            return
        logprobs: dict[str, Any] = {} if sampling.logprobs is None else {"logprobs": []}
        outputs = [{"output": "", "finish_reason": "stop", **logprobs} for _ in range(sampling.n)]
        more = {**logprobs, "outputs": outputs} if sampling.n > 1 else logprobs
        items = [_item(self, i, prompt, Output("", (), "stop", None), "") for i, prompt in enumerate(self.shown)]
        self.export.check([{**item, **more} for item in items])


def check_not_all_blank(part: Part) -> None:
    """Raises BadRequest where there is nothing to answer."""
    blank = part.blank
    if blank and len(blank) == len(part.items.prompts):
        raise BadRequest(f"{part.items.wheres[0]}: blank, and so are all other prompts; there is nothing to answer")


def row_keys(part: Part, identity: Identity) -> list[str]:
    """The key of each item's row.

    Raises:
        BadRequest: an item names no adapter.
    """
    shared = Same(lambda sampling: key_of(sampling, identity.model))
    keys = []
    for asked, sampling, metadata, where in zip(
        part.asked, part.samplings, part.items.metadata, part.items.wheres, strict=True
    ):
        route = adapter_of(identity.adapters, metadata, where)
        more = [] if part.parser is None else [part.parser]
        keys.append(key_of("inference", _keyed(asked), shared(sampling), route and identity.digests[route], *more))
    return keys


def prepare(
    part: Part, texts: Texts, engine: Engine, adapters: Sequence[LocalAdapter], done: Container[int] = ()
) -> Part:
    """The part with its requests.

    Args:
        done: items that have their answer already.

    Raises:
        BadRequest: a prompt does not fit the model or its chat template, or names no adapter; or all are blank.
    """
    check_not_all_blank(part)
    blank = part.blank
    kept = [i for i in range(len(part.items.prompts)) if i not in blank and i not in done]
    wheres = [part.items.wheres[i] for i in kept]
    asked = part.asked
    pictures = {i: texts.encode_images(asked[i], part.items.wheres[i]) for i in kept if images_of(asked[i])}
    plain = [i for i in kept if i not in pictures]
    ids = dict(zip(plain, texts.encode([asked[i] for i in plain], [part.items.wheres[i] for i in plain]), strict=True))
    encoded = [pictures[i].token_ids if i in pictures else ids[i] for i in kept]
    for token_ids, where in zip(encoded, wheres, strict=True):
        check_token_ids(token_ids, engine.vocabulary, texts.tokenizer, where)
        if engine.max_positions is not None and len(token_ids) >= engine.max_positions:
            raise BadRequest(
                f"{where}: the prompt has {len(token_ids)} tokens; the model takes {engine.max_positions} "
                "with the answer; shorten it"
            )
    requests = {}
    for i, token_ids, where in zip(kept, encoded, wheres, strict=True):
        route = adapter_of(adapters, part.items.metadata[i], where)
        requests[i] = Request(token_ids, part.samplings[i], route, ends_of(adapters, route), pictures.get(i))
    return msgspec.structs.replace(part, requests=requests)


def item_of(
    part: Part, index: int, completion: Completion, texts: Texts, split: Splitter | None = None
) -> dict[str, Any]:
    """An answered item's entry in the result (docs/tasks.md).

    Args:
        split: takes the reasoning out of the answers.
    """
    first = completion.outputs[0]
    shown, asked = part.one(index)
    item = _item(part, index, shown, first, _rendered(asked, texts, part.items.wheres[index]))
    item |= _thought(part.requests[index], first, split)
    if first.logprobs is not None:
        item["logprobs"] = _logprobs(first, texts)
    if len(completion.outputs) > 1:
        item["outputs"] = [
            _output(output, texts) | _thought(part.requests[index], output, split) for output in completion.outputs
        ]
    return item


def blank_item(part: Part, index: int) -> dict[str, Any]:
    """A blank prompt's entry, in the shape of an answered one."""
    sampling = part.samplings[index]
    logprobs: dict[str, Any] = {} if sampling.logprobs is None else {"logprobs": []}
    shown, asked = part.one(index)
    item = _item(part, index, shown, Output("", (), "blank"), asked if isinstance(asked, str) else "")
    item["warning"] = "the prompt is blank; it was not sent to the model"
    if sampling.n > 1:
        item["outputs"] = [{"output": "", "finish_reason": "blank", **logprobs} for _ in range(sampling.n)]
    return item | logprobs


def placed(part: Part, index: int, item: dict[str, Any]) -> dict[str, Any]:
    """The entry of an item that was answered earlier: the answer with this document's prompt and metadata."""
    before = item.get("metadata")
    rendered = before.get("rendered_prompt") if isinstance(before, dict) else ""
    own = _item(part, index, part.one(index)[0], Output("", (), "stop"), str(rendered or ""))
    return own | {name: value for name, value in item.items() if name not in ("index", "prompt", "metadata")}


def result_of(part: Part, log: RowLog, source: Source, latency_s: float) -> dict[str, Any]:
    """A part's result (docs/tasks.md), when all its rows stand."""
    blank = part.blank
    rows = log.rows.values()
    prompt_tokens = sum(row.prompt_tokens for row in rows)
    completion_tokens = sum(row.completion_tokens for row in rows)
    counts = log.counts
    return {
        "ok": True,
        "model": source.shown,
        "items": log.items(),
        **({"blank_prompts": len(blank)} if blank else {}),
        **({"rows": msgspec.to_builtins(counts)} if counts.reused else {}),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "num_requests": len(part.items.prompts) - len(blank),
            "latency_sec": round(latency_s, 6),
        },
    }


def completion_tokens(completion: Completion) -> int:
    """Of all its answers."""
    return sum(len(output.token_ids) for output in completion.outputs)


def _is_blank(prompt: Prompt) -> bool:
    if isinstance(prompt, str):
        return not prompt.strip()
    return not any(turn.has_content for turn in prompt if turn.role != "system")


def _keyed(prompt: Prompt) -> Any:
    """A prompt with its images by what they show, and not by their places."""
    if not images_of(prompt):
        return prompt
    return [
        (turn.templated(as_parts=True), [part.digest for part in turn.parts if isinstance(part, ImagePart)])
        for turn in prompt
        if isinstance(turn, Message)
    ]


def _rendered(prompt: Prompt, texts: Texts, where: str) -> str:
    """A prompt as the model got it: with its system prompt, and in the chat template."""
    return prompt if isinstance(prompt, str) else texts.render(prompt, where)


def _item(part: Part, index: int, shown: Any, output: Output, rendered: str) -> dict[str, Any]:
    """A result's item. Its metadata is the row's own, with the prompt as it was given and as it was rendered."""
    own = part.items.metadata[index] or {}
    prompts = {"prompt": to_json(part.items.prompts[index]), "rendered_prompt": rendered}
    return {
        "index": index,
        "prompt": shown,
        "output": output.text,
        **({} if part.parser is None else {"reasoning": None}),
        "finish_reason": output.finish_reason,
        "metadata": {**prompts, **own},
    }


def _thought(request: Request, output: Output, split: Splitter | None) -> dict[str, Any]:
    """The fields of an answer with its reasoning taken out; none where the task does not ask for it."""
    if split is None:
        return {}
    found = split(request.token_ids, output)
    return {"output": found.text, "reasoning": found.reasoning}


def _output(output: Output, texts: Texts) -> dict[str, Any]:
    shown: dict[str, Any] = {"output": output.text, "finish_reason": output.finish_reason}
    if output.logprobs is not None:
        shown["logprobs"] = _logprobs(output, texts)
    return shown


def _logprobs(output: Output, texts: Texts) -> list[dict[str, Any]]:
    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token_id": token_id, "token": texts.token(token_id), "logprob": logprob}

    return [
        {**shown(each.token_id, each.logprob), "top": [shown(*pair) for pair in each.top]}
        for each in output.logprobs or ()
    ]
