"""Requests to addresses that people have entered: to public hosts only.

The name is resolved here, every address of it is checked, and the connection goes to one that was
checked: a name that resolves otherwise a moment later reaches nothing. Redirects are not followed.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore

TIMEOUT_SECONDS = 15.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Nothing else of IPv6 is assigned to the internet: old and local forms of IPv4 lie beside it.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Not global, but the standard library's list of Python 3.11 has them not.
_SPECIAL = tuple(
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20")
)


class ForbiddenHostError(Exception):
    """The address leads into a private network, or cannot be resolved."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, whatever it is wrapped in."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if found not in _GLOBAL_UNICAST:
            return False
    special = any(found in network for network in _SPECIAL)
    return found.is_global and not found.is_multicast and not special


def resolve_public(host: str, port: int) -> str:
    """One address of a host.

    Raises:
        ForbiddenHostError: one of its addresses is not public, or it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the second: no name can be so
        raise ForbiddenHostError(f"{host} cannot be resolved: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not is_public(address.partition("%")[0]):
            raise ForbiddenHostError(f"{host} is in a private network ({address})")
    return addresses[0]


class _PublicOnly(httpcore.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        # TLS still asks for the certificate of the name: httpcore gives it the origin's host.
        address = resolve_public(host, port)
        return super().connect_tcp(address, port, timeout, local_address, socket_options)


def post(url: str, body: bytes, headers: dict[str, str]) -> int:
    """The status of the answer.

    Raises:
        ForbiddenHostError: it leads into a private network.
        httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError: no answer.
    """
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_SECONDS)
    with (
        httpcore.ConnectionPool(
            ssl_context=ssl.create_default_context(), network_backend=_PublicOnly()
        ) as pool,
        pool.stream(
            "POST",
            url,
            headers=list(headers.items()),
            content=body,
            extensions={"timeout": timeouts},
        ) as answer,
    ):
        return int(answer.status)
