"""GET for a URL that a document names. Redirects are checked one by one, and credentials stay with their origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from flowmesh.messages.gateway import Gateway
from flowmesh.messages.job import Permits
from flowmesh.web.origins import basic_auth, exact_origin, origin, refusal_hint, why_no_token, without_login
from flowmesh.web.session import make_session, options_for
from runners.data import gateway
from runners.data.addresses import LocalAddress, check, check_peer, is_allowed

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 10
_LEFT = "a redirect led to another origin, which gets no credentials"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class Answered(NamedTuple):
    """The last answer, after all redirects."""

    response: requests.Response
    """Its body is still to be read, and it has to be closed."""
    with_token: bool
    """Whether the node's token went along."""
    hint: str
    """Why it did not: for an error about a 401 or 403."""


class BadRedirect(ValueError):
    """A redirect to something that is not http or https, or too many of them."""


def get(
    permits: Permits,
    url: str,
    *,
    own: Mapping[str, str],
    custom: Mapping[str, str],
    timeout_s: float,
    node: Gateway | None = None,
) -> Answered:
    """The answer to a GET, redirects followed.

    Args:
        node: sends the node's token to the orchestrator's origin, unless a redirect came from elsewhere.
        own: the client's headers, sent to every server.
        custom: the document's headers. They and the login in `url` are sent to the URL's own origin only; `own` wins.

    Raises:
        LocalAddress: the URL or a redirect leads to a local address.
        BadRedirect: too many redirects, or one to another protocol.
        requests.RequestException, gateway.NotAnswered: a server cannot be reached.
    """
    first, at_home = exact_origin(url), True
    orchestrator, at_orchestrator = permits.orchestrator_url, True
    for _ in range(MAX_REDIRECTS + 1):
        # A way back does not count: a server in between may have chosen it.
        at_home = at_home and exact_origin(url) == first
        check(permits, url)
        headers = {name.lower(): value for name, value in custom.items()} if at_home else {}
        if at_home and "authorization" not in headers and (login := basic_auth(url)) is not None:
            headers["authorization"] = login
        headers |= {name.lower(): value for name, value in own.items()}
        known: dict[str, Any] = {"orchestrator_url": orchestrator, "has_token": node is not None}
        at_orchestrator = at_orchestrator and orchestrator is not None and origin(url) == origin(orchestrator)
        through = node if at_orchestrator and not why_no_token(url, headers, **known) else None
        if through is not None:
            answer = gateway.get(through, without_login(url), headers, timeout_s)
        else:
            answer = _once(permits, without_login(url), headers, timeout_s)
        target = answer.headers.get("Location")
        if answer.status_code not in _REDIRECTS or not target:
            hint = refusal_hint(url, custom, **known) if at_home else _LEFT
            return Answered(answer, through is not None, "" if through is not None else hint)
        answer.close()
        url = urljoin(url, target)
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise BadRedirect("redirected to something that is not an http or https URL")
    raise BadRedirect(f"more than {MAX_REDIRECTS} redirects")


def _once(permits: Permits, url: str, headers: Mapping[str, str], timeout_s: float) -> requests.Response:
    import requests

    with make_session() as session:  # its connection lives on in the answer
        if not is_allowed(permits, url):
            _check_connections(session)
        try:
            return session.get(
                url, headers=dict(headers), stream=True, timeout=timeout_s, allow_redirects=False, **options_for(url)
            )
        except requests.RequestException as error:
            local = _cause(error)
            if local is not None:
                raise LocalAddress(f"{urlsplit(url).hostname}: {local}") from error
            raise


def _check_connections(session: requests.Session) -> None:
    """Have the session's direct connections checked as soon as they are made. A proxy is the operator's."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Http(HTTPConnection):
        def _new_conn(self) -> Any:
            return _checked(super()._new_conn())

    class Https(HTTPSConnection):
        def _new_conn(self) -> Any:
            return _checked(super()._new_conn())

    class HttpPool(HTTPConnectionPool):
        ConnectionCls = Http

    class HttpsPool(HTTPSConnectionPool):
        ConnectionCls = Https

    for adapter in session.adapters.values():
        adapter.poolmanager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}  # type: ignore[attr-defined]


def _checked(connection: Any) -> Any:
    try:
        check_peer(connection.getpeername())
    except OSError:
        connection.close()
        raise
    return connection


def _cause(error: BaseException | None) -> LocalAddress | None:
    while error is not None:
        if isinstance(error, LocalAddress):
            return error
        error = error.__cause__ or error.__context__
    return None
