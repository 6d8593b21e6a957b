"""Modules that an environment's fork server imports, so that an agent forked from it begins at once.

As `runners.inference.preload` has it: the server sets its ENVIRONMENT before it imports them, and keeps one native
thread. Light: a node may well have them in an environment without torch.
"""

from runners.rag.preload import ENVIRONMENT, if_installed

__all__ = ["AGENT", "ENVIRONMENT"]

AGENT: tuple[str, ...] = (
    "smolagents.agents",
    "smolagents.models",
    "smolagents.tools",
    "httpx2",
    "openai",
    "openai.resources.chat.completions.completions",
    "requests",
    "yaml",
    "jinja2",
    "runners.agent.runner",
    "runners.agent.run",
    "runners.agent.endpoint",
    *if_installed(
        "mcp",
        "mcp.client",
        "mcp.client.stdio",
        "mcp.client.sse",
        "mcp.client.streamable_http",
        "runners.agent.mcp_bridge",
    ),
)
"""With the clients of MCP where they are installed. Imports in 1 s."""
