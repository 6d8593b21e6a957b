"""The ways to reach a Redis: sentinels, users with few rights, TLS. With real servers."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import TypeVar

import pytest
import redis

from flowmesh.bus.connection import connect
from flowmesh.client import Client
from flowmesh.messages.sentinel import SentinelAddress, sentinel_address
from flowmesh.redaction import redact_url
from flowmesh.settings.load import load
from tests.kit.support import (
    ROOT,
    Node,
    Orchestrator,
    RedisServer,
    end_process,
    running,
    until,
)

RIGHTS = (
    "~worker:* ~workers:* ~tasks:* &tasks &tasks.events &workers.events &flowmesh.control "
    "+@read +@write +@pubsub +@stream +@connection +@transaction -@dangerous"
)
QUEUE_RIGHTS = "~flowmesh:* &flowmesh.queue +@scripting +time"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class TcpServer(RedisServer):
    """A Redis on a port of 127.0.0.1."""

    def start(self) -> None:
        self.port = free_port()
        self._launch("--port", str(self.port))
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def _launch(self, *options: str) -> None:
        assert self.binary is not None
        command = [self.binary, "--bind", "127.0.0.1", "--save", "", *options]
        with open(self.folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        until(self._answers, "redis-server answers", 20)

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port)


class TlsServer(TcpServer):
    """A Redis with TLS only and a self-signed certificate."""

    def start(self) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs openssl, to create a certificate")
        self.certificate, key = str(self.folder / "cert.pem"), str(self.folder / "key.pem")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", self.certificate]
        subprocess.run(command, check=True, capture_output=True)
        self.port = free_port()
        options = ["--port", "0", "--tls-port", str(self.port), "--tls-cert-file", self.certificate]
        options += ["--tls-key-file", key, "--tls-auth-clients", "no", "--tls-ca-cert-file", self.certificate]
        assert self.binary is not None
        probe = subprocess.run(
            [self.binary, "--port", "0", "--tls-port", "0", "--tls-auth-clients", "no", "--version"],
            capture_output=True,
            text=True,
            check=False,
        )
        if "Bad directive" in probe.stdout + probe.stderr and "'tls" in probe.stdout + probe.stderr:
            pytest.skip(f"{self.binary} was built without TLS")
        self._launch(*options)
        self.url = f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={self.certificate}"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, host="127.0.0.1", ssl=True, ssl_ca_certs=self.certificate)


ServerT = TypeVar("ServerT", bound=RedisServer)


@contextlib.contextmanager
def started(kind: type[ServerT]) -> Iterator[tuple[ServerT, Orchestrator]]:
    server = kind()
    try:
        peer = Orchestrator(server)
        try:
            yield server, peer
        finally:
            peer.close()
    finally:
        server.close()


def works(node: Node, peer: Orchestrator) -> None:
    """Check everything that a node does with Redis, from registration to UNREGISTER, and a command."""
    assert peer.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"
    listed = flowmesh("workers", "--redis", node.server.url)
    assert "w1" in listed.stdout, listed.stderr
    assert node.stop() == 0
    peer.wait_worker_event("UNREGISTER", worker_id="w1")
    assert "Redis is unreachable" not in node.text()


@pytest.mark.redis
def test_the_master_is_found_through_its_sentinels() -> None:
    with started(TcpServer) as (server, peer), sentinel_of(server) as port:
        server.url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{port}/main/0"  # the first sentinel is down
        with running(Node(server, config="[redis]\nstream = true\n")) as node:
            works(node, peer)


@pytest.mark.redis
def test_after_a_failover_the_node_is_with_the_new_master() -> None:
    """The old master is killed while a task runs; the task's terminal event is sent to the new one."""
    with started(TcpServer) as (first, peer), contextlib.closing(TcpServer()) as second:
        second.client().replicaof("127.0.0.1", first.port)
        until(lambda: second.client().info("replication")["master_link_status"] == "up", "the replica follows", 20)
        with sentinel_of(first) as port, redis.Redis(port=port) as asked:
            until(lambda: asked.execute_command("SENTINEL", "REPLICAS", "main"), "the sentinel knows the replica", 30)
            first.url = f"redis+sentinel://127.0.0.1:{port}/main/0"
            with running(Node(first, config="[redis]\ntimeout_s = 1.0\nhealth_check_interval_s = 1.0\n")) as node:
                task = peer.dispatch("w1", {"taskType": "echo", "delaySec": 1})
                peer.wait_started(task)
                first.stop()
                until(lambda: second.client().info("replication")["role"] == "master", "the replica is promoted", 60)
                peer.reconnect(second)
                assert peer.wait_end(task)["type"] == "TASK_SUCCEEDED"
                node.server = second
                until(lambda: "subscribed again" in node.text(), "it is subscribed at the new master")
                node.wait_status("IDLE")
                assert peer.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


