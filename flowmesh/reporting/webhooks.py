"""The node's webhooks: which events go to which lane of the journal, and how each lane is sent."""

from __future__ import annotations

import hashlib
import secrets
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from flowmesh.reporting import webhook_message
from flowmesh.reporting.sender import Lane
from flowmesh.reporting.webhook_child import Receiver
from flowmesh.settings.schema import NotifySettings, shown_receiver
from flowmesh.settings.secret_files import secret_path
from flowmesh.tasks.history import Found
from flowmesh.tasks.sendings_table import Sending

ENTRY = "flowmesh.reporting.webhook_child:main"
BATCH = 10


def receiver_key(url: str) -> str:
    """A name for a receiver that does not show its address: the same on all nodes."""
    return f"hook-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


class Webhooks:
    """
    Args:
        node_id: of this node.
    """

    def __init__(self, settings: NotifySettings, node_id: str) -> None:
        self.settings = settings
        self.node = {"node_id": node_id, "host": socket.gethostname()}
        self.keys = [receiver_key(url) for url in settings.url]

    def wants(self, *events: str) -> bool:
        """Whether one of these events is sent to anybody."""
        return bool(self.keys) and any(event in self.settings.events for event in events)

    def of_end(self, found: Found) -> Sequence[Sending]:
        """What is sent about a task's end."""
        if not self.wants("succeeded" if found.entry.ok else "failed"):
            return ()
        _, body = webhook_message.of_task(found, self.node)
        return list(self.to_all(body))

    def to_all(self, body: bytes, id_: str = "") -> Iterator[Sending]:
        """One message to each receiver.

        Args:
            id_: its id; empty: a new one.
        """
        id_ = id_ or f"msg_{secrets.token_hex(16)}"
        for key in self.keys:
            yield Sending(lane=key, id=id_, body=body)

    def lanes(self) -> list[Lane]:
        """How each receiver is sent to."""
        settings = self.settings
        shown = [shown_receiver(url) for url in settings.url]
        return [
            Lane(
                name=key,
                shown=where if shown.count(where) == 1 else f"{where} (notify.url[{index}])",
                entry=ENTRY,
                receiver=self._about(url),
                limit_s=BATCH * 2 * settings.timeout_s + 10.0,
                keep_s=settings.keep_s,
                most=BATCH,
            )
            for index, (key, url, where) in enumerate(zip(self.keys, settings.url, shown, strict=True))
        ]

    def _about(self, url: str) -> Any:
        file = self.settings.secret_file
        receiver = Receiver(
            url=url,
            secret_file=None if file is None else str(secret_path(file)),
            format=self.settings.format,
            timeout_s=self.settings.timeout_s,
        )
        return lambda: msgspec.json.encode(receiver)
