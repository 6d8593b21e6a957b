"""`flowmesh validate`, and the check before `flowmesh run` and `flowmesh submit`: all errors at once, with lines."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flowmesh.cli.main import main
from flowmesh.tasks.catalogue import BUILTIN
from tests.kit.paths import ROOT

EXAMPLES = sorted((ROOT / "conf/tasks").glob("*.yaml"))
AGENTS = sorted(path for path in (ROOT / "conf/agents").rglob("*.yaml") if not path.parent.name.startswith("_"))

INFERENCE = """\
spec:
  taskType: inference
  modle: {}
  model:
    source:
      identifer: x
  inference:
    top_p: 1.5
    num_beams: 1
  data:
    type: list
    items: [1, .inf]
  timeoutSec: -3
  output: {destination: {type: ftp}}
"""
TEAM = """\
type: orchestra
model: {base_url: "http://127.0.0.1/v1", max_tokens: 0}
workers:
  searcher:
    description: finds
    toolz: {}
"""
NODE = """\
# comment
[node]
log_level = "info"
woker_id = "a"

[[slots]]
name = "a"
[[slots]]
name = "b"
gpu = [1]

[environments."x.y"]
python = 3
"""


def validate(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["validate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert err == ""
    return caught.value.code, out


def errors_of(capsys, path, *arguments):
    """The line and the field of each error."""
    code, out = validate(capsys, "--json", path, *arguments)
    (file,) = json.loads(out)["files"]
    assert code == (0 if file["ok"] else 78)
    return [(error["line"], error["message"].partition(": ")[0]) for error in file["errors"]]


def test_every_example_is_valid(capsys):
    code, out = validate(capsys, *EXAMPLES, *AGENTS, ROOT / "conf/node.toml")
    assert code == 0
    assert all(": valid (" in line for line in out.splitlines())
    assert len(out.splitlines()) == len(EXAMPLES) + len(AGENTS) + 1


def test_all_errors_at_once_each_with_its_line(tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text(INFERENCE)
    code, out = validate(capsys, path)
    assert code == 78
    lines = [line.removeprefix(f"{path}:") for line in out.splitlines()]
    assert "3: spec.modle: unknown field; did you mean 'model'?" in lines
    assert "8: spec.inference.top_p: expected a number > 0 and <= 1, found 1.5" in lines
    assert "9: warning: spec.inference.num_beams: not used" in lines
    assert errors_of(capsys, path) == [
        (3, "spec.modle"),
        (6, "spec.model.source.identifer"),
        (8, "spec.inference.top_p"),
        (12, "spec.data.items[1]"),
        (13, "spec.timeoutSec"),
        (14, "spec.output.destination.type"),
    ]


def test_fields_beside_the_spec_are_warned_of(tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text("spec:\n  taskType: echo\ntimeoutSec: 5\n")
    assert validate(capsys, path)[1].startswith(f"{path}:3: warning: timeoutSec beside spec: not used\n")


def test_json_has_lines_as_yaml_has(tmp_path, capsys):
    path = tmp_path / "task.json"
    document = {"spec": {"taskType": "sft", 'note "}': [{"a": 1e-5}, {}], "training": {"batch_size": 0, "beta": None}}}
    document["spec"]["data"] = {"prompts": ["a\n{", 1, True]}
    path.write_text(json.dumps(document, indent="\t"))
    lines = path.read_text().splitlines()

    def line(part):
        return next(number for number, line in enumerate(lines, 1) if part in line)

    assert errors_of(capsys, path) == [
        (line('"training"') + 1, "spec.training.batch_size"),
        (line('"prompts"') + 2, "spec.data.prompts[1]"),
        (line('"prompts"') + 3, "spec.data.prompts[2]"),
    ]


@pytest.mark.parametrize("text", ["spec: [\n", "spec:\n  a: 1\n  a: 2\n", "x: 1\n---\ny: 2\n"])
def test_a_text_that_cannot_be_parsed_has_its_line(tmp_path, capsys, text):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    ((line, _),) = errors_of(capsys, path)
    assert line == {"s": 2, "x": 2}[text[0]] + (text.count("a:") == 2)


def test_a_value_of_an_alias_or_a_merge_key_has_the_line_where_it_is_written(tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text(
        "x: &base\n  learning_rate: -1\nspec:\n  taskType: sft\n  model: {source: {identifier: a}}\n"
        "  data: {dataset_name: a}\n  training:\n    <<: *base\n    batch_size: 1\n"
    )
    assert errors_of(capsys, path) == [(2, "spec.training.learning_rate")]


def test_a_misspelt_field_is_found_in_every_type(tmp_path, capsys):
    """A type without a check, or with one that is not its runner's, would accept it."""
    for kind in BUILTIN:
        path = tmp_path / f"{kind.name}.yaml"
        path.write_text(f"spec:\n  taskType: {kind.name}\n  timeuotSec: 5\n")
        assert (3, "spec.timeuotSec") in errors_of(capsys, path), kind.name


