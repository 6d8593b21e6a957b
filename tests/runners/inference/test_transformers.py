"""The inference runner on Transformers, with a real model and `data.type: list`."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from flowmesh.messages.job import Fault
from flowmesh.processes.pipe import Cancel, Pipe, Progress
from runners.api import BadRequest, Cancelled
from runners.inference import loader
from runners.inference.engine import GpuOutOfMemory, Request, Watch, collect
from runners.inference.runner import InferenceRunner
from runners.inference.task import InferenceOptions, sampling_of
from runners.inference.tokens import Texts
from runners.inference.transformers_engine import TransformersEngine
from runners.models.builtin import train_tokenizer
from tests.kit.inference_specs import mixed_prompts, spec_of


def alone(reference: Any, prompt: str, max_new_tokens: int) -> list[int]:
    model, tokenizer = reference
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_prompts_that_fill_a_model_with_learned_positions(tmp_path, make_context) -> None:
    """A long prompt's row does not go on past the last position while a short one's answers."""
    tokenizer = train_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    items = ["a task " * 12, "a", "a task " * 13]
    together = InferenceRunner().run(make_context(spec_of(tmp_path / "gpt2", items, max_tokens=60)))["items"]
    for index, prompt in enumerate(items):
        (one,) = InferenceRunner().run(make_context(spec_of(tmp_path / "gpt2", [prompt], max_tokens=60)))["items"]
        assert together[index]["output"] == one["output"]


def test_greedy_batches_answer_like_each_prompt_alone(tiny_llama, reference, make_context) -> None:
    prompts = mixed_prompts(64)
    result = InferenceRunner().run(make_context(spec_of(tiny_llama, prompts)))
    tokenizer = reference[1]
    expected = [alone(reference, prompt, 16) for prompt in prompts]
    assert [item["output"] for item in result["items"]] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in expected
    ]
    assert [item["prompt"] for item in result["items"]] == prompts
    assert [item["index"] for item in result["items"]] == list(range(64))
    prompt_tokens = sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    completion_tokens = sum(len(ids) for ids in expected)
    latency_s = result["usage"].pop("latency_sec")
    assert latency_s > 0
    assert result["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "num_requests": 64,
    }


def test_result_carries_metadata_and_reasons(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a task", "the node"], max_tokens=3)
    spec["data"]["metadata"] = [{"id": 7}, None]
    result = InferenceRunner().run(make_context(spec))
    assert result["ok"] is True
    assert result["model"] == str(tiny_llama)
    assert [item["metadata"].get("id") for item in result["items"]] == [7, None]
    assert {item["finish_reason"] for item in result["items"]} == {"length"}
    json.dumps(result, allow_nan=False)


def test_an_end_token_ends_its_row_and_says_stop(tiny_llama, reference, make_context, tmp_path) -> None:
    """generation_config's end tokens count, too; here the third token of one prompt's answer is made one."""
    ids = alone(reference, "a task", 8)
    ending = tmp_path / "ending"
    ending.mkdir()
    for each in tiny_llama.iterdir():
        (ending / each.name).symlink_to(each)
    config = json.loads((ending / "generation_config.json").read_text())
    (ending / "generation_config.json").unlink()
    config["eos_token_id"] = [config["eos_token_id"], ids[2]]
    config["repetition_penalty"] = 5.0  # a default of the model's authors, which the task did not ask for
    (ending / "generation_config.json").write_text(json.dumps(config))
    prompts = ["a task", "the queue reads a folder"]
    result = InferenceRunner().run(make_context(spec_of(ending, prompts, max_tokens=8)))
    first, second = result["items"]
    assert first["finish_reason"] == "stop"
    assert first["output"] == reference[1].decode(ids[:3], skip_special_tokens=True)
    other = alone(reference, prompts[1], 8)
    assert ids[2] not in other, "the other prompt must not end early for this test to say anything"
    assert (second["finish_reason"], second["output"]) == ("length", reference[1].decode(other))
    assert result["usage"]["completion_tokens"] == 3 + 8


def test_stop_strings_are_cut_and_never_matched_in_the_prompt(tiny_llama, reference, make_context) -> None:
    text = reference[1].decode(alone(reference, "a task", 16))
    stop = text[5:9]
    result = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"], stop=[stop, "a task"])))
    item = result["items"][0]
    assert item["output"] == text[: text.index(stop)]
    assert item["finish_reason"] == "stop"
    one = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"], stop=stop)))
    assert one["items"] == result["items"]
    assert one["usage"]["completion_tokens"] < 16


def test_chat_messages_and_system_prompts(tiny_llama, reference, make_context) -> None:
    model, tokenizer = reference
    chat = [{"role": "user", "content": "what does a slot share?"}]
    own_system = [{"role": "system", "content": "be kind"}, *chat]
    spec = spec_of(tiny_llama, ["plain", chat, own_system], system_prompt="be brief")
    result = InferenceRunner().run(make_context(spec))
    asked = [
        "be brief\nplain",
        [{"role": "system", "content": "be brief"}, *chat],
        [{"role": "system", "content": "be brief\nbe kind"}, *chat],
    ]
    assert [item["prompt"] for item in result["items"]] == asked
    for prompt, item in zip(asked, result["items"], strict=True):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)[0, len(ids) :]
        assert item["output"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_chat_true_puts_plain_prompts_through_the_template(tiny_llama, make_context) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    plain = InferenceRunner().run(make_context(spec_of(tiny_llama, ["hello"], chat=True, systemPrompt="be brief")))
    asked = InferenceRunner().run(make_context(spec_of(tiny_llama, [messages])))
    assert plain["items"][0]["output"] == asked["items"][0]["output"]
    assert plain["usage"]["prompt_tokens"] == asked["usage"]["prompt_tokens"]
    assert plain["items"][0]["prompt"] == "hello"


def test_a_model_without_a_chat_template_says_so(tiny_llama, make_context, tmp_path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for each in tiny_llama.iterdir():
        if each.name != "chat_template.jinja":
            (bare / each.name).symlink_to(each)
    with pytest.raises(BadRequest, match=r"spec\.data\.items\[1\]: the model's tokenizer has no chat template"):
        InferenceRunner().run(make_context(spec_of(bare, ["a", [{"role": "user", "content": "b"}]])))


def test_a_sharded_list_is_split_without_loss(tiny_llama, make_context) -> None:
    prompts = mixed_prompts(7, longest=4)
    for contiguous in (True, False):
        seen = []
        for index in range(3):
            spec = spec_of(tiny_llama, prompts, max_tokens=1)
            spec["shard"] = {"index": index, "total": 3, "contiguous": contiguous}
            spec["data"]["metadata"] = [{"row": row} for row in range(7)]
            items = InferenceRunner().run(make_context(spec))["items"]
            assert all(prompts[item["metadata"]["row"]] == item["prompt"] for item in items)
            seen += [item["metadata"]["row"] for item in items]
        assert sorted(seen) == list(range(7))
        assert (seen == list(range(7))) == contiguous


def test_prompt_and_answer_share_the_models_positions(tiny_llama, make_context, tmp_path) -> None:
    from runners.models.builtin import write_tiny_llama

    short = tmp_path / "short"
    short.mkdir()
    write_tiny_llama(short, max_positions=16)
    result = InferenceRunner().run(make_context(spec_of(short, ["a task starts", "a"], max_tokens=100)))
    used = [result["items"][i]["finish_reason"] for i in range(2)]
    assert used == ["length", "length"]
    assert result["usage"]["total_tokens"] == 32
    with pytest.raises(BadRequest, match=r"spec\.data\.items\[1\]: the prompt has \d+ tokens; the model takes 16"):
        InferenceRunner().run(make_context(spec_of(short, ["a", "a task starts " * 10])))


def test_small_batches_give_the_same_answers(tiny_llama, make_context) -> None:
    """Bounds of the batch change nothing but the speed: here one row, three rows, and a few tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    texts = Texts(AutoTokenizer.from_pretrained(tiny_llama))
    sampling = sampling_of(InferenceOptions(temperature=0, max_tokens=6))
    requests = [
        Request(tuple(texts.tokenizer(prompt)["input_ids"]), sampling) for prompt in mixed_prompts(9, longest=12)
    ]
    answers = []
    for tokens, rows in ((10**6, 64), (10**6, 1), (10**6, 3), (30, 64)):
        engine = TransformersEngine(model, texts, batch_tokens=tokens, batch_rows=rows)
        answers.append(collect(engine, requests, Watch(make_context({}), len(requests))))
    assert all(each == answers[0] for each in answers)


