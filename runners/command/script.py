"""A forked process becomes a Python program: like a fresh interpreter, but with libraries already imported."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.machinery
import io
import json
import logging
import multiprocessing.process
import os
import runpy
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from flowmesh.processes import threads

USAGE = 2
NOT_FLUSHED = 120
"""Exit statuses of Python: a file that cannot be opened; standard output that cannot be written."""
_OURS = ("runners", "flowmesh", "tests")


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What runs as `__main__`: one of file, module, code and function."""

    argv: tuple[str, ...]
    """sys.argv"""
    path: str
    """sys.path[0]"""
    file: str | None = None
    module: str | None = None
    code: str | None = None
    function: str | None = None
    inputs: dict[str, Any] | None = None
    """What a function is called with, and a file's global `inputs`. None: there are none."""
    result: str | None = None
    """The file that gets the function's result, or a file's global `result`, as JSON."""


def become(script: Script, folder: Path, env: Mapping[str, str], umask: int | None = None) -> NoReturn:
    """Run a script and end this process as the interpreter would: exit status, output, functions of `atexit`.

    Call it in a fork, on the main thread.
    """
    before = set(sys.modules)
    _fresh(script, folder, env, umask)
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    status = _ended(lambda: _run(script, main))
    _finish(main, before, status)


def _fresh(script: Script, folder: Path, env: Mapping[str, str], umask: int | None) -> None:
    """Undo what this process has that a new interpreter has not."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):
                signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.chdir(folder)
    if umask is not None:
        os.umask(umask)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    if (count := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(count) > 0:
        threads.use(int(count))
    sys.argv[:] = script.argv
    sys.orig_argv[:] = [sys.executable, *script.argv]
    own = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [script.path, *own, *(path for path in sys.path if path not in ("", script.path, *own))]
    multiprocessing.process.ORIGINAL_DIR = str(Path.cwd())  # type: ignore[attr-defined]  # spawned processes look there
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]  # else they would hide the program's own modules of that name
    _open_streams()


def _open_streams() -> None:
    """Standard streams as for descriptors 0 to 2: lines on a terminal, blocks into a file."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0] or "utf-8"
    sys.stdin = sys.__stdin__ = _text(0, "r", encoding)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _text(1, "w", encoding, line=os.isatty(1), through=unbuffered)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, "w", encoding, line=True, through=unbuffered, errors="backslashreplace")  # type: ignore[misc]


def _text(
    fd: int, mode: str, encoding: str, *, line: bool = False, through: bool = False, errors: str = "strict"
) -> io.TextIOWrapper:
    binary = os.fdopen(fd, f"{mode}b", closefd=False)
    stream = io.TextIOWrapper(binary, encoding=encoding, errors=errors, line_buffering=line, write_through=through)
    stream.mode = mode  # type: ignore[misc]
    return stream


def _run(script: Script, main: types.ModuleType) -> None:
    if script.module is not None:
        runpy._run_module_as_main(script.module)  # type: ignore[attr-defined]  # what `python -m` calls
    elif script.function is not None:
        _call(script)
    else:
        _execute(script, main)


def _execute(script: Script, main: types.ModuleType) -> None:
    name = "<string>" if script.file is None else os.path.join(os.getcwd(), script.file)  # noqa: PTH109,PTH118
    if script.file is not None:
        main.__dict__.update(__file__=name, __cached__=None, __spec__=None)
        main.__dict__["__loader__"] = importlib.machinery.SourceFileLoader("__main__", name)
        try:
            source: bytes | str = Path(name).read_bytes()
        except OSError as error:
            why = f"[Errno {error.errno}] {error.strerror}"
            sys.stderr.write(f"{sys.executable}: can't open file {name!r}: {why}\n")
            raise SystemExit(USAGE) from None
    else:
        source = script.code or ""
    if script.inputs is not None:
        main.__dict__["inputs"] = script.inputs
    try:
        exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as end:
        if end.code is not None and not (isinstance(end.code, int) and end.code & 0xFF == 0):
            raise
    if script.result is not None and "result" in main.__dict__:
        _keep(main.__dict__["result"], script.result)


def _call(script: Script) -> None:
    module, _, names = str(script.function).partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    result = found(**(script.inputs or {}))
    if script.result is not None:
        _keep(result, script.result)


