"""`data.type: dataset`: whatever the `datasets` library loads, from the hub, a folder or a file."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context, MissingDependency, RunnerError
from runners.data.cache import DATASETS, library_folder
from runners.data.download import fetch
from runners.data.prompts import Items
from runners.data.shard import Shard
from runners.data.tables import Columns, to_items
from runners.models.sources import check_no_revision, local_path

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_SPLIT_NAME = re.compile(r"[\w.-]+")


class HubData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """spec.data of type dataset"""

    type: str
    url: Annotated[str, Meta(min_length=1)]
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    column: str | None = None
    shuffle: bool | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    buffer_size: Annotated[int, Meta(ge=1)] | None = None
    """Shuffle within a window of so many rows, as a stream would be, and not over the whole."""
    trust_remote_code: bool | None = None
    metadata_columns: tuple[str, ...] | dict[str, str] | None = None
    metadata_include_all: bool | None = None


def load_hub(ctx: Context, section: dict[str, Any], shard: Shard | None, spec: dict[str, Any], where: str) -> Items:  # noqa: ARG001
    """See `sources.load_items`. Shuffles first, then shards."""
    data = ctx.check(section, HubData, where)
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependency("datasets", "training")
    if data.trust_remote_code:
        ctx.log.warning("%s.trust_remote_code: this version of datasets runs no code of a dataset's", where)
    rows = open_dataset(ctx, data, where)
    columns = Columns(data.column or "text", data.metadata_columns, bool(data.metadata_include_all), where)
    columns.check(rows.column_names)
    rows = rows.select_columns(columns.wanted(rows.column_names))
    count = len(rows)
    if data.shuffle:
        seed = 42 if data.seed is None else data.seed
        if data.buffer_size is not None:
            rows = rows.to_iterable_dataset().shuffle(seed=seed, buffer_size=data.buffer_size)
        else:
            rows = rows.shuffle(seed=seed, keep_in_memory=True)  # and not into a folder that is the user's own
    mine = shard.rows(count) if shard is not None else range(count)
    # A shard of a large dataset reads no more than its own rows, where they can be chosen.
    chosen = rows.select(mine) if hasattr(rows, "select") else itertools.islice(rows, mine.start, mine.stop, mine.step)
    return to_items(ctx, ((f"{where} row {i}", row) for i, row in zip(mine, chosen, strict=True)), columns)


def open_dataset(ctx: Context, data: HubData, where: str) -> Any:
    """One split of the dataset.

    Raises:
        BadRequest: there is no such dataset, configuration or split, or its files are damaged.
        RunnerError: the hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    cache_dir = str(library_folder(ctx, DATASETS, data.url))
    try:
        rows = _load(ctx, data, where, cache_dir)
    except datasets.exceptions.DatasetGenerationError as error:
        raise BadRequest(f"{where}.url: {data.url!r} cannot be read: {_line(error.__cause__ or error)}") from error
    except ConnectionError as error:
        raise RunnerError(
            f"{where}.url: the dataset hub cannot be reached, and {data.url!r} is no file or folder of this node"
        ) from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise BadRequest(f"{where}.url: no dataset {data.url!r}: {_line(error)}") from error
    except datasets.exceptions.UnexpectedSplitsError as error:
        raise BadRequest(f"{where}.split: {_line(error)}") from error
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        field = "split" if "split" in str(error).lower() else "name" if "config" in str(error).lower() else "url"
        raise BadRequest(f"{where}.{field}: {_line(error)}") from error
    if isinstance(rows, Mapping):
        return _only_split(rows, data, where)
    return rows


def _load(ctx: Context, data: HubData, where: str, cache_dir: str) -> Any:
    import datasets

    if data.url.startswith(("http://", "https://")):
        file, suffix = fetch(ctx, data.url, f"{where}.url").path, Path(data.url.split("?")[0]).suffix.lower()
        return _load_file(data, file, suffix, where, cache_dir)
    path = local_path(ctx, data.url)
    if path.is_file():
        return _load_file(data, path, path.suffix.lower(), where, cache_dir)
    if path.is_dir():
        check_no_revision(data.revision, f"{where}.url")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        if data.name is not None:
            raise BadRequest(f"{where}.name: what save_to_disk wrote has no configurations; leave it out")
        return _slice_saved(datasets.load_from_disk(str(path)), data, where)
    name = str(path) if path.is_dir() else data.url
    if not path.is_dir() and (data.url.startswith(("/", "./", "../", "~")) or data.url.count("/") > 1):
        raise BadRequest(f"{where}.url: there is no file or folder {data.url!r} on this node")
    return datasets.load_dataset(name, name=data.name, split=data.split, revision=data.revision, cache_dir=cache_dir)


def _load_file(data: HubData, file: Path, suffix: str, where: str, cache_dir: str) -> Any:
    import datasets

    if data.name is not None:
        raise BadRequest(f"{where}.name: a single file has no configurations; leave it out")
    check_no_revision(data.revision, f"{where}.url")
    if suffix not in FORMATS:
        raise BadRequest(f"{where}.url: no format is known for files ending in {suffix!r}; known: {', '.join(FORMATS)}")
    # A file has one split, and datasets calls it train.
    return datasets.load_dataset(FORMATS[suffix], data_files=str(file), split=data.split, cache_dir=cache_dir)


def _slice_saved(saved: Any, data: HubData, where: str) -> Any:
    """A split, or a part of one, of what `save_to_disk` wrote."""
    import datasets

    splits = saved if isinstance(saved, Mapping) else {str(saved.split or "train"): saved}
    if data.split is None:
        return splits
    match = _SPLIT_NAME.match(data.split)
    if match is None or match[0] not in splits:
        raise BadRequest(f"{where}.split: no split {data.split!r}; there are: {', '.join(splits)}")
    name = match[0]
    sizes = {each: len(splits[each]) for each in splits}
    parts = datasets.ReadInstruction.from_spec(data.split).to_absolute(sizes)
    if any(part.splitname != name for part in parts):
        raise BadRequest(f"{where}.split: {data.split!r} joins splits, which a saved dataset cannot; use one of them")
    return splits[name].select([row for part in parts for row in range(part.from_, part.to)])


def _only_split(splits: Any, data: HubData, where: str) -> Any:
    """The split that is meant where the task names none: train, else the only one."""
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise BadRequest(f"{where}.split: missing; {data.url!r} has: {', '.join(splits)}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
