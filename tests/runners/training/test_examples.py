"""The example of each training type in conf/tasks runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl", reason="needs the extra 'training'")

from tests.kit.paths import CONF
from tests.kit.training_tasks import RUNNERS, train

FOLDER = CONF / "tasks"


@pytest.mark.parametrize("task_type", RUNNERS)
def test_the_example_runs(tmp_path: Path, task_type: str) -> None:
    document = yaml.safe_load((FOLDER / f"{task_type.replace('_', '-')}.yaml").read_text())
    assert document["spec"]["taskType"] == task_type
    result = train(tmp_path, task_type, document["spec"])
    folder = Path(result.get("final_model_path") or result["final_lora_path"])
    assert any(folder.glob("*.safetensors"))
    assert result["metrics"]["final_loss"] is not None
