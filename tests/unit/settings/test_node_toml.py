"""conf/node.toml: works as it is, has every setting with its true default, and names every variable."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec
import pytest

from flowmesh.settings.load import load
from flowmesh.settings.schema import RedisSettings, Settings
from flowmesh.settings.sources import VARIABLES, Sections
from tests.kit.paths import CONF

NODE_TOML = CONF / "node.toml"

COMMENTED = re.compile(r"^#(?P<setting>[a-z_]+ = .*?)(?P<example>  # example)?$")


def lines_of_node_toml() -> list[tuple[str, str, bool]]:
    """(section, `key = value`, whether it is an example) of each setting in the file, commented out or not."""
    section, found = "", []
    for line in NODE_TOML.read_text().splitlines():
        if header := re.match(r"^#?(\[[\w.]+\]|\[\[\w+\]\])$", line):
            section = header[1][1:-1]
        elif match := COMMENTED.match(line):
            found.append((section, match["setting"], match["example"] is not None))
        elif line and not line.startswith("#"):
            found.append((section, line, True))
    return found


def test_node_toml_works_as_it_is() -> None:
    found = load(NODE_TOML, {}).settings
    assert found == msgspec.structs.replace(Settings(), redis=RedisSettings(url="redis://127.0.0.1:6379/0"))


def test_node_toml_has_every_setting_once_and_nothing_else() -> None:
    def generic(section: str) -> str:
        first, _, name = section.partition(".")
        return f"{first}.NAME" if name else first

    found = [f"{generic(section)}.{setting.partition(' = ')[0]}" for section, setting, _ in lines_of_node_toml()]
    sections = Sections(Settings)
    listed = [f"[{section}].{key}" for section, fields in sections.listed.items() for key in fields]
    assert sorted(found) == sorted([*sections.keys(), *listed])


@pytest.mark.parametrize(("section", "setting", "example"), lines_of_node_toml())
def test_each_default_in_node_toml_is_the_default(tmp_path: Path, section: str, setting: str, example: bool) -> None:
    setting = setting.replace("/opt/flowmesh/vllm/bin/python", sys.executable)
    environments = "" if section == "environments.vllm" else "[environments.vllm]\n"
    path = tmp_path / "node.toml"
    key = setting.partition(" = ")[0]
    if section.startswith("["):
        name = "" if key == "name" else "name = 'x'\n"
        path.write_text(f"[{section}]\n{name}{setting}\n")
        assert getattr(load(path, {}).settings.slots[0], key) not in (None, ())
        assert example
        return
    path.write_text(f"{environments}[{section}]\n{setting}\n")
    loaded = load(path, {}).settings
    first, _, name = section.partition(".")
    found = getattr(loaded, first)[name] if name else getattr(loaded, first)
    default = getattr(type(found)(), key)
    if example:
        assert default in (None, ())
        assert getattr(found, key) != default
    else:
        assert getattr(found, key) == default


def test_node_toml_names_every_variable_at_its_key() -> None:
    text = NODE_TOML.read_text()
    for variable, key in VARIABLES.items():
        section, name = key.split(".")
        body = text.partition(f"\n[{section}]\n")[2].partition("\n[")[0]
        above = re.split(rf"\n#?{name} = ", body)[0]
        assert variable in above, f"{variable} is named in [{section}], above {name}"
