"""What a completion is worth: functions, callables, and reward models that the test makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runners.api import BadRequest, Context, MissingDependency, RunnerError

datasets = pytest.importorskip("datasets", reason="needs the extra 'training'")
from datasets import Dataset  # noqa: E402

from runners.training import rewards  # noqa: E402
from runners.training.data import Rows  # noqa: E402
from runners.training.plan import read  # noqa: E402
from tests.kit.training_tasks import QUICK, run, start  # noqa: E402

Make = Callable[..., Context]
MODEL = {"source": {"identifier": "builtin:tiny-llama"}}
COLUMNS = ["answer", "response", "level"]


def load(make_context: Make, spec: dict[str, Any], **fields: Any) -> list[rewards.Reward]:
    ctx = make_context({"model": MODEL, "data": {"prompts": ["a"]}, **spec}, **fields)
    rows = Rows(dataset=Dataset.from_dict({name: ["4"] for name in ["prompt", *COLUMNS]}), where=lambda i: f"row {i}")
    return rewards.load(read("ppo", ctx), ctx, "cpu", rows)


def score(make_context: Make, reward: Any, texts: list[str], **columns: list[Any]) -> list[float]:
    (found,) = load(make_context, {"reward": reward})
    return rewards.scores(found, ["p"] * len(texts), texts, columns)


def test_the_built_in_functions(make_context: Make) -> None:
    assert score(make_context, {"function": "length", "target": 4}, ["", "ab", "abcdef"]) == [0, 0.5, 1]
    assert score(make_context, {"function": "regex", "pattern": r"^\d+$"}, ["12", "a12"]) == [1, 0]
    assert score(make_context, "json_valid", ['{"a": 1}', "{a}"]) == [1, 0]
    assert score(make_context, "json_valid", ["NaN", '{"a": -Infinity}', "[" * 100_000]) == [0, 0, 0]
    answers = {"answer": ["4", "5"], "response": ["4", " x "], "level": [1, 2]}
    assert score(make_context, "exact_match", [" 4\n", "x"], **answers) == [1, 1]
    assert score(make_context, {"function": "exact_match", "column": "answer"}, ["4", "x"], **answers) == [1, 0]


def test_several_rewards_add_up_by_weight(make_context: Make) -> None:
    found = load(
        make_context, {"reward": [{"function": "json_valid", "weight": 2}, {"function": "length", "target": 2}]}
    )
    assert rewards.total(found, ["p", "p"], ["[]", "x"], {}) == [3.0, 0.5]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"function": "lenght"},
            "spec.reward.function: 'lenght' is none; known: length, regex, exact_match, json_valid",
        ),
        ({"function": "regex"}, "spec.reward.pattern: missing"),
        ({"function": "regex", "pattern": "("}, "spec.reward.pattern: not a regular expression"),
        ({"function": "length", "pattern": "x"}, "spec.reward.pattern: only function regex reads it"),
        ({"function": "exact_match", "column": "gold"}, "spec.reward.column: gold; name the column"),
        (["length", {"function": "os:system"}], "spec.reward[1].function: this node does not allow 'os:system'"),
    ],
)
def test_rewards_that_cannot_be_loaded(make_context: Make, reward: Any, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        load(make_context, {"reward": reward})
    assert message in str(caught.value)


def test_a_blank_answer_is_none(make_context: Make) -> None:
    ctx = make_context({"model": MODEL, "data": {"prompts": ["a"]}, "reward": "exact_match"})
    rows = Rows(dataset=Dataset.from_dict({"prompt": ["p"], "answer": ["  "]}), where=lambda i: f"row {i}")
    with pytest.raises(BadRequest, match=r"^row 0: column 'answer': no answer to compare with"):
        rewards.load(read("ppo", ctx), ctx, "cpu", rows)


def test_rewards_that_all_count_nothing(make_context: Make) -> None:
    with pytest.raises(BadRequest, match=r"spec\.reward\.weight: 0, so that every completion gets the same reward"):
        load(make_context, {"reward": [{"function": "length", "weight": 0}, {"function": "json_valid", "weight": 0}]})


@pytest.mark.parametrize("task_type", ["grpo", "rloo"])
def test_rewards_that_teach_nothing_are_a_warning(tmp_path: Path, task_type: str) -> None:
    reward = {"function": "regex", "pattern": "no completion has this in it"}
    training = {**QUICK, "max_steps": 2, "batch_size": 2, "num_generations": 2, "save_model": False}
    spec = {"data": {"prompts": ["a", "b"]}, "generation": {"max_new_tokens": 4}, "training": training}
    running = start(tmp_path, task_type, {**spec, "reward": reward}, task_id="none")
    assert running.wait().ok
    assert "nothing was learned from the rewards" in running.log()
    running = start(tmp_path, task_type, {**spec, "reward": "length"}, task_id="some")
    assert running.wait().ok
    assert "nothing was learned" not in running.log()


@pytest.mark.parametrize("task_type", ["ppo", "grpo"])
def test_rewards_beyond_float32(tmp_path: Path, task_type: str) -> None:
    """The trainers add up in float32: infinite rewards have no advantages, and the loss would stay zero."""
    training = {**QUICK, "max_steps": 1, "batch_size": 2, "save_model": False}
    training |= {"num_generations": 2} if task_type == "grpo" else {}
    spec = {"data": {"prompts": ["a", "b"]}, "generation": {"max_new_tokens": 4}, "training": training}
    outcome = run(tmp_path, task_type, {**spec, "reward": {"function": "length", "weight": 1e300}})
    assert not outcome.ok
    assert "reward is inf at step 1: the rewards exceed float32" in outcome.message


def test_callables_that_the_node_allows(make_context: Make) -> None:
    allowed = {"limits": {"reward_callables": ["tests.kit.training_tasks:*", "math:*", "no.such:*"]}}
    (found,) = load(make_context, {"reward": "tests.kit.training_tasks:likes_e"}, **allowed)
    assert rewards.scores(found, ["p"], ["eels"], {"answer": ["x"]}) == [0.5]
    with pytest.raises(BadRequest, match="is a float and cannot be called"):
        load(make_context, {"reward": "math:pi"}, **allowed)
    with pytest.raises(MissingDependency, match=r"no \(spec.reward.function: .no.such:f.\) is not installed"):
        load(make_context, {"reward": "no.such:f"}, **allowed)


class Wrong:
    name = "wrong"
    weight = 1.0

    def __init__(self, answer: list[Any]) -> None:
        self._answer = answer

    def score(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[Any]:
        return self._answer


@pytest.mark.parametrize("answer", [[], [1.0, 2.0], [None], [float("inf")], ["1"]])
def test_a_reward_that_answers_with_anything_else(answer: list[Any]) -> None:
    with pytest.raises(RunnerError, match="reward wrong: "):
        rewards.scores(Wrong(answer), ["p"], ["text"], {})


@pytest.fixture(scope="module")
def judges(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny classifiers: one output, two of sentiment, three of their own names."""
    torch = pytest.importorskip("torch", reason="needs the extra 'training'")
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("judges")
    labels = {"one": ["score"], "sentiment": ["NEGATIVE", "POSITIVE"], "three": ["bad", "fair", "good"]}
    for name, names in labels.items():
        torch.manual_seed(5)
        model = LlamaForSequenceClassification.from_pretrained(
            tiny_llama,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={n: i for i, n in enumerate(names)},
        )
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / name)
    return {name: folder / name for name in labels}


