"""Running pipelines: order, values of references, failures, conditions, shards, merging, and going on."""

from __future__ import annotations

import pytest

from flowmesh.errors import BusyError, FlowMeshError
from flowmesh.pipelines.document import read
from flowmesh.pipelines.driver import Driver
from flowmesh.pipelines.store import FolderStore
from tests.unit.pipelines.in_memory import Memory, Place, run, states


def chain(*specs):
    return {"taskType": "echo", "stages": [{"name": f"s{n}", "spec": spec} for n, spec in enumerate(specs)]}


def spec_of(place, name):
    return next(task.document["spec"] for task in place.tasks if task.task_id == f"p.{name}")


def test_values_keep_their_type_and_are_text_inside_text():
    def answer(task):
        return {"ok": True, "n": 3, "deep": [{"x": {"k": [1]}}], "t": "a\nb", "spec": task.document["spec"]}

    spec = chain(
        {},
        {
            "n": "${s0.result.n}",
            "deep": ["${s0.result.deep[0].x}"],
            "text": "n=${s0.result.n} ${s0.deep[-1].x} ${s0.t}",
            "shell": "${HOME} ${x-y} $${s0.result.n}",
            "whole": "${s0.result}",
            "id": "${s0.task_id}",
        },
        {"again": "${s1.result.spec.n}"},
    )
    driver, place, _ = run(spec, Place(answer))
    made = spec_of(place, "s1")
    assert made["n"] == 3
    assert made["deep"] == [{"k": [1]}]
    assert made["text"] == 'n=3 {"k": [1]} a\nb'
    assert made["shell"] == "${HOME} ${x-y} ${s0.result.n}"
    assert made["whole"]["n"] == 3
    assert made["id"] == "p.s0"
    assert spec_of(place, "s2")["again"] == 3
    assert states(driver) == {"s0": "succeeded", "s1": "succeeded", "s2": "succeeded"}


def test_values_are_not_searched_for_references_again():
    _, place, _ = run(chain({}, {"x": "${s0.result.t}"}), Place(lambda task: {"t": "${s0.result.secret}"}))
    assert spec_of(place, "s1")["x"] == "${s0.result.secret}"


def test_a_missing_value_fails_its_stage_and_names_stage_and_path():
    driver, place, _ = run(chain({}, {"x": ["${s0.result.y[0].z}"]}, {}))
    assert place.ran == ["s0"]
    assert states(driver) == {"s0": "succeeded", "s1": "failed", "s2": "not run"}
    assert driver.runs["s1"].error.startswith(
        "spec.stages[1].spec.x[0]: ${s0.result.y[0].z}: s0.result has no 'y'; it has "
    )


def test_a_failure_ends_what_depends_on_it_and_nothing_else():
    nodes = [
        {"name": "bad"},
        {"name": "after", "dependsOn": ["bad"]},
        {"name": "later", "dependsOn": ["after", "good"]},
        {"name": "good"},
        {"name": "fine", "dependsOn": ["good"]},
    ]
    place = Place(lambda task: "no" if task.task_id == "p.bad" else {"ok": True})
    driver, _, store = run({"taskType": "echo", "graph": {"nodes": nodes}}, place)
    assert states(driver) == {
        "bad": "failed",
        "after": "not run",
        "later": "not run",
        "good": "succeeded",
        "fine": "succeeded",
    }
    assert store.summary["ok"] is False
    assert store.summary["stages"]["bad"]["error"] == "no"


def test_independent_stages_run_side_by_side_as_far_as_there_are_slots():
    nodes = [{"name": f"n{n}"} for n in range(5)]
    _, place, _ = run({"taskType": "echo", "graph": {"nodes": nodes}}, Place(slots=3))
    assert place.most == 3
    assert len(place.ran) == 5


def test_a_stage_whose_condition_is_false_is_skipped_and_others_run():
    nodes = [
        {"name": "judge"},
        {"name": "no", "when": "${judge.result.n} > 1"},
        {"name": "field", "spec": {"condition": {"node": "judge", "field": "result.items.0.output", "equals": "x"}}},
        {"name": "off", "when": False},
        {"name": "always", "dependsOn": ["no", "field", "judge"]},
        {"name": "wrong", "spec": {"x": "${no.result.y}"}},
        {"name": "guarded", "when": "has(${no.result.y})"},
    ]
    place = Place(lambda task: {"n": 1, "items": [{"output": "y"}]})
    driver, place, _ = run({"taskType": "echo", "graph": {"nodes": nodes}}, place)
    assert place.ran == ["judge", "always"]
    assert states(driver)["wrong"] == "failed"
    assert "the stage 'no' has no result: it did not run" in driver.runs["wrong"].error
    assert states(driver)["guarded"] == "skipped"


