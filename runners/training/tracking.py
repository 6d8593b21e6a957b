"""Experiment trackers: where a run's numbers go besides the result. A run that is resumed goes on in its tracker's run.

TensorBoard writes into the task's artifacts. The others send to a server, so the node has to allow them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from runners.api import BadRequest, Context, MissingDependency
from runners.training.arguments import checkpoints_dir
from runners.training.checkpoints import Start
from runners.training.plan import Plan

LIMIT = "trackers"
"""The node's setting: the trackers with a server that a task may name."""
LOCAL = "tensorboard"
RUN_FILE = "tracking.json"
"""Beside the checkpoints: the run's name, and its id in each tracker."""
PROJECT = "flowmesh"


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """The trackers of one run."""

    names: tuple[str, ...]
    run: str
    """Its name, and its id where the tracker lets us choose one."""
    file: Path
    mlflow_id: str | None = None
    """MLflow's own id of the run, known once it has begun."""

    def init_kwargs(self) -> dict[str, dict[str, Any]]:
        """For Accelerate's trackers, what Transformers' callbacks take from the environment."""
        return {
            "wandb": {"id": self.run, "resume": "allow", "name": self.run},
            "mlflow": {"run_id": self.mlflow_id, "run_name": self.run},
            "trackio": {"name": self.run, "resume": "allow"},
        }

    def note(self) -> None:
        """Keep what a resumed run needs. Call it once the trackers have begun."""
        found = {"run": self.run, "mlflow_id": self.mlflow_id}
        if "mlflow" in self.names:
            import mlflow  # type: ignore[import-not-found,unused-ignore]

            active = mlflow.active_run()
            found["mlflow_id"] = self.mlflow_id if active is None else active.info.run_id
        self.file.write_text(json.dumps(found))


class NoteCallback(TrainerCallback):
    """Keeps a run's ids once Transformers' own callbacks have begun it."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._tracking.note()


def begin(plan: Plan, ctx: Context, start: Start) -> Tracking:
    """The run's trackers, with the environment that they read.

    Raises:
        BadRequest: the node does not allow one.
        MissingDependency: its library is missing.
    """
    names = plan.training.trackers
    allowed = ctx.job.limits.get(LIMIT) or []
    for name in names:
        if name != LOCAL and name not in allowed:
            raise BadRequest(
                f"spec.training.report_to: this node does not allow {name!r}; its setting [runners] {LIMIT} lists "
                "what it does"
            )
        if importlib.util.find_spec(name) is None:
            raise MissingDependency(f"{name} (spec.training.report_to)", name)
    known = _known(start)
    tracking = Tracking(
        names=names,
        run=known.get("run") or ctx.task_id,
        file=checkpoints_dir(ctx) / RUN_FILE,
        mlflow_id=known.get("mlflow_id"),
    )
    if names:
        ctx.artifacts_dir.mkdir(parents=True, exist_ok=True)
        _set_environment(tracking, ctx.artifacts_dir)
    return tracking


def _known(start: Start) -> dict[str, Any]:
    """What the run that is gone on from left."""
    if start.resume is None:
        return {}
    try:
        found = json.loads((start.resume.parent / RUN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _set_environment(tracking: Tracking, folder: Path) -> None:
    """Local files of a tracker go to the task's artifacts. The server is set by the node, or by the task's `env`."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / LOCAL)
    os.environ["WANDB_RUN_ID"] = tracking.run
    os.environ["WANDB_RESUME"] = "allow"
    defaults = {
        "WANDB_DIR": str(folder),
        "WANDB_PROJECT": PROJECT,
        "WANDB_SILENT": "true",
        "MLFLOW_EXPERIMENT_NAME": PROJECT,
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    if "MLFLOW_TRACKING_URI" not in os.environ:
        defaults["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    if tracking.mlflow_id is not None:
        os.environ["MLFLOW_RUN_ID"] = tracking.mlflow_id
    os.environ.update({name: os.environ.get(name, value) for name, value in defaults.items()})
