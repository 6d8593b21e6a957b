"""Many subscribers that read what comes and do nothing with it: what publishing to them costs Redis.

A program: `python -m tests.bench.sinks PATH COUNT CHANNEL…`, with the path of Redis' socket. It writes `ready` when all
are subscribed, and ends at the end of its input.
"""

from __future__ import annotations

import select
import socket
import sys

PART_BYTES = 1 << 20


def main(path: str, count: int, channels: list[str]) -> None:
    command = f"*{1 + len(channels)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in ("SUBSCRIBE", *channels))
    poll = select.epoll()
    sockets = {}
    for _ in range(count):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        sock.sendall(command.encode())
        while b":%d\r\n" % len(channels) not in sock.recv(4096):
            pass
        sockets[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    poll.register(sys.stdin, select.EPOLLIN)
    print("ready", flush=True)
    buffer = bytearray(PART_BYTES)
    while True:
        for fd, _ in poll.poll():
            if fd == sys.stdin.fileno():
                return
            sockets[fd].recv_into(buffer)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
