"""The main function of a task's child process: reads the job, runs the runner, writes the outcome."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import importlib
import importlib.util
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from flowmesh.files.removal import remove_path
from flowmesh.messages.job import JOB_FILE, OUTCOME_FILE, Fault, Job, Outcome
from flowmesh.messages.output import unused_in_output
from flowmesh.messages.text import encode_json
from flowmesh.processes.pipe import VERSION, Finished, Hello, Phase, Pipe
from flowmesh.redaction import Redactor, in_document
from flowmesh.validation.unused import unused_beside_spec
from runners.api import Cancelled, Context, MissingDependency, Runner, RunnerError
from runners.gpu_memory import is_shortage
from runners.run_warnings import collected

MAX_MESSAGE_CHARS = 2000
MAX_DETAIL_CHARS = 64 * 1024
NO_TRACEBACK = (Fault.BAD_REQUEST, Fault.MISSING_DEPENDENCY)
"""The message says all of it."""
LIBRARIES = (
    "torch", "transformers", "vllm", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy",
    "sentence_transformers", "faiss", "smolagents", "openai",
)  # fmt: skip
"""Whose versions the node keeps with a task: a result may depend on them."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_DISK = (*_FULL, errno.EROFS, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ENOTCONN, errno.ESTALE, errno.EACCES)
"""What may be mended while an outcome waits to be written."""
OUTCOME_WAIT_S = 300.0
"""How long a finished task waits for a place for its outcome. A stop ends that wait with the process."""
OUTCOME_PAUSE_S = 0.5

# Created once in the fork server: building one takes longer than a small task.
_job_decoder = msgspec.json.Decoder(Job)
_REHEARSAL = Job(
    attempt=0, task_id="", task_type="echo", runner="runners.echo:EchoRunner", task={"spec": {}},
    out_dir="", results_dir="", cache_dir="", tmp_dir="",
)  # fmt: skip


def prepare() -> None:
    """In the fork server, for all its children: handlers of signals and of the log. The names of variables are judged.

    Whatever a child does itself it pays for twice: the first write to each page of memory that it shares with the fork
    server costs a page fault and a copy.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    list(in_document({}, os.environ))


def rehearse() -> None:
    """Run a minimal task in a spare child before it has a task, which takes its page faults in advance."""
    job = _job_decoder.decode(encode_json(_REHEARSAL))
    encode_json(run(job, Context(job)))


def main(pipe: Pipe, spool: Path) -> int:
    """Run the job in `spool`; returns the exit code, 0 for success and 1 for failure."""
    if not logging.getLogger().handlers:  # its fork server has imported nothing
        prepare()
    job = _job_decoder.decode((spool / JOB_FILE).read_bytes())
    pipe.send(Hello(VERSION, os.getpid()), drop=True)
    ctx = Context(job, pipe)
    signal.signal(signal.SIGTERM, _on_sigterm)
    outcome = run(job, ctx)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the outcome is decided; the process exits on its own
    _flush_logs()
    outcome, data = _encode(outcome)
    _write_at_last(spool, data, job, pipe)
    pipe.send(Finished(outcome.ok), drop=True)
    return 0 if outcome.ok else 1


def run(job: Job, ctx: Context) -> Outcome:
    """Run the runner and return its outcome; every exception becomes part of it."""
    fault, message, result = None, "", None
    detail = ""
    try:
        with collected(ctx):
            try:
                ctx.unused += [*unused_in_output(ctx.spec.get("output")), *unused_beside_spec(job.task)]
                result = runner_of(job.runner).run(ctx)
            finally:
                ctx.report_unused()
        if not isinstance(result, dict):
            raise TypeError(f"{job.runner} returned {type(result).__name__}, not a mapping")
        if ctx.warnings:
            result = {**result, "warnings": ctx.warnings}
        result = msgspec.to_builtins(result, str_keys=True, enc_hook=_plain)
    except Cancelled as error:
        fault, message = Fault.CANCELLED, error.reason
    except RunnerError as error:
        fault, message = error.fault, str(error)
        detail = "" if error.says_all or error.fault in NO_TRACEBACK else traceback.format_exc()
    except ModuleNotFoundError as error:
        fault, message, detail = _missing(error), _one_line(error), traceback.format_exc()
        if fault is Fault.MISSING_DEPENDENCY:
            message = str(MissingDependency(str(error.name)))
    except MemoryError as error:
        fault, message, detail = Fault.HOST_OOM, f"out of host memory: {error}", traceback.format_exc()
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - the boundary: all of it is an outcome
        fault, message, detail = _fault_of(error), _no_room(error, job) or _one_line(error), traceback.format_exc()
    if fault is not None:
        result = None
        ctx.log.error("task failed: %s", message)
        if detail:
            _flush_logs(detail)
    ctx.finish()
    # Here, before anything of it is written: from here it reaches events, responses.json, the journal and logs.
    secrets = [*in_document(job.task, os.environ), *([job.served.api_key] if job.served else [])]
    if secrets and result is not None:
        try:
            result = Redactor(secrets, exact=True).deep(result)
        except RecursionError:
            fault, message, result = Fault.ERROR, "the result is nested too deep to hide the task's secrets in it", None
    redact = Redactor(secrets, prose=True)
    return Outcome(
        attempt=job.attempt,
        ok=fault is None,
        result=result,
        fault=fault,
        message=redact(message)[:MAX_MESSAGE_CHARS],
        detail=redact(detail)[-MAX_DETAIL_CHARS:],
        archives=tuple(ctx.archives),
        uploads=tuple(ctx.uploads),
        phases=ctx.phases,
        rows=ctx.rows,
        spent_usd=ctx.spent_usd,
        command=ctx.command,
        warnings=tuple(redact(line) for line in ctx.warnings),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Of what was imported, as the modules themselves say."""
    loaded = ((name, getattr(sys.modules.get(name), "__version__", None)) for name in LIBRARIES)
    return {name: str(version)[:80] for name, version in loaded if version is not None}


