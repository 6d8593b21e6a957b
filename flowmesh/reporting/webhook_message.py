"""The text of a notification: for a person in a chat, and as data for a program. Bounded, whatever a task wrote."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh.messages.text import encode_json, escaped
from flowmesh.tasks.advice import advice

if TYPE_CHECKING:
    from flowmesh.tasks.history import Found  # reads SQLite files, which the sending child does not

MAX_BYTES = 16 * 1024
TEXT_CHARS = 500
LOG_LINES, LOG_CHARS = 5, 200
_MENTION = re.compile(r"@(?=(?:all|channel|here|everyone)\b)", re.IGNORECASE)
_SLACK = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a request."""

    type: str
    """Such as `task.failed`."""
    timestamp: str
    """When it happened, ISO 8601, UTC."""
    title: str
    text: str
    """Title and all that a person needs to know, in lines."""
    data: dict[str, Any]


def encoded(
    kind: str,
    title: str,
    lines: Sequence[str],
    data: Mapping[str, Any],
    *,
    at: str | None = None,
    log: Sequence[str] = (),
) -> bytes:
    """A notification as JSON.

    Args:
        kind: its type.
        lines: what follows the title; empty ones are left out.
        at: when it happened; None: now.
        log: the last lines of a task's log; left out where there is no room for them.
    """
    title = _plain(title)[:TEXT_CHARS]
    timestamp = at or datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    for tail in (log, ()):
        shown = [_plain(line) for line in lines if line]
        shown += [_plain(line)[:LOG_CHARS] for line in tail]
        text = "\n".join([title, *shown])
        more = {"log_tail": list(tail)} if tail else {}
        message = Message(type=kind, timestamp=timestamp, title=title, text=text, data={**data, **more})
        body = encode_json(msgspec.to_builtins(message))
        if len(body) <= MAX_BYTES:
            return body
    text = text.encode()[: MAX_BYTES // 4].decode(errors="ignore")
    short = {
        "cut": True,
        **{name: data[name] for name in ("task_id", "worker_id", "node_id", "verdict") if name in data},
    }
    return encode_json({"type": kind, "timestamp": timestamp, "title": title, "text": text, "data": short})


def of_task(found: Found, node: Mapping[str, Any]) -> tuple[str, bytes]:
    """The notification of a task's end, from what the history keeps of it, in which secrets are hidden.

    Args:
        node: `node_id` and `host`.

    Returns:
        its kind, as `notify.events` has it, and the message.
    """
    entry, detail = found.entry, found.detail
    kind = "succeeded" if entry.ok else "failed"
    what = advice(entry.verdict)
    log = [line[:LOG_CHARS] for line in detail.log_tail[-LOG_LINES:]]
    name = f" ({entry.name})" if entry.name else ""
    data = {
        "task_id": entry.task_id,
        "name": entry.name or None,
        "owner": entry.owner or None,
        "type": entry.type or None,
        "worker_id": entry.worker_id,
        **node,
        "attempt": entry.attempt,
        "verdict": entry.verdict,
        "message": entry.message[:TEXT_CHARS] or None,
        "evidence": detail.evidence[:TEXT_CHARS] or None,
        "retryable": detail.retryable,
        "what_to_do": what or None,
        "received_at": entry.received_at,
        "started_at": entry.started_at,
        "finished_at": entry.finished_at,
        "runtime_s": entry.wall_s,
        "gpus": list(detail.gpus)[:16],
        "tokens": entry.tokens,
        "joules": entry.joules,
        "out_dir": entry.out_dir[:TEXT_CHARS] or None,
        "urls": [url for url in detail.urls[:3] if len(url) <= TEXT_CHARS],
    }
    title = f"Task {entry.task_id}{name} {kind}" + ("" if entry.ok else f": {entry.verdict}")
    ran = f"ran {entry.wall_s:.1f} s" if entry.started_at else "had not started"
    lines = [
        entry.message[:TEXT_CHARS],
        f"{entry.type or 'unknown type'}, {ran}, on {entry.worker_id} ({node['host']})",
        f"Evidence: {detail.evidence[:TEXT_CHARS]}" if detail.evidence and not entry.ok else "",
        f"What to do: {what}" if what else "",
        f"More: flowmesh show {entry.task_id}",
    ]
    return kind, encoded(f"task.{kind}", title, lines, data, at=entry.finished_at, log=log)


def of_slot(worker_id: str, reason: str, node: Mapping[str, Any], *, fault: str) -> tuple[str, bytes]:
    """The notification of a slot that takes no tasks any more, or again.

    Args:
        reason: why it takes none; empty: it takes tasks again.
        fault: the reason that it had before.
    """
    data = {"worker_id": worker_id, **node, "reason": (reason or fault)[:TEXT_CHARS]}
    if reason:
        lines = [reason[:TEXT_CHARS], "What to do: remove the cause; the node then takes tasks again by itself."]
        return "slot_closed", encoded("slot.closed", f"Worker {worker_id} ({node['host']}) takes no tasks", lines, data)
    lines = [f"It was: {fault[:TEXT_CHARS]}" if fault else ""]
    return "slot_opened", encoded("slot.opened", f"Worker {worker_id} ({node['host']}) takes tasks again", lines, data)


def of_node(
    workers: Sequence[str], tasks: Sequence[str], last_seen: str, observer: Mapping[str, Any], *, down: bool
) -> bytes:
    """The notification of another node that is down, or back.

    Args:
        workers: its worker ids.
        tasks: what they ran last.
        last_seen: its last heartbeat.
        observer: `node_id` and `host` of the node that tells.
    """
    shown = ", ".join(workers[:8]) + (f" and {len(workers) - 8} more" if len(workers) > 8 else "")
    data = {"workers": list(workers[:64]), "tasks": list(tasks[:64]), "last_seen": last_seen, "seen_by": dict(observer)}
    if not down:
        return encoded("node.up", f"Node of {shown} is back", [f"Seen by {observer['host']}"], data)
    lines = [
        f"Its last heartbeat was at {last_seen}." if last_seen else "",
        f"It ran {', '.join(tasks[:8])}." if tasks else "It ran no task.",
        f"Seen by {observer['host']}.",
        "What to do: look whether the machine and its network are up, then at the node's log.",
    ]
    return encoded("node.down", f"Node of {shown} is down", lines, data)


def of_test(node: Mapping[str, Any]) -> bytes:
    """What `flowmesh notify --test` sends."""
    lines = ["Sent by `flowmesh notify --test`: this receiver gets the notifications of this node."]
    return encoded("test", f"Test from {node['host']}", lines, dict(node))


def rendered(body: bytes, form: str) -> bytes:
    """The body as it is sent.

    Args:
        form: `notify.format`.
    """
    if form != "slack":
        return body
    text: str = msgspec.json.decode(body)["text"]
    first, _, rest = text.translate(_SLACK).partition("\n")
    return encode_json({"text": f"*{first}*\n{rest}" if rest else f"*{first}*"})


def _plain(text: str) -> str:
    """One line without control characters that alerts nobody by itself."""
    return _MENTION.sub("@\u200b", " ".join(escaped(text).split()))
