"""Downloads data and checkpoint to this node before any rank is forked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from runners.api import BadRequest, Context, Preparation, RunnerError
from runners.data import download
from runners.models.checkpoints import Loaded, load_checkpoint
from runners.models.sources import local_path
from runners.training.checkpoints import start_of
from runners.training.plan import Plan, read
from runners.training.settings import Jsonl


@dataclass(frozen=True)
class JsonlFile:
    path: Path
    name: str
    """Its name in errors."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Local paths."""

    jsonl: JsonlFile | None = None
    eval_jsonl: JsonlFile | None = None
    """The file of `data.eval`."""
    checkpoint: Loaded | None = None
    """Result of `checkpoint.load`."""


def fetch(plan: Plan, ctx: Context) -> Inputs:
    """Fetch everything.

    Raises:
        BadRequest, RunnerError: something cannot be had; says what was tried.
        Cancelled: the node asked the task to stop.
    """
    given = plan.data.jsonl_source()
    eval_given = None if plan.eval_data is None else plan.eval_data.jsonl_source()
    return Inputs(
        jsonl=None if given is None else fetch_jsonl(given, ctx),
        eval_jsonl=None if eval_given is None else fetch_jsonl(eval_given, ctx, "spec.data.eval.jsonl"),
        checkpoint=None if plan.checkpoint is None else load_checkpoint(ctx, plan.checkpoint),
    )


def parts_ahead(task_type: str, ctx: Context) -> list[Preparation]:
    """What a training task can do before it has its slot; see `Runner.ahead`."""
    plan = read(task_type, ctx)
    given = plan.data.jsonl_source()
    eval_given = None if plan.eval_data is None else plan.eval_data.jsonl_source()

    def start() -> list[Path]:
        found = start_of(plan, ctx, None if plan.checkpoint is None else load_checkpoint(ctx, plan.checkpoint))
        return [*found.weights.folders, *(folder for folder in (found.adapter, found.resume) if folder is not None)]

    return [
        start,
        lambda: [] if given is None else [fetch_jsonl(given, ctx).path],
        lambda: [] if eval_given is None else [fetch_jsonl(eval_given, ctx, "spec.data.eval.jsonl").path],
    ]


def fetch_jsonl(given: Jsonl, ctx: Context, where: str = "spec.data.jsonl") -> JsonlFile:
    """The first of download_url, url, path and worker_path that can be read, as a local file.

    Raises:
        BadRequest: none can be; says why not, for each that is given.
    """
    failures: list[RunnerError | str] = []
    for field in ("download_url", "url"):
        url = getattr(given, field)
        if url is not None:
            try:
                path = _download(url, f"{where}.{field}", given, ctx)
                return JsonlFile(path, Path(urlsplit(url).path).name or url)
            except RunnerError as error:
                failures.append(error)
    for field in ("path", "worker_path"):
        text = getattr(given, field)
        if text is not None:
            if "://" in text:  # `jsonl_export.path` of a stage that delivered over http
                try:
                    path = _download(text, f"{where}.{field}", given, ctx)
                    return JsonlFile(path, Path(urlsplit(text).path).name or text)
                except RunnerError as error:
                    failures.append(error)
                    continue
            path = local_path(ctx, text, f"{where}.{field}")
            if path.is_file():
                return JsonlFile(path, path.name)
            failures.append(f"{where}.{field}: there is no file {text!r} on this node")
    if not failures:
        raise BadRequest(f"{where}: gives no file; name one as path, url, download_url or worker_path")
    if len(failures) == 1 and isinstance(failures[0], RunnerError):
        raise failures[0]
    raise BadRequest("; ".join(map(str, failures)))


def _download(url: str, where: str, given: Jsonl, ctx: Context) -> Path:
    if url.startswith("file://") or "://" not in url:
        raise BadRequest(f"{where}: {url!r} is no http or https URL; a file of this node is a path")
    return download.fetch(ctx, url, where, headers=given.headers, timeout_s=given.timeout_s, by_date=False).path
