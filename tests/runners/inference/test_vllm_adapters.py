"""What an adapter's files say ends its answers on vLLM as on Transformers."""

from __future__ import annotations

import importlib.util
import json

import pytest

from runners.models.builtin import write_tiny_lora
from tests.runners.inference.test_vllm import on_vllm, without_time

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed here"),
]


def test_end_tokens_of_an_adapter(forked, tiny_llama, make_context, tmp_path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    write_tiny_lora(folder, seed=1)
    spec = on_vllm(tiny_llama, ["the node waits", "a slot returns"], max_tokens=12, logprobs=0)
    adapters = [{"name": "tuned", "path": str(folder)}, {"name": "other", "path": str(folder)}]
    spec["model"]["adapters"] = adapters
    spec["data"]["metadata"] = [{"adapter": "tuned"}, {"adapter": "base"}]
    whole = forked(make_context(spec))["items"]
    ids = [each["token_id"] for each in whole[0]["logprobs"]]
    end = next(i for i, token_id in enumerate(ids) if i > 1 and token_id not in ids[:i])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[end]]}))
    ended = forked(make_context(spec))
    assert [each["token_id"] for each in ended["items"][0]["logprobs"]] == ids[: end + 1]
    assert [each["finish_reason"] for each in ended["items"]] == ["stop", whole[1]["finish_reason"]]
    assert ended["items"][1]["output"] == whole[1]["output"]
    other = without_time(forked(make_context({**spec, "engine": "transformers"})))
    assert [each["output"] for each in other["items"]] == [each["output"] for each in ended["items"]]
