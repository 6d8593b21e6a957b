"""Modules that an environment's fork server imports, so that an agent forked from it starts without imports.

Importing them starts no native thread; see `runners.inference.preload`. None of them needs torch.
"""

from runners.rag.preload import if_installed

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
