"""Counters, gauges and histograms with labels, and their text in Prometheus' exposition format (version 0.0.4)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_SERIES = 1000
"""Of one family: labels that come from tasks must not fill the memory."""
OTHER = "other"

Labels = tuple[str, ...]


class Family:
    """One metric, with a series for each combination of its labels' values.

    Args:
        kind: `counter` or `gauge`.
        about: one line.
        labels: their names.
    """

    def __init__(self, kind: str, name: str, about: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self._kind = kind
        self._about = about
        self._labels = tuple(labels)
        self._values: dict[Labels, float] = {}

    def add(self, *labels: str, by: float = 1.0) -> None:
        """Count; what is over MOST_SERIES counts as OTHER."""
        key = self._key(labels)
        self._values[key] = self._values.get(key, 0.0) + by

    def set(self, value: float, *labels: str) -> None:
        self._values[self._key(labels)] = value

    def clear(self) -> None:
        """Before a gauge's series are set anew."""
        self._values.clear()

    def _key(self, labels: Labels) -> Labels:
        if labels not in self._values and len(self._values) >= MOST_SERIES:
            return (OTHER,) * len(labels)
        return labels

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self._about, self._kind)
        for labels, value in self._values.items():
            yield f"{self.name}{_braces(zip(self._labels, labels, strict=True))} {_number(value)}"


class Histogram:
    """Durations in seconds, by labels.

    Args:
        bounds: upper bounds of its buckets, ascending.
    """

    def __init__(self, name: str, about: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.name = name
        self._about = about
        self._labels = tuple(labels)
        self._bounds = tuple(bounds)
        self._series: dict[Labels, tuple[list[int], list[float]]] = {}

    def observe(self, seconds: float, *labels: str) -> None:
        if labels not in self._series and len(self._series) >= MOST_SERIES:
            labels = (OTHER,) * len(labels)
        counts, total = self._series.setdefault(labels, ([0] * (len(self._bounds) + 1), [0.0]))
        counts[bisect.bisect_left(self._bounds, seconds)] += 1
        total[0] += seconds

    def set(self, counts: Sequence[float], total: float, *labels: str) -> None:
        """Take over what others have counted, by bucket and without a bound."""
        self._series[labels] = ([int(each) for each in counts], [total])

    def clear(self) -> None:
        """Before all series are set anew."""
        self._series.clear()

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self._about, "histogram")
        for labels, (counts, total) in self._series.items():
            named = list(zip(self._labels, labels, strict=True))
            upto = 0
            for bound, count in zip((*self._bounds, math.inf), counts, strict=True):
                upto += count
                yield f"{self.name}_bucket{_braces([*named, ('le', _number(bound))])} {upto}"
            yield f"{self.name}_sum{_braces(named)} {_number(total[0])}"
            yield f"{self.name}_count{_braces(named)} {upto}"


def text_of(families: Iterable[Family | Histogram]) -> str:
    """All families as one text."""
    return "\n".join(line for family in families for line in family.lines()) + "\n"


def _head(name: str, about: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"


def _braces(labels: Iterable[tuple[str, str]]) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{inner}}}" if inner else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(value)
