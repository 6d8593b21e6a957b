"""The permits that each job carries: from the settings and the node's environment, never from the task's."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh.errors import ConfigError
from flowmesh.execution import permits
from flowmesh.execution.layout import Owner
from flowmesh.settings.load import load


def test_caches_are_open_and_the_hubs_token_beside_them_is_not(tmp_path: Path) -> None:
    settings = load(None, {}, {"tasks.read_roots": "/models,/data/*"}).settings
    found = permits.of_node(settings, tmp_path, {"HOME": "/home/u", "HF_DATASETS_CACHE": "/big/sets"}, None)
    assert found.read_roots == ("/models", "/data/*")
    assert found.caches == (
        "/home/u/.cache/huggingface/hub", "/home/u/.cache/huggingface/datasets", "/big/sets",
    )  # fmt: skip
    assert "/home/u/.cache/huggingface/token" in found.hidden
    assert str(tmp_path) in found.hidden
    assert not found.own_user


def test_a_task_user_has_its_own_home(tmp_path: Path) -> None:
    owner = Owner(uid=1, gid=1, groups=(), name="u", home="/home/task")
    found = permits.of_node(load(None, {}).settings, tmp_path, {"HOME": "/root", "HF_HOME": "/hf"}, owner)
    assert found.own_user
    assert found.caches == ("/hf/hub", "/hf/datasets")


@pytest.mark.parametrize("root", ["/proc", "/proc/1", "/sys/fs"])
def test_the_kernels_folders_are_no_roots(root: str) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.read_roots"):
        load(None, {}, {"tasks.read_roots": root})
