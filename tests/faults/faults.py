"""All faults, in the order of the table."""

from __future__ import annotations

# isort: off
from tests.faults import supervisor  # noqa: F401
from tests.faults import server  # noqa: F401
from tests.faults import child  # noqa: F401
from tests.faults import rows  # noqa: F401
from tests.faults import pipe  # noqa: F401
from tests.faults import delivery  # noqa: F401
from tests.faults import serve  # noqa: F401
from tests.faults import webhooks  # noqa: F401
from tests.faults import ranks  # noqa: F401
from tests.faults import command  # noqa: F401
from tests.faults import clock  # noqa: F401
from tests.faults import disks  # noqa: F401
from tests.faults import node  # noqa: F401
from tests.faults import redis  # noqa: F401
from tests.faults import dispatch  # noqa: F401
from tests.faults import fleet  # noqa: F401
from tests.faults import gangs  # noqa: F401
from tests.faults import page  # noqa: F401

# isort: on
from tests.faults.table import FAULTS, Fault

__all__ = ["FAULTS", "Fault"]
