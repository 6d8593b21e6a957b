"""systemd's notification protocol: READY, RELOADING, STATUS, WATCHDOG, STOPPING. Without systemd it does nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends to the socket in NOTIFY_SOCKET.

    Feed the watchdog from the event loop's own progress: an unreachable Redis must not make systemd restart the node.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        watchdog_us = environ.get("WATCHDOG_USEC", "")
        for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(watchdog_us) / 1e6 if watchdog_us.isdigit() and for_us else None
        """The watchdog must be fed at least this often; None: there is no watchdog."""

    def reloading(self, status: str) -> None:
        """A reload begins; READY=1 ends it. `systemctl reload` of a unit of Type=notify-reload waits for both."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send(RELOADING="1", MONOTONIC_USEC=str(now_us), STATUS=status)

    def send(self, **fields: str) -> None:
        """Send fields such as READY="1" or STATUS="…"."""
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto(text.encode(), socket.MSG_DONTWAIT, address)
            except OSError:  # systemd restarts or does not listen; the next message may get through
                return
