"""The documents of `command` and `python` tasks."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from runners.api import BadRequest, Context
from runners.fields import Faults, check_spec
from runners.models.spec import Section

MAX_RANKS = 1024
Text = Annotated[str, Meta(min_length=1)]
Ranks = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

T = TypeVar("T")


class Source(Section, frozen=True):
    """Where a file comes from: one of the two."""

    path: Text | None = None
    url: Text | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)


class Archive(Source, frozen=True):
    """spec.archive"""

    archive_format: Literal["auto", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"] = "auto"


class Program(Section, frozen=True):
    """What both types have."""

    workdir: Text | None = None
    """Relative: below the task's own folder `work`. Absolute: an existing folder."""
    files: dict[str, str | Source] = msgspec.field(default_factory=dict)
    """By path in `work`: its text, or where it comes from."""
    archive: Archive | None = None
    inputs: dict[str, Any] = msgspec.field(default_factory=dict)
    outputs: tuple[Text, ...] = ()
    nproc_per_node: Ranks | None = None
    """Ranks of a torchrun group. None: no group."""
    attach: Text | None = None
    """A socket from which the program gets its terminal; see `attach.py`."""


class CommandSpec(Program, frozen=True):
    """spec of type command"""

    command: tuple[str, ...] | None = None
    script: Text | None = None
    """For a shell; it ends with the first command that fails."""

    def line(self) -> str:
        """What the operator's patterns are compared with; empty: only `*` allows it."""
        return "" if self.command is None else shlex.join(self.command)


class PythonSpec(Program, frozen=True):
    """spec of type python"""

    code: Text | None = None
    function: Text | None = None
    """`module:name`"""
    file: Text | None = None
    module: Text | None = None
    """As `python -m` takes it."""
    args: tuple[str, ...] = ()
    preload: tuple[Text, ...] = ()
    """Modules that should be imported already; a warning names those that are not."""

    def line(self) -> str:
        """What the operator's patterns are compared with; empty: only `*` allows it."""
        if self.function is not None:
            return self.function
        if self.file is not None:
            return shlex.join(["python", self.file, *self.args])
        return "" if self.module is None else shlex.join(["python", "-m", self.module, *self.args])


def read_command(ctx: Context) -> CommandSpec:
    """Check a document of type command.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    return _read(ctx, CommandSpec, ("command", "script"))


def read_python(ctx: Context) -> PythonSpec:
    """Check a document of type python.

    Raises:
        BadRequest: naming all fields that are wrong.
    """
    return _read(ctx, PythonSpec, ("code", "function", "file", "module"))


def check_allowed(ctx: Context, spec: CommandSpec | PythonSpec, argv: tuple[str, ...] = ()) -> None:
    """Raises BadRequest if the operator does not allow this program.

    Args:
        argv: what runs instead of the document's program, where a caller is attached.
    """
    patterns, line = ctx.job.permits.commands, shlex.join(argv) if argv else spec.line()
    if not any(fnmatch.fnmatchcase(line, pattern) for pattern in patterns):
        what = f"{line!r:.200} is" if line else f"spec.{'script' if isinstance(spec, CommandSpec) else 'code'} is"
        raise BadRequest(
            f"spec: {what} not allowed on this node; its setting tasks.allow_command has the patterns of what is"
        )


def _read(ctx: Context, into: type[T], programs: tuple[str, ...]) -> T:
    own = into.__struct_encode_fields__  # type: ignore[attr-defined]
    faults = Faults()
    faults.read(lambda: check_spec(ctx, ctx.spec, "spec", own, {}))
    given = {name: value for name, value in ctx.spec.items() if name in own and value is not None}
    spec = faults.read(lambda: ctx.check(given, into, "spec"))
    if spec is not None:
        faults.read(lambda: _check_one(given, programs))
        for check in (_check_program, _check_files, _check_folder, _check_merged):
            faults.read(lambda check=check: check(ctx, spec))  # type: ignore[misc]
    faults.check()
    assert spec is not None, "else it was a fault"
    return spec


def _check_one(given: dict[str, Any], names: tuple[str, ...]) -> None:
    found = [name for name in names if name in given]
    if not found:
        raise BadRequest(f"spec.{names[0]}: missing; give one of {', '.join(names)}")
    if len(found) > 1:
        raise BadRequest(f"spec.{found[1]}: spec.{found[0]} is given, too; give one of them")


def _check_program(_ctx: Context, spec: Any) -> None:
    if isinstance(spec, CommandSpec):
        if spec.command is not None and (not spec.command or not spec.command[0]):
            raise BadRequest("spec.command: empty; give the program and its arguments")
        if any("\0" in part for part in spec.command or (spec.script or "",)):
            raise BadRequest("spec.command: a NUL character cannot be part of a program's arguments")
        if spec.script is not None and spec.nproc_per_node is not None:
            raise BadRequest("spec.nproc_per_node: needs spec.command, which every rank runs")
        return
    if spec.function is not None and not _FUNCTION.fullmatch(spec.function):
        raise BadRequest(f"spec.function: expected module:name, found {spec.function!r:.100}")
    if spec.module is not None and not _MODULE.fullmatch(spec.module):
        raise BadRequest(f"spec.module: expected the name of a module, found {spec.module!r:.100}")
    if spec.args and spec.file is None and spec.module is None:
        raise BadRequest("spec.args: only spec.file and spec.module take arguments; use spec.inputs")
    if any("\0" in part for part in (*spec.args, spec.file or "")):
        raise BadRequest("spec.args: a NUL character cannot be part of a program's arguments")
    if spec.nproc_per_node is not None and spec.file is None and spec.module is None:
        raise BadRequest("spec.nproc_per_node: needs spec.file or spec.module, which every rank runs")


def _check_files(_ctx: Context, spec: Program) -> None:
    faults = Faults()
    for name, source in spec.files.items():
        faults.read(lambda name=name: check_name(name, f"spec.files.{name}"))  # type: ignore[misc]
        if isinstance(source, Source):
            faults.read(lambda name=name, source=source: _check_source(source, f"spec.files.{name}"))  # type: ignore[misc]
    if spec.archive is not None:
        faults.read(lambda: _check_source(spec.archive, "spec.archive"))
    for i, pattern in enumerate(spec.outputs):
        faults.read(lambda i=i, pattern=pattern: check_name(pattern, f"spec.outputs[{i}]"))  # type: ignore[misc]
    faults.check()


def _check_source(source: Source | None, where: str) -> None:
    assert source is not None
    if (source.path is None) == (source.url is None):
        raise BadRequest(f"{where}: give one of path and url")
    if source.headers and source.url is None:
        raise BadRequest(f"{where}.headers: only for a url; leave them out")


def check_name(name: str, where: str) -> str:
    """A relative path that stays inside its folder.

    Raises:
        BadRequest: it does not.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or any(len(each) > 255 for each in parts):
        raise BadRequest(f"{where}: expected a path below the task's folder, without `..`")
    return name


def _check_folder(_ctx: Context, spec: Program) -> None:
    if spec.workdir is None:
        return
    if not spec.workdir.startswith(("/", "~")):
        check_name(spec.workdir, "spec.workdir")
    elif spec.files or spec.archive is not None:
        raise BadRequest(
            "spec.workdir: an existing folder, which spec.files and spec.archive would change; leave it out, or give "
            "a path relative to the task's own folder"
        )


def _check_merged(ctx: Context, _spec: Program) -> None:
    if ctx.merge_children:
        raise BadRequest("merge_children: such tasks cannot be merged; send each by itself")
