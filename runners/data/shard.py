"""`spec.shard`: this task's part of a source's rows."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from runners.api import BadRequest


class Shard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of `total` parts of nearly the same size."""

    index: Annotated[int, Meta(ge=0)]
    total: Annotated[int, Meta(ge=1)]
    contiguous: bool | None = None
    """True (the default): neighbouring rows; False: every `total`-th row."""

    def check(self, where: str) -> None:
        if self.index >= self.total:
            raise BadRequest(f"{where}.index: {self.index} of {self.total} shards; the last one is {self.total - 1}")

    def rows(self, count: int) -> range:
        """This shard's row numbers, of `count`: every row is in exactly one shard, sizes differ by at most one."""
        if self.contiguous is False:
            return range(self.index, count, self.total)
        size, longer = divmod(count, self.total)
        start = size * self.index + min(self.index, longer)
        return range(start, start + size + (self.index < longer))
