"""What commands print: values on one line, tables, summaries, and a task's progress."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.cli import render, view
from flowmesh.cli.control_types import PhaseSeen, ProgressSeen, StateSeen
from flowmesh.cli.render import Column
from flowmesh.cli.summary import summary


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.00 s"),
        (0.346, "0.35 s"),
        (4.21, "4.2 s"),
        (48.2, "48 s"),
        (59.99, "60 s"),
        (90, "1.5 min"),
        (3599, "60 min"),
        (12600, "3.5 h"),
        (47 * 3600, "47 h"),
        (4 * 86400, "4 d"),
    ],
)
def test_durations(seconds, said):
    assert render.seconds(seconds) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb\t c", "a b c"),
        ("\x1b[31mred\x1b[0m\x07", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("a\x9b31mb", "a 31mb"),
        ("\u202eevil", "evil"),
        ("x" * 20, "xxxxxxxxx…"),
        ({"a": [1, "ä"]}, '{"a": [1,…'),
    ],
)
def test_short_forms_are_one_safe_line(text, said):
    assert render.shorten(text, 10) == said


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")), st.integers(1, 100))
def test_a_short_form_never_has_a_control_character(text, room):
    said = render.shorten(text, room)
    assert len(said) <= room
    assert said.isprintable()


def test_a_table_off_a_terminal_has_a_line_a_row():
    out = io.StringIO()
    render.table((Column("A", least=1), Column("LONG", drop=1)), [["1", ""], ["long\ncell", "x"]], stream=out)
    assert out.getvalue() == "A          LONG\n1          -\nlong cell  x\n"


def test_a_table_on_a_narrow_terminal_is_cut_and_loses_what_it_may():
    columns = (Column("ID"), Column("TASK", least=6), Column("TAGS", least=4, drop=2), Column("COST", drop=1))
    row = ["worker", "task-0123456789", "a,b,c,d,e,f", "1.00"]
    assert render.table_lines(columns, [row], width=42)[1] == "worker  task-0123456789  a,b,c,d,e,f  1.00"
    assert render.table_lines(columns, [row], width=30)[1] == "worker  task-01…  a,b,c…  1.00"
    assert render.table_lines(columns, [row], width=25)[1] == "worker  task-01234…  1.00"
    assert render.table_lines(columns, [row], width=14) == ["ID      TASK", "worker  task-…"]
    assert render.table_lines(columns, [row], width=1) == ["ID      TASK", "worker  task-…"]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3)), min_size=1), st.integers(1, 200))
def test_a_table_takes_the_room_it_has(sizes, room):
    columns = [Column("x", least=least, drop=drop) for _, least, drop in sizes]
    widths = dict(enumerate(size for size, _, _ in sizes))
    fitted = render.fit(columns, widths, room)
    total = sum(fitted.values()) + 2 * (len(fitted) - 1)
    hard = [min(size, least) for size, least, drop in sizes if not drop]
    assert total <= max(room, sum(hard) + 2 * (len(hard) - 1))
    assert all(fitted[index] <= widths[index] for index in fitted)
    assert all(index in fitted for index, column in enumerate(columns) if not column.drop)


RESULTS = [
    {"ok": True, "echo": {"a": 1}},
    {"ok": True},
    {
        "items": [{"index": 0, "output": "x" * 500, "finish_reason": "length"}],
        "model": "m" * 200,
        "usage": {"latency_sec": 3},
    },
    {"items": [{"prompt": [{"role": "user", "content": "hi"}], "output": None}] * 7, "children": {"a": {}}},
    {"items": [], "usage": None, "jsonl_export": {"path": "/x/" + "y" * 200, "record_count": 3}},
    {"items": ["not", "mappings"], "n": 1},
    {"queries": [{"query": "q", "items": [{"id": 1, "score": 0.5, "payload": {"text": "t" * 300}}]}, {"items": []}]},
    {"items": [{"query": "q" * 300, "results": [{"index": 2, "score": 0.5}, {}, 1]}] * 7},
    {"items": [{"tokens": 3}] * 7, "vectors_file": {}, "truncated": {"count": 2, "items": [0, 1]}},
    {f"field{n}": n for n in range(30)},
    {
        "training_successful": True,
        "error_message": None,
        "final_lora_path": "/r/t/final_lora",
        "metrics": {"loss": [1] * 99},
    },
]


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_summary_is_short_and_fits(result, width):
    lines = summary(result, width)
    assert 1 <= len(lines) <= 14
    assert all(len(line) <= width and line.isprintable() for line in lines)


def test_vectors_and_scores_are_summarized_as_what_they_are() -> None:
    file = {"relative_path": "artifacts/vectors.npy"}
    vectors = {"items": [{}] * 8, "vectors_file": file, "precision": "float32", "dimension": 384}
    cut = {"truncated": {"count": 1, "items": [0]}}
    assert summary(vectors | cut, 80) == [
        "8 items",
        "vectors: artifacts/vectors.npy (float32, 384 dimensions)",
        "cut at the model's length: 1 item",
    ]
    ranked = {"items": [{"query": "how?", "results": [{"index": 1, "score": 0.75, "document": "so"}]}]}
    assert summary(ranked, 80) == ["1 item", "  [0]   query   how?", "        0.750   so"]


NAMES = ["items", "output", "prompt", "query", "results", "vectors_file", "score"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["items", "queries", "usage", "model", "children", "jsonl_export", "x"]), json_values
    )
)
def test_a_summary_takes_any_result(result):
    assert all(line.isprintable() for line in summary(result, 80)), json.dumps(result)


def test_a_summary_of_inference():
    items = [{"index": n, "prompt": f"p{n}", "output": f"o{n}", "finish_reason": "stop"} for n in range(7)]
    usage = {"prompt_tokens": 7, "completion_tokens": 70, "latency_sec": 2.0}
    assert summary({"ok": True, "model": "m", "items": items, "usage": usage}, 80)[:3] == [
        "7 items, 7 + 70 tokens (prompt + output), 2.0 s, m",
        "  [0]   prompt  p0",
        "        output  o0",
    ]
    assert summary({"items": items}, 80)[-1] == "  … and 2 more"
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi?"}]
    assert summary({"items": [{"prompt": chat, "output": "Hi."}]}, 80)[1] == "  [0]   prompt  Hi?"
    seen = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": "What?"}]}]
    assert summary({"items": [{"prompt": seen, "output": "Hi."}]}, 80)[1] == "  [0]   prompt  [image] What?"
    odd = [
        {"prompt": "a", "error": {"type": "refused", "message": "too long"}},
        {"output": "half", "finish_reason": "failed", "error": "max_turns: no answer"},
        {"prompt": "b", "output": "", "finish_reason": "stop", "incomplete": "empty"},
        {"input": "c", "embedding": [0.5, 1.0]},
    ]
    assert summary({"items": odd}, 80)[1:] == [
        "  [0]   prompt  a",
        "        error   too long",
        "  [1]   output  half (failed)",
        "        error   max_turns: no answer",
        "  [2]   prompt  b",
        "        output   (empty)",
        "  [3]   input   c",
        "        vector  2 numbers",
    ]
    answered = {"query": "how?", "items": [{"id": "x", "payload": "so"}], "output": "So.", "finish_reason": "length"}
    assert summary({"queries": [answered]}, 80)[-1] == "        output  So. (length)"


def test_plain_progress_is_a_line_a_phase_and_a_tenth():
    out = io.StringIO()
    plain = view.view_for(out)
    plain.step("starting")
    for name in ("queued", "running"):
        plain.seen(StateSeen(name))
    plain.seen(PhaseSeen("load"))
    plain.seen(PhaseSeen("generate"))
    for done in range(101):
        plain.seen(ProgressSeen(done=done, total=100, unit="items"))
    plain.seen(ProgressSeen(done=5))
    plain.seen(PhaseSeen("\x1b[2Jsave"))
    plain.seen(ProgressSeen(done=0.5, total=2.5, metrics={"loss": 0.123456, "lr": 1e-5, "a": 1, "b": 2}))
    plain.seen(StateSeen("delivering"))
    plain.stop()
    lines = out.getvalue().splitlines()
    tenths = [f"  generate {n}0 % ({n}0/100 items)" for n in range(1, 11)]
    assert lines == [
        "starting",
        "  load",
        "  generate",
        *tenths,
        "  save",
        "  save 20 % (0.5/2.5)  loss 0.1235  lr 1e-05  a 1",
        "  delivering",
    ]


def test_silence_for_json(capsys):
    assert view.progress_stream(as_json=True) is None
    silent = view.view_for(None)
    silent.step("a")
    silent.note("b")
    silent.seen(PhaseSeen("c"))
    silent.stop()
    assert capsys.readouterr() == ("", "")