def test_a_graph_template_gets_the_results_that_its_columns_name():
    template = {"name": "two_column_briefing", "columns": [{"node": "a", "path": "x"}, {"expr": "${b.result.x}"}]}
    nodes = [
        {"name": "a"},
        {"name": "b"},
        {"name": "c"},
        {
            "name": "d",
            "dependsOn": ["c"],
            "spec": {"taskType": "inference", "data": {"type": "graph_template", "template": template}},
        },
    ]
    _, place, _ = run({"taskType": "echo", "graph": {"nodes": nodes}}, Place(lambda task: {"x": task.task_id}))
    made = spec_of(place, "d")
    assert set(made["_upstreamResults"]) == {"a", "b"}
    assert made["_upstreamResults"]["b"]["x"] == "p.b"
    assert made["data"]["template"]["columns"] == template["columns"]


def items(task):
    """A result of inference on a list."""
    spec = task.document["spec"]
    prompts = spec["data"]["items"]
    if "shard" in spec:
        index, total = spec["shard"]["index"], spec["shard"]["total"]
        size = -(-len(prompts) // total)
        prompts = prompts[index * size : (index + 1) * size] if spec["shard"]["contiguous"] else prompts[index::total]
    rows = [{"index": n, "output": text.upper()} for n, text in enumerate(prompts)]
    usage = {"total_tokens": len(rows), "latency_sec": float(len(rows))}
    return {"ok": True, "model": "m", "items": rows, "usage": usage, "warnings": ["w"]}


@pytest.mark.parametrize("contiguous", [True, False])
def test_shards_are_one_result_in_the_order_of_the_items(contiguous):
    words = ["a", "b", "c", "d", "e", "f", "g"]
    spec = {
        "taskType": "inference",
        "parallel": {"enabled": True, "max_shards": 3, "contiguous": contiguous},
        "stages": [{"name": "s", "data": {"type": "list", "items": words}}],
    }
    driver, place, _ = run(spec, Place(items, slots=2))
    assert place.ran == ["s.s0", "s.s1", "s.s2"]
    result = driver.runs["s"].result
    assert [(row["index"], row["output"]) for row in result["items"]] == list(enumerate("ABCDEFG"))
    assert result["usage"] == {"total_tokens": 7, "latency_sec": 3.0}
    assert result["warnings"] == ["w"]
    assert [shard["count"] for shard in result["shards"]] == ([3, 3, 1] if contiguous else [3, 2, 2])


def test_a_failed_shard_fails_its_stage_and_cancels_the_others():
    spec = {
        "taskType": "inference",
        "parallel": {"enabled": True, "max_shards": 4},
        "stages": [{"name": "s", "data": {"type": "list", "items": list("abcd")}}],
    }
    place = Place(lambda task: "broken" if task.task_id.endswith("s1") else None, slots=3)
    driver, _, _ = run(spec, place)
    assert states(driver) == {"s": "failed"}
    assert driver.runs["s"].error == "broken"
    assert place.ran == ["s.s0", "s.s1", "s.s2"]
    assert [task_id for task_id, _ in place.cancelled] == ["p.s.s0", "p.s.s2"]


def branches(**b):
    node = {"taskType": "inference", "data": {"type": "list", "items": ["x"]}}
    return {
        "taskType": "inference",
        "inference": {"temperature": 0},
        "graph": {"nodes": [{"name": "a", "spec": node}, {"name": "b", "spec": {**node, **b}}, {"name": "c"}]},
        "data": {"type": "list", "items": ["z"]},
    }


def with_children(task):
    children = {
        child["task_id"]: {"items": [child["spec"]["data"]]} for child in task.document.get("merge_children", ())
    }
    return {"ok": True, "model": "m", "items": [task.document["spec"]["data"]], "children": children}


def test_equal_requests_are_one_task():
    spec = branches(data={"type": "list", "items": ["y"]}, inference={"system_prompt": "s", "temperature": 0})
    driver, place, _ = run(spec, Place(with_children))
    assert place.ran == ["a"]
    assert [child["task_id"] for child in place.tasks[0].document["merge_children"]] == ["p.b", "p.c"]
    assert driver.runs["a"].result == {"ok": True, "model": "m", "items": [{"type": "list", "items": ["x"]}]}
    assert driver.runs["b"].result == {"ok": True, "model": "m", "items": [{"type": "list", "items": ["y"]}]}
    assert driver.runs["b"].merged_into == "a"


@pytest.mark.parametrize(
    "b", [{"inference": {"temperature": 1}}, {"model": {"x": 1}}, {"merge": False}, {"timeoutSec": 5}]
)
def test_other_requests_are_not_merged(b):
    _, place, _ = run(branches(**b), Place(with_children))
    assert place.ran == ["a", "b"]


def test_of_merged_requests_that_fail_each_runs_again_by_itself():
    def answer(task):
        if "merge_children" in task.document:
            return "all failed"
        return "bad" if task.task_id == "p.a" else with_children(task)

    driver, place, _ = run(branches(), Place(answer))
    assert place.ran == ["a", "a", "b", "c"]
    assert states(driver) == {"a": "failed", "b": "succeeded", "c": "succeeded"}


def test_a_merged_child_may_fail_alone():
    def answer(task):
        return {"ok": True, "items": [], "children": {"p.b": {"ok": False, "error": "too long"}, "p.c": {"items": []}}}

    driver, _, _ = run(branches(), Place(answer))
    assert states(driver) == {"a": "succeeded", "b": "failed", "c": "succeeded"}
    assert driver.runs["b"].error == "too long"


def test_foreach_has_one_result_with_all():
    spec = {
        "taskType": "echo",
        "stages": [
            {"name": "try", "foreach": {"x": [1, 2]}, "spec": {"v": "${each.x}"}},
            {"name": "ask", "foreach": "try", "spec": {"v": "${try.result.v}"}},
            {"name": "all", "spec": {"v": "${ask.result.each[1].result.v}", "w": "${try.result.each[0].with.x}"}},
        ],
    }
    _, place, _ = run(spec, Place(lambda task: {"v": 10 * task.document["spec"]["v"]}))
    assert spec_of(place, "ask.1")["v"] == 20
    assert spec_of(place, "all")["v"] == 200
    assert spec_of(place, "all")["w"] == 1


def test_started_again_it_runs_only_what_is_missing():
    store, spec = Memory(), chain({"a": 1}, {"x": "${s0.result.spec.a}"}, {"y": 1})
    place = Place(lambda task: "no" if task.task_id == "p.s2" else {"spec": task.document["spec"]})
    run(spec, place, store)
    driver, place, _ = run(spec, None, store)
    assert place.ran == ["s2"]
    assert states(driver) == {"s0": "reused", "s1": "reused", "s2": "succeeded"}
    assert run(spec, None, store)[1].ran == []
    changed = chain({"a": 1}, {"x": "${s0.result.spec.a}", "more": 1}, {"y": 1})
    assert run(changed, None, store)[1].ran == ["s1", "s2"], "what depends on a new result runs too"


def test_a_local_file_of_a_stage_is_part_of_its_key(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    store, spec = Memory(), chain({"data": {"path": str(path)}})
    assert run(spec, None, store)[1].ran == ["s0"]
    assert run(spec, None, store)[1].ran == []
    path.write_text("{} {}")
    assert run(spec, None, store)[1].ran == ["s0"]


def test_a_result_whose_folder_is_gone_is_made_again(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    store, spec = Memory(), chain({})
    run(spec, None, store)
    store.records["s0"] = type(store.records["s0"])(
        **{field: getattr(store.records["s0"], field) for field in store.records["s0"].__struct_fields__}
        | {"out_dir": str(folder)}
    )
    assert run(spec, None, store)[1].ran == []
    folder.rmdir()
    assert run(spec, None, store)[1].ran == ["s0"]


def test_a_stop_cancels_what_runs_and_starts_nothing_more():
    place, ticks = Place(lambda task: None, slots=2), []

    def tick():
        ticks.append(1)
        if len(ticks) == 3:
            driver.stop()
        if len(ticks) == 4:
            driver.stop(force=True)

    nodes = [{"name": name} for name in "abc"] + [{"name": "d", "dependsOn": ["a"]}]
    driver = Driver(read({"spec": {"taskType": "echo", "graph": {"nodes": nodes}}}), "p", place, Memory(), tick=tick)
    driver.run()
    assert set(states(driver).values()) == {"cancelled"}
    assert place.ran == ["a", "b"]
    assert place.cancelled[:2] == [("p.a", False), ("p.b", False)]


def test_a_task_that_cannot_run_here_fails_its_stage():
    class Refusing(Place):
        def submit(self, task):
            if task.task_id == "p.a":
                raise FlowMeshError("needs 8 GPUs")
            return super().submit(task)

    nodes = [{"name": "a"}, {"name": "b"}, {"name": "c", "dependsOn": "a"}]
    driver, _, _ = run({"taskType": "echo", "graph": {"nodes": nodes}}, Refusing())
    assert states(driver) == {"a": "failed", "b": "succeeded", "c": "not run"}


def test_a_folder_keeps_records_and_has_one_driver(tmp_path):
    spec = chain({"a": 1}, {"x": "${s0.result.spec.a}"})
    with FolderStore(tmp_path / "p") as store:
        run(spec, None, store)
        with pytest.raises(BusyError, match="runs already"), FolderStore(tmp_path / "p"):
            pass
    with FolderStore(tmp_path / "p") as store:
        assert run(spec, None, store)[1].ran == []
        (tmp_path / "p/stages/s1.json").write_text('{"cut')
        assert run(spec, None, store)[1].ran == ["s1"]
    assert (tmp_path / "p/responses.json").is_file()
