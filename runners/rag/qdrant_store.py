"""Reads a folder of qdrant-client's local mode without running what it says: its points are pickles.

Only classes of data are unpickled: those of Qdrant's own models, dates, UUIDs and arrays.
"""

from __future__ import annotations

import enum
import io
import json
import pickle
import types
from pathlib import Path
from typing import Any

from runners.api import BadRequest
from runners.data.cards import inside

META = "meta.json"
_MODELS = "qdrant_client.http.models.models"
_PLAIN = frozenset({
    ("datetime", "date"), ("datetime", "datetime"), ("datetime", "timedelta"), ("datetime", "timezone"),
    ("decimal", "Decimal"), ("uuid", "UUID"), ("uuid", "SafeUUID"), ("builtins", "set"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"), ("numpy.core.numeric", "_frombuffer"),
})  # fmt: skip


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import pydantic

        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == _MODELS and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and issubclass(found, pydantic.BaseModel | enum.Enum):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no data")


def loads(data: bytes) -> Any:
    """`pickle.loads` for data only.

    Raises:
        pickle.UnpicklingError: it names anything else.
    """
    return _DataUnpickler(io.BytesIO(data)).load()


def read_data_only() -> None:
    """Have qdrant-client's local mode unpickle data only, in this process."""
    from qdrant_client.local import persistence

    only = types.SimpleNamespace(loads=loads, dumps=pickle.dumps)
    persistence.pickle = only  # type: ignore[attr-defined,assignment,unused-ignore]


def check_store(folder: Path, where: str) -> None:
    """Raises BadRequest where the store's list of collections leads out of its folder."""
    try:
        found = json.loads((folder / META).read_bytes())
    except (OSError, ValueError):
        return  # the client reports it
    for group in ("collections", "aliases"):
        names = found.get(group) if isinstance(found, dict) else None
        for name in names if isinstance(names, dict) else ():
            if not inside(str(name)) or "/" in str(name):
                raise BadRequest(f"{where}: its {META} names a collection outside of the folder")