@contextlib.contextmanager
def sentinel_of(server: TcpServer) -> Iterator[int]:
    """A sentinel that monitors a server as `main` and fails over quickly; yields its port."""
    port = free_port()
    file = server.folder / "sentinel.conf"
    monitor = f"sentinel monitor main 127.0.0.1 {server.port} 1\n"
    quick = "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n"
    file.write_text(f"port {port}\nbind 127.0.0.1\n{monitor}{quick}")
    assert server.binary is not None
    with open(server.folder / "sentinel.log", "ab") as log:
        command = [server.binary, str(file), "--sentinel"]
        sentinel = subprocess.Popen(command, stdout=log, stderr=log, cwd=server.folder, start_new_session=True)
    try:
        with redis.Redis(port=port) as asked:
            until(lambda: _knows(asked), "the sentinel knows the master", 20)
        yield port
    finally:
        end_process(sentinel)


def _knows(asked: redis.Redis) -> bool:
    with contextlib.suppress(redis.RedisError):
        return bool(asked.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"))
    return False


@pytest.mark.redis
def test_a_user_with_no_more_rights_than_a_node_needs(redis_server: RedisServer, orchestrator: Orchestrator) -> None:
    client = orchestrator.redis
    client.execute_command("ACL", "SETUSER", "node", "on", ">p@ss/w:rd", *RIGHTS.split(), *QUEUE_RIGHTS.split())
    redis_server.url = f"unix://node:p%40ss%2Fw%3Ard@{redis_server.path}"
    with running(Node(redis_server, config="[redis]\nstream = true\n")) as node:
        names = {each["name"]: each["user"] for each in client.client_list()}
        assert {names[f"flowmesh-w1-{part}"] for part in ("bus", "sub", "stream")} == {"node"}
        with Client(f"unix://{redis_server.path}") as flowmesh:
            assert flowmesh.wait(flowmesh.queue({"spec": {"taskType": "echo"}}).task_id, 30).ok
        works(node, orchestrator)
        assert client.execute_command("ACL", "LOG") == []
        assert "p@ss" not in node.text()
        assert "p%40ss" not in node.text()


@pytest.mark.redis
def test_a_user_without_rights_to_the_queue_loses_nothing_else(
    redis_server: RedisServer, orchestrator: Orchestrator
) -> None:
    orchestrator.redis.execute_command("ACL", "SETUSER", "node", "on", ">word", *RIGHTS.split())
    redis_server.url = f"unix://node:word@{redis_server.path}"
    with running(Node(redis_server)) as node:
        until(lambda: "no tasks are taken from the queue" in node.text(), "the log says so")
        assert node.ask(op="status")["redis_up"] is True
        works(node, orchestrator)


@pytest.mark.redis
def test_a_wrong_password_is_told_without_showing_it(redis_server: RedisServer, orchestrator: Orchestrator) -> None:
    orchestrator.redis.execute_command("ACL", "SETUSER", "node", "on", ">right", *RIGHTS.split())
    redis_server.url = f"unix://node:wr0ng@{redis_server.path}"
    node = Node(redis_server)
    try:
        node.start(wait=False)
        until(lambda: "invalid username-password pair" in node.text(), "Redis' error is logged")
        assert "wr0ng" not in node.text()
        orchestrator.redis.execute_command("ACL", "SETUSER", "node", ">wr0ng")
        node.wait_status("IDLE")
    finally:
        node.close()


@pytest.mark.redis
def test_a_scheme_may_be_written_in_any_case(redis_server: RedisServer, orchestrator: Orchestrator) -> None:
    redis_server.url = redis_server.url.replace("unix", "UNIX")
    with running(Node(redis_server)) as node:
        works(node, orchestrator)


@pytest.mark.redis
@pytest.mark.parametrize(
    "option", ["foo=bar", "db=abc", "socket_timeout=abc", "ssl_cert_reqs=none", "decode_responses=true"]
)
def test_options_that_an_address_cannot_have_are_told_in_one_line(redis_server: RedisServer, option: str) -> None:
    redis_server.url += f"?{option}"
    node = Node(redis_server)
    said = f'command line: redis.url: its option "{option.partition("=")[0]}" '
    try:
        node.start(wait=False)
        assert node.process is not None
        assert node.process.wait(30) == 78
        (line,) = node.text().splitlines()
        assert line.startswith(f"flowmesh-supervisor: {said}")
        for command in (["workers"], ["submit", "conf/tasks/echo.yaml"]):
            asked = flowmesh(*command, "--redis", redis_server.url)
            (line,) = asked.stderr.splitlines()
            assert (asked.returncode, line.startswith(f"flowmesh: {said}")) == (78, True), line
    finally:
        node.close()


def flowmesh(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowmesh.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.redis
def test_tls() -> None:
    with started(TlsServer) as (server, peer), running(Node(server)) as node:
        works(node, peer)


@pytest.mark.redis
def test_tls_with_a_certificate_that_nobody_vouches_for() -> None:
    with started(TlsServer) as (server, _):
        server.url = server.url.partition("?")[0]
        node = Node(server)
        try:
            node.start(wait=False)
            until(lambda: "certificate verify failed" in node.text(), "the error is logged")
            with server.client() as client:
                assert client.keys("*") == []
        finally:
            node.kill()  # a drain would wait for Redis
            node.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:p@h:1/2?db=3&username=u&password=p",
        "unix:///run/x.sock?db=1&username=u&password=p",
        "rediss://h/0?ssl_ca_certs=/c&ssl_ca_path=/d&ssl_cert_reqs=none&ssl_check_hostname=false&ssl_min_version=772"
        "&ssl_certfile=/c&ssl_keyfile=/k&ssl_password=p&ssl_ciphers=HIGH",
    ],
)
def test_redis_py_takes_every_option_that_the_settings_take(url: str) -> None:
    assert load(None, {"REDIS_URL": url}).settings.redis.url == url
    connect(url, timeout_s=1, health_check_interval_s=1, name="n").connection_pool.make_connection()
    redis.Redis.from_url(url).connection_pool.make_connection()


@pytest.mark.parametrize(
    ("url", "hosts", "fields"),
    [
        ("redis+sentinel://h/main", [("h", 26379)], {}),
        (
            "redis+sentinel://a:1,b:2,[::1]:3,[::2]/my-svc/4",
            [("a", 1), ("b", 2), ("::1", 3), ("::2", 26379)],
            {"db": 4},
        ),
        ("REDIS+SENTINEL://u:p%40ss@h:1/main", [("h", 1)], {"username": "u", "password": "p@ss"}),
        ("redis+sentinel://:pw@h:1/main/0", [("h", 1)], {"password": "pw"}),
    ],
)
def test_addresses_of_sentinels(url: str, hosts: list[tuple[str, int]], fields: dict[str, object]) -> None:
    found = sentinel_address(url)
    service = "my-svc" if "my-svc" in url else "main"
    assert found == SentinelAddress(hosts=hosts, service=service, **fields)  # type: ignore[arg-type]


def test_their_password_is_not_shown() -> None:
    assert "hush" not in redact_url("redis+sentinel://u:hush@a:1,b:2/main/0")
