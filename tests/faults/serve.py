"""Faults of a task that serves a model, in mid-answer: nothing is left, or it serves again where it did."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowmesh.queue.names import endpoint_key
from tests.faults.rig import GONE_S, Lost, Rig
from tests.faults.table import crashes, fault, orphans, until
from tests.kit.support import below

LOADED_S = 180.0
"""The first task of a rig waits for the imports of torch and Transformers."""
LONG_ANSWER = 500
"""Tokens: more than are answered before the fault."""
CANCELLED = ("ok", "cancelled")
"""Of a cancel, which the rig gives little time."""


class Model:
    """One that a task serves."""

    def __init__(self, rig: Rig, *kinds: str, **fields: Any) -> None:
        rig.may_be_late = True
        self._rig = rig
        self._redis = rig.server.client()
        spec = {
            "taskType": "serve", "model": {"source": {"identifier": "builtin:tiny-llama"}}, "enforce_cpu": True,
            "serve": fields,
        }  # fmt: skip
        self.task_id = rig.dispatch(spec, *kinds)
        self.at = self.wait()

    def place(self) -> dict[bytes, bytes]:
        """The hash; empty: it is not served."""
        found: dict[bytes, bytes] = self._redis.hgetall(endpoint_key(self.task_id))
        return found

    def wait(self) -> dict[bytes, bytes]:
        """Where it is served, once it is."""
        until(self.place, f"{self.task_id} serves", LOADED_S)
        return self.place()

    def ask(self, tokens: int) -> Iterator[bytes]:
        """The parts of a streamed answer; ends early where the server does."""
        parts = urlsplit(self.at[b"base_url"].decode())
        client = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        with contextlib.closing(client), contextlib.suppress(OSError, http.client.HTTPException):
            body = {"prompt": "hello", "max_tokens": tokens, "stream": True, "temperature": 1.0}
            headers = {"Authorization": f"Bearer {self.at[b'api_key'].decode()}"}
            client.request("POST", f"{parts.path}/completions", json.dumps(body), headers)
            answer = client.getresponse()
            while part := answer.read1(65536):
                yield part

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """A long answer is on its way; its client's connection ends after the block."""
        begun = threading.Event()

        def read() -> None:
            for _ in self.ask(LONG_ANSWER):
                begun.set()

        thread = threading.Thread(target=read)
        thread.start()
        try:
            until(begun.is_set, "an answer has begun", 60.0)
            yield
        finally:
            thread.join(90)
            if thread.is_alive():
                raise Lost("a client hangs at a server that is gone")

    def pid(self) -> int:
        """Of the task's own process."""
        return self._rig.node.task_pid(self.task_id)

    def is_gone(self) -> None:
        """Check that the task has ended, and that its hash is gone soon."""
        self._rig.peer.wait_end(self.task_id)
        until(lambda: not self.place(), f"the address of {self.task_id} is gone from Redis", GONE_S)
        until(lambda: all(each["state"] == "ready" for each in self._rig.status()["servers"]), "imports", LOADED_S)

    def ends(self, restarts: int) -> None:
        """Check that it still serves at its address, cancel it, and check what its result has counted."""
        if self.wait() != self.at:
            raise Lost(f"{self.task_id} serves at another address, or with another key")
        if not any(self.ask(2)):
            raise Lost(f"{self.task_id} gives no answer")
        self._rig.node.ask(op="cancel", task_id=self.task_id)
        self.is_gone()
        if self._rig.peer.ends(self.task_id)[0]["type"] == "TASK_FAILED":
            return
        result = self._rig.node.result(self.task_id)
        if (result["reason"], result["restarts"]) != ("cancelled", restarts):
            raise Lost(f"{self.task_id}: its result says {result['reason']} and {result['restarts']} restarts")


@fault("served model: SIGKILL of the task's process in mid-answer", long=True)
def _(rig: Rig, rng: random.Random) -> None:
    model = Model(rig, "crash")
    with model.asked():
        rig.pause(rng)
        rig.hit(model.pid(), signal.SIGKILL)
    model.is_gone()


@fault("served model: SIGKILL of the fork server in mid-answer", long=True)
def _(rig: Rig, rng: random.Random) -> None:
    orphans(rig)
    model = Model(rig, "node_fault", "crash")
    with model.asked():
        rig.pause(rng)
        rig.hit(_parent(model.pid()), signal.SIGKILL)
    model.is_gone()


@fault("served model: SIGKILL of the supervisor in mid-answer", long=True)
def _(rig: Rig, rng: random.Random) -> None:
    model = Model(rig, *CANCELLED)
    with model.asked():
        crashes(rig)
        rig.pause(rng)
        rig.node.kill()
        rig.start_node()
    model.ends(restarts=0)


@fault("served model: SIGKILL of the serving process in mid-answer", long=True)
def _(rig: Rig, rng: random.Random) -> None:
    model = Model(rig, *CANCELLED, restarts=1)
    _lose(rig, rng, model, signal.SIGKILL)
    model.ends(restarts=1)


@fault("served model: SIGKILL of the serving process without a restart", long=True)
def _(rig: Rig, rng: random.Random) -> None:
    model = Model(rig, "crash", restarts=0)
    with model.asked():
        rig.pause(rng)
        for pid in below(model.pid()):
            rig.hit(pid, signal.SIGKILL)
    model.is_gone()


@fault("served model: SIGSTOP of the serving process, its health is lost", long=True)
def _(rig: Rig, rng: random.Random) -> None:
    model = Model(rig, *CANCELLED, restarts=1, health_interval_s=1.0)
    _lose(rig, rng, model, signal.SIGSTOP)
    model.ends(restarts=1)


def _lose(rig: Rig, rng: random.Random, model: Model, number: signal.Signals) -> None:
    """Hit the serving process; returns when its address is not in Redis."""
    with model.asked():
        rig.pause(rng)
        for pid in below(model.pid()):
            rig.hit(pid, number)
        until(lambda: not model.place(), "the lost model's address is gone from Redis", 30.0)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
