"""Classification of IP addresses: those of the public internet, and those that may lead to internal hosts."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# IANA's special-purpose registry for IPv4 (RFC 6890 and its successors), multicast, and one address that is public but
# internal in effect: at 168.63.129.16 Azure's host serves its virtual machines.
_IPV4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared by carriers (CGNAT)",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "Azure's host",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "IETF protocols",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private",
    "192.175.48.0/24": "AS112",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
# For IPv6 only 2000::/3 is global unicast (RFC 4291), and every address outside of it is refused. Networks outside of
# it are listed here only so that the error message can name their kind.
_IPV6 = {
    "::/128": "unspecified",
    "::1/128": "loopback",
    "::ffff:0:0/96": "IPv4-mapped",
    "::/96": "IPv4-compatible",
    "::ffff:0:0:0/96": "IPv4-translated",
    "64:ff9b::/96": "NAT64",
    "64:ff9b:1::/48": "NAT64",
    "100::/64": "discard",
    "2001::/32": "Teredo",
    "2001::/23": "IETF protocols",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
    "fc00::/7": "unique local",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
}
_SPECIAL: tuple[tuple[Network, str], ...] = tuple((ip_network(net), kind) for net, kind in (_IPV4 | _IPV6).items())
_GLOBAL_UNICAST = IPv6Network("2000::/3")


def classify_address(address: Address) -> str | None:
    """Return what kind of special address this is, such as "private", or None if it belongs to the public internet.

    Python's own `is_global` is not enough: in Python 3.11 it is true for 6to4, NAT64, 192.0.0.0/24 and multicast.
    """
    for network, kind in _SPECIAL:
        if address in network:
            return kind
    if isinstance(address, IPv6Address):
        if address not in _GLOBAL_UNICAST:
            return "not global unicast"
        if int(address) >> 32 & 0xFCFFFFFF == 0x5EFE:  # RFC 5214: the lower 32 bits are an IPv4 address
            return "ISATAP"
    return None if address.is_global else "not public"


def parse_address(text: str) -> Address | None:
    """Parse an address in its usual notation: no octal or hexadecimal numbers, no missing parts. None if it is none."""
    try:
        return ip_address(text)
    except ValueError:
        return None