def test_a_batch_too_large_for_the_gpu_is_halved(tiny_llama, make_context) -> None:
    """A model that raises what torch raises, for every batch over three rows: the answers still come, in order."""

    class Narrow(type(AutoModelForCausalLM.from_pretrained(tiny_llama))):
        rows = 3

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if (kwargs["input_ids"]).shape[0] > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
            return super().forward(*args, **kwargs)

    model = Narrow.from_pretrained(tiny_llama)
    texts = Texts(AutoTokenizer.from_pretrained(tiny_llama))
    sampling = sampling_of(InferenceOptions(temperature=0, max_tokens=4))
    requests = [
        Request(tuple(texts.tokenizer(prompt)["input_ids"]), sampling) for prompt in mixed_prompts(10, longest=9)
    ]
    engine = TransformersEngine(model, texts, batch_tokens=10**6, batch_rows=64)
    watch = Watch(make_context({}), len(requests))
    answers = collect(engine, requests, watch)
    assert watch.tokens == 40
    Narrow.rows = 64
    assert answers == collect(engine, requests, Watch(make_context({}), len(requests)))
    Narrow.rows = 0
    with pytest.raises(GpuOutOfMemory, match=r"does not hold one prompt of \d+ tokens.*Tried to allocate 2\.00 GiB"):
        collect(engine, requests, Watch(make_context({}), len(requests)))
    assert GpuOutOfMemory.fault is Fault.GPU_OOM


def test_progress_counts_prompts_and_a_cancel_ends_the_generation(tiny_llama, make_context) -> None:
    near, far = Pipe.pair()
    frames: list[Any] = []

    def node() -> None:
        while far.wait(60):
            try:
                frame = far.poll()
            except EOFError:
                return
            frames.append(frame)
            if isinstance(frame, Progress) and frame.done >= 1:
                far.send(Cancel("enough"))
                return

    thread = threading.Thread(target=node)
    thread.start()
    items = ["a task"] * 40
    spec = spec_of(tiny_llama, items, max_tokens=2000)
    spec["data"]["items"] = items
    context = make_context(spec, pipe=near)
    with pytest.raises(Cancelled, match="enough"):
        run_with_rows(context, rows=1)
    thread.join()
    near.close()
    far.close()
    progress = [frame for frame in frames if isinstance(frame, Progress)]
    assert progress[-1].done >= 1
    assert progress[-1].total == 40
    assert progress[-1].metrics["tokens_per_s"] > 0


def run_with_rows(context: Any, rows: int) -> Any:
    """Run with batches of `rows`: what a device with little room would get."""
    before = loader.CPU_ROWS
    loader.CPU_ROWS = rows
    try:
        return InferenceRunner().run(context)
    finally:
        loader.CPU_ROWS = before
