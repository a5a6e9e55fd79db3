"""By which address a phone reaches this server, and the code that says it."""

import functools
import ipaddress
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from comfy.cli_args import args

from ..trust.boundary import place

# reserved for documentation (RFC 5737): nothing is sent there, the system only says which way it is
_ELSEWHERE = ("192.0.2.1", 9)


class Asked(NamedTuple):
    """How a page has asked for something.

    Attributes:
        scheme: http or https.
        host: what Host says, or the proxy before it.
        listens: ComfyUI's --listen.
    """

    scheme: str
    host: str
    listens: str


def asked(headers: Mapping[str, str], scheme: str) -> Asked:
    """By what its page has reached this server, through the proxies that say so.

    Args:
        scheme: of the connection itself.
    """
    first = [headers.get(f"X-Forwarded-{name}", "").partition(",")[0] for name in ("Proto", "Host")]
    proto, host = (one.strip() for one in first)
    scheme = proto if proto in ("http", "https") else scheme
    return Asked(scheme, host or headers.get("Host", ""), args.listen or "")


def own_address() -> str | None:
    """This machine's address in its network; None where it is in none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
            found = probe.getsockname()[0]
        except OSError:
            return None
    return None if _is_local(found) else found


def address(asked: Asked, path: str) -> tuple[str, str | None]:
    """The whole address of a path for a phone, and why it would not do there.

    A page that was opened by another name than localhost was opened by one that others can use.

    Returns:
        The address; "local" where nothing but this computer is listened to, "insecure" where
        browsers give no camera to the page, else None.
    """
    found = place(asked.host)
    name, port = found or ("localhost", None)
    trouble = None
    if _is_local(name):
        listens = [one.strip() for one in asked.listens.split(",")]
        others = [one for one in listens if not _is_local(one)]
        mine = own_address()
        if others and mine is not None:
            # one that it was told to listen to by name, or any
            name = mine if others[0] in ("0.0.0.0", "::") else others[0]
        else:
            trouble = "local"
    if trouble is None and asked.scheme != "https":
        trouble = "insecure"
    shown = f"[{name}]" if ":" in name else name
    return f"{asked.scheme}://{shown}{f':{port}' if port else ''}{path}", trouble


def _is_local(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


@functools.lru_cache(maxsize=32)
def code(url: str) -> str | None:
    """A QR code as the address of a picture; None where segno is not installed."""
    try:
        import segno
    except ImportError:
        return None
    return segno.make(url, error="m", micro=False).svg_data_uri(border=3, light="#fff")


def told(asked: Asked, path: str) -> dict[str, Any]:
    """What a page is told of a phone's address."""
    url, trouble = address(asked, path)
    return {"url": url, "qr": None if trouble else code(url), "trouble": trouble}
