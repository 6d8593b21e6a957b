"""Where a document's URL may lead: not to this machine or a cloud's metadata, unless the operator allows it.

A URL is checked before a request, and the address that was in fact connected to before anything is sent: so neither a
redirect nor a name that changes its address leads there.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from flowmesh.messages.job import Permits
from flowmesh.web.origins import origin

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_WITH_IPV4 = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")))
"""IPv6 ranges whose last 32 bits are an IPv4 address: compatible, mapped and translated ones, NAT64."""
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
"""Linux takes it for itself."""
_OF_CLOUDS = tuple(
    map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "100.100.100.200/32", "fd00:ec2::/32"))
)
"""Services of a cloud for its machines that are not link-local: of Azure, Oracle, Alibaba, and AWS over IPv6."""


class LocalAddress(OSError):
    """A URL leads to this machine, or to a service for it alone."""


def is_local(address: Address) -> bool:
    """Whether an address is loopback, link-local or unspecified, or a cloud's service for its machines."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.sixtofour, *(address.teredo or ())]
        if any(address in block for block in _WITH_IPV4):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(is_local(each) for each in inner if each is not None):
            return True
    if address.is_loopback or address.is_link_local or address.is_unspecified:
        return True
    if address.version == 4 and address in _THIS_NETWORK:
        return True
    return any(address.version == block.version and address in block for block in _OF_CLOUDS)


def is_allowed(permits: Permits, url: str) -> bool:
    """Whether the operator allows a URL wherever it leads: by `tasks.local_hosts`, or as the orchestrator's origin."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    named = f"[{host}]" if ":" in host else host
    names = (host, named, f"{named}:{origin(url)[2]}")
    if any(fnmatch.fnmatchcase(name, _plain(pattern)) for pattern in permits.local_hosts for name in names):
        return True
    return permits.orchestrator_url is not None and origin(url) == origin(permits.orchestrator_url)


def check(permits: Permits, url: str) -> None:
    """Check where a URL's host leads now. A name that nobody knows here is left to the proxy, or to the request.

    Raises:
        LocalAddress: to a local address, and the operator does not allow it.
    """
    if is_allowed(permits, url):
        return
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, origin(url)[2], type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    if any(is_local(ipaddress.ip_address(str(entry[4][0]).partition("%")[0])) for entry in found):
        raise LocalAddress(words(url))


def check_peer(peer: Any) -> None:
    """Raises LocalAddress for a connected socket's address (`getpeername`) that is local."""
    if isinstance(peer, tuple) and is_local(ipaddress.ip_address(str(peer[0]).partition("%")[0])):
        raise LocalAddress("the server's name leads to a local address")


def words(url: str) -> str:
    """The error for a URL that leads to a local address."""
    host = urlsplit(url).hostname
    return f"{host} leads to this machine, or to a service for it; the node's setting tasks.local_hosts allows hosts"


def _plain(pattern: str) -> str:
    """A pattern in which brackets are those of an IPv6 address."""
    return pattern.lower().replace("[", "[[]")
