"""A reward model reads in use what it read in training: the same tokens, computed here by TRL itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import Context

pytest.importorskip("trl", reason="needs the extra 'training'")
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from runners.training.plan import read
from runners.training.reward_model import ModelReward
from runners.training.reward_text import answer_ids
from runners.training.rewards import scores
from runners.training.settings import RewardModel
from tests.kit.training_tasks import train

Make = Callable[..., Context]
USER = [{"role": "user", "content": "the node"}]
TEXT = {"prompt": "Is the node free?", "chosen": " Yes.", "rejected": " Who knows."}
CHAT = {
    "prompt": USER,
    "chosen": [{"role": "assistant", "content": "starts"}],
    "rejected": [{"role": "assistant", "content": "ends"}],
}
WHOLE = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}


def nowhere() -> str:
    return "row"


def of_trl(row: dict[str, Any], tokenizer: Any, model: Any, folder: Path) -> dict[str, list[int]]:
    """The tokens that TRL's own trainer makes of `row`."""
    config = RewardConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=64)
    trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    return {side: trainer.train_dataset[0][f"{side}_ids"] for side in ("chosen", "rejected")}


@pytest.fixture
def judge(tiny_llama: Path) -> Any:
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)


@pytest.mark.parametrize("row", [TEXT, CHAT, WHOLE, {"chosen": "a task</s>", "rejected": "b"}])
def test_the_tokens_are_trls(row: dict[str, Any], judge: Any, tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    wanted = of_trl(row, tokenizer, judge, tmp_path)
    for side, ids in wanted.items():
        assert answer_ids(tokenizer, row.get("prompt"), row[side], nowhere) == ids
        assert tokenizer.eos_token_id in ids


def test_a_text_that_a_template_wrote_has_one_begin_token(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = beginning(tiny_llama)
    text = tokenizer.apply_chat_template([*USER, {"role": "assistant", "content": "starts"}], tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    found = answer_ids(tokenizer, None, text.strip(), nowhere)
    assert found == tokenizer(text.strip(), add_special_tokens=False)["input_ids"]


def beginning(folder: Path) -> Any:
    """A tokenizer that puts the begin token before each text, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("row", [TEXT, CHAT])
def test_what_is_scored_is_what_was_trained(
    row: dict[str, Any], judge: Any, tiny_llama: Path, tmp_path: Path, make_context: Make
) -> None:
    judge.save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(tmp_path / "judge")
    wanted = []
    for ids in of_trl(row, tokenizer, judge, tmp_path).values():
        with torch.no_grad():
            wanted.append(float(judge.eval()(torch.tensor([ids])).logits[0, 0]))
    given = RewardModel(identifier=str(tmp_path / "judge"))
    reward = ModelReward.load(given, make_context({}), "cpu")
    answers = [side if isinstance(side, str) else side[0]["content"] for side in (row["chosen"], row["rejected"])]
    assert scores(reward, [row["prompt"]] * 2, answers, {}) == pytest.approx(wanted, abs=1e-5)


def test_its_order_holds_in_use(tmp_path: Path, make_context: Make) -> None:
    """The rewards that its trainer logged are those of a later task."""
    rows = [{**TEXT, "prompt": f"Is {what} free?"} for what in ("the node", "a slot", "the queue", "one GPU")]
    training = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-3, "max_seq_length": 64, "logging_steps": 1}
    result = train(tmp_path, "reward", {"data": {"preferences": rows}, "training": training})
    given = RewardModel(identifier=result["final_model_path"])
    reward = ModelReward.load(given, make_context({}), "cpu")
    prompts = [row["prompt"] for row in rows]
    good, bad = (scores(reward, prompts, [TEXT[side]] * 4, {}) for side in ("chosen", "rejected"))
    assert all(better > worse for better, worse in zip(good, bad, strict=True))
    last = result["metrics"]["last"]
    assert max(good) == pytest.approx(last["max_reward"], abs=2.0)
    assert read("reward", make_context({"model": {"source": {"identifier": "x"}}, "data": {"preferences": rows}}))
