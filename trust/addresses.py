"""Addresses that a live run may reach: how they are read, where they may never lead, who allows.

A picture source or sink outside this machine is named by an address. It is read here, strictly and
once; what was read is matched with the patterns that the person at the server wrote down; and each
number that its name stands for is looked at before anything is sent there. No file is ever an
address: only SCHEMES are read.

Sources: RFC 3986 (addresses), RFC 6890 and its registries (special numbers), RFC 4291 (IPv6), RFC
6052 and 8215 (NAT64), RFC 3056 (6to4), RFC 4380 (Teredo), RFC 5214 (ISATAP).
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from urllib.parse import unquote

from .schema import BadData, shown

SCHEMES = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "rtmps": 443, "srt": None,
           "http": 80, "https": 443}  # fmt: skip
SECURE = ("rtsps", "rtmps", "https")
MOST = 1024  # characters of an address or a pattern
MOST_PATTERNS = 1000

IP = ipaddress.IPv4Address | ipaddress.IPv6Address

# RFC 3986's, but for *, which patterns have; and { }, in which a secret's name stands
_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()+,;=%{}-]+")
_PARTS = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://(?:([^/?#@]*)@)?(\[[0-9A-Fa-f:.]+\]|[^/?#@:\[\]]*)"
    r"(?::([0-9]{1,5}))?(/[^?#]*)?(?:\?([^#]*))?(?:#(.*))?"
)
_WRITTEN = "in a password @ is written %40, / is %2F, # is %23, a space is %20"
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_NUMERIC = re.compile(r"(0[xX][0-9A-Fa-f]*|[0-9]+)")
_DOTS = re.compile(r"(?:^|/|%2f|%5c)(?:\.|%2e){1,2}(?:/|%2f|%5c|$)", re.IGNORECASE)


class Address(NamedTuple):
    """An address in its parts, as it was read.

    Attributes:
        scheme: one of SCHEMES.
        login: what stands before the @, "" for nothing: user:password, percent-encoded.
        host: a name in lower case, or an IP address in its usual spelling, without brackets.
        port: 1..65535.
        path: "" or begins with /.
        query: what follows ?, without it.
    """

    scheme: str
    login: str
    host: str
    port: int
    path: str
    query: str

    @property
    def ip(self) -> IP | None:
        """The IP address that the host is; None for a name."""
        return _ip(self.host)

    @property
    def place(self) -> str:
        """`host:port`, as it stands in an address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def origin(self) -> str:
        """scheme://host:port: whom a secret is told to."""
        return f"{self.scheme}://{self.place}"

    @property
    def target(self) -> str:
        """Path and query, as HTTP asks for them."""
        return (self.path or "/") + (f"?{self.query}" if self.query else "")

    def text(self, login: bool = True) -> str:
        """The address as one text; its port is left out where it is the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == SCHEMES[self.scheme] else f":{self.port}"
        who = f"{self.login}@" if login and self.login else ""
        query = f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{who}{host}{port}{self.path}{query}"


def parsed(text: str, what: str = "address") -> Address:
    """An address in its parts.

    Args:
        what: the node's input, for the message.

    Raises:
        BadData: it is none that is opened here; the message does not show it.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadData(f"{what}: none is given. Give one such as rtsp://camera.local/stream.")
    scheme, slashes, _ = text.partition("://")
    scheme = scheme.lower()
    if not slashes or scheme not in SCHEMES:
        # what stands before a : alone may be the name of a user
        named = slashes and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme)
        raise BadData(
            f"{what}: {f'{shown(scheme)} is not opened' if named else 'it is none'}. "
            f"It begins with one of {', '.join(f'{name}://' for name in SCHEMES)}."
        )
    if len(text) > MOST or not _CHARACTERS.fullmatch(text):
        raise BadData(
            f"{what}: at most {MOST} letters, digits and signs of an address are expected; "
            f"{_WRITTEN}, a name with other letters in its xn-- form."
        )
    found = _PARTS.fullmatch(text)
    if found is None:
        raise BadData(unreadable(what))
    _, login, host, port, path, query, _ = found.groups()
    number = int(port) if port else SCHEMES[scheme]
    if number is None or not 0 < number < 2**16:
        raise BadData(f"{what}: it needs a port, 1 to 65535, as in {scheme}://host:9000.")
    if "@" in (path or "") + (query or ""):
        raise BadData(f"{what}: @ stands behind the password only; elsewhere it is written %40.")
    if not unquote(login or "").isprintable():
        # it is decoded before it is sent, and what follows a line break would be a header
        raise BadData(
            f"{what}: its user or password has a line break or another sign that cannot be seen "
            "(%0D, %0A). Leave it out."
        )
    if _DOTS.search(path or ""):
        raise BadData(f"{what}: its path must not have . or .. in it.")
    return Address(scheme, login or "", _host(host, what), number, path or "", query or "")


