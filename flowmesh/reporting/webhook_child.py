"""Entry point of the child that sends notifications to one webhook: each once, until one does not get through."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flowmesh.processes.pipe import Pipe
from flowmesh.reporting import webhook_message, webhook_request
from flowmesh.reporting.batch import add_answer, read_batch


class Receiver(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how to send."""

    url: str
    secret_file: str | None
    format: str
    timeout_s: float


def main(_pipe: Pipe, folder: Path) -> int:
    """Send; what became of each is in the answers' file as soon as it is known."""
    batch = read_batch(folder)
    receiver = msgspec.json.decode(batch.receiver, type=Receiver)
    for item in batch.items:
        answer = webhook_request.send(
            receiver.url,
            item.id,
            webhook_message.rendered(item.body, receiver.format),
            secret_file=receiver.secret_file,
            timeout_s=receiver.timeout_s,
        )
        add_answer(folder, answer)
        if answer.error and not answer.refused:
            return 1
    return 0
