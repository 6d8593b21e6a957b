"""Shows a running task: a spinner and a progress bar on a terminal, else a line for each phase and each 10 %."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from flowmesh.cli.control_types import Done, PhaseSeen, ProgressSeen, Seen, StateSeen
from flowmesh.cli.render import is_terminal, printable, seconds, shorten, width

if TYPE_CHECKING:
    from rich.progress import TaskID

_QUIET_STATES = ("queued", "launching", "running", "releasing", "done")
"""States that last only milliseconds, or that a phase describes better."""
_SILENCE_S = 30.0
_SHOWN_METRICS = 3


class View(Protocol):
    """The progress display of `flowmesh run`."""

    def step(self, text: str) -> None:
        """A step that takes a moment begins, such as the node's start."""

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""

    def seen(self, event: Seen) -> None:
        """Show an event of the task."""

    def stop(self) -> None:
        """Remove the progress bar: the outcome is printed next."""


def view_for(stream: TextIO | None) -> View:
    """The view for a stream; None: no output."""
    if stream is None:
        return SilentView()
    return TerminalView(stream) if is_terminal(stream) else PlainView(stream)


class SilentView:
    """Prints nothing, for `--json`."""

    def step(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def seen(self, event: Seen) -> None:
        pass

    def stop(self) -> None:
        pass


class PlainView:
    """Prints whole lines, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._label = ""
        self._tenth = 0
        self._last = time.monotonic()

    def step(self, text: str) -> None:
        self._say(text)

    def note(self, text: str) -> None:
        self._say(text)

    def stop(self) -> None:
        pass

    def seen(self, event: Seen) -> None:
        match event:
            case PhaseSeen(phase):
                self._enter(phase)
            case StateSeen(state) if state not in _QUIET_STATES:
                self._enter(state)
            case ProgressSeen(total=total) if total:
                tenth = int(10 * event.done / total)
                if tenth > self._tenth:
                    self._tenth = tenth
                    self._say(f"  {self._label} {min(100, tenth * 10)} % ({amount(event)}){metrics(event)}")
            case ProgressSeen() if time.monotonic() - self._last > _SILENCE_S:
                self._say(f"  {self._label} {amount(event)}{metrics(event)}")

    def _enter(self, name: str) -> None:
        label = shorten(name, 40)
        if label != self._label:
            self._label, self._tenth = label, 0
            self._say(f"  {label}")

    def _say(self, text: str) -> None:
        self._last = time.monotonic()
        print(printable(text), file=self._stream, flush=True)


class TerminalView:
    """A live progress line on a terminal, below a line for each finished phase."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self._console = Console(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn(" "),
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=24 if width(stream) < 100 else 40),
            TextColumn("{task.fields[amount]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            refresh_per_second=8,
        )
        self._live: TaskID | None = None
        self._label = ""
        self._since = time.monotonic()
        self._kept = False

    def step(self, text: str) -> None:
        self._enter(text, kept=False)

    def note(self, text: str) -> None:
        self._leave()
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._leave()
        self._progress.stop()

    def seen(self, event: Seen) -> None:
        match event:
            case PhaseSeen(phase):
                self._enter(phase, kept=True)
            case StateSeen("done"):
                self._leave()
            case StateSeen(state):
                self._enter(state, kept=state not in _QUIET_STATES)
            case ProgressSeen() if self._live is not None:
                shown = amount(event) + metrics(event)
                self._progress.update(self._live, completed=event.done, total=event.total, amount=shown)

    def _enter(self, name: str, *, kept: bool) -> None:
        label = shorten(name, 40)
        if label == self._label and self._live is not None:
            return
        self._leave()
        self._label, self._since, self._kept = label, time.monotonic(), kept
        self._live = self._progress.add_task(label, total=None, amount="")
        self._progress.start()

    def _leave(self) -> None:
        if self._live is None:
            return
        self._progress.remove_task(self._live)
        self._live = None
        if self._kept:
            self._console.print(f"    {self._label:<14} {seconds(time.monotonic() - self._since):>8}", markup=False)


def amount(progress: ProgressSeen | Done) -> str:
    """`12/64 items`, or `12 items` if the total is unknown."""
    done, unit = _number(progress.done), f" {progress.unit}" if progress.unit else ""
    return f"{done}/{_number(progress.total)}{unit}" if progress.total else f"{done}{unit}"


def metrics(event: ProgressSeen) -> str:
    """The first few metrics of a progress event."""
    shown = list((event.metrics or {}).items())[:_SHOWN_METRICS]
    return "".join(f"  {name} {value:.4g}" for name, value in shown)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def progress_stream(*, as_json: bool) -> TextIO | None:
    """The stream for progress: standard output, or standard error if standard output is for JSON."""
    if not as_json:
        return sys.stdout
    return sys.stderr if is_terminal(sys.stderr) else None
