"""Chats in sft: tools, tool calls, weights and other keys have TRL's effect, or are refused with their row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")
from datasets import Dataset, Features, Json, List
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from runners.api import BadRequest
from runners.training.sft_rows import MASKED, SftRows
from tests.kit.training_tasks import refused, run, train

TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|tools|>{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] or '' }}"
    "{% if message.tool_calls %}{% for c in message.tool_calls %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}{% endif %}{{ eos_token }}\n{% endfor %}"
)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_log", "parameters": {"type": "object", "properties": {"slot": {"type": "integer"}}}},
    }
]
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "the node"},
            {"role": "assistant", "content": None, "tool_calls": [call("get_log", slot=3)]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            {"role": "assistant", "content": "a slot"},
        ],
        "tools": TOOLS,
    },
    {
        "messages": [
            {"role": "user", "content": "the log"},
            {"role": "assistant", "tool_calls": [call("free", node="a", wait=[1, 2.5])]},
            {"role": "tool", "tool_call_id": "c1", "content": "yes"},
        ]
    },
]
PLAIN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a slot"}]


@pytest.fixture(scope="module")
def tooled(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that writes tools."""
    folder = tmp_path_factory.mktemp("models") / "tooled"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def of_trl(folder: Path, rows: list[dict[str, Any]], out: Path, **config: Any) -> list[list[int]]:
    """The tokens that TRL's own trainer makes of `rows`."""
    features = Features({"messages": List(Json()), **({"tools": Json()} if any("tools" in r for r in rows) else {})})
    table = Dataset.from_list([{key: row.get(key) for key in features} for row in rows], features=features)
    arguments = {"max_length": 512, **config}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        SFTConfig(output_dir=str(out), use_cpu=True, bf16=False, report_to="none", shuffle_dataset=False, **arguments),
        train_dataset=table,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return [row["input_ids"] for row in trainer.train_dataset]


def ours(folder: Path, row: dict[str, Any], **config: Any) -> dict[str, list[int]]:
    given = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, **config)
    return SftRows(AutoTokenizer.from_pretrained(folder), given).tokens(row, lambda: "row 0")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft(folder: Path, path: str, **training: Any) -> dict[str, Any]:
    settings = {"max_steps": 1, "batch_size": 2, "max_seq_length": 512, "save_strategy": "no", "save_model": False}
    return {
        "model": {"source": {"identifier": str(folder)}},
        "data": {"jsonl_path": path},
        "training": {**settings, "logging_steps": 1, **training},
    }


def test_tools_and_calls_are_trained_on_as_trl_does(tooled: Path, tmp_path: Path) -> None:
    wanted = of_trl(tooled, ROWS, tmp_path / "trl")
    result = train(tmp_path, "sft", sft(tooled, write(tmp_path / "rows.jsonl", ROWS)))
    assert result["metrics"]["tokens"] == sum(map(len, wanted))
    for row, ids in zip(ROWS, wanted, strict=True):
        chat = [{"content": "", **{k: v for k, v in m.items() if v is not None}} for m in row["messages"]]
        found = ours(tooled, {"messages": chat, "tools": json.dumps(row["tools"]) if "tools" in row else None})
        assert found == {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_the_same_from_a_dataset(tooled: Path, tmp_path: Path, name: str) -> None:
    rows = [ROWS[0], ROWS[0]]
    if name.endswith("jsonl"):
        write(tmp_path / name, rows)
    else:
        Dataset.from_list(rows).to_parquet(str(tmp_path / name))
    spec = sft(tooled, "")
    spec["data"] = {"dataset_name": str(tmp_path / name)}
    assert train(tmp_path, "sft", spec)["metrics"]["tokens"] == sum(map(len, of_trl(tooled, rows, tmp_path / "trl")))


def test_dpo_reads_tools_too(tooled: Path, tmp_path: Path) -> None:
    chat = ROWS[0]["messages"]
    row = {"prompt": chat[:3], "chosen": chat[3:], "rejected": [{"role": "assistant", "content": "a log"}]}
    training = {"max_steps": 1, "batch_size": 1, "max_seq_length": 512, "save_model": False, "logging_steps": 1}
    spec = {"model": {"source": {"identifier": str(tooled)}}, "training": training}
    counts = [
        train(tmp_path, "dpo", {**spec, "data": {"preferences": [each]}}, task_id=f"t{i}")["metrics"]["tokens"]
        for i, each in enumerate([row, {**row, "tools": TOOLS}])
    ]
    tokenizer = AutoTokenizer.from_pretrained(tooled)
    lengths = [
        sum(
            len(tokenizer.apply_chat_template([*_plain(chat[:3]), *answer], tools=tools, return_dict=False))
            for answer in (row["chosen"], row["rejected"])
        )
        for tools in (None, TOOLS)
    ]
    assert counts == lengths


def _plain(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"content": "", **{k: v for k, v in message.items() if v is not None}} for message in chat]


def test_a_weight_of_0_is_left_out_of_the_loss(tiny_llama: Path) -> None:
    chat = [*PLAIN, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "a log"}]
    weighed = [{**message, "weight": 0} if i == 1 else message for i, message in enumerate(chat)]
    found = ours(tiny_llama, {"messages": weighed})
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert found["input_ids"] == ids
    start, end = (len(tokenizer.apply_chat_template(chat[:n], return_dict=False)) for n in (1, 2))
    assert found["labels"] == [*ids[:start], *[MASKED] * (end - start), *ids[end:]]
    assert tokenizer.decode(ids[start:end]) == "<|assistant|>\na slot</s>\n"


