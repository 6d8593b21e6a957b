"""One notion of a secret: by name, by place, by form, and by what looks like one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmesh.errors import FieldError
from flowmesh.redaction import HIDDEN, Redactor, in_request, is_secret, is_secret_name, redact_url
from flowmesh.validation.convert import convert

both_kinds_of_text = pytest.mark.parametrize("prose", [False, True], ids=["errors", "prose"])


@pytest.mark.parametrize(
    ("names", "secret"),
    [
        ("token HF_TOKEN accessToken ORCHESTRATOR_TOKEN TOKEN_2 X-Auth-Token clientsecret ClientSecret", True),
        ("api_key apikey OPENAI_API_KEY X-Api-Key SSH_KEY AWS_SECRET_ACCESS_KEY PRIVATE_KEYS", True),
        ("password dbPassword passwd DB_PASS MYSQL_PWD PASSPHRASE credentials credential JWT", True),
        ("authorization Proxy-Authorization cookie Set-Cookie X-Auth GITHUB_PAT headers HTTP_HEADERS", True),
        ("PWD max_tokens tokenizer keyboard author compass path header_count", False),
        ("TOKEN_FILE password-path SECRETS_DIR", False),
    ],
)
def test_names(names: str, secret: bool) -> None:
    assert {name: is_secret_name(name) for name in names.split()} == dict.fromkeys(names.split(), secret)


@pytest.mark.parametrize(
    ("path", "secret"),
    [
        (("delivery", "token"), True),
        (("api_keys", 0), True),
        (("destination", "headers", "X-Team"), True),
        (("servers", 2, "credentials", "user"), True),
        (("rows", 0), False),
        ((), False),
    ],
)
def test_what_lies_in_a_secret_is_one(path: tuple[str | int, ...], secret: bool) -> None:
    assert is_secret(path) is secret


def test_an_error_does_not_show_a_header_or_an_item_of_a_list_of_keys() -> None:
    for value, into, where in (
        ({"headers": {"X-Team": 31337}}, dict[str, dict[str, str]], "headers"),
        ({"api_keys": [31337]}, dict[str, list[str]], "api_keys"),
    ):
        with pytest.raises(FieldError, match=where) as caught:
            convert(value, into, where="")
        assert "31337" not in str(caught.value)


@both_kinds_of_text
def test_a_known_secret_is_hidden_in_each_of_its_forms(prose: bool) -> None:
    hide = Redactor(["Custom-Scheme p@ss/1", "k%2Fey1", "first-line\nsecond-line", None, ""], prose=prose)
    for form in ("p@ss/1", "p%40ss%2F1", "k/ey1", "k%2Fey1", "first-line", "second-line"):
        assert hide(f"a {form} b") == "a [hidden] b", form


@both_kinds_of_text
def test_short_values_and_words_for_true_and_false_are_not_hidden(prose: bool) -> None:
    hide = Redactor(["abc", "true", "None"], prose=prose)
    hide.learn_named({"REQUIRE_AUTH": "false", "API_KEY": "four", "HOME": "/home/me"})
    assert hide("abc true None false four /home/me") == "abc true None false [hidden] /home/me"


@both_kinds_of_text
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://u:hunter2@h/0 refused", "redis://[hidden]@h/0 refused"),
        ("at http://u:p@ss/w0rd@h/x.", "at http://[hidden]@h/x."),
        ("redis://:12/34@h:1", "redis://:[hidden]@h:1"),
        ("https://h/x?n=1&X-Amz-Signature=ab e", "https://h/x?n=1&X-Amz-Signature=[hidden] e"),
        ("(https://h/x?api_key=abcdef0123456789)", "(https://h/x?api_key=[hidden]"),
        ("https://h/cb#access_token=abcdef0123456789", "https://h/cb#access_token=[hidden]"),
        ("https://h/x?password=abc", "https://h/x?password=[hidden]"),
        ("hf://datasets/x@main, git+https://h/a@v1", "hf://datasets/x@main, git+https://h/a@v1"),
        ("https://hub/@owner/model and me@host", "https://hub/@owner/model and me@host"),
        ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer [hidden]"),
        ("Basic dXNlcjpwYXNzd29yZDE=", "Basic [hidden]"),
        ("token ghp_0123456789abcdef", "token [hidden]"),
        ("half a \ud83d pair", "half a \ufffd pair"),
    ],
)  # fmt: skip
def test_what_nobody_named_is_hidden_where_it_looks_like_a_secret(prose: bool, text: str, shown: str) -> None:
    assert Redactor(prose=prose)(text) == shown


def test_only_in_prose_an_ordinary_word_may_follow_the_name_of_a_scheme() -> None:
    text = "the basic principles"
    assert Redactor(prose=True)(text) == text
    assert Redactor()(text) == "the basic [hidden]"


def test_only_in_prose_a_link_keeps_short_parameters_that_may_be_no_secret() -> None:
    link = "https://h/list?sort_key=title&page_token=CAUQAA"
    assert Redactor(prose=True)(link) == link
    assert Redactor()(link) == "https://h/list?sort_key=[hidden]&page_token=[hidden]"
    assert Redactor()("https://h/x?sig=d") == "https://h/x?sig=[hidden]"
    assert Redactor(["CAUQAA"], prose=True)(link) == "https://h/list?sort_key=title&page_token=[hidden]"


def test_json_data_is_redacted_in_keys_and_texts() -> None:
    hide = Redactor(["s3cret"])
    assert hide.deep({"s3cret": ["x s3cret", 3, None, ("s3cret",)]}) == {HIDDEN: [f"x {HIDDEN}", 3, None, [HIDDEN]]}


def test_what_is_learnt_later_is_hidden_too() -> None:
    hide = Redactor(["first"])
    assert hide("first second") == "[hidden] second"
    hide.learn("second")
    assert hide("first second") == "[hidden] [hidden]"


def test_all_that_a_request_carries_is_secret_but_its_content_type() -> None:
    found = in_request("https://me:p%40ss@h/x?sig=a%2Fb&bare", {"X-Any": "value", "Content-Type": "text/plain"})
    assert {"me", "p%40ss", "a/b", "a%2Fb", "bare", "value"} <= set(found)
    assert "text/plain" not in found


@given(st.text(), st.sampled_from(["", " Bearer ", "https://u:"]), st.text("abc@:/?#&= %\ud800", max_size=30))
def test_any_text_gives_valid_text_without_the_known_secret(before: str, between: str, after: str) -> None:
    shown = Redactor(["0secret0"])(f"{before}{between}0secret0{after}")
    assert "0secret0" not in shown
    shown.encode()


@given(st.text("uh.:/@?#&=key1[] ", max_size=40))
def test_an_address_is_redacted_once(rest: str) -> None:
    shown = redact_url(f"redis://{rest}")
    assert redact_url(shown) == shown