def logits(path: Path, text: str) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.no_grad():
        inputs = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")
        return AutoModelForSequenceClassification.from_pretrained(path)(**inputs).logits[0]


def judge(make_context: Make, path: Path, **fields: Any) -> rewards.Reward:
    return load(make_context, {"reward_model": {"identifier": str(path), **fields}})[0]


def test_models_of_each_type(make_context: Make, judges: dict[str, Path]) -> None:
    prompts, texts = ["the node ", "a slot "], ["starts", "ends its memory"]

    def scores(name: str, **fields: Any) -> list[float]:
        return rewards.scores(judge(make_context, judges[name], **fields), prompts, texts, {})

    def wanted(name: str, rate: Callable[[Any], Any]) -> Any:
        end = "</s>" if name == "one" else ""  # a reward model of ours has read it in training
        raw = [float(rate(logits(judges[name], p + t + end))) for p, t in zip(prompts, texts, strict=True)]
        return pytest.approx(raw, abs=1e-4)

    assert scores("one", scale=2.0) == wanted("one", lambda x: 2 * x[0])
    assert scores("sentiment", type="sentiment") == wanted("sentiment", lambda x: x.softmax(-1)[1] - x.softmax(-1)[0])
    assert scores("three", positive_label="Good") == wanted("three", lambda x: x[2])
    assert scores("three", positive_label="good", negative_label="bad") == wanted("three", lambda x: x[2] - x[0])
    prompt, near_end = ["the node " * 20] * 2, judge(make_context, judges["one"], max_length=4)
    assert len(set(rewards.scores(near_end, prompt, texts, {}))) == 2  # a long prompt is cut, never what is judged
    short = judge(make_context, judges["one"], max_length=3)
    assert rewards.scores(short, ["the node "], ["starts"], {}) != pytest.approx(scores("one")[:1], abs=1e-6)


