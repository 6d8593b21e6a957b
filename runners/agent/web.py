"""Pages fetched from public addresses only, and web search by a configured provider.

A name is resolved once, its addresses are checked, and the checked address is connected to: neither a name nor a
redirect can lead to services of this machine or to a cloud's metadata.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import time
import urllib.request
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import msgspec

from flowmesh.redaction import Redactor
from flowmesh.validation.json_paths import PathError, parse, walk
from flowmesh.web.session import make_session, options_for
from runners.agent import tls
from runners.agent.completions import error_text
from runners.agent.config import Fetch, SearchProvider
from runners.agent.secrets import from_env
from runners.api import BadRequest

MAX_REDIRECTS = 5
USER_AGENT = "flowmesh-agent/1.0"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

EMBEDDING = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96")))
"""IPv6 ranges whose last 32 bits are an IPv4 address: compatible ones, and those of NAT64."""
OF_CLOUDS = tuple(map(ipaddress.IPv4Network, ("168.63.129.16/32", "192.0.0.0/24")))
"""Public by number, but services of a cloud for its machines: Azure's wire server, Oracle's metadata."""


class WebRefused(ValueError):
    """An address that is not allowed, or does not answer. The message is for the model."""


class Page(msgspec.Struct, frozen=True):
    """The response of an address."""

    url: str
    content_type: str
    body: bytes


def fetch(url: str, wanted: Fetch) -> Page:
    """GET an address; follows redirects, each checked like the first address.

    Raises:
        WebRefused: it is not allowed, does not answer, or is too large.
    """
    for _ in range(MAX_REDIRECTS + 1):
        status, headers, body = _get(url, wanted)
        if status in _REDIRECTS and headers.get("location"):
            url = urljoin(url, headers["location"])
            continue
        if status != 200:
            raise WebRefused(f"{_shown(url)} answered {status}")
        return Page(url, headers.get("content-type", ""), body)
    raise WebRefused(f"more than {MAX_REDIRECTS} redirects")


def _get(url: str, wanted: Fetch) -> tuple[int, dict[str, str], bytes]:
    import urllib3

    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    host = _ascii(parts.hostname)
    if parts.scheme not in ("http", "https") or not host:
        raise WebRefused(f"{url[:200]!r} is not an http or https address")
    if wanted.allow_hosts and not any(host == name or host.endswith(f".{name}") for name in wanted.allow_hosts):
        raise WebRefused(f"{host} is not in allow_hosts")
    timeout = urllib3.Timeout(total=wanted.timeout_s)
    headers = {"User-Agent": USER_AGENT, "Accept": "text/html,text/*;q=0.9,*/*;q=0.5", "Accept-Encoding": "identity"}
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = _address(host, port, wanted)
        proxy = urllib.request.getproxies().get(parts.scheme)
        pool: Any
        if proxy and not urllib.request.proxy_bypass(host):
            pool, target = urllib3.ProxyManager(proxy, ssl_context=tls.context()), url
        else:
            target = urlsplit(url)._replace(scheme="", netloc="", fragment="").geturl() or "/"
            named = f"[{host}]" if ":" in host else host
            headers["Host"] = named if parts.port is None else f"{named}:{port}"
            pool = (
                urllib3.HTTPSConnectionPool(address, port, server_hostname=host, ssl_context=tls.context())
                if parts.scheme == "https"
                else urllib3.HTTPConnectionPool(address, port)
            )
        answer = pool.request(
            "GET", target, headers=headers, timeout=timeout, redirect=False, retries=False, preload_content=False
        )
        try:
            body = _body(answer, wanted)
        finally:
            answer.release_conn()
            pool.clear() if proxy else pool.close()
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        if isinstance(error, WebRefused):
            raise
        if (why := tls.refusal(error)) is not None:
            raise WebRefused(f"{_shown(url)} has a certificate that is not trusted ({why})") from None
        raise WebRefused(f"{_shown(url)} cannot be reached ({type(error).__name__})") from None
    coding = answer.headers.get("Content-Encoding", "").lower()
    if unread := {each.strip() for each in coding.split(",")} - {"", "identity", *answer.CONTENT_DECODERS}:
        raise WebRefused(f"{_shown(url)} has an encoding that is not read here ({', '.join(sorted(unread))})")
    if len(body) > wanted.max_bytes:
        raise WebRefused(f"{_shown(url)} has more than {wanted.max_bytes} bytes")
    return answer.status, {name.lower(): value for name, value in answer.headers.items()}, body


def _body(answer: Any, wanted: Fetch) -> bytes:
    """The body, up to one byte over the limit, decompressed: some servers compress what was asked for as it is.

    The time limit is for all of it, so that a slow trickle ends, too.
    """
    deadline = time.monotonic() + wanted.timeout_s
    body = bytearray()
    while len(body) <= wanted.max_bytes and (piece := answer.read1(1 << 16, decode_content=True)):
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body[: wanted.max_bytes + 1])


def _ascii(host: str | None) -> str | None:
    """The host's name in IDNA form, or as it is where it has none."""
    try:
        return host if host is None or host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        return host


