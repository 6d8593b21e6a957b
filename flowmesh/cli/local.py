"""A node of our own on this machine, with an embedded Redis: for `flowmesh run`.

Both live below one private folder. They end with us: `close()` ends them within a bound; where we are killed, the
kernel ends Redis and tells the node to go, and the next `flowmesh run` removes the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from flowmesh.cli import deployment, locate
from flowmesh.cli.control import Control
from flowmesh.cli.embedded import EmbeddedRedis, private_dir
from flowmesh.errors import EXIT_CONFIG, ConfigError, LaunchError, UnavailableError
from flowmesh.processes import linux, proc_files

SUPERVISOR = (sys.executable, "-m", "flowmesh.cli.supervisor")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
FORCED_STOP_TIMEOUT_S = 3.0
_SWEEP_TIMEOUT_S = 5.0
_PREFIX = "flowmesh-run-"
_LOG_LINES = 20
_NOT_INHERITED = ("REDIS_URL", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "STATE_DIRECTORY")


class LocalOptions(msgspec.Struct, frozen=True, kw_only=True):
    config: str | None = None
    results_dir: str | None = None
    program: tuple[str, ...] = SUPERVISOR
    """The node's command line, before its options."""


class LocalNode:
    """The node and its Redis, as a context manager. Start it from the main thread.

    Args:
        impatient: says whether the user wants out at once; asked while something is waited for.
    """

    def __init__(self, options: LocalOptions, impatient: Callable[[], bool] = lambda: False) -> None:
        self._options = options
        self._impatient = impatient
        self._dir: Path | None = None
        self._lock = -1
        self._redis: EmbeddedRedis | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._others: set[int] = set()

    def __enter__(self) -> LocalNode:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def redis_url(self) -> str:
        assert self._redis is not None
        return self._redis.url

    @property
    def state_dir(self) -> Path:
        assert self._dir is not None
        return self._dir / "state"

    def control(self) -> Control:
        return Control(self.state_dir)

    def wait_idle(self, check: Callable[[], None]) -> deployment.Worker:
        """Wait for a worker of the node to be idle. `check` is called meanwhile, and may raise to give up.

        Raises:
            LaunchError: the node ended, or no worker came up within START_TIMEOUT_S.
            ConfigError: the node said that a setting is wrong.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        with locate.connected(self.redis_url) as client:
            while True:
                check()
                workers = deployment.read_workers(client)
                if idle := [each for each in workers if each.status == "IDLE" and each.alive]:
                    return idle[0]
                self.raise_if_gone("while it started")
                if time.monotonic() > deadline:
                    self.show_log()
                    said = (
                        ", ".join(f"{each.worker_id} is {each.status}" for each in workers) or "it has not registered"
                    )
                    raise LaunchError(f"the node was not ready within {START_TIMEOUT_S:g} s: {said}")
                time.sleep(0.02)

    def raise_if_gone(self, when: str) -> None:
        """Raise what the node died of, if it has."""
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return
        last = (self.log_lines() or [""])[-1]
        if code == EXIT_CONFIG and last:
            raise ConfigError(last.removeprefix("flowmesh-supervisor:").removeprefix("flowmesh:").strip())
        self.show_log()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise LaunchError(f"the node ended {when} ({how})")

    def log_lines(self) -> list[str]:
        """The end of what the node has written."""
        assert self._dir is not None
        return _last_lines(self._dir / "node.log")

    def show_log(self) -> None:
        """Print the end of the node's log on standard error: it goes with us."""
        servers = sorted((self.state_dir / "log").glob("*.log"))
        for name, lines in [("node", self.log_lines()), *((path.stem, _last_lines(path)) for path in servers)]:
            for line in lines:
                print(f"{name} | {line}", file=sys.stderr)

    def close(self) -> None:
        """End the node, what it left behind, and Redis; remove the folder. Bounded by STOP_TIMEOUT_S and a little."""
        if self._process is not None:
            self._stop(self._process)
            self._sweep()
        if self._redis is not None:
            self._redis.close()
        if self._dir is not None:
            shutil.rmtree(self._dir, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        self._process, self._redis, self._dir, self._lock = None, None, None, -1

    def _start(self) -> None:
        sweep_abandoned()
        linux.become_subreaper()
        self._others = set(proc_files.children(os.getpid()))
        self._dir = private_dir(_PREFIX)
        self._lock = _lock(self._dir)
        self._redis = EmbeddedRedis(self._dir)
        self._redis.start()
        self.state_dir.mkdir(mode=0o700)
        owner = os.getpid()

        def in_child() -> None:
            linux.die_with_parent(signal.SIGTERM)
            if os.getppid() != owner:  # it died before the line above
                os._exit(1)

        with open(self._dir / "node.log", "wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={name: value for name, value in os.environ.items() if name not in _NOT_INHERITED},
                    pass_fds=(self._lock,),  # the folder is in use for as long as the node lives, even without us
                    start_new_session=True,  # a Ctrl-C on our terminal is ours to act on
                    preexec_fn=in_child,  # noqa: PLW1509 - one system call; its library was loaded before the fork
                )
            except OSError as error:
                raise LaunchError(f"the node cannot be started: {error}") from None

    def _command(self) -> list[str]:
        settings = {
            "redis.url": self.redis_url,
            "redis.task_topic": "tasks",
            "node.state_dir": str(self.state_dir),
            "node.worker_id": f"local-{secrets.token_hex(4)}",
            "processes.drain_timeout_s": "1",
        }
        if self._options.results_dir is not None:
            settings["results.dir"] = str(Path(self._options.results_dir).absolute())
        config = [] if self._options.config is None else ["--config", self._options.config]
        return [*self._options.program, *config, *(f"--set={name}={value}" for name, value in settings.items())]

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, and a second one where it must be quick; SIGKILL where that does not do."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        forced = False
        process.terminate()
        while process.poll() is None and time.monotonic() < deadline:
            if self._impatient() and not forced:
                forced = True
                deadline = min(deadline, time.monotonic() + FORCED_STOP_TIMEOUT_S)
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.kill()
        process.wait()

    def _sweep(self) -> None:
        """End what the node left: its orphans are our children now."""
        assert self._redis is not None
        keep = self._others | {self._redis.pid}
        deadline = time.monotonic() + _SWEEP_TIMEOUT_S
        while left := set(proc_files.children(os.getpid())) - keep:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                raise UnavailableError(f"processes of the node cannot be ended: {', '.join(map(str, sorted(left)))}")
            time.sleep(0.005)


def sweep_abandoned(root: Path | None = None) -> None:
    """Remove the folders of runs that were killed: those of ours whose lock nobody holds."""
    for where in {root} if root is not None else {Path(tempfile.gettempdir()), Path("/tmp")}:
        for folder in where.glob(f"{_PREFIX}*"):
            try:
                if folder.is_symlink() or folder.lstat().st_uid != os.geteuid():
                    continue
                lock = _lock(folder, create=False)
            except OSError:  # in use, or not one of ours after all
                continue
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _last_lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()[-64 * 1024 :]
    except OSError:
        return []
    return [line for line in data.decode(errors="replace").splitlines() if line.strip()][-_LOG_LINES:]


def _lock(folder: Path, *, create: bool = True) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
