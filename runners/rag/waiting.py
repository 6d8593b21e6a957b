"""Calls that block on others, made so that a cancel is heard within a fraction of a second."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 0.05


def patiently(check: Callable[[], None], call: Callable[[], T]) -> T:
    """The result of `call`, which runs on a thread of its own while `check` is asked again and again.

    Args:
        check: raises where the caller must not wait any longer. The thread is then left behind; as a daemon it does
            not keep the process alive.

    Raises:
        Whatever `call` or `check` raises.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is waited for
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