def _address(host: str, port: int, wanted: Fetch) -> str:
    """The address to connect to. All addresses of the name have to be allowed."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        raise WebRefused(f"{host}: no such host") from None
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        if not wanted.allow_private and not is_public(address):
            raise WebRefused(f"{host} is not a public address; this agent may only fetch public ones")
    return found[0]


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is a public internet address, also for IPv6 addresses that embed IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(address in block for block in EMBEDDING):
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(each) for each in embedded if each is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast and not any(address in block for block in OF_CLOUDS)


def search(query: str, count: int, provider: SearchProvider, redact: Redactor, where: str) -> list[dict[str, str]]:
    """Search results of the provider: title, url and snippet of each.

    Raises:
        BadRequest: its key is not set.
        WebRefused: it does not answer, or its answer does not have the configured shape.
    """
    import requests

    params = _filled(provider.params, {"{query}": query, "{count}": str(count)}, count)
    headers = {"User-Agent": USER_AGENT, "Accept": "application/json"}
    if provider.api_key_env is not None:
        key = from_env(provider.api_key_env, f"{where}.api_key_env")
        redact.learn(key)
        headers[provider.api_key_header] = provider.api_key_prefix + key
    url = provider.url + ("?" + urlencode(params) if provider.method == "GET" and params else "")
    try:
        with make_session() as session:
            answer = session.request(
                provider.method, url, json=params if provider.method == "POST" else None, headers=headers,
                timeout=provider.timeout_s, allow_redirects=False, **options_for(url),
            )  # fmt: skip
    except requests.RequestException as error:
        if (why := tls.refusal(error)) is not None:
            raise WebRefused(f"the search provider has a certificate that is not trusted ({why})") from None
        raise WebRefused(f"the search provider cannot be reached ({type(error).__name__})") from None
    if answer.status_code != 200:
        raise WebRefused(f"the search provider answered {answer.status_code} {answer.reason}")
    try:
        said = answer.json()
        if isinstance(said, dict) and said.get("error"):
            raise WebRefused(f"the search provider reported an error: {redact(error_text(said))}")
        found = walk(said, parse(provider.results), "answer")
        if not isinstance(found, list):
            raise PathError(f"answer.{provider.results} is not a list")
    except WebRefused:
        raise
    except (ValueError, PathError) as error:
        raise WebRefused(f"the search provider's answer is not what its configuration says: {error}") from None
    names = {"title": provider.title, "url": provider.link, "snippet": provider.snippet}
    results = [{name: _field(each, path) for name, path in names.items()} for each in found[:count]]
    if results and not any(any(each.values()) for each in results):
        raise WebRefused(
            f"the search provider's answer is not what its configuration says: none of {len(found)} results has "
            f"{provider.title}, {provider.link} or {provider.snippet}"
        )
    return results


def check_provider(provider: SearchProvider, where: str) -> None:
    """Raises BadRequest if the provider's configuration cannot work."""
    parts = urlsplit(provider.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRequest(f"{where}.url: an http or https address is needed")
    if "{query}" not in json.dumps(provider.params):
        raise BadRequest(f"{where}.params: one of them must contain {{query}}")


def _filled(value: Any, texts: dict[str, str], count: int) -> Any:
    match value:
        case "{count}":
            return count
        case str():
            for name, text in texts.items():
                value = value.replace(name, text)
            return value
        case dict():
            return {key: _filled(each, texts, count) for key, each in value.items()}
        case list():
            return [_filled(each, texts, count) for each in value]
    return value


def _field(entry: Any, path: str) -> str:
    try:
        value = walk(entry, parse(path), "result")
    except PathError:
        return ""
    return "" if value is None else " ".join(str(value).split())[:500]


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