def unreadable(what: str) -> str:
    """What is said of a text that is no address, and may have a secret in it."""
    return (
        f"{what}: it is not written as an address is. Give all of it in one, as "
        f"rtsp://user:password@host:port/path; {_WRITTEN}."
    )


def _host(host: str, what: str) -> str:
    """A host's one spelling. Raises BadData."""
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            raise BadData(f"{what}: what stands in [ ] is no IPv6 address.") from None
    name = host.lower().removesuffix(".")
    labels = name.split(".")
    if _NUMERIC.fullmatch(labels[-1]):
        # 2130706433, 0x7f.1 and 0177.0.0.1 are all 127.0.0.1 to a resolver
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise BadData(f"{what}: its host is a number. Write it as four, as 10.0.0.5.") from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadData(f"{what}: its host is neither a name nor an IP address.")
    return name


def _ip(host: str) -> IP | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


# -- where none may lead ---------------------------------------------------------------------

_networks = ipaddress.ip_network
_NEVER = [
    (_networks(network), why)
    for why, networks in {
        "is where cloud machines ask who they are": (
            "169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "100.100.100.200/32",
            "168.63.129.16/32", "192.0.0.192/32", "fd20:ce::/32", "fd00:42::/32",
        ),
        "is no place": ("0.0.0.0/8", "::/128", "192.0.0.0/29", "100::/64"),
        "is many places at once": ("224.0.0.0/4", "255.255.255.255/32", "ff00::/8"),
        "is kept for no use": ("240.0.0.0/4", "fec0::/10"),
    }.items()
    for network in networks
]  # fmt: skip
_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


def _meant(ip: IP) -> Iterator[IP]:
    """An IP address, and the IPv4 addresses that are written into it."""
    yield ip
    if ip.version == 4:
        return
    bits = int(ip)

    def inner(shift: int = 0, flip: int = 0) -> ipaddress.IPv4Address:
        return ipaddress.IPv4Address(bits >> shift & 0xFFFFFFFF ^ flip)

    if bits >> 32 in (0xFFFF, 0xFFFF0000) or (bits >> 32 == 0 and bits > 1):
        yield inner()  # mapped, translated, compatible
    if ip in _NAT64:
        yield inner()
    if ip in _NAT64_LOCAL:
        # the length of its prefix is the network's own
        for shift in (0, 40, 32, 24, 16):
            yield inner(shift)
    if ip.sixtofour is not None:
        yield ip.sixtofour
    if ip.teredo is not None:
        yield from ip.teredo
    if bits >> 32 & 0xFCFFFFFF == 0x00005EFE:
        yield inner()  # ISATAP


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")


def never(ip: IP) -> str | None:
    """Why an IP address is not reached, whatever is allowed; None if it may be."""
    for one in _meant(ip):
        for network, why in _NEVER:
            if one.version == network.version and one in network:
                return why
    return None


def is_loopback(ip: IP) -> bool:
    """Whether it is this machine, in whichever spelling."""
    return any(
        one in _LOOPBACK if one.version == 4 else one == ipaddress.IPv6Address(1)
        for one in _meant(ip)
    )


