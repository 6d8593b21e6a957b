"""The token of the page, and cookies that are made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowmesh.errors import ConfigError
from flowmesh.page import tokens
from flowmesh.page.tokens import ALL_TRIES, TRIES, Tokens

SECRET = "0123456789abcdef"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(SECRET)
    return path


def test_a_cookie_ends_with_its_time_and_with_the_token(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Tokens(str(file))
    cookie = known.cookie()
    assert known.is_cookie(cookie)
    until, _, signature = cookie.partition(".")
    for forged in (
        "",
        ".",
        f"{int(until) + 1}.{signature}",
        f"{until}.{'0' * 64}",
        f"{until}.é",
        f"{'9' * 20}.{signature}",
    ):
        assert not known.is_cookie(forged)
    with monkeypatch.context() as later:
        later.setattr(tokens.time, "time", lambda: int(until) + 1.0)
        assert not known.is_cookie(cookie)
    file.write_text(SECRET + "x")
    assert not known.is_cookie(cookie)


def test_wrong_tokens_are_counted_by_address_and_together(file: Path) -> None:
    known = Tokens(str(file))
    for _ in range(TRIES):
        assert not known.blocked("a")
        assert not known.is_right("wrong-é", "a")
    assert known.blocked("a")
    assert not known.blocked("b")
    assert known.is_right(SECRET, "b")
    for number in range(ALL_TRIES):
        known.is_right("wrong", f"c{number}")
    assert known.blocked("new")


@pytest.mark.parametrize("content", ["", "short", None])
def test_a_token_that_protects_nothing_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"web\.token_file"):
        Tokens(str(path)).current()
