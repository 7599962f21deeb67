"""Which addresses a server may be sent to by somebody who names a host: those of the public internet alone."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from onebase.adapters.errors import AdapterRejected, SourceFailed
from onebase.adapters.sources.location import IPAddress, Url

LookUp = Callable[[str, int], list[str]]

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Forms of IPv6 that carry another address, or a place of their own site, and that some router may unwrap.
_REFUSED = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10")))


def addresses_of(url: Url, look_up: LookUp, *, named: bool) -> tuple[IPAddress, ...]:
    """Where to connect for a host; every one of its addresses has to be allowed. Raises AdapterRejected, SourceFailed.

    named: the operator's entry names this very host as a literal address, or as localhost.
    """
    if named and url.address is not None:
        return (url.address,)
    found = (url.address,) if url.address is not None else _look_up(url, look_up)
    allowed = is_loopback if named and url.host == "localhost" else is_public
    if not all(map(allowed, found)):
        raise AdapterRejected(
            f"{url.host} has an address that is not on the public internet; --allow-url has to name such an address "
            "itself.",
            param="source",
        )
    return found


def is_public(address: IPAddress) -> bool:
    """Whether it is a unicast address that is routed globally, whatever form of IPv6 carries it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _embedded(address)
        if inner is not None:
            return is_public(inner)
        if any(address in network for network in _REFUSED):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def is_loopback(address: IPAddress) -> bool:
    return address.is_loopback


def system_look_up(host: str, port: int) -> list[str]:
    """The operating system's answer. Raises OSError."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _look_up(url: Url, look_up: LookUp) -> tuple[IPAddress, ...]:
    try:
        found = tuple(dict.fromkeys(ipaddress.ip_address(text) for text in look_up(url.host, url.port)))
    except (OSError, UnicodeError, ValueError) as error:
        raise SourceFailed(f"{url.host} cannot be looked up.", param="source") from error
    if not found:
        raise SourceFailed(f"{url.host} has no address.", param="source")
    return found


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
