"""What `flowmesh doctor` says about S3: the library, the credentials, and each bucket that the settings name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowmesh.cli.findings import Finding, Level
from flowmesh.installed import install_command
from flowmesh.messages.cloud import S3Access
from flowmesh.results import s3_client
from flowmesh.results.s3_access import access_of, keys_of
from flowmesh.settings.schema import Settings
from flowmesh.validation.s3_url import WILD, Location, parse

TIMEOUT_S = 5.0


def s3(settings: Settings) -> Iterator[Finding]:
    """Nothing where no setting asks for S3."""
    access = access_of(settings.cloud)
    if access is None:
        return
    if not s3_client.is_installed():
        yield Finding("S3", Level.BROKEN, "the extra cloud is not installed", install_command("cloud"))
        return
    if access.credentials_file is not None and not access.has_keys:
        yield from _mode(access.credentials_file)
    try:
        client = s3_client.make_client(access, keys_of(settings.cloud), TIMEOUT_S)
    except s3_client.S3Error as error:
        yield Finding("S3", Level.BROKEN, str(error), "correct [cloud] in the node's file")
        return
    if not access.has_credentials:
        yield Finding("S3", Level.NOTE, "the node has no credentials: only public buckets can be read")
    for pattern in access.read:
        yield _listed(client, access, pattern, "can be listed")
    for pattern in access.write:
        yield _listed(client, access, pattern, "is there for results")


def _mode(file: str) -> Iterator[Finding]:
    try:
        mode = Path(file).stat().st_mode
    except OSError:
        return  # the client says so
    if mode & 0o077:
        text = f"{file} can be read by others than its owner"
        yield Finding("S3", Level.WARN, text, f"chmod 600 {file}")


def _listed(client: Any, access: S3Access, pattern: str, good: str) -> Finding:
    begin = pattern
    for index, each in enumerate(pattern):
        if each in WILD:
            begin = pattern[:index]
            break
    try:
        location = parse(begin)
    except ValueError:
        return Finding("S3", Level.NOTE, f"{pattern}: names no single bucket, so nothing was tried")
    try:
        client.list_objects_v2(Bucket=location.bucket, Prefix=location.key, MaxKeys=1)
    except Exception as error:  # noqa: BLE001 - what botocore raises
        fault = s3_client.error_of(error, Location(location.bucket, ""), access)
        if fault.code == "AccessDenied" and access.has_credentials:
            text = f"{pattern}: cannot be listed; its objects may be within reach all the same"
            return Finding("S3", Level.WARN, text, "allow s3:ListBucket, if prefixes and patterns are needed")
        return Finding("S3", Level.BROKEN, f"{pattern}: {fault}", "correct [cloud] in the node's file")
    where = access.endpoint_url or access.region or os.environ.get("AWS_REGION") or s3_client.DEFAULT_REGION
    return Finding("S3", Level.OK, f"{pattern}: {good} at {where}")
