"""SRT's live mode over UDP, as the one that calls: a file object to read from or to write to.

PyAV's wheels have no SRT, so this is the protocol in Python. After draft-sharabayko-srt-01 and what
libsrt 1.5 does where the draft is silent. MPEG-TS comes or goes in messages of one packet each.
Reading gives bytes in order as soon as they are there; what is lost is asked for again, and left
out once it is later than the agreed delay. Writing never waits.
"""

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections import deque
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from .bounds import most
from .faults import Refused
from .sources import Lost
from .srt_keys import Keys

PAYLOAD = 1316  # seven packets of MPEG-TS
SILENT = 2.5  # seconds without a packet of the other end, which says something every second
_HANDSHAKE, _KEEPALIVE, _ACK, _NAK, _SHUTDOWN, _ACKACK, _DROP, _USER = 0, 1, 2, 3, 5, 6, 7, 0x7FFF
_INDUCTION, _CONCLUSION = 1, 0xFFFFFFFF
_MAGIC = 0x4A17  # in the answer of one who knows version 5 of the handshake
_HSREQ, _HSRSP, _KMREQ, _KMRSP, _SID = 1, 2, 3, 4, 5  # extensions of the handshake
_VERSION = 0x010500
_FLAGS = 0x3F  # sends and takes by time, drops what is late, repeats its loss reports
_WINDOW = 8192  # packets that may be under way
_MOD, _HALF = 1 << 31, 1 << 30
_AGAIN = 0.25  # seconds between two tries of a handshake
_ACKS, _NAKS, _ALIVE = 0.01, 0.02, 1.0  # seconds between two of each
_MOST_TIMES = 1 << 29  # packets with the same key, after which a new connection makes another
_NOBODY = "nobody answers there"
_LEAST = 0.5  # seconds that one of several addresses has to answer, while there are so many left
_NOT_TAKEN = {
    1003: "it takes no more connections",
    1005: "it takes no more connections",
    1010: "the passphrase is wrong",
    1011: "one of the two ends has a passphrase, the other none",
    1012: "it expects a file, not a live stream",
    2400: "it does not understand the streamid",
    2401: "it does not allow this",
    2403: "it does not allow this",
    2404: "it does not know this streamid",
    2409: "somebody else sends there already",
}  # libsrt's reasons; those from 2000 on are what a server says


class Settings(NamedTuple):
    """What an address says after its `?`.

    Attributes:
        streamid: which stream, as the server wants it.
        passphrase: of the encryption; "" for none.
        key: bytes of the key: 16, 24 or 32.
        delay: seconds that a lost packet may be late.
    """

    streamid: str = ""
    passphrase: str = ""
    key: int = 16
    delay: float = 0.12


def settings(address: str) -> Settings:
    """Of srt://host:port?streamid=...&passphrase=...&latency=...&pbkeylen=...

    `latency` is taken as microseconds, as FFmpeg and OBS have it, or below 10,000 as milliseconds.

    Raises:
        Refused: it cannot be; the message begins with "address".
    """
    given = {k: v[-1] for k, v in parse_qs(urlsplit(address).query, max_num_fields=50).items()}
    if given.get("mode", "caller") != "caller":
        raise Refused("address: SRT goes from here to a listener; leave mode out.")
    streamid, passphrase = given.get("streamid", ""), given.get("passphrase", "")
    if len(streamid.encode()) > 512:
        raise Refused("address: the streamid is longer than 512 bytes.")
    if passphrase and not 10 <= len(passphrase.encode()) <= 79:
        raise Refused("address: a passphrase has 10 to 79 characters.")
    if passphrase:
        Keys.check()
    try:
        latency, key = float(given.get("latency", 120)), int(given.get("pbkeylen", 16) or 16)
    except ValueError:
        raise Refused("address: latency and pbkeylen are numbers.") from None
    delay = latency / (1e6 if latency >= 10_000 else 1e3)
    if not 0 <= delay <= 10 or key not in (16, 24, 32):
        raise Refused("address: latency is at most 10 seconds, pbkeylen 16, 24 or 32.")
    return Settings(streamid, passphrase, key, delay)


def ahead(a: int, b: int) -> int:
    """How far the sequence number a is ahead of b, over the wrap."""
    return (a - b + _HALF) % _MOD - _HALF


