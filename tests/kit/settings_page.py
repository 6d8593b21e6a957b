"""Writes docs/settings.md from the settings' schema and conf/node.toml: `python -m tests.kit.settings_page`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from flowmesh.settings.sources import VARIABLES
from tests.kit.paths import CONF, ROOT

PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

Every setting of a node: its type, default, environment variable, meaning and an example. Settings come from the
command line (`--set KEY=VALUE`), then environment variables, then the file (`--config`, see
[conf/node.toml](../conf/node.toml)), then the default. `flowmesh-supervisor --check` prints each value and where it
comes from; `flowmesh validate FILE` checks a file.

This page is made from the settings' types and the comments of conf/node.toml; a test compares them.
"""
_SETTING = re.compile(r"^#?(?P<name>[a-z_]+) = (?P<value>.*?)(?:  # example)?$")
_HEADER = re.compile(r"^#?\[{1,2}([\w.]+)\]{1,2}$")
_VARIABLE = re.compile(r"\s*Variables?: [A-Z_, ]+\.?")


def page() -> str:
    """The content of docs/settings.md."""
    schema = json.loads((CONF / "schema" / "node.json").read_text())
    meanings = dict(_comments((CONF / "node.toml").read_text()))
    variables = {key: name for name, key in VARIABLES.items()}
    defs = schema["$defs"]
    parts = [HEAD]
    for section, field in defs["Settings"]["properties"].items():
        name, heading = _target(field)
        title = {"list": f"[[{section}]]", "map": f"[{section}.NAME]"}.get(heading, f"[{section}]")
        parts.append(f"\n## {title}\n")
        parts.append("| setting | type | default | variable | example |\n| --- | --- | --- | --- | --- |")
        texts: dict[str, list[str]] = {}
        for key, value in defs[name]["properties"].items():
            meaning, example = meanings[f"{section}.{key}"]
            default = "none" if value.get("default") is None else f"`{json.dumps(value['default'])}`"
            variable = variables.get(f"{section}.{key}", "")
            shown = [f"`{key}`", _type(value, defs), default, f"`{variable}`" if variable else "", f"`{example}`"]
            parts.append("| " + " | ".join(each.replace("|", "\\|") for each in shown) + " |")
            texts.setdefault(meaning, []).append(f"`{key}`")
        parts.append("")
        parts += [f"- {', '.join(keys)}: {meaning}" for meaning, keys in texts.items()]
    return "\n".join(parts) + "\n"


def _target(field: dict[str, Any]) -> tuple[str, str]:
    """The definition that a section has, and whether there is a list or a mapping of it."""
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2], ""
    inner, kind = (field["items"], "list") if "items" in field else (field["additionalProperties"], "map")
    return inner["$ref"].rpartition("/")[2], kind


def _type(value: dict[str, Any], defs: dict[str, Any]) -> str:
    if "$ref" in value:
        return _type(defs[value["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in value:
        return " or ".join(_type(each, defs) for each in value["anyOf"] if each.get("type") != "null")
    if "enum" in value:
        return ", ".join(json.dumps(each) for each in value["enum"])
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}), defs)}"
    low = value.get("minimum", value.get("exclusiveMinimum"))
    high = value.get("maximum")
    bounds = f" above {low}" if "exclusiveMinimum" in value else f" from {low}" if low is not None else ""
    bounds += f" to {high}" if high is not None and high < 2**53 else ""
    return {"string": "text", "boolean": "true or false"}.get(
        value.get("type", ""), value.get("type", "value")
    ) + bounds


def _comments(text: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """(`section.key`, (meaning, example)) of each setting in node.toml; settings below one comment share it."""
    section, comment, fresh = "", [], False
    for line in text.splitlines():
        if header := _HEADER.match(line):
            section, comment, fresh = header[1].partition(".")[0], [], False
        elif setting := _SETTING.match(line):
            meaning = _VARIABLE.sub("", " ".join(comment)).strip()
            yield f"{section}.{setting['name']}", (meaning or "see above", setting["value"])
            fresh = True
        elif line.startswith("#"):
            comment = [line.lstrip("# ")] if fresh else [*comment, line.lstrip("# ")]
            fresh = False
        else:
            comment, fresh = [], False


if __name__ == "__main__":
    PAGE.write_text(page())
