"""The built-in tools: functions with a description. `adapt` wraps them for smolagents."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flowmesh.redaction import Redactor
from runners.agent.command import Ended
from runners.agent.config import Fetch, SearchProvider, Tools, WebSearch
from runners.agent.documents import UnreadableDocument, document_text
from runners.agent.sandbox import Sandbox
from runners.agent.watch import Watch
from runners.agent.web import WebRefused, fetch, search
from runners.agent.workspace import PathRefused, Workspace

MAX_RESULT_CHARS = 20_000
"""Of one tool's result, so that it does not fill the model's context."""


class ToolRefused(Exception):
    """A call that cannot be done. The message is for the model."""


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One tool."""

    name: str
    description: str
    inputs: dict[str, dict[str, Any]]
    """By argument: type, description, and nullable if it is optional."""
    call: Callable[..., str]
    schema: dict[str, Any] | None = None
    """The JSON schema of the arguments, where there is a more precise one than `inputs`."""


class Kit(msgspec.Struct, frozen=True, kw_only=True):
    """What the tools of one run share."""

    watch: Watch
    workspace: Workspace
    sandbox: Sandbox | None
    """None if no tool needs one."""
    providers: Mapping[str, SearchProvider]
    redact: Redactor
    numbers: Iterator[int] = msgspec.field(default_factory=itertools.count)
    """For names of scripts: calls of one turn run in parallel, and members of a team share the folder."""


def build_tools(wanted: Tools, kit: Kit) -> list[ToolSpec]:
    """The tools of one agent."""
    tools: list[ToolSpec] = []
    if wanted.python:
        tools.append(_python(kit))
    if wanted.shell:
        tools.append(_shell(kit))
    if wanted.files:
        tools += _files(kit)
    if wanted.documents:
        tools.append(_documents(kit, fetch_of(wanted)))
    if (options := fetch_of(wanted)) is not None:
        tools.append(_fetch_page(kit, options))
    if (options_of_search := search_of(wanted)) is not None:
        tools.append(_web_search(kit, options_of_search))
    return tools


def fetch_of(wanted: Tools) -> Fetch | None:
    value = wanted.fetch_page
    return value if isinstance(value, Fetch) else Fetch() if value else None


def search_of(wanted: Tools) -> WebSearch | None:
    value = wanted.web_search
    return value if isinstance(value, WebSearch) else WebSearch() if value else None


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


def _python(kit: Kit) -> ToolSpec:
    def python(code: str) -> str:
        script = Path(".tmp") / f"script-{next(kit.numbers)}.py"
        kit.workspace.write(str(script), code.encode(errors="replace"))
        return _output_of(_sandbox(kit).run(["python", str(script)], kit.watch.check))

    return ToolSpec(
        name="python",
        description="Runs a Python program in the task's folder and returns what it prints. Only files are kept "
        f"between calls. {_bounds(kit)}",
        inputs={"code": _text("The program. Print what you want to see.")},
        call=python,
    )


def _shell(kit: Kit) -> ToolSpec:
    def shell(command: str) -> str:
        return _output_of(_sandbox(kit).run(["/bin/sh", "-c", command], kit.watch.check))

    return ToolSpec(
        name="shell",
        description=f"Runs a command in the task's folder with /bin/sh and returns its output. {_bounds(kit)}",
        inputs={"command": _text("The command line.")},
        call=shell,
    )


def _files(kit: Kit) -> list[ToolSpec]:
    space = kit.workspace

    def read_file(path: str) -> str:
        return space.read(path).decode(errors="replace")

    def write_file(path: str, content: str) -> str:
        space.write(path, content.encode(errors="replace"))
        return f"{path} written"

    def list_files() -> str:
        return "\n".join(space.listing()) or "the folder is empty"

    path = _text("The file, relative to the task's folder.")
    return [
        ToolSpec(name="read_file", description="Returns a text file.", inputs={"path": path}, call=read_file),
        ToolSpec(
            name="write_file",
            description="Writes a text file, in place of what was there.",
            inputs={"path": path, "content": _text("The whole content.")},
            call=write_file,
        ),
        ToolSpec(name="list_files", description="Lists the files in the task's folder.", inputs={}, call=list_files),
    ]


