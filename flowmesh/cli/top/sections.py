"""The sections of the view: each makes its lines for a width."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from rich.text import Text

from flowmesh.cli import chart, render
from flowmesh.cli.render import Column
from flowmesh.cli.top import cells
from flowmesh.cli.top.cells import UNKNOWN, Cell
from flowmesh.cli.top.picture import End, Gpu, Host, Picture, Server, Task

HOT_C = 85
OLD_SAMPLE_S = 90.0
"""A reading this old is marked: an idle GPU is sampled with each heartbeat."""
WIDE = 120

_GPUS = (
    Column("GPU"),
    Column("NAME", least=8, drop=2),
    Column("USE"),
    Column("MEMORY"),
    Column("POWER"),
    Column("TEMP"),
    Column("WORKER", least=8, drop=1),
    Column("NOTE", least=6),
)
_WORKERS = (
    Column("WORKER", least=12),
    Column("STATUS", least=8),
    Column("GPUS", drop=4),
    Column("USE"),
    Column("MEMORY", drop=3),
    Column("POWER", drop=2),
    Column("TEMP", drop=5),
    Column("LOAD", drop=6),
    Column("QUEUE", drop=1),
    Column("SEEN"),
)
_TASKS = (
    Column(" "),
    Column("TASK", least=16),
    Column("TYPE", least=5, drop=4),
    Column("WORKER", least=7, drop=3),
    Column("PHASE", least=7),
    Column("PROGRESS"),
    Column("RATE", drop=1),
    Column("TIME"),
    Column("ENERGY", drop=2),
    Column("COST", drop=5),
)
_QUEUE = (Column(" "), Column("TASK", least=12), Column("TYPE", least=4, drop=1), Column("WORKER", least=6, drop=2),
          Column("WAITS"))  # fmt: skip
_DELIVERIES = (Column(" "), Column("TASK", least=12), Column("WAITS FOR", least=10))
_ENDS = (
    Column("TASK", least=14),
    Column("VERDICT"),
    Column("ENDED", drop=2),
    Column("TOOK", drop=1),
    Column("ENERGY", drop=3),
    Column("COST", drop=4),
    Column("ERROR", least=26),
)


def title(name: str, *facts: str) -> Text:
    """The headline of a section."""
    text = Text(name, style="bold")
    if facts := tuple(fact for fact in facts if fact):
        text.append("  " + ", ".join(facts), style="not bold bright_black")
    return text


def joules(value: float | None) -> str:
    """An energy, short: 812 J, 4.2 kJ, 1.3 MJ."""
    if value is None:
        return UNKNOWN
    for limit, size, unit in ((1e3, 1.0, "J"), (1e6, 1e3, "kJ"), (float("inf"), 1e6, "MJ")):
        if value < limit:
            return f"{value / size:.0f} {unit}" if value / size >= 100 or size == 1.0 else f"{value / size:.1f} {unit}"
    return UNKNOWN


def dollars(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if 0 < value < 0.0001:
        return "<$0.0001"
    return f"${value:.4f}" if value < 0.01 else f"${value:.2f}"


def _watts(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f} W"


def _celsius(value: float | None) -> Text:
    return Text(UNKNOWN) if value is None else Text(f"{value:.0f} °C", style="red" if value >= HOT_C else "")


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _memory(gpu: Gpu) -> str:
    used = UNKNOWN if gpu.memory_used_bytes is None else render.gib(gpu.memory_used_bytes).removesuffix("G")
    return used if not gpu.memory_total_bytes else f"{used}/{gpu.memory_total_bytes / 2**30:.0f}G"


def _use(gpu: Gpu) -> float | None:
    return None if gpu.utilization_percent is None else gpu.utilization_percent / 100


def gpus(picture: Picture, width: int) -> list[Text]:
    """One line a GPU, below their headers."""
    size = 20 if width >= WIDE else 8
    rows: list[list[Cell]] = []
    for gpu in picture.gpus:
        use, memory = _use(gpu), _share(gpu.memory_used_bytes, gpu.memory_total_bytes)
        rows.append(
            [
                UNKNOWN if gpu.index is None else str(gpu.index),
                gpu.name.removeprefix("NVIDIA "),
                Text.assemble(cells.meter(use, size), f" {cells.percent(use):>4}"),
                Text.assemble(cells.meter(memory, size, warn=0.97), f" {_memory(gpu):>7}"),
                _watts(gpu.power_w),
                _celsius(gpu.temperature_c),
                gpu.worker_id or UNKNOWN,
                _note(gpu),
            ]
        )
    columns = _GPUS if any(_note(gpu).plain for gpu in picture.gpus) else _GPUS[:-1]
    return cells.grid(columns, [row[: len(columns)] for row in rows], width)


def _note(gpu: Gpu) -> Text:
    if gpu.trouble:
        return cells.cell(gpu.trouble, "red")
    if gpu.throttled:
        return cells.cell("throttled: " + ", ".join(gpu.throttled), "yellow")
    if gpu.sampled_s_ago is not None and gpu.sampled_s_ago > OLD_SAMPLE_S:
        return Text(f"{render.seconds(gpu.sampled_s_ago)} ago", style="yellow")
    return Text("")


def gpus_short(picture: Picture, width: int) -> list[Text]:
    """Several GPUs on a line, for screens with few lines."""
    items = []
    for gpu in picture.gpus:
        use = _use(gpu)
        text = Text(f"{UNKNOWN if gpu.index is None else gpu.index:>2} ")
        text.append_text(cells.meter(use, 6)).append(f" {cells.percent(use):>4} {_memory(gpu):>7}")
        text.append(f" {_watts(gpu.power_w):>5} ").append_text(_celsius(gpu.temperature_c))
        if gpu.trouble or gpu.throttled:
            text.stylize("red" if gpu.trouble else "yellow")
            text.append(" !")
        items.append(text)
    size = max(item.cell_len for item in items)
    for item in items:
        item.pad_right(size - item.cell_len)
    return cells.flow(items, width)


def host(found: Host, width: int) -> list[Text]:
    """CPU and memory of the machine."""
    size = 20 if width >= WIDE else 10
    memory = _share(found.memory_used_bytes, found.memory_total_bytes)
    cpu = Text.assemble("CPU ", cells.meter(found.cpu_percent / 100, size), f" {found.cpu_percent:.0f}%")
    cpu.append(f" of {render.count(found.cpus, 'core')}")
    used = f" {render.gib(found.memory_used_bytes)} of {render.gib(found.memory_total_bytes)}"
    return cells.flow([cpu, Text.assemble("memory ", cells.meter(memory, size, warn=0.95), used)], width)


def slots(picture: Picture, width: int) -> list[Text]:
    """The node's slots side by side; each that takes no tasks has a line with the reason."""
    items = []
    for slot in picture.slots:
        item = Text.assemble(cells.cell(slot.name or slot.worker_id), " ", cells.status(slot.status))
        if len(picture.slots) == 1:
            item.append("  ").append_text(cells.cell(slot.worker_id, "bright_black"))
            if slot.gpus:
                item.append(f"  {render.count(slot.gpus, 'GPU')}", style="bright_black")
        items.append(item)
    return cells.flow(items, width) + reasons(picture, width)


