"""Reading pipelines: what stages inherit and wait for, references, `foreach`, and all faults at once."""

from __future__ import annotations

import json
import textwrap

import pytest

from flowmesh.cli.main import main
from flowmesh.errors import FieldError
from flowmesh.pipelines.document import read
from flowmesh.pipelines.graph import behind, cycle, depths


def stages(*listed, **outer):
    return read({"spec": {"taskType": "echo", **outer, "stages": list(listed)}}).stages


def faults(spec):
    with pytest.raises(FieldError) as caught:
        read({"spec": spec})
    return list(caught.value.faults)


def test_stages_are_a_chain_unless_they_say_otherwise():
    made = stages({"name": "a"}, {"name": "b"}, {"name": "c", "dependsOn": []}, {"name": "d", "dependsOn": "a"})
    assert [stage.depends_on for stage in made] == [(), ("a",), (), ("a",)]


def test_nodes_of_a_graph_wait_only_for_what_they_name_or_use():
    nodes = [
        {"name": "a-b", "spec": {}},
        {"name": "c", "spec": {"text": "x ${a-b.result.y}"}},
        {"name": "d", "dependsOn": ["c"]},
        {"name": "e", "spec": {"data": {"type": "graph_template", "template": {"columns": [{"node": "d"}]}}}},
        {"name": "f", "when": "${e.ok}"},
        {"name": "g", "spec": {"condition": {"node": "f", "field": "result.x", "equals": 1}}},
        {"name": "h", "spec": {"dependsOn": ["g"], "text": "${HOME} $${c.result.x}"}},
    ]
    made = read({"spec": {"taskType": "echo", "graph": {"nodes": nodes}}}).stages
    assert [stage.depends_on for stage in made] == [(), ("a-b",), ("c",), ("d",), ("e",), ("f",), ("g",)]
    assert made[6].spec["text"] == "${HOME} $${c.result.x}"


def test_a_stage_inherits_field_by_field_except_where_the_type_differs():
    outer = {
        "model": {"source": {"type": "huggingface", "identifier": "x", "revision": "main"}},
        "data": {"type": "dataset", "url": "u", "split": "train"},
        "inference": {"max_tokens": 8, "temperature": 1},
        "priority": "high",
    }
    (first, second, third) = stages(
        {"name": "a", "spec": {"model": {"adapters": [1]}, "data": {"split": "test"}, "inference": {"temperature": 0}}},
        {"name": "b", "spec": {"data": {"type": "list", "items": [1]}, "model": None}},
        {"name": "c", "inference": {"top_k": 1}, "taskType": "sft"},
        **outer,
    )
    assert first.spec["model"] == {**outer["model"], "adapters": [1]}
    assert first.spec["data"] == {"type": "dataset", "url": "u", "split": "test"}
    assert first.spec["inference"] == {"max_tokens": 8, "temperature": 0}
    assert second.spec["data"] == {"type": "list", "items": [1]}
    assert second.spec["model"] is None
    assert third.spec["inference"] == {"max_tokens": 8, "temperature": 1, "top_k": 1}
    assert third.spec["taskType"] == "sft"
    assert "stages" not in third.spec