def test_a_chat_is_judged_as_its_template_writes_it(make_context: Make, judges: dict[str, Path]) -> None:
    """The template writes the first token; a tokenizer that adds it to texts does not add another one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    asked = [{"role": "user", "content": "the node"}]
    tokenizer = AutoTokenizer.from_pretrained(judges["one"])
    inputs = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": "starts"}], return_tensors="pt", return_dict=True
    )
    assert inputs["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1
    with torch.no_grad():
        wanted = AutoModelForSequenceClassification.from_pretrained(judges["one"])(**inputs).logits[0]
    found = rewards.scores(judge(make_context, judges["one"]), [asked], ["starts"], {})
    assert found == pytest.approx(wanted.tolist(), abs=1e-5)


def test_models_that_cannot_judge(make_context: Make, judges: dict[str, Path], tiny_llama: Path) -> None:
    for path, fields, message in (
        (tiny_llama, {}, "is no classifier but LlamaForCausalLM"),
        (Path("/no/judge"), {}, "spec.reward_model.identifier: there is no folder '/no/judge'"),
        (judges["three"], {}, "spec.reward_model.positive_label: missing; the model has: bad, fair, good"),
        (judges["three"], {"positive_label": "best"}, "no label 'best'; the model has: bad, fair, good"),
        (judges["three"], {"type": "sentiment"}, "spec.reward_model.positive_label: missing"),
        (judges["one"], {"positive_label": "good"}, "the model has one output and no labels"),
    ):
        with pytest.raises(BadRequest) as caught:
            judge(make_context, path, **fields)
        assert message in str(caught.value)


@pytest.mark.parametrize("task_type", ["ppo", "grpo"])
def test_training_by_a_model(judges: dict[str, Path], tmp_path: Path, task_type: str) -> None:
    pytest.importorskip("trl", reason="needs the extra 'training'")
    from tests.kit.training_tasks import train

    spec = {
        "data": {"prompts": [[{"role": "user", "content": "the node"}], [{"role": "user", "content": "a slot"}]]},
        "reward_model": {"identifier": str(judges["sentiment"]), "type": "sentiment"},
        "reward": {"function": "length", "weight": 0.5},
        "generation": {"max_new_tokens": 4},
        "training": {"steps": 2, "batch_size": 8, "max_seq_length": 64, "logging_steps": 1},
    }
    result = train(tmp_path, task_type, spec)
    assert all(-1 <= point["reward"] <= 1.5 for point in result["metrics"]["loss_history"])
