"""The api runner: items in, answers of an OpenAI-compatible endpoint out. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from flowmesh.messages.rows import Row
from runners.agent.watch import Watch
from runners.api import BadRequest, Context, MissingDependency, Runner, RunnerError
from runners.data.prompts import Items, to_json
from runners.data.sources import load_items
from runners.remote.task import SCRIPTED, Api, check_address, key_of_endpoint, read_api
from runners.rows.keys import key_of
from runners.rows.log import RowLog, report_rows
from runners.rows.opening import open_rows
from runners.served_model import served_model

ERRORS = "artifacts/errors.jsonl"
SHOWN_ERRORS = 5
CLOSE_S = 2.0


class ApiRunner(Runner):
    """Task type `api`."""

    def run(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("prepare")
        api = read_api(ctx, ctx.spec)
        for library in ("openai", "httpx2"):
            if importlib.util.find_spec(library) is None:
                raise MissingDependency(library, extra="api")
        from runners.agent.secrets import task_redactor

        redact = task_redactor()
        try:
            return self._run(ctx, api, redact)
        except RunnerError as error:
            made = type(error)(redact(str(error)))
            made.fault = error.fault
            raise made from None  # the cause may show a key

    def _run(self, ctx: Context, api: Api, redact: Any) -> dict[str, Any]:
        from runners.agent.event_loop import EventLoop
        from runners.remote.batch import Batch
        from runners.remote.client import Client

        items = load_items(ctx, ctx.spec)
        texts = [prompt if isinstance(prompt, str) else None for prompt in items.prompts]
        blank = frozenset(i for i, text in enumerate(texts) if text is not None and not text.strip())
        if len(blank) == len(items.prompts):
            raise BadRequest(
                f"{(*items.wheres, 'spec.data')[0]}: blank, and so are all others; there is nothing to send"
            )
        if api.kind != "chat":
            for text, where in zip(texts, items.wheres, strict=True):
                if text is None:
                    raise BadRequest(f"{where}: chat messages go with endpoint 'chat'; give one text")
        with contextlib.ExitStack() as stack:
            base_url, key, model = _endpoint(ctx, api, stack)
            loop = EventLoop()
            stack.callback(loop.close)
            client = Client(api, base_url, key, redact)
            watch = _Watch(ctx)
            model = model or loop.wait(client.find_model(), watch)
            bodies = {
                index: body_of(api, model, items, index) for index in range(len(items.prompts)) if index not in blank
            }
            log = self._open(ctx, api, items, bodies)
            stack.enter_context(log)
            stack.callback(report_rows, ctx, [log])
            stack.callback(_close, loop, client)  # before the log, which the loop writes
            for index in sorted(blank - log.rows.keys()):
                log.add(index, {**entry_of(api, items, index), "finish_reason": "blank"})
            watch.log = log
            batch = Batch(api, client, log, lambda index: entry_of(api, items, index))
            ctx.phase("ask")
            since = time.monotonic()
            try:
                loop.wait(batch.run({i: body for i, body in bodies.items() if i not in log.rows}), watch)
            finally:
                ctx.spent_usd = batch.spent_usd
            ctx.phase("save")
            return self._result(ctx, api, model, log, batch, client, time.monotonic() - since)

    @staticmethod
    def _open(ctx: Context, api: Api, items: Items, bodies: dict[int, dict[str, Any]]) -> RowLog:
        keys = [
            key_of("api", api.kind, bodies[index]) if index in bodies else key_of("api", "blank")
            for index in range(len(items.prompts))
        ]

        def place(index: int, row: Row) -> dict[str, Any]:
            own = ("index", "prompt", "metadata")
            return entry_of(api, items, index) | {name: value for name, value in row.item.items() if name not in own}

        return open_rows(ctx, ctx.spec, "spec", ctx.out_dir, keys, place, task_id=ctx.task_id)

    @staticmethod
    def _result(  # noqa: PLR0917
        ctx: Context, api: Api, model: str, log: RowLog, batch: Any, client: Any, latency_s: float
    ) -> dict[str, Any]:
        items, counts = log.items(), log.counts
        failed = [item for item in items if "error" in item]
        incomplete = [item for item in items if "incomplete" in item]
        completed = len(items) - len(failed) - len(incomplete)
        result: dict[str, Any] = {
            "ok": True,
            "model": model,
            "endpoint": {"base_url": api.shown, "kind": api.kind},
            "items": items,
            "request_counts": {
                "total": counts.total, "completed": completed, "incomplete": len(incomplete), "failed": len(failed),
            },
        }  # fmt: skip
        bad = [*failed, *incomplete]
        if bad:
            result["error_file"] = write_errors(ctx, bad)
            result["first_errors"] = [_said(item) for item in bad[:SHOWN_ERRORS]]
            if not completed:
                raise RunnerError(f"no item has a whole answer; the first: {result['first_errors'][0]}")
            ctx.log.warning(
                "%d of %d items have no whole answer: %s", len(bad), counts.total, result["first_errors"][0]
            )
        _warn(ctx, model, items)
        usages = [item.get("usage") or {} for item in items]
        prompt, answered, cached = (
            sum(usage.get(name, 0) for usage in usages)
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
        )
        if api.prices is not None:
            unknown = sum("error" not in item and "usage" not in item and _was_sent(item) for item in items)
            result["api_cost"] = {
                "usd": round(sum(item.get("cost_usd") or 0.0 for item in items), 9),
                "spent_usd": round(batch.spent_usd, 9),
                **({"items_without_usage": unknown} if unknown else {}),
            }
        return {
            **result,
            **({"rows": msgspec.to_builtins(counts)} if counts.reused else {}),
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered,
                "cached_tokens": cached, "num_requests": client.attempts, "latency_sec": round(latency_s, 6),
            },
        }  # fmt: skip


def _warn(ctx: Context, model: str, items: list[dict[str, Any]]) -> None:
    """Warn of answers that may not be what was asked for: of another model, or vectors of several lengths."""
    others = Counter(repr(name) for item in items if not _same_model(name := item.get("model", model), model))
    lengths = Counter(len(item["embedding"]) for item in items if "embedding" in item)
    if others:
        ctx.log.warning("the endpoint answered with another model than %r: %s", model, _listed(others, len(items)))
    if len(lengths) > 1:
        listed = _listed(lengths, len(items))
        ctx.log.warning("the vectors differ in length, so they are not of one model: %s", listed)


def _listed(counts: Counter[Any], total: int) -> str:
    return ", ".join(f"{each} ({count} of {total} items)" for each, count in counts.most_common(SHOWN_ERRORS))


def _same_model(name: str, asked: str) -> bool:
    """Whether a name may be another form of the one asked for: with a date, a provider or a folder."""
    short = [each.lower().rpartition("/")[2] for each in (name, asked)]
    return short[0] in short[1] or short[1] in short[0]


def _endpoint(ctx: Context, api: Api, stack: contextlib.ExitStack) -> tuple[str, str | None, str | None]:
    """The address, the key, and the model's name; None: there is no key, and the endpoint's first model.

    Raises:
        BadRequest: the operator does not allow one of them, or the key is not set.
    """
    served = served_model(ctx, api.base_url, "spec.api.base_url")
    if served is not None:
        return served.base_url, served.api_key, api.model or served.model
    if api.base_url == SCRIPTED:
        return stack.enter_context(scripted()), key_of_endpoint(ctx, api), api.model
    check_address(ctx, api)
    return api.base_url, key_of_endpoint(ctx, api), api.model


def _close(loop: Any, client: Any) -> None:
    """End all requests, then close the connections and the loop."""
    with contextlib.suppress(TimeoutError):
        loop.submit(client.close()).result(CLOSE_S)
    loop.close()


class _Watch(Watch):
    """Reports progress while the event loop works, and checks for cancellation."""

    def __init__(self, ctx: Context) -> None:
        super().__init__(ctx, None)
        self.log: RowLog | None = None

    def check(self) -> None:
        if self.log is None:
            self._ctx.check_cancelled()
        else:
            counts = self.log.counts
            self._ctx.progress(counts.done, counts.total, "items")


def entry_of(api: Api, items: Items, index: int) -> dict[str, Any]:
    """An item's fields beside its answer."""
    metadata = items.metadata[index]
    name = "input" if api.kind == "embeddings" else "prompt"
    return {
        "index": index, name: to_json(items.prompts[index]), **({} if metadata is None else {"metadata": metadata}),
    }  # fmt: skip


