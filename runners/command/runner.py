"""Runs `command` and `python` tasks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.messages import attach
from flowmesh.messages.job import CommandExit, Fault
from runners.api import BadRequest, Cancelled, Context, Runner, RunnerError
from runners.command import outputs, start, workspace
from runners.command.lines import Lines
from runners.command.process import Failed, Program, tail
from runners.command.script import Script, become, not_alike, parse
from runners.command.start import NoProgram, Place
from runners.command.task import CommandSpec, PythonSpec, check_allowed, read_command, read_python
from runners.command.task import Program as ProgramSpec
from runners.command.workspace import Workspace

MAX_RESULT_BYTES = 16 * 1024 * 1024
SHELL = ("/bin/sh", "-e", "-c")
MAIN = "main.py"
"""The file of inline code, in the task's TMPDIR."""
_FROM_NODE = ("TMPDIR", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "FLOWMESH_")
"""How the names of variables begin that are the node's, whatever the caller's environment has."""
_OF_USER = ("HOME", "USER", "LOGNAME")
"""The same, where tasks run as a user of their own."""


class Call(msgspec.Struct, frozen=True):
    """A program that is to be started."""

    space: Workspace
    place: Place
    argv: tuple[str, ...] = ()
    """What the caller wants to run; empty: what the document says."""


class CommandRunner(Runner):
    def run(self, ctx: Context) -> dict[str, Any]:
        spec = read_command(ctx)

        def begin(call: Call) -> int:
            argv = call.argv or spec.command or (*SHELL, str(spec.script))
            return _spawn(ctx, spec, call.place, argv, python=False)

        return _run(ctx, spec, begin)


class PythonRunner(Runner):
    def run(self, ctx: Context) -> dict[str, Any]:
        spec = read_python(ctx)
        return _run(ctx, spec, lambda call: _begin_python(ctx, spec, call))


def _run(ctx: Context, spec: CommandSpec | PythonSpec, begin: Callable[[Call], int]) -> dict[str, Any]:
    if spec.attach is None:
        check_allowed(ctx, spec)
    space = workspace.make(ctx, spec)
    with _lines(space) as lines, _caller(spec) as attached:
        call, connection, logs = Call(space, Place(space.folder, space.env, lines)), None, ctx.out_dir / "logs"
        if attached is not None:
            caller = attached.caller
            if not caller.argv:
                raise BadRequest("spec.attach: the caller names no program")
            check_allowed(ctx, spec, caller.argv)
            node_has = (*_FROM_NODE, *_OF_USER) if ctx.job.permits.own_user else _FROM_NODE
            ours = {name: value for name, value in space.env.items() if name.startswith(node_has)}
            if not os.access(caller.cwd, os.X_OK):
                raise BadRequest(
                    f"spec.attach: the user that tasks run as may not enter {caller.cwd}; start it elsewhere"
                )
            place = Place(Path(caller.cwd), {**caller.env, **ours}, lines, attached.stdio, caller.umask)
            call, connection = Call(space, place, caller.argv), attached.connection
        own_logs = None if attached is not None else logs
        ctx.phase("run")
        try:
            Program(ctx, begin(call), lines, connection, own_logs).until_end()
        except (RunnerError, Cancelled) as error:
            if isinstance(error, NoProgram):
                ctx.command = CommandExit(code=error.status)
            with contextlib.suppress(OSError):
                outputs.collect(ctx, call.place.folder, spec.outputs, strict=False)
            raise
        finally:
            if lines.bad:
                ctx.log.warning("progress: %d lines were no JSON objects of at most 4096 bytes", lines.bad)
    if spec.outputs:
        ctx.phase("save")
    files = outputs.collect(ctx, call.place.folder, spec.outputs, strict=True)
    result: dict[str, Any] = {"ok": True, "exit_code": 0}
    found = _result(space.result)
    if found is not None:
        result["result"] = found
    if spec.outputs:
        result["outputs"] = files
    if lines.metrics:
        result["metrics"] = lines.metrics
    if own_logs is not None:
        result |= {"stdout": tail(logs, "stdout"), "stderr": tail(logs, "stderr")}
    return result


