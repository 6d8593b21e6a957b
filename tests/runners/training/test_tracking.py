"""report_to: TensorBoard's files are the task's artifacts; trackers with a server need the node's leave."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra 'training'")

from tests.kit import training_tasks
from tests.kit.training_tasks import PAIRS, SUMS, refused, run, train
from tests.kit.training_zygote import Zygote

TRAINING = {"max_steps": 2, "batch_size": 4, "max_seq_length": 64, "logging_steps": 1, "save_steps": 1}
ROWS: dict[str, dict[str, Any]] = {
    "sft": {"data": {"prompts": SUMS[:8]}},
    "dpo": {"data": {"preferences": PAIRS[:8]}},
    "ppo": {"data": {"prompts": SUMS[:8]}, "reward": "length", "generation": {"max_new_tokens": 4}},
}


def scalars(folder: Path) -> dict[str, list[int]]:
    """The steps of each number that TensorBoard finds in a task's artifacts."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[int]] = {}
    for path in sorted((folder / "artifacts" / "tensorboard").rglob("events*")):
        events = accumulator.EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.step for event in events.Scalars(tag))
    return found


def spec(task_type: str, **training: Any) -> dict[str, Any]:
    return {**ROWS[task_type], "training": {**TRAINING, **training}}


@pytest.mark.parametrize("task_type", ["sft", "dpo", "ppo"])
def test_tensorboard_lands_in_the_artifacts(tmp_path: Path, task_type: str) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    result = train(tmp_path, task_type, spec(task_type, report_to="tensorboard"))
    found = scalars(Path(result["output_dir"]))
    assert found["loss" if task_type == "ppo" else "train/loss"] == [1, 2]


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    result = train(tmp_path, "sft", spec("sft"))
    assert not (Path(result["output_dir"]) / "artifacts" / "tensorboard").exists()


@pytest.mark.parametrize("task_type", ["sft", "ppo"])
def test_a_server_needs_the_nodes_leave(tmp_path: Path, task_type: str) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        message = refused(tmp_path, task_type, spec(task_type, report_to=[name]), limits={"trackers": ["other"]})
        assert f"spec.training.report_to: this node does not allow {name!r}; its setting [runners] trackers" in message


def test_unknown_names_and_the_trainers_own_argument(tmp_path: Path) -> None:
    assert "spec.training.report_to" in refused(tmp_path, "sft", spec("sft", report_to="tensorbord"))
    message = refused(tmp_path, "sft", spec("sft", trainer_args={"report_to": "all"}))
    assert "spec.training.trainer_args.report_to: cannot be set; use spec.training.report_to" in message


def test_a_missing_library_names_the_remedy(tmp_path: Path) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("wandb", "mlflow", "trackio") if find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed")
    message = refused(tmp_path, "sft", spec("sft", report_to=missing[0]), limits={"trackers": missing})
    assert f"{missing[0]} (spec.training.report_to) is not installed" in message
    assert f"[{missing[0]}]" in message


@pytest.mark.parametrize("task_type", ["sft", "ppo"])
def test_a_resumed_run_keeps_its_id(tmp_path: Path, task_type: str) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    first = train(tmp_path, task_type, spec(task_type, report_to="tensorboard"), task_id="first")
    ids = [Path(first["checkpoints_dir"]) / "tracking.json"]
    path = str(Path(first["checkpoints_dir"]) / "checkpoint-1")
    more = spec(task_type, report_to="tensorboard", resume_from_path=path, max_steps=3)
    second = train(tmp_path, task_type, more, task_id="second")
    ids.append(Path(second["checkpoints_dir"]) / "tracking.json")
    assert [json.loads(each.read_text())["run"] for each in ids] == ["first", "first"]


@pytest.mark.parametrize("task_type", ["sft", "ppo"])
def test_trackio_writes_into_the_artifacts_and_continues_its_run(tmp_path: Path, task_type: str) -> None:
    pytest.importorskip("trackio", reason="needs the extra 'trackio'")
    limits = {"limits": {"trackers": ["trackio"]}}
    folder = Path(train(tmp_path, task_type, spec(task_type, report_to="trackio"), **limits)["output_dir"])
    more = spec(task_type, report_to="trackio", max_steps=4)
    assert train(tmp_path, task_type, more, **limits)["metrics"]["first_step"] == 2
    (file,) = (path for path in (folder / "artifacts" / "trackio").glob("flowmesh*.db"))
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, *_ in rows} == {"task-1"}
    assert sum("loss" in str(metrics) for *_, metrics in rows) >= 4


@pytest.mark.parametrize("task_type", ["sft", "ppo"])
def test_mlflow_writes_into_the_artifacts_and_continues_its_run(tmp_path: Path, task_type: str) -> None:
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    limits = {"limits": {"trackers": ["mlflow"]}}
    folder = Path(train(tmp_path, task_type, spec(task_type, report_to="mlflow"), **limits)["output_dir"])
    more = spec(task_type, report_to="mlflow", max_steps=3)
    result = train(tmp_path, task_type, more, **limits)
    assert result["metrics"]["first_step"] == 2
    with contextlib.closing(sqlite3.connect(folder / "artifacts" / "mlflow.db")) as database:
        (run,) = database.execute("select run_uuid, name, status from runs").fetchall()
        steps = database.execute("select step from metrics where key = 'loss' order by step").fetchall()
    known = json.loads((Path(result["checkpoints_dir"]) / "tracking.json").read_text())
    assert run == (known["mlflow_id"], "task-1", "FINISHED")
    assert [step for (step,) in steps] == [1, 2, 3]


def test_a_run_that_fails_ends_as_failed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra 'mlflow'")
    fails = spec("sft", report_to="mlflow", learning_rate=1e30, max_steps=20)
    outcome = run(tmp_path, "sft", fails, limits={"trackers": ["mlflow"]})
    assert not outcome.ok
    with contextlib.closing(sqlite3.connect(tmp_path / "results/task-1/artifacts/mlflow.db")) as database:
        assert database.execute("select status from runs").fetchall() == [("FAILED",)]


def test_wandb_has_written_everything_when_the_task_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    limits = {"limits": {"trackers": ["wandb"]}}
    assert (
        "spec.training.report_to: wandb: No API key"
        in run(tmp_path, "sft", spec("sft", report_to="wandb"), task_id="refused", **limits).message
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    with contextlib.closing(Zygote(tmp_path / "zygote.log", training_tasks.hub())) as own:
        monkeypatch.setattr(training_tasks, "zygote", lambda: own)
        result = train(tmp_path, "sft", spec("sft", report_to="wandb"), **limits)
    (file,) = Path(result["output_dir"]).glob("artifacts/wandb/offline-run-*-task-1/run-task-1.wandb")
    assert b"train/loss" in file.read_bytes()