def body_of(api: Api, model: str, items: Items, index: int) -> dict[str, Any]:
    """An item's request."""
    prompt, more = items.prompts[index], api.body or {}
    match api.kind:
        case "completions":
            return {"model": model, "prompt": prompt, **more}
        case "embeddings":
            return {"model": model, "input": prompt, "encoding_format": "float", **more}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [
        msgspec.to_builtins(each) for each in prompt  # also what an earlier turn thought, under the name it has
    ]  # fmt: skip
    if api.system_prompt is not None:
        turns = [{"role": "system", "content": api.system_prompt}, *turns]
    return {"model": model, "messages": turns, **more}


def write_errors(ctx: Context, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `errors.jsonl`: the items without a whole answer."""
    target = ctx.out_dir / ERRORS
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.partial")
    scratch.write_bytes(b"".join(msgspec.json.encode(item, enc_hook=str) + b"\n" for item in items))
    scratch.rename(target)
    ctx.upload(ERRORS, "error_file")
    return {"path": str(target), "worker_path": str(target), "relative_path": ERRORS, "record_count": len(items)}


@contextlib.contextmanager
def scripted() -> Iterator[str]:
    """An endpoint without a model, on a free port of 127.0.0.1; yields its address."""
    import http.server
    import threading

    from runners.agent.scripted_endpoint import handler

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler([{"text": "You asked: {task}"}])) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def _said(item: dict[str, Any]) -> str:
    text = item["error"]["message"] if "error" in item else f"{item['incomplete']}: the answer is not whole"
    return f"item {item['index']}: {text}"


def _was_sent(item: dict[str, Any]) -> bool:
    return item.get("finish_reason") != "blank"
