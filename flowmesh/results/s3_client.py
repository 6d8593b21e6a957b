"""Clients of S3, with the credentials of `[cloud]` and no others, and what their errors mean.

Imported by the children that transfer, never by the supervisor: botocore is loaded by the first client.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, Literal

from flowmesh.errors import FlowMeshError
from flowmesh.installed import install_command
from flowmesh.messages.cloud import Keys, S3Access
from flowmesh.validation.s3_url import Location
from flowmesh.web.session import certificate_remedy, trusted_by_path

DEFAULT_REGION = "us-east-1"
"""Where neither the settings nor the endpoint say one; servers other than AWS take any."""
CONNECTIONS = 64

Kind = Literal["missing", "refused", "node", "passing"]
"""`missing`: no such object or bucket. `refused`: the request cannot be right. `node`: this node's credentials, region
or installation. `passing`: another attempt may succeed."""


NOT_INSTALLED, CERTIFICATE = "not installed", "certificate"
"""Codes of our own."""


class S3Error(FlowMeshError):
    """Raised when S3 does not do what it was asked. The text names bucket, key and remedy, and no secret.

    Args:
        status: of HTTP; None: there was no answer.
    """

    def __init__(self, kind: Kind, text: str, status: int | None = None, code: str = "") -> None:
        super().__init__(text)
        self.kind: Kind = kind
        self.status = status
        self.code = code

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may succeed, without a change of this node's installation or settings."""
        if self.kind != "node":
            return self.kind == "passing"
        return self.code not in (*_ELSEWHERE, NOT_INSTALLED, CERTIFICATE) and self.status not in (301, 307)


def is_installed() -> bool:
    return importlib.util.find_spec("botocore") is not None


def not_installed() -> str:
    return f"S3 needs the extra cloud, which is not installed on this node: {install_command('cloud')}"


