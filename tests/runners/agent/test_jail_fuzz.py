"""The jail's two inputs, its plan and every system call there is: none finds a gap in what is checked."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners.agent import sandbox
from runners.agent.command import Bounds
from runners.agent.sandbox import MODES, Sandbox, mode_works

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003, "arm": 0x40000028}
OTHERS = (0, 0x40000003, 0xC0000016, 0x80000016, 0xFFFFFFFF)
JAILS = [
    {"families": (1, 2, 10, 16), "shares_machine": False},
    {"families": (2, 10, 16), "shares_machine": False},
    {"families": (), "shares_machine": True},
    {"families": (2, 10, 16), "shares_machine": True},
    {"families": (2, 10, 16), "shares_machine": True, "signals_confined": False},
]
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def jail() -> dict[str, ModuleType]:
    """Its modules, imported as the jail does: from its folder, without the package."""
    sys.path.insert(0, str(sandbox.JAIL.parent))
    try:
        return {name: __import__(name) for name in ("kernel", "numbers_of_calls", "plan", "seccomp")}
    finally:
        sys.path.remove(str(sandbox.JAIL.parent))


def run_filter(program: bytes, architecture: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel's interpreter of the filter does, for the instructions that are used.

    Raises:
        AssertionError: an instruction that is not known, a jump out of the program, or an end without a verdict.
    """
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
    lines = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        assert at < len(lines)
        code, if_true, if_false, value = lines[at]
        at += 1
        match code:
            case 0x20:
                accumulator = struct.unpack_from("=I", data, value)[0]
            case 0x54:
                accumulator &= value
            case 0x15 | 0x25 | 0x35 | 0x45:
                taken = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value,
                         0x45: bool(accumulator & value)}[code]  # fmt: skip
                at += if_true if taken else if_false
            case 0x06:
                return value
            case _:
                raise AssertionError(f"instruction {code:#x}")


@cache
def _program(machine: str, index: int) -> bytes:
    modules = sys.modules
    real = modules["platform"].machine
    modules["platform"].machine = lambda: machine
    try:
        chosen = dict(JAILS[index])
        return bytes(modules["seccomp"].program(chosen.pop("families"), **chosen))
    finally:
        modules["platform"].machine = real


machines = st.sampled_from(["x86_64", "aarch64"])
jails = st.integers(0, len(JAILS) - 1)


@settings(max_examples=300, deadline=None)
@given(machines, jails, st.one_of(st.integers(0, 520), u32), st.tuples(u64, u64, u64, u64, u64, u64))
def test_every_call_has_a_verdict(jail, machine, index, number, arguments) -> None:
    verdict = run_filter(_program(machine, index), ARCHITECTURES[machine], number, arguments)
    assert verdict == ALLOW or verdict & 0xFFFF0000 == ERRNO


@settings(max_examples=200, deadline=None)
@given(machines, jails, st.one_of(st.sampled_from([*OTHERS, *ARCHITECTURES.values()]), u32), u32)
def test_other_architectures_kill(jail, machine, index, architecture, number) -> None:
    """As 32-bit calls of x86, whose numbers mean other calls."""
    if architecture != ARCHITECTURES[machine]:
        assert run_filter(_program(machine, index), architecture, number) == KILL


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("index", range(len(JAILS)))
def test_each_number_of_the_table(machine, index, jail) -> None:
    """Refused: all of x32, numbers that are no call or came after the table, and the named ones."""
    numbers, program = jail["numbers_of_calls"], _program(machine, index)
    seccomp, architecture = jail["seccomp"], ARCHITECTURES[machine]
    known = numbers.NUMBERS[machine]
    for number in range(numbers.LAST + 200):
        assert run_filter(program, architecture, numbers.X32 | number) == ERRNO | errno.EPERM
        first, last = numbers.GAP[machine]
        if number > numbers.LAST or first <= number <= last:
            assert run_filter(program, architecture, number) == ERRNO | errno.ENOSYS
    for name in (*seccomp._PRIVILEGED, *seccomp._UNCOUNTED):
        if name in known:
            assert run_filter(program, architecture, known[name]) == ERRNO | errno.EPERM, name
    for name in seccomp._EXTENDED:
        assert run_filter(program, architecture, known[name]) == ERRNO | errno.EOPNOTSUPP, name
    ordinary = set(range(numbers.GAP[machine][0])) - set(known.values())
    assert {run_filter(program, architecture, number) for number in ordinary} == {ALLOW}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_numbers_are_those_of_the_kernel(machine, jail) -> None:
    """Where its headers are installed."""
    header = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
    try:
        lines = Path(header[machine]).read_text().splitlines()
    except OSError:
        pytest.skip("the kernel's headers are not installed")
    words = [line.replace("3264_", "").split() for line in lines if line.startswith("#define __NR_")]
    official = {word[1].removeprefix("__NR_"): int(word[2]) for word in words if len(word) > 2 and word[2].isdigit()}
    ours = jail["numbers_of_calls"].NUMBERS[machine]
    assert {name: number for name, number in ours.items() if official.get(name, number) != number} == {}
    assert len(ours.keys() & official.keys()) > 90


