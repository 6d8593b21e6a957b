"""What a supervisor and a fork server say to each other: msgpack datagrams on a SEQPACKET socket, one message each."""

from __future__ import annotations

import msgspec

from flowmesh.messages.job import Exit
from flowmesh.processes.limits import Limits

VERSION = 1
MAX_MESSAGE = 128 * 1024


class Fork(msgspec.Struct, frozen=True, kw_only=True, tag="fork"):
    """Make a child. Answered by Forked (with the node's end of its pipe) or ForkFailed."""

    attempt: int
    target: str
    """`module:function`, called with (Pipe, spool folder); its return value is the exit status."""
    spool: str
    cwd: str
    stdout: str
    stderr: str
    env: dict[str, str]
    """The whole environment of the child."""
    limits: Limits
    threads: int = 1
    """What the math libraries may use; the fork server itself has one."""


class Terminate(msgspec.Struct, frozen=True, tag="terminate"):
    """SIGTERM to the child's process group."""

    attempt: int


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """SIGKILL to everything of this attempt."""

    attempt: int


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """The end of this attempt stands in the journal."""

    attempt: int


class Retire(msgspec.Struct, frozen=True, tag="retire"):
    """End when the last child has been forgotten."""


Request = Fork | Terminate | Kill | Forget | Retire


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """First message to each supervisor, once the imports are done and proven safe. Then a Forked and perhaps a Gone
    for each child that it already has."""

    version: int
    pid: int
    preload_s: float
    modules: int
    rss_bytes: int
    packages: tuple[str, ...] = ()
    """Folders of installed packages: when one changes, what it has imported is old."""
    stamp: tuple[float, ...] = ()
    """When those folders had last changed, once it had imported from them."""
    made_of: str = ""
    """What the supervisor that started it said that it is made of."""
    retiring: bool = False
    """It ends with the last of its children."""
    attempts: tuple[int, ...] = ()
    """The children that it already has."""


class Unfit(msgspec.Struct, frozen=True, kw_only=True, tag="unfit"):
    """It cannot serve, and ends."""

    message: str
    unsafe: bool
    """True: the imports worked but left something that must not be forked; without preload it would do."""


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag="forked"):
    """A child is there. Its pipe comes with the datagram."""

    attempt: int
    pid: int
    cgroup: str | None = None
    """Its leaf, where it has one."""


class ForkFailed(msgspec.Struct, frozen=True, kw_only=True, tag="fork_failed"):
    attempt: int
    message: str


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone"):
    """The child has ended and nothing of its tree is left. Repeated to each new supervisor until forgotten."""

    attempt: int
    exit: Exit


Reply = Ready | Unfit | Forked | ForkFailed | Gone

request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
fork_decoder: msgspec.msgpack.Decoder[Fork] = msgspec.msgpack.Decoder(Fork)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
encode = msgspec.msgpack.Encoder().encode
