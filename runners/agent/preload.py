"""Modules that an environment's fork server imports, so that an agent forked from it starts without imports.

As in `runners.inference.preload`, the server sets ENVIRONMENT before it imports them, and keeps one native thread.
None of them needs torch.
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
"""With the MCP clients where they are installed. Imports in 2 s of CPU time."""
