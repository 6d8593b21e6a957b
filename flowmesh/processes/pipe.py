"""The framed pipe between the node and a child: one frame a datagram of a connected SEQPACKET socket pair.

The kernel keeps the frames apart, so a reader that dies between two reads leaves the next reader at a frame's
start, and one bad frame is one error and not a stream out of step. Results do not travel here (see
`messages.job`): a frame is small, and `MAX_FRAME` is checked on both sides.
"""

from __future__ import annotations

import select
import socket

import msgspec

VERSION = 1
MAX_FRAME = 64 * 1024


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A child's first frame: it has read its job and is about to run."""

    version: int
    pid: int


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """The child entered a new phase, such as `load` or `generate`."""

    name: str


class Progress(msgspec.Struct, frozen=True, tag="progress", omit_defaults=True):
    """How far a task is. May be dropped on the way."""

    done: float
    total: float | None = None
    unit: str = ""
    metrics: dict[str, float] = {}


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The outcome lies in the spool folder; the child ends next."""

    ok: bool


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The node asks the child to stop. With `checkpoint` it may first save what it would go on from."""

    reason: str
    checkpoint: bool = False


class Credentials(msgspec.Struct, frozen=True, tag="credentials"):
    """What a delivery child may show to the orchestrator. Said over the pipe, so that it never stands in a file."""

    token: str | None = None


Frame = Hello | Phase | Progress | Finished | Cancel | Credentials

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class FrameError(Exception):
    """A datagram that is no frame. The pipe itself goes on."""


class Pipe:
    """One end of a framed pipe. Owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Pipe, Pipe]:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(near), cls(far)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, frame: Frame, *, drop: bool = False) -> bool:
        """Send one frame. With `drop`, neither blocks nor fails: says False where the reader is behind, or gone.

        Raises:
            FrameError: the frame is over MAX_FRAME.
            OSError: the other end is gone, and `drop` was not set.
        """
        data = _encoder.encode(frame)
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
        """The next frame, or None where none is waiting.

        Raises:
            EOFError: the other end is closed.
            FrameError: what was waiting is no frame.
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
        """Wait until a frame (or the end) can be read, at most `timeout_s`."""
        poller = select.poll()  # unlike select(), takes descriptors over 1023
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def close(self) -> None:
        self.sock.close()
