"""A real terminal for full-screen programs: tmux, with a server of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import uuid

import pytest

from tests.kit.support import until


class Tmux:
    """Use as a context manager.

    Args:
        env: set for the program; None unsets.
    """

    def __init__(
        self, command: list[str], *, columns: int, lines: int, env: dict[str, str | None] | None = None
    ) -> None:
        binary = shutil.which("tmux")
        if binary is None:
            pytest.skip("no tmux on this machine: apt-get install tmux")
        self._tmux = [binary, "-L", f"fm-{uuid.uuid4().hex[:8]}", "-f", "/dev/null"]
        self._command = command
        self._size = ["-x", str(columns), "-y", str(lines)]
        self._env = {**os.environ, "PS1": "$ ", "LC_ALL": "C.UTF-8"}
        for name, value in (env or {}).items():
            self._env.pop(name, None)
            if value is not None:
                self._env[name] = value

    def __enter__(self) -> Tmux:
        # In a shell, so that what the program leaves behind can be seen: its exit status, and the terminal's settings.
        script = (
            f"trap : INT; {shlex.join(self._command)}; echo left $?; stty -a | grep -o -- '-\\?icanon'; exec sleep 600"
        )
        self._run("new-session", "-d", *self._size, "sh", "-c", script)
        return self

    def __exit__(self, *_: object) -> None:
        self._run("kill-server")

    def _run(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], env=self._env, capture_output=True, check=True).stdout.decode()

    def screen(self, *, colours: bool = False) -> str:
        """What is on it now, with `colours` with their codes."""
        return self._run("capture-pane", "-p", *(["-e"] if colours else []))

    def press(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def resize(self, columns: int, lines: int) -> None:
        self._run("resize-window", "-x", str(columns), "-y", str(lines))

    @property
    def in_alternate_screen(self) -> bool:
        return self._run("display-message", "-p", "#{alternate_on}").strip() == "1"

    @property
    def cursor_is_shown(self) -> bool:
        return self._run("display-message", "-p", "#{cursor_flag}").strip() == "1"

    @property
    def pid(self) -> int:
        """Of the program."""
        shell = self._run("display-message", "-p", "#{pane_pid}").strip()
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", shell], capture_output=True, check=False
        ).stdout.split()
        return int(children[0])

    def wait(self, *texts: str) -> str:
        """The screen, once it has all of these texts."""

        def there() -> str | None:
            found = self.screen()
            return found if all(text in found for text in texts) else None

        try:
            return str(until(there, f"{texts} on the screen", 30))
        except AssertionError:
            raise AssertionError(f"{texts} not on the screen:\n{self.screen()}") from None

    def wait_left(self, code: int) -> None:
        """The program has ended with this status, and the terminal is as it was."""
        shown = self.wait(f"left {code}", "icanon")
        assert "-icanon" not in shown
        assert not self.in_alternate_screen
        assert self.cursor_is_shown
