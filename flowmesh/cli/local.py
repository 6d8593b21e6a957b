"""A temporary node with an embedded Redis on this machine, for `flowmesh run`.

Both use one private folder and end with this process: `close()` stops them within a bound. If this process is killed,
the kernel kills Redis and sends SIGTERM to the node, and the next `flowmesh run` removes the folder.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from flowmesh.cli import deployment, locate
from flowmesh.cli.bound_process import start_bound
from flowmesh.cli.control import Control
from flowmesh.cli.embedded import EmbeddedRedis
from flowmesh.cli.private_folder import RUN_PREFIX, lock_folder, private_dir, sweep_abandoned
from flowmesh.errors import EXIT_CONFIG, ConfigError, LaunchError, UnavailableError
from flowmesh.files.removal import remove_path
from flowmesh.processes import linux, proc_files
from flowmesh.settings.load import load

SUPERVISOR = (sys.executable, "-m", "flowmesh.cli.supervisor")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
FORCED_STOP_TIMEOUT_S = 3.0
_SWEEP_TIMEOUT_S = 5.0
_READY_POLL_S = 0.02
_EXIT_POLL_S = 0.05
_SWEEP_POLL_S = 0.005
_LOG_LINES = 20
_NOT_INHERITED = ("REDIS_URL", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "STATE_DIRECTORY")


class LocalOptions(msgspec.Struct, frozen=True, kw_only=True):
    config: str | None = None
    results_dir: str | None = None
    read_roots: tuple[str, ...] = ()
    """Absolute folders whose files the documents may name, besides those of the settings."""
    keeps_results: bool = True
    """False: without `results_dir`, results are removed with the node."""
    settings: dict[str, str] = {}
    """Other settings, which win over those of the file."""
    program: tuple[str, ...] = SUPERVISOR
    """The node's command, before its options."""


