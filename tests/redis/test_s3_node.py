"""A node that reads from S3: the task gets what the operator allows, and never the credentials."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flowmesh.cli import doctor_s3
from flowmesh.settings.schema import CloudSettings, Settings
from tests.kit.s3_server import KEYS, S3Server, s3_server
from tests.kit.support import Node, Orchestrator, until

pytestmark = pytest.mark.redis
pytest.importorskip("moto")
SECRET = KEYS["aws_secret_access_key"]
CONFIG = """
[tasks]
pass_env = ["AWS_*"]
allow_command = ["*"]

[task_types.download]
runner = "tests.kit.download_runners:DownloadRunner"
environment = "light"

[delivery]
bandwidth_bytes_per_sec = 2000000

[cloud]
write = ["s3://data/results"]
read = ["s3://data/open"]
endpoint_url = "{url}"
"""
ENV = {"AWS_ACCESS_KEY_ID": KEYS["aws_access_key_id"], "AWS_SECRET_ACCESS_KEY": SECRET}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.put("data", {"open/a": b"text of a", "closed/b": b"b"})
        yield running


def test_a_task_reads_through_the_node_and_never_sees_its_key(
    orchestrator: Orchestrator, make_node, server: S3Server
) -> None:
    node: Node = make_node(config=CONFIG.format(url=server.url), env=ENV)
    urls = {name: {"url": f"s3://data/{name}"} for name in ("open/a", "open/none")}
    end = orchestrator.run("w1", {"taskType": "download", "urls": urls, "nekot": SECRET[::-1]})
    assert end["type"] == "TASK_SUCCEEDED", end
    result = node.result(end["task_id"])
    assert result["found"]["open/a"] == {"text": "text of a"}
    assert "there is no object 'open/none'" in result["found"]["open/none"]["error"]
    assert result["sees_token"] is False
    assert not result.get("warnings")  # the first task waits for the gateway, without a failed attempt
    refused = {"taskType": "download", "urls": {"b": {"url": "s3://data/closed/b"}}, "nekot": SECRET[::-1]}
    end = orchestrator.run("w1", refused)
    assert end["type"] == "TASK_FAILED", end
    assert end["error"].startswith("spec.urls.b.url: s3://data/closed/b: the operator does not allow")
    # A cancel in the midst of a delivery leaves no parts.
    large = {
        "taskType": "command",
        "command": ["sh", "-c", "head -c 60000000 /dev/zero > $FLOWMESH_OUTPUT_DIR/big"],
        "output": {"destination": {"type": "s3", "url": "s3://data/results"}, "artifacts": ["artifacts/big"]},
    }
    task = orchestrator.dispatch("w1", large)
    until(lambda: server.uploads("data"), "its parts are sent")
    node.ask(op="cancel", task_id=task)
    assert orchestrator.wait_end(task)["type"] == "TASK_FAILED"
    assert server.uploads("data") == []
    assert [key for key in server.keys("data") if key.startswith("results/")] == []
    for path in (node.log, *node.state_dir.glob("log/*.log")):
        assert SECRET not in path.read_text()


def test_doctor_tries_each_bucket(server: S3Server, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("".join(["[default]\n", *(f"{name} = {value}\n" for name, value in KEYS.items())]))
    file.chmod(0o644)
    cloud = CloudSettings(
        read=("s3://data/open", "s3://data/*.txt", "s3://no-such-bucket", "s3://team-*"),
        write=("s3://data/results", "s3://gone-bucket"),
        endpoint_url=server.url,
        credentials_file=str(file),
    )
    found = list(doctor_s3.s3(Settings(cloud=cloud)))
    assert [each.level.value for each in found] == ["warn", "ok", "ok", "broken", "note", "ok", "broken"]
    assert found[0].remedy == f"chmod 600 {file}"
    assert "there is no bucket 'no-such-bucket'" in found[3].text
    assert list(doctor_s3.s3(Settings())) == []
    file.write_text("[other]\n")
    (wrong,) = [each for each in doctor_s3.s3(Settings(cloud=cloud)) if each.level.value == "broken"]
    assert "has no access key in the section [default]" in wrong.text
