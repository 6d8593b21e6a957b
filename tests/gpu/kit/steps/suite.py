"""All of tests/gpu, by pytest; a row for each failure. And at the end: nobody has changed the device's settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.gpu.kit import runners
from tests.gpu.kit.scene import Scene

STOPPED = -int(signal.SIGINT)
END_S = 6.0
ROOT = Path(__file__).resolve().parents[4]


def run(scene: Scene) -> None:
    scene.drop_node()  # its task's server would be seen as a foreign process
    xml = scene.scratch / "suite.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-rP", "-p", "no:cacheprovider"]
    command += [f"--junitxml={xml}", f"--timeout={max(scene.left_s - 5, 5):.0f}"]
    env = dict(os.environ)
    if scene.xid:
        env["FLOWMESH_TEST_XID"] = "1"
    status = pytest(command, env, scene)
    text = (scene.out / "pytest.log").read_text(errors="replace")
    if not xml.exists():
        scene.row("tests/gpu", ok=False, why=f"pytest ended with {status}", evidence={"pytest": text[-3000:]})
        return
    cases = list(ET.parse(xml).getroot().iter("testcase"))
    passed = 0
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if bad is not None:
            said = bad.get("message", "")[:300]
            scene.row(name, ok=False, why=said, evidence={"pytest": (bad.text or "")[-3000:]})
        elif skipped is not None:
            scene.skip(name, skipped.get("message", ""))
        else:
            passed += 1
    scene.row(
        "tests/gpu", ok=status in (0, STOPPED), value=f"{passed} of {len(cases)} passed", why="see the other rows"
    )
    if status == STOPPED:
        scene.skip("the rest of tests/gpu", "the step's time was over")
    if scene.dry:
        changes = Path(f"{os.environ[runners.STUB]}.changes")
        text = changes.read_text() if changes.exists() else ""
        scene.row("nobody changed a setting of the device", ok=not text, value=text or "no such call", why=text)


def pytest(command: list[str], env: dict[str, str], scene: Scene) -> int:
    """Run it within the step's time, after which it is interrupted, so that it still reports; returns its status."""
    with open(scene.out / "pytest.log", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        return process.wait(max(scene.left_s - END_S, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(END_S - 1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return STOPPED
