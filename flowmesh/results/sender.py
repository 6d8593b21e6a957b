"""The requests of one delivery, in order, to all of its destinations."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flowmesh.files.folder import Parts
from flowmesh.messages.cloud import Keys
from flowmesh.messages.output import HttpDestination, Remote, S3Destination, file_url, result_object
from flowmesh.messages.text import encode_json
from flowmesh.processes.pipe import Frame, Progress
from flowmesh.results.delivery_state import DeliveryState
from flowmesh.results.job import DeliveryJob, Target
from flowmesh.results.request_bodies import BytesBody, FileBody, GrowingBody, UploadError
from flowmesh.results.s3_upload import S3Uploads
from flowmesh.results.task_folder import TaskFolder
from flowmesh.results.throttle import Throttle
from flowmesh.results.upload import Uploader

EARLY_FROM_BYTES = 32 << 20
"""An archive of at least this size is sent while it is written. It is more than socket buffers hold, so a server that
accepts without reading is noticed."""


@dataclasses.dataclass(kw_only=True)
class Item:
    """A file to be uploaded."""

    folder: TaskFolder
    parts: Parts
    """Below the task's folder, without links."""
    name: str
    key: str
    """Its key in the delivery state."""
    url: str
    """Where it can be downloaded once it has arrived."""
    fields: list[tuple[dict[str, Any], dict[str, Any]]]
    """What its arrival changes in the result: (mapping, entries that it gets)."""
    last: bool = False
    """Sent after the result is final: responses.json and manifest.json."""

    @property
    def target(self) -> Target:
        return self.folder.target

    @property
    def path(self) -> Path:
        return self.folder.path.joinpath(*self.parts)

    def status(self) -> os.stat_result | None:
        """None: it is missing; it may have been cleaned up."""
        return self.folder.status(self.parts)

    @property
    def is_s3(self) -> bool:
        return isinstance(self.target.destination, S3Destination)

    def body(self) -> FileBody:
        """The file, opened: what is sent is what was checked, in each attempt.

        Raises:
            UploadError: there is none, or it is not the task's.
        """
        try:
            return FileBody(self.folder.open_file(self.parts), self.name, form=not self.is_s3)
        except OSError as error:
            raise UploadError(f"{self.name} cannot be read: {error.strerror}") from error


