"""What documents read of S3: through a real gateway, from a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flowmesh.messages.cloud import Keys, S3Access
from flowmesh.messages.gateway import S3, S3_LIST, Gateway
from flowmesh.results.gateway import Server
from flowmesh.results.gateway_note import Note
from flowmesh.results.s3_client import error_of
from flowmesh.validation.s3_url import Location
from runners.api import BadRequest, Context, RunnerError
from runners.data import gateway
from runners.data.download import fetch
from runners.data.files import FileData, files_of
from runners.data.hub import load_hub
from runners.data.readers import read
from runners.models.adapters import load_adapter
from runners.models.checkpoints import load_checkpoint
from runners.models.sources import local_path, resolve_identifier
from runners.models.spec import Adapter, CheckpointLoad
from runners.rag.documents import read_documents
from runners.rows.resume import read_resume
from runners.training.inputs import fetch_jsonl
from runners.training.settings import Jsonl
from tests.kit.fake_http import FakeHandler, FakeServer
from tests.kit.s3_server import KEYS, S3Server, s3_server

pytest.importorskip("moto")
botocore = pytest.importorskip("botocore.exceptions")

OWN = Keys(access_key_id=KEYS["aws_access_key_id"], secret_access_key=KEYS["aws_secret_access_key"])
MakeContext = Callable[..., Context]
Reach = Callable[..., Context]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        running.put(
            "data",
            {
                "train/part-0.jsonl": b'{"prompt": "a"}\n',
                "train/part-1.jsonl": b'{"prompt": "b"}\n',
                "train/deep/part-2.jsonl": b'{"prompt": "c"}\n',
                "train/über weiß?#%20.jsonl": b'{"prompt": "odd"}\n',
                "model/config.json": b"{}",
                "model/sub/weights.bin": b"w" * 1000,
                "secret/key.txt": b"secret",
                "empty": b"",
            },
        )
        running.put("other", {"a": b"a"})
        yield running


@pytest.fixture
def reading(make_context: MakeContext, server: S3Server, tmp_path: Path) -> Iterator[Reach]:
    """Contexts of tasks whose node reads from the server."""
    gateways: list[Server] = []

    def make(access: S3Access | None = None, **more: object) -> Context:
        if access is None:
            access = S3Access(
                read=("s3://data/train", "s3://data/model/", "s3://data/empty", "s3://gone*"),
                endpoint_url=server.url,
                has_keys=True,
            )
        socket = str(tmp_path / f"g{len(gateways)}")
        server_ = Server(Note(socket=socket, key="k", s3=access), None, OWN if access.has_keys else None)
        gateways.append(server_)
        threading.Thread(target=server_.serve_forever, args=(0.05,), daemon=True).start()
        return make_context({}, gateway=Gateway(socket, "k", token=False, s3=True), **more)

    yield make
    for each in gateways:
        each.shutdown()
        each.server_close()


def rows(ctx: Context, path: str) -> list[str]:
    files = files_of(ctx, FileData(type="jsonl", path=path), "spec.data")
    return [row["prompt"] for file in files for _, row in read(file, None)]


def test_files_globs_and_prefixes_of_data(reading: Reach) -> None:
    ctx = reading()
    assert rows(ctx, "s3://data/train/part-0.jsonl") == ["a"]
    assert rows(ctx, "s3://data/train/part-*.jsonl") == ["a", "b"]
    assert rows(ctx, "s3://data/train/**/part-[12].jsonl") == ["c", "b"]
    assert sorted(rows(ctx, "s3://data/train/")) == ["a", "b", "c", "odd"]
    assert local_path(ctx, "s3://data/train/part-0.jsonl", "spec.x").name == "part-0.jsonl"
    with pytest.raises(BadRequest, match=r"^spec.data.path: no object of the bucket 'data' matches 'train/no-\*'"):
        rows(ctx, "s3://data/train/no-*")


def test_a_key_is_taken_literally(reading: Reach) -> None:
    ctx = reading()
    assert local_path(ctx, "s3://data/train/über weiß?#%20.jsonl", "spec.x").read_bytes() == b'{"prompt": "odd"}\n'
    assert rows(ctx, "s3://data/train/über weiß?#%20.jsonl") == ["odd"]
    assert fetch(ctx, "s3://data/empty", "spec.x").path.read_bytes() == b""


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://data/secret/key.txt", "the operator does not allow documents to read it"),
        ("s3://data/secret/", "the operator does not allow documents to read it"),
        ("s3://data/", "the operator does not allow documents to read it"),
        ("s3://data/training.txt", "the operator does not allow documents to read it"),
        ("s3://other/a", "the operator does not allow documents to read it"),
        ("s3://data/train/../secret/key.txt", "no folders to go up in"),
        ("s3://data//train", "empty part"),
        ("s3://me:pass@data/train", "an s3 address has no login and no port"),
        ("s3://data/train/gone.jsonl", "there is no object 'train/gone.jsonl' in the bucket 'data'"),
        ("s3://data/train/none/", "there are no objects below 'train/none/' in the bucket 'data'"),
        ("s3://gone-bucket/x", "there is no bucket 'gone-bucket' at http://127.0.0.1"),
    ],
)
def test_what_is_refused_says_why(reading: Reach, url: str, why: str) -> None:
    with pytest.raises(BadRequest, match=rf"^spec.x: .*{why}") as error:
        local_path(reading(), url, "spec.x")
    assert "pass" not in str(error.value)


def test_a_folder_of_objects_is_cached_whole_and_made_again_after_a_change(reading: Reach, server: S3Server) -> None:
    first = resolve_identifier(reading(task_id="a"), "s3://data/model", None, "spec.model.source.identifier")
    assert first.shown == "s3://data/model"
    assert {str(each.relative_to(first.path)) for each in Path(first.path).rglob("*") if each.is_file()} == {
        "config.json",
        "sub/weights.bin",
    }
    again = reading(task_id="b")
    assert local_path(again, "s3://data/model/", "spec.x") == Path(first.path)
    # What was gathered lies in the cache once.
    assert sum(each.stat().st_size for each in again.cache_dir.glob("downloads/*/file-*/sub/weights.bin")) == 1000
    assert not [
        each for each in again.cache_dir.glob("downloads/*/file-*") if each.is_file() and each.stat().st_size == 1000
    ]
    server.put("data", {"model/config.json": b'{"new": 1}'})
    changed = local_path(reading(task_id="c"), "s3://data/model/", "spec.x")
    assert (changed / "config.json").read_bytes() == b'{"new": 1}'
    assert (Path(first.path) / "config.json").read_bytes() == b"{}"  # a task still uses it


def test_a_copy_is_revalidated_and_a_part_is_resumed(reading: Reach, server: S3Server) -> None:
    ctx = reading()
    server.put("data", {"train/big": b"x" * 3_000_000})
    url = "s3://data/train/big"
    whole = fetch(ctx, url, "spec.x")
    assert fetch(ctx, url, "spec.x").path == whole.path
    entry = whole.entry
    (etag,) = {server.client.head_object(Bucket="data", Key="train/big")["ETag"]}
    for meta, left in ((etag, b"y" * 1_000_000), ('"of another version"', b"z" * 1_000_000)):
        entry.part.write_bytes(left)
        (entry.folder / "meta.json").unlink()
        entry.part_meta.write_text(f'{{"url": "", "file": "", "size_bytes": 0, "etag": {json.dumps(meta)}}}')
        got = fetch(ctx, url, "spec.x").path.read_bytes()
        resumed = left if meta == etag else b"x" * 1_000_000
        assert got == resumed + b"x" * 2_000_000
    server.put("data", {"train/big": b"new"})
    assert fetch(ctx, url, "spec.x").path.read_bytes() == b"new"


def test_bounds_of_a_folder(reading: Reach) -> None:
    with pytest.raises(BadRequest, match=r"more than the node's setting runners\.unpack_max_bytes"):
        local_path(reading(limits={"unpack_max_bytes": 100}), "s3://data/model/", "spec.x")
    with pytest.raises(BadRequest, match=r"more than 2 objects begin so \(runners.unpack_max_files\)"):
        local_path(reading(limits={"unpack_max_files": 2}), "s3://data/train/", "spec.x")


def test_credentials_of_a_file_are_read_again_and_never_shown(reading: Reach, server: S3Server, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    access = S3Access(read=("s3://data",), endpoint_url=server.url, credentials_file=str(file), profile="node")
    ctx = reading(access)
    with pytest.raises(RunnerError, match=r"cloud.credentials_file: .* cannot be read: no such file"):
        fetch(ctx, "s3://data/empty", "spec.x")
    file.write_text("[default]\naws_access_key_id = A\naws_secret_access_key = hidden-secret\n")
    with pytest.raises(RunnerError, match=r"has no access key in the section \[node\] \(cloud.profile\)"):
        fetch(ctx, "s3://data/empty", "spec.x")
    file.write_text("[node]\naws_access_key_id = AKIDWRONG\naws_secret_access_key = hidden-secret\n")
    with server.checking_keys(), pytest.raises(RunnerError) as error:
        fetch(ctx, "s3://data/empty", "spec.x")
    assert "S3 refuses the node's credentials (InvalidAccessKeyId)" in str(error.value)
    assert "hidden-secret" not in str(error.value)
    with server.checking_keys() as keys:
        file.write_text(
            f"[node]\naws_access_key_id = {keys['aws_access_key_id']}\n"
            f"aws_secret_access_key = {keys['aws_secret_access_key']}\n"
        )
        with pytest.raises(RunnerError, match=r"access denied \(AccessDenied\); check what .*credentials allows"):
            fetch(ctx, "s3://data/secret/key.txt", "spec.x")


def test_a_server_that_is_away_is_tried_again(reading: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = reading(S3Access(read=("s3://data",), endpoint_url="http://127.0.0.1:9", has_keys=True))
    monkeypatch.setattr("runners.data.download.FIRST_PAUSE_S", 0.001)
    with pytest.raises(RunnerError, match=r"could not be downloaded: .*no connection to http://127.0.0.1:9"):
        fetch(ctx, "s3://data/x", "spec.x")


BODY = bytes(range(250)) * 4000


class Breaking(FakeServer):
    """Answers as S3 does, and breaks off the first time, in the middle of the body."""

    def __init__(self) -> None:
        super().__init__(BreakingHandler)
        self.seen: list[tuple[str | None, str | None]] = []
        """Range and If-Match of each request."""


class BreakingHandler(FakeHandler):
    server: Breaking

    def do_GET(self) -> None:
        self.server.seen.append((self.headers.get("Range"), self.headers.get("If-Match")))
        if len(self.server.seen) == 1:
            self.begin(200, {"Content-Length": str(len(BODY)), "ETag": '"v1"'})
            self.wfile.write(BODY[:700_000])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            shown = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
            self.answer(206, BODY[start:], {"Content-Range": shown, "ETag": '"v1"'})


def test_an_object_that_breaks_off_is_continued(reading: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runners.data.download.FIRST_PAUSE_S", 0.001)
    with Breaking() as server:
        ctx = reading(S3Access(read=("s3://data",), endpoint_url=server.origin, has_keys=True))
        assert fetch(ctx, "s3://data/breaks", "spec.x").path.read_bytes() == BODY
    (_, (asked, version)) = server.seen
    assert version == '"v1"'
    assert asked is not None
    assert asked != "bytes=0-"


def test_a_node_that_allows_nothing_says_so(make_context: MakeContext) -> None:
    with pytest.raises(BadRequest, match=r"spec.x: this node reads nothing from S3: its setting cloud.read is empty"):
        local_path(make_context({}), "s3://data/x", "spec.x")
    with pytest.raises(BadRequest, match=r"an s3 address takes no headers"):
        fetch(make_context({}), "s3://data/x", "spec.x", headers={"Authorization": "x"})


def test_adapters_and_checkpoints(reading: Reach, server: S3Server, tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "config.json").write_text("{}")
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "config.json", "config.json")
    server.put(
        "data",
        {
            "train/m.tar.gz": (tmp_path / "m.tar.gz").read_bytes(),
            "train/lora/adapter_config.json": b'{"peft_type": "LORA", "r": 2}',
            "train/lora/adapter_model.safetensors": b"w",
        },
    )
    ctx = reading()
    for load in (
        CheckpointLoad(url="s3://data/train/m.tar.gz"),
        CheckpointLoad(uri="s3://data/model/"),
        CheckpointLoad(path="s3://data/model"),
    ):
        assert (load_checkpoint(ctx, load).folder / "config.json").is_file()
    for adapter in (Adapter(path="s3://data/train/lora/"), Adapter(url="s3://data/train/lora")):
        assert load_adapter(ctx, adapter, 0, "spec.model.adapters[0]").rank == 2


def test_the_gateway_itself_judges_what_it_is_asked_for(reading: Reach) -> None:
    node = reading().job.gateway
    assert node is not None
    for asked in (
        "data/train/../secret/key.txt",
        "data/secret/key.txt",
        "data/train%2f..%2fsecret",
        "../data/x",
        "data/",
    ):
        for headers in ({}, {S3_LIST: "10"}):
            with gateway.get(node, "/", {S3: asked, **headers}, 10) as answer:
                assert (answer.status_code, answer.content) in ((403, b""), (502, b"")), asked
    with gateway.get(node, "/", {S3: "data/train", S3_LIST: "99"}, 10) as answer:
        assert not [each for each in answer.json() if not each[0].startswith("train/")]
    with pytest.raises(gateway.NotAnswered):  # it has no orchestrator to ask
        gateway.get(node, "/", {}, 10)


def test_what_a_task_uses_already_stays_when_its_folder_is_gathered(reading: Reach, server: S3Server) -> None:
    server.put("data", {"train/two/a": b"a", "train/two/b": b"b"})
    ctx = reading(task_id="two")
    one = local_path(ctx, "s3://data/train/two/a", "spec.x")
    assert sorted(each.name for each in local_path(ctx, "s3://data/train/two/", "spec.x").iterdir()) == ["a", "b"]
    assert one.read_bytes() == b"a"


def test_what_else_names_files_takes_addresses(reading: Reach, server: S3Server) -> None:
    server.put("data", {"train/set/train.jsonl": b'{"prompt": "x"}\n', "train/set/test.jsonl": b'{"prompt": "y"}\n'})
    server.put("data", {"train/docs/a.txt": b"hello", "train/docs/b.md": b"# world"})
    ctx = reading(task_id="others")

    def prompts(url: str, **more: str) -> list[object]:
        section = {"type": "dataset", "url": url, "column": "prompt", **more}
        return list(load_hub(ctx, section, None, {}, "spec.data").prompts)

    assert prompts("s3://data/train/part-0.jsonl") == ["a"]
    assert prompts("s3://data/train/part-*.jsonl") == ["a", "b"]
    assert prompts("s3://data/train/set/", split="test") == ["y"]
    found = read_documents(ctx, None, "s3://data/train/docs", "spec.faiss")
    assert sorted(each.text for each in found.read) == ["# world", "hello"]
    assert [each.text for each in read_documents(ctx, None, "s3://data/train/docs/b.md", "spec.faiss").read] == [
        "# world"
    ]
    for given in (Jsonl(url="s3://data/train/part-0.jsonl"), Jsonl(path="s3://data/train/part-0.jsonl")):
        assert fetch_jsonl(given, ctx).path.read_bytes() == b'{"prompt": "a"}\n'
    for field, place in (("url", "part-0.jsonl"), ("path", "docs/")):
        with pytest.raises(BadRequest, match=rf"^spec\.resume\.{field}: "):
            read_resume(ctx, {"resume": {field: f"s3://data/train/{place}"}})


def answered(code: str, status: int, **headers: str) -> Exception:
    meta = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return botocore.ClientError({"Error": {"Code": code}, "ResponseMetadata": meta}, "GetObject")


@pytest.mark.parametrize(
    ("error", "kind", "may_pass", "text"),
    [
        (answered("PermanentRedirect", 301, **{"x-amz-bucket-region": "eu-west-1"}), "node", False, "region eu-west-1"),
        (answered("AuthorizationHeaderMalformed", 400), "node", False, "cloud.region is 'us-east-2'"),
        (answered("SlowDown", 503), "passing", True, "S3 answered SlowDown"),
        (answered("RequestTimeTooSkewed", 403), "node", True, "refuses the node's credentials"),
        (answered("AccessDenied", 403), "node", True, "the node has no credentials"),
        (answered("EntityTooLarge", 400), "refused", False, "S3 answered EntityTooLarge"),
        (botocore.ReadTimeoutError(endpoint_url="x"), "passing", True, "no answer in time"),
        (botocore.NoCredentialsError(), "node", True, "cloud.role"),
    ],
)
def test_what_errors_of_s3_mean(error: Exception, kind: str, may_pass: bool, text: str) -> None:
    found = error_of(error, Location("b", "k"), S3Access(region="us-east-2"))
    assert (found.kind, found.may_pass) == (kind, may_pass)
    assert text in str(found)
