"""The inference runner on Transformers, with a real model and `data.type: list`."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from flowmesh.messages.job import Fault
from flowmesh.processes.pipe import Cancel, Pipe, Progress
from runners.api import BadRequest, Cancelled, MissingDependency
from runners.inference import loader, runner
from runners.inference.engine import GpuOutOfMemory, Request, Watch
from runners.inference.runner import InferenceRunner
from runners.inference.sampling import Picker, keep_top
from runners.inference.task import InferenceOptions, sampling_of
from runners.inference.tokens import Texts
from runners.inference.transformers_engine import TransformersEngine
from runners.models.builtin import train_tokenizer
from tests.runners.inference_specs import change, mixed_prompts, spec_of


@pytest.fixture(scope="module")
def reference(tiny_llama: Path):
    """The same model used as Transformers' documentation shows it: one prompt, no padding."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


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
    assert [item.get("metadata") for item in result["items"]] == [{"id": 7}, None]
    assert "metadata" not in result["items"][1]
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


def test_seeded_answers_do_not_depend_on_the_batch(tiny_llama, make_context) -> None:
    prompts = mixed_prompts(6, longest=20)
    options = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 11, "max_tokens": 12}
    together = InferenceRunner().run(make_context(spec_of(tiny_llama, prompts, **options)))["items"]
    for prompt, item in zip(prompts, together, strict=True):
        one = InferenceRunner().run(make_context(spec_of(tiny_llama, [prompt], **options)))["items"][0]
        assert one["output"] == item["output"]
    other = InferenceRunner().run(make_context(spec_of(tiny_llama, prompts, **{**options, "seed": 12})))["items"]
    assert [item["output"] for item in other] != [item["output"] for item in together]


def test_several_answers_differ_and_the_first_is_the_seeded_one(tiny_llama, make_context) -> None:
    options = {"temperature": 1.5, "seed": 4, "max_tokens": 10}
    single = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a slot"], **options)))["items"][0]
    result = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a slot", "the log"], n=3, **options)))
    first = result["items"][0]
    outputs = [each["output"] for each in first["outputs"]]
    assert first["output"] == outputs[0] == single["output"]
    assert len(set(outputs)) == 3
    assert result["usage"]["completion_tokens"] == 60
    assert result["usage"]["num_requests"] == 2


def test_do_sample_false_is_greedy_and_default_sampling_is_not(tiny_llama, make_context) -> None:
    greedy = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"])))
    forced = InferenceRunner().run(
        make_context(spec_of(tiny_llama, ["a task"], temperature=2.0, do_sample=False, top_k=-1))
    )
    assert forced["items"] == greedy["items"]
    top_one = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"], temperature=2.0, top_k=1)))
    assert top_one["items"] == greedy["items"]
    outputs = {
        InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"], temperature=2.0, seed=seed)))["items"][0][
            "output"
        ]
        for seed in range(4)
    }
    assert len(outputs) > 1


def test_max_new_tokens_wins_over_max_tokens(tiny_llama, make_context) -> None:
    result = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a"], max_tokens=9, max_new_tokens=2)))
    assert result["usage"]["completion_tokens"] == 2


