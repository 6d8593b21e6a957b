"""A password for Redis that lies in a file and changes while the node runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import redis

from flowmesh.settings.addresses import with_password, without_user
from flowmesh.settings.load import load
from tests.kit.paths import ROOT
from tests.kit.support import Node, RedisServer, until

pytestmark = pytest.mark.redis


def with_login(server: RedisServer, password: str) -> redis.Redis:
    return redis.Redis(unix_socket_path=str(server.path), password=password)


def test_a_new_password_is_taken_without_a_restart(redis_server: RedisServer, tmp_path: Path) -> None:
    secret = tmp_path / "redis"
    secret.write_text("first p@ss/word\n")
    admin = redis_server.client()
    admin.config_set("requirepass", "first p@ss/word")
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path), "REDIS_PASSWORD_FILE": "$CREDENTIALS_DIRECTORY/redis"}
    node = Node(redis_server, env=env)
    try:
        node.start(wait=False)
        client = with_login(redis_server, "first p@ss/word")
        until(lambda: client.hget("worker:w1", "status") == b"IDLE", "the node is registered")
        client.config_set("requirepass", "second")
        secret.write_text("second")
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        client = with_login(redis_server, "second")
        client.delete("worker:w1")
        until(lambda: client.hget("worker:w1", "status") == b"IDLE", "the node registers with the new password")
        submit = subprocess.run(
            [sys.executable, "-m", "flowmesh.cli.main", "workers", "--redis", redis_server.url],
            env={"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "w1" in submit.stdout, submit.stderr
        secret.unlink()
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        until(lambda: "password_file" in str(node.ask(op="status")["redis_troubles"]), "the status says why")
        secret.write_text("second")
        until(lambda: node.ask(op="status")["redis_up"], "it works again")
        assert "second" not in node.text()
        assert "p@ss" not in node.text()
    finally:
        node.close()


@pytest.mark.parametrize(
    ("url", "bare", "user"),
    [
        ("redis://h:1/0", "redis://h:1/0", None),
        ("redis://some%40one@h:1/0", "redis://h:1/0", "some@one"),
        ("rediss://h:1/0?username=u&ssl_cert_reqs=none", "rediss://h:1/0?ssl_cert_reqs=none", "u"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1", None),
        ("unix://u@/run/redis.sock", "unix:///run/redis.sock", "u"),
    ],
)
def test_the_user_leaves_the_address(url: str, bare: str, user: str | None) -> None:
    assert without_user(url) == (bare, user)
    options = redis.Redis.from_url(with_password(url, "p@ss:/ word")).connection_pool.connection_kwargs
    assert (options.get("username") or None, options["password"]) == (user, "p@ss:/ word")


def test_both_a_password_and_its_file_are_refused() -> None:
    for url in ("redis://:pw@h:1/0", "redis://h:1/0?password=pw", "redis+sentinel://:pw@h:1/main"):
        with pytest.raises(Exception, match=r"redis.password_file: redis.url contains a password"):
            load(None, {"REDIS_URL": url, "REDIS_PASSWORD_FILE": "/x"})
    with pytest.raises(Exception, match=r"delivery.orchestrator_token is set, too"):
        load(None, {"ORCHESTRATOR_TOKEN": "abc", "ORCHESTRATOR_TOKEN_FILE": "/x"})
