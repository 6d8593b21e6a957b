"""Texts that name something name what there is: paths, modules, anchors, commands, states, and the fields of tasks."""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

import flowmesh.messages.output
import runners.agent.config
import runners.agent.task
import runners.command.task
import runners.data.files
import runners.data.graph
import runners.data.hub
import runners.data.lists
import runners.data.openai_batch
import runners.data.shard
import runners.embedding.options
import runners.inference.export
import runners.inference.options
import runners.inference.task
import runners.models.spec
import runners.rag.task
import runners.remote.task
import runners.scoring.task
import runners.training.settings
import runners.training.sources
import runners.vectors.task
from flowmesh.cli.main import COMMANDS
from tests.kit.paths import ROOT
from tests.unit.tasks.test_machine_diagram import walked

THIS = Path(__file__).resolve()
FOLDERS = ("docs", "tests", "conf", "scripts", "flowmesh", "runners", ".ci")

PATH = re.compile(rf"(?<![\w/.~$-])(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*[\w*]")
TEXT_FILE = re.compile(r"(?<![\w/.*-])[\w-]+\.md\b")
DOTTED = re.compile(r"(?<![\w/.@-])(?:flowmesh|runners)(?:\.[a-z_]\w*)+(?::\w+)?(?![\w/-])")
SHORT = re.compile(r"(?<![\w/.])(?:execution|messages|bus|orchestrator|startup|validation)\.[a-z_]+\b(?!/)")
"""A module without its package. Folders that are also sections of the settings would be ambiguous here."""
NO_PATHS = {"flowmesh/v1": "an apiVersion"}
NO_MODULES = {
    "flowmesh.runners": "the group of entry points",
    "flowmesh.control": "the channel in Redis",
    "flowmesh.delivery": "a logger",
    "runners.reward_callables": "a setting",
    "runners.trackers": "a setting",
    "runners.cache_max_bytes": "a setting",
    "runners.unpack_max_bytes": "a setting",
    "runners.unpack_max_files": "a setting",
    "runners.agents_dir": "a setting",
    "runners.agent_network": "a setting",
}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
BANNER = re.compile(r"^\s*# ?-{3,}.*-{3,}\s*$")


def listed(*patterns: str) -> list[Path]:
    """The checkout's files of these patterns, tracked or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        pytest.skip("not a git checkout", allow_module_level=True)
    return sorted(path for name in set(done.stdout.split()) if (path := ROOT / name).is_file())


MARKDOWN = listed("*.md")
CODE = [path for path in listed("flowmesh/*.py", "runners/*.py", "tests/*.py") if path != THIS]
OTHERS = listed("conf/*", "scripts/*", ".ci/*")
EVERYTHING = (*MARKDOWN, *CODE, *OTHERS)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def prose(path: Path) -> str:
    """What a file says to its reader: of code, its docstrings and comments."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*comments, *docstrings(ast.parse(text))])


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Every string that stands for itself, which is what a docstring of anything is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def test_paths_in_texts_exist() -> None:
    missing = []
    for path in EVERYTHING:
        for match in PATH.finditer(prose(path)):
            name = match[0].rstrip(".")
            places = (ROOT, path.parent)
            there = any(any(place.glob(name)) if "*" in name else (place / name).exists() for place in places)
            if not there and name not in NO_PATHS:
                missing.append(f"{shown(path)}: {name}")
    assert not missing


def test_texts_that_are_named_are_shipped() -> None:
    missing = []
    for path in (*MARKDOWN, *CODE):
        folders = (ROOT, path.parent) if path.suffix == ".md" else (ROOT,)
        names = set(TEXT_FILE.findall(FENCE.sub("", prose(path))))
        missing += [f"{shown(path)}: {name}" for name in names if not any((each / name).is_file() for each in folders)]
    assert not missing


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module of this checkout, or something that stands in one."""
    names, _, attribute = dotted.partition(":")
    parts = names.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        source = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if source.is_file():
            wanted = [*parts[end:], *filter(None, [attribute])]
            text = source.read_text()
            return all(re.search(rf"\b{re.escape(name)}\b", text) for name in wanted)
    return False


def test_modules_in_texts_exist() -> None:
    missing = []
    for path in EVERYTHING:
        text = prose(path)
        names = [name for name in DOTTED.findall(text) if name not in NO_MODULES and not resolves(name)]
        short = [name for name in SHORT.findall(text) if name.rpartition(".")[2] not in {"md", "py", "jsonl"}]
        names += [name for name in short if not resolves(f"flowmesh.{name}")]
        missing += [f"{shown(path)}: {name}" for name in names]
    assert not missing


def test_modules_that_strings_name_exist() -> None:
    """Entry points such as `runners.child:main`, which no type checker sees."""
    missing = []
    for path in listed("flowmesh/*.py", "runners/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if DOTTED.fullmatch(name) and name not in NO_MODULES and not resolves(name):
                missing.append(f"{shown(path)}: {name}")
    assert not missing


def anchors(path: Path) -> set[str]:
    """A text's headings as GitHub links to them."""
    found: dict[str, int] = {}
    slugs = set()
    for line in FENCE.sub("", path.read_text()).splitlines():
        if heading := re.match(r"#{1,6} (?P<title>.*)", line):
            slug = re.sub(r"[^\w\- ]", "", heading["title"].strip().lower()).replace(" ", "-")
            again = found[slug] = found.get(slug, -1) + 1
            slugs.add(f"{slug}-{again}" if again else slug)
    return slugs


