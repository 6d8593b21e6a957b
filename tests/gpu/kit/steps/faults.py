"""A real illegal address and a real out of memory: verdicts, the Xid at the right task, and the slot opens again."""

from __future__ import annotations

from typing import Any

from tests.gpu.kit.scene import Scene, Skip


def run(scene: Scene) -> None:
    if not scene.xid:
        raise Skip("it causes an Xid in the kernel log; --xid allows it")
    before = scene.result(scene.dispatch("kernel"))
    trespass = failed(scene, "trespass")
    error = str(trespass.get("error"))
    scene.row(
        "an illegal address fails the task as its own fault",
        ok="illegal memory access" in error,
        value=f"{trespass['payload'].get('error_kind')}: {error[:150]}",
        evidence={"event": str(trespass)},
    )
    told = f"{error} {trespass['payload'].get('evidence')} {scene.node.result(trespass['task_id'])}"
    if "Xid" in told:
        scene.row("its Xid is reported with that task", ok=True, value=told[told.index("Xid") :][:80])
    elif scene.dry:
        scene.row("its Xid is reported with that task", ok=False, why="no Xid in the event", evidence={"event": told})
    else:
        scene.skip(
            "its Xid is reported with that task", "the driver delivers no Xid events here (as in many containers)"
        )
    clean(scene, "after the illegal address", before)
    overfill = failed(scene, "overfill")
    error = f"{overfill.get('error')} {overfill['payload'].get('error_kind')}"
    scene.row(
        "more memory than the card has: the verdict says so",
        ok="memory" in error.lower() and "Xid" not in error,
        value=error[:150],
        evidence={"event": str(overfill)},
    )
    clean(scene, "after the out of memory", before)


def failed(scene: Scene, do: str) -> dict[str, Any]:
    end = scene.end_of(scene.dispatch(do))
    assert end["type"] == "TASK_FAILED", f"{do} ended as {end['type']}"
    return end


def clean(scene: Scene, when: str, before: dict[str, Any]) -> None:
    """Rows: the canary passes, the slot opens, and a next task succeeds and is blamed for nothing."""
    scene.wait_word("IDLE")
    canary = scene.result(scene.dispatch("canary"))
    scene.row(f"the canary passes {when}", ok=canary["status"] == 0, value=f"status {canary['status']}")
    task = scene.dispatch("kernel")
    after = scene.result(task)
    blamed = "Xid" in str(scene.node.result(task))
    ok = after["right"] and after["visible"] == before["visible"] and not blamed
    why = "" if ok else f"{after}"
    scene.row(f"the slot is open {when}; its next task is right, and blamed for nothing", ok=ok, why=why)
