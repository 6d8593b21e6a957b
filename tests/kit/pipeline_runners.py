"""A runner of type `inference` that computes nothing: its answers are its items, those of its shard, or of children."""

from __future__ import annotations

from typing import Any

from runners.api import Context, Runner


class ItemsRunner(Runner):
    """With `spec.hold` it waits first, until a file `go` lies in its folder.

    With `spec.fail_together` it fails where it runs several requests.
    """

    def run(self, ctx: Context) -> dict[str, Any]:
        if ctx.spec.get("fail_together") and ctx.merge_children:
            raise ValueError("too many at once")
        while ctx.spec.get("hold") and not (ctx.out_dir / "go").exists():
            ctx.sleep(0.02)
        result = answered(ctx.spec)
        children = {each["task_id"]: answered(each["spec"]) for each in ctx.merge_children}
        return result | ({"children": children} if children else {})


def answered(spec: dict[str, Any]) -> dict[str, Any]:
    items = spec["data"]["items"]
    if shard := spec.get("shard"):
        count = -(-len(items) // shard["total"])
        items = items[shard["index"] * count : (shard["index"] + 1) * count]
    return {"ok": True, "items": [{"index": index, "output": item} for index, item in enumerate(items)]}
