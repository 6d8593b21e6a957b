"""Secrets of the node and of a task at each way out: events, results, the log, the status, `flowmesh` commands."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from flowmesh.redaction import Redactor, in_document
from tests.kit.promises import misbehave
from tests.kit.support import ROOT, Orchestrator

pytestmark = pytest.mark.redis
NODE_TOKEN, TASK_KEY, HEADER, PASSWORD = "n0de-token-1234", "hush-hush-task", "header-v4lue-77", "pa55-of-address"
SECRETS = (NODE_TOKEN, TASK_KEY, HEADER, PASSWORD)
CONFIG = """
[tasks]
allow_env = ["MY_*"]

[task_types.misbehave]
runner = "tests.kit.runners_for_tests:MisbehavingRunner"
environment = "light"
"""


@pytest.fixture
def node(make_node: Any) -> Any:
    return make_node(config=CONFIG, env={"ORCHESTRATOR_TOKEN": NODE_TOKEN})


def with_secrets(spec: dict[str, Any]) -> dict[str, Any]:
    return spec | {
        "env": {"MY_API_KEY": TASK_KEY, "MY_WORD": "ordinary"},
        "data": {"headers": {"X-Auth": HEADER, "Accept": "application/json"}, "url": f"https://me:{PASSWORD}@host/x"},
        "training": {"eos_token": "<|im_end|>"},
    }


def everything(node: Any, task: str) -> str:
    """All that the node says of a task, to whomever."""
    folder = node.results_dir / task
    command = [sys.executable, "-m", "flowmesh.cli.main", "logs", task, "--state-dir", str(node.state_dir)]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    return "\n".join([(folder / "responses.json").read_text(), node.text(), json.dumps(node.ask(op="status")), printed])


def test_a_result_says_what_it_was_given_but_no_secret(orchestrator: Orchestrator, node: Any) -> None:
    spec = with_secrets({"taskType": "echo", "words": f"told {NODE_TOKEN[:4]}, Bearer of news, token limit"})
    end = orchestrator.run("w1", spec, task_id="told")
    assert end["type"] == "TASK_SUCCEEDED"
    said = everything(node, "told") + json.dumps(end)
    assert [secret for secret in SECRETS if secret in said] == []
    echo = json.loads((node.results_dir / "told" / "responses.json").read_text())["echo"]
    assert echo["words"] == spec["words"], "what only looks like a credential is the task's own text"
    assert echo["env"] == {"MY_API_KEY": "[hidden]", "MY_WORD": "ordinary"}
    assert echo["data"]["headers"] == {"X-Auth": "[hidden]", "Accept": "application/json"}
    assert echo["training"] == {"eos_token": "<|im_end|>"}


def test_a_failure_that_speaks_of_secrets(orchestrator: Orchestrator, node: Any) -> None:
    end = orchestrator.run("w1", with_secrets(misbehave("tell_secrets")), task_id="spoke")
    assert end["type"] == "TASK_FAILED"
    assert "I have [hidden]" in end["error"]
    folder = node.results_dir / "spoke"
    said = (folder / "responses.json").read_text() + node.text() + json.dumps([end, node.ask(op="status")])
    assert [secret for secret in SECRETS if secret in said] == []
    assert TASK_KEY in (folder / "logs" / "stderr.log").read_text(), "files of the task are left as they are"


def test_logs_hide_what_the_node_knows_while_it_has_the_task(orchestrator: Orchestrator, node: Any) -> None:
    spec = with_secrets({"taskType": "echo", "delaySec": 600})
    orchestrator.dispatch("w1", spec, task_id="live")
    orchestrator.wait_started("live")
    log = node.results_dir / "live" / "logs" / "stderr.log"
    log.write_text(f"I have {TASK_KEY} and {NODE_TOKEN}, Bearer abcdefgh12345678\n")
    command = [sys.executable, "-m", "flowmesh.cli.main", "logs", "live", "--state-dir", str(node.state_dir)]

    def printed(*words: str) -> str:
        return subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT, check=True).stdout

    assert printed() == "I have [hidden] and [hidden], Bearer [hidden]\n"
    assert printed("--raw") == log.read_text()
    assert "secrets" not in printed("--json")


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({"adapters": [{"url": "https://h/a.zip?X-Amz-Signature=abcdef123&name=my-adapter"}]}, {"abcdef123"}),
        ({"qdrant": {"api_key": "qd-key-0001", "collection": "documents"}}, {"qd-key-0001"}),
        ({"a": [{"b": {"headers": {"Authorization": "Bearer zyx-987654", "X": 5}}}]}, {"Bearer zyx-987654"}),
        ({"merge_children": [{"spec": {"env": {"DB_PASSWORD": "swordfish"}}}]}, {"swordfish"}),
        (
            {"headers": "a column", "key": "question-of-row", "pad_token": "<|padding|>", "stop_token": "</answer>"},
            set(),
        ),
        ({"jsonl_export": {"fields": {"k": {"from": "metadata", "key": "long-column-name"}}}}, set()),
        ({"url": "http://[bad", "token": "short"}, set()),
    ],
)
def test_what_counts_as_a_secret_of_a_document(document: dict[str, Any], found: set[str]) -> None:
    assert set(in_document(document, {})) == found


def test_exact_redaction_leaves_other_text_alone() -> None:
    text = "Authorization: Bearer abcdefgh12345678, redis://u:p@h and swordfish"
    assert Redactor(["swordfish"], exact=True)(text) == text.replace("swordfish", "[hidden]")
