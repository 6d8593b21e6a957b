"""P3: a filled disk. The faults of the matrix that need a small disk of their own, each once, with the same checks."""

from __future__ import annotations

import os
import random

import pytest

from tests.faults.faults import FAULTS, Fault
from tests.faults.rig import Rig

pytestmark = [
    pytest.mark.redis,
    pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs of its own needs root"),
]


@pytest.mark.parametrize("fault", [each for each in FAULTS if each.disk], ids=lambda fault: fault.name)
def test_p3_a_full_disk_costs_no_node_and_no_task_its_end(fault: Fault) -> None:
    with Rig(disk=fault.disk) as rig:
        rig.begin()
        fault.act(rig, random.Random(1))
        rig.check()
        rig.settle()
