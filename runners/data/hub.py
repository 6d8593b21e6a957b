"""`data.type: dataset`: a dataset of the hub, a local folder or a file.

`datasets` selects the files of a folder; `readers` then reads text files and Parquet. `datasets` itself reads only the
hub, the folders of `save_to_disk`, and folders of other formats such as images.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from msgspec import Meta

from runners.api import BadRequest, Context, MissingDependency, RunnerError
from runners.data import patterns
from runners.data.cache import DATASETS, library_folder
from runners.data.cards import check_builder, check_folder_card, check_hub_card, check_saved
from runners.data.config_split import as_split, builder_of
from runners.data.download import fetch
from runners.data.local import Table, chosen_split, matching, only_split
from runners.data.order import Rows, items_of, order_of
from runners.data.prompts import Items
from runners.data.readers import FORMATS, File, format_of
from runners.data.reading import Reach
from runners.data.shard import Shard
from runners.data.tables import to_items
from runners.models.sources import check_no_revision, local_folder, local_path

READ_HERE = frozenset({"csv", "json", "text", "parquet"})
"""The builders of `datasets` whose files are read by `readers`."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HubData(Rows, frozen=True, kw_only=True):
    """spec.data of type dataset"""

    type: str
    url: Annotated[str, Meta(min_length=1)]
    """A hub id; a local folder, file or pattern; or the http(s) URL of a file."""
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    trust_remote_code: bool | None = None


def load_hub(ctx: Context, section: dict[str, Any], shard: Shard | None, spec: dict[str, Any], where: str) -> Items:  # noqa: ARG001
    """See `sources.load_items`. Shuffles first, then shards."""
    data = ctx.check(section, HubData, where)
    if importlib.util.find_spec("datasets") is None:
        raise MissingDependency("datasets")
    if data.trust_remote_code:
        ctx.log.warning("%s.trust_remote_code: this version of datasets runs no code of a dataset's", where)
    rows = open_dataset(ctx, data, where)
    if isinstance(rows, Table):
        return items_of(ctx, rows, data, shard, where)
    columns = data.columns(where)
    columns.check(rows.column_names)
    rows = rows.select_columns(columns.wanted(rows.column_names))
    order = order_of(ctx, len(rows), data, shard, where)
    # A shard of a large dataset reads no more than its own rows.
    return to_items(ctx, ((f"{where} row {i}", row) for i, row in zip(order, rows.select(order), strict=True)), columns)


def open_dataset(ctx: Context, data: HubData, where: str, *, called: str | None = None) -> Any:
    """One split of the dataset, or a slice of one: a `Table` of local files, else a `datasets.Dataset`.

    Args:
        called: the name of the file in errors about rows; default: the field that names it.

    Raises:
        BadRequest: there is no such dataset, configuration or split, or its files are damaged.
        RunnerError: the hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = _local(ctx, data, where, called or f"{where}.url")
        if rows is None:
            rows = _of_hub(ctx, data, where)
    except RunnerError:
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        kind = type(error.__cause__ or error).__name__  # its text may show content
        raise BadRequest(f"{where}.url: {data.url!r} cannot be read ({kind}); see the task's log") from error
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
        rows = rows[only_split(list(rows), data.url, where)]
    return rows if isinstance(rows, Table) else _undecoded(rows)


def _of_hub(ctx: Context, data: HubData, where: str) -> Any:
    """A dataset of the hub, whose files all lie in its repository."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    field = f"{where}.url"
    if not _HUB_ID.fullmatch(data.url) or data.url in _PACKAGED_DATASETS_MODULES:
        raise BadRequest(f"{field}: {data.url!r} is neither a file or folder of this node, nor a hub id (owner/name)")
    check_hub_card(data.url, data.revision, field)
    cache_dir = str(library_folder(ctx, DATASETS, data.url))
    build = functools.partial(datasets.load_dataset_builder, data.url, revision=data.revision, cache_dir=cache_dir)
    builder, data = builder_of(ctx, build, data, f"{where}.name")
    check_builder(builder, field, data.url, root=f"hf://datasets/{data.url}@")
    builder.download_and_prepare()
    return builder.as_dataset(split=data.split)


def _undecoded(rows: Any) -> Any:
    """`rows` with media as they are stored: decoding would open the files that a row names."""
    features = {name: _without_decoding(feature) for name, feature in rows.features.items()}
    changed = {name: feature for name, feature in features.items() if feature != rows.features[name]}
    return rows.cast(type(rows.features)(features)) if changed else rows


def _without_decoding(feature: Any) -> Any:
    import datasets

    match feature:
        case dict():
            return {name: _without_decoding(each) for name, each in feature.items()}
        case list():
            return [_without_decoding(each) for each in feature]
        case _ if getattr(feature, "decode", None) is True and not isinstance(feature, datasets.Json):
            return dataclasses.replace(feature, decode=False)
        case _ if hasattr(feature, "feature"):
            return dataclasses.replace(feature, feature=_without_decoding(feature.feature))
    return feature