class Sender:
    """Sends files and results, and records each arrival in the delivery state.

    Args:
        report: called with progress.
        token: ORCHESTRATOR_TOKEN.
        keys: the node's own access key of S3.

    Raises (from its methods):
        UploadError: a file or result did not arrive; the delivery has failed.
    """

    def __init__(
        self,
        job: DeliveryJob,
        state: DeliveryState,
        report: Callable[[Frame], object],
        token: str | None,
        keys: Keys | None = None,
    ) -> None:
        self.sent_bytes = 0
        """Of the bodies that were accepted."""
        self.urls: list[str] = []
        self._job = job
        self._state = state
        self._report = report
        self._token = token
        self._keys = keys
        self._deadline = 0.0
        """Set by the first request that has its whole body: making archives does not count."""
        self._throttle = Throttle(job.bandwidth_bytes_per_sec, Path(job.throttle_file) if job.throttle_file else None)
        self._uploaders: dict[str, Uploader] = {}
        self._total_bytes = 0

    def close(self) -> None:
        for uploader in self._uploaders.values():
            uploader.close()

    def expect(self, items: Iterable[Item]) -> None:
        """Set the total of the progress. Results are not in it: their size is not known yet."""
        self._total_bytes = sum(
            status.st_size
            for each in items
            if not each.last and (status := each.status()) and not self._state.has_arrived(each.key, status)
        )

    def send_file(self, item: Item) -> None:
        """Upload a file unless it has arrived already, and put its links into the result."""
        if not self._state.has_arrived(item.key, item.status()):
            with contextlib.closing(item.body()) as body:
                uploader = self._uploader(item.target)
                if item.is_s3:
                    uploader.send("PUT", item.url, body)
                else:
                    uploader.send("POST", file_url(self._url(item.target), item.target.task_id), body)
                self._arrived(item, body, body.size or 0)
        self.urls.append(item.url)
        for mapping, gets in item.fields:
            mapping.update(gets)

    @contextlib.contextmanager
    def early(self, item: Item) -> Iterator[Callable[[int, int], None]]:
        """Send an archive while it is written, where it is large and the server accepts a body of unknown length.

        If that fails, `send_file` sends it later like any other file.

        Yields:
            A function to call with the number of bytes written so far, and the archive's descriptor.
        """
        body = GrowingBody(item.name, self._job.total_timeout_s)
        with contextlib.closing(body), ThreadPoolExecutor(1, thread_name_prefix="early") as pool:
            sending: Future[bool] | None = None

            def written(size: int, fd: int) -> None:
                nonlocal sending
                body.grew(size, fd)
                if sending is None and size >= EARLY_FROM_BYTES and not item.is_s3:
                    sending = pool.submit(self._send_early, item, body)

            whole = False
            try:
                yield written
                whole = True
            finally:
                body.ended(whole=whole)
            if sending is not None and sending.result():
                self._arrived(item, body, body.status.st_size)

    def _send_early(self, item: Item, body: GrowingBody) -> bool:
        uploader = self._make_uploader(item.target, math.inf)
        with contextlib.closing(uploader):
            return uploader.try_unsized(file_url(self._url(item.target), item.target.task_id), body)

    def send_result(self, target: Target, result: dict[str, Any]) -> None:
        """Send a result unless it has arrived already or stays on disk."""
        destination = target.destination
        if not isinstance(destination, Remote) or self._state.has_result(target.task_id):
            return
        encoded = encode_json({"task_id": target.task_id, "result": result, "worker_id": self._job.worker_id})
        if isinstance(destination, HttpDestination):
            method, url = destination.method, self._url(target)
        else:
            method, url = "PUT", result_object(self._url(target), target.task_id)
        self._uploader(target).send(method, url, BytesBody(encoded, "application/json"))
        self.sent_bytes += len(encoded)
        self._state.result_arrived(target.task_id)

    def _arrived(self, item: Item, body: FileBody | GrowingBody, sent_bytes: int) -> None:
        self.sent_bytes += sent_bytes
        self._state.file_arrived(item.key, item.path, body.status, body.sha256)

    def _uploader(self, target: Target) -> Uploader:
        uploader = self._uploaders.get(target.task_id)
        if uploader is None:
            left_s = self._job.total_timeout_s if self._state.left_s is None else self._state.left_s
            self._deadline = self._deadline or time.monotonic() + left_s
            uploader = self._uploaders[target.task_id] = self._make_uploader(target, self._deadline)
        return uploader

    def _make_uploader(self, target: Target, deadline: float) -> Uploader:
        destination = target.destination
        assert isinstance(destination, Remote)
        client = None
        if isinstance(destination, S3Destination):
            client = S3Uploads(
                self._job.s3,
                self._keys,
                timeout_s=destination.timeout_s,
                deadline=deadline,
                throttle=self._throttle,
                progress=self._progress,
                state=self._state,
            )
        return Uploader(
            destination,
            client=client,
            deadline=deadline,
            throttle=self._throttle,
            token=self._token,
            orchestrator_url=self._job.orchestrator_url,
            first_backoff_s=self._job.first_backoff_s,
            max_backoff_s=self._job.max_backoff_s,
            progress=self._progress,
            token_expected=self._job.token_expected,
            postpone=self._state if self._job.ends_to_wait else None,
        )

    def _progress(self, sent_bytes: int) -> None:
        done = self.sent_bytes + sent_bytes
        total = (
            float(max(done, self._total_bytes)) if self._total_bytes else None
        )  # unknown while an archive is being written
        self._report(Progress(float(done), total, "B"))

    @staticmethod
    def _url(target: Target) -> str:
        destination = target.destination
        if not isinstance(destination, Remote) or destination.url is None:
            raise UploadError(f"task {target.task_id} has no destination to send to")
        return destination.url