def reasons(picture: Picture, width: int) -> list[Text]:
    """A line for each slot that takes no tasks. GPUs are called by their indices in it: a UUID takes half a line."""
    index_of = {gpu.uuid: f"GPU {gpu.index}" for gpu in picture.gpus if gpu.uuid and gpu.index is not None}
    lines = []
    for slot in picture.slots:
        if slot.reason:
            reason = slot.reason
            for uuid, name in index_of.items():
                reason = reason.replace(uuid, name)
            lines.append(cells.fitted(cells.cell(f" {slot.name or slot.worker_id}: {reason}", "red"), width))
    return lines


def workers(picture: Picture, width: int) -> list[Text]:
    """A deployment's workers, one a line, with their GPUs together."""
    size = 12 if width >= WIDE else 6
    rows: list[list[Cell]] = []
    for slot in picture.slots:
        mine = [gpu for gpu in picture.gpus if gpu.worker_id == slot.worker_id]
        uses = [use for gpu in mine if (use := _use(gpu)) is not None]
        used = [gpu.memory_used_bytes for gpu in mine if gpu.memory_used_bytes is not None]
        total = sum(gpu.memory_total_bytes or 0 for gpu in mine)
        power = [gpu.power_w for gpu in mine if gpu.power_w is not None]
        hottest = max((gpu.temperature_c for gpu in mine if gpu.temperature_c is not None), default=None)
        use = sum(uses) / len(uses) if uses else None
        memory = f"{sum(used) / 2**30:.0f}/{total / 2**30:.0f}G" if used and total else UNKNOWN
        rows.append(
            [
                slot.worker_id,
                cells.status(slot.status),
                str(slot.gpus or "none"),
                Text.assemble(cells.meter(use, size), f" {cells.percent(use):>4}") if mine else UNKNOWN,
                memory,
                _watts(sum(power) if power else None),
                _celsius(hottest),
                UNKNOWN if slot.load_1m is None else f"{slot.load_1m:.1f}",
                UNKNOWN if slot.queued is None else str(slot.queued),
                "never" if slot.seen_s_ago is None else f"{render.seconds(slot.seen_s_ago)} ago",
            ]
        )
    return cells.grid(_WORKERS, rows, width)


