"""What of rag is pure: passages of a text, batches of tokens, agreement of merged tasks; and a safe preload."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.api import BadRequest
from runners.rag.chunks import Window, split, window

SEPARATORS = st.lists(st.sampled_from([" ", ". ", "! ", "\n\n", "-", ""]), max_size=120)


@given(SEPARATORS, st.integers(8, 40), st.integers(0, 20))
def test_every_token_is_in_a_passage_and_none_is_too_long(separators, tokens, overlap) -> None:
    cut = Window(tokens, min(overlap, tokens // 2))
    text = "".join(f"w{index}{separator}" for index, separator in enumerate(separators))
    offsets = [match.span() for match in re.finditer(r"w\d+|[.!-]", text)]
    at = {text[start:end]: index for index, (start, end) in enumerate(offsets)}
    passages = [re.findall(r"w\d+|[.!-]", passage) for passage in split(text, offsets, cut)]
    assert all(len(passage) <= tokens for passage in passages)
    words = [[at[word] for word in passage if word[0] == "w"] for passage in passages]
    assert {index for passage in words for index in passage} == {at[word] for word in at if word[0] == "w"}
    starts = [passage[0] for passage in words if passage]
    assert starts == sorted(set(starts)), "passages go on"


@given(st.integers(30, 400), st.integers(8, 30), st.integers(0, 15))
def test_neighbours_share_so_many_tokens(count, tokens, overlap) -> None:
    cut = Window(tokens, min(overlap, tokens // 2))
    text = " ".join(f"w{i}" for i in range(count))
    passages = [passage.split() for passage in split(text, [m.span() for m in re.finditer(r"\S+", text)], cut)]
    assert passages[0][0] == "w0"
    for one, other in itertools.pairwise(passages):
        assert one[len(one) - cut.overlap :] == other[: cut.overlap]


def test_passages_end_with_sentences_where_they_can() -> None:
    text = "One two three four five six seven. Eight nine ten eleven twelve thirteen."
    passages = split(text, [m.span() for m in re.finditer(r"\w+|\.", text)], Window(9, 0))
    assert passages == ["One two three four five six seven.", "Eight nine ten eleven twelve thirteen."]


@pytest.mark.parametrize(
    ("tokens", "overlap", "takes", "expected"),
    [
        (None, None, 510, Window(256, 32)),
        (None, None, 100, Window(100, 12)),
        (None, None, None, Window(256, 32)),
        (64, 0, 254, Window(64, 0)),
        (300, None, 254, "f.tokens: 300, but the embedding model looks at 254"),
        (None, 200, 254, "f.overlap: 200 of 254 tokens"),
    ],
)
def test_window(tokens, overlap, takes, expected) -> None:
    if isinstance(expected, Window):
        assert window(tokens, overlap, model_takes=takes, where="f") == expected
        return
    with pytest.raises(BadRequest, match=re.escape(expected)):
        window(tokens, overlap, model_takes=takes, where="f")


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(16, 400))
def test_batches_hold_every_text_once_within_their_tokens(lengths, batch_tokens) -> None:
    pytest.importorskip("torch", reason="needs the extra 'rag'")
    from runners.embedding.embedder import pack

    batches = pack(lengths, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= batch_tokens


@pytest.mark.parametrize("module", ["runners.rag.runner", "runners.agent.runner"])
def test_the_runner_modules_are_light(module) -> None:
    heavy = ["torch", "transformers", "numpy", "faiss", "smolagents", "requests", "mcp", "pydantic", "yaml"]
    program = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