def _keep(result: Any, path: str) -> None:
    try:
        text = json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        sys.stderr.write(f"the result cannot be written as JSON: {error}\n")
        raise SystemExit(1) from None
    Path(path).write_text(text)


def _ended(run: Callable[[], None]) -> int:
    """The exit status, as Python gives it; minus SIGINT for a Ctrl-C that nobody handled."""
    try:
        run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException as error:  # noqa: BLE001 - the interpreter's own boundary
        _show(error)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _show(error: BaseException) -> None:
    """Print a traceback that begins in the program, not here."""
    own = Path(__file__).resolve()
    at = error.__traceback__
    while at is not None and (
        Path(at.tb_frame.f_code.co_filename).resolve() == own
        or at.tb_frame.f_globals.get("__name__") in ("runpy", "importlib")
        or at.tb_frame.f_code.co_filename.startswith("<frozen ")
    ):
        at = at.tb_next
    if isinstance(error, SyntaxError | ImportError) and at is None:
        traceback.print_exception(type(error), error, None)
        return
    sys.excepthook(type(error), error.with_traceback(at), at)


def _finish(main: types.ModuleType, before: set[str], status: int) -> NoReturn:
    """What the interpreter does at its end. Its own teardown is left out: it would go through all libraries."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
        for name in set(sys.modules) - before:
            del sys.modules[name]
        main.__dict__.clear()
        gc.collect()  # closes, and so writes, files that the program left open
    except BaseException as error:  # noqa: BLE001 - as above
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or NOT_FLUSHED
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def not_alike(script: Script, env: Mapping[str, str], seen: Mapping[str, str], program: str | None) -> str:
    """Why a fork of this process would not behave as a fresh interpreter; empty if it would.

    Args:
        env: the program's environment.
        seen: the environment that this process's libraries were imported in.
        program: the interpreter that was asked for, as found in PATH; None: this one's.
    """
    if program is not None and Path(program).parent.resolve() != Path(sys.executable).parent.resolve():
        return f"{program} is another interpreter than {sys.executable}"
    differing = sorted(name for name in {*env, *seen} if _read_early(name) and env.get(name) != seen.get(name))
    if differing:
        return f"libraries read {', '.join(differing[:5])} when they are imported, and the value differs here"
    for folder in (script.path, *env.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and (names := _hidden(Path(folder))):
            return f"{folder} has modules that libraries here are named like: {', '.join(names[:5])}"
    return ""


EARLY = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "VLLM_", "TRITON_", "LD_", "KMP_", "GOMP_", "MKL_",
    "OPENBLAS_", "PYTHONHASHSEED", "PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONWARNINGS", "PYTHONUTF8", "ACCELERATE_",
)  # fmt: skip
"""How the names of variables begin that are read by an interpreter's start or an import, and so too early to change."""
_LATE = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_TOKEN")


def _read_early(name: str) -> bool:
    return name.startswith(EARLY) and name not in _LATE


def _hidden(folder: Path) -> list[str]:
    """Modules of a folder that were imported from elsewhere."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return []
    found = []
    for entry in entries:
        name = entry.removesuffix(".py")
        module = sys.modules.get(name)
        if module is None or name in _OURS or not (entry.endswith(".py") or (folder / entry / "__init__.py").is_file()):
            continue
        at = getattr(module, "__file__", None) or ""
        if not at or Path(at).resolve().parent not in (folder.resolve(), (folder / name).resolve()):
            found.append(name)
    return found


def parse(argv: Sequence[str], folder: str) -> Script | str:
    """The script of a command line such as `python -m train --lr 1`; or why a fork cannot run it."""
    rest = list(argv[1:])
    while rest and rest[0] == "-u":
        rest.pop(0)
    if not rest:
        return "there is no script"
    if rest[0] == "-m" and len(rest) > 1:
        return Script(argv=("-m", *rest[2:]), path=folder, module=rest[1])
    if rest[0] == "-c" and len(rest) > 1:
        return Script(argv=("-c", *rest[2:]), path="", code=rest[1])
    if rest[0].startswith("-"):
        return f"the option {rest[0]} is for the interpreter's start"
    file = rest[0]
    at = Path(folder, file)
    if at.is_dir() or at.suffix in (".zip", ".pyz"):
        return f"{file} is no file of source text"
    return Script(argv=tuple(rest), path=str(at.resolve().parent), file=file)