def test_foreach_is_a_product_and_another_stage_goes_with_it():
    made = stages(
        {"name": "train", "foreach": {"lr": [0.1, 0.2], "r": [4, 8]}, "spec": {"lr": "${each.lr}", "t": "r=${each.r}"}},
        {"name": "ask", "foreach": "train", "spec": {"path": "${train.result.path}"}},
        {"name": "best", "spec": {"all": "${ask.result.each}", "one": "${train.3.result}"}},
    )
    assert [stage.name for stage in made[:4]] == ["train.0", "train.1", "train.2", "train.3"]
    assert made[1].spec == {"taskType": "echo", "lr": 0.1, "t": "r=8"}
    assert made[5].depends_on == ("train.1",)
    assert made[5].aliases == {"train": "train.1"}
    assert made[8].depends_on == ("ask.0", "ask.1", "ask.2", "ask.3", "train.3")


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"stages": []}, "spec.stages: expected a list with at least one stage"),
        ({"stages": [{"name": "a"}], "graph": {}}, "spec.graph: spec.stages is there too"),
        ({"graph": {"nods": []}}, "spec.graph.nods: unknown field; did you mean 'nodes'?"),
        ({"stages": [3]}, "spec.stages[0]: expected a mapping"),
        ({"stages": [{"name": "a b"}]}, "spec.stages[0].name: expected a name"),
        ({"stages": [{"name": "each"}]}, "stands for the values of foreach"),
        ({"stages": [{"name": "a", "foo": 1, "spec": {}}]}, "spec.stages[0].foo: unknown field"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "is also the name of spec.stages[0]"),
        ({"stages": [{"name": "a", "dependsOn": ["b"]}]}, "spec.stages[0].dependsOn[0]: there is no stage 'b'"),
        ({"stages": [{"name": "a", "dependsOn": ["a"]}]}, "a stage cannot wait for itself"),
        (
            {"stages": [{"name": "a", "dependOn": ["b"]}]},
            "spec.stages[0].dependOn: unknown field; did you mean 'depend",
        ),
        ({"stages": [{"name": "a", "spec": {"paralel": {}}}]}, "spec.stages[0].spec.paralel: unknown field; did you"),
        ({"stages": [{"name": "a", "spec": {"x": "${b.result.y}"}}]}, "spec.stages[0].spec.x: ${b.result.y}: there is"),
        ({"x": "${b.result}", "stages": [{"name": "a"}]}, "spec.x: ${b.result}: there is no stage 'b'"),
        ({"stages": [{"name": "a", "spec": {"x": "${a.y}"}}]}, "uses its own result"),
        ({"stages": [{"name": "a"}, {"name": "b", "spec": {"x": "${a.x[}"}}]}, "is no path"),
        ({"stages": [{"name": "a", "dependsOn": ["b"]}, {"name": "b"}]}, "wait for each other: a -> b -> a"),
        ({"stages": [{"name": "a", "when": "f()"}]}, "spec.stages[0].when: the only calls are"),
        ({"stages": [{"name": "a", "when": "${b.x} == 1"}]}, "spec.stages[0].when: ${b.x}: there is no such stage"),
        ({"when": "true", "stages": [{"name": "a"}]}, "spec.when: belongs into a stage"),
        ({"stages": [{"name": "a", "foreach": {"x": list(range(40)), "y": list(range(40))}}]}, "1600 combinations"),
        ({"stages": [{"name": "a", "foreach": {"x": []}}]}, "spec.stages[0].foreach.x: expected a list that is not"),
        ({"stages": [{"name": "a", "foreach": "b"}, {"name": "b"}]}, "'b' is no stage with a foreach"),
        ({"stages": [{"name": "a", "foreach": "a"}]}, "'a' is no stage with a foreach"),
        (
            {"stages": [{"name": "a", "foreach": {"x": [1]}, "spec": {"y": "${each.z}"}}]},
            "spec.stages[0].spec.y: ${e",
        ),
        ({"stages": [{"name": "a", "foreach": {"x": [1]}}, {"name": "a.0"}]}, "one of the foreach of 'a'"),
        ({"stages": [{"name": "a", "parallel": {"enabled": True, "max_shards": 0}}]}, "parallel.max_shards: expected"),
        (
            {"stages": [{"name": "a", "condition": {"node": "b", "field": "x", "equals": 1}}]},
            "condition.node: there",
        ),
        ({"stages": [{"name": "a", "dependsOn": [], "depends_on": []}]}, "the same field as dependsOn"),
        ({"stages": [{"name": "a", "when": "true", "spec": {"when": "false"}}]}, "spec.stages[0].when is there too"),
    ],
)
def test_each_fault_names_its_field(spec, found):
    assert any(found in fault for fault in faults({"taskType": "echo", **spec})), faults({"taskType": "echo", **spec})


def test_validate_shows_all_faults_with_their_lines(tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text(
        textwrap.dedent("""\
        spec:
          taskType: inference
          inference: {top_p: 1.5}
          stages:
            - name: a
              spec:
                data: {type: list, items: ["x"]}
                modle: {}
            - name: b
              dependsOn: [q]
              spec:
                taskType: sft
                data: {type: list, itms: "${a.result.items}"}
                text: ${c.result.x}
        """)
    )
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(path)])
    assert caught.value.code == 78
    first = capsys.readouterr().out
    assert f"{path}:10: spec.stages[1].dependsOn[0]: there is no stage 'q'; known: a, b" in first
    assert f"{path}:14: spec.stages[1].spec.text: ${{c.result.x}}: there is no stage 'c'" in first
    path.write_text(path.read_text().replace("[q]", "[a]").replace("${c.result.x}", "x"))
    with pytest.raises(SystemExit):
        main(["validate", "--json", str(path)])
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["kind"] == "pipeline"
    lines = {error["line"]: error["message"] for error in file["errors"]}
    assert lines[3].startswith("spec.inference.top_p: expected")
    assert lines[8].startswith("spec.stages[0].spec.modle: unknown field; did you mean 'model'?")


def test_values_of_references_are_not_judged_before_they_are_known(tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text(
        "spec:\n  taskType: inference\n  model: {source: {type: huggingface, identifier: 'builtin:tiny-llama'}}\n"
        "  stages:\n    - {name: a, data: {type: list, items: [x]}}\n"
        "    - {name: b, data: {type: list, items: '${a.result.texts}'}, inference: {max_tokens: '${a.result.n}'}}\n"
    )
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(path)])
    assert caught.value.code == 0, capsys.readouterr().out


def test_only_tasks_with_items_can_be_divided(tmp_path, capsys):
    path = tmp_path / "p.yaml"
    path.write_text("spec: {taskType: echo, parallel: {enabled: true}, stages: [{name: a}]}")
    with pytest.raises(SystemExit):
        main(["validate", str(path)])
    assert "spec.stages[0].parallel.enabled: 'echo' cannot be divided" in capsys.readouterr().out


def test_graphs():
    edges = {"a": [], "b": ["a"], "c": ["b", "a"], "d": []}
    assert cycle(edges) == []
    assert cycle({**edges, "a": ["c"]}) == ["a", "c", "a"]
    assert behind(edges, "c") == {"a", "b"}
    assert depths(edges) == {"a": 0, "b": 1, "c": 2, "d": 0}
    long = {str(n): [str(n - 1)] if n else [] for n in range(5000)}
    assert cycle(long) == []
    assert depths(long)["4999"] == 4999
