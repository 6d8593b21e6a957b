"""Transformers' server behind the gate, asked by the openai client."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from runners.serve.gate import Gate, ServedModel  # noqa: E402
from runners.serve.transformers_app import PINNED, build  # noqa: E402


def test_a_client_completes_streams_and_cannot_change_the_model(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    gate = Gate(
        build(model, AutoTokenizer.from_pretrained(tiny_llama)), "k", [ServedModel(name="small", pinned=PINNED)]
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(gate, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    ask = {"model": "small", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    try:
        with openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=60) as client:
            whole = client.completions.create(**ask)
            parts = [part.choices[0].text for part in client.completions.create(**ask, stream=True) if part.choices]
            with pytest.raises(openai.NotFoundError, match="use 'small'"):
                client.completions.create(**{**ask, "model": str(tiny_llama)})
            with pytest.raises(openai.NotFoundError, match="not served"):
                client.with_options(base_url=url.removesuffix("/v1")).post("/reset", cast_to=object)
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert whole.usage is not None
    assert 1 <= whole.usage.completion_tokens <= 4
    assert "".join(parts) == whole.choices[0].text
    assert (gate.requests, gate.failed, gate.running) == (3, 0, 0)
    assert gate.tokens == 2 * whole.usage.completion_tokens
