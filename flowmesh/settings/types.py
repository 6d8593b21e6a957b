"""The types of settings: each a pattern or a range, and the description that errors show."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from msgspec import Meta

PositiveSeconds = Annotated[float, Meta(gt=0, le=366 * 86400)]
Name = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z",
        description="1 to 128 letters, digits or . _ : - that start with a letter or a digit",
    ),
]
FilePath = Annotated[str, Meta(pattern=r"\A[^\x00]{1,4096}\Z", description="a path")]
AbsolutePath = Annotated[str, Meta(pattern=r"\A/[^\x00]{0,4095}\Z", description="an absolute path")]
Word = Annotated[str, Meta(pattern=r"\A\S+( \S+)*\Z", description="text that is not empty, without spaces around it")]
Token = Annotated[str, Meta(pattern=r"\A[\x21-\x7e]+\Z", description="visible ASCII characters without spaces")]
Bucket = Annotated[
    str,
    Meta(
        pattern=r"\As3://[A-Za-z0-9.*_-]+(/[^\x00-\x1f]*)?\Z",
        description="s3://BUCKET or s3://BUCKET/PREFIX (* allowed)",
    ),
]
VariableName = Annotated[
    str, Meta(pattern=r"\A[A-Za-z_*][A-Za-z0-9_*]*\Z", description="the name of an environment variable (* allowed)")
]
KeyPlace = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z_*][A-Za-z0-9_*]*@[^\s@]+\Z",
        description="VARIABLE@HOST or VARIABLE@HOST:PORT (* allowed)",
    ),
]
ServeAddress = Annotated[
    str, Meta(pattern=r"\A(\*|[0-9.]{7,15}|[0-9a-f:.]{2,45})\Z", description="an IP address such as 127.0.0.1, or *")
]
ModuleName = Annotated[
    str, Meta(pattern=r"\A[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\Z", description="the dotted name of a Python module")
]
Moment = Annotated[
    str,
    Meta(pattern=r"\A[0-9][0-9A-Za-z.:+ -]{3,39}\Z", description="a time such as 2026-12-01T18:00:00Z"),
]
RunnerName = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z", description="module:Class"),
]
Umask = Annotated[str, Meta(pattern=r"\A0?[0-7]{3}\Z", description='an octal mask such as "0027"')]
SlotName = Annotated[
    str,
    Meta(
        pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z",
        description="1 to 32 letters, digits or . _ - that start with a letter or a digit",
    ),
]
GpuName = (
    Annotated[int, Meta(ge=0, le=1023, description="a GPU's index")]
    | Annotated[str, Meta(pattern=r"\A(GPU|MIG)-[A-Za-z0-9/-]{1,100}\Z", description='its UUID ("GPU-…" or "MIG-…")')]
)
HostName = Annotated[
    str, Meta(pattern=r"\A[A-Za-z0-9]([A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?\Z", description="a host's name or IP address")
]
PortRange = Annotated[
    str, Meta(pattern=r"\A[1-9][0-9]{0,4}-[1-9][0-9]{0,4}\Z", description='two ports such as "29500-29599"')
]
CpuList = Annotated[
    str,
    Meta(pattern=r"\A\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*\Z", description='CPU numbers such as "0-7,16"'),
]


Warm = bool | Literal["at start", "on first use"]
"""Whether an environment's libraries are imported before its first task."""


class LogLevel(enum.StrEnum):
    TRACE = "TRACE"
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


class Isolation(enum.StrEnum):
    """How a task's processes are kept together, so that all of them can be found and killed."""

    AUTO = "auto"
    """cgroup where the node has permission, else subreaper."""
    CGROUP = "cgroup"
    SUBREAPER = "subreaper"


class SlotsMode(enum.StrEnum):
    """How a node is divided into slots. Each slot is a worker that runs one task at a time."""

    ALL = "all"
    """One slot with everything."""
    PER_GPU = "per-gpu"
    """One slot for each GPU; the CPUs are shared."""
