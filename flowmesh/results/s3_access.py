"""What `[cloud]` says, as the node's children that transfer get it."""

from __future__ import annotations

from flowmesh.messages.cloud import Keys, S3Access
from flowmesh.settings.schema import CloudSettings
from flowmesh.settings.secret_files import secret_path


def access_of(settings: CloudSettings) -> S3Access | None:
    """None: the operator allows nothing."""
    if not settings.read and not settings.write:
        return None
    file = settings.credentials_file
    return S3Access(
        read=settings.read,
        write=settings.write,
        endpoint_url=settings.endpoint_url,
        region=settings.region,
        credentials_file=None if file is None else str(secret_path(file)),
        profile=settings.profile,
        role=settings.role,
        has_keys=keys_of(settings) is not None,
    )


def keys_of(settings: CloudSettings) -> Keys | None:
    """The node's own key, of its environment."""
    if settings.access_key_id is None or settings.secret_access_key is None:
        return None
    return Keys(
        access_key_id=settings.access_key_id,
        secret_access_key=settings.secret_access_key,
        session_token=settings.session_token,
    )
