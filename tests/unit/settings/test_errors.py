"""Settings that cannot be used, and any junk: one line with the origin, the key, what was found, what is allowed."""

from __future__ import annotations

import datetime
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flowmesh.errors import EXIT_CONFIG, ConfigError
from flowmesh.settings.load import load
from flowmesh.settings.schema import Settings
from flowmesh.settings.sources import VARIABLES, Sections

SECTIONS = Sections(Settings)

patient = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
"""A busy machine is no failure; and each example writes its file anew."""

NAME = "1 to 128 letters, digits or . _ : - that start with a letter or a digit"
WORD = "text that is not empty, without spaces around it"
VARIABLE = "the name of an environment variable (* allowed)"
SECONDS = "a number > 0 and <= 31622400"
COST = "a number from 0 to 1000000"
SENTINEL = "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB"
REDIS = f"redis://HOST:PORT/DB, rediss://HOST:PORT/DB, unix:///PATH?db=DB or {SENTINEL}"
HTTP = "http://HOST:PORT or https://HOST:PORT"
LEVELS = "TRACE, DEBUG, INFO, WARNING, ERROR, CRITICAL"
PYTHON = "an absolute path of a Python interpreter"


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def refusal(
    path: Path | None = None, environ: dict[str, str] | None = None, overrides: dict[str, str] | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, overrides)
    assert caught.value.exit_code == EXIT_CONFIG
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "no secret in a chained error either"
    assert str(caught.value).isprintable(), "one line"
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[redis]\nheartbeat_interval_s = 'often'", f'redis.heartbeat_interval_s: expected {SECONDS}, found "often"'),
        ("[redis]\nheartbeat_interval_s = nan", f"redis.heartbeat_interval_s: expected {SECONDS}, found NaN"),
        ("[node]\ncost_per_hour = inf", f"node.cost_per_hour: expected {COST}, found infinity"),
        ("[node]\ncost_per_hour = true", f"node.cost_per_hour: expected {COST}, found true"),
        (
            "[archive]\ncompression_level = true",
            "archive.compression_level: expected a whole number from 0 to 9, found true",
        ),
        (
            "[archive]\ncompression_level = 6.5",
            "archive.compression_level: expected a whole number from 0 to 9, found 6.5",
        ),
        (
            f"[archive]\npigz_threads = 0x{'f' * 6000}",
            "archive.pigz_threads: expected a whole number from 1 to 4096, found a huge number",
        ),
        ("[node]\nelastic_scaling = 'no'", 'node.elastic_scaling: expected true or false, found "no"'),
        ("[node]\ntags = ['a', 3]", f"node.tags[1]: expected {WORD}, found 3; put it in quotes"),
        ("[node]\ntags = 'a'", 'node.tags: expected a list, found "a"'),
        ("[node]\nworker_id = 'a b'", f'node.worker_id: expected {NAME}, found "a b"'),
        ('[node]\nworker_id = "a\\n"', f'node.worker_id: expected {NAME}, found "a\\n"'),
        (
            "[node]\nlog_level = 'DEBG'",
            f"node.log_level: expected one of {LEVELS}, found \"DEBG\"; did you mean 'DEBUG'?",
        ),
        ('[results]\ndir = "a\\u0000b"', 'results.dir: expected a path, found "a\\u0000b"'),
        ("[results]\nallowed_roots = ['/a', 'b']", 'results.allowed_roots[1]: expected an absolute path, found "b"'),
        ("[tasks]\npass_env = ['NCCL_*', 'A-B']", f'tasks.pass_env[1]: expected {VARIABLE}, found "A-B"'),
        (
            "[processes]\nisolation = 'docker'",
            'processes.isolation: expected one of auto, cgroup, subreaper, found "docker"',
        ),
        (
            "[redis]\ntask_topic = 'tasks.events'",
            'redis.task_topic: "tasks.events" is reserved for events; choose another name',
        ),
        ("[redis]\nworker_id = 'a'", "redis.worker_id: unknown setting; it belongs to [node]"),
        ("[redis]\nurll = 'a'", "redis.urll: unknown setting; did you mean 'url'?"),
        ("[reddis]\nurl = 'a'", "reddis: unknown section; did you mean 'redis'?"),
        ("heartbeat_interval_s = 3", "heartbeat_interval_s: a setting outside its section; it belongs to [redis]"),
        ("redis = 3", "redis: expected a section, [redis], found a number"),
        ("environments = ['vllm']", "environments: expected a section, [environments], found a list of 1 item"),
        (
            "[environments]\nvllm = 'x'",
            "environments.vllm: expected a section, [environments.vllm], found text (not shown)",
        ),
        ("[environments.vllm]\npyton = 'x'", "environments.vllm.pyton: unknown setting; did you mean 'python'?"),
        ("[environments.'a b']", f'environments."a b": its name must be {NAME}'),
        (
            "[environments.x]\npython = 'bin/python'",
            'environments.x.python: expected an absolute path, found "bin/python"',
        ),
        (
            "[environments.x]\npython = '/no/python'",
            f'environments.x.python: expected {PYTHON}, found "/no/python", which does not exist',
        ),
        ("[environments.x]\npython = '/'", f'environments.x.python: expected {PYTHON}, found "/", which is not a file'),
        (
            "[environments.x]\npreload = ['a-b']",
            'environments.x.preload[0]: expected the dotted name of a Python module, found "a-b"',
        ),
        ("[task_types.sft]\nrunner = 'mine'", 'task_types.sft.runner: expected module:Class, found "mine"'),
        (
            "[environments.vllm]\n[task_types.sft]\nenvironment = 'vlm'",
            "task_types.sft.environment: there is no [environments.vlm]; did you mean 'vllm'?",
        ),
        (
            "[task_types.sft]\nenvironment = 'x'",
            "task_types.sft.environment: there is no [environments.x]; known: default, light",
        ),
        ("[node]\nworker_id = 2026-01-02", f"node.worker_id: expected {NAME}, found 2026-01-02; put it in quotes"),
        ('"a\\nb" = 3', '"a\\nb": unknown section; '),
        ("[node]\nworker_id = x", "line 2, column 13: invalid value"),
        ("[node]\nworker_id", "line 2 (the end): expected '=' after a key in a key/value pair"),
        ("[node]\n[node]", "line 2, column 6: cannot declare ('node',) twice"),
        (f"x = {'9' * 5000}", "not TOML: Exceeds the limit"),
        (f"x = {'[' * 5000}", "nested too deep"),
    ],
)
def test_an_error_names_the_file_the_key_what_was_found_and_what_is_allowed(
    tmp_path: Path, text: str, said: str
) -> None:
    path = write(tmp_path, text)
    found = refusal(path)
    if text.startswith(("x =", '"a', "[node]\n[node]")):
        assert found.startswith(f"{path}: {said}")
    else:
        assert found == f"{path}: {said}"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"HEARTBEAT_INTERVAL_SEC": "often"}, f'redis.heartbeat_interval_s: expected {SECONDS}, found "often"'),
        ({"HEARTBEAT_INTERVAL_SEC": "nan"}, f"redis.heartbeat_interval_s: expected {SECONDS}, found NaN"),
        ({"WORKER_COST_PER_HOUR": "-1"}, f"node.cost_per_hour: expected {COST}, found -1"),
        ({"WORKER_COST_PER_HOUR": "9" * 5000}, f"node.cost_per_hour: expected {COST}, found infinity"),
        (
            {"MODEL_ARCHIVE_COMPRESSION_LEVEL": "1.5"},
            "archive.compression_level: expected a whole number from 0 to 9, found 1.5",
        ),
        ({"MODEL_ARCHIVE_USE_PIGZ": "maybe"}, 'archive.use_pigz: expected true or false, found "maybe"'),
        ({"LOG_LEVEL": "\udcff"}, f'node.log_level: expected one of {LEVELS}, found "\\udcff"'),
        ({"ENABLE_ELASTIC_SCALING": "2"}, 'node.elastic_scaling: expected true or false, found "2"'),
        ({"WORKER_ID": "a/b"}, f'node.worker_id: expected {NAME}, found "a/b"'),
        ({"WORKER_ID": "\udcff"}, f'node.worker_id: expected {NAME}, found "\\udcff"'),
        (
            {"ORCHESTRATOR_BASE_URL": "orchestrator:8000"},
            f"delivery.orchestrator_url: expected {HTTP}, found text without a scheme",
        ),
        (
            {"ORCHESTRATOR_BASE_URL": "ftp://host"},
            f'delivery.orchestrator_url: expected {HTTP}, found the scheme "ftp"',
        ),
        ({"ORCHESTRATOR_BASE_URL": "http://"}, f"delivery.orchestrator_url: expected {HTTP}, found no host"),
        (
            {"ORCHESTRATOR_BASE_URL": "http://h?x=1"},
            f"delivery.orchestrator_url: expected {HTTP}, found a query or a fragment",
        ),
        ({"REDIS_URL": "localhost:6379"}, f"redis.url: expected {REDIS}, found text without a scheme"),
        ({"REDIS_URL": "http://h"}, f'redis.url: expected {REDIS}, found the scheme "http"'),
        ({"REDIS_URL": "redis+sentinel://h:26379"}, f"redis.url: expected {SENTINEL}, found no service name"),
        ({"REDIS_URL": "redis+sentinel://h,:1/main"}, f"redis.url: expected {SENTINEL}, found an empty host"),
        ({"REDIS_URL": "redis+sentinel://h:99999/main"}, f"redis.url: expected {SENTINEL}, found a port that is not"),
        ({"REDIS_URL": "redis+sentinel://h/main/x"}, f"redis.url: expected {SENTINEL}, found a database that is not"),
        ({"REDIS_URL": "redis+sentinel://u:a@b@h/main"}, f"redis.url: expected {SENTINEL}, found a user name or"),
        ({"REDIS_URL": "unix://run/redis.sock"}, f"redis.url: expected {REDIS}, found no absolute path"),
        ({"REDIS_URL": "redis://h:6379/main"}, f"redis.url: expected {REDIS}, found a database that is not a number"),
        ({"REDIS_URL": "redis://h:99999"}, f"redis.url: expected {REDIS}, found a host or port that cannot be used"),
    ],
)
def test_an_error_names_the_variable(environ: dict[str, str], said: str) -> None:
    assert refusal(environ=environ).startswith(f"{next(iter(environ))}: {said}")


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("redis.urll", "x", "redis.urll: unknown setting; did you mean 'redis.url'?"),
        ("", "x", ": unknown setting; known: "),
        ("redis", "x", "redis: a section, not a setting; it has redis.url, redis.password_file, redis.task_topic"),
        ("environments", "x", "environments: a section, not a setting; it has environments.NAME.python"),
        ("environments.python", "x", "environments.python: unknown setting; did you mean 'environments.NAME.python'?"),
        ("environments..python", "/x", "environments..python: unknown setting; did you mean"),
        ("a\nb", "x", '"a\\nb": unknown setting; '),
        ("delivery.concurrency", "two", 'delivery.concurrency: expected a whole number from 1 to 64, found "two"'),
        ("redis.task_topic", "", "redis.task_topic: expected text that is not empty"),
    ],
)
def test_an_error_names_the_flag(key: str, text: str, said: str) -> None:
    assert refusal(overrides={key: text}).startswith(f"command line: {said}")


