"""One task's folder while it is delivered: its result, its manifest, and what of it is to be sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmesh.errors import DeliveryError
from flowmesh.messages.job import ArchiveRequest, UploadRequest
from flowmesh.messages.output import HttpDestination, file_url
from flowmesh.results.archive import make_archive
from flowmesh.results.files import to_json, write_in
from flowmesh.results.job import State, Target
from flowmesh.results.manifest import MANIFEST_FILE, RESPONSES_FILE, write_manifest
from flowmesh.results.names import is_plain_name, within
from flowmesh.results.sending import Item, Sender
from flowmesh.settings_schema import ArchiveSettings

ARCHIVE_SUFFIX = ".tar.gz"


class TaskFolder:
    """The folder of a task or of a merged child. It is made where it does not exist."""

    def __init__(self, target: Target, notes: list[str]) -> None:
        self.target = target
        self.task_id = target.task_id
        self.path = Path(target.out_dir)
        self.result: dict[str, Any] = {}
        self._notes = notes

    def write_result(self) -> None:
        write_in(self.path, RESPONSES_FILE, to_json(self.result), make=True)

    def write_manifest(self, sha256_by_path: dict[str, str]) -> None:
        """Args: sha256_by_path: checksums already known, by absolute path."""
        known = {Path(path).name: digest for path, digest in sha256_by_path.items() if Path(path).parent == self.path}
        write_manifest(self.path, self.task_id, self.target.artifacts, known)

    def pack(
        self, folder: str, settings: ArchiveSettings, state: State, note: Callable[[], None], sender: Sender
    ) -> Path:
        """`<folder>.tar.gz` beside the folder; not made again where this attempt has made it already."""
        source = self.path / folder
        archive = source.with_name(source.name + ARCHIVE_SUFFIX)
        made = state.archives.get(str(archive))
        whole = made is not None and archive.is_file() and archive.stat().st_size == made[0]
        if whole or (made is not None and self._key(archive.name) in state.sent):  # sent, and cleaned up since
            return archive
        if within(source, self.path) in {None, self.path} or not source.is_dir():
            raise DeliveryError(f"{folder} is to be packed, and there is no such folder in {self.path}")
        with sender.early(self._item(archive, [])) as written:
            done = make_archive(source, archive, settings, written)
            state.archives[str(archive)] = (done.size, done.sha256)
            note()
        self._notes.extend(done.notes)
        return archive

    # ---- what is sent ------------------------------------------------------------------------------------------------

    def archive_item(self, request: ArchiveRequest, archive: Path, state: State) -> Item:
        """The archive that a runner asked for. Its fields go into the result at once, but for `_uploaded`."""
        prefix = f"{request.folder}_archive"
        size, _ = state.archives[str(archive)]
        self.result |= {
            prefix: archive.name,
            f"{prefix}_path": str(archive),
            f"{prefix}_bytes": size,
            f"{prefix}_uploaded": False,
        }
        uploaded = {f"{prefix}_url": self._url(archive.name), f"{prefix}_uploaded": True}
        return self._item(archive, [(self.result, uploaded)])

    def upload_item(self, request: UploadRequest, result: dict[str, Any]) -> Item:
        """A file that a runner asked to have uploaded; `result[field]` gets its address once it has arrived."""
        path = within(self.path / request.path, self.path)
        if path is None or not path.is_file():
            raise DeliveryError(f"{request.path} is to be uploaded, and there is no such file in {self.path}")
        if not isinstance(result.get(request.field), dict):
            result[request.field] = {}
        url = self._url(path.name)
        return self._item(path, [(result[request.field], {"uploaded": True, "url": url, "download_url": url})])

    def artifact_item(
        self, artifact: str, settings: ArchiveSettings, state: State, note: Callable[[], None], sender: Sender
    ) -> Item | None:
        """One of `spec.output.artifacts`; None where it does not exist (the manifest says so)."""
        relative = artifact.rstrip("/")
        asked = self.path / relative
        path = within(asked, self.path)
        if relative in {RESPONSES_FILE, MANIFEST_FILE}:
            return self._item(asked, [], last=True)
        archive = asked.with_name(asked.name + ARCHIVE_SUFFIX)
        if path is None or path == self.path:
            self._notes.append(f"{artifact} leads out of the task's folder: it was not delivered")
            return None
        if path.is_dir() or str(archive) in state.archives:
            return self._item(self.pack(relative, settings, state, note, sender), [])
        return self._item(path, [], name=asked.name) if path.is_file() else None

    def _item(
        self, path: Path, fields: list[tuple[dict[str, Any], dict[str, Any]]], *, name: str = "", last: bool = False
    ) -> Item:
        name = name or path.name
        if not is_plain_name(name):
            raise DeliveryError(f"{name!r} cannot be the name of an uploaded file")
        key = self._key(name)
        return Item(target=self.target, path=path, name=name, key=key, url=self._url(name), fields=fields, last=last)

    def _key(self, name: str) -> str:
        return f"{self.task_id}/{name}"

    def _url(self, name: str) -> str:
        destination = self.target.destination
        assert isinstance(destination, HttpDestination)
        assert destination.url is not None
        return file_url(destination.url, self.task_id, name)
