"""RTSP between FFmpeg and a server, message by message (RFC 2326): no redirect, no password, no
other address reaches FFmpeg; the login is put in here.

Every message is read whole and written anew, so that both ends see what was looked at. In between
go RTP packets, each behind `$`, its channel and its length.
"""

import re

from ..trust.addresses import Address
from .bounds import most
from .heads import head
from .logins import Login
from .sources import Lost

_HEAD = 2**15  # bytes of a message's head
_BODY = 2**18  # of its body: a description of the stream
_FIRST = re.compile(rb"([A-Z_]{3,20}) (\S{1,4096}) RTSP/1\.0")
_STATUS = re.compile(rb"RTSP/1\.0 ([1-5][0-9]{2})([^\r\n]*)")
# what FFmpeg is told; Location is not among it
_PASSED = {"cseq", "session", "transport", "rtp-info", "range", "public", "content-type",
           "content-length", "date", "scale"}  # fmt: skip


class _Cutter:
    """Bytes of one direction, cut into packets and messages."""

    def __init__(self, who: str):
        self._who, self._data = who, bytearray()

    def cut(self, data: bytes):
        """Packets as bytes; messages as (first line, headers, body). Raises Lost."""
        self._data += data
        found = []
        while (one := self._next()) is not None:
            found.append(one)
        return found

    def _next(self):
        data = self._data
        while data[:2] == b"\r\n":  # allowed between messages
            del data[:2]
        if data[:1] == b"$":
            if len(data) < 4 or len(data) < (end := 4 + int.from_bytes(data[2:4], "big")):
                return None
            packet = bytes(data[:end])
            del data[:end]
            return packet
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _HEAD or (len(data) >= 8 and not re.match(rb"[A-Z_]+[ /]", data)):
                raise Lost(f"{self._who} does not speak RTSP")
            return None
        first, *lines = bytes(data[:end]).split(b"\r\n")
        headers = [_header(line) for line in lines]
        length = next((v for n, v in headers if n.lower() == "content-length"), "0")
        if not length.isdecimal() or int(length) > _BODY:
            raise Lost(f"{self._who} does not speak RTSP")
        whole = end + 4 + int(length)
        if len(data) < whole:
            return None
        body = bytes(data[end + 4 : whole])
        del data[:whole]
        return first, headers, body


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("latin-1").partition(":")
    return name.strip(), "".join(c for c in value.strip() if c.isprintable())


class Conversation:
    """Args:
    address: the server's, with its login.
    mine: what FFmpeg has in place of the address.
    """

    def __init__(self, address: Address, mine: str):
        self._address, self._mine = address, mine
        self._login = Login(address)
        self._asking, self._answering = _Cutter("FFmpeg"), _Cutter(address.place)
        self._number, self._known = 0, False
        # asked, not answered: our number to FFmpeg's and to what was asked
        self._open: dict[int, tuple[str, tuple]] = {}
        self._bases = {mine: f"{address.origin}{address.path}" + (
            f"?{address.query}" if address.query else "")}  # fmt: skip

    def asked(self, data: bytes) -> bytes:
        """What FFmpeg says, as the server gets it. Raises Lost."""
        out = bytearray()
        for one in self._asking.cut(data):
            out += one if isinstance(one, bytes) else self._request(one)
        return bytes(out)

    def answered(self, data: bytes) -> tuple[bytes, bytes]:
        """What the server says, as FFmpeg gets it; and what is said to the server at once."""
        back, forth = bytearray(), bytearray()
        for one in self._answering.cut(data):
            if isinstance(one, bytes):
                back += one
            else:
                self._answer(one, back, forth)
        return bytes(back), bytes(forth)

    def _request(self, message) -> bytes:
        first, headers, body = message
        found = _FIRST.fullmatch(first)
        if found is None:
            raise Lost("FFmpeg asked for what is no RTSP")
        method, url = found[1].decode(), found[2].decode("latin-1")
        if not self._known and not url.startswith(self._mine):
            raise Lost("somebody else on this machine came in between")
        self._known = True
        theirs = next((v for n, v in headers if n.lower() == "cseq"), "0")
        kept = [(n, v) for n, v in headers if n.lower() not in ("cseq", "authorization")]
        return self._say(theirs, (method, self._real(url), kept, body))

    def _say(self, theirs: str, asked: tuple) -> bytes:
        method, url, headers, body = asked
        self._number += 1
        self._open[self._number] = theirs, asked
        while len(self._open) > most("rtsp.Conversation._open"):
            del self._open[next(iter(self._open))]
        proof = self._login.answer(method, url)
        lines = [f"{method} {url} RTSP/1.0", f"CSeq: {self._number}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines += [f"Authorization: {proof}"] if proof else []
        return head(lines) + body

    def _answer(self, message, back: bytearray, forth: bytearray) -> None:
        first, headers, body = message
        found = _STATUS.fullmatch(first)
        if found is None:
            if _FIRST.fullmatch(first):
                return  # a server may ask, too; nothing that it asks for is needed
            raise Lost(f"{self._address.place} does not speak RTSP")
        status, said = int(found[1]), {n.lower(): v for n, v in headers}
        number = said.get("cseq", "")
        theirs, asked = self._open.pop(int(number) if number.isdecimal() else -1, (None, None))
        if theirs is None:
            return
        if 300 <= status < 400:
            raise Lost(f"{self._address.place} leads to another address. Give that one.")
        if status == 401:
            if self._login.hear([v for n, v in headers if n.lower() == "www-authenticate"]):
                forth += self._say(theirs, asked)
                return
            word = "does not take this user and password" if self._login.given else (
                "wants a user and a password: rtsp://user:password@..."
            )  # fmt: skip
            raise Lost(f"{self._address.place} {word}")
        if status == 404:
            raise Lost(f"{self._address.place} has no stream of this name")
        said["cseq"] = theirs
        lines = [f"RTSP/1.0 {status} {found[2].decode('latin-1').strip() or 'OK'}"]
        lines += [f"{name}: {value}" for name, value in said.items() if name in _PASSED]
        base = said.get("content-base") or said.get("content-location")
        if base and asked[0] == "DESCRIBE":
            lines.append(f"Content-Base: {self._own(base)}")
        back += "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def _own(self, base: str) -> str:
        """A name for an address that the server wants its streams to be asked for by."""
        slash = "/" if base.endswith("/") else ""
        name = f"{self._mine}-base{slash}"
        self._bases = {name: base, self._mine: self._bases[self._mine]}
        return name

    def _real(self, url: str) -> str:
        for name, base in self._bases.items():
            if url.startswith(name):
                return base + url[len(name) :]
        return url
