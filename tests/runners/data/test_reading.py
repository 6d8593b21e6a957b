"""What a document may read: only files below its roots, wherever a name leads, and no content in an error."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flowmesh.files.removal import remove_path
from flowmesh.messages.job import Job, Permits
from flowmesh.validation.names import listed
from runners.api import BadRequest, Context
from runners.data.reading import Reach, Refused
from runners.data.sources import load_items
from tests.kit.hostile import make_deep
from tests.kit.paths import ROOT

MakeContext = Callable[..., Context]
SECRET = "root:x:0:0:s3cret-line"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder that no root covers, with a secret in several formats."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "shadow").write_text(f"{SECRET}\nbin:*:1\n")
    (folder / "rows.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    (folder / "rows.csv").write_text(f"text\n{SECRET}\n")
    return folder


@pytest.fixture
def narrow(make_context: MakeContext, tmp_path: Path) -> MakeContext:
    """Contexts whose only root besides results and caches is `tmp_path/open`."""
    (tmp_path / "open").mkdir()

    def make(spec: dict[str, Any], **fields: Any) -> Context:
        return make_context(spec, **{"permits": Permits(read_roots=(str(tmp_path / "open"),)), **fields})

    return make


def data_error(make: MakeContext, **data: Any) -> str:
    spec = {"data": data}
    with pytest.raises(BadRequest) as caught:
        load_items(make(spec), spec)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_data_path_outside_is_refused_and_the_setting_is_named(narrow: MakeContext, secret: Path, kind: str) -> None:
    error = data_error(narrow, type=kind, path=str(secret / "rows.csv"))
    assert "spec.data.path" in error
    assert "tasks.read_roots" in error


@pytest.mark.parametrize(
    "path",
    [
        "/proc/self/environ",
        "/proc/1/environ",
        "/proc/self/root/etc/passwd",
        "/proc/self/cwd/pyproject.toml",
        "/sys/kernel/notes",
    ],
)
@pytest.mark.parametrize("permits", [Permits(), Permits(own_user=True), Permits(read_roots=("/",))])
def test_the_kernels_files_are_never_data(make_context: MakeContext, path: str, permits: Permits) -> None:
    if path.endswith(("passwd", "pyproject.toml")) and (permits.own_user or permits.read_roots):
        pytest.skip("leads to a file that this node may read")
    error = data_error(lambda spec: make_context(spec, permits=permits), type="csv", path=path)
    assert "read" in error


def test_a_link_is_judged_by_where_it_ends(narrow: MakeContext, secret: Path, tmp_path: Path) -> None:
    (tmp_path / "open" / "rows.jsonl").symlink_to(secret / "rows.jsonl")
    (tmp_path / "open" / "folder").symlink_to(secret)
    for path in ("rows.jsonl", "folder/rows.jsonl", "../outside/rows.jsonl"):
        assert "tasks.read_roots" in data_error(narrow, type="jsonl", path=f"{tmp_path}/open/{path}")


def test_whether_something_is_there_is_not_told(narrow: MakeContext, secret: Path) -> None:
    there, absent = (
        data_error(narrow, type="csv", path=str(secret / name)).replace(name, "X") for name in ("rows.csv", "none.csv")
    )
    assert there == absent
    patterns = (
        data_error(narrow, type="csv", path=f"{secret}/{name}*").replace(name, "X") for name in ("rows", "none")
    )
    assert len(set(patterns)) == 1


def test_a_pattern_gives_no_link_that_leads_outside(narrow: MakeContext, secret: Path, tmp_path: Path) -> None:
    (tmp_path / "open" / "a.jsonl").write_text('{"text": "mine"}\n')
    (tmp_path / "open" / "b.jsonl").symlink_to(secret / "rows.jsonl")
    assert "tasks.read_roots" in data_error(narrow, type="jsonl", path=f"{tmp_path}/open/*.jsonl")


def test_roots_open_results_and_what_the_operator_lists(narrow: MakeContext, tmp_path: Path) -> None:
    for folder in (tmp_path / "open", tmp_path / "results" / "other"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text('{"text": "mine"}\n')
        spec = {"data": {"type": "jsonl", "path": str(folder / "rows.jsonl")}}
        assert load_items(narrow(spec), spec).prompts == ("mine",)


def reach(tmp_path: Path, **permits: Any) -> Reach:
    folder = str(tmp_path / "results")
    job = Job(attempt=1, task_id="t", task_type="t", runner="", task={}, out_dir=folder, results_dir=folder,
              cache_dir=str(tmp_path / "state" / "cache"), tmp_dir=str(tmp_path / "state" / "tmp" / "1"),
              permits=Permits(hidden=(str(tmp_path / "state"),), **permits))  # fmt: skip
    return Reach.of(job)


def test_the_state_folder_is_hidden_also_below_a_root(tmp_path: Path) -> None:
    for found in (reach(tmp_path, read_roots=("/",)), reach(tmp_path, own_user=True)):
        assert found.covers("/etc/hosts")
        assert not found.covers(str(tmp_path / "state" / "journal.sqlite"))
        assert not found.covers(str(tmp_path / "state" / "tmp" / "2" / "x"))
        assert found.covers(str(tmp_path / "state" / "cache" / "x"))
        assert found.covers(str(tmp_path / "state/tmp/1/x"))
        assert not found.covers("/run/secrets/x")
        assert not found.covers("/dev/shm/x")


def test_wildcards_of_roots_stand_for_one_part_and_follow_no_link(tmp_path: Path) -> None:
    (tmp_path / "data" / "a" / "public").mkdir(parents=True)
    (tmp_path / "data" / "evil").mkdir()
    (tmp_path / "data" / "evil" / "public").symlink_to("/etc")
    found = reach(tmp_path, read_roots=(f"{tmp_path}/data/*/public",))
    assert found.find(tmp_path / "data" / "a" / "public") == (tmp_path / "data" / "a" / "public").resolve()
    assert not found.covers(str(tmp_path / "data" / "a"))
    with pytest.raises(Refused):
        found.find(tmp_path / "data" / "evil" / "public" / "hostname")


def test_sockets_fifos_and_deleted_files_are_refused(tmp_path: Path) -> None:
    found = reach(tmp_path, read_roots=(str(tmp_path),))
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("fifo", "socket"):
            with pytest.raises(Refused):
                found.find(tmp_path / name)
    with open(tmp_path / "gone", "w+") as file:
        (tmp_path / "gone").unlink()
        with pytest.raises(Refused):
            found.find(Path(f"/proc/self/fd/{file.fileno()}"))


def test_what_was_judged_is_what_is_read(tmp_path: Path) -> None:
    """The name is exchanged all the time; the reader sees its own file or a refusal, never the other one."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mine").write_text("mine")
    (tmp_path / "secret").write_text(SECRET)
    found, ended = reach(tmp_path, read_roots=(str(tmp_path / "in"),)), threading.Event()

    def exchange() -> None:
        for target in ("mine", "../secret") * 100_000:
            (tmp_path / "in" / "new").symlink_to(target)
            os.replace(tmp_path / "in" / "new", tmp_path / "in" / "file")  # noqa: PTH105
            if ended.is_set():
                return

    (tmp_path / "in" / "file").symlink_to("mine")
    swapper = threading.Thread(target=exchange)
    swapper.start()
    seen = set()
    try:
        for _ in range(2000):
            try:
                seen.add(found.read_bytes(tmp_path / "in" / "file"))
            except Refused:
                seen.add(b"refused")
    finally:
        ended.set()
        swapper.join()
    assert seen == {b"mine", b"refused"}