def test_logprobs_are_the_models_own(tiny_llama, reference, make_context) -> None:
    model, tokenizer = reference
    spec = spec_of(tiny_llama, ["a task", "the network sends one GPU"], max_tokens=4, logprobs=3, frequency_penalty=1.0)
    item = InferenceRunner().run(make_context(spec))["items"][0]
    inputs = tokenizer("a task", return_tensors="pt")
    ids = [each["token_id"] for each in item["logprobs"]]
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
    with torch.no_grad():
        expected = model(whole).logits[0, inputs["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
    for step, each in enumerate(item["logprobs"]):
        assert each["logprob"] == pytest.approx(expected[step, ids[step]].item(), abs=1e-4)
        best = expected[step].topk(3).indices.tolist()
        assert [top["token_id"] for top in each["top"]] == best
    assert "".join(each["token"] for each in item["logprobs"]) == item["output"]


def penalised(model: Any, prompt: list[int], steps: int, *, presence: float, frequency: float, repetition: float):
    """The same penalties written down once more, token by token, on the plain model."""
    ids: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
        for token in set(prompt) | set(ids):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(ids):
            logits[token] -= presence + frequency * ids.count(token)
        ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize(
    ("presence", "frequency", "repetition"), [(1.9, 0.0, 1.0), (0.0, 1.5, 1.0), (0.0, 0.0, 1.8), (-1.5, 0.5, 1.3)]
)
def test_penalties(
    tiny_llama, reference, make_context, *, presence: float, frequency: float, repetition: float
) -> None:
    model, tokenizer = reference
    prompts = ["a task starts", "the queue waits for the next batch and the log, and then a folder"]
    spec = spec_of(
        tiny_llama,
        prompts,
        max_tokens=20,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    result = InferenceRunner().run(make_context(spec))
    for prompt, item in zip(prompts, result["items"], strict=True):
        ids = penalised(
            model, tokenizer(prompt)["input_ids"], 20, presence=presence, frequency=frequency, repetition=repetition
        )
        assert item["output"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_draw_follows_the_probabilities() -> None:
    sampling = sampling_of(InferenceOptions(temperature=0.5, top_p=1.0, top_k=0))
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    rows = 20000
    torch.manual_seed(0)
    picker = Picker(sampling, [[0]] * rows, [None] * rows, 1)
    picked = picker(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, 3)).argmax(-1)
    shares = torch.bincount(picked, minlength=3) / rows
    squares = torch.tensor([0.25, 0.09, 0.04])  # temperature 0.5 squares the odds
    assert torch.allclose(shares, squares / squares.sum(), atol=0.02)


def test_keep_top() -> None:
    scores = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3]]))
    kept = lambda k, p: (keep_top(scores, k, p) > float("-inf"))[0].tolist()  # noqa: E731
    assert kept(0, 1.0) == [True] * 4
    assert kept(2, 1.0) == [False, True, False, True]
    assert kept(0, 0.6) == [False, True, False, True]
    assert kept(0, 0.01) == [False, True, False, False]
    assert kept(1, 0.9) == [False, True, False, False]
    assert kept(100, 0.9) == [False, True, True, True]


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
    requests = [Request(tuple(texts.tokenizer(prompt)["input_ids"])) for prompt in mixed_prompts(9, longest=12)]
    answers = []
    for tokens, rows in ((10**6, 64), (10**6, 1), (10**6, 3), (30, 64)):
        engine = TransformersEngine(model, texts, batch_tokens=tokens, batch_rows=rows)
        answers.append(engine.generate(requests, sampling, Watch(make_context({}), len(requests))))
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
    requests = [Request(tuple(texts.tokenizer(prompt)["input_ids"])) for prompt in mixed_prompts(10, longest=9)]
    engine = TransformersEngine(model, texts, batch_tokens=10**6, batch_rows=64)
    watch = Watch(make_context({}), len(requests))
    answers = engine.generate(requests, sampling, watch)
    assert (watch.answers, watch.tokens) == (10, 40)
    Narrow.rows = 64
    assert answers == engine.generate(requests, sampling, Watch(make_context({}), len(requests)))
    Narrow.rows = 0
    with pytest.raises(GpuOutOfMemory, match=r"does not hold one prompt of \d+ tokens.*Tried to allocate 2\.00 GiB"):
        engine.generate(requests, sampling, Watch(make_context({}), len(requests)))
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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("inference.top_pp", 0.5, r"spec\.inference\.top_pp: unknown field; did you mean 'top_p'\?"),
        ("inference.temperature", "warm", r"spec\.inference\.temperature: .*warm"),
        ("inference.temperature", -1, r"spec\.inference\.temperature: .*>= 0"),
        ("inference.top_p", 0, r"spec\.inference\.top_p: .*> 0"),
        ("inference.top_k", -2, r"spec\.inference\.top_k: .*>= -1"),
        ("inference.max_tokens", 0, r"spec\.inference\.max_tokens: .*>= 1"),
        ("inference.n", 2, r"spec\.inference\.n: 2 answers of a greedy request"),
        ("inference.stop", ["a", ""], r"spec\.inference\.stop: an empty string"),
        ("inference.stop", [3], r"spec\.inference\.stop"),
        ("inference.system_prompt", 3, r"spec\.inference\.system_prompt"),
        ("inference.json_schema", {"type": "object"}, r"spec\.inference\.json_schema: .*vLLM"),
        ("model.source.identifer", "x", r"spec\.model\.source\.identifer: unknown field; did you mean 'identifier'\?"),
        ("model.source.identifier", None, r"spec\.model\.source\.identifier: missing"),
        ("model.source.identifier", "/no/such/folder", r"spec\.model\.source\.identifier: there is no folder"),
        (
            "model.source.identifier",
            "no/such-model",
            r"spec\.model\.source\.identifier: 'no/such-model' is not in this",
        ),
        ("model.source.identifier", "a b", r"spec\.model\.source\.identifier: 'a b' is neither a folder"),
        ("model.source.identifier", "builtin:huge", r"spec\.model\.source\.identifier: no built-in 'builtin:huge'"),
        ("model.source.type", "ftp", r"spec\.model\.source\.type"),
        ("model.transformers.torch_dtyp", "auto", r"spec\.model\.transformers\.torch_dtyp: unknown field"),
        ("model.transformers.dtype", "int3", r"spec\.model\.transformers\.dtype: .*int3"),
        ("model.transformers.device_map", "cuda", r"device_map: 'cuda', but this task has no GPU"),
        ("model.transformers.use_flash_attention_2", True, r"use_flash_attention_2: flash attention needs a GPU"),
        ("model.transformers.low_cpu_mem_usage", False, r"low_cpu_mem_usage: false is not possible"),
        (
            "model.transformers.attn_implementation",
            "telepathy",
            r"spec\.model\.transformers\.attn_implementation: no attention",
        ),
        ("data.items", [], r"spec\.data\.items: empty"),
        ("data.items", None, r"spec\.data\.items: missing"),
        ("data.items", ["a", ""], r"spec\.data\.items\[1\]: is empty"),
        ("data.items", ["a", 3], r"spec\.data\.items\[1\]: expected a string or a list"),
        ("data.items", [[{"role": "user"}]], r"spec\.data\.items\[0\]\[0\]\.content: missing"),
        ("data.items", "a", r"spec\.data\.items: expected "),
        ("data.metadata", [{}, {}], r"spec\.data\.metadata: 2 mappings for 1 items"),
        ("data.metadata", [3], r"spec\.data\.metadata\[0\]"),
        ("data.itms", [], r"spec\.data\.itms: unknown field; did you mean 'items'\?"),
        ("data.type", "lists", r"spec\.data\.type: unknown source 'lists'; did you mean 'list'\?"),
        ("data.type", None, r"spec\.data\.type: missing"),
        ("data", None, r"spec\.data: missing"),
        ("shard", {"index": 2, "total": 2}, r"spec\.shard\.index: 2 of 2 shards"),
        ("shard", {"index": 0}, r"spec\.shard\.total: missing"),
        ("inferense", {}, r"spec\.inferense: unknown field; did you mean 'inference'\?"),
        ("engine", "vlm", r"spec\.engine: .*vlm"),
        ("inference.engine", "vllm", r"spec\.engine: 'transformers', but spec\.inference\.engine says 'vllm'"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(tiny_llama, make_context, path: str, value: Any, message: str) -> None:
    spec = change(spec_of(tiny_llama, ["a task"]), path, value)
    with pytest.raises(BadRequest, match=message) as caught:
        InferenceRunner().run(make_context(spec))
    assert "\n" not in str(caught.value)


def test_the_cpu_and_vllm_exclude_each_other(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a"], "vllm") | {"enforce_cpu": True}
    with pytest.raises(BadRequest, match=r"spec\.engine: 'vllm' and enforce_cpu exclude each other"):
        InferenceRunner().run(make_context(spec))


def test_vllm_where_it_is_not_installed(tiny_llama, make_context) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    with pytest.raises(MissingDependency, match=r"vllm is not installed .*flowmesh-supervisor\[vllm\]"):
        InferenceRunner().run(make_context(spec_of(tiny_llama, ["a"], "vllm")))


def test_a_stranger_in_the_spec_is_told_to_the_log(tiny_llama, make_context, caplog) -> None:
    spec = spec_of(tiny_llama, ["a"], max_tokens=1) | {"priority_class": "high", "_private": 1}
    assert InferenceRunner().run(make_context(spec))["ok"] is True
    assert "spec.priority_class is not a field of this task type" in caplog.text
    assert "_private" not in caplog.text


def test_both_names_of_the_metadata_are_too_many(tiny_llama, make_context) -> None:
    spec = spec_of(tiny_llama, ["a"])
    spec["data"] |= {"metadata": [{}], "items_metadata": [{}]}
    with pytest.raises(BadRequest, match=r"spec\.data\.items_metadata: means the same"):
        InferenceRunner().run(make_context(spec))


def test_a_folder_without_a_model(make_context, tmp_path) -> None:
    with pytest.raises(BadRequest, match=r"spec\.model\.source\.identifier: .* has no config\.json"):
        InferenceRunner().run(make_context(spec_of(tmp_path, ["a"])))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"spec\.model\.source\.identifier: .* cannot be loaded"):
        InferenceRunner().run(make_context(spec_of(tmp_path, ["a"])))


def test_damaged_weights(tiny_llama, make_context, tmp_path) -> None:
    for each in tiny_llama.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes()[:1000])
        if each.name != "model.safetensors":
            (tmp_path / each.name).write_bytes(each.read_bytes())
    with pytest.raises(BadRequest, match=r"spec\.model\.source\.identifier: .* cannot be loaded") as caught:
        InferenceRunner().run(make_context(spec_of(tmp_path, ["a"])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["load_in_8bit", "load_in_4bit"])
def test_quantization_without_its_library(tiny_llama, make_context, field: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("bitsandbytes is installed here")
    spec = change(spec_of(tiny_llama, ["a"]), f"model.transformers.{field}", True)
    with pytest.raises(MissingDependency, match=f"bitsandbytes.*{field}.*is not installed"):
        InferenceRunner().run(make_context(spec))


def test_short_dtypes_and_attention(tiny_llama, make_context) -> None:
    spec = change(spec_of(tiny_llama, ["a"]), "model.transformers", {"dtype": "bf16", "attn_implementation": "eager"})
    context = make_context(spec)
    task = runner.read_task(context, spec)
    source = runner.resolve_identifier(context, str(tiny_llama), None, "x")
    model, _ = loader.load_model(context, task, source)
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert len(InferenceRunner().run(context)["items"]) == 1


def test_the_builtin_model_is_made_once_and_always_the_same(make_context, tmp_path) -> None:
    spec = spec_of(Path("x"), ["a task", "the node"])
    spec["model"]["source"]["identifier"] = "builtin:tiny-llama"
    one = InferenceRunner().run(make_context(spec, cache_dir=str(tmp_path / "one")))
    weights = tmp_path / "one" / "builtin" / "tiny-llama-v1" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    again = InferenceRunner().run(make_context(spec, cache_dir=str(tmp_path / "one")))
    other = InferenceRunner().run(make_context(spec, cache_dir=str(tmp_path / "two")))
    assert one["model"] == "builtin:tiny-llama"
    assert weights.stat().st_mtime_ns == made
    assert one["items"] == again["items"] == other["items"]
    assert [each.name for each in weights.parent.parent.iterdir()] == ["tiny-llama-v1"]


def test_options_of_the_other_engine_are_told_or_shared(tiny_llama, make_context, caplog) -> None:
    spec = spec_of(tiny_llama, ["a"], max_tokens=1)
    spec["model"] = {
        "source": spec["model"]["source"],
        "vllm": {"dtype": "half", "max_model_len": 9, "trust_remote_code": True},
    }
    context = make_context(spec)
    task = runner.read_task(context, spec)
    assert (task.transformers.dtype, task.transformers.trust_remote_code) == ("half", True)
    with caplog.at_level("INFO"):
        InferenceRunner().run(context)
    assert "spec.model.vllm was not used by engine=transformers: max_model_len" in caplog.text
    assert "dtype=float16" in caplog.text