def test_what_is_not_in_force_any_more_is_not_blamed(tmp_path: Path) -> None:
    path = write(tmp_path, "[redis]\nurl = 'http://wrong'\nheartbeat_interval_s = 'often'\n")
    environ = {"REDIS_URL": "redis://h", "HEARTBEAT_INTERVAL_SEC": "1"}
    assert load(path, environ).settings.redis.heartbeat_interval_s == 1


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert refusal(missing) == f"{missing}: cannot be read: no such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: cannot be read: is a directory"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[node]\nworker_id = '\xff'\n")
    assert refusal(binary) == f"{binary}: line 2: not UTF-8 text"


def test_an_interpreter_that_may_not_be_executed(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("")
    python.chmod(stat.S_IRUSR)
    said = refusal(overrides={"environments.x.python": str(python)})
    assert said.endswith("which is not executable for this user")


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://:6379/",
        "redis://h?db=3",
        "redis://h.example.:1/0?username=u&password=p%40",
        "rediss://u:p%40@[::1]:1/15",
        "rediss://[fe80::1%25eth0]:1",
        "rediss://h/0?ssl_ca_certs=/etc/ca%20s.pem&ssl_cert_reqs=none&ssl_check_hostname=False&ssl_min_version=772",
        "rediss://h?ssl_certfile=/c&ssl_keyfile=/k&ssl_password=p&ssl_ca_path=/etc/ssl&ssl_ciphers=HIGH:!aNULL",
        "unix:///run/x.sock?db=1",
        "unix://u:p@/run/x.sock?db=1&password=p",
    ],
)
def test_redis_urls_that_work(url: str) -> None:
    assert load(None, {"REDIS_URL": url}).settings.redis.url == url
    scheme, _, rest = url.partition("://")
    assert load(None, {"REDIS_URL": f"{scheme.upper()}://{rest}"}).settings.redis.url == url, "a scheme has no case"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h?foo=bar", 'its option "foo" cannot be set in the address; known: db, password, username'),
        ("redis://h?d=1", "its option \"d\" cannot be set in the address; did you mean 'db'?"),
        (
            "redis://h?ssl_cert_reqs=none",
            'its option "ssl_cert_reqs" cannot be set in the address; only rediss://HOST:PORT/DB',
        ),
        (
            "unix:///x?ssl_ca_certs=/c",
            'its option "ssl_ca_certs" cannot be set in the address; only rediss://HOST:PORT/DB',
        ),
        (
            "redis://h?socket_timeout=abc",
            'its option "socket_timeout" cannot be set in the address; leave it out, and set redis.',
        ),
        ("redis://h?decode_responses=true", 'its option "decode_responses" cannot be set in the address; known: '),
        ("redis://h?max_connections=1", 'its option "max_connections" cannot be set in the address; known: '),
        ("redis://h?protocol=3", 'its option "protocol" cannot be set in the address; known: '),
        ("unix:///x?path=/y", 'its option "path" cannot be set in the address; known: '),
        ("redis://h?db=abc", 'its option "db" must be a number'),
        ("redis://h?db=-1", 'its option "db" must be a number'),
        ("redis://h?db=", 'its option "db" must be a number'),
        ("redis://h?db=1&db=2", 'its option "db" is given twice; leave one out'),
        (f"redis://h/{'9' * 5000}", f"expected {REDIS}, found a database that is not a number"),
        ("rediss://h?ssl_cert_reqs=maybe", 'its option "ssl_cert_reqs" must be none, optional or required'),
        ("rediss://h?ssl_check_hostname=off", 'its option "ssl_check_hostname" must be true or false'),
        ("rediss://h?ssl_min_version=1.2", 'its option "ssl_min_version" must be 771 (TLS 1.2) or 772 (TLS 1.3)'),
        ("rediss://h?ssl_keyfile=/k", 'its option "ssl_keyfile" needs "ssl_certfile"'),
        ("redis://u:1?HUNTER2=a@h", f"expected {REDIS}, found a bare # or ?"),
        ("redis://h..x/0", f"expected {REDIS}, found a host or port that cannot be used"),
        ("redis+sentinel://h..x/main", f"expected {SENTINEL}, found a host that cannot be used"),
    ],
)
def test_redis_urls_that_do_not(url: str, said: str) -> None:
    found = refusal(environ={"REDIS_URL": url})
    assert found.startswith(f"REDIS_URL: redis.url: {said}")
    assert "HUNTER2" not in found