def tasks(found: Sequence[Task], width: int, selected: str | None, *, alone: bool) -> list[Text]:
    """The running tasks.

    Args:
        alone: there is one worker, which need not be named.
    """
    size = 16 if width >= WIDE else 8
    rows: list[list[Cell]] = [
        [
            _mark(task, selected),
            task.task_id,
            task.task_type or UNKNOWN,
            task.worker_id or UNKNOWN,
            (task.phase or UNKNOWN) if task.state == "running" else cells.cell(task.state, "yellow"),
            progress(task, size),
            rate(task, size - 2),
            UNKNOWN if task.elapsed_s is None else render.seconds(task.elapsed_s),
            joules(task.gpu_joules),
            dollars(task.cost_usd),
        ]
        for task in found
    ]
    skip = {"WORKER"} if alone else set()
    if all(task.gpu_joules is None for task in found):
        skip.add("ENERGY")
    return _marked(_without(_TASKS, rows, skip, width), found, selected)


def progress(task: Task, size: int) -> Cell:
    """A bar and its percentage; without a known total the amount that is done."""
    if task.total:
        share = min(1.0, max(0.0, (task.done or 0.0) / task.total))
        return Text.assemble(cells.meter(share, size), f" {cells.percent(share):>4}")
    return UNKNOWN if task.done is None else f"{task.done:g} {task.unit}".strip()


def rate(task: Task, size: int) -> Cell:
    """The loss or the tokens each second, with its course."""
    for name, label in (("loss", "loss {:.4g}"), ("tokens_per_s", "{:.0f} tok/s")):
        points = task.trend.get(name, ())
        value = task.metrics.get(name, points[-1] if points else None)
        if value is not None:
            return Text.assemble(label.format(value), " ", (chart.spark(points, size), "magenta"))
    return UNKNOWN


def queue(found: Sequence[Task], width: int, selected: str | None, *, alone: bool) -> list[Text]:
    """The first tasks that wait."""
    rows: list[list[Cell]] = [
        [
            _mark(task, selected),
            task.task_id,
            task.task_type or UNKNOWN,
            task.worker_id or UNKNOWN,
            UNKNOWN if task.queued_s is None else render.seconds(task.queued_s),
        ]
        for task in found
    ]
    return _marked(_without(_QUEUE, rows, {"WORKER"} if alone else set(), width), found, selected)


def deliveries(found: Sequence[Task], width: int, selected: str | None) -> list[Text]:
    """The tasks whose results are on their way."""
    rows: list[list[Cell]] = [
        [
            _mark(task, selected),
            task.task_id,
            cells.cell(task.waits_for, "yellow") if task.waits_for else "being sent",
        ]
        for task in found
    ]
    return _marked(cells.grid(_DELIVERIES, rows, width), found, selected)


def ends(found: Sequence[End], width: int) -> list[Text]:
    """The last verdicts."""
    rows: list[list[Cell]] = [
        [
            end.task_id,
            cells.cell(end.verdict, cells.VERDICT_STYLES.get(end.verdict, "red")),
            _ago(end.finished_at),
            UNKNOWN if end.runtime_s is None else render.seconds(end.runtime_s),
            joules(end.gpu_joules),
            dollars(end.cost_usd),
            end.error or "",
        ]
        for end in found
    ]
    skip = {"ENERGY"} if all(end.gpu_joules is None for end in found) else set()
    if not any(end.error for end in found):
        skip.add("ERROR")
    return _without(_ENDS, rows, skip, width)


def servers(found: Sequence[Server], width: int) -> list[Text]:
    """The fork servers, side by side."""
    items = []
    for server in found:
        size = "" if server.rss_bytes is None else f" {_size(server.rss_bytes)}"
        facts = f"{size}  pid {server.pid}" if server.pid is not None else size
        items.append(
            Text.assemble(cells.cell(server.environment), " ", cells.status(server.state), (facts, "bright_black"))
        )
    return cells.flow(items, width)


def _size(size: float) -> str:
    return f"{size / 2**20:.0f}M" if size < 2**30 else render.gib(size)


def _mark(task: Task, selected: str | None) -> str:
    return "▸" if task.task_id == selected else " "


def _marked(lines: list[Text], found: Sequence[Task], selected: str | None) -> list[Text]:
    """The line of the selected task stands out, in colour too."""
    for line, task in zip(lines[1:], found, strict=True):
        if task.task_id == selected:
            line.stylize("bold")
    return lines


def _without(columns: Sequence[Column], rows: list[list[Cell]], skip: set[str], width: int) -> list[Text]:
    kept = [number for number, column in enumerate(columns) if column.header not in skip]
    return cells.grid([columns[number] for number in kept], [[row[number] for number in kept] for row in rows], width)


def _ago(moment: str | None) -> str:
    try:
        then = datetime.datetime.fromisoformat(moment or "")
    except ValueError:
        return UNKNOWN
    then = then if then.tzinfo is not None else then.replace(tzinfo=datetime.UTC)
    return f"{render.seconds(max(0.0, (datetime.datetime.now(datetime.UTC) - then).total_seconds()))} ago"
