"""Runners whose results and errors hold what an encoder or a terminal stumbles over."""

from __future__ import annotations

from typing import Any

from runners.api import Context, Runner


class OddRunner(Runner):
    """Does what `spec.do` says."""

    def run(self, ctx: Context) -> dict[str, Any]:
        return getattr(self, f"do_{ctx.spec['do']}")(ctx)  # type: ignore[no-any-return]

    def do_half_pair(self, ctx: Context) -> dict[str, Any]:
        ctx.phase("phase \ud800")
        (ctx.out_dir / "name-\udcff").write_text("a name that is not UTF-8")
        return {"ok": True, "text": "half \ud83d", "joined": "\ud83d\ude00", "by\udc00name": [float("nan")]}

    def do_raise_half_pair(self, ctx: Context) -> dict[str, Any]:
        raise ValueError("half \ud83d of it")

    def do_deep(self, ctx: Context) -> dict[str, Any]:
        value: list[Any] = []
        for _ in range(ctx.spec["levels"]):
            value = [value]
        return {"ok": True, "value": value}

    def do_raise_controls(self, ctx: Context) -> dict[str, Any]:
        print("log \x1b]0;title\x07 line", flush=True)
        raise ValueError("red \x1b[31m text \x07 and \u202e back\nsecond line")
