"""Summarizes a task's result in a few lines. The complete result is in responses.json."""

from __future__ import annotations

from typing import Any

from flowmesh.cli.render import count, seconds, shorten

SHOWN_ITEMS = 5
SHOWN_FIELDS = 12
SHOWN_BEST = 3
_LABEL = 10


def summary(result: dict[str, Any], width: int) -> list[str]:
    """The lines of `result`, none longer than `width`, except for the paths of a batch file's answers."""
    items, queries = result.get("items"), result.get("queries")
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        if isinstance(result.get("vectors_file"), dict):
            lines = _headline(result, len(items)) + _vectors(result)
        elif items and all(isinstance(item.get("results"), list) for item in items):
            lines = _headline(result, len(items)) + _ranked(items, width)
        else:
            lines = _headline(result, len(items)) + _items(items, width)
        children = result.get("children")
        if isinstance(children, dict) and children:
            lines.append(f"separate result folders for {count(len(children), 'merged task')}")
        export = result.get("jsonl_export")
        if isinstance(export, dict) and "path" in export:
            lines.append(f"exported {export.get('record_count', '?')} records to {export['path']}")
    elif isinstance(result.get("request_counts"), dict):
        return _batch(result, width)
    elif isinstance(queries, list) and all(isinstance(query, dict) for query in queries):
        lines = _queries(queries, width)
    else:
        lines = _fields(result, width)
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _batch(result: dict[str, Any], width: int) -> list[str]:
    """The lines for a batch file."""
    counts = result["request_counts"]
    parts = [f"{counts.get('completed', '?')} of {count(counts.get('total', 0), 'request')} answered"]
    lines = [", ".join([*parts, *_headline(result, 0)[0].split(", ")[1:]])]
    for field, label in (("output_file", "output"), ("error_file", "errors")):
        if isinstance(file := result.get(field), dict) and "path" in file:
            lines.append(f"{label}: {file['path']} ({count(file.get('record_count', 0), 'line')})")
    errors = result.get("first_errors")
    return lines + [f"  {shorten(error, max(20, width - 2))}" for error in (errors if isinstance(errors, list) else [])]


def _headline(result: dict[str, Any], number: int) -> list[str]:
    parts = [count(number, "item")]
    usage = result.get("usage")
    if isinstance(usage, dict):
        if isinstance(usage.get("prompt_tokens"), int) and isinstance(usage.get("completion_tokens"), int):
            parts.append(f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens (prompt + output)")
        took = usage.get("latency_sec", usage.get("execution_time_sec"))
        if isinstance(took, int | float):
            parts.append(seconds(took))
    model = result.get("model")
    return [", ".join(parts) + (f", {shorten(model, 60)}" if isinstance(model, str) else "")]


def _items(items: list[dict[str, Any]], width: int) -> list[str]:
    lines = []
    room = max(20, width - _LABEL - 8)
    for position, item in enumerate(items[:SHOWN_ITEMS]):
        label = f"[{item.get('index', position)}]"
        if "prompt" in item:
            lines.append(f"  {label:<5} prompt  {shorten(_prompt(item['prompt']), room)}")
            label = ""
        elif "input" in item:
            lines.append(f"  {label:<5} input   {shorten(item['input'], room)}")
            label = ""
        lines += _answer(item, label, room)
    if len(items) > SHOWN_ITEMS:
        lines.append(f"  … and {len(items) - SHOWN_ITEMS} more")
    return lines


def _answer(item: dict[str, Any], label: str, room: int) -> list[str]:
    """The lines for what an item got, also where that is an error beside some text."""
    vector, error = item.get("embedding"), item.get("error")
    message = error.get("message", error) if isinstance(error, dict) else error
    reason = item.get("incomplete") or item.get("finish_reason")
    tail = f" ({reason})" if isinstance(reason, str) and reason != "stop" else ""
    lines = []
    if isinstance(vector, list):
        lines.append(f"  {label:<5} vector  {len(vector)} numbers")
    elif item.get("output") or not error:
        lines.append(f"  {label:<5} output  {shorten(item.get('output'), room - len(tail))}{tail}")
    if error:
        lines.append(f"  {'' if lines else label:<5} error   {shorten(message, room)}")
    return lines


def _vectors(result: dict[str, Any]) -> list[str]:
    """The lines for an embedding task."""
    file = result["vectors_file"]
    kind = f"{result.get('precision', '?')}, {result.get('dimension', '?')} dimensions"
    lines = [f"vectors: {file.get('relative_path', file.get('path'))} ({kind})"]
    cut = result.get("truncated")
    if isinstance(cut, dict) and isinstance(cut.get("count"), int):
        lines.append(f"cut at the model's length: {count(cut['count'], 'item')}")
    return lines


def _ranked(items: list[dict[str, Any]], width: int) -> list[str]:
    """The best documents of each query of a scoring task."""
    lines = []
    room = max(20, width - _LABEL - 8)
    for position, item in enumerate(items[:SHOWN_ITEMS]):
        label = f"[{item.get('index', position)}]"
        lines.append(f"  {label:<5} query   {shorten(item.get('query'), room)}")
        for found in item["results"][: SHOWN_BEST if len(items) == 1 else 1]:
            if isinstance(found, dict) and isinstance(score := found.get("score"), int | float):
                text = shorten(found.get("document", found.get("index")), room)
                lines.append(f"        {score:<7.3f} {text}")
    if len(items) > SHOWN_ITEMS:
        lines.append(f"  … and {len(items) - SHOWN_ITEMS} more")
    return lines


def _prompt(prompt: Any) -> Any:
    """The prompt; of a chat its last message, with a mark for each image."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return " ".join(part["text"] if isinstance(part.get("text"), str) else "[image]" for part in content)
    return content if isinstance(content, str) else prompt


def _queries(queries: list[dict[str, Any]], width: int) -> list[str]:
    lines = [f"{len(queries)} queries" if len(queries) != 1 else "1 query"]
    room = max(20, width - _LABEL - 8)
    for position, query in enumerate(queries[:SHOWN_ITEMS]):
        found = query.get("items")
        lines.append(f"  [{query.get('index', position)}]   query   {shorten(query.get('query'), room)}")
        best = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else None
        if best is not None and isinstance(found, list):
            lines.append(f"        best    {shorten(best.get('payload', best.get('id')), room - 12)} of {len(found)}")
        else:
            lines.append("        best    nothing found")
        if "output" in query:
            lines += _answer(query, "", room)
    if len(queries) > SHOWN_ITEMS:
        lines.append(f"  … and {len(queries) - SHOWN_ITEMS} more")
    return lines


def _fields(result: dict[str, Any], width: int) -> list[str]:
    shown = [
        (name, value)
        for name, value in result.items()
        if name not in ("ok", "warnings") and value not in (None, "", [], {})
    ]
    size = max((len(name) for name, _ in shown[:SHOWN_FIELDS]), default=0)
    lines = [
        f"  {shorten(name, 32):<{min(size, 32)}}  {shorten(value, max(20, width - min(size, 32) - 4))}"
        for name, value in shown[:SHOWN_FIELDS]
    ]
    if len(shown) > SHOWN_FIELDS:
        lines.append(f"  … and {len(shown) - SHOWN_FIELDS} more fields")
    return lines or ["  (no fields)"]