def _local(ctx: Context, data: HubData, where: str, called: str) -> Any:
    """The files that `data.url` names on this node or at a URL; None: it can only be a hub id."""
    import datasets

    field = f"{where}.url"
    if data.url.startswith(("http://", "https://")):
        file = _file(fetch(ctx, data.url, field, by_date=False).path, urlsplit(data.url).path, field, called)
        return _of_files([file], data, where)
    reach = ctx.reach
    if several := matching(ctx, data.url, field):
        files = [_file(each, each.name, field, f"{called} {each.name}", reach) for each in several]
        return _of_files(files, data, where)
    path = local_path(ctx, data.url, field)
    if path.is_file():
        return _of_files([_file(path, path.name, field, called, reach)], data, where)
    if not path.is_dir():
        if data.url.startswith(("/", "./", "../", "~")) or data.url.count("/") > 1:
            raise BadRequest(f"{field}: there is no file or folder {data.url!r} on this node")
        return None
    check_no_revision(data.revision, field)
    local_folder(ctx, path, data.url, field)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        check_saved(path, field, data.url)
        saved = datasets.load_from_disk(str(path))
        if data.name is not None:
            found = as_split(ctx, data, saved if isinstance(saved, Mapping) else (), f"{where}.name")
            if found is None:
                raise BadRequest(f"{where}.name: what save_to_disk wrote has no configurations; leave it out")
            data = found
        return _slice_saved(saved, data, where)
    check_folder_card(path, field, data.url)
    # Cached in the attempt's own folder: the library does not notice a file rewritten with the same size and time.
    cache_dir = str(ctx.tmp_dir / "datasets")
    build = functools.partial(datasets.load_dataset_builder, str(path), cache_dir=cache_dir)
    builder, data = builder_of(ctx, build, data, f"{where}.name")
    check_builder(builder, field, data.url, root=f"{path}/")
    if builder.name not in READ_HERE:
        builder.download_and_prepare()
        return builder.as_dataset(split=data.split)
    _check_options(builder.config, data, where)
    splits = {
        str(name): _files_of(files, path, builder, called, reach) for name, files in builder.config.data_files.items()
    }
    _log_unread(ctx, path, splits, data, where)
    return chosen_split(splits, data.split, data.url, where)


def _of_files(files: list[File], data: HubData, where: str) -> Table:
    if data.name is not None:
        raise BadRequest(f"{where}.name: files have no configurations; leave it out")
    check_no_revision(data.revision, f"{where}.url")
    return chosen_split(
        {"train": files}, data.split, data.url, where
    )  # the name that datasets gives to the split of a file


def _file(path: Path, name: str, where: str, called: str, reach: Reach | None = None) -> File:
    """A file with the format that its name says."""
    found = format_of(name)
    if found is None:
        suffix = Path(name).suffix.lower()
        raise BadRequest(f"{where}: no format is known for files ending in {suffix!r}; known: {', '.join(FORMATS)}")
    return File(path=path, format=found, where=called, reach=reach)


def _files_of(files: Any, folder: Path, builder: Any, called: str, reach: Reach) -> list[File]:
    """The files that `datasets` selected for a split, each with its format."""
    found = []
    for each in map(Path, files):
        kind = format_of(each.name) or {"json": "json", "csv": "csv"}.get(builder.name, builder.name)
        own = getattr(builder.config, "sep", None)
        found.append(
            File(
                path=each,
                format=kind,
                where=f"{called} {each.relative_to(folder) if each.is_relative_to(folder) else each.name}",
                delimiter=own if kind == "csv" and own not in (None, ",", "\t") else None,
                reach=reach,
            )
        )
    return found


def _check_options(config: Any, data: HubData, where: str) -> None:
    """Raises BadRequest if a folder's README.md sets options of its files that have no effect here."""
    known = {"name", "version", "description", "data_dir", "data_files", "sep", "delimiter"}
    for field in dataclasses.fields(config):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in known and getattr(config, field.name) != default:
            raise BadRequest(
                f"{where}.name: the README.md of {data.url!r} sets {field.name} for its files, which has no effect "
                "here; name the files themselves, or remove it"
            )


def _log_unread(ctx: Context, folder: Path, splits: Mapping[str, list[File]], data: HubData, where: str) -> None:
    """Log the table files that are not read, because `datasets` selects the files of one format only."""
    taken = {file.path for files in splits.values() for file in files}
    rest = [each for each in _table_files(folder) if each not in taken]
    if rest and data.name is None:
        ctx.log.warning(
            "files not read dataset=%s count=%d first=%s where=%s", data.url, len(rest), rest[0].name, f"{where}.url"
        )


def _table_files(folder: Path) -> Iterator[Path]:
    named = sorted(patterns.found(folder / "**" / "*"))
    return (each for each in named if format_of(each.name) in FORMATS.values() and each.is_file())


def _slice_saved(saved: Any, data: HubData, where: str) -> Any:
    """A split of a `save_to_disk` folder, or a slice of one."""
    import datasets

    splits = saved if isinstance(saved, Mapping) else {str(saved.split or "train"): saved}
    if data.split is None:
        return splits
    match = re.match(r"[\w.-]+", data.split)
    if match is None or match[0] not in splits:
        raise BadRequest(f"{where}.split: no split {data.split!r}; there are: {', '.join(splits)}")
    name = match[0]
    sizes = {each: len(splits[each]) for each in splits}
    parts = datasets.ReadInstruction.from_spec(data.split).to_absolute(sizes)
    if any(part.splitname != name for part in parts):
        raise BadRequest(f"{where}.split: {data.split!r} joins splits, which a saved dataset cannot; use one of them")
    return splits[name].select([row for part in parts for row in range(part.from_, part.to)])


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
