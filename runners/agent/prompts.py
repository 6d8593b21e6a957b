"""Prompts. Short, so that small models have room for the task."""

from __future__ import annotations

from typing import Any

RULES = """You solve the task that you are given, with the tools that you have.
- Use tools for facts, computations and files; do not guess what a tool can tell you.
- Files lie in one folder; give paths relative to it.
- Do not repeat a call that you have made with the same arguments.
- When you are done, call final_answer with the whole answer. Text without a call is taken as the answer, too.
{%- if custom_instructions %}

{{ custom_instructions }}
{%- endif %}
"""

WRITTEN_CALLS = """
You call a tool by writing one JSON object and nothing else: {"name": "<tool>", "arguments": {"<argument>": <value>}}
JSON with text after it, or in a code block beside other text, is not run.
Its result comes back as an observation. The tools:
{%- for tool in tools.values() %}
- {{ tool.to_tool_calling_prompt() }}
{%- endfor %}
"""


def templates(*, native_calls: bool) -> Any:
    """smolagents' prompt templates.

    Args:
        native_calls: tools go with the request; else the prompt lists them.
    """
    return {
        "system_prompt": RULES if native_calls else RULES + WRITTEN_CALLS,
        "planning": {"initial_plan": "", "update_plan_pre_messages": "", "update_plan_post_messages": ""},
        "managed_agent": {"task": "{{ task }}", "report": "{{ final_answer }}"},
        "final_answer": {
            "pre_messages": "An agent has run out of turns before it was done. Here is what it did.",
            "post_messages": "Answer this task as well as the above allows, and say what is missing.\n{{ task }}",
        },
    }


PLAN = """You plan how a team solves a task. Its members:
{members}
Write the steps as a JSON list and nothing else: [{{"worker": "<member>", "task": "<what exactly it has to do>"}}]
At most {max_steps} steps. Each step's task must be clear to someone who does not know the whole.
{instructions}"""

ASSIGN = """You assign a step to the member of a team who fits it best. The members:
{members}
Answer with a JSON object and nothing else: {{"worker": "<member>"}}
{instructions}"""

BREAK_DOWN = """You coordinate a team that solves a task. Its members:
{members}
Break the task down into steps, as a JSON list and nothing else: [{{"task": "<what exactly has to be done>"}}]
At most {max_steps} steps.
{instructions}"""

REVIEW = """You check whether a step of a team's work was done well enough to go on from.
Answer with a JSON object and nothing else: {{"done": true or false, "feedback": "<what is wrong or missing>"}}
{instructions}"""

REPORT = """You write the final answer to a task from the work of a team.
Use what is there, and say what failed or is missing. Write only the answer.
{instructions}"""

STEP = """The whole task, for context:
{task}

What was found before:
{before}

Your part:
{part}"""