# -- what is allowed -------------------------------------------------------------------------


class Pattern(NamedTuple):
    """What one line of the list allows.

    Attributes:
        scheme: of SCHEMES.
        host: a name, an IP address, either with `*` in it, or a network: 10.0.0.0/24.
        port: None for any.
        target: path and query, with `*` for anything; "" for any.
    """

    scheme: str
    host: str
    port: int | None
    target: str

    def fits(self, address: Address) -> bool:
        """Whether an address is one of those it allows. Its login is not looked at."""
        return (
            self.scheme == address.scheme
            and self.port in (None, address.port)
            and self._host_fits(address)
            and (not self.target or _fits(self.target, address.target))
        )

    def _host_fits(self, address: Address) -> bool:
        if address.host in ("localhost",) or (address.ip and is_loopback(address.ip)):
            return self.host == address.host  # this machine only where it says so
        if "/" in self.host:
            network = ipaddress.ip_network(self.host)
            ip = address.ip
            return ip is not None and ip.version == network.version and ip in network
        return _fits(self.host, address.host)


def _fits(pattern: str, text: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.DOTALL) is not None


_PATTERN = re.compile(
    r"([a-z]+)://(\[[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?\]|[A-Za-z0-9_.*-]+)"
    r"(?::([0-9]{1,5}|\*))?(/[^#]*)?"
)


def pattern(text: str, what: str = "allowed") -> Pattern:
    """A pattern as it is written: scheme://host:port/path?query.

    `rtsp://camera.local/stream`, `rtsp://[10.0.0.0/24]:*/live/*`, `srt://*.studio.example:*`. No
    port is the scheme's usual one, `*` any; no path is any path and query.

    Raises:
        BadData: it is none.
    """
    found = _PATTERN.fullmatch(text) if isinstance(text, str) and len(text) <= MOST else None
    if found is None or found[1] not in SCHEMES:
        raise BadData(f"{what}: this is no pattern. Write scheme://host:port/path, no password.")
    scheme, host, port, target = found.groups()
    bracketed, host = host[0] == "[", host.lower().strip("[]")
    number = SCHEMES[scheme] if port is None else None if port == "*" else int(port)
    if "/" in host:
        try:
            host = str(ipaddress.ip_network(host, strict=False))
        except ValueError:
            raise BadData(f"{what}: {host} is no network.") from None
    elif (ip := _ip(host)) is not None:
        host = str(ip)
    elif bracketed:
        raise BadData(f"{what}: {host} is no IPv6 address.")
    return Pattern(scheme, host, number, target or "")


def as_pattern(address: Address) -> str:
    """The narrowest pattern that allows an address; what is concealed in it may be anything."""
    own = address._replace(login="", path=address.path or "/")
    return re.sub(r"\{[^{}]*\}", "*", own.text())


def allowed(address: Address, patterns: Iterable[Pattern]) -> bool:
    """Whether one of the patterns allows an address; see `reachable` for where it leads."""
    return any(one.fits(address) for one in patterns)


def reachable(address: Address, ips: Iterable[str], what: str = "address") -> list[IP]:
    """The IP addresses that a connection to an allowed address may go to.

    Args:
        ips: all that its name stands for, as the resolver gave them.
        what: the node's input, for the message.

    Raises:
        BadData: one of them may not be reached; then none is, for a name that leads both to a
            place and into this network was made to.
    """
    found = []
    for text in ips:
        ip = ipaddress.ip_address(text.partition("%")[0])
        why = never(ip)
        if why is not None:
            raise BadData(f"{what}: {address.host} leads to {ip}, which {why}. It is not opened.")
        named = address.host == "localhost" or (address.ip and is_loopback(address.ip))
        if is_loopback(ip) and not named:
            raise BadData(
                f"{what}: {address.host} leads to this machine. Only an address that says "
                "localhost or 127.0.0.1 may."
            )
        if ip not in found:
            found.append(ip)
    if not found:
        raise BadData(f"{what}: {address.host} leads nowhere.")
    return found
