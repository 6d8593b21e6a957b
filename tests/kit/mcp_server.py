"""A real MCP server for the tests: `python mcp_server.py stdio`, or `sse PORT`, or `streamable-http PORT`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

server = MCPServer("tests")


@server.tool()
def add(a: Annotated[int, Field(description="one number")], b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


@server.tool()
def total(numbers: list[float], options: dict[str, bool] | None = None) -> str:
    """Adds a list; with options.negate, the negative of it."""
    result = sum(numbers)
    return str(-result if (options or {}).get("negate") else result)


@server.tool()
def fail(reason: str) -> str:
    """Always fails."""
    raise ToolError(f"as you wish: {reason}")


@server.tool()
def slow(seconds: float, begun: str = "") -> str:
    """Takes its time. Makes the file `begun` first."""
    if begun:
        Path(begun).touch()
    time.sleep(seconds)
    return "done"


@server.tool(name="what-env")
def what_env(name: str) -> str:
    """A variable of the server's environment."""
    return os.environ.get(name, "(not set)")


@server.tool()
def die() -> str:
    """Ends the server's process."""
    os._exit(3)


@server.tool()
def pid() -> int:
    """The server's process."""
    return os.getpid()


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run(sys.argv[1], host="127.0.0.1", port=int(sys.argv[2]))
