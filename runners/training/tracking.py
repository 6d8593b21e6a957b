"""Experiment trackers. A resumed run continues its run in the tracker.

TensorBoard writes to the task's artifacts. The others send to a server, and need the node's permission.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from runners.api import BadRequest, Context, MissingDependency
from runners.training.arguments import checkpoints_dir
from runners.training.checkpoints import Start
from runners.training.plan import Plan

LIMIT = "trackers"
"""The node's setting: trackers with a server that tasks may use."""
LOCAL = "tensorboard"
RUN_FILE = "tracking.json"
"""File beside the checkpoints with the run's name and ids."""
PROJECT = "flowmesh"
_MLFLOW_SERVER = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """The trackers of one run."""

    names: tuple[str, ...]
    run: str
    """Name of the run, and its id where the tracker accepts one."""
    file: Path
    mlflow_id: str | None = None
    """MLflow's id of the run; None before its first start."""

    def init_kwargs(self) -> dict[str, dict[str, Any]]:
        """Arguments of Accelerate's trackers. Transformers' callbacks read the same from the environment."""
        return {
            "wandb": {"id": self.run, "resume": "allow", "name": self.run},
            "mlflow": {"run_id": self.mlflow_id, "run_name": self.run},
            "trackio": {"name": self.run, "resume": "allow"},
        }

    def note(self) -> None:
        """Write the ids that a resumed run needs. Call it after the trackers have started."""
        found = {"run": self.run, "mlflow_id": self.mlflow_id}
        if "mlflow" in self.names:
            import mlflow  # type: ignore[import-not-found,unused-ignore]

            active = mlflow.active_run()
            found["mlflow_id"] = self.mlflow_id if active is None else active.info.run_id
        self.file.write_text(json.dumps(found))

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """End this process's runs with the training inside: a tracker that sends in the background has sent all then.

        A task's process ends without the libraries' exit handlers, and W&B would lose what it has not sent yet.
        """
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the training's own error is the task's
                self._end(failed=True)
            raise
        self._end(failed=False)

    def _end(self, *, failed: bool) -> None:
        """Only the rank that reports has runs."""
        if "wandb" in self.names:
            import wandb  # type: ignore[import-not-found,unused-ignore]

            if wandb.run is not None:
                wandb.finish(exit_code=int(failed))
        if "mlflow" in self.names:
            import mlflow

            if mlflow.active_run() is not None:
                mlflow.end_run(status="FAILED" if failed else "FINISHED")


class NoteCallback(TrainerCallback):
    """Writes the run's ids after Transformers' callbacks have started it."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._tracking.note()


def begin(plan: Plan, ctx: Context, start: Start) -> Tracking:
    """Check the task's trackers, and set the environment variables that they read.

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
            raise MissingDependency(name, "spec.training.report_to")
    if "mlflow" in names and _MLFLOW_SERVER not in os.environ:  # a database in the artifacts
        for library in ("sqlalchemy", "alembic"):
            if importlib.util.find_spec(library) is None:
                raise MissingDependency(library, "spec.training.report_to: mlflow", extra="mlflow")
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
    """Ids of the run to resume."""
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
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    if _MLFLOW_SERVER not in os.environ:
        defaults[_MLFLOW_SERVER] = f"sqlite:///{folder / 'mlflow.db'}"
    if tracking.mlflow_id is not None:
        os.environ["MLFLOW_RUN_ID"] = tracking.mlflow_id
    os.environ.update({name: os.environ.get(name, value) for name, value in defaults.items()})
    _move_trackio(Path(os.environ["TRACKIO_DIR"]))


def _move_trackio(folder: Path) -> None:
    """Set trackio's folder where it was imported before, in the fork server: it reads TRACKIO_DIR at its import."""
    places = {"TRACKIO_DIR": folder, "MEDIA_DIR": folder / "media", "ARTIFACTS_DIR": folder / "artifacts"}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trackio":
            for constant, place in places.items():
                if isinstance(vars(module).get(constant), Path):
                    setattr(module, constant, place)
