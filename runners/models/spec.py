"""The document's sections about weights, shared by inference and training.

Field names are those of docs/tasks.md. Null means absent.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Headers = dict[str, str]
ArchiveFormat = Literal["auto", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip", "none"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: unknown fields are errors."""


class ModelSource(Section, frozen=True):
    """spec.model.source"""

    type: Literal["huggingface"] | None = None
    identifier: Annotated[str, Meta(min_length=1)] | None = None
    """A hub id, a local folder, or `builtin:tiny-llama`."""
    revision: str | None = None
    trust_remote_code: bool | None = None
    """As in model.transformers and model.vllm."""


class Adapter(Section, frozen=True, rename={"task_id": "taskId", "timeout_s": "timeoutSec"}):
    """One of spec.model.adapters"""

    type: Literal["lora"] | None = None
    name: str | None = None
    id: Annotated[int, Meta(ge=1)] | str | None = None
    path: str | None = None
    """A folder or an archive of this node, or `builtin:tiny-lora`."""
    url: str | None = None
    task_id: str | None = None
    headers: Headers | None = None
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    archive_format: ArchiveFormat | None = None
    scale: float | None = None
    apply: Literal["runtime", "merge"] | None = None


class CheckpointLoad(Section, frozen=True, rename={"timeout_s": "timeoutSec"}):
    """spec.checkpoint.load"""

    type: Literal["local", "http"] | None = None
    path: str | None = None
    uri: str | None = None
    url: str | None = None
    taskId: str | None = None
    task_id: str | None = None
    filename: str | None = None
    base_url: str | None = None
    headers: Headers | None = None
    timeout_s: Annotated[float, Meta(gt=0)] | None = None
    archive_format: ArchiveFormat | None = None
    subdir: str | None = None


class Checkpoint(Section, frozen=True):
    """spec.checkpoint"""

    load: CheckpointLoad | None = None
