"""The framed pipe between the node and a child: a SEQPACKET socket pair, with one frame in each datagram.

The kernel keeps frame boundaries. So the next reader after one that died starts at a frame, and a malformed frame does
not damage the frames after it. Results are not sent through the pipe (see `messages.job`): frames are small, and both
sides check MAX_FRAME.
"""

from __future__ import annotations

import select
import socket

import msgspec

from flowmesh.messages.cloud import Keys
from flowmesh.messages.text import encode_msgpack

VERSION = 1
MAX_FRAME = 64 * 1024


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A child's first frame: it has read its job and starts to run it."""

    version: int
    pid: int


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """The child entered a new phase, such as `load` or `generate`."""

    name: str


class Progress(msgspec.Struct, frozen=True, tag="progress", omit_defaults=True):
    """How far a task is. A sender may drop it if the pipe is full."""

    done: float
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] = {}


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """The child serves a model, and has answered a request. Sent again and again while it does."""

    base_url: str
    model: str
    """The name that requests give it."""
    api_key: str
    ready: bool = True
    """False: it is being loaded again, at the same address."""
    numbers: dict[str, float] = {}
    times: dict[str, tuple[float, ...]] = {}
    """See `messages.serving`; not believed without its check."""

    def __repr__(self) -> str:
        return f"Serving({self.base_url!r}, {self.model!r})"


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The outcome is in the spool folder, and the child is about to exit."""

    ok: bool


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The node asks the child to stop. With `checkpoint` the child may save a checkpoint first, to resume from."""

    reason: str
    checkpoint: bool = False
    stop: str = ""
    """Why, as a value of tasks.verdicts.Stop; empty: the node is of a version that does not say."""


class Credentials(msgspec.Struct, frozen=True, tag="credentials"):
    """The node's secrets, for a child that needs them. Sent through the pipe so that they are never in a file."""

    token: str | None = None
    """The orchestrator's."""
    s3: Keys | None = None
    redis_url: str | None = None
    """With its password."""


Frame = Hello | Phase | Progress | Serving | Finished | Cancel | Credentials

_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class FrameError(Exception):
    """Raised for a datagram that is not a valid frame. The pipe stays usable."""


class Pipe:
    """One end of a framed pipe. It owns its socket and closes it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Pipe, Pipe]:
        """Two connected ends."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(near), cls(far)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, frame: Frame, *, drop: bool = False) -> bool:
        """Send one frame.

        Args:
            drop: drop the frame, instead of blocking or failing, if the pipe is full or the other end is closed.

        Returns:
            False if the frame was dropped.

        Raises:
            FrameError: the frame is larger than MAX_FRAME.
            OSError: the other end is closed, without `drop`.
        """
        data = encode_msgpack(frame)
        if len(data) > MAX_FRAME:
            raise FrameError(f"a {type(frame).__name__} frame of {len(data)} bytes; at most {MAX_FRAME} fit")
        try:
            self.sock.send(data, socket.MSG_NOSIGNAL | (socket.MSG_DONTWAIT if drop else 0))
        except OSError:
            if drop:
                return False
            raise
        return True

    def poll(self) -> Frame | None:
        """Receive the next frame without blocking; None if there is none.

        Raises:
            EOFError: the other end is closed.
            FrameError: the next datagram is not a valid frame; it is discarded.
        """
        try:
            data, _, flags, _ = self.sock.recvmsg(MAX_FRAME, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        if flags & socket.MSG_TRUNC:
            raise FrameError(f"a frame of more than {MAX_FRAME} bytes")
        try:
            return _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise FrameError(f"not a frame: {error}") from error

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is a frame, or the other end is closed. False if `timeout_s` passes first."""
        poller = select.poll()  # unlike select(), takes descriptors over 1023
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def close(self) -> None:
        self.sock.close()
