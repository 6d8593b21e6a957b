"""`when`: what an expression may say, and what it must not be able to do."""

from __future__ import annotations

import pytest

from flowmesh.pipelines.conditions import Condition, ConditionError
from flowmesh.pipelines.references import split, value_at
from flowmesh.validation.json_paths import PathError

RESULTS = {"a-b": {"score": 0.5, "items": [{"output": "yes"}], "ok": True, "none": None}}


def resolve(expr):
    return value_at(split(expr, RESULTS), RESULTS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("${a-b.result.score} >= 0.5", True),
        ("${a-b.score} > 0.5", False),
        ("not ${a-b.ok}", False),
        ("${a-b.result.items[0].output} == 'yes' and ${a-b.ok}", True),
        ("${a-b.result.items.0.output} in ['no', 'maybe']", False),
        ("'${a-b.score}' == '0.5' or false", True),
        ("0 < ${a-b.score} < 1", True),
        ("len(${a-b.items}) == 1", True),
        ("has(${a-b.nothing})", False),
        ("has(${a-b.none}) or has(${a-b.score})", True),
        ("${a-b.none} == null", True),
        ("-1 < 0 and true", True),
        ("'x' not in ('y', 'z')", True),
        ("'five' == 5 or 'Yes, it is' == true", False),
        ("${a-b.items[0].output} != 5 and 'any text'", True),
        ("'1' in '123'", True),
    ],
)
def test_expressions(text, answer):
    assert Condition(text).holds(resolve) is answer


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "().__class__",
        "[x for x in (1,)]",
        "lambda: 1",
        "1 + 1",
        "2 ** 99999999",
        "'a' * 10",
        "(x := 1)",
        "open('x')",
        "len",
        "len(1, 2)",
        "has('x')",
        "b'x'",
        "f'{1}'",
        "name",
        "a if b else c",
        "{1: 2}",
        "x[0]",
        "",
        "(" * 300,
        "1 ==",
        "a\nb",
        "not " * 300 + "true",
        "'" + "x" * 1000 + "'",
        "${a-b.score} ${a-b.score}",
    ],
)
def test_nothing_else_is_an_expression(text):
    with pytest.raises(ConditionError):
        Condition(text).holds(resolve)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${a-b.count} == 5", "the text '5' is compared with 5, which is no text"),
        ("5.0 != ${a-b.count}", "compared with 5.0"),
        ("${a-b.count} in [1, 5]", "compared with 5"),
        ("${a-b.said} == true", "the text 'True' is compared with true"),
        ("${a-b.said}", "the text 'True' is neither true nor false; compare it"),
        ("not 'false'", "the text 'false' is neither true nor false"),
        ("true and ${a-b.count} == '5' and 'no'", "the text 'no'"),
    ],
)
def test_a_text_that_spells_a_value_is_not_that_value(text, said):
    """`'false'` would be true as any text, and `'5' == 5` never: the stage would run, or be skipped, without a word."""
    results = {"a-b": {"count": "5", "said": "True"}}
    with pytest.raises(ConditionError, match=said):
        Condition(text).holds(lambda expr: value_at(split(expr, results), results))


def test_values_are_never_code():
    results = {"a": {"x": "' or true or '", "y": "__import__('os')"}}
    condition = Condition("'${a.x}' == 'no'")
    assert condition.holds(lambda expr: value_at(split(expr, results), results)) is False


def test_a_missing_value_and_values_that_do_not_compare():
    with pytest.raises(PathError, match=r"\$\{a-b\.x\}: a-b has no 'x'"):
        Condition("${a-b.x} == 1").holds(resolve)
    with pytest.raises(ConditionError, match="not supported between"):
        Condition("${a-b.items} < 1").holds(resolve)