@settings(max_examples=200, deadline=None)
@given(machines, jails, st.integers(0, 0o177777), st.integers(0, 2**32 - 1))
def test_no_mode_with_set_id_passes(jail, machine, index, mode, flags) -> None:
    seccomp, known = jail["seccomp"], jail["numbers_of_calls"].NUMBERS[machine]
    program, architecture = _program(machine, index), ARCHITECTURES[machine]
    shared = JAILS[index]["shares_machine"]
    for name, argument in seccomp._MODES.items():
        if name in known:
            verdict = run_filter(program, architecture, known[name], (0,) * argument + (mode,))
            refused = bool(mode & 0o6000) or (shared and name in seccomp._OF_FILES_OUTSIDE)
            assert verdict == (ERRNO | errno.EPERM if refused else ALLOW), name
    for name, argument in seccomp._OPENS.items():
        if name in known:
            verdict = run_filter(program, architecture, known[name], (0,) * argument + (flags, mode))
            refused = bool(mode & 0o6000) and bool(flags & 0o20000100)
            assert verdict == (ERRNO | errno.EPERM if refused else ALLOW), name


@settings(max_examples=200, deadline=None)
@given(machines, jails, st.tuples(u64, u64, u64))
def test_arguments_of_memory_and_sockets(jail, machine, index, arguments) -> None:
    first, second, third = arguments
    known = jail["numbers_of_calls"].NUMBERS[machine]
    program, architecture = _program(machine, index), ARCHITECTURES[machine]

    def allows(name: str, *arguments: int) -> bool:
        return run_filter(program, architecture, known[name], arguments) == ALLOW

    low = [each & 0xFFFFFFFF for each in arguments]
    families = JAILS[index]["families"]
    assert allows("mmap", 0, 0, 0, first) == ((low[0] & 0x21) != 0x21 and not low[0] & 0x40000)
    assert allows("clone", first) == (not low[0] & 0x7E020000)
    protocols = {1: (low[2],), 2: (0, 1, 6, 17, 58), 10: (0, 1, 6, 17, 58), 16: (0,)}
    assert allows("socket", first, second, third) == (low[0] in families and low[2] in protocols[low[0]])
    for family, protocol in ((2, 6), (10, 17), (16, 0), (16, 4), (2, 132), (17, 0), (38, 0), (40, 0)):
        expected = family in families and protocol in protocols[family]
        assert allows("socket", family, second, protocol) == expected
    kind = second & 0xF
    assert allows("socketpair", 1, second) == (1 in families or kind in (1, 5))
    assert allows("socketpair", first, second) == (low[0] == 1 and (1 in families or kind in (1, 5)))
    assert not allows("fcntl", 0, 1031 | low[0] << 32)
    pretended = run_filter(program, architecture, known["setsockopt"], (0, 1, 7 + (low[0] & 1)))
    assert pretended == ERRNO


CALLS = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
for number in map(int, sys.argv[1].split(",")):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
    print(number, 0 if result >= 0 else ctypes.get_errno())