@given(st.text("ab:/?#@%[]. \n\t", max_size=10), st.text("ab:/?#@%[]. \n\t", max_size=10))
@patient
def test_no_error_about_an_address_or_a_token_shows_it(before: str, after: str) -> None:
    assume("://" not in after)  # what stands before it is a scheme, and a scheme is shown
    secret = f"{before}HUNTER2{after}"
    environs = [
        {"REDIS_URL": f"redis://user:{secret}@host:6379/0"},
        {"REDIS_URL": f"redis://user:{secret}"},
        {"REDIS_URL": secret},
        {"ORCHESTRATOR_BASE_URL": f"http://user:{secret}@host"},
        {"ORCHESTRATOR_TOKEN": secret},
    ]
    for environ in environs:
        try:
            load(None, environ)
            continue
        except ConfigError as error:
            said = str(error)
        assert "HUNTER2" not in said.upper()


scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([10**400, 2**70, datetime.date(2026, 1, 2), datetime.time(1), datetime.datetime(2026, 1, 2)])
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return hex(value) if value >= 0 else str(value)
        case float():
            return repr(value)
        case str():
            return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return value.isoformat()


def path_in_file(key: str) -> tuple[str, str]:
    section, _, last = key.replace("NAME", "x").rpartition(".")
    return section, last


