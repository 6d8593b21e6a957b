"""A real illegal address and a real out of memory: verdicts, the Xid at the right task, and the slot opens again."""

from __future__ import annotations

import subprocess
from typing import Any

from tests.gpu.kit.scene import Scene, Skip


def run(scene: Scene) -> None:
    if not scene.xid:
        raise Skip("it causes an Xid in the kernel log; --xid allows it")
    before = scene.result(scene.dispatch("kernel"))
    logged = kernel_log()
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
    elif scene.dry or len(kernel_log()) > len(logged):
        evidence = {"event": told, "kernel log": "\n".join(kernel_log()[-5:])}
        scene.row("its Xid is reported with that task", ok=False, why="the event names none", evidence=evidence)
    else:
        scene.skip("its Xid is reported with that task", "neither an event of the driver nor the kernel log has one")
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


def kernel_log() -> list[str]:
    """The kernel log's lines about Xids; none where it cannot be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if "NVRM: Xid" in line]
