"""Lines of batch files, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def chat(custom_id: str, text: str = "a task starts", **body: Any) -> Line:
    """A greedy chat of 8 tokens; None leaves a field out."""
    fields = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **body}
    return _line(custom_id, "/v1/chat/completions", fields)


def completion(custom_id: str, prompt: Any = "a task starts", **body: Any) -> Line:
    """A greedy completion of 8 tokens."""
    return _line(custom_id, "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8, **body})


def embedding(custom_id: str, given: Any = "a task starts", **body: Any) -> Line:
    """A request for the vectors of a text, of token ids, or of several."""
    return _line(custom_id, "/v1/embeddings", {"input": given, **body})


def _line(custom_id: str, url: str, body: dict[str, Any]) -> Line:
    kept = {name: value for name, value in body.items() if value is not None}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": kept}


def write(path: Path, *lines: Line | str) -> Path:
    """Write a batch file; a text is a line as it is."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spec_of(model: Path | str, file: Path, engine: str = "transformers", **fields: Any) -> dict[str, Any]:
    """A float32 task on the CPU."""
    options = {"transformers": {"dtype": "float32"}, "vllm": {"dtype": "float32"}}
    if engine != "vllm":
        options.pop("vllm")
    data = {"type": "openai_batch", "path": str(file)}
    return {"model": {"source": {"identifier": str(model)}, **options}, "data": data, "engine": engine, **fields}


def without_ids(value: Any) -> Any:
    """A line or a part of it without its ids and times."""
    aside = ("id", "request_id", "created", "system_fingerprint")
    if isinstance(value, dict):
        return {name: without_ids(each) for name, each in value.items() if name not in aside}
    return [without_ids(each) for each in value] if isinstance(value, list) else value