def test_a_folder_with_a_link_that_leads_outside_is_refused_whole(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "open" / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "blob").write_text("{}")
    (folder / "config.json").symlink_to("blob")
    (folder / "loop").symlink_to("..")
    found = reach(tmp_path, read_roots=(str(tmp_path / "open"),))
    found.check_folder(folder)
    (folder / "sub" / "tokenizer.json").symlink_to(secret / "shadow")
    with pytest.raises(Refused, match=r"sub/tokenizer\.json"):
        found.check_folder(folder)


def test_a_link_that_leads_outside_is_found_a_thousand_levels_deep(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "open" / "model"
    folder.mkdir(parents=True)
    make_deep(folder, 1000)
    found = reach(tmp_path, read_roots=(str(tmp_path / "open"),))
    found.check_folder(folder)
    folder.joinpath(*["d"] * 1000, "out").symlink_to(secret / "shadow")
    with pytest.raises(Refused, match=r"d/out"):
        found.check_folder(folder)
    assert not remove_path(folder)


@pytest.mark.parametrize(
    "card",
    [
        "configs:\n- config_name: default\n  data_files: {outside}/rows.jsonl",
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../outside/*.jsonl",
        "configs:\n- config_name: default\n  data_files: 'http://169.254.169.254/x.jsonl'",
        "configs:\n- config_name: default\n  data_files: 'zip://a.jsonl::{outside}/x.zip'",
        "configs:\n- config_name: default\n  data_dir: ../outside",
    ],
)
def test_a_datasets_card_names_no_files_of_others(narrow: MakeContext, secret: Path, tmp_path: Path, card: str) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "open" / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "mine"}\n')
    (folder / "README.md").write_text(f"---\n{card.replace('{outside}', str(secret))}\n---\n")
    assert "outside of the dataset" in data_error(narrow, type="dataset", url=str(folder), column="text")


def test_a_saved_dataset_names_no_files_of_others(narrow: MakeContext, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": SECRET}]).save_to_disk(tmp_path / "outside")
    datasets.Dataset.from_list([{"text": "mine"}]).save_to_disk(tmp_path / "open" / "set")
    state = json.loads((tmp_path / "open" / "set" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../../outside/data-00000-of-00001.arrow"}]
    (tmp_path / "open" / "set" / "state.json").write_text(json.dumps(state))
    error = data_error(narrow, type="dataset", url=str(tmp_path / "open" / "set"), column="text")
    assert "outside of its folder" in error


@pytest.mark.parametrize("name", ["text", "csv", "json", "hf://buckets/a/b", "file:///etc", "zip://x::/etc/a"])
def test_a_dataset_is_a_hub_id_or_a_local_path(make_context: MakeContext, name: str) -> None:
    pytest.importorskip("datasets")
    assert "spec.data.url" in data_error(make_context, type="dataset", url=name, column="text")


def test_an_image_of_a_row_is_not_opened_by_its_path(narrow: MakeContext, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"text": datasets.Value("string"), "image": stored})
    row = {"text": "p", "image": {"path": str(tmp_path / "outside.png"), "bytes": None}}
    folder = tmp_path / "open" / "set"
    datasets.Dataset.from_list([row], features=features).save_to_disk(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["image"] = {"_type": "Image"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    spec = {"data": {"type": "dataset", "url": str(folder), "column": "text", "metadata_columns": ["image"]}}
    metadata = load_items(narrow(spec), spec).metadata[0]
    assert metadata is not None
    assert metadata["image"] == row["image"]  # decoded, its path would have been opened


def test_a_job_of_an_older_node_opens_nothing(tmp_path: Path) -> None:
    old = dict.fromkeys(("task_id", "task_type", "runner", "out_dir", "results_dir", "cache_dir", "tmp_dir"), "")
    job = msgspec.convert({"attempt": 1, "task": {}, **old}, Job)
    assert not Reach.of(job).covers(str(ROOT))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("csv", f"{SECRET}\nbin:*:1:1\n"),
        ("csv", "hf_AbCdEf0123GhIjKl\n"),
        ("csv", f"a,a\n{SECRET}\n"),
        ("jsonl", json.dumps({SECRET: 1})),
        ("jsonl", json.dumps({"text": {SECRET: SECRET}})),
        ("jsonl", json.dumps({"text": [{"role": "user", "content": 5, SECRET: SECRET}]})),
        ("jsonl", f'{{"{SECRET}": 1, "{SECRET}": 2}}'),
        ("jsonl", SECRET),
    ],
)
def test_no_content_of_a_file_is_in_an_error(narrow: MakeContext, tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / "open" / "file").write_text(content)
    error = data_error(narrow, type=kind, path=str(tmp_path / "open" / "file"))
    assert "hf_AbCd" not in error


def test_names_of_columns_are_shown() -> None:
    assert listed(["text", "Question Text", "meta.id", "answer_2", "_id", "root:x:0", "0123abcd"]) == (
        "text, Question Text, meta.id, answer_2, _id, 2 with unusual names"
    )


def test_the_home_of_nobody_is_no_crash(narrow: MakeContext) -> None:
    for path in ("~no-such-user/x.csv", "~no-such-user/*.csv", "a\0b.csv"):
        assert "spec.data.path" in data_error(narrow, type="csv", path=path)
