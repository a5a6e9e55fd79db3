"""Publishing over RTSP (RFC 2326, RECORD), H.264 in RTP (RFC 3550, RFC 6184) on its connection."""

import base64
import random
import re
import secrets
import struct
import time

from ...trust.addresses import Address
from ..heads import head
from ..logins import Login
from ..sources import Lost
from .coding import CLOCK, Encoder, Unit
from .link import STUCK, Link

_PAYLOAD = 1400  # bytes of a packet
_TYPE = 96  # of the payload, as the description says
_FU_A = 28  # a part of a NAL unit
_REPORT = 2.0  # seconds between two reports that tie RTP's time to the clock's
_NTP = 2208988800  # seconds from 1900 to 1970
_HEAD, _BODY = 1 << 15, 1 << 18
_STATUS = re.compile(rb"RTSP/1\.\d (\d{3})")
_NOT_TAKEN = {
    401: "wants a user and a password: rtsp://user:password@...",
    403: "does not allow this stream",
    404: "does not know this path",
    405: "takes no streams, it only gives them",
    406: "does not take this stream: somebody sends there already",
    453: "has no room for it",
    461: "does not take RTP on the connection itself (TCP)",
    501: "takes no streams, it only gives them",
}


class Rtsp:
    """Args:
    address: rtsp(s)://host/path, with its secrets.
    coder: whose units are sent.
    """

    def __init__(self, address: Address, coder: Encoder):
        self._address, self._coder = address, coder
        self._link: Link | None = None
        self._login = Login(address)
        self._url = address.text(login=False)
        self._data, self._number, self._session = bytearray(), 0, ""
        self._channel = 0
        self._sequence, self._source = random.getrandbits(16), secrets.token_bytes(4)
        self._start = random.getrandbits(32)
        self._packets, self._bytes, self._reported = 0, 0, 0.0

    @staticmethod
    def check(address: Address) -> None:
        """Nothing but what every address needs."""

    def open(self) -> None:
        """Raises Lost, Refused."""
        self._link = Link(self._address)
        deadline = time.monotonic() + STUCK
        sdp = {"Content-Type": "application/sdp"}
        self._asked(deadline, "ANNOUNCE", self._url, sdp, self._description())
        here = "RTP/AVP/TCP;unicast;interleaved=0-1;mode=record"
        answer = self._asked(deadline, "SETUP", f"{self._url}/streamid=0", {"Transport": here})
        self._session = answer.get("session", "").partition(";")[0].strip()
        place = re.search(r"interleaved=(\d{1,3})", answer.get("transport", ""))
        self._channel = int(place[1]) & 0xFF if place else 0
        self._asked(deadline, "RECORD", self._url, {"Range": "npt=0.000-"})

    def _description(self) -> bytes:
        """What comes (RFC 4566; RFC 6184, section 8.2)."""
        sps, pps = self._coder.sps, self._coder.pps
        sets = ",".join(base64.b64encode(one).decode() for one in (sps, pps))
        host = "IN IP6 ::1" if ":" in self._address.host else "IN IP4 127.0.0.1"
        lines = [
            "v=0", f"o=- 0 0 {host}", "s=ComfyUI-LiveDiffusion", f"c={host}", "t=0 0",
            f"m=video 0 RTP/AVP {_TYPE}", f"a=rtpmap:{_TYPE} H264/{CLOCK}",
            f"a=fmtp:{_TYPE} packetization-mode=1; sprop-parameter-sets={sets}; "
            f"profile-level-id={sps[1:4].hex().upper()}",
            "a=control:streamid=0",
        ]  # fmt: skip
        return ("\r\n".join(lines) + "\r\n").encode()

    def send(self, unit: Unit) -> None:
        """Raises Lost."""
        link, now = self._link, time.monotonic()
        self._data += link.heard()
        for _ in self._answers():
            link.answer()
        if link.ask(now):
            self._say("OPTIONS", self._url, {})
        stamp = (self._start + unit.at) & 0xFFFFFFFF
        out = bytearray()
        if now - self._reported > _REPORT:
            self._reported = now
            out += self._report(stamp)
        sets = [self._coder.sps, self._coder.pps] if unit.key else []
        parts = [one for nal in (*sets, *unit.nals) for one in _cut(nal)]
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            kind = _TYPE | (0x80 if last else 0)
            head = struct.pack(">BBHI", 0x80, kind, self._sequence, stamp) + self._source
            self._sequence = (self._sequence + 1) & 0xFFFF
            self._packets += 1
            self._bytes += len(part)
            out += struct.pack(">cBH", b"$", self._channel, len(head) + len(part)) + head + part
        link.send(bytes(out))

    def _report(self, stamp: int) -> bytes:
        now = time.time() + _NTP
        body = struct.pack(
            ">BBH4sIIIII", 0x80, 200, 6, self._source,
            *(int(now) & 0xFFFFFFFF, int(now % 1 * 2**32), stamp),
            *(self._packets & 0xFFFFFFFF, self._bytes & 0xFFFFFFFF),
        )  # fmt: skip
        return struct.pack(">cBH", b"$", self._channel + 1 & 0xFF, len(body)) + body

    def room(self) -> None:
        self._link.room()

    def close(self) -> None:
        if self._link is None:
            return
        try:
            if self._session:
                self._say("TEARDOWN", self._url, {})
        except Lost:
            pass
        finally:
            self._link.close()

    def _say(self, method: str, url: str, headers: dict[str, str], body: bytes = b"") -> None:
        self._number += 1
        lines = [f"{method} {url} RTSP/1.0", f"CSeq: {self._number}"]
        proof = self._login.answer(method, url)
        lines += [f"Authorization: {proof}"] if proof else []
        lines += [f"Session: {self._session}"] if self._session else []
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(body)}"] if body else []
        self._link.send(head(lines) + body)

    def _asked(
        self, deadline: float, method: str, url: str, headers: dict[str, str], body: bytes = b""
    ) -> dict[str, str]:
        """The headers of the answer. Raises Lost: it is no, or there is none."""
        self._say(method, url, headers, body)
        while True:
            for status, said, asks in self._answers():
                if said.get("cseq") != str(self._number):
                    continue
                if status == 401 and self._login.hear(asks):
                    return self._asked(deadline, method, url, headers, body)
                if status != 200:
                    word = _NOT_TAKEN.get(status, f"does not take the stream ({status})")
                    if status == 401 and self._login.given:
                        word = "does not take this user and password"
                    raise Lost(f"{self._link.place} {word}")
                return said
            data = self._link.heard(max(0.0, deadline - time.monotonic()))
            if not data:
                raise Lost(f"{self._link.place} does not answer")
            self._data += data

    def _answers(self):
        """Whole answers in what has come: (status, headers, challenges). Raises Lost."""
        data = self._data
        while True:
            if data[:1] == b"$":  # reports of the receiver
                if len(data) < 4 or len(data) < 4 + (size := int.from_bytes(data[2:4], "big")):
                    return
                del data[: 4 + size]
                continue
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > _HEAD:
                    raise Lost(f"{self._link.place} does not speak RTSP")
                return
            first, *lines = bytes(data[:end]).lstrip().split(b"\r\n")
            pairs = [line.decode("latin-1").partition(":")[::2] for line in lines]
            headers = {name.strip().lower(): value.strip() for name, value in pairs}
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > _BODY:
                raise Lost(f"{self._link.place} does not speak RTSP")
            if len(data) < end + 4 + int(length):
                return
            del data[: end + 4 + int(length)]
            found = _STATUS.match(first)
            if found is not None:  # it may ask, too; nothing that it asks for is needed
                asks = [v.strip() for n, v in pairs if n.strip().lower() == "www-authenticate"]
                yield int(found[1]), headers, asks


def _cut(nal: bytes) -> list[bytes]:
    """A NAL unit as payloads of packets."""
    if len(nal) <= _PAYLOAD:
        return [nal]
    kind, rest, parts = nal[0], nal[1:], []
    size = _PAYLOAD - 2
    for begin in range(0, len(rest), size):
        first, last = begin == 0, begin + size >= len(rest)
        mark = (0x80 if first else 0) | (0x40 if last else 0) | kind & 31
        parts.append(bytes((kind & 0xE0 | _FU_A, mark)) + rest[begin : begin + size])
    return parts
