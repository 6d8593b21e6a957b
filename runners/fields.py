"""Reports all faults of a task's document at once, and checks the fields directly under `spec`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flowmesh.messages.wire import HardwareGpu, HardwareWanted, Resources
from flowmesh.validation.convert import joined
from flowmesh.validation.unused import is_unused
from runners.api import BadRequest, Context

COMMON = ("taskType", "resources", "nodes", "output", "shard", "timeoutSec", "retainLogs", "env", "merge_children")
"""Fields of every task type; the node handles most of them."""
NEAR = 0.75
"""From this similarity on, an unknown field is taken for a misspelt one."""
WORDS = ("notes",)
"""Words that are no misspelt field, although they resemble one."""

T = TypeVar("T")


class Faults:
    """Collects the errors of several parts of a document."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def read(self, part: Callable[[], T]) -> T | None:
        """What `part` returns; None if it raised BadRequest, which is kept."""
        try:
            return part()
        except BadRequest as error:
            self._found += [fault for fault in error.faults if fault not in self._found]
            return None

    def check(self) -> None:
        """Raises BadRequest with all faults, if there are any."""
        if self._found:
            raise BadRequest(joined(self._found), tuple(self._found))


def check_spec(
    ctx: Context, spec: Mapping[str, Any], where: str, own: Iterable[str], options: Mapping[str, type[Any]]
) -> None:
    """Check the fields directly under `spec`.

    An unknown one that resembles a known one, or that belongs into one of the task's own sections, is refused. Any
    other is not used: the node's peers may have fields of their own here.

    Args:
        own: the task type's fields.
        options: the task's sections of options, by name.

    Raises:
        BadRequest: naming all fields that are refused.
    """
    faults = Faults()
    known = {*COMMON, *own}

    def check(name: str, value: Any) -> None:
        if not is_unused("", name, value):
            if meant := near(name, known):
                raise BadRequest(f"{where}.{name}: unknown field; did you mean {meant!r}?")
            for section, fields in options.items():
                if name in getattr(fields, "__struct_encode_fields__", ()):
                    raise BadRequest(f"{where}.{name}: unknown field; it belongs into {where}.{section}")
        ctx.unused.append(f"{where}.{name}")

    faults.read(lambda: check_resources(ctx, spec.get("resources"), f"{where}.resources"))
    for name, value in spec.items():
        if name not in known and not str(name).startswith("_"):
            faults.read(lambda name=name, value=value: check(str(name), value))  # type: ignore[misc]
    faults.check()


def near(name: str, known: Iterable[str]) -> str | None:
    """The known field that a misspelt one was probably meant to be. Ignores case, `_` and `-`."""
    import difflib  # only unknown fields need it

    if name in WORDS:
        return None
    folded = {_fold(each): each for each in sorted(known)}
    found = difflib.get_close_matches(_fold(name[:200]), folded, n=1, cutoff=NEAR)
    return folded[found[0]] if found else None


def _fold(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def check_resources(ctx: Context, value: Any, where: str, into: type[Any] = Resources) -> None:
    """The same for the blocks in `spec.resources`, where the orchestrator may have fields of its own, too."""
    if not isinstance(value, dict):
        return  # null; the node has refused what is no mapping
    faults = Faults()
    known = {"hardware": HardwareWanted, "gpu": HardwareGpu}

    def check(name: str) -> None:
        if meant := near(name, into.__struct_encode_fields__):
            raise BadRequest(f"{where}.{name}: unknown field; did you mean {meant!r}?")
        ctx.unused.append(f"{where}.{name}")

    for name, inner in value.items():
        if name not in into.__struct_encode_fields__:
            faults.read(lambda name=name: check(str(name)))  # type: ignore[misc]
        elif name in known:
            faults.read(lambda name=name, inner=inner: check_resources(ctx, inner, f"{where}.{name}", known[name]))  # type: ignore[misc]
    faults.check()
