"""docs/settings.md has every setting with its type, default, variable, meaning and an example, as the code has them."""

from __future__ import annotations

from tests.kit.settings_page import PAGE, page


def test_the_page_is_what_the_settings_are() -> None:
    assert PAGE.read_text() == page(), "write it again: python -m tests.kit.settings_page"
    assert "see above" not in page(), "a setting without a comment in conf/node.toml"
