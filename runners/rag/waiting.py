"""Blocking calls that still notice a cancel within a fraction of a second."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 0.05


def patiently(check: Callable[[], None], call: Callable[[], T]) -> T:
    """The result of `call`, which runs on a separate thread while `check` is called every POLL_S seconds.

    Args:
        check: raises to end the wait. The thread is then abandoned; as a daemon it does not keep the process
            alive.

    Raises:
        Whatever `call` or `check` raises.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 - re-raised in the caller's thread
            failure.append(error)
        finally:
            done.set()

    check()
    threading.Thread(target=run, name="waiting", daemon=True).start()
    while not done.wait(POLL_S):
        check()
    if failure:
        raise failure[0]
    result: T = outcome[0]
    return result