def test_rows_of_weight_0_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"messages": PLAIN, "weight": 0}, {"messages": PLAIN, "weight": 1}, {"messages": PLAIN}]
    training = {"max_steps": 1, "batch_size": 1, "save_model": False}
    result = train(tmp_path, "sft", {"data": {"messages": rows}, "training": training})
    assert (result["dataset_size"], result["dropped_rows"]) == (2, {"weight 0": 1})


def message_of(tmp_path: Path, rows: list[Any], task_type: str = "sft", **spec: Any) -> str:
    data = {"messages": rows} if task_type == "sft" else {"preferences": rows}
    return refused(tmp_path, task_type, {"data": data, "training": {"max_steps": 1}, **spec})


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": PLAIN, "tools": TOOLS}, "spec.data.messages[1]: tools would have no effect"),
        ({"messages": PLAIN, "images": ["a.png"]}, "spec.data.messages[1]: column 'images' would have no effect"),
        ({"messages": PLAIN, "weight": 0.5}, "spec.data.messages[1]: weight 0.5: only 0"),
        ({"messages": PLAIN, "tools": "get_log"}, "spec.data.messages[1]: column 'tools': not JSON"),
        (
            [PLAIN[0], {**PLAIN[1], "reasoning_content": "hm"}],
            "spec.data.messages[1]: reasoning_content of message 1 would have no effect",
        ),
        (
            [PLAIN[0], {"role": "assistant", "tool_calls": [call("get_log")]}],
            "spec.data.messages[1]: tool_calls of message 1 would have no effect",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused_with_its_row(tmp_path: Path, row: Any, wanted: str) -> None:
    assert wanted in message_of(tmp_path, [PLAIN, row])


def test_half_a_surrogate_pair_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a \\ud83d\\ude00"}\n{"text": "a \\ud83d"}\n')
    spec = {"data": {"jsonl_path": str(path)}, "training": {"max_steps": 1}}
    assert "rows.jsonl line 2: half a character" in refused(tmp_path, "sft", spec)


def test_a_key_that_the_template_reads_is_trained_on(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{{ m.content }}\n{% endfor %}"
    )
    chat = [PLAIN[0], {**PLAIN[1], "reasoning_content": "so"}]
    config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False)
    found = SftRows(tokenizer, config).tokens({"messages": chat}, lambda: "row 0")
    assert tokenizer.decode(found["input_ids"]) == "user:hi\nassistant:(so)a slot\n"
    with pytest.raises(BadRequest, match="row 0: mood of message 0 would have no effect"):
        SftRows(tokenizer, config).tokens({"messages": [{**PLAIN[0], "mood": "x"}]}, lambda: "row 0")


@pytest.mark.parametrize("task_type", ["sft", "dpo", "kto", "reward", "grpo", "ppo"])
def test_a_template_without_a_system_role_names_the_row(tiny_llama: Path, tmp_path: Path, task_type: str) -> None:
    folder = tmp_path / "no-system"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    tokenizer.save_pretrained(folder)
    system = [{"role": "system", "content": "b"}]
    prompt, answer = PLAIN[:1], PLAIN[1:]
    rows: dict[str, tuple[str, Any]] = {
        "sft": ("messages", lambda before: [*before, *PLAIN]),
        "dpo": ("preferences", lambda before: {"prompt": [*before, *prompt], "chosen": answer, "rejected": answer}),
        "reward": ("preferences", lambda before: {"chosen": [*before, *PLAIN], "rejected": [*before, *PLAIN]}),
        "kto": ("examples", lambda before: {"prompt": [*before, *prompt], "completion": answer, "label": True}),
        "grpo": ("prompts", lambda before: {"prompt": [*before, *prompt]}),
        "ppo": ("prompts", lambda before: {"prompt": [*before, *prompt]}),
    }
    name, row = rows[task_type]
    spec = {
        "model": {"source": {"identifier": str(folder)}},
        "data": {name: [row([]), row(system)]},
        "training": {"max_steps": 1, "batch_size": 8, "save_model": False},
    } | ({"reward": "length"} if task_type in ("grpo", "ppo") else {})
    outcome = run(tmp_path, task_type, spec)
    assert outcome.fault == "bad_request"
    assert f"spec.data.{name}[1]: the model's chat template refuses this chat" in outcome.message
    assert "System role not supported" in outcome.message


def test_a_reward_models_template_names_the_row_too(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "judge"
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    tokenizer.save_pretrained(folder)
    prompts = [PLAIN[:1], [{"role": "system", "content": "b"}, *PLAIN[:1]]]
    spec = {"data": {"prompts": prompts}, "reward_model": {"identifier": str(folder)}, "training": {"steps": 1}}
    message = refused(tmp_path, "ppo", spec)
    assert f"spec.reward_model {str(folder)!r}: spec.data.prompts[1]: the model's chat template refuses" in message


def test_tools_of_prompts_would_have_no_effect(tmp_path: Path) -> None:
    spec = {"data": {"prompts": [{"prompt": PLAIN[:1], "tools": TOOLS}]}, "reward": "length"}
    assert "spec.data.prompts[0]: column 'tools' would have no effect" in refused(tmp_path, "grpo", spec)
