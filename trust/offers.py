"""What a stranger's WebRTC offer may say, and where packets may go for it. See RFC 8866, RFC 8839.

An offer lists addresses ("candidates") that the other side is to try with packets of its own: left
alone, whoever may send one could have the server knock at any address that the server can reach.
So the server tries one address only, that which the request itself came from, and else waits to be
asked: a check that comes in proves, by the password of the answer, that its sender has read it. No
name is resolved, not even the `.local` ones that browsers hide their address behind.
"""

import ipaddress
import re
import socket

from .addresses import IP, never
from .schema import BadData

LARGEST = 64 * 1024  # bytes; a browser's offer of a camera has 6 to 8 KiB
_LINES, _LONG = 1500, 2000  # lines of an offer, characters of a line
MOST_SECTIONS = 4
MOST_CANDIDATES = 8
LEAST_PORT = 1024  # what listens below is no browser
_MEDIA = re.compile(r"m=(audio|video) \d{1,5}(/\d+)? (UDP/TLS/RTP/SAVPF?)( [0-9]{1,3}){1,100}")
_UFRAG = re.compile(r"a=ice-ufrag:([A-Za-z0-9+/=_-]{4,256})")  # some browsers' have = _ -, too
_PWD = re.compile(r"a=ice-pwd:([A-Za-z0-9+/=_-]{22,256})")
_CANDIDATE = re.compile(
    r"a=candidate:[\w+/-]{1,64} 1 udp (\d{1,10}) ([\w.:%-]{1,255}) (\d{1,5}) typ \w+( .*)?", re.I
)


def offer(data: bytes, peer: str) -> str:
    """An offer with the only candidates that may be tried.

    Args:
        peer: the IP address that the request came from.

    Raises:
        BadData: it is no offer of pictures or sound.
    """
    lines = _lines(data)
    if not lines or lines[0] != "v=0":
        raise BadData("The offer is no session description (SDP).")
    media = [line for line in lines if line.startswith("m=")]
    if not 1 <= len(media) <= MOST_SECTIONS or not all(map(_MEDIA.fullmatch, media)):
        raise BadData(f"The offer must be of 1 to {MOST_SECTIONS} tracks of video and audio.")
    if not any(line.startswith("m=video") for line in media):
        raise BadData("The offer has no video.")
    for prefix, form in (("a=ice-ufrag:", _UFRAG), ("a=ice-pwd:", _PWD)):
        said = [line for line in lines if line.startswith(prefix)]
        if not said or not all(map(form.fullmatch, said)):
            raise BadData(f"The offer has no {prefix[2:-1]}.")
    kept: list[str] = []
    left = dict.fromkeys(candidates(lines, peer))
    for line in lines:
        # without the sign that all are told, the other side may still be heard later
        if line.startswith(("a=candidate:", "a=end-of-candidates", "a=remote-candidates:")):
            continue
        kept.append(line)
        if line.startswith("m="):
            kept += [f"a={one}" for one in left]
    return "\r\n".join(kept) + "\r\n"


def answer(data: bytes, peer: str) -> str:
    """The answer of a server that was asked to take pictures, with candidates that may be tried.

    Those at the address that it answered from. Where that is a public one, other public ones, too,
    because large services answer at one place and take the pictures at another; where it is this
    machine, all of this machine's own.

    Args:
        peer: the IP address that it came from.

    Raises:
        BadData: it is none.
    """
    lines = _lines(data)
    media = [line for line in lines if line.startswith("m=")]
    if lines[0] != "v=0" or len(media) != 1 or not _MEDIA.fullmatch(media[0]):
        raise BadData("The answer is no session description (SDP) of one track.")
    there, kept, ports = _address(peer), [], 0
    for line in lines:
        if line.startswith("a=candidate:"):
            match = _CANDIDATE.fullmatch(line)
            host = match and _address(match[2])
            if host is None or not 0 < int(match[3]) < 2**16 or ports >= MOST_CANDIDATES:
                continue
            if never(host) is not None or not _belongs(host, there):
                continue
            ports += 1
            line = f"a=candidate:{ports} 1 udp {min(int(match[1]), 2**31 - 1)} {host} {match[3]}"
            line += " typ host"
        kept.append(line)
    return "\r\n".join(kept) + "\r\n"


def fragment(data: bytes, peer: str) -> tuple[str | None, list[str]]:
    """Candidates that are told after the offer (RFC 8840).

    Returns:
        The ufrag that it is about, if it says one, and the candidates that may be tried.

    Raises:
        BadData: it cannot be read.
    """
    lines = _lines(data)
    said = [match[1] for line in lines if (match := _UFRAG.fullmatch(line))]
    return (said[0] if said else None), candidates(lines, peer)


def ufrags(text: str) -> set[str]:
    """The user fragments of a description."""
    return {match[1] for line in text.splitlines() if (match := _UFRAG.fullmatch(line))}


def candidates(lines: list[str], peer: str) -> list[str]:
    """What may be tried of an offer's candidates: its words are not passed on, but made anew.

    Args:
        peer: the IP address that the request came from; of this machine itself none is tried, since
            who is here reaches the server without.
    """
    there = _address(peer)
    if there is None or there.is_loopback or there.is_unspecified or there.is_multicast:
        return []
    ports: dict[int, int] = {}
    for line in lines:
        match = _CANDIDATE.fullmatch(line)
        if match is None or len(ports) >= MOST_CANDIDATES:
            continue
        priority, host, port = int(match[1]), match[2], int(match[3])
        hidden = host.lower().endswith(".local")
        if (hidden or _address(host) == there) and LEAST_PORT <= port < 2**16:
            ports.setdefault(port, min(priority, 2**31 - 1))
    return [
        f"candidate:{number} 1 udp {priority} {there} {port} typ host"
        for number, (port, priority) in enumerate(ports.items(), 1)
    ]


def _belongs(host: IP, there: IP | None) -> bool:
    if there is None or host == there:
        return host == there
    if not there.is_loopback:
        return there.is_global and host.is_global
    family = socket.AF_INET6 if host.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as own:
            own.bind((str(host), 0))  # only an address of this machine can be bound
    except OSError:
        return False
    return True


def _address(text: str) -> IP | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _lines(data: bytes) -> list[str]:
    if len(data) > LARGEST:
        raise BadData(f"The offer is larger than {LARGEST} bytes.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadData("The offer is not UTF-8.") from None
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    if len(lines) > _LINES or any(len(line) > _LONG or not line.isprintable() for line in lines):
        raise BadData("The offer has too many lines, too long ones, or control characters.")
    return lines
