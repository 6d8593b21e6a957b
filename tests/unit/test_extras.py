"""The extras of pyproject.toml, as the errors about missing libraries name them."""

from __future__ import annotations

import re
import tomllib

import pytest

from flowmesh.tasks.catalogue import BUILTIN
from runners.api import EXTRAS, IN_EVERY_EXTRA
from tests.kit.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
INSTALLED_AS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "bs4": "beautifulsoup4",
    "mlflow": "mlflow-skinny",
    "pyarrow": "datasets",
}
"""By the name that is imported, where the distribution has another one. pyarrow comes with datasets."""


def installs(extra: str) -> set[str]:
    """The distributions that an extra installs, those of other extras included."""
    found: set[str] = set()
    for line in PROJECT[extra]:
        if nested := re.fullmatch(r"flowmesh-supervisor\[([\w-]+)\]", line):
            found |= installs(nested[1])
        else:
            found.add(re.split(r"[<>=~!\[; ]", line)[0].lower())
    return found


def distribution(library: str) -> str:
    return INSTALLED_AS.get(library, library.replace("_", "-"))


@pytest.mark.parametrize("extra", ["inference", "training", "vllm", "rag"])
def test_what_every_extra_has_is_in_it(extra: str) -> None:
    assert {distribution(library) for library in IN_EVERY_EXTRA} - installs(extra) == set()


@pytest.mark.parametrize(("library", "extra"), sorted(EXTRAS.items()))
def test_the_extra_that_an_error_names_installs_the_library(library: str, extra: str) -> None:
    assert distribution(library) in installs(extra)


@pytest.mark.parametrize("kind", [kind for kind in BUILTIN if kind.requires], ids=lambda kind: kind.name)
def test_a_task_types_extra_installs_what_it_requires(kind) -> None:
    assert {distribution(library) for library in kind.requires} - installs(kind.extra) == set()