def test_links_lead_somewhere() -> None:
    broken = []
    for path in MARKDOWN:
        for match in LINK.finditer(FENCE.sub("", path.read_text())):
            target, _, anchor = match["target"].partition("#")
            if "://" in target:
                continue
            found = path.parent / target if target else path
            if not found.exists() or (anchor and anchor not in anchors(found)):
                broken.append(f"{shown(path)}: {match['target']}")
    assert not broken


def test_commands_in_texts_exist() -> None:
    unknown = []
    for path in (*MARKDOWN, *OTHERS):
        found = re.findall(r"(?:`|^\$ |^#\s+)flowmesh ([a-z]+)\b", path.read_text(), re.MULTILINE)
        unknown += [f"{shown(path)}: flowmesh {command}" for command in found if command not in COMMANDS]
    assert not unknown


@pytest.mark.parametrize("folder", ["flowmesh", "runners"])
def test_no_banner_lines(folder: str) -> None:
    found = [
        f"{shown(path)}:{number}"
        for path in listed(f"{folder}/*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BANNER.match(line)
    ]
    assert not found, f"{len(found)} banner lines: a file that needs them wants to be two"


# What docs/architecture.md says of the code


def test_the_architecture_names_modules_that_there_are() -> None:
    """They are written without `flowmesh/` and `.py`, such as `bus/outbox`; those of execution/ also without that."""
    text = (ROOT / "docs/architecture.md").read_text()
    missing = []
    for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)+)(?:\.[a-z_]+)?`", text):
        places = [ROOT / "flowmesh" / name, ROOT / "flowmesh/execution" / name]
        if name.split("/")[0] not in FOLDERS and not any(
            each.is_dir() or each.with_suffix(".py").is_file() for each in places
        ):
            missing.append(name)
    assert not missing


def test_the_architectures_tree_is_the_tree() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    tree = next(block for block in FENCE.findall(text) if "flowmesh/\n" in block)
    words = set(re.findall(r"[a-z0-9_]+", tree.partition("runners/\n")[0]))
    there = [path for path in listed("flowmesh/*.py") if path.stem != "__init__" and "cli" not in path.parts]
    assert sorted(shown(path) for path in there if path.stem not in words) == []


def test_the_state_diagram_is_the_machine() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    drawn = set(re.findall(r"^ +([A-Z]+) --> ([A-Z]+): (\w+)$", text, re.MULTILINE))
    assert drawn == {(state, after, event) for state, event, after in walked()[0]}


# What docs/tasks.md says of the fields

SECTIONS = {
    "common": [runners.data.shard],
    "data": [runners.data.lists, runners.data.files, runners.data.hub, runners.data.graph, runners.data.openai_batch],
    "inference": [runners.inference.options, runners.inference.task, runners.inference.export, runners.models.spec],
    "training": [runners.training.settings, runners.training.sources],
    "rag": [runners.rag.task],
    "embedding": [runners.vectors.task, runners.embedding.options],
    "score": [runners.scoring.task],
    "api": [runners.remote.task],
    "agent": [runners.agent.task, runners.agent.config],
    "command": [runners.command.task],
    "output": [flowmesh.messages.output],
}
READS = {
    "output": ("common", "data"),
    "inference": ("inference", "models"),
    "training": ("training", "models"),
    "rag": ("rag", "inference", "models"),
    "embedding": ("embedding", "rag"),
    "score": ("score", "embedding"),
}
"""The sections of docs/tasks.md that describe a task type's fields; by default the one of its name."""
INTERNAL = {
    "InferenceTask",
    "Sampling",
    "Column",
    "AgentTask",
    "RagTask",
    "EmbeddingTask",
    "ScoreTask",
    "Group",
    "_Choice",
}
"""Structs that no document is decoded into. `Column` is one of the training's; graph_template's has its names below."""


def words_of(text: str) -> set[str]:
    """The words in a text's code spans."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", FENCE.sub("", text)))))


def structs(module: ModuleType) -> Iterator[type[msgspec.Struct]]:
    for name, value in vars(module).items():
        own = isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
        if own and (name not in INTERNAL or module is runners.data.graph):
            yield value


@pytest.mark.parametrize(
    ("section", "module"),
    [(section, module) for section, modules in SECTIONS.items() for module in modules],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_field_of_a_task_is_documented(section: str, module: ModuleType) -> None:
    text = (ROOT / "docs/tasks.md").read_text()
    known: set[str] = set()
    for name in READS.get(section, (section,)):
        part = re.search(rf"<!-- begin: {name} -->(.*?)<!-- end: {name} -->", text, re.DOTALL)
        assert part is not None, f"docs/tasks.md has no section {name!r}"
        known |= words_of(part[1])
    missing = {
        struct.__name__: [name for name in struct.__struct_encode_fields__ if name not in known]
        for struct in structs(module)
    }
    assert not {name: fields for name, fields in missing.items() if fields}
