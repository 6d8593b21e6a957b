"""The report of a run: every row is on disk as soon as it is known, and the files are whole at any moment.

`rows.jsonl` gets a line for each row; the JSON and the Markdown are written anew, atomically.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

EVIDENCE_SHOWN = 4000
"""Characters of each piece of evidence in the Markdown; the JSON and the logs beside it have more."""


class Status(StrEnum):
    FAILED = "FAILED"
    OK = "ok"
    NOTED = "noted"
    """A measurement that nothing is demanded of."""
    SKIPPED = "skipped"


ORDER = (Status.FAILED, Status.OK, Status.NOTED, Status.SKIPPED)


@dataclass(frozen=True, kw_only=True)
class Row:
    step: str
    what: str
    status: Status
    value: str = ""
    against: str = ""
    aim: str = ""
    why: str = ""
    """Of a failure or a skip."""
    evidence: Mapping[str, str] = field(default_factory=dict)
    """Logs and readings of a failure, by name."""


class Report:
    """
    Args:
        out: the folder of the files; made if missing.
        about: what the head says, such as minutes and whether it is a dry run.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self._out = out
        out.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.head: dict[str, Any] = {"state": "running", "why": "", "started_at": _now(), "ended_at": None, **about}
        self.head.setdefault("machine", {})
        self._lines = out / "rows.jsonl"
        self._lines.write_text("")
        self.write()

    @property
    def passed(self) -> bool:
        """Whether the run got to its end, something was checked, and nothing failed."""
        return self.head["state"] == "finished" and passed(self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with open(self._lines, "a") as lines:
            lines.write(json.dumps(asdict(row)) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
        self.write()

    def doing(self, step: str | None) -> None:
        """Name the step that runs now: what a report that ends early shows."""
        self.head["step"] = step
        self.write()

    def end(self, state: str, why: str = "") -> None:
        self.head |= {"state": state, "why": why, "ended_at": _now(), "step": self.head.get("step") if why else None}
        self.write()

    def write(self) -> None:
        write_files(self._out, {**self.head, "rows": [asdict(row) for row in self.rows]})


def passed(rows: list[Row]) -> bool:
    return any(row.status is Status.OK for row in rows) and not any(row.status is Status.FAILED for row in rows)


def end_early(out: Path, why: str) -> None:
    """Say in an existing report that the run ended here. For the process that outlives the one that wrote it."""
    try:
        found = json.loads((out / "report.json").read_text())
    except (OSError, ValueError):
        return
    if found.get("state") == "running":
        write_files(out, {**found, "state": "ended early", "why": why, "ended_at": _now()})


def write_files(out: Path, report: dict[str, Any]) -> None:
    _replace(out / "report.json", json.dumps(report, indent=1) + "\n")
    _replace(out / "report.md", markdown(report))


def markdown(report: Mapping[str, Any]) -> str:
    """One table, failures first; then the evidence of each failure."""
    machine = report["machine"]
    rows = sorted((Row(**{**row, "status": Status(row["status"])}) for row in report["rows"]), key=_place)
    count = {status: sum(row.status is status for row in rows) for status in ORDER}
    title = machine.get("gpu", "no GPU seen yet")
    state = report["state"] + (f": {report['why']}" if report["why"] else "")
    if report.get("step") and report["state"] != "finished":
        state += f" (in step {report['step']})"
    lines = [
        f"# GPU check: {title}",
        "",
        "A dry run: the driver is a stub, and torch computes on the CPU. Its numbers mean nothing."
        if report.get("dry")
        else "Run by `scripts/gpu-check`. Each ratio is against a baseline of the same run.",
        "",
        f"State: **{state}**. Started {report['started_at']}, ended {report['ended_at'] or 'not yet'}, "
        f"with {report.get('minutes', '?')} minutes.",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items()) or "The machine is not known yet.",
        "",
        ", ".join(f"{count[status]} {status}" for status in ORDER) + ".",
        "",
        "| | step | what | measured | against | aim | why |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        "| "
        + " | ".join(
            map(_cell, (row.status, row.step, row.what, row.value, row.against, row.aim, row.why.split("\n")[0]))
        )
        + " |"
        for row in rows
    ]
    for row in rows:
        if row.status is Status.FAILED:
            lines += ["", f"## {row.step}: {row.what}", "", *_fenced(row.why)]
            for name, text in row.evidence.items():
                lines += ["", f"{name}:", "", *_fenced(text)]
    return "\n".join(lines) + "\n"


def _place(row: Row) -> int:
    return ORDER.index(row.status)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _fenced(text: str) -> list[str]:
    return ["```text", text[-EVIDENCE_SHOWN:].replace("```", "'''").strip() or "(nothing)", "```"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
