"""Preferences in the shapes that published data have: a prompt is trained on once, and nothing of an answer is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")
from transformers import AutoTokenizer
from trl import extract_prompt

from runners.api import BadRequest
from runners.training import pairs
from tests.kit.training_tasks import refused, train


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


HI, YES, NO = user("hi"), says("yes"), says("no")
SYSTEM = {"role": "system", "content": "be short"}
CHATS = {"prompt": [HI], "chosen": [YES], "rejected": [NO]}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO]}, CHATS),  # UltraFeedback
        ({"chosen": [HI, YES], "rejected": [HI, NO]}, CHATS),
        ({"prompt": [HI], "chosen": [HI, YES], "rejected": [HI, NO]}, CHATS),
        ({"prompt": [HI], "chosen": "yes", "rejected": "no"}, CHATS),
        ({"prompt": "hi", "chosen": [YES], "rejected": [NO]}, CHATS),
        ({"prompt": "hi\n", "chosen": [HI, YES], "rejected": [NO]}, CHATS),
        (
            {"prompt": "hi", "chosen": [SYSTEM, HI, YES], "rejected": [SYSTEM, HI, NO]},
            {**CHATS, "prompt": [SYSTEM, HI]},
        ),
        (
            {"prompt": "hi", "chosen": [HI, NO, HI, YES], "rejected": [HI, NO, HI, NO]},
            {**CHATS, "prompt": [HI, NO, HI]},
        ),
        (
            {"prompt": "Q: a?\nA:", "chosen": "Q: a?\nA: yes", "rejected": "Q: a?\nA: no"},
            {"prompt": "Q: a?\nA:", "chosen": " yes", "rejected": " no"},
        ),
        ({"prompt": "a", "chosen": "apple", "rejected": "b"}, {"prompt": "a", "chosen": "apple", "rejected": "b"}),
    ],
)
def test_shapes_of_preferences(row: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert pairs.preference(row, "row 0", needs_prompt=True) == wanted


def test_chats_alone_are_parted_as_trl_does() -> None:
    row = {"chosen": [SYSTEM, HI, says("so"), HI, YES], "rejected": [SYSTEM, HI, says("so"), HI, NO]}
    assert pairs.preference(row, "row 0", needs_prompt=True) == extract_prompt(row)
    assert pairs.preference(row, "row 0", needs_prompt=False) == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "ho", "chosen": [HI, YES], "rejected": [HI, NO]}, "row 0: chosen begins with {role: user"),
        ({"chosen": [HI, YES], "rejected": [user("ho"), NO]}, "without a prompt, both must be chats"),
        ({"prompt": [HI], "chosen": [HI], "rejected": [NO]}, "row 0: chosen holds the prompt alone"),
    ],
)
def test_shapes_that_do_not_go_together(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        pairs.preference(row, "row 0", needs_prompt=True)
    assert message in str(caught.value)


@pytest.mark.parametrize("task_type", ["dpo", "reward"])
def test_a_repeated_prompt_is_trained_on_once(tmp_path: Path, tiny_llama: Path, task_type: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    wanted = sum(len(tokenizer.apply_chat_template([HI, answer], return_dict=False)) for answer in (YES, NO))
    for i, prompt in enumerate(("hi", [HI], None)):
        row = {"prompt": prompt, "chosen": [HI, YES], "rejected": [HI, NO]}
        training = {"max_steps": 1, "batch_size": 1, "save_model": False, "max_seq_length": 64, "logging_steps": 1}
        data = {"preferences": [{key: value for key, value in row.items() if value is not None}]}
        result = train(tmp_path, task_type, {"data": data, "training": training}, task_id=f"task-{i}")
        assert result["metrics"]["tokens"] == wanted


def test_kto_and_mixed_shapes(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": [HI, YES], "label": True}, {"prompt": [HI], "completion": "no", "label": 0}]
    assert pairs.example(dict(rows[0]), "row") == {"prompt": [HI], "completion": [YES], "label": True}
    assert pairs.example(dict(rows[1]), "row") == {"prompt": [HI], "completion": [NO], "label": 0}
    texts = {"prompt": "hi", "completion": "yes", "label": True}
    assert "'prompt' is a text in some rows and a chat in others" in refused(
        tmp_path, "kto", {"data": {"examples": [rows[0], texts]}, "training": {"max_steps": 1}}
    )
