"""PPO's model and rollouts on the tiny Llama: padding changes nothing, and a response ends where it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'training'")
pytest.importorskip("peft", reason="needs the extra 'training'")

from runners.api import Context  # noqa: E402
from runners.training.plan import read  # noqa: E402
from runners.training.ppo_math import token_logprobs  # noqa: E402
from runners.training.ppo_model import Batch, PolicyWithValue  # noqa: E402
from runners.training.ppo_rollout import Roller  # noqa: E402
from runners.training.rewards import FunctionReward  # noqa: E402

Make = Callable[..., Context]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def roller(
    make_context: Make, model: Any, tokenizer: Any, *, seen: list[Any] | None = None, **generation: Any
) -> Roller:
    spec = {
        "model": {"source": {"identifier": "builtin:tiny-llama"}},
        "data": {"prompts": ["a"]},
        "reward": {"function": "length"},
        "generation": generation,
    }
    plan = read("ppo", make_context(spec))
    seen = [] if seen is None else seen
    reward = FunctionReward("seen", 1.0, lambda prompt, text, row: float(not seen.append((prompt, text, row))))
    return Roller(plan, PolicyWithValue(model), model, tokenizer, rewards=[reward], length=plan.generation.length or 6)


def test_log_probabilities_and_values_do_not_depend_on_padding(model: Any) -> None:
    torch.manual_seed(0)
    policy = PolicyWithValue(model)
    prompts, responses = [[5, 6, 7], [8]], [[9, 10], [11, 12]]
    ids = torch.tensor([prompts[0] + responses[0], [0, 0, *prompts[1], *responses[1]]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    mask = torch.ones(2, 2, dtype=torch.long)
    with torch.no_grad():
        found = policy(Batch(ids, attention, mask), 1.0)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            out = model(torch.tensor([prompt + response]), output_hidden_states=True)
            at = len(prompt) - 1
            alone = token_logprobs(out.logits[:, at : at + 2], torch.tensor([response]))
            torch.testing.assert_close(found.logprobs[row], alone[0], atol=1e-4, rtol=1e-4)
            values = policy.value(out.hidden_states[-1][:, at : at + 2]).squeeze(-1)
            torch.testing.assert_close(found.values[row], values[0], atol=1e-4, rtol=1e-4)


def test_a_rollout_rates_what_was_written(make_context: Make, model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    seen: list[Any] = []
    rows = {"prompt": ["a task", "the node starts"], "answer": [1, 2]}
    rows["ids"] = [tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
    found = roller(make_context, model, tokenizer, seen=seen, max_new_tokens=6).roll(rows, "cpu", 1)
    assert [(prompt, row) for prompt, _, row in seen] == [("a task", {"answer": 1}), ("the node starts", {"answer": 2})]
    assert found.scores.tolist() == [1.0, 1.0]
    width = found.batch.mask.shape[1]
    for row, (_, text, _) in enumerate(seen):
        tokens = found.batch.ids[row, -width:][found.batch.mask[row].bool()]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    torch.testing.assert_close(found.logprobs, found.reference)  # the reference is the same model here
    assert (found.logprobs[found.batch.mask.bool()] < 0).all()


def test_where_a_response_ends(make_context: Make, model: Any, tokenizer: Any) -> None:
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    hello = tokenizer("hello", add_special_tokens=False)["input_ids"]
    width = len(hello) + 2
    rows = [[*hello, end, pad], [end] + [pad] * (width - 1), [*hello, 7, 7]]
    texts, mask = roller(make_context, model, tokenizer)._read(torch.tensor(rows))
    assert mask.sum(-1).tolist() == [len(hello) + 1, 1, width]  # the end token is one of the response's
    assert texts[:2] == ["hello", ""]
    stopping = roller(make_context, model, tokenizer, stop="lo")
    texts, mask = stopping._read(torch.tensor([[*hello, pad, pad]]))
    assert texts == ["hel"]
    assert mask.sum(-1).tolist() == [len(hello)]


def test_generation_stops_at_the_tasks_strings(make_context: Make, model: Any, tokenizer: Any) -> None:
    rows = {"prompt": ["a task"], "ids": [tokenizer("a task")["input_ids"]]}
    seen: list[Any] = []
    roller(make_context, model, tokenizer, seen=seen, max_new_tokens=12, do_sample=False).roll(rows, "cpu", 1)
    text = seen[0][1]
    assert len(text) > 3
    stop = text[1:3]
    again: list[Any] = []
    stopping = roller(make_context, model, tokenizer, seen=again, max_new_tokens=12, do_sample=False, stop=[stop])
    stopping.roll(rows, "cpu", 1)
    assert again[0][1] == text[: text.index(stop)]
