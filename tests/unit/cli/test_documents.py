"""Task files: what is read, and what is said about one that cannot be."""

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.cli.document_parser import DocumentError
from flowmesh.cli.documents import Submission, load
from flowmesh.errors import FieldError
from flowmesh.messages import wire


def write(tmp_path, text, name="task.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_yaml_and_json_are_the_same_document(tmp_path):
    document = {"apiVersion": "mloc/v1", "spec": {"taskType": "echo", "text": "ä", "numbers": [1, 2.5, True, None]}}
    as_json = load(write(tmp_path, json.dumps(document), "a.json"))
    as_yaml = load(
        write(
            tmp_path,
            "apiVersion: mloc/v1\nspec:\n  taskType: echo\n  text: ä\n  numbers: [1, 2.5, true, null]\n",
        )
    )
    assert as_json.document == as_yaml.document == document
    assert as_yaml.task_type == "echo"
    assert as_json.task_id != as_yaml.task_id
    assert wire.usable_task_id(as_json.task_id)


def test_what_authors_mean(tmp_path):
    text = "spec: {rate: 1e-5, big: 2E+6, half: .5e1, day: 2024-01-31, at: 2024-01-31T10:00:00Z, name: 1e-5x, 7: x}\n"
    spec = load(write(tmp_path, text)).document["spec"]
    assert spec == {
        "rate": 1e-5,
        "big": 2e6,
        "half": 5.0,
        "day": "2024-01-31",
        "at": "2024-01-31T10:00:00Z",
        "name": "1e-5x",
        "7": "x",
    }


def test_codes_and_times_are_text(tmp_path):
    """YAML 1.1 would read them as octal and as base 60: 83, 45000 and 750.5."""
    text = (
        "spec: {zip: 00123, at: '12:30:00', time: 12:30:00, lap: 12:30.5, n: -0, o: +1_000, h: 0x1F, f: 0.5, g: -1.5}\n"
    )
    assert load(write(tmp_path, text)).document["spec"] == {
        "zip": "00123", "at": "12:30:00", "time": "12:30:00", "lap": "12:30.5", "n": 0, "o": 1000, "h": 31, "f": 0.5,
        "g": -1.5,
    }  # fmt: skip


def test_characters_in_two_halves_are_one(tmp_path):
    """As json.dumps writes them; half a one is in no JSON."""
    spec = {"text": "😀", "😀": ["a😀b", "\ufeff"]}
    for name in ("a.json", "a.yaml"):
        assert load(write(tmp_path, json.dumps({"spec": spec}), name)).document["spec"] == spec
        with pytest.raises(FieldError, match=r"spec\.a\[1\]: half a character"):
            load(write(tmp_path, json.dumps({"spec": {"a": ["x", "\ud83d"]}}), name))


def test_anchors_and_merges(tmp_path):
    text = "base: &b {a: 1, c: 2}\nspec:\n  one: {<<: *b, a: 3}\n  two: *b\n"
    assert load(write(tmp_path, text)).document["spec"] == {"one": {"a": 3, "c": 2}, "two": {"a": 1, "c": 2}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spec:\n  a: [1, 2\n", "line 3, column 1: "),
        ("spec:\n\ta: 1\n", "line 2, column 1: "),
        ("spec: {}\n---\nspec: {}\n", "line 2, column 1: a second document begins here; put each task into"),
        ("spec:\n  a: 1\n  a: 2\n", "line 3, column 3: duplicate key 'a' in one mapping"),
        ("spec: !!python/object:os.system {}\n", "line 1, column 7: "),
        ("spec: !!int x\n", "not YAML: invalid literal"),
        ("spec: *nowhere\n", "line 1, column 7: "),
        ("spec: \x00\n", "not YAML: "),
        (b"spec: \xff\n", "byte 6 is not UTF-8"),
    ],
)
def test_bad_yaml_says_where(tmp_path, text, said):
    source = write(tmp_path, text)
    with pytest.raises(DocumentError) as caught:
        load(source)
    assert str(caught.value).startswith(f"{source}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"spec": {"a": 1,}}', "line 1, column 1"),
        ('{"spec": {"a": 1, "a": 2}}', "duplicate key 'a' in one object"),
        ("[" * 200_000, "nested deeper than"),
    ],
)
def test_bad_json_says_where(tmp_path, text, said):
    with pytest.raises(DocumentError, match=said):
        load(write(tmp_path, text, "a.json"))


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ("", "", "found empty"),
        ("- spec\n", "", "found a list"),
        ("just text\n", "", "found text"),
        ("kind: x\n", "spec", "spec: missing"),
        ("spec:\n", "spec", "found empty"),
        ("spec: [1]\n", "spec", "found a list"),
        ("spec: {a: {b: [1, .nan]}}\n", "spec.a.b[1]", "nan is not a JSON number"),
        ("spec: {a: !!binary aGk=}\n", "spec.a", "a value of type bytes"),
        ("spec: {a: {on: 1}}\n", "spec.a", "the boolean true"),
        ("spec: &s {a: *s}\n", None, "nested deeper than"),
    ],
)
def test_what_is_no_task_document(tmp_path, text, path, said):
    with pytest.raises(FieldError) as caught:
        load(write(tmp_path, text))
    assert said in str(caught.value)
    assert path is None or caught.value.path == path


def test_aliases_cannot_explode(tmp_path):
    levels = "\n".join(f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    with pytest.raises(FieldError, match="more than"):
        load(write(tmp_path, f"spec:\n  l0: &l0 [x]\n{levels}\n"))


def test_a_missing_file():
    with pytest.raises(DocumentError, match=r"^nowhere\.yaml: cannot be read: No such file"):
        load("nowhere.yaml")


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"spec: {taskType: echo}")))
    assert load("-").source == "<stdin>"


def test_the_id_may_be_given_and_must_be_one(tmp_path):
    source = write(tmp_path, "spec: {}")
    assert load(source, "my.task-1").task_id == "my.task-1"
    for bad in ("", "../x", "a/b", ".hidden", "x" * 201):
        with pytest.raises(FieldError, match="--task-id"):
            load(source, bad)


def test_the_dispatch_is_the_contracts():
    message = json.loads(Submission(source="f", task_id="t", document={"spec": {"taskType": "echo"}}).dispatch("w1"))
    assert message.pop("dispatched_at").endswith("+00:00")
    assert message == {
        "task_id": "t",
        "task": {"spec": {"taskType": "echo"}},
        "task_type": "echo",
        "assigned_worker": "w1",
        "parent_task_id": None,
    }


def test_a_dispatch_has_a_limit():
    big = Submission(source="f", task_id="t", document={"spec": {"x": "y" * wire.MAX_MESSAGE_BYTES}})
    with pytest.raises(DocumentError, match="put the data into a file"):
        big.dispatch("w")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_a_document_survives_json(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("j") / "a.json"
    path.write_text(json.dumps({"spec": {"v": value}}))
    assert load(str(path)).document == {"spec": {"v": value}}
