"""What an Xid, the driver's number for a fault, means for the GPU and for the task that ran on it.

Numbers and actions are from NVIDIA's Xid catalogue,
https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html (its "immediate action" column).
"""

from __future__ import annotations

import enum


class XidVerdict(enum.StrEnum):
    APPLICATION = "application"
    """Caused by the task, or a fault that ended with its process: the task failed, the GPU is fine."""
    DEVICE = "device"
    """The GPU must not be used until a canary has run on it."""
    IGNORE = "ignore"
    """Follows another Xid, or is only information for the operator."""


# RESTART_APP in the catalogue: a new process on the same GPU is enough.
_APPLICATION = {
    *{8, 11, 13, 25, 31, 32, 60, 68, 69, 80, 94},
    *{39, 40, 41, 70, 71, 72, 75, 76, 77, 85, *range(126, 136)},  # copy engines
    *{82, 83, 84, 86, 88, 89, *range(96, 106), 139},  # video, JPEG and optical flow engines
    # IGNORE in the catalogue as far as the GPU is concerned; the process that used the channel is stopped anyway.
    *{43, 137},
}

# IGNORE in the catalogue, or reported only together with another Xid (45, 154, 171, 172).
_IGNORE = {
    14,
    37,
    38,
    44,
    45,
    63,
    66,
    67,
    92,
    93,
    106,
    107,
    108,
    121,
    141,
    152,
    153,
    154,
    157,
    *range(160, 166),
    171,
    172,
}

_NAMES = {
    8: "a channel timed out",
    13: "exception in a kernel, such as an illegal address or instruction",
    31: "page fault of a kernel: it accessed unmapped memory",
    32: "corrupt command stream",
    43: "a channel was reset",
    45: "channels removed after an earlier fault",
    46: "the GPU stopped processing",
    48: "uncorrectable double-bit memory error",
    62: "a microcontroller of the GPU halted",
    63: "a faulty memory row was remapped",
    64: "a faulty memory row could not be remapped",
    68: "exception in the video decoder",
    69: "invalid command class",
    74: "NVLink error",
    79: "the GPU fell off the PCIe bus",
    92: "many corrected memory errors",
    94: "memory error, contained to one process",
    95: "memory error, not contained",
    109: "context switch timed out",
    110: "security fault",
    119: "the GPU's system processor did not answer",
    120: "error of the GPU's system processor",
    136: "NVLink training failed",
    137: "illegal access over NVLink",
    140: "unrecovered memory error",
    143: "the GPU could not be initialised",
    154: "the driver changed its advice on recovery",
    158: "fatal timeout",
}


def xid_verdict(xid: int) -> XidVerdict:
    """Whether an Xid concerns the task or the GPU. One that is not in the catalogue is taken for a fault of the GPU."""
    if xid in _APPLICATION:
        return XidVerdict.APPLICATION
    return XidVerdict.IGNORE if xid in _IGNORE else XidVerdict.DEVICE


def describe_xid(xid: int) -> str:
    """`Xid 79 (the GPU fell off the PCIe bus)`"""
    if 144 <= xid <= 150:
        return f"Xid {xid} (NVLink error)"
    return f"Xid {xid} ({_NAMES[xid]})" if xid in _NAMES else f"Xid {xid}"
