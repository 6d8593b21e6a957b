"""Sampling on Transformers: seeds, penalties, log probabilities, and the draw itself."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'inference'")
import torch

from runners.api import BadRequest
from runners.inference.runner import InferenceRunner
from runners.inference.sampling import Picker, keep_top
from runners.inference.task import InferenceOptions, sampling_of
from tests.kit.inference_specs import mixed_prompts, spec_of


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


def test_numbers_that_leave_no_scores_to_compare(tiny_llama, make_context) -> None:
    """Scores that are divided beyond float32 are NaN, and the first token of the vocabulary would win each time."""
    greedy = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"])))["items"][0]["output"]
    cold = InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"], temperature=1e-39, seed=1)))
    assert cold["items"][0]["output"] == greedy
    for penalty in (1e-40, 1e39):
        with pytest.raises(BadRequest, match=r"^spec\.inference\.repetition_penalty: .* give 0\.001 to 1000$"):
            InferenceRunner().run(make_context(spec_of(tiny_llama, ["a task"], repetition_penalty=penalty)))


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