def _documents(kit: Kit, web: Fetch | None) -> ToolSpec:
    def read_document(source: str, start: int | None = None) -> str:
        if source.startswith(("http://", "https://")):
            if web is None:
                raise ToolRefused("this agent may not fetch addresses; give a file of the task's folder")
            text = kit.watch.wait(lambda: _page_text(source, web))
        else:
            text = kit.watch.wait(lambda: document_text(kit.workspace.read(source), source))
        return _part(text, start or 0)

    return ToolSpec(
        name="read_document",
        description="Returns the text of a document (text, Markdown, HTML, CSV, JSON, docx, PDF) from `start` on.",
        inputs={
            "source": _text("A file in the task's folder" + (", or an http(s) address." if web else ".")),
            "start": {"type": "integer", "description": "Character to begin at; default 0.", "nullable": True},
        },
        call=read_document,
    )


def _fetch_page(kit: Kit, wanted: Fetch) -> ToolSpec:
    def fetch_page(url: str) -> str:
        return kit.watch.wait(lambda: _page_text(url, wanted))

    return ToolSpec(
        name="fetch_page",
        description="Returns the text of a web page.",
        inputs={"url": _text("Its http or https address.")},
        call=fetch_page,
    )


def _page_text(url: str, wanted: Fetch) -> str:
    page = fetch(url, wanted)
    text = document_text(page.body, page.url, page.content_type)
    if not text.strip():
        raise ToolRefused(f"{page.url} has no text ({len(page.body)} bytes); perhaps a script writes its content")
    return text if page.url == url else f"[redirected to {page.url}]\n{text}"


def _web_search(kit: Kit, wanted: WebSearch) -> ToolSpec:
    provider = kit.providers[wanted.provider]

    def web_search(query: str) -> str:
        found = kit.watch.wait(
            lambda: search(query, wanted.results, provider, kit.redact, f"search provider {wanted.provider}")
        )
        return json.dumps(found, ensure_ascii=False, indent=1) if found else "nothing found"

    return ToolSpec(
        name="web_search",
        description="Searches the web; returns title, url and snippet of the best results as JSON.",
        inputs={"query": _text("What to search for.")},
        call=web_search,
    )


def _sandbox(kit: Kit) -> Sandbox:
    assert kit.sandbox is not None, "the runner creates one if python or shell is on"
    return kit.sandbox


def _bounds(kit: Kit) -> str:
    bounds = _sandbox(kit).bounds
    network = "It has the network." if bounds.network else "It has no network."
    return f"At most {bounds.timeout_s:g} s and {bounds.memory_bytes // 2**20} MiB of memory. {network}"


def _output_of(ended: Ended) -> str:
    output = ended.output.strip() or "(no output)"
    if ended.left:
        output += f"\n[not kept, neither file, folder nor link, or nested too deep: {', '.join(ended.left)}]"
    if ended.stopped:
        return f"{output}\n[stopped: {ended.stopped}]"
    return output if ended.code == 0 else f"{output}\n[exit code {ended.code}]"


def _part(text: str, start: int) -> str:
    end = start + MAX_RESULT_CHARS - 200
    rest = f"\n[{len(text) - end} more characters; go on with start={end}]" if end < len(text) else ""
    return text[max(start, 0) : end] + rest


def run_tool(spec: ToolSpec, watch: Watch, redact: Redactor, arguments: dict[str, Any]) -> str:
    """Run a tool; its result redacted and cut to MAX_RESULT_CHARS.

    Raises:
        ToolRefused: it cannot be done, and why.
        Cancelled, OutOfTime: from `watch`.
    """
    watch.check()
    try:
        text = spec.call(**arguments)
    except (PathRefused, WebRefused, UnreadableDocument, ToolRefused) as error:
        raise ToolRefused(redact(str(error))) from None
    watch.check()
    text = redact(text)
    if len(text) > MAX_RESULT_CHARS:
        half = MAX_RESULT_CHARS // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
    return text


def adapt(spec: ToolSpec, watch: Watch, redact: Redactor) -> Any:
    """The tool as a smolagents tool."""
    from smolagents.tools import Tool

    class Adapted(Tool):
        name = spec.name
        description = spec.description
        inputs = spec.inputs
        output_type = "string"
        json_schema = spec.schema
        skip_forward_signature_validation = True

        def forward(self, **arguments: Any) -> str:
            return run_tool(spec, watch, redact, arguments)

    return Adapted()
