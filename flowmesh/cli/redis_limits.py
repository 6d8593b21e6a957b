"""What a Redis lets through to the subscribers of the tasks' channel: its own limits, beside the node's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from flowmesh.errors import FlowMeshError
from flowmesh.messages.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    import redis

OVERHEAD_BYTES = 20 * 1024
"""What Redis' output buffer holds beside a message."""
HEAD_BYTES = 1024
"""What a message has in the buffer beside its content."""
MIB = 1024**2


class RedisLimits(msgspec.Struct, frozen=True, kw_only=True):
    """In bytes; 0: no limit. The defaults are Redis' own."""

    hard: int = 32 * MIB
    """`client-output-buffer-limit pubsub`: a subscriber for which more waits is cut off at once."""
    soft: int = 8 * MIB
    """One for which more waits for `soft_s` is cut off too."""
    soft_s: int = 60
    bulk: int = 512 * MIB
    """`proto-max-bulk-len`: a longer message is refused, with its connection."""
    known: bool = False
    """Whether Redis reported them; else these are assumed."""

    @property
    def largest(self) -> int:
        """The largest message that reaches a node."""
        return min(MAX_MESSAGE_BYTES, self.bulk or MAX_MESSAGE_BYTES, _fits(self.hard) or MAX_MESSAGE_BYTES)


def _fits(limit: int) -> int:
    """The largest message in a buffer of `limit` bytes; 0: no limit.

    Redis counts what its allocator takes: jemalloc rounds up to four sizes in each power of two.
    """
    room = limit - OVERHEAD_BYTES
    if room <= HEAD_BYTES:
        return limit and 1
    step = (1 << (room.bit_length() - 1)) // 4
    return room // step * step - HEAD_BYTES


def read(client: redis.Redis) -> RedisLimits:
    """The limits of this Redis; its defaults where the login may not ask, or the server does not know them."""
    import redis

    try:
        found: dict[Any, Any] = client.config_get("client-output-buffer-limit", "proto-max-bulk-len")
        values = {_text(name): _text(value) for name, value in found.items()}
        words = values["client-output-buffer-limit"].split()
        at = words.index("pubsub")
        hard, soft, soft_s = (int(word) for word in words[at + 1 : at + 4])
        return RedisLimits(
            hard=hard, soft=soft, soft_s=soft_s, bulk=int(values.get("proto-max-bulk-len", 512 * MIB)), known=True
        )
    except (redis.ResponseError, KeyError, ValueError):
        return RedisLimits()


def check_size(client: redis.Redis, message: bytes) -> str:
    """Whether a dispatch goes through this Redis.

    Returns:
        a warning; empty where there is nothing to say.

    Raises:
        FlowMeshError: it does not; names its size and the limit.
    """
    if len(message) <= MIB // 2:  # below any limit that a deployment could work with
        return ""
    limits = read(client)
    assumed = "" if limits.known else ", Redis' default: it does not tell its own"
    if len(message) > limits.largest:
        raise FlowMeshError(
            f"the task takes {_mib(len(message))} as a message, and at most {_mib(limits.largest)} reach a node "
            f"(the node's 32 MiB; Redis: client-output-buffer-limit pubsub {_mib(limits.hard)}, proto-max-bulk-len "
            f"{_mib(limits.bulk)}{assumed}); put the data into a file or behind a URL"
        )
    if limits.soft and len(message) > _fits(limits.soft):
        return (
            f"the task takes {_mib(len(message))}: Redis cuts off nodes for which more than {_mib(limits.soft)} wait "
            f"for {limits.soft_s} s (client-output-buffer-limit pubsub{assumed}); better put the data into a file"
        )
    return ""


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size else "no limit"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