def make_client(access: S3Access, keys: Keys | None, timeout_s: float) -> Any:
    """A client of botocore. It makes one attempt at each request, and may be used by several threads.

    Args:
        keys: the node's; None: those of its file or its role, or none at all.
        timeout_s: to connect, and for each read.

    Raises:
        S3Error: botocore is missing, or the credentials cannot be had.
    """
    if not is_installed():
        raise S3Error("node", not_installed(), code=NOT_INSTALLED)
    import botocore.config
    import botocore.exceptions
    import botocore.session

    session = botocore.session.Session()
    # Nothing of the user's ~/.aws: a document reads with what the operator has named, and nothing else.
    session.set_config_variable("config_file", os.devnull)
    session.set_config_variable("credentials_file", os.devnull)
    anonymous = False
    if keys is not None:
        session.set_credentials(keys.access_key_id, keys.secret_access_key, keys.session_token)
    elif access.credentials_file is not None:
        _use_file(session, access.credentials_file, access.profile)
    else:
        anonymous = not access.role
    config = botocore.config.Config(
        signature_version=botocore.UNSIGNED if anonymous else None,
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=CONNECTIONS,
        request_checksum_calculation="when_required",  # servers other than AWS know no others
        response_checksum_validation="when_required",
        user_agent_appid="flowmesh-supervisor",
        # A body is read once: it is throttled, and counted as progress.
        s3={"addressing_style": "path" if access.endpoint_url else "auto", "payload_signing_enabled": False},
    )
    try:
        return session.create_client(
            "s3",
            region_name=access.region or DEFAULT_REGION,
            endpoint_url=access.endpoint_url,
            verify=trusted_by_path(),
            config=config,
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise error_of(error, Location("", ""), access) from error


def _use_file(session: Any, path: str, profile: str) -> None:
    import botocore.credentials
    import botocore.exceptions

    provider = botocore.credentials.SharedCredentialProvider(creds_filename=path, profile_name=profile)
    try:
        with open(path, "rb"):
            pass
        found = provider.load()
    except OSError as error:
        why = (error.strerror or "unknown").lower()
        raise S3Error("node", f"cloud.credentials_file: {path} cannot be read: {why}") from None
    except botocore.exceptions.BotoCoreError as error:
        raise S3Error("node", f"cloud.credentials_file: {path} is not of the format of ~/.aws/credentials") from error
    if found is None:
        raise S3Error(
            "node", f"cloud.credentials_file: {path} has no access key in the section [{profile}] (cloud.profile)"
        )
    session.set_credentials(found.access_key, found.secret_key, found.token)


_REFUSED_KEYS = frozenset((
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "RequestExpired", "RequestTimeTooSkewed", "InvalidSecurity", "MissingSecurityHeader",
))  # fmt: skip
_ELSEWHERE = frozenset((
    "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "TemporaryRedirect",
))  # fmt: skip
_PASSING = frozenset(("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"))


def error_of(error: Exception, location: Location, access: S3Access) -> S3Error:
    """What an exception of botocore means."""
    if isinstance(error, S3Error):
        return error
    shown = location.url if location.key else f"the bucket {location.bucket}"
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return _answered(answer, location, shown, access)
    name = type(error).__name__
    place = access.endpoint_url or f"S3 in {access.region or DEFAULT_REGION}"
    if name in ("NoCredentialsError", "CredentialRetrievalError", "PartialCredentialsError", "MetadataRetrievalError"):
        return S3Error("node", f"{shown}: the credentials of this node's role (cloud.role) cannot be had now")
    if name == "SSLError" and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return S3Error(
            "node", f"{shown}: the certificate of {place} is not trusted; {certificate_remedy()}", code=CERTIFICATE
        )
    if name in ("ParamValidationError", "InvalidRegionError", "InvalidEndpointError", "ValueError"):
        return S3Error("refused", f"{shown}: this address or endpoint cannot be used ({name})")
    if name == "ResponseParserError":
        return S3Error("node", f"{shown}: what answers at {place} is no S3 server (cloud.endpoint_url)")
    why = "no answer in time" if "Timeout" in name else "no connection"
    return S3Error("passing", f"{shown}: {why} to {place} (cloud.endpoint_url, cloud.region)")


def _answered(answer: dict[str, Any], location: Location, shown: str, access: S3Access) -> S3Error:
    said = answer.get("Error", {})
    code = str(said.get("Code", ""))
    meta = answer.get("ResponseMetadata", {})
    status = int(meta.get("HTTPStatusCode", 0)) or None
    fault = functools.partial(S3Error, status=status, code=code)
    region = meta.get("HTTPHeaders", {}).get("x-amz-bucket-region") or said.get("Region")
    if code == "NoSuchBucket":
        place = access.endpoint_url or "AWS"
        return fault("missing", f"there is no bucket {location.bucket!r} at {place} (cloud.endpoint_url)")
    if code in _ELSEWHERE or status in (301, 307):
        there = f"it is in the region {region}" if region else "it is in another region"
        return fault("node", f"{shown}: {there}, and the node's setting cloud.region is {access.region!r}")
    if code in _REFUSED_KEYS or status == 401:
        return fault("node", f"{shown}: S3 refuses the node's credentials ({code or status}); {_check(access)}")
    if code in ("NoSuchKey", "404") or status == 404:
        return fault("missing", f"there is no object {location.key!r} in the bucket {location.bucket!r}")
    if status == 403:
        return fault("node", f"{shown}: access denied ({code or status}); {_check(access)}")
    if code in _PASSING or status is None or status >= 500 or status in (408, 429):
        return fault("passing", f"{shown}: S3 answered {code or status}")
    return fault("refused", f"{shown}: S3 answered {code or status}")


def _check(access: S3Access) -> str:
    if not access.has_credentials:
        return "the node has no credentials: set cloud.credentials_file, or make the object public"
    if access.has_keys:
        return "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the node, and what their policy allows"
    source = "the role of this machine" if access.credentials_file is None else access.credentials_file
    return f"check what {source} allows (cloud.credentials_file, cloud.profile)"
