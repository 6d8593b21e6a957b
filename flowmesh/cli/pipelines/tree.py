"""Shows a running pipeline: a live tree on a terminal, else a line for each change of a stage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, TextIO

from flowmesh.cli.pipelines.rows import lines, rows, tree_order
from flowmesh.cli.render import is_terminal, printable, seconds, shorten, width
from flowmesh.pipelines.document import Pipeline
from flowmesh.pipelines.progress import StageRun, State

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = {
    State.RUNNING: "cyan",
    State.SUCCEEDED: "green",
    State.REUSED: "green",
    State.FAILED: "bold red",
    State.CANCELLED: "yellow",
    State.SKIPPED: "dim",
    State.WAITING: "dim",
    State.BLOCKED: "yellow",
}
_REFRESH_HZ = 4


class TreeView(Protocol):
    """The display of a pipeline."""

    def begin(self, pipeline: Pipeline, runs: dict[str, StageRun]) -> None:
        """The stages are about to run."""

    def changed(self, run: StageRun) -> None:
        """A stage has changed."""

    def note(self, text: str) -> None:
        """Print a line that stays."""

    def end(self) -> None:
        """Take the display away."""


def tree_for(stream: TextIO | None) -> TreeView:
    """The display for a stream; None: no output."""
    if stream is None:
        return SilentTree()
    return LiveTree(stream) if is_terminal(stream) else PlainTree(stream)


class SilentTree:
    def begin(self, pipeline: Pipeline, runs: dict[str, StageRun]) -> None:
        pass

    def changed(self, run: StageRun) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def end(self) -> None:
        pass


class PlainTree:
    """Whole lines, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said: dict[str, str] = {}

    def begin(self, pipeline: Pipeline, runs: dict[str, StageRun]) -> None:
        pass

    def changed(self, run: StageRun) -> None:
        match run.state:
            case State.WAITING | State.READY:
                return
            case State.RUNNING:
                text = "running" + (f" with {run.merged_into}" if run.merged_into else "")
            case State.SUCCEEDED if run.seconds is not None:
                text = f"succeeded in {seconds(run.seconds)}"
            case _:
                text = run.state.value + (f": {shorten(run.error, 300)}" if run.error else "")
        if self._said.get(run.name) != text:
            self._said[run.name] = text
            self.note(f"  {run.name}: {text}")

    def note(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)

    def end(self) -> None:
        pass


class LiveTree:
    """A tree that is drawn again as stages change."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._stream = stream
        self._console = Console(file=stream, highlight=False)
        self._order: list[tuple[str, int]] = []
        self._runs: dict[str, StageRun] = {}
        self._live = Live(
            console=self._console,
            transient=True,
            refresh_per_second=_REFRESH_HZ,
            get_renderable=self._drawn,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def begin(self, pipeline: Pipeline, runs: dict[str, StageRun]) -> None:
        self._order, self._runs = tree_order(pipeline), runs
        self._live.start()

    def changed(self, run: StageRun) -> None:
        pass  # the next refresh shows it

    def note(self, text: str) -> None:
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def end(self) -> None:
        self._live.stop()

    def _drawn(self) -> Text:
        height = os.get_terminal_size(self._stream.fileno()).lines if self._stream.isatty() else 24
        return drawn(self._order, self._runs, width(self._stream) - 1, most=max(3, height - 3))


def drawn(order: list[tuple[str, int]], runs: dict[str, StageRun], columns: int, most: int | None = None) -> Text:
    """The tree with colours."""
    from rich.text import Text

    made = rows(order, runs, most=most)
    text = Text(no_wrap=True, overflow="crop")
    for number, (row, line) in enumerate(zip(made, lines(made, columns), strict=True)):
        if number:
            text.append("\n")
        at = line.find(row.state.value, len(row.label)) if row.state is not None else -1
        if row.state is None or at < 0:
            text.append(printable(line), "dim")
            continue
        stop = at + len(row.state.value)
        text.append(printable(line[:at]))
        text.append(line[at:stop], _STYLES.get(row.state, ""))
        text.append(printable(line[stop:]), "dim" if row.state in (State.WAITING, State.SKIPPED) else "")
    return text
