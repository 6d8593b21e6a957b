"""The row file: every whole line is read, nothing else, whatever became of the rest."""

from __future__ import annotations

import io
import random

from flowmesh.messages.rows import Head, Row, line, read

ROWS = [Row(key=f"k{n}", index=n, completion_tokens=n, item={"index": n, "output": "é\n" * n}) for n in range(20)]
WHOLE = line(Head(total=30)) + b"".join(line(row) for row in ROWS)


def test_what_is_written_is_read() -> None:
    kept = read(io.BytesIO(WHOLE))
    assert list(kept.rows) == ROWS
    assert (kept.counts.done, kept.counts.total, kept.whole_bytes, kept.bad_lines) == (20, 30, len(WHOLE), 0)


def test_a_file_cut_anywhere_has_all_lines_before_the_cut() -> None:
    draw = random.Random(1)
    for cut in [0, 1, len(WHOLE) - 1, *draw.sample(range(len(WHOLE)), 60)]:
        kept = read(io.BytesIO(WHOLE[:cut]))
        whole = WHOLE[:cut].count(b"\n")
        assert list(kept.rows) == ROWS[: max(whole - 1, 0)]
        assert kept.whole_bytes == WHOLE[:cut].rfind(b"\n") + 1


def test_a_changed_byte_costs_its_line_only() -> None:
    draw = random.Random(2)
    for _ in range(100):
        changed = bytearray(WHOLE)
        at = draw.randrange(len(WHOLE))
        if changed[at] == 10:
            continue
        changed[at] ^= 1 << draw.randrange(5)
        if changed[at] == 10:
            continue
        number = WHOLE[:at].count(b"\n")
        kept = read(io.BytesIO(bytes(changed)))
        assert [row for row in ROWS if row not in kept.rows] in ([], [ROWS[number - 1]])
        assert all(row in ROWS for row in kept.rows), "a changed row was taken for a whole one"


def test_other_content_is_no_row() -> None:
    odd = b'{}\n[]\nnull\n\xff\xfe\n{"crc32":"00000000","row":{}}\n' + b"[" * 5000 + b"\n" + line(ROWS[0])
    kept = read(io.BytesIO(odd))
    assert list(kept.rows) == [ROWS[0]]
    assert kept.bad_lines == 6