def _flush_logs(last: str = "") -> None:
    """Flush the task's logs, with a last text on stderr. A full disk must not prevent the outcome."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, last)):
        with contextlib.suppress(OSError, ValueError):  # the disk is full, or the task closed the stream
            print(text, end="\n" if text else "", file=stream, flush=True)


def runner_of(reference: str) -> Runner:
    """The runner that a job names: `module:Class`."""
    module, _, name = reference.partition(":")
    runner: Runner = getattr(importlib.import_module(module), name)()
    return runner


def _fault_of(error: BaseException) -> Fault:
    return Fault.GPU_OOM if is_shortage(error) else Fault.ERROR


def _missing(error: ModuleNotFoundError) -> Fault:
    """A whole package that is missing; a part of one that is there is an error of its version."""
    package = (error.name or "").partition(".")[0]
    try:
        there = not package or package in sys.stdlib_module_names or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        there = True
    return Fault.ERROR if there else Fault.MISSING_DEPENDENCY


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _no_room(error: BaseException, job: Job) -> str:
    """Which disk is full, if that ended the task; else empty. Libraries wrap the system's error in their own."""
    at: BaseException | None = error
    while at is not None:
        in_message = os.strerror(errno.ENOSPC) in str(at)
        if in_message or (isinstance(at, OSError) and at.errno in _FULL):
            names = [at.filename] if isinstance(at, OSError) and isinstance(at.filename, str) else []
            folders = [*(os.path.dirname(name) or "." for name in names), job.out_dir, job.tmp_dir, job.cache_dir]  # noqa: PTH120
            folder = min(folders, key=_free_bytes)
            return f"the disk is full: {folder} has {_free_bytes(folder) >> 20} MiB left ({_one_line(at)})"
        at = at.__cause__ or at.__context__
    return ""


def _free_bytes(folder: str) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 1 << 62  # the folder is missing, so it is not the full one
    return found.f_bavail * found.f_frsize


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise Cancelled("terminated by the node")


def _plain(value: Any) -> Any:
    """Convert what a result may contain besides JSON types: numpy and torch scalars and arrays, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a result cannot contain a {type(value).__name__}: return JSON types, arrays or paths")


def _encode(outcome: Outcome) -> tuple[Outcome, bytes]:
    """The outcome as JSON, and what it became: a failure where JSON cannot hold the result, as one nested too deep.

    NaN and infinity become null, half surrogate pairs U+FFFD.
    """
    try:
        return outcome, encode_json(outcome)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        message = f"the result cannot be written as JSON: {_one_line(error)}"
        failed = msgspec.structs.replace(outcome, ok=False, result=None, fault=Fault.ERROR, message=message)
        return failed, encode_json(failed)


def _write_at_last(spool: Path, data: bytes, job: Job, pipe: Pipe) -> None:
    """Write the outcome. What was computed is not lost while the node's disk is full, read-only or gone for a while.

    Raises:
        OSError: it could not be written within OUTCOME_WAIT_S.
    """
    end = time.monotonic() + OUTCOME_WAIT_S
    closed = False
    while True:
        try:
            return _write(spool / OUTCOME_FILE, data)
        except OSError as error:
            if error.errno == errno.ENOENT and _made_again(spool):  # a cleaner had deleted it
                continue
            if error.errno in _FULL:
                remove_path(Path(job.tmp_dir))  # on the same disk, and no longer needed
            if error.errno == errno.EMFILE and not closed:
                _close_all_but(pipe.fileno())  # the task had opened all that it may; nothing of it is needed any more
                closed = True
                continue
            if error.errno not in _OF_THE_DISK or time.monotonic() > end:
                raise
            pipe.send(Phase(f"the outcome cannot be written: {error.strerror}"), drop=True)
            time.sleep(OUTCOME_PAUSE_S)


def _made_again(folder: Path) -> bool:
    """Make a folder that is missing; False where that cannot be done, or it is there."""
    try:
        folder.mkdir(mode=0o700)
    except OSError:
        return False
    return True


def _close_all_but(kept: int) -> None:
    """Close this process's descriptors above 2, except one."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _write(path: Path, data: bytes) -> None:
    """Write the file atomically."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)
