"""What a dataset says about its own files, checked before `datasets` believes it.

A README.md names files by patterns, which `datasets` takes from anywhere: other folders, other servers, chains of
protocols. Here they stay inside the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from runners.api import BadRequest

CARDS = ("README.md", ".huggingface.yaml")
BUILDERS = frozenset({
    "arrow", "audiofolder", "cache", "conll", "csv", "eval", "fasta", "fastq", "genbank", "imagefolder", "json",
    "meshfolder", "niftifolder", "parquet", "pdffolder", "text", "tsfile", "videofolder", "webdataset", "xml",
})  # fmt: skip
"""Builders of `datasets` whose formats hold data only. Not: formats that are code (pandas' pickles), or that name other
files and servers (hdf5, lance, sql …)."""
_NAMING = ("data_files", "data_dir", "path")


def check_card(text: str, where: str, shown: str) -> None:
    """Raises BadRequest where the head of a README.md, or a YAML file, names files outside of its dataset."""
    import yaml

    head = text.split("---", 2)[1] if text.lstrip().startswith("---") and text.count("---") > 1 else text
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return  # `datasets` reports it
    for name in _named(found.get("configs") if isinstance(found, dict) else None):
        if not inside(name):
            raise BadRequest(f"{where}: the README.md of {shown!r} names files outside of the dataset; remove them")


def check_folder_card(folder: Path, where: str, shown: str) -> None:
    """`check_card` for a dataset in a folder whose links were judged."""
    for name in CARDS:
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            check_card(text if name.endswith(".md") else f"---\n{text}\n---", where, shown)


def check_hub_card(repository: str, revision: str | None, where: str) -> None:
    """`check_card` for a dataset of the hub. Does nothing where its card cannot be had: `datasets` reports that."""
    from huggingface_hub import hf_hub_download

    for name in CARDS:
        try:
            path = hf_hub_download(repository, name, repo_type="dataset", revision=revision)
        except Exception:  # noqa: BLE001, S112 - no card, no network, no such dataset: what follows names it
            continue
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        check_card(text if name.endswith(".md") else f"---\n{text}\n---", where, repository)


def check_saved(folder: Path, where: str, shown: str) -> None:
    """Raises BadRequest where the parts of a `save_to_disk` folder lie outside of it."""
    splits = _json(folder / "dataset_dict.json").get("splits", [""])
    for split in splits if isinstance(splits, list) else [""]:
        if not inside(str(split)):
            raise BadRequest(f"{where}: {shown!r} names a split outside of its folder")
        files = _json(folder / str(split) / "state.json").get("_data_files") or []
        if not all(isinstance(file, dict) and inside(str(file.get("filename"))) for file in files):
            raise BadRequest(f"{where}: {shown!r} names files outside of its folder")


def check_builder(builder: Any, where: str, shown: str, *, root: str) -> None:
    """Raises BadRequest for a format that is not read, or for files that do not lie below `root`."""
    if builder.name not in BUILDERS:
        raise BadRequest(
            f"{where}: {shown!r} is in the format {builder.name!r}, which is not read here; save it as Parquet"
        )
    for files in (getattr(builder.config, "data_files", None) or {}).values():
        for file in map(str, files):
            if not file.startswith(root) or "::" in file or not inside(file.removeprefix(root).lstrip("/")):
                raise BadRequest(f"{where}: {shown!r} names files outside of the dataset")


def inside(name: str) -> bool:
    """Whether a file's name or pattern stays below the folder that it is relative to."""
    path = PurePosixPath(name)
    return "://" not in name and "::" not in name and not path.is_absolute() and ".." not in path.parts


def _named(value: Any, naming: bool = False) -> Iterator[str]:
    match value:
        case str() if naming:
            yield value
        case dict():
            for key, each in value.items():
                yield from _named(each, naming or key in _NAMING)
        case list():
            for each in value:
                yield from _named(each, naming)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
