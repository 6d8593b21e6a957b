"""Machines of a small network in network namespaces of the test's own, with latency, jitter, loss and cut lines.

Each host is a namespace with one TUN interface. All packets pass through this process, which holds them back and drops
some. The kernel's `netem` would do the same, but not every kernel has it. Root is needed, and nothing is left behind:
namespaces and interfaces end with this process, or with `close`.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 1500
MOST_WAITING = 20_000
"""Packets on their way at once; more are dropped, as a full queue does."""


def why_not() -> str:
    """Why this machine cannot have such a network; empty: it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    missing = [name for name in ("ip", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: apt-get install iproute2 util-linux"
    with ThreadPoolExecutor(1) as aside:
        try:
            aside.submit(_unshare).result()
        except OSError as error:
            return f"no network namespace can be made here: {error.strerror}"
    return ""


@dataclass
class Line:
    """How packets come from a host to another."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Up to so much more, by chance. Packets may overtake each other."""
    loss: float = 0.0
    """The share of packets that are lost."""


@dataclass(frozen=True)
class Host:
    """A machine of the network."""

    address: str
    namespace: int
    """A descriptor of its network namespace."""
    tun: int

    @property
    def enter(self) -> list[str]:
        """What starts a program there: arguments before its own."""
        return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}", "--"]


class Network:
    """Hosts 10.77.0.1, 10.77.0.2, … that see each other.

    Args:
        line: of every host to every other; its numbers may change at any time.
        seed: of what is lost and held back.
    """

    def __init__(self, hosts: int, line: Line, seed: int = 0) -> None:
        self.line = line
        self.lost = self.passed = 0
        """Packets."""
        self._cut: set[str] = set()
        self._random = random.Random(seed)
        with ThreadPoolExecutor(hosts) as aside:  # a thread each, which stays in its namespace
            self.hosts = list(aside.map(_make_host, [f"10.77.0.{number + 1}" for number in range(hosts)]))
        self._by_address = {_packed(host.address): host for host in self.hosts}
        self._over, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="network", daemon=True)
        self._thread.start()

    def cut(self, host: Host) -> None:
        """Nothing reaches the host or leaves it any more."""
        self._cut.add(host.address)

    def mend(self, host: Host) -> None:
        self._cut.discard(host.address)

    def close(self) -> None:
        os.close(self._wake)
        self._thread.join()
        os.close(self._over)
        for host in self.hosts:
            os.close(host.tun)
            os.close(host.namespace)

    def _carry(self) -> None:
        poller = select.poll()
        poller.register(self._over, select.POLLIN)
        sources = {host.tun: host for host in self.hosts}
        for fd in sources:
            poller.register(fd, select.POLLIN)
        waiting: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        while True:
            due_ms = None if not waiting else max(0.0, waiting[0][0] - time.monotonic()) * 1000
            ready = [fd for fd, _ in poller.poll(due_ms)]
            if self._over in ready:
                return
            now = time.monotonic()
            for fd in ready:
                for packet in _packets(fd):
                    target = self._target(sources[fd], packet)
                    if target is None or len(waiting) >= MOST_WAITING:
                        self.lost += 1
                        continue
                    due = now + self.line.delay_s + self._random.random() * self.line.jitter_s
                    heapq.heappush(waiting, (due, next(order), target, packet))
            while waiting and waiting[0][0] <= now:
                _, _, fd, packet = heapq.heappop(waiting)
                self._deliver(fd, packet)

    def _target(self, source: Host, packet: bytes) -> int | None:
        """The interface that a packet goes to; None: it is lost."""
        host = self._by_address.get(packet[16:20]) if packet[:1] and packet[0] >> 4 == 4 else None
        if host is None or {source.address, host.address} & self._cut or self._random.random() < self.line.loss:
            return None
        return host.tun

    def _deliver(self, fd: int, packet: bytes) -> None:
        try:
            os.write(fd, packet)
            self.passed += 1
        except OSError:  # its queue is full
            self.lost += 1


def _packets(fd: int) -> list[bytes]:
    found = []
    for _ in range(64):
        try:
            found.append(os.read(fd, MTU + 64))
        except BlockingIOError:
            break
    return found


def _make_host(address: str) -> Host:
    """Make a namespace with its interface, and stay in it: only in a thread of its own."""
    _unshare()
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", b"net0", IFF_TUN | IFF_NO_PI))
    for words in (
        ("link", "set", "lo", "up"),
        ("addr", "add", f"{address}/24", "dev", "net0"),
        ("link", "set", "net0", "mtu", str(MTU), "up"),
    ):
        subprocess.run(["ip", *words], check=True, capture_output=True)
    return Host(address, os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), tun)


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _packed(address: str) -> bytes:
    return bytes(map(int, address.split(".")))
