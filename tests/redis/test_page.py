"""The page of a node in a real browser, and what it refuses: one node and one browser for all tests here."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from flowmesh.cli.node_commands import status as status_command
from tests.kit.support import Node, Orchestrator, RedisServer, until, with_mark

pytestmark = pytest.mark.redis

TOKEN = "correct-horse-battery-staple"
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
BAD = "task-bad"
GOOD = "task-good"
SHOTS = os.environ.get("PAGE_SHOTS")
"""A folder for pictures of the pages, to look at."""


class Site:
    def __init__(self, node: Node, orchestrator: Orchestrator, port: int) -> None:
        self.node = node
        self.orchestrator = orchestrator
        self.port = port

    def ask(
        self, path: str, method: str = "GET", *, token: str | None = TOKEN, body: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            given["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in given)
            for name, value in given.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(None if body is None else body.encode())
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    @property
    def pid(self) -> int | None:
        """Of the process that serves it."""
        for pid in with_mark(str(self.node.home)):
            try:
                links = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            if f"socket:[{self._inode()}]" in links:
                return pid
        return None

    def _inode(self) -> str:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == self.port:
                return fields[9]
        return "none"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not os.environ.get("CI"):
        for library in ("starlette", "uvicorn", "jinja2"):
            pytest.importorskip(library, reason="the extra web is not installed")
    token_file = tmp_path_factory.mktemp("page") / "token"
    token_file.write_text(TOKEN + "\n")
    server, port = RedisServer(), free_port()
    orchestrator = Orchestrator(server)
    config = f'[web]\nlisten = "127.0.0.1:{port}"\ntoken_file = "{token_file}"\n'
    config += '[task_types.shown]\nrunner = "tests.kit.top_runners:ShownRunner"\nenvironment = "light"\n'
    node = Node(server, config=config)
    try:
        node.start()
        until(lambda: node.ask(op="status")["page"]["state"] == "listening", "the page is served")
        orchestrator.run("w1", {"taskType": "echo", "delaySec": 0.3, "text": HOSTILE}, task_id=GOOD)
        orchestrator.run("w1", {"taskType": "echo", "delaySec": HOSTILE}, task_id=BAD)
        yield Site(node, orchestrator, port)
    except BaseException:
        print(node.text()[-4000:])
        raise
    finally:
        node.close()
        orchestrator.close()
        server.close()


@pytest.mark.parametrize("path", ["/", "/tasks", f"/tasks/{GOOD}", f"/api/v1/results/{GOOD}", "/metrics", "/fleet"])
def test_without_the_token_nothing_is_shown(site: Site, path: str) -> None:
    assert site.ask(path, token=None)[0] == 401
    assert site.ask(path, token=None, Accept="text/html")[1]["location"] == "/login"
    assert site.ask(path, token=None, Cookie="flowmesh_page=9999999999.00")[0] == 401
    assert site.ask(path)[0] == 200


def test_results_and_files_are_served_as_the_orchestrator_serves_them(site: Site) -> None:
    status, headers, body = site.ask(f"/api/v1/results/{GOOD}")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"task_id": GOOD, "worker_id": "w1", "result": site.node.result(GOOD)}
    folder = site.node.results_dir / GOOD
    (folder / "artifacts").mkdir(exist_ok=True)
    (folder / "artifacts" / "p.html").write_text(HOSTILE)
    status, headers, body = site.ask(f"/api/v1/results/{GOOD}/files/p.html")
    assert (status, body.decode()) == (200, HOSTILE)
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"].startswith("attachment;")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("sandbox")
    head = site.ask(f"/api/v1/results/{GOOD}/files/p.html", "HEAD")
    assert (head[0], head[1]["content-length"], head[2]) == (200, str(len(HOSTILE)), b"")
    assert site.ask("/api/v1/results/nobody")[0] == 404


def test_no_path_leads_out_of_a_results_folder(site: Site) -> None:
    folder = site.node.results_dir / GOOD
    (folder / "artifacts").mkdir(exist_ok=True)
    (folder / "artifacts" / "link").symlink_to("/etc/passwd")
    (folder / "out").symlink_to("/etc")
    os.mkfifo(folder / "artifacts" / "pipe")
    for name in (
        "link", "out/passwd", "pipe", "../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd",
        "/etc/passwd", "%2fetc%2fpasswd", "a%00b", "logs/stdout.log", "artifacts", ".", "",
    ):  # fmt: skip
        assert site.ask(f"/api/v1/results/{GOOD}/files/{name}")[0] == 404, name
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/api/v1/results/..%2f..%2fx"):
        assert site.ask(path)[0] == 404, path


def test_only_reading_requests_of_its_own_site_are_answered(site: Site) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert site.ask("/", method, body="")[0] == 405
    assert site.ask("/", Host="evil.example")[0] == 421
    assert site.ask("/", Host=f"evil.example:{site.port}")[0] == 421
    for host in (f"localhost:{site.port}", "127.0.0.1", "[::1]:80", socket.gethostname()):
        assert site.ask("/", Host=host)[0] == 200, host
    assert site.ask("/", Origin="http://evil.example")[0] == 403
    for origin in ("null", "http://[", "http://", ""):
        assert site.ask("/", Origin=origin)[0] == 403, origin
    assert site.ask("/metrics", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")[0] == 403
    assert site.ask("/metrics", Sec_Fetch_Site="same-site", Sec_Fetch_Mode="cors")[0] == 403
    followed = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert site.ask(f"/tasks/{GOOD}", **followed)[0] == 200
    assert site.ask(f"/api/v1/results/{GOOD}", **followed)[0] == 403
    frame = followed | {"Sec_Fetch_Dest": "iframe"}
    assert site.ask("/", **frame)[0] == 403
    assert site.ask("/login", "POST", token=None, body=f"token={TOKEN}", Origin="http://evil.example")[0] == 403


def test_requests_are_bounded(site: Site) -> None:
    assert site.ask("/login", "POST", token=None, body="token=" + "x" * 5000)[0] == 413
    assert site.ask("/", body="x")[0] == 413
    assert site.ask("/login", "POST", token=None, Transfer_Encoding="chunked")[0] == 413
    assert site.ask("/", X="x" * 40_000)[0] == 413
    assert site.ask("/tasks?limit=99999999999&type=" + "y" * 500)[0] == 200


def test_each_answer_forbids_what_a_page_need_not_do(site: Site) -> None:
    for path in ("/", "/login", "/healthz", "/metrics", f"/tasks/{BAD}", "/static/page.js", "/none"):
        headers = site.ask(path)[1]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_the_text_of_a_task_stays_text(site: Site) -> None:
    for path in (f"/tasks/{BAD}", f"/tasks/{GOOD}", "/tasks", "/", f"/tasks?type={'%3Cscript%3E'}"):
        body = site.ask(path)[2].decode()
        assert "<script>document" not in body
        assert "<img" not in body
    assert "&lt;script&gt;" in site.ask(f"/tasks/{GOOD}")[2].decode()


def test_health_and_metrics_are_for_probes(site: Site) -> None:
    assert json.loads(site.ask("/healthz", token=None)[2]) == {"status": "ok"}
    assert json.loads(site.ask("/healthz")[2]) == {"status": "ok", "troubles": []}
    text = site.ask("/metrics")[2].decode()
    assert "flowmesh_task_exits" in {family.name for family in text_string_to_metric_families(text)}


def test_a_killed_page_comes_back_and_the_node_goes_on(site: Site) -> None:
    pid, before = site.pid, site.node.pid
    assert pid is not None
    assert os.getpriority(os.PRIO_PROCESS, pid) >= min(19, os.getpriority(os.PRIO_PROCESS, before) + 10)
    os.kill(pid, signal.SIGKILL)
    until(lambda: site.pid not in (None, pid), "another process serves the page")
    assert site.ask("/healthz")[0] == 200
    assert site.node.pid == before
    assert site.orchestrator.run("w1", {"taskType": "echo"})["type"] == "TASK_SUCCEEDED"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if os.environ.get("CI"):
        from playwright import sync_api
    else:
        sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
        if not CHROMIUM.exists():
            pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(site: Site, browser: Any, scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{site.port}/")
    page.fill("input[name=token]", TOKEN)
    page.click("button")
    page.wait_for_selector("text=This node")
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert TOKEN not in cookie["value"]
    for name, path in (
        ("node", "/"),
        ("tasks", "/tasks"),
        ("fleet", "/fleet"),
        ("good", f"/tasks/{GOOD}"),
        ("bad", f"/tasks/{BAD}"),
    ):
        page.goto(f"http://127.0.0.1:{site.port}{path}")
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/{name}-{scheme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        assert "taken" not in page.title()
    assert page.locator(".badge").first.inner_text() == "bad_request"
    page.goto(f"http://127.0.0.1:{site.port}/tasks/{GOOD}")
    assert page.locator(".bars svg").count() >= 4
    page.click("summary:has-text('Document')")
    assert HOSTILE in page.inner_text("details:has-text('apiVersion') pre")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"
    assert dark == (scheme == "dark")
    assert said == []
    context.close()


def test_a_running_task_is_followed(site: Site, browser: Any) -> None:
    context = browser.new_context(extra_http_headers={"Authorization": f"Bearer {TOKEN}"})
    page = context.new_page()
    shown = {"done": 80, "total": 100, "loss": [3.2, 0.4], "tokens_per_s": 900, "log": ["step one", HOSTILE]}
    task_id = site.orchestrator.dispatch("w1", {"taskType": "shown", "shown": shown})
    site.orchestrator.wait_started(task_id)
    page.goto(f"http://127.0.0.1:{site.port}/tasks/{task_id}")
    page.wait_for_selector(".verdict .badge.running")
    page.wait_for_selector("figure:has-text('loss') polyline")
    page.wait_for_selector("figure:has-text('tokens/s') polyline")
    until((site.node.results_dir / task_id / "shown").exists, "all of it is shown")
    page.wait_for_selector("#log:has-text('step one')")
    assert HOSTILE in page.inner_text("#log")
    if SHOTS:
        page.set_viewport_size({"width": 1000, "height": 900})
        page.screenshot(path=f"{SHOTS}/running.png", full_page=True)
    (site.node.results_dir / task_id / "go").touch()
    page.wait_for_selector(".verdict .badge.ok")
    context.close()


def test_wrong_tokens_are_limited_and_the_cookie_goes_on(site: Site) -> None:
    """The last test: this address may not log in any more."""
    status, headers, _ = site.ask("/login", "POST", token=None, body=f"token={TOKEN}")
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"].partition(";")[0]
    answers = [site.ask("/login", "POST", token=None, body="token=wrong")[0] for _ in range(6)]
    assert answers == [401] * 5 + [429]
    assert site.ask("/login", "POST", token=None, body=f"token={TOKEN}")[0] == 429
    assert site.ask("/")[0] == 429
    assert site.ask("/", token=None, Cookie=cookie)[0] == 200


def test_a_page_that_cannot_be_served_is_said_once_and_the_node_works(tmp_path: Path, make_node: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        config = f'[web]\nlisten = "{listen}"\n'
        node = make_node(config=config)
        found = until(lambda: page if (page := node.ask(op="status")["page"])["error"] else None, "the fault is known")
        assert found["state"] == "failed"
        assert found["error"] == f"web.listen: {listen}: Address already in use; choose a free port"
        done = CliRunner().invoke(status_command, ["--state-dir", str(node.state_dir)])
        assert f"no page at {listen}: web.listen" in done.output
        started = node.text().count("no page at")
        until(
            lambda: (node.state_dir / "log" / "page.log").read_text().count("already in use") >= 2, "it is tried again"
        )
        assert (started, node.text().count("no page at")) == (1, 1)
    until(lambda: node.ask(op="status")["page"]["state"] == "listening", "the port is free")
    before = node.ask(op="status")["pid"]
    node.kill()
    node.start()
    until(lambda: node.ask(op="status")["page"]["state"] == "listening", "the next supervisor has a page")
    assert node.ask(op="status")["pid"] != before
