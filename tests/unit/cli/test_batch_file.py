"""`flowmesh run batch.jsonl --model MODEL`: the task that it makes, and what is no batch file."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from flowmesh.cli.batch_file import submission_of
from flowmesh.cli.checked_file import check_submission
from flowmesh.cli.document_parser import DocumentError
from flowmesh.cli.documents import load
from flowmesh.cli.run import run
from flowmesh.cli.summary import summary
from flowmesh.settings.schema import Settings
from flowmesh.tasks.catalogue import known_types
from tests.kit.batch_files import chat, write


def test_a_batch_file_is_a_task(tmp_path, monkeypatch) -> None:
    write(tmp_path / "batch.jsonl", "", chat("a"))
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    made = submission_of("batch.jsonl", "./model", engine="transformers", served=("gpt-9",), task_id="mine")
    spec = made.document["spec"]
    assert spec["data"]["path"] == str(tmp_path / "batch.jsonl")
    assert spec["model"]["source"]["identifier"] == str(tmp_path / "model")
    assert spec["data"]["served_model_name"] == ["gpt-9", "./model"], "lines name the model as the command does"
    checked = check_submission(made, known_types(Settings()), "yaml")
    assert (checked.errors, checked.warnings) == ((), ())
    hub = submission_of("batch.jsonl", "owner/name").document["spec"]
    assert hub["model"]["source"]["identifier"] == "owner/name"
    assert "engine" not in hub


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "why?"}', "not a batch file: .*custom_id, method, url, body"),
        ("spec: {taskType: echo}", "not a batch file"),
        ("\n \n", "holds no line"),
        (None, "cannot be read"),
    ],
)
def test_another_file_is_refused(tmp_path, text, words) -> None:
    if text is not None:
        (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(DocumentError, match=words):
        submission_of(str(tmp_path / "b.jsonl"), "m")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["b.jsonl"], "--model: missing; b.jsonl is a batch file"),
        (["t.yaml", "--model", "m"], "for batch files"),
        (["t.yaml", "--engine", "vllm"], "for batch files"),
    ],
)
def test_options_that_do_not_fit(arguments, words) -> None:
    answer = CliRunner().invoke(run, arguments)
    assert answer.exit_code == 2
    assert words in answer.output


def test_a_batch_file_is_no_document(tmp_path) -> None:
    with pytest.raises(DocumentError, match=r"flowmesh run .* --model MODEL"):
        load(str(write(tmp_path / "b.jsonl", chat("a"))))


def test_the_summary_says_where_the_answers_are() -> None:
    path = "/results/" + "x" * 100
    result = {
        "ok": True, "model": "m", "request_counts": {"total": 3, "completed": 2, "failed": 1},
        "output_file": {"path": f"{path}/output.jsonl", "record_count": 2},
        "error_file": {"path": f"{path}/errors.jsonl", "record_count": 1},
        "first_errors": ["spec.data.path line 2: " + "y" * 100],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "latency_sec": 1.0},
    }  # fmt: skip
    lines = summary(result, 60)
    assert lines[0].startswith("2 of 3 requests answered, 1 + 2 tokens")
    assert lines[1:3] == [f"output: {path}/output.jsonl (2 lines)", f"errors: {path}/errors.jsonl (1 line)"]
    assert len(lines[3]) <= 60
