"""How the node's children that transfer reach S3: what `[cloud]` says, and the keys, which travel apart from it."""

from __future__ import annotations

import msgspec


class S3Access(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The settings of `[cloud]` that are no secrets."""

    read: tuple[str, ...] = ()
    """Patterns of what documents may read."""
    write: tuple[str, ...] = ()
    """Patterns of where documents may have results sent."""
    endpoint_url: str | None = None
    region: str | None = None
    credentials_file: str | None = None
    """An absolute path; read at each use."""
    profile: str = "default"
    role: bool = False
    """Whether the credentials are those of the machine's or the container's role."""
    has_keys: bool = False
    """Whether the node has keys, which come over the pipe."""

    @property
    def has_credentials(self) -> bool:
        return self.has_keys or self.role or self.credentials_file is not None


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """The node's own access key. Never in a file or an environment that a task can read."""

    access_key_id: str
    secret_access_key: str
    session_token: str | None = None
