from __future__ import annotations

import pytest

from flowmesh.redaction import Redactor, bare_url


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abcd.efgh",
        "you sent abcd.efgh",
        "bearer  zyxw9876",
        "redis://user:hunter22@host/0 refused",
        "http://abcd.efgh@host/",
        "key=k%2Fey1 or k/ey1",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    hide = Redactor(["Bearer abcd.efgh", "k%2Fey1", None, ""])
    said = hide(text)
    assert "[hidden]" in said
    for secret in ("abcd.efgh", "zyxw9876", "hunter22", "k/ey1", "k%2Fey1"):
        assert secret not in said


def test_what_a_request_knows_is_hidden_and_ordinary_words_are_not() -> None:
    hide = Redactor.of_request(
        "https://me:p%40ss1@host/x?sig=s1gn4ture&n=1",
        {"X-Api-Key": "k3y-value", "X-Kind": "a", "Content-Type": "application/json"},
        "t0ken-of-node",
    )
    assert hide("p@ss1 p%40ss1 s1gn4ture k3y-value t0ken-of-node").split() == ["[hidden]"] * 5
    assert hide("a application/json 1") == "a application/json 1"


def test_a_query_is_hidden_as_it_stands_there_too() -> None:
    hide = Redactor.of_request("https://h/x?sig=a%2Fb%2Bc&bare-token&flag=", {}, None)
    assert hide("a%2Fb%2Bc a/b+c bare-token") == "[hidden] [hidden] [hidden]"


def test_the_longer_of_two_secrets_goes_first() -> None:
    assert Redactor(["abcd", "abcdefgh"])("abcdefgh") == "[hidden]"


def test_a_bare_url() -> None:
    assert bare_url("http://u:p@h:81/a/b?q=1#f") == "http://h:81/a/b"
