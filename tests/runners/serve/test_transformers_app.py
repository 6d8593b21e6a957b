"""A model that Transformers serves, asked over HTTP: answers are those of inference tasks, whole and streamed, and what
is not honoured is refused by name."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from PIL import Image  # noqa: E402

from runners.inference.runner import InferenceRunner  # noqa: E402
from runners.models.builtin import TINY_VISION  # noqa: E402
from tests.kit.file_server import Served as File  # noqa: E402
from tests.kit.file_server import Server as FileServer  # noqa: E402
from tests.kit.inference_specs import outputs, spec_of  # noqa: E402
from tests.kit.served_model import KEY, Endpoint, serving  # noqa: E402
from tests.kit.support import until  # noqa: E402

TEXT = {"type": "text", "text": "a task starts"}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 24), color).save(buffer, "PNG")
    return buffer.getvalue()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


RED = image(f"data:image/png;base64,{base64.b64encode(png('red')).decode()}")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Endpoint]:
    """With an adapter beside it."""
    model = {
        "source": {"identifier": "builtin:tiny-llama"},
        "adapters": [{"name": "tuned", "path": "builtin:tiny-lora"}],
    }
    with serving(tmp_path_factory.mktemp("text"), shared_cache, model, served_model_name="small") as made:
        yield made


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Endpoint]:
    model = {"source": {"identifier": TINY_VISION}}
    with serving(tmp_path_factory.mktemp("vision"), shared_cache, model) as made:
        yield made


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    with FileServer() as made:
        yield made


def test_the_openai_client_completes_and_streams(text_model: Endpoint) -> None:
    url = f"http://127.0.0.1:{text_model.port}/v1"
    ask: dict[str, Any] = {"model": "small", "prompt": "hello", **GREEDY}
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        whole = client.completions.create(**ask)
        parts = [part.choices[0].text for part in client.completions.create(**ask, stream=True)]
        chat = client.chat.completions.create(model="small", messages=[{"role": "user", "content": "hello"}], **GREEDY)
        with pytest.raises(openai.NotFoundError, match="use 'small'"):
            client.completions.create(**{**ask, "model": "builtin:tiny-llama"})
        with pytest.raises(openai.NotFoundError, match="served on vLLM only"):
            client.responses.create(model="small", input="hello")
    assert whole.usage is not None
    assert 1 <= whole.usage.completion_tokens <= 12
    assert "".join(parts) == whole.choices[0].text
    assert chat.choices[0].message.role == "assistant"


def test_answers_to_images_are_those_of_an_inference_task(
    make_context, file_server: FileServer, vision_model: Endpoint, text_model: Endpoint
) -> None:
    file_server.files["blue.png"] = File(png("blue"))
    blue = image(file_server.url("blue.png"))
    contents: list[list[Any]] = [[RED, TEXT], [TEXT, blue], [RED, TEXT, blue], [TEXT]]
    items = [[{"role": "user", "content": content}] for content in contents]
    expected = outputs(InferenceRunner().run(make_context(spec_of(TINY_VISION, items, max_tokens=12))))
    assert len(set(expected)) == 4, "the image makes no difference"
    for content, answer in zip(contents, expected, strict=True):
        whole = vision_model.chat(*content, **GREEDY)
        assert whole.body["choices"][0]["message"]["content"] == answer
        streamed = vision_model.chat(*content, **GREEDY, stream=True, stream_options={"include_usage": True})
        assert streamed.joined() == answer
        assert streamed.body[-1]["usage"] == whole.body["usage"]
    file_server.files["blue.png"] = File(png("green"), etag='"2"')
    assert vision_model.chat(TEXT, blue, **GREEDY).body["choices"][0]["message"]["content"] != expected[1]
    for content, words in (
        ([image("file:///etc/hostname")], "is not read for a client"),
        ([image("/etc/hostname")], "is not read for a client"),
        ([image("data:image/png;base64,AAAA")], "no image of a format"),
        ([image(file_server.url("none.png"))], "404"),
        ([{"type": "text", "text": "<image>"}], "mark of an image"),
        ([{"type": "input_audio", "input_audio": {}}], "only parts of type text and image_url"),
    ):
        refused = vision_model.chat(*content, **GREEDY)
        assert refused.status == 400, content
        assert words in refused.error
    before = len(file_server.requests)
    refused = text_model.chat(TEXT, blue, **GREEDY)
    assert (refused.status, refused.body["error"]["param"]) == (400, "messages")
    assert "the model takes none" in refused.error
    assert len(file_server.requests) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": 7}, "stop"),
        ({"seed": -1}, "seed"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [FUNCTION]}, "tools"),
        ({"tools": [FUNCTION], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"min_p": 0.5}, "min_p"),
        ({"foo": 1}, "foo"),
        ({"generation_config": "{}"}, "generation_config"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages"),
        ({"messages": [{"role": "user", "content": "hello " * 3000}]}, "messages"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(text_model: Endpoint, fields: dict[str, Any], param: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, **fields}
    for stream in ({},) if {"stream", "stream_options"} & fields.keys() else ({}, {"stream": True}):
        refused = text_model.ask("chat/completions", body | stream)
        assert refused.status == 400, refused.text
        assert refused.body["error"]["param"] == param
        assert param.partition(".")[0] in refused.error


def test_what_asks_for_nothing_is_taken(text_model: Endpoint) -> None:
    fields = {
        "n": None,
        "tools": [],
        "tool_choice": "none",
        "user": "me",
        "logprobs": False,
        "stream": False,
        "store": True,
    }
    answer = text_model.chat("hello", **GREEDY, **fields)
    assert answer.status == 200
    assert "tool_calls" not in answer.body["choices"][0]["message"]
    long = text_model.ask(
        "completions", prompt="hello", temperature=0, max_tokens=10**9, stop_token_ids=list(range(387))
    )
    assert long.body["choices"][0]["finish_reason"] == "stop"


def events(endpoint: Endpoint, path: str, **fields: Any) -> tuple[Any, Any]:
    """An answer, whole and streamed."""
    whole = endpoint.ask(path, **fields)
    streamed = endpoint.ask(path, **fields, stream=True, stream_options={"include_usage": True})
    assert (whole.status, streamed.status) == (200, 200), whole.text
    return whole, streamed


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["hello", [5, 6, 7]], "n": 2, "logprobs": 1, "max_tokens": 20, "seed": 5},
        {"prompt": "hello", "temperature": 2.0, "max_tokens": 90, "seed": 1, "ignore_eos": True},
        {"prompt": "größer 漢字", "stop": ["e", "th", "a t"], "max_tokens": 60, "seed": 2},
        {"messages": [{"role": "user", "content": "hello"}], "n": 3, "max_tokens": 30, "seed": 3, "logprobs": True,
         "top_logprobs": 2, "stop": "s"},
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1, "seed": 4},
    ],
)  # fmt: skip
def test_a_stream_is_the_answer_in_parts(text_model: Endpoint, fields: dict[str, Any]) -> None:
    path = "chat/completions" if "messages" in fields else "completions"
    whole, streamed = events(text_model, path, **fields)
    *parts, last = streamed.body
    assert last["choices"] == []
    assert last["usage"] == whole.body["usage"]
    assert {part["id"] for part in streamed.body} == {last["id"]}
    assert all(part["model"] == "small" for part in streamed.body)
    for choice in whole.body["choices"]:
        own = [each for part in parts for each in part["choices"] if each["index"] == choice["index"]]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert streamed.joined(choice["index"]) == text
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        told = [each["logprobs"] for each in own if each["logprobs"]]
        if choice["logprobs"] is None:
            assert not told
            continue
        for name, values in choice["logprobs"].items():
            assert [value for each in told for value in each[name]] == values
    again = text_model.ask(path, **fields)
    assert again.body["choices"] == whole.body["choices"], "the seed makes it the same"


def test_several_answers_and_seeds_differ(text_model: Endpoint) -> None:
    fields = {"prompt": "hello", "max_tokens": 8}
    answer = text_model.ask("completions", **fields, n=3, seed=1)
    assert len({each["text"] for each in answer.body["choices"]}) == 3
    assert answer.body["usage"]["completion_tokens"] <= 24
    unseeded = {text_model.ask("completions", **fields).body["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) > 1, "temperature is 1 by default"


def test_requests_at_the_same_time_get_the_answers_of_their_models(text_model: Endpoint) -> None:
    def ask(model: str) -> str:
        return str(text_model.ask("completions", model=model, prompt="hello", **GREEDY).body["choices"][0]["text"])

    expected = {name: ask(name) for name in ("small", "tuned")}
    assert expected["small"] != expected["tuned"]
    found: list[tuple[str, str]] = []
    threads = [
        threading.Thread(target=lambda name=name: found.append((name, ask(name))))  # type: ignore[misc]
        for name in ("small", "tuned") * 4
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert sorted(found) == sorted((name, text) for name, text in expected.items() for _ in range(4))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_generation(text_model: Endpoint, stream: bool) -> None:
    fields = {"prompt": "hello", "n": 16, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    with contextlib.closing(text_model.connection("completions", fields)) as connection:
        if stream:
            connection.getresponse().read(100)
        else:
            until(lambda: text_model.gate.running == 1, "it is being answered")
    until(lambda: text_model.gate.running == 0, "nobody waits for it")
    assert text_model.ask("completions", prompt="hello", max_tokens=1).status == 200
    until(lambda: text_model.gate.running == 0, "nor for this one")
