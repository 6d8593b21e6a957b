"""Settings: which source wins, that no secret gets out, and where the folders are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowmesh.errors import ConfigError
from flowmesh.settings.load import describe, load
from flowmesh.settings.paths import log_file, results_dir, state_dir
from flowmesh.settings.schema import EnvironmentSettings, Settings
from flowmesh.settings.sources import VARIABLES
from flowmesh.settings.types import Isolation, LogLevel

patient = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
"""A busy machine is no failure; and each example writes its file anew."""


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_nothing_set_is_the_defaults() -> None:
    loaded = load(None, {})
    assert loaded.settings == Settings()
    assert {each.origin for each in describe(loaded)} == {"default"}


def test_the_file_is_overridden_by_the_environment_and_that_by_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "[redis]\ntimeout_s = 1\nheartbeat_interval_s = 1\ntask_topic = 'file'\n")
    environ = {"HEARTBEAT_INTERVAL_SEC": "2", "TASK_TOPIC": "variable"}
    loaded = load(path, environ, {"redis.task_topic": "flag"})
    redis = loaded.settings.redis
    assert (redis.timeout_s, redis.heartbeat_interval_s, redis.task_topic) == (1, 2, "flag")
    origins = {each.key: each.origin for each in describe(loaded)}
    assert origins["redis.timeout_s"] == str(path)
    assert origins["redis.heartbeat_interval_s"] == "HEARTBEAT_INTERVAL_SEC"
    assert origins["redis.task_topic"] == "command line"
    assert origins["redis.url"] == "default"


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("REDIS_URL", "redis://h:1/2", "redis://h:1/2"),
        ("RESULTS_DIR", "/data/out", "/data/out"),
        ("TASK_TOPIC", "jobs", "jobs"),
        ("HEARTBEAT_INTERVAL_SEC", "2.5", 2.5),
        ("HEARTBEAT_INTERVAL_SEC", "3", 3.0),
        ("WORKER_ID", "gpu-07", "gpu-07"),
        ("WORKER_TAGS", " a, b b ,,c,", ("a", "b b", "c")),
        ("LOG_LEVEL", "debug", LogLevel.DEBUG),
        ("WORKER_COST_PER_HOUR", "0", 0.0),
        ("ORCHESTRATOR_BASE_URL", "https://orchestrator.example/base", "https://orchestrator.example/base"),
        ("ORCHESTRATOR_TOKEN", "abc", "abc"),
        ("MODEL_ARCHIVE_USE_PIGZ", "Off", False),
        ("MODEL_ARCHIVE_USE_PIGZ", "1", True),
        ("MODEL_ARCHIVE_COMPRESSION_LEVEL", "9", 9),
        ("MODEL_ARCHIVE_PIGZ_THREADS", "4", 4),
        ("MODEL_ARCHIVE_PIGZ_BIN", "/opt/pigz", "/opt/pigz"),
        ("MODEL_ARCHIVE_TAR_BIN", "gtar", "gtar"),
        ("MODEL_CLEANUP_AFTER_UPLOAD", "YES", True),
        ("WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC", "1e6", 1_000_000),
        ("ENABLE_ELASTIC_SCALING", "no", False),
    ],
)
def test_each_variable_of_the_contract_works_under_its_own_name(variable: str, text: str, value: Any) -> None:
    section, key = VARIABLES[variable].split(".")
    found = getattr(getattr(load(None, {variable: text}).settings, section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_is_an_unset_one(variable: str, text: str) -> None:
    loaded = load(None, {variable: text})
    assert loaded.settings == Settings()
    assert loaded.origins == {}


def test_flags_set_anything_and_empty_text_sets_an_optional_one_back(tmp_path: Path) -> None:
    path = write(tmp_path, "[node]\nworker_id = 'a'\ntags = ['x']\n[environments.'v.1']\npreload = ['os']\n")
    flags = {
        "node.worker_id": "",
        "node.tags": "",
        "environments.v.1.python": sys.executable,
        "task_types.sft.environment": "v.1",
        "processes.isolation": "subreaper",
        "tasks.default_timeout_s": "60",
    }
    found = load(path, {}, flags).settings
    assert found.node.worker_id is None
    assert found.node.tags == ()
    assert found.environments["v.1"] == EnvironmentSettings(python=sys.executable, preload=("os",))
    assert found.task_types["sft"].environment == "v.1"
    assert found.processes.isolation is Isolation.SUBREAPER
    assert found.tasks.default_timeout_s == 60


words = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._:-]{0,20}\Z")


@given(
    st.fixed_dictionaries(
        {
            "WORKER_ID": words,
            "WORKER_TAGS": st.lists(words, max_size=3).map(",".join),
            "WORKER_COST_PER_HOUR": st.floats(0, 1e6).map(repr),
            "HEARTBEAT_INTERVAL_SEC": st.floats(1e-3, 1e5).map(repr),
            "LOG_LEVEL": st.sampled_from(LogLevel).map(str.lower),
            "MODEL_CLEANUP_AFTER_UPLOAD": st.sampled_from(["1", "no", "TRUE", "Off"]),
            "WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC": st.integers(1, 2**62).map(str),
        }
    )
)
@patient
def test_what_a_report_says_can_be_loaded_again(tmp_path: Path, environ: dict[str, str]) -> None:
    first = load(None, environ)
    node = first.settings.node
    assert (node.worker_id, ",".join(node.tags)) == (environ["WORKER_ID"], environ["WORKER_TAGS"])
    assert node.cost_per_hour == float(environ["WORKER_COST_PER_HOUR"])
    assert first.settings.delivery.bandwidth_bytes_per_sec == int(environ["WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC"])
    report = [each for each in describe(first) if each.value is not None]
    text = "".join(f"{each.key} = {each.text}\n" for each in report)
    assert load(write(tmp_path, text), {}).settings == first.settings


def test_secrets_are_in_neither_a_repr_nor_a_report() -> None:
    environ = {
        "REDIS_URL": "redis://worker:hunter2@h:1/0",
        "ORCHESTRATOR_TOKEN": "hunter2",
        "ORCHESTRATOR_BASE_URL": "http://u:hunter2@h",
    }
    loaded = load(None, environ)
    assert loaded.settings.delivery.orchestrator_token == "hunter2"
    shown = {each.key: each.text for each in describe(loaded)}
    assert shown["redis.url"] == '"redis://worker:[hidden]@h:1/0"'
    assert shown["delivery.orchestrator_token"] == '"[hidden]"'
    for text in (
        repr(loaded),
        str(loaded.settings),
        f"{loaded.settings.delivery!r}",
        str(shown),
        str(describe(loaded)),
    ):
        assert "hunter2" not in text


def test_state_dir() -> None:
    plain, user = Settings(), 1000
    home = {"HOME": "/home/ada"}
    assert state_dir(plain, {"STATE_DIRECTORY": "/a:/b"} | home, euid=user) == Path("/a")
    assert state_dir(plain, {"STATE_DIRECTORY": "/a"}, euid=0) == Path("/a")
    assert state_dir(plain, home, euid=0) == Path("/var/lib/flowmesh")
    assert state_dir(plain, home, euid=user) == Path("/home/ada/.local/state/flowmesh")
    assert state_dir(plain, {"XDG_STATE_HOME": "/x"} | home, euid=user) == Path("/x/flowmesh")
    assert state_dir(plain, {"XDG_STATE_HOME": "x"} | home, euid=user) == Path("/home/ada/.local/state/flowmesh")
    chosen = load(None, {}, {"node.state_dir": "here"}).settings
    assert state_dir(chosen, {"STATE_DIRECTORY": "/a"}, euid=user) == Path.cwd() / "here"


def test_folders_are_absolute() -> None:
    assert results_dir(Settings()) == Path.cwd() / "results_workers"
    assert log_file(Settings()) is None
    chosen = load(None, {"RESULTS_DIR": "~/out"}, {"node.log_file": "log/node.jsonl"}).settings
    assert results_dir(chosen) == Path.home() / "out"
    assert log_file(chosen) == Path.cwd() / "log" / "node.jsonl"


def test_a_home_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r'^results.dir: "~nobody-of-that-name/x" needs a home directory'):
        results_dir(load(None, {"RESULTS_DIR": "~nobody-of-that-name/x"}).settings)


def test_importing_the_settings_is_light() -> None:
    code = "import sys, flowmesh.settings.load; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    heavy = {"pydantic", "torch", "numpy", "redis", "requests", "asyncio", "yaml", "click", "rich", "loguru", "psutil"}
    assert heavy.isdisjoint(run.stdout.split())
