"""How long this node is there: a node with an end takes no task that cannot finish before it."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from flowmesh.settings.moments import iso, moment
from flowmesh.settings.schema import Settings


class TimeLeft(msgspec.Struct, frozen=True, kw_only=True):
    ends_at: float | None
    """Seconds since 1970. None: the node has no end."""
    margin_s: float
    """The drain begins so long before the end."""
    default_s: float
    """What a task without a time limit of its own needs: `tasks.default_timeout_s`, else the margin once more."""

    @classmethod
    def of(cls, settings: Settings) -> TimeLeft:
        margin_s = settings.node.ends_margin_s
        return cls(
            ends_at=None if settings.node.ends_at is None else moment(settings.node.ends_at),
            margin_s=margin_s,
            default_s=settings.tasks.default_timeout_s or margin_s,
        )

    @property
    def drains_at(self) -> float | None:
        """When the node begins to drain, in seconds since 1970."""
        return None if self.ends_at is None else self.ends_at - self.margin_s

    def left_s(self) -> float | None:
        """Until the drain; negative once it is due. By the wall clock, as the end is."""
        return None if self.drains_at is None else self.drains_at - time.time()

    def why_not(self, timeout_s: float | None) -> str:
        """Why a task cannot finish here any more; empty: it can.

        Args:
            timeout_s: its limit; None: it has none.
        """
        left_s, needs_s = self.left_s(), timeout_s or self.default_s
        if left_s is None or self.ends_at is None or needs_s <= left_s:
            return ""
        what = f"spec.timeoutSec is {timeout_s:g} s" if timeout_s else f"without spec.timeoutSec it needs {needs_s:g} s"
        return (
            f"the node ends at {iso(self.ends_at)} and drains {self.margin_s:g} s before, in {max(0.0, left_s):.0f} s; "
            f"{what}: send it to another worker"
        )

    def limits(self) -> tuple[str, str]:
        """For a claim: the seconds that are left, and those that a task without a limit needs; empty: no end."""
        left_s = self.left_s()
        return ("", "") if left_s is None else (f"{max(0.0, left_s):.3f}", f"{self.default_s:.3f}")

    def listed(self) -> dict[str, Any] | None:
        """For `flowmesh status`: `at`, `drains_at`, `left_s`; None: the node has no end."""
        left_s = self.left_s()
        if self.ends_at is None or self.drains_at is None or left_s is None:
            return None
        return {"at": iso(self.ends_at), "drains_at": iso(self.drains_at), "left_s": round(max(0.0, left_s), 1)}