class LocalNode:
    """The node and its Redis, as a context manager. Enter it from the main thread.

    Args:
        impatient: whether the user asked to stop at once; checked while the node stops.
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
        """Wait until a worker of the node is idle. `check` is called meanwhile, and may raise to give up.

        Raises:
            LaunchError: the node exited, or no worker was ready within START_TIMEOUT_S.
            ConfigError: the node refused a setting.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        with locate.connected(self.redis_url) as client:
            while True:
                check()
                workers = deployment.read_workers(client)
                if idle := [worker for worker in workers if worker.status == "IDLE" and worker.alive]:
                    return idle[0]
                self.raise_if_gone("while it started")
                if time.monotonic() > deadline:
                    self.show_log()
                    states = ", ".join(f"{worker.worker_id} is {worker.status}" for worker in workers)
                    raise LaunchError(
                        f"the node was not ready within {START_TIMEOUT_S:g} s: {states or 'it has not registered'}; "
                        "its log is above"
                    )
                time.sleep(_READY_POLL_S)

    def raise_if_gone(self, when: str) -> None:
        """Raise an error if the node has exited.

        Args:
            when: ends the sentence "the node exited …".

        Raises:
            ConfigError: the node refused a setting.
            LaunchError: it exited otherwise; its log is printed first.
        """
        assert self._process is not None
        code = self._process.poll()
        if code is None:
            return
        last = (self.log_lines() or [""])[-1]
        if code == EXIT_CONFIG and last:
            raise ConfigError(last.removeprefix("flowmesh-supervisor:").removeprefix("flowmesh:").strip())
        self.show_log()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise LaunchError(f"the node exited {when} ({how}); its log is above")

    def log_lines(self) -> list[str]:
        """The last lines of the node's log."""
        assert self._dir is not None
        return _last_lines(self._dir / "node.log")

    def show_log(self) -> None:
        """Print the end of the logs of the node and its fork servers on standard error. `close()` removes them."""
        servers = sorted((self.state_dir / "log").glob("*.log"))
        for name, lines in [("node", self.log_lines()), *((path.stem, _last_lines(path)) for path in servers)]:
            for line in lines:
                print(f"{name} | {line}", file=sys.stderr)

    def close(self) -> None:
        """Stop the node, processes that it left, and Redis; remove the folder. Bounded by about STOP_TIMEOUT_S."""
        if self._process is not None:
            self._stop(self._process)
            self._sweep()
        if self._redis is not None:
            self._redis.close()
        if self._dir is not None:
            remove_path(self._dir)
        if self._lock >= 0:
            os.close(self._lock)
        self._process, self._redis, self._dir, self._lock = None, None, None, -1

    def permits(self) -> dict[str, str]:
        """What documents may do here: they are the user's own, on the user's own machine.

        Raises:
            ConfigError: the settings cannot be used.
        """
        config = self._options.config
        settings = load(None if config is None else Path(config), {}).settings
        tasks = settings.tasks
        # A comma ends an item of a list: here any character may stand for one.
        roots = [*tasks.read_roots, *(glob.escape(root).replace(",", "?") for root in self._options.read_roots)]
        found = {"tasks.read_roots": ",".join(roots)} if roots else {}
        if not tasks.trust_remote_code:
            found["tasks.trust_remote_code"] = "*"
        if not tasks.local_hosts:
            found["tasks.local_hosts"] = "*"
        if not tasks.api_keys:
            found["tasks.api_keys"] = "*@*"
        if not tasks.allow_env:
            found["tasks.allow_env"] = "*"
        if not tasks.allow_command:
            found["tasks.allow_command"] = "*"
        if not tasks.allow_serve:
            found["tasks.allow_serve"] = "127.0.0.1,::1"
        if not settings.cloud.read:
            found["cloud.read"] = "s3://*"
        if not settings.cloud.write:
            found["cloud.write"] = "s3://*"
        own = Path("~/.aws/credentials").expanduser()
        named = settings.cloud.credentials_file or os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
        if not named and own.is_file():
            found["cloud.credentials_file"] = str(own)
        return found

    def _start(self) -> None:
        sweep_abandoned(RUN_PREFIX)
        linux.become_subreaper()
        self._others = set(proc_files.children(os.getpid()))
        self._dir = private_dir(RUN_PREFIX)
        self._lock = lock_folder(self._dir)
        self._redis = EmbeddedRedis(self._dir)
        self._redis.start()
        self.state_dir.mkdir(mode=0o700)
        try:
            self._process = start_bound(
                self._command(),
                end_signal=signal.SIGTERM,
                log=self._dir / "node.log",
                env={name: value for name, value in os.environ.items() if name not in _NOT_INHERITED},
                pass_fds=(self._lock,),  # the folder stays locked while the node runs, even if this process is gone
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
            "processes.warm_max_mb": "0",  # its tasks are there already
        }
        settings |= self.permits()
        if self._options.results_dir is not None:
            settings["results.dir"] = str(Path(self._options.results_dir).absolute())
        elif not self._options.keeps_results:
            assert self._dir is not None
            settings["results.dir"] = str(self._dir / "results")
        settings |= self._options.settings
        config = [] if self._options.config is None else ["--config", self._options.config]
        return [*self._options.program, *config, *(f"--set={name}={value}" for name, value in settings.items())]

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """Send SIGTERM, SIGINT if the user is impatient, and SIGKILL at the deadline."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        forced = False
        process.terminate()
        while process.poll() is None and time.monotonic() < deadline:
            if self._impatient() and not forced:
                forced = True
                deadline = min(deadline, time.monotonic() + FORCED_STOP_TIMEOUT_S)
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_EXIT_POLL_S)
        process.kill()
        process.wait()

    def _sweep(self) -> None:
        """Kill processes that the node left: this process is a subreaper, so its orphans are now our children."""
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
                pids = ", ".join(map(str, sorted(left)))
                raise UnavailableError(f"processes of the node survive SIGKILL (in kernel calls): pids {pids}")
            time.sleep(_SWEEP_POLL_S)


def _last_lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()[-64 * 1024 :]
    except OSError:
        return []
    return [line for line in data.decode(errors="replace").splitlines() if line.strip()][-_LOG_LINES:]