@contextlib.contextmanager
def _lines(space: Workspace) -> Iterator[Lines]:
    lines = Lines(space.fifo)
    try:
        yield lines
    finally:
        lines.close()


@contextlib.contextmanager
def _caller(spec: ProgramSpec) -> Iterator[attach.Attached | None]:
    """The terminal of `flowmesh exec`, if the task has one.

    Raises:
        BadRequest: it cannot be reached.
    """
    if spec.attach is None:
        yield None
        return
    try:
        attached = attach.receive(spec.attach)
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"spec.attach: nobody answers there ({error}); it is for `flowmesh exec`, whose user has to be the one "
            "that tasks run as"
        ) from None
    try:
        yield attached
    finally:
        attached.connection.close()
        for fd in attached.stdio:
            os.close(fd)


def _spawn(ctx: Context, spec: ProgramSpec, place: Place, argv: tuple[str, ...], *, python: bool) -> int:
    if spec.nproc_per_node is not None:
        argv = tuple(start.torchrun(ctx, spec.nproc_per_node, argv, python=python))
        env = {**place.env, **start.of_group(ctx, spec.nproc_per_node)}
        return start.spawn(argv, msgspec.structs.replace(place, env=env))
    return start.spawn((sys.executable, *argv) if python else argv, place)


def _begin_python(ctx: Context, spec: PythonSpec, call: Call) -> int:
    """Start it as a fork of this process, with its libraries; as a new interpreter where that would not be the same."""
    if missing := [name for name in spec.preload if name not in sys.modules]:
        ctx.log.warning(
            "preload: %s not imported in this environment's fork server, so the program imports it; see "
            "environments.NAME.preload in the node's settings",
            ", ".join(missing),
        )
    place = call.place
    argv, script, program = _script(ctx, spec, call)
    if spec.nproc_per_node is not None:
        return _spawn(ctx, spec, place, argv, python=True)
    if isinstance(script, Script):
        seen = {name: value for name, value in os.environ.items() if name not in (ctx.spec.get("env") or {})}
        why = not_alike(script, _imported_with(place.env), _imported_with(seen), program)
        if not why:
            return start.fork(lambda: become(script, place.folder, place.whole_env(), place.umask), place)
    else:
        why = script
    if spec.code is not None or spec.function is not None:
        raise BadRequest(f"spec.{'code' if spec.code is not None else 'function'}: {why}; use spec.file")
    ctx.log.warning("started as a new interpreter, without preloaded libraries: %s", why)
    return start.spawn(call.argv, place) if call.argv else _spawn(ctx, spec, place, argv, python=True)


def _imported_with(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment without those that the node sets for its own libraries."""
    return {name: value for name, value in env.items() if workspace.is_own(name, value)}


def _script(ctx: Context, spec: PythonSpec, call: Call) -> tuple[tuple[str, ...], Script | str, str | None]:
    """The arguments of an interpreter; what a fork runs, or why it cannot; the interpreter that the caller wants."""
    folder = str(call.place.folder)
    if call.argv:
        program = shutil.which(call.argv[0], path=call.place.env.get("PATH"))
        return call.argv[1:], parse(call.argv, folder), program or call.argv[0]
    if spec.file is not None:
        return (spec.file, *spec.args), parse(("python", spec.file, *spec.args), folder), None
    if spec.module is not None:
        return ("-m", spec.module, *spec.args), parse(("python", "-m", spec.module, *spec.args), folder), None
    result = str(call.space.result)
    if spec.function is not None:
        found = Script(argv=("-c",), path=folder, function=spec.function, inputs=spec.inputs, result=result)
        return (), found, None
    file = ctx.tmp_dir / MAIN
    file.write_text(str(spec.code))
    return (), Script(argv=(str(file),), path=folder, file=str(file), inputs=spec.inputs, result=result), None


def _result(path: Path) -> Any:
    """What the program left as its result; None if nothing.

    Raises:
        Failed: it is too large, or no JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_RESULT_BYTES:
            raise _no_result(f"has {size} bytes; at most {MAX_RESULT_BYTES} are kept: write it to an output")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise _no_result(f"is not JSON: {error}") from None


def _no_result(what: str) -> Failed:
    return Failed(f"the program succeeded, and the file that FLOWMESH_RESULT names {what}", Fault.ERROR)
