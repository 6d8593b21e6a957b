"""The messages between a supervisor and a fork server: msgpack, one message per datagram of a SEQPACKET socket."""

from __future__ import annotations

import msgspec

from flowmesh.messages.job import Exit
from flowmesh.messages.text import encode_msgpack
from flowmesh.processes.limits import Limits

VERSION = 1
MAX_MESSAGE = 128 * 1024


class Fork(msgspec.Struct, frozen=True, kw_only=True, tag="fork"):
    """Fork a child. The reply is Forked, with the node's end of the child's pipe, or ForkFailed."""

    attempt: int
    target: str
    """`module:function`, called with (Pipe, spool folder as Path); its return value is the exit status."""
    spool: str
    cwd: str
    stdout: str
    stderr: str
    env: dict[str, str]
    """The whole environment of the child."""
    limits: Limits
    threads: int = 1
    """How many threads the math libraries may use; in the fork server it is one."""
    task_id: str = ""
    """For the child's command line."""


class Terminate(msgspec.Struct, frozen=True, tag="terminate"):
    """SIGTERM to the child's process group."""

    attempt: int


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """SIGKILL to the child's whole process tree."""

    attempt: int


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """The child's end is in the supervisor's journal: do not report it again."""

    attempt: int


class Retire(msgspec.Struct, frozen=True, tag="retire"):
    """Exit when the last child has been forgotten."""


Request = Fork | Terminate | Kill | Forget | Retire


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The first message to each supervisor, once the imports are done and the checks have passed.

    After it, a Forked is sent for each child that the server has, and a Gone for each that has ended.
    """

    version: int
    pid: int
    preload_s: float
    """How long the imports took."""
    modules: int
    rss_bytes: int
    packages: tuple[str, ...] = ()
    """Folders of installed packages. If one changes later, the server's imports are outdated."""
    stamp: tuple[float, ...] = ()
    """`preload.stamp` of those folders, taken after the imports."""
    made_of: str = ""
    """The `Options.made_of` that the server was started with."""
    retiring: bool = False
    """Whether it exits with its last child."""
    attempts: tuple[int, ...] = ()
    """The attempts whose children it has."""


class Unfit(msgspec.Struct, frozen=True, kw_only=True, tag="unfit"):
    """The server cannot be used, and exits."""

    message: str
    unsafe: bool
    """True: the imports worked, but the process cannot be forked safely. Without the preload it could be."""


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag="forked"):
    """A child exists. The datagram carries the node's end of its pipe."""

    attempt: int
    pid: int
    cgroup: str | None = None
    """The folder of its cgroup, if it has one."""


class ForkFailed(msgspec.Struct, frozen=True, kw_only=True, tag="fork_failed"):
    """There is no child for this attempt: it was not forked, or ended before anything of its task ran."""

    attempt: int
    message: str
    own: bool = False
    """Whether the reason lies in the request, so that other children are not concerned."""


class Gone(msgspec.Struct, frozen=True, kw_only=True, tag="gone"):
    """The child has ended and nothing of its tree is left. Sent again to each new supervisor, until Forget."""

    attempt: int
    exit: Exit


Reply = Ready | Unfit | Forked | ForkFailed | Gone


class Unready(msgspec.Struct, frozen=True, kw_only=True, tag="unready"):
    """A child could not be set up. Sent to its fork server, over the socket that it got its request from."""

    message: str
    own: bool = False


class SetUp(msgspec.Struct, frozen=True, tag="set_up"):
    """A child is set up: what it does from now on is the task. Sent as an Unready is."""


request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
fork_decoder: msgspec.msgpack.Decoder[Fork] = msgspec.msgpack.Decoder(Fork)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
set_up_decoder: msgspec.msgpack.Decoder[SetUp | Unready] = msgspec.msgpack.Decoder(SetUp | Unready)
encode = encode_msgpack
