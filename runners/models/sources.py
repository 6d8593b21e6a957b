"""Locates a task's model, and turns loading errors into one line. Used by inference, training and RAG."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from flowmesh.validation.s3_url import is_s3
from runners.api import BadRequest, Context, MissingDependency, RunnerError
from runners.data import s3
from runners.data.download import fetch
from runners.data.reading import Refused
from runners.models import builtin
from runners.models.contents import check_names


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A model that `from_pretrained` can load."""

    path: str
    """A folder of this node, or a hub id."""
    revision: str | None
    shown: str
    """The model's name in the result and in errors."""
    where: str
    """The document's field that named it, for errors."""
    tokenizer: str | None = None
    """Path of the tokenizer; None: `path`."""

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def folders(self) -> list[Path]:
        """Where the files of model and tokenizer lie on this node; of a hub id, where the hub's cache has them."""
        found = (_here(path, self.revision) for path in dict.fromkeys((self.path, self.tokenizer or self.path)))
        return [folder for folder in found if folder is not None]


def _here(path: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        config = try_to_load_from_cache(path, "config.json", revision=revision)
    except errors.HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def local_path(ctx: Context, text: str, where: str) -> Path:
    """A document's path as an absolute one. Relative paths start at the working directory, else at RESULTS_DIR.

    What an s3:// address names is downloaded first.

    A folder's links are resolved. A file is judged again when it is read: see `Reach.opened`.

    Args:
        where: the field, for errors.

    Raises:
        BadRequest: it leads outside of what documents may read.
        RunnerError: S3 cannot be reached.
    """
    if is_s3(text):
        return s3.path_of(ctx, text, where, fetch)
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - Path's raises for an unknown user
    if not path.is_absolute() and not os.path.exists(path):  # noqa: PTH110 - Path.exists raises where it may not look
        below_results = ctx.results_dir / path
        if os.path.exists(below_results):  # noqa: PTH110
            path = below_results
        elif ".." not in path.parts:
            return path.absolute()  # the name of something else, such as a hub id
    try:
        found = ctx.reach.find(path)
    except Refused as error:
        raise BadRequest(f"{where}: {text!r} {error}") from None
    return found if found is not None and found.is_dir() else path.absolute()


def local_folder(ctx: Context, folder: Path, shown: str, where: str) -> Path:
    """`folder`, after its content was judged: a library will open what it finds in it.

    Raises:
        BadRequest: a link in it, or a name in its files, leads outside of what documents may read.
    """
    try:
        ctx.reach.check_folder(folder, ctx.check_cancelled)
    except Refused as error:
        raise BadRequest(f"{where}: {shown!r} {error}") from None
    check_names(folder, where, ctx)
    return folder


def resolve_identifier(ctx: Context, identifier: str, revision: str | None, where: str) -> Source:
    """Resolve `model.source`: built in, a local folder or a hub id.

    Raises:
        BadRequest: a path without a model, or a revision of a local model.
    """
    if identifier.startswith(builtin.PREFIX):
        folder = builtin.resolve(identifier, ctx.cache_dir, where)
        check_no_revision(revision, where)
        return Source(path=str(folder), revision=None, shown=identifier, where=where)
    path = local_path(ctx, identifier, where)
    if path.is_dir():
        check_model_folder(local_folder(ctx, path, identifier, where), where)
        check_no_revision(revision, where)
        return Source(path=str(path), revision=None, shown=identifier, where=where)
    if path.exists():
        raise BadRequest(f"{where}: {identifier!r} is a file; give the folder that holds config.json and the weights")
    if identifier.startswith(("/", "./", "../", "~")) or identifier.count("/") > 1:
        raise BadRequest(f"{where}: there is no folder {identifier!r} on this node; give an existing one, or a hub id")
    return Source(path=identifier, revision=revision, shown=identifier, where=where)


def check_no_revision(revision: str | None, where: str) -> None:
    """Raises BadRequest for a revision of something local. `main` is accepted: it means the same as none."""
    if revision not in (None, "main"):
        raise BadRequest(
            f"{where.removesuffix('.identifier').removesuffix('.url')}.revision: {revision!r}, but local files "
            "have no revisions; leave it out"
        )


def check_model_folder(folder: Path, where: str) -> None:
    """Raises BadRequest if `folder` contains no model."""
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise BadRequest(
            f"{where}: {str(folder)!r} holds an adapter and no whole model; "
            "name its base model here and the adapter in spec.model.adapters"
        )
    raise BadRequest(f"{where}: {str(folder)!r} has no config.json, so it is not a model folder")


@contextlib.contextmanager
def loading(source: Source) -> Iterator[None]:
    """Turn what `from_pretrained` raises into a one-line error about `source`.

    Raises:
        BadRequest: no such model or revision, or the folder's contents cannot be loaded.
        RunnerError: the hub is unreachable.
    """
    from huggingface_hub import errors as hub

    try:
        yield
    except ImportError as error:
        raise MissingDependency.of(error, source.where) from error
    except (RunnerError, MemoryError):
        raise
    except Exception as error:  # each weight format raises its own types
        if "out of memory" in str(error).lower():
            raise
        causes = list(_causes(error))
        name, where = source.shown, source.where
        if _any(causes, hub.GatedRepoError):
            raise BadRequest(f"{where}: {name!r} is gated, and this node's hub token may not read it") from error
        if _any(causes, hub.RevisionNotFoundError):
            raise BadRequest(f"{where}: {name!r} has no revision {source.revision!r} on the hub") from error
        if _any(causes, hub.RepositoryNotFoundError):
            raise BadRequest(f"{where}: there is no model {name!r} on the hub, or it is private") from error
        if _any(causes, hub.HFValidationError):
            raise BadRequest(f"{where}: {name!r} is neither a folder of this node nor a hub id (owner/name)") from error
        if _any(causes, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
            if _hub_is_off():
                raise BadRequest(
                    f"{where}: {name!r} is not in this node's model cache, and the node works offline (HF_HUB_OFFLINE)"
                ) from error
            raise RunnerError(
                f"{where}: the model hub cannot be reached, and {name!r} is not in this node's cache"
            ) from error
        raise BadRequest(f"{where}: {name!r} cannot be loaded: {_first_line(error)}") from error


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _any(causes: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 300 else f"{text[:299]}…"
