"""An OpenAI-compatible endpoint without a model: answers come from the rules of a YAML script. For examples and tests.

`python -m runners.agent.scripted_endpoint --port N --script FILE`. The first rule whose `when` matches gives the reply:
`call` or `text`, with `finish_reason` if given. `{last}` is the latest tool result, `{task}` the first user message.
"""

from __future__ import annotations

import argparse
import http.server
import json
from pathlib import Path
from typing import Any

import yaml

MODEL = "scripted"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripted_endpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--script", type=Path, required=True)
    options = parser.parse_args()
    rules = yaml.safe_load(options.script.read_text(encoding="utf-8"))["replies"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", options.port), handler(rules)) as server:
        server.serve_forever()


def reply(rules: list[dict[str, Any]], messages: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The message that the rules give for a conversation, and its finish reason."""
    system = "\n".join(_text(each) for each in messages if each["role"] == "system")
    users = [_text(each) for each in messages if each["role"] == "user"]
    results = [_text(each) for each in messages if each["role"] == "tool"]
    values = {"{task}": users[0] if users else "", "{last}": results[-1] if results else ""}
    for rule in rules:
        when = rule.get("when") or {}
        fits = (
            when.get("system", "") in system
            and when.get("user", "") in "\n".join(users)
            and when.get("turn", len(results)) == len(results)
        )
        if not fits:
            continue
        if "call" in rule:
            arguments = {name: _filled(value, values) for name, value in (rule["call"].get("arguments") or {}).items()}
            function = {"name": rule["call"]["name"], "arguments": json.dumps(arguments)}
            call = {"id": f"call_{len(results)}", "type": "function", "function": function}
            message = {"role": "assistant", "content": rule.get("text") or "", "tool_calls": [call]}
            return message, rule.get("finish_reason") or "tool_calls"
        message = {"role": "assistant", "content": _filled(rule["text"], values)}
        return message, rule.get("finish_reason") or "stop"
    return {"role": "assistant", "content": "The script has no reply for this."}, "stop"


def handler(rules: list[dict[str, Any]]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "flowmesh"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            message, finish = reply(rules, request["messages"])
            words = sum(len(_text(each).split()) for each in request["messages"])
            answered = len(json.dumps(message).split())
            self._answer(
                {
                    "id": "scripted",
                    "object": "chat.completion",
                    "model": MODEL,
                    "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                    "usage": {"prompt_tokens": words, "completion_tokens": answered, "total_tokens": words + answered},
                }
            )

        def _answer(self, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _filled(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in values.items():
            value = value.replace(name, text)
    return value


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part.get("text") or "" for part in content)
    return content or ""


if __name__ == "__main__":
    main()