def test_an_unknown_type_is_reported_and_not_refused(tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text("spec:\n  taskType: infernce\n  anything: 1\n")
    code, out = validate(capsys, path)
    assert code == 0
    assert ":2: warning: spec.taskType: 'infernce' is not known here" in out
    assert "did you mean 'inference'?" in out
    path.write_text("spec:\n  taskType: other\n  timeoutSec: soon\n")
    assert errors_of(capsys, path) == [(3, "spec.timeoutSec")]


def test_a_team_of_agents(tmp_path, capsys):
    path = tmp_path / "team.yaml"
    path.write_text(TEAM)
    assert errors_of(capsys, path) == [(2, "model.max_tokens"), (6, "workers.searcher.toolz")]
    path.write_text("extends: nothing\n")
    assert errors_of(capsys, path) == [(1, "extends")]


def test_what_an_agent_extends_is_part_of_it(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("model: {base_url: 'http://127.0.0.1/v1'}\n")
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner/own.yaml"
    path.write_text("extends: base\nmax_turns: 3\n")
    assert errors_of(capsys, path) == []
    path.write_text("extends: base\nmodel: {base_url: null}\n")
    assert errors_of(capsys, path) == [(2, "model.base_url")]


def test_node_settings(tmp_path, capsys):
    path = tmp_path / "node.toml"
    path.write_text(NODE)
    assert errors_of(capsys, path) == [
        (4, "node.woker_id"),
        (10, "slots[1].gpu"),
        (13, 'environments."x.y".python'),
    ]
    path.write_text("[node\n")
    assert errors_of(capsys, path) == [(1, "not TOML")]
    path.write_text('[redis]\nurl = "http://x"\ntask_topic = "tasks.events"\n')
    assert errors_of(capsys, path) == [(2, "redis.url"), (3, "redis.task_topic")]


def test_a_file_that_is_none_of_them(tmp_path, capsys):
    path = tmp_path / "what.yaml"
    path.write_text("spce: {}\n")
    code, out = validate(capsys, path, tmp_path / "missing.yaml")
    assert code == 78
    assert "what.yaml:1: expected a mapping with `spec`" in out
    assert "missing.yaml:1: cannot be read" in out
    assert errors_of(capsys, path, "--kind", "task") == [(1, "spec")]


def test_it_imports_nothing_heavy_and_starts_nothing():
    script = (
        "import sys\nfrom flowmesh.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('|'.join(sys.modules))"
    )
    files = [str(path) for path in (*EXAMPLES, *AGENTS, ROOT / "conf/node.toml")]
    command = [sys.executable, "-c", script, "validate", *files]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "numpy", "transformers", "pyarrow", "datasets", "redis", "smolagents", "asyncio", "flowmesh.bus"}
    assert set(out.splitlines()[-1].split("|")) & heavy == set()


@pytest.mark.parametrize("command", [["run"], ["submit", "--redis", "redis://127.0.0.1:1/0"]])
def test_run_and_submit_check_before_anything_is_started_or_sent(tmp_path, capsys, command):
    path = tmp_path / "task.yaml"
    path.write_text("spec:\n  taskType: echo\n  delaySec: -1\n  timeuotSec: 5\n")
    with pytest.raises(SystemExit) as caught:
        main([*command, str(path)])
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert f"{path}:3: spec.delaySec: expected a number" in err
    assert f"{path}:4: spec.timeuotSec: unknown field; did you mean 'timeoutSec'?" in err


def test_submit_can_send_what_this_version_does_not_know(tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text("spec:\n  taskType: echo\n  delaySec: -1\n")
    with pytest.raises(SystemExit) as caught:
        main(["submit", "--redis", "redis://127.0.0.1:1/0", "--no-check", str(path)])
    assert caught.value.code == 69  # it went on to Redis, which does not answer
    assert "does not answer" in capsys.readouterr().err
