"""One request to a webhook, signed as Standard Webhooks has it (https://www.standardwebhooks.com), and its answer.

`webhook-signature` is `v1,` and the base64 of HMAC-SHA256 over `ID.TIMESTAMP.BODY`, with the secret's bytes as the key.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import time

from flowmesh import installed
from flowmesh.errors import ConfigError
from flowmesh.reporting.batch import Answer
from flowmesh.results.http_errors import TEXT_SHOWN, describe_failure, innermost, read_text, retry_after_s
from flowmesh.settings.secret_files import read_secret
from flowmesh.web.origins import basic_auth, without_login
from flowmesh.web.session import make_session, options_for

KEY = "notify.secret_file"
PREFIX = "whsec_"
LEAST_BYTES = 16
_LATER = frozenset((408, 425, 429))
"""Answers that concern the receiver and not this message; also 3xx and 5xx."""


def read_key(path: str) -> bytes:
    """The key in a file: what follows `whsec_` is base64; any other text is used as it is.

    Raises:
        ConfigError: it cannot be read, or is no key.
    """
    text = read_secret(path, KEY)
    key = text.encode()
    if text.startswith(PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        except binascii.Error:
            raise ConfigError(f"{KEY}: what follows {PREFIX} is not base64") from None
    if len(key) < LEAST_BYTES:
        raise ConfigError(
            f"{KEY}: the secret has {len(key)} bytes; at least {LEAST_BYTES}, such as of: openssl rand -hex 32"
        )
    return key


def signature(key: bytes, id_: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    digest = hmac.new(key, f"{id_}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send(url: str, id_: str, body: bytes, *, secret_file: str | None, timeout_s: float) -> Answer:
    """Send one message once. No redirect is followed: the message and its signature are for this address only.

    Args:
        secret_file: where the key is; None: not signed.

    Returns:
        what became of it; never raises.
    """
    timestamp = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"flowmesh-supervisor/{installed.version()}",
        "webhook-id": id_,
        "webhook-timestamp": str(timestamp),
    }
    if (login := basic_auth(url)) is not None:
        headers["Authorization"] = login
    plain = without_login(url)
    try:
        if secret_file is not None:
            headers["webhook-signature"] = signature(read_key(secret_file), id_, timestamp, body)
        session = make_session()
        with (
            contextlib.closing(session),
            session.post(
                plain,
                data=body,
                headers=headers,
                timeout=(timeout_s, timeout_s),
                allow_redirects=False,
                stream=True,
                **options_for(plain),
            ) as response,
        ):
            status = response.status_code
            if 200 <= status < 300:
                return Answer(id=id_)
            text = " ".join(read_text(response, timeout_s).split())[:TEXT_SHOWN]
            error = f"answered {status} {response.reason or ''}".rstrip() + (f": {text}" if text else "")
            if 300 <= status < 400:
                error = f"answered {status}, a redirect, which is not followed; set notify.url to its target"
            refused = 400 <= status < 500 and status not in _LATER
            return Answer(
                id=id_, error=error, refused=refused, retry_after_s=retry_after_s(response.headers.get("Retry-After"))
            )
    except ConfigError as error:
        return Answer(id=id_, error=str(error))
    except Exception as error:  # noqa: BLE001 - the boundary: whatever it is, it is tried again
        return Answer(id=id_, error=describe_failure(error, innermost(error), timeout_s))
