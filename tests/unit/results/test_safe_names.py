from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.errors import FieldError
from flowmesh.messages.output import LocalDestination, Output
from flowmesh.results.safe_names import check_task_id, is_plain_name, task_folder, within


def local(path: str | None) -> Output:
    return Output(destination=LocalDestination(path=path))


@pytest.mark.parametrize("task_id", ["a", "task-1", "9f.2", "_x", "user@host:job=1+2", "a" * 200])
def test_usual_task_ids_pass(task_id: str) -> None:
    assert check_task_id(task_id) == task_id


@pytest.mark.parametrize(
    "task_id", ["", ".", "..", ".hidden", "-rf", "a/b", "a\0b", "a b", "ä", "a\n", "a" * 201, "a\\b"]
)
def test_task_ids_that_are_no_folder_names_are_refused(task_id: str) -> None:
    with pytest.raises(FieldError, match="task_id"):
        check_task_id(task_id)


@given(st.text(max_size=30))
def test_a_plain_name_never_leaves_its_folder(name: str) -> None:
    if is_plain_name(name):
        assert os.path.normpath(f"/root/{name}") == f"/root/{name}"
        assert "\n" not in name
        assert "\r" not in name


def test_a_name_of_too_many_bytes_is_not_plain() -> None:
    assert is_plain_name("ä" * 127)
    assert not is_plain_name("ä" * 128)


class TestTaskFolder:
    @pytest.fixture
    def results(self, tmp_path: Path) -> Path:
        folder = tmp_path / "results"
        folder.mkdir()
        return folder

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            (None, "t-1"),
            ("", "t-1"),
            (".", "t-1"),
            ("runs", "runs/t-1"),
            ("runs/t-1", "runs/t-1"),
            ("runs/t-1/", "runs/t-1"),
            ("t-1", "t-1"),
            ("runs/xt-1", "runs/xt-1/t-1"),
        ],
    )
    def test_below_results_dir(self, results: Path, path: str | None, expected: str) -> None:
        assert task_folder(results, (), "t-1", local(path)) == results / expected

    def test_an_absolute_path_below_results_dir(self, results: Path) -> None:
        assert task_folder(results, (), "t-1", local(str(results / "x"))) == results / "x" / "t-1"

    def test_an_absolute_path_below_an_allowed_root(self, results: Path, tmp_path: Path) -> None:
        share = tmp_path / "share"
        assert task_folder(results, (str(share),), "t-1", local(str(share / "a"))) == share / "a" / "t-1"
        assert task_folder(results, (str(share),), "t-1", local(str(share))) == share / "t-1"

    def test_an_absolute_path_elsewhere_names_the_setting(self, results: Path, tmp_path: Path) -> None:
        with pytest.raises(FieldError, match=r"results\.allowed_roots") as caught:
            task_folder(results, (), "t-1", local(str(tmp_path / "elsewhere")))
        assert caught.value.path == "spec.output.destination.path"

    def test_a_root_is_not_a_prefix_of_a_name(self, results: Path) -> None:
        with pytest.raises(FieldError, match="allowed_roots"):
            task_folder(results, (), "t-1", local(str(results) + "-other"))

    def test_a_root_that_is_named_like_the_task_is_not_the_tasks_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FieldError, match="allowed_roots"):
            task_folder(tmp_path / "t-1", (), "t-1", local(str(tmp_path / "t-1")))

    @pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "a/.."])
    def test_dot_dot_is_refused(self, results: Path, path: str) -> None:
        with pytest.raises(FieldError, match=r"`\.\.`"):
            task_folder(results, (), "t-1", local(path))

    @pytest.mark.parametrize("path", ["a\0b", "a\nb"])
    def test_control_characters_are_refused(self, results: Path, path: str) -> None:
        with pytest.raises(FieldError, match="control character"):
            task_folder(results, (), "t-1", local(path))

    def test_a_link_out_of_results_dir_is_refused(self, results: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").mkdir()
        (results / "out").symlink_to(tmp_path / "secret")
        with pytest.raises(FieldError, match="allowed_roots"):
            task_folder(results, (), "t-1", local("out"))
        (results / "t-1").symlink_to(tmp_path / "secret")
        with pytest.raises(FieldError, match="allowed_roots"):
            task_folder(results, (), "t-1", local(None))

    def test_a_link_to_an_allowed_root_passes(self, results: Path, tmp_path: Path) -> None:
        (tmp_path / "disk2").mkdir()
        (results / "out").symlink_to(tmp_path / "disk2")
        folder = task_folder(results, (str(tmp_path / "disk2"),), "t-1", local("out"))
        assert folder == tmp_path / "disk2" / "t-1"

    def test_results_dir_itself_may_be_a_link(self, results: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(results)
        assert task_folder(tmp_path / "link", (), "t-1", local("a")) == results / "a" / "t-1"

    def test_a_bad_id_is_refused(self, results: Path) -> None:
        with pytest.raises(FieldError, match="task_id"):
            task_folder(results, (), "..", local(None))

    @given(path=st.text(alphabet="./at-1 ~", max_size=12))
    def test_whatever_is_asked_it_lies_below_the_root(self, path: str) -> None:
        root = Path("/nonexistent/results")
        try:
            folder = task_folder(root, (), "t-1", local(path))
        except FieldError:
            return
        assert folder.is_relative_to(root)
        assert folder != root
        assert folder.name == "t-1"


def test_a_loop_of_links_is_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert within(tmp_path / "a" / "x", tmp_path) is None