"""


@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_refuses_what_the_table_refuses(mode, tmp_path, jail) -> None:
    """Every refused number for real, x32 included; the arguments would fail anyway, with another error."""
    if reason := mode_works(mode):
        pytest.skip(f"this system has no {mode}: {reason}")
    machine, numbers = os.uname().machine, jail["numbers_of_calls"]
    box = Sandbox(tmp_path / "work", Bounds(timeout_s=60), mode=mode)
    program = _program(machine, {"namespaces": 0, "landlock": 2}[mode])
    expected = {}
    for number in (*range(numbers.LAST + 30), *range(numbers.X32, numbers.X32 + numbers.LAST, 7)):
        verdict = run_filter(program, ARCHITECTURES[machine], number, (2**64 - 1,) * 6)
        if verdict & 0xFFFF0000 == ERRNO:
            expected[number] = verdict & 0xFFFF
    ended = box.run(["python", "-c", CALLS, ",".join(map(str, expected))], lambda: None)
    assert dict(tuple(map(int, line.split())) for line in ended.output.splitlines()) == expected


@pytest.mark.parametrize("mode", MODES)
def test_calls_of_another_abi_end_the_program(mode, tmp_path) -> None:
    """`int 0x80`: i386's numbers on x86_64; 90 is mmap there, and chmod here."""
    if os.uname().machine != "x86_64":
        pytest.skip("another instruction on this machine")
    if reason := mode_works(mode):
        pytest.skip(f"this system has no {mode}: {reason}")
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
page.write(bytes.fromhex("89f8cd80c3"))  # mov eax, edi; int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("begun", flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(address)(20))
"""
    ended = Sandbox(tmp_path / "work", Bounds(timeout_s=60), mode=mode).run(["python", "-c", code], lambda: None)
    assert ended.output == "begun\n"
    assert ended.code == 128 + signal.SIGSYS


PLAN: dict[str, Any] = {
    "mode": "namespaces", "network": False, "root": "/tmp/root", "work_dir": "/tmp/work", "readable": ["/usr"],
    "env": {"A": "b"}, "tasks": 10, "tasks_of_user": 0, "disk_bytes": 1000, "in_memory": True,
    "limits": {"RLIMIT_CORE": 0}, "cgroups": [], "report": -1,
}  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
paths = st.sampled_from(["/", "", "//", "/..", "/a/../b", "a", "/a\0b", "/\ud800", "/a/..", "//a", "/./a"])


def test_the_plan_of_this_test_is_one(jail) -> None:
    assert jail["plan"].parse(json.dumps(PLAN)).readable == ("/usr",)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), anything.map(json.dumps), st.binary().map(lambda data: data.decode("latin-1"))))
def test_a_text_is_a_plan_or_refused(jail, text) -> None:
    with pytest.raises(jail["plan"].PlanRefused):
        jail["plan"].parse(text)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(PLAN)), anything | paths | paths.map(lambda path: [path]))
def test_each_field_is_checked(jail, field, value) -> None:
    """What is accepted has the field's type, and paths that stay where they are put."""
    try:
        plan = jail["plan"].parse(json.dumps({**PLAN, field: value}))
    except jail["plan"].PlanRefused:
        return
    for path in (plan.root, plan.work_dir, *plan.readable, *plan.cgroups):
        assert os.path.normpath("/x" + path).startswith("/x/")
        os.fsencode(path)
    assert plan.mode in MODES
    assert all(isinstance(getattr(plan, name), bool) for name in ("network", "in_memory"))
    assert min(plan.tasks, plan.disk_bytes) >= 1
    for name, each in plan.env.items():
        assert name
        assert "=" not in name
        assert b"\0" not in os.fsencode(name + each)


@pytest.mark.parametrize("field", [None, "extra", *sorted(PLAN)])
def test_a_plan_that_lacks_a_field_runs_nothing(field, tmp_path) -> None:
    mark = tmp_path / "ran"
    plan = {name: value for name, value in PLAN.items() if name != field} | ({"extra": 1} if field == "extra" else {})
    text = json.dumps(plan) if field is not None else "{"
    command = [sys.executable, "-I", "-S", str(sandbox.JAIL), text, "/bin/touch", str(mark)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 97
    assert ended.stderr.startswith("jail: the plan ")
    assert not mark.exists()


@pytest.mark.parametrize("arguments", [[], [json.dumps(PLAN)], [json.dumps(PLAN), ""]])
def test_no_command_is_refused(arguments) -> None:
    command = [sys.executable, "-I", "-S", str(sandbox.JAIL), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (97, "jail: expected a plan and a command\n")


def test_this_machine_is_little_endian_and_64_bit() -> None:
    """As the filter's loads assume."""
    assert (sys.byteorder, ctypes.sizeof(ctypes.c_void_p)) == ("little", 8)
