"""Checks one file: a task document, a configuration of agents, or a node's settings. Each fault has its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from flowmesh.cli.document_parser import DocumentError, parse_all
from flowmesh.cli.document_parser import kind as kind_of_value
from flowmesh.cli.documents import Submission, read
from flowmesh.cli.positions import Positions
from flowmesh.errors import FieldError
from flowmesh.pipelines.checks import check_pipeline
from flowmesh.pipelines.document import is_pipeline
from flowmesh.settings.schema import CloudSettings
from flowmesh.tasks import s3_fields
from flowmesh.tasks.catalogue import TaskType
from flowmesh.tasks.checks import check_agent_file, check_task
from flowmesh.validation.convert import joined

FileKind = Literal["task", "pipeline", "agent", "node"]
AGENT_FIELDS = frozenset(
    ("extends", "type", "model", "instructions", "max_turns", "tools", "mcp_servers", "sandbox", "planner", "workers",
     "reporter")
)  # fmt: skip
"""Top-level fields by which a file is taken for a configuration of agents; `spec` makes it a task."""
PROVIDERS_FILE = "search_providers.yaml"
_TOML_LINE = re.compile(r"\(at line (\d+), column \d+\)")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """An error or a warning about one place of a file."""

    line: int
    """From 1."""
    message: str


class CheckedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a file."""

    file: str
    kind: FileKind | None = None
    """None: it cannot be read, or is none of them."""
    task_type: str | None = None
    errors: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.errors


def check_file(
    source: str,
    types: Mapping[str, TaskType],
    kind: FileKind | None = None,
    cloud: CloudSettings | None = None,
) -> CheckedFile:
    """Check the file `source` ("-": standard input).

    Args:
        types: the known task types.
        kind: what it is; None: as its content shows.
        cloud: the node's `[cloud]`; None: not known.
    """
    name = "<stdin>" if source == "-" else source
    try:
        text = read(source)
        if kind == "node" or (kind is None and source.endswith(".toml")):
            return _node(name, text)
        form = "json" if source.endswith(".json") else "yaml"
        data, unfit = parse_all(text, name, as_json=form == "json")
    except DocumentError as error:
        return CheckedFile(file=name, kind=kind, errors=(_without_name(str(error), name, error.line),))
    except FieldError as error:
        return CheckedFile(file=name, kind=kind, errors=(_without_name(str(error), name, None),))
    faults = [fault for _, fault in unfit]
    kind = kind or _kind(source, data)
    if kind is None or not isinstance(data, dict):
        found = "none of them is recognised" if isinstance(data, dict) else f"found {kind_of_value(data)}"
        what = f"expected a mapping with `spec` (a task), or a configuration of agents; {found}; see --kind"
        return CheckedFile(file=name, kind=kind, errors=(Finding(line=1, message=what),))
    if kind == "agent":
        checked = check_agent_file(source, data)
        return _checked_file(name, kind, text, form, errors=(*faults, *checked.faults))
    return check_submission(Submission(source=name, task_id="", document=data, text=text), types, form, faults, cloud)


def check_submission(
    submission: Submission,
    types: Mapping[str, TaskType],
    form: str,
    faults: Iterable[str] = (),
    cloud: CloudSettings | None = None,
) -> CheckedFile:
    """Check a task document that was loaded.

    Args:
        form: yaml or json.
        faults: what its parser found.
        cloud: see `check_file`.
    """
    spec = submission.document.get("spec")
    if cloud is not None and isinstance(spec, dict):
        faults = (*faults, *s3_fields.faults(spec, cloud.read), *s3_fields.output_faults(spec, cloud.write))
    if is_pipeline(submission.document):
        checked, notes = check_pipeline(submission.document, types)
        errors = tuple(dict.fromkeys((*faults, *checked.faults)))
        warnings = [*(f"{path}: not used" for path in checked.unused), *notes]
        return _checked_file(submission.source, "pipeline", submission.text, form, errors=errors, warnings=warnings)
    checked, note = check_task(submission.document, types)
    warnings = [f"{path}: not used" for path in checked.unused] + ([note] if note else [])
    errors = tuple(dict.fromkeys((*faults, *checked.faults)))
    done = _checked_file(submission.source, "task", submission.text, form, errors=errors, warnings=warnings)
    spec = submission.document.get("spec")
    name = spec.get("taskType") if isinstance(spec, dict) else None
    return msgspec.structs.replace(done, task_type=name if isinstance(name, str) else None)


def refuse_faults(submissions: Iterable[Submission], types: Mapping[str, TaskType]) -> None:
    """Raises FieldError that names file, line and field of all that is wrong with the documents."""
    faults = []
    for each in submissions:
        form = "json" if each.source.endswith(".json") else "yaml"
        checked = check_submission(each, types, form)
        faults += [f"{each.source}:{error.line}: {error.message}" for error in checked.errors]
    if faults:
        raise FieldError(joined(faults), "", tuple(faults))


def _kind(source: str, data: Any) -> FileKind | None:
    if not isinstance(data, dict):
        return None
    if "spec" in data or "taskType" in data:
        return "task"
    if Path(source).name == PROVIDERS_FILE or AGENT_FIELDS & set(data):
        return "agent"
    return None


def _node(name: str, text: str) -> CheckedFile:
    import tomllib

    from flowmesh.settings.load import faults_of

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = _TOML_LINE.search(str(error))
        line = int(at[1]) if at else text.count("\n") + 1
        return CheckedFile(file=name, kind="node", errors=(Finding(line=line, message=f"not TOML: {error}"),))
    except (RecursionError, ValueError) as error:
        return CheckedFile(file=name, kind="node", errors=(Finding(line=1, message=f"not TOML: {error}"),))
    return _checked_file(name, "node", text, "toml", errors=faults_of(document))


def _checked_file(
    name: str, kind: FileKind, text: str, form: str, *, errors: Iterable[str], warnings: Iterable[str] = ()
) -> CheckedFile:
    errors, warnings = tuple(errors), tuple(warnings)
    if not errors and not warnings:
        return CheckedFile(file=name, kind=kind)
    at = Positions(text, form)

    def findings(messages: Iterable[str]) -> tuple[Finding, ...]:
        found = (Finding(line=at.line(message), message=message) for message in messages)
        return tuple(sorted(found, key=lambda finding: finding.line))

    return CheckedFile(file=name, kind=kind, errors=findings(errors), warnings=findings(warnings))


def _without_name(message: str, name: str, line: int | None) -> Finding:
    return Finding(line=line or 1, message=message.removeprefix(f"{name}: "))