@given(st.sampled_from(SECTIONS.keys()), junk)
@settings(patient, max_examples=300)
def test_junk_in_a_key_is_taken_or_refused_by_the_name_of_the_key(tmp_path: Path, key: str, value: Any) -> None:
    section, last = path_in_file(key)
    path = write(tmp_path, f"[{section}]\n{last} = {toml(value)}\n")
    assume(tomllib.loads(path.read_text()))
    try:
        load(path, {})
        return
    except ConfigError as error:
        said = str(error)
    assert said.startswith(f"{path}: {section}.{last}")
    assert said.isprintable()


@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(["node", "redis", "environments"]), junk, max_size=3))
@patient
def test_a_junk_file_is_taken_or_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    path = write(tmp_path, "".join(f"{toml(key)} = {toml(value)}\n" for key, value in document.items()))
    try:
        load(path, {})
        return
    except ConfigError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")
    assert said.isprintable()


@given(st.binary(max_size=60))
@patient
def test_bytes_that_are_no_toml_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(b"[node]\n" + data + b"\n=")
    assert refusal(path).startswith(f"{path}: ")


@given(st.sampled_from(sorted(VARIABLES)), st.text(st.characters(exclude_characters="\0"), max_size=12))
@patient
def test_junk_in_a_variable_is_taken_or_refused_by_its_name(variable: str, text: str) -> None:
    try:
        load(None, {variable: text})
        return
    except ConfigError as error:
        said = str(error)
    assert said.startswith(f"{variable}: {VARIABLES[variable]}")
    assert said.isprintable()