def called(ips: list[str], port: int, wanted: Settings, patience: float) -> "Srt":
    """A connection to the first that answers of a name's IP addresses, each checked already.

    Raises:
        Lost: none of them does in so many seconds, or what one said that says no.
    """
    deadline, said = time.monotonic() + patience, Lost(_NOBODY)
    for i, ip in enumerate(ips):
        made = Srt(ip, port, wanted)
        left = deadline - time.monotonic()
        try:
            made.open(min(left, max(_LEAST, left / (len(ips) - i))))
            return made
        except BaseException as reason:
            made.close()
            if not isinstance(reason, Lost):
                raise
            said = said if str(reason) == _NOBODY else reason
    raise said


class Srt:
    """A connection. Used by one thread besides its own; `close` may come from any.

    Args:
        host: an IP address, checked already.
        port: of UDP.
        wanted: see Settings.
    """

    def __init__(self, host: str, port: int, wanted: Settings):
        self._where, self._wanted = (host, port), wanted
        self._id = secrets.randbelow(_HALF - 1) + 1
        self._peer, self._began = 0, time.monotonic()
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._over, self._trouble = False, ""
        self._heard = self._said = 0.0  # when the last packet came and went
        self._keys = Keys(wanted.passphrase, wanted.key) if wanted.passphrase else None
        # what is sent: the next numbers, and what may have to be sent again
        self._out, self._message = secrets.randbelow(_HALF), 1
        self._first = self._out
        self._sent: deque[tuple[int, float, bytearray]] = deque(maxlen=most("srt.Srt._sent"))
        # what comes: the next to give, what came before it was its turn, what is to be read
        self._next, self._seen = 0, 0
        self._parked: dict[int, bytes] = {}
        self._gap: float | None = None  # since when the next one lacks
        self._ready: deque[bytes] = deque(maxlen=most("srt.Srt._ready"))
        self._acks, self._acked, self._ack_due, self._nak_due = 0, 0, 0.0, 0.0
        self._asked: tuple[int, float] = 0, 0.0  # the last ACK's number and when it went
        self._trip, self._spread = 0.1, 0.05  # of a packet and back, seconds

    def open(self, timeout: float) -> None:
        """Raises Lost: nobody answers in so many seconds, or says no."""
        family = socket.AF_INET6 if ":" in self._where[0] else socket.AF_INET
        deadline = time.monotonic() + timeout
        try:
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
            self._socket.connect(self._where)
            cookie = self._shake(self._first_words(), _INDUCTION, deadline)[7]
            answer = self._shake(self._conclusion(cookie), _CONCLUSION, deadline)
        except OSError:
            raise Lost(_NOBODY) from None
        self._peer, self._next = answer[6], answer[2]
        self._acked, self._seen = self._next, (self._next - 1) % _MOD
        self._heard = self._said = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="livediffusion-srt", daemon=True)
        self._thread.start()

    def read(self, size: int) -> bytes:
        """At most so many bytes; b"" after close. Raises Lost."""
        with self._changed:
            while not self._ready and not self._over and not self._trouble:
                self._changed.wait(1.0)
            if self._trouble:
                raise Lost(self._trouble)
            if self._over:
                return b""
            data = self._ready.popleft()
            if len(data) > size:
                self._ready.appendleft(data[size:])
            return data[:size]

    def write(self, data: bytes) -> int:
        """Sends it at once. Raises Lost."""
        whole = memoryview(data)
        with self._changed:
            for begin in range(0, len(whole), PAYLOAD):
                if self._trouble or self._over:
                    raise Lost(self._trouble or "the connection is closed")
                self._post(bytes(whole[begin : begin + PAYLOAD]))
        return len(whole)

    def close(self) -> None:
        """Says goodbye and lets go of the socket and the thread."""
        with self._changed:
            tell = self._thread is not None and not self._over and not self._trouble
            self._over = True
            if tell:
                self._control(_SHUTDOWN, body=bytes(4))
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._socket is not None:
            self._socket.close()

    # the handshake, sections 3.2.1 and 4.3.1 of the draft

    def _first_words(self) -> bytes:
        return self._handshake(4, 0, 2, _INDUCTION, 0)

    def _conclusion(self, cookie: int) -> bytes:
        delay = round(1000 * self._wanted.delay)
        body = struct.pack(">HHIIHH", _HSREQ, 3, _VERSION, _FLAGS, delay, delay)
        what = 1
        if self._keys is not None:
            message = self._keys.message()
            body += struct.pack(">HH", _KMREQ, len(message) // 4) + message
            what |= 2
        if self._wanted.streamid:
            text = self._wanted.streamid.encode()
            text += bytes(-len(text) % 4)
            words = len(text) // 4
            # words of little endian
            body += struct.pack(">HH", _SID, words)
            body += struct.pack(f">{words}I", *struct.unpack(f"<{words}I", text))
            what |= 4
        cipher = self._wanted.key // 8 if self._keys else 0
        return self._handshake(5, cipher, what, _CONCLUSION, cookie) + body

    def _handshake(self, version: int, cipher: int, what: int, kind: int, cookie: int) -> bytes:
        host = self._where[0]
        own = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
        return struct.pack(
            ">IHHIIIIII16s",
            *(version, cipher, what, self._out, 1500, _WINDOW, kind, self._id, cookie, own),
        )

    def _shake(self, words: bytes, kind: int, deadline: float) -> tuple:
        """Say it until the answer is there: version, cipher and what, number, ..., cookie."""
        while (now := time.monotonic()) < deadline:
            self._control(_HANDSHAKE, body=words)
            self._socket.settimeout(min(_AGAIN, max(0.01, deadline - now)))
            with contextlib.suppress(TimeoutError):
                while True:
                    data = self._socket.recv(2048)
                    if len(data) < 64 or data[:4] != b"\x80\0\0\0":
                        continue
                    answer = struct.unpack(">IIIIIIII", data[16:48])
                    if answer[5] == kind:
                        self._agree(kind, answer, data[64:])
                        return answer
                    if 1000 <= answer[5] < _HALF:
                        said = _NOT_TAKEN.get(answer[5], f"it says no (reason {answer[5]})")
                        raise Lost(said)
        raise Lost(_NOBODY)

    def _agree(self, kind: int, answer: tuple, extensions: bytes) -> None:
        if answer[0] < 5 or (kind == _INDUCTION and answer[1] & 0xFFFF != _MAGIC):
            raise Lost("the other end speaks an SRT older than 1.3")
        while len(extensions) >= 4:
            name, words = struct.unpack(">HH", extensions[:4])
            body, extensions = extensions[4 : 4 + 4 * words], extensions[4 + 4 * words :]
            if name == _KMRSP and len(body) == 4:
                raise Lost("the passphrase is wrong")

    # what goes

    def _now(self) -> int:
        """Microseconds since the connection began, as packets have it."""
        return round((time.monotonic() - self._began) * 1e6) & 0xFFFFFFFF

    def _give(self, data: bytes) -> None:
        self._said = time.monotonic()
        try:
            self._socket.send(data)
        except (BlockingIOError, TimeoutError):
            pass  # as if it were lost on the way
        except OSError:
            self._broke("the other end is gone")

    def _control(self, kind: int, info: int = 0, body: bytes = b"", sub: int = 0) -> None:
        head = struct.pack(">HHIII", 0x8000 | kind, sub, info, self._now(), self._peer)
        self._give(head + body)

    def _post(self, payload: bytes) -> None:
        number = self._out
        if self._keys is not None:
            if ahead(number, self._first) >= _MOST_TIMES:
                raise Lost("the key is used up")
            payload = self._keys.coded(number, payload)
        self._out = (number + 1) % _MOD
        # one packet is the whole message, in order; the even key
        flags = 0xE0000000 | (0x08000000 if self._keys else 0) | self._message
        self._message = self._message % 0x3FFFFFF + 1
        packet = bytearray(struct.pack(">IIII", number, flags, self._now(), self._peer) + payload)
        self._sent.append((number, time.monotonic(), packet))
        self._give(packet)

    def _again(self, body: bytes) -> None:
        """Send what a loss report asks for: numbers, and ranges whose first has the high bit."""
        words = [w for (w,) in struct.iter_unpack(">I", body[: len(body) // 4 * 4])]
        wanted, i = [], 0
        while i < len(words):
            if words[i] & _MOD and i + 1 < len(words):
                wanted.append((words[i] % _MOD, words[i + 1]))
                i += 1
            else:
                wanted.append((words[i] % _MOD, words[i] % _MOD))
            i += 1
        for number, _, packet in self._sent:
            if any(ahead(number, a) >= 0 >= ahead(number, b) for a, b in wanted[:64]):
                packet[4] |= 0x04  # sent before
                self._give(packet)

    # what comes

    def _serve(self) -> None:
        self._socket.settimeout(_ACKS)
        while not self._over and not self._trouble:
            try:
                data = self._socket.recv(2048)
            except TimeoutError:
                data = b""
            except OSError:
                data = None
            with self._changed:
                if data is None:
                    self._broke("the other end is gone")
                elif data:
                    self._take(data)
                self._tend(time.monotonic())

    def _broke(self, why: str) -> None:
        self._trouble = self._trouble or why
        self._changed.notify_all()

    def _take(self, data: bytes) -> None:
        if len(data) < 16:
            return
        first, second, _, to = struct.unpack(">IIII", data[:16])
        if to != self._id:
            return
        self._heard = time.monotonic()
        if not first & _MOD:
            self._data(first, second, data[16:])
            return
        kind, sub, body = first >> 16 & 0x7FFF, first & 0xFFFF, data[16:]
        if kind == _ACK and len(body) >= 4:
            self._arrived(struct.unpack(">I", body[:4])[0] % _MOD)
            if second:
                self._control(_ACKACK, second)
        elif kind == _NAK:
            self._again(body)
        elif kind == _ACKACK and second == self._asked[0]:
            trip = self._heard - self._asked[1]
            self._spread += (abs(trip - self._trip) - self._spread) / 4
            self._trip += (trip - self._trip) / 8
        elif kind == _DROP and len(body) >= 8:
            self._skip(struct.unpack(">II", body[:8]))
        elif kind == _SHUTDOWN:
            self._broke("the other end has ended it")
        elif kind == _USER and sub == _KMREQ and self._keys is not None and self._keys.take(body):
            self._control(_USER, body=body, sub=_KMRSP)

    def _arrived(self, number: int) -> None:
        while self._sent and ahead(number, self._sent[0][0]) > 0:
            self._sent.popleft()

    def _data(self, number: int, flags: int, payload: bytes) -> None:
        far = ahead(number, self._next)
        if far < 0 or number in self._parked:
            return
        if far > _WINDOW:  # so much is lost that nobody waits for it
            self._parked.clear()
            self._gap, self._next, self._seen = None, number, (number - 1) % _MOD
        key = flags >> 27 & 3
        if key:
            payload = self._keys.plain(number, payload, key) if self._keys else None
            if payload is None:
                return self._broke("it is encrypted, and the address has no passphrase")
        self._parked[number] = payload
        if (jump := ahead(number, self._seen)) > 0:
            if jump > 1:
                self._report((self._seen + 1) % _MOD, (number - 1) % _MOD)
            self._seen = number
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the reader what is next without a gap."""
        before = self._next
        while (payload := self._parked.pop(self._next, None)) is not None:
            self._ready.append(payload)
            self._next = (self._next + 1) % _MOD
        if self._next != before:
            self._gap = None
            self._changed.notify_all()
        if self._parked and self._gap is None:
            self._gap = time.monotonic()

    def _skip(self, span: tuple[int, int]) -> None:
        """The other end says that these will not come."""
        if ahead(self._next, span[0]) >= 0 >= ahead(self._next, span[1]):
            for number in [n for n in self._parked if ahead(n, span[1]) <= 0]:
                del self._parked[number]
            self._next = (span[1] + 1) % _MOD
            if ahead(self._next, self._seen) > 0:
                self._seen = span[1]
            self._gap = None
            self._hand_over()

    def _report(self, first: int, last: int) -> None:
        body = struct.pack(">I", first)
        if first != last:
            body = struct.pack(">II", first | _MOD, last)
        self._control(_NAK, body=body)

    def _tend(self, now: float) -> None:
        """What is due: acknowledgements, loss reports, signs of life, and the end of patience."""
        if now - self._heard > SILENT:
            return self._broke("the other end does not answer any more")
        while self._sent and now - self._sent[0][1] > 1.0 + 2 * self._wanted.delay:
            self._sent.popleft()  # too late to be of use
        if self._gap is not None and now - self._gap > self._wanted.delay:
            self._gap = None
            self._next = min(self._parked, key=lambda n: ahead(n, self._next))
            self._hand_over()
        if self._next != self._acked and now >= self._ack_due:
            self._ack_due = now + _ACKS
            self._acked, self._acks = self._next, self._acks % (_HALF - 1) + 1
            self._asked = self._acks, now
            trip, spread = round(self._trip * 1e6), round(self._spread * 1e6)
            room = max(2, _WINDOW - len(self._parked))
            self._control(
                _ACK, self._acks, struct.pack(">IIIIIII", self._next, trip, spread, room, 0, 0, 0)
            )
        if self._gap is not None and now >= self._nak_due:
            self._nak_due = now + max(_NAKS, (self._trip + 4 * self._spread) / 2)
            nearest = min(self._parked, key=lambda n: ahead(n, self._next))
            self._report(self._next, (nearest - 1) % _MOD)
        if now - self._said > _ALIVE:
            self._control(_KEEPALIVE)
