"""When a GPU counts as given back: the decision alone, by properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowmesh.node.devices import GpuLost, GpuProcess, GpuSample
from flowmesh.node.release_state import Baseline, GpuState, judge

MIB = 1 << 20
TOLERANCE = 64 * MIB

sizes = st.integers(0, 80 << 30)
pids = st.integers(2, 1 << 22)
processes = st.lists(st.builds(GpuProcess, pids, sizes), max_size=4, unique_by=lambda each: each.pid).map(tuple)


def look(used_bytes: int, on_it: tuple[GpuProcess, ...] | None = ()) -> GpuSample:
    return GpuSample(uuid="GPU-a", board="GPU-a", used_bytes=used_bytes, processes=on_it)


def drawn(used_bytes: int, *by: GpuProcess) -> GpuSample:
    return GpuSample(uuid="GPU-a", board="GPU-a", used_bytes=used_bytes, graphics=by)


def before(used_bytes: int, on_it: tuple[GpuProcess, ...] = ()) -> Baseline:
    return Baseline("GPU-a", used_bytes, on_it)


@given(sizes, processes, st.sets(pids))
def test_a_gpu_as_it_was_is_released(used_bytes: int, on_it: tuple[GpuProcess, ...], own: set[int]) -> None:
    own -= {process.pid for process in on_it}
    assert judge(before(used_bytes, on_it), look(used_bytes, on_it), own) is GpuState.RELEASED


@given(sizes, processes, sizes, st.booleans())
def test_a_process_of_the_task_holds_it_whatever_the_bytes_say(
    used_bytes: int, on_it: tuple[GpuProcess, ...], base: int, allow_foreign: bool
) -> None:
    on_it = (*on_it, GpuProcess(1, None))
    assert judge(before(base), look(used_bytes, on_it), {1}, allow_foreign=allow_foreign) is GpuState.HELD


@given(sizes, st.integers(1, 1 << 40))
def test_bytes_over_the_tolerance_are_a_leak_and_up_to_it_are_not(used_bytes: int, more: int) -> None:
    state = judge(before(used_bytes), look(used_bytes + more), (), tolerance_bytes=TOLERANCE)
    assert state is (GpuState.LEAKED if more > TOLERANCE else GpuState.RELEASED)


@given(sizes, sizes)
def test_where_processes_are_not_told_bytes_decide(base: int, used_bytes: int) -> None:
    state = judge(before(base), look(used_bytes, None), (7,), tolerance_bytes=TOLERANCE)
    assert state is (GpuState.LEAKED if used_bytes - base > TOLERANCE else GpuState.RELEASED)


@given(sizes, processes, sizes)
def test_a_newcomer_is_foreign_and_where_that_is_allowed_its_bytes_do_not_count(
    base: int, on_it: tuple[GpuProcess, ...], size: int
) -> None:
    newcomer = GpuProcess(1, size)
    now = look(base + size, (*on_it, newcomer))
    assert judge(before(base, on_it), now, ()) is GpuState.FOREIGN
    assert judge(before(base, on_it), now, (), allow_foreign=True) is GpuState.RELEASED


@given(sizes, st.integers(65 * MIB, 1 << 40))
def test_who_was_there_before_does_not_hide_a_leak_by_leaving(base: int, size: int) -> None:
    gone = GpuProcess(9, size)
    assert judge(before(base + size, (gone,)), look(base), ()) is GpuState.RELEASED
    assert judge(before(base + size, (gone,)), look(base + size), ()) is GpuState.LEAKED


@given(sizes, st.integers(0, 1 << 40))
def test_who_was_there_before_may_grow(base: int, growth: int) -> None:
    then, now = GpuProcess(9, 5 * MIB), GpuProcess(9, 5 * MIB + growth)
    assert judge(before(base, (then,)), look(base + growth, (now,)), ()) is GpuState.RELEASED


def test_a_gpu_that_does_not_answer_is_not_released() -> None:
    assert judge(before(0), GpuLost("GPU-a", "GPU is lost"), ()) is GpuState.LOST


@given(sizes, sizes, sizes)
def test_a_display_server_may_come_grow_and_go(base: int, then: int, now: int) -> None:
    baseline = Baseline.of(drawn(base + then, GpuProcess(9, then)))
    assert judge(baseline, drawn(base + now, GpuProcess(9, now)), (1,)) is GpuState.RELEASED
    assert judge(baseline, drawn(base), (1,)) is GpuState.RELEASED
    assert judge(baseline, drawn(base + now + 65 * MIB, GpuProcess(9, now)), (1,)) is GpuState.LEAKED


def test_a_process_of_the_task_holds_it_also_where_it_only_draws() -> None:
    assert judge(before(0), drawn(0, GpuProcess(1, None)), {1}) is GpuState.HELD


def test_bytes_prove_nothing_beside_somebody_who_may_be_there_and_of_whom_nobody_knows_how_much() -> None:
    now = look(9 << 30, (GpuProcess(9, None),))
    assert judge(before(0), now, (), allow_foreign=True) is GpuState.RELEASED
    assert judge(before(0), now, (9,), allow_foreign=True) is GpuState.HELD
    assert judge(before(0), now, ()) is GpuState.FOREIGN
