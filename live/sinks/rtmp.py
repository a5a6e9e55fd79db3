"""Publishing over RTMP, after Adobe's RTMP specification 1.0 and FLV's, version 10.1.

FFmpeg has it, too, but PyAV lets nothing else run while that connects (Python's lock is held in
avio_open), and it would look up names by itself.
"""

import secrets
import struct
import time
from urllib.parse import unquote

from ...trust.addresses import Address
from ..bounds import most
from ..faults import Refused
from ..sources import Lost
from .coding import CLOCK, Encoder, Unit
from .link import STUCK, Link

_CHUNK = 4096
_MOST = 1 << 20  # bytes of a message that is taken
_SIZE, _ABORT, _ACK, _USER, _WINDOW, _BAND = 1, 2, 3, 4, 5, 6  # kinds of messages
_VIDEO, _DATA, _COMMAND = 9, 18, 20
_PING, _PONG = 6, 7  # of user messages
_NOT_TAKEN = {
    "NetStream.Publish.BadName": "does not take this stream: its key is not known, or somebody "
    "sends there already",
    "NetStream.Publish.Denied": "does not allow this stream",
    "NetStream.Publish.Unauthorized": "does not allow this stream",
    "NetConnection.Connect.Rejected": "does not take the connection",
    "NetConnection.Connect.InvalidApp": "does not know the first part of the path",
}


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def _parts(address: Address) -> list[str]:
    """The path, as the server gets it. Raises Refused."""
    parts = [unquote(part) for part in address.path.split("/") if part]
    if not all(part.isprintable() for part in parts):
        raise Refused("address: its path has a sign that cannot be seen (%0D, %0A). Leave it out.")
    return parts


def coded(*values) -> bytes:
    """Values in AMF0: texts, numbers, truths, None, and dicts of those."""
    out = b""
    for value in values:
        if value is None:
            out += b"\x05"
        elif isinstance(value, bool):
            out += bytes((1, value))
        elif isinstance(value, str):
            out += b"\x02" + _text(value)
        elif isinstance(value, dict):
            parts = (_text(name) + coded(own) for name, own in value.items())
            out += b"\x03" + b"".join(parts) + b"\0\0\x09"
        else:
            out += b"\0" + struct.pack(">d", value)
    return out


def decoded(data: bytes, most: int = 64) -> list:
    """Values in AMF0, as far as they can be read; at most so many."""
    values, at = [], 0
    try:
        while at < len(data) and len(values) < most:
            value, at = _value(data, at, 8)
            values.append(value)
    except (IndexError, struct.error, ValueError):
        pass
    return values


def _value(data: bytes, at: int, depth: int):
    kind, at = data[at], at + 1
    if not depth:
        raise ValueError("too deep")
    if kind == 0:
        return struct.unpack_from(">d", data, at)[0], at + 8
    if kind == 1:
        return bool(data[at]), at + 1
    if kind in (2, 12):
        size = 2 if kind == 2 else 4
        length = int.from_bytes(data[at : at + size], "big")
        return data[at + size : at + size + length].decode("utf-8", "replace"), at + size + length
    if kind in (5, 6):
        return None, at
    if kind not in (3, 8):
        raise ValueError("no value that is known")
    at += 4 if kind == 8 else 0
    found = {}
    while data[at : at + 3] != b"\0\0\x09" and len(found) < 64:
        length = int.from_bytes(data[at : at + 2], "big")
        name, at = data[at + 2 : at + 2 + length].decode("utf-8", "replace"), at + 2 + length
        found[name], at = _value(data, at, depth - 1)
    return found, at + 3


class _Chunks:
    """What a server says, put together from its chunks."""

    def __init__(self):
        self._data, self._size = bytearray(), 128
        # of each chunk stream: length, kind, and what there is of its message
        self._streams: dict[int, list] = {}

    def take(self, data: bytes):
        """Whole messages: (kind, body). Raises ValueError: this is no RTMP."""
        self._data += data
        while (message := self._next()) is not None:
            if message[0] == _SIZE and len(message[1]) >= 4:
                self._size = int.from_bytes(message[1][:4], "big") & 0x7FFFFFFF
                if not 1 <= self._size <= _MOST:
                    raise ValueError("chunk size")
            elif message[0] >= 0:
                yield message

    def _next(self) -> tuple[int, bytes] | None:
        data = self._data
        if not data:
            return None
        form, stream, at = data[0] >> 6, data[0] & 63, 1
        if stream < 2:
            if len(data) < 2 + stream:
                return None
            stream, at = 64 + int.from_bytes(data[1 : 2 + stream], "little"), 2 + stream
        head = (11, 7, 3, 0)[form]
        if len(data) < at + head:
            return None
        own = self._streams.get(stream)
        if own is None:
            if form > 1 or len(self._streams) >= most("sinks.rtmp._Chunks._streams"):
                raise ValueError("a chunk without its beginning")
            own = self._streams[stream] = [0, 0, bytearray(), False]
        length, kind, late = own[0], own[1], own[3]
        if form < 3:
            late = data[at : at + 3] == b"\xff\xff\xff"
        if form < 2:
            length, kind = int.from_bytes(data[at + 3 : at + 6], "big"), data[at + 6]
        at += head + (4 if late else 0)
        part = min(self._size, length - len(own[2]))
        if length > _MOST or part < 0:
            raise ValueError("a message that is too long")
        if len(data) < at + part:
            return None
        own[0], own[1], own[3] = length, kind, late
        own[2] += data[at : at + part]
        del data[: at + part]
        if len(own[2]) < length:
            return -1, b""
        body, own[2] = bytes(own[2]), bytearray()
        return kind, body


class Rtmp:
    """Args:
    address: rtmp(s)://host/app/key, with its secrets.
    coder: whose units are sent.
    """

    def __init__(self, address: Address, coder: Encoder):
        self._address, self._coder = address, coder
        self._link: Link | None = None
        self._stream, self._heard, self._told = 0, 0, 0
        self._window = 1 << 30  # bytes after which the server wants to be told how many came
        self._chunks = _Chunks()
        self._parameters = b""

    @staticmethod
    def check(address: Address) -> None:
        """Raises Refused."""
        if len(_parts(address)) < 2:
            raise Refused(
                "address: RTMP needs an application and a key: rtmp://server/application/key"
            )

    def open(self) -> None:
        """Raises Lost, Refused."""
        link = self._link = Link(self._address)
        deadline = time.monotonic() + STUCK
        own = struct.pack(">II", 0, 0) + secrets.token_bytes(1528)
        link.send(b"\x03" + own)
        came = b""
        while len(came) < 1 + 2 * 1536:
            came += self._more(deadline)
            if came[:1] != b"\x03":
                raise Lost(f"{link.place} does not speak RTMP")
        link.send(came[1:1537])
        self._take(came[1 + 2 * 1536 :])
        link.send(self._message(2, _SIZE, struct.pack(">I", _CHUNK)))
        app, key = self._names()
        where = {
            "app": app, "type": "nonprivate", "flashVer": "FMLE/3.0 (compatible; FMSc/1.0)",
            "tcUrl": f"{self._address.origin}/{app}",
        }  # fmt: skip
        self._command(0, "connect", 1, where)
        self._until(deadline, "_result", 1)
        self._command(0, "releaseStream", 2, None, key)
        self._command(0, "FCPublish", 3, None, key)
        self._command(0, "createStream", 4, None)
        answer = self._until(deadline, "_result", 4)
        self._stream = int(answer[3]) if len(answer) > 3 and isinstance(answer[3], float) else 1
        self._command(self._stream, "publish", 5, None, key, "live")
        self._until(deadline, "onStatus", None)
        told = {
            "width": self._coder.width, "height": self._coder.height, "videocodecid": 7,
            "encoder": "ComfyUI-LiveDiffusion",
        }  # fmt: skip
        told = coded("@setDataFrame", "onMetaData", told)
        link.send(self._message(4, _DATA, told, stream=self._stream))

    def _names(self) -> tuple[str, str]:
        """The application and the stream key, as the server wants them."""
        parts = _parts(self._address)
        query = f"?{self._address.query}" if self._address.query else ""
        return "/".join(parts[:-1]), parts[-1] + query

    def send(self, unit: Unit) -> None:
        """Raises Lost."""
        link, now = self._link, time.monotonic()
        self._take(link.heard())
        if link.ask(now):
            link.send(self._message(2, _USER, struct.pack(">HI", _PING, round(now) & 0xFFFFFFFF)))
        at = unit.at * 1000 // CLOCK & 0xFFFFFFFF
        sps, pps = self._coder.sps, self._coder.pps
        parameters = b"\x01" + sps[1:4] + b"\xff\xe1" + b"\x01".join(
            struct.pack(">H", len(one)) + one for one in (sps, pps)
        )  # fmt: skip
        if parameters != self._parameters:
            self._parameters = parameters
            link.send(self._video(b"\x17\0\0\0\0" + parameters, at))
        body = b"".join(struct.pack(">I", len(one)) + one for one in unit.nals)
        link.send(self._video((b"\x17" if unit.key else b"\x27") + b"\x01\0\0\0" + body, at))

    def room(self) -> None:
        self._link.room()

    def close(self) -> None:
        if self._link is None:
            return
        try:
            if self._stream:
                _, key = self._names()
                self._command(0, "FCUnpublish", 6, None, key)
                self._command(0, "deleteStream", 7, None, self._stream)
        except Lost:
            pass
        finally:
            self._link.close()

    def _more(self, deadline: float) -> bytes:
        data = self._link.heard(max(0.0, deadline - time.monotonic()))
        if not data:
            raise Lost(f"{self._link.place} does not answer")
        return data

    def _until(self, deadline: float, name: str, number: int | None) -> list:
        """Wait for an answer."""
        while True:
            for answer in self._take(self._more(deadline)):
                if answer[0] == name and (number is None or answer[1:2] == [number]):
                    return answer

    def _take(self, data: bytes) -> list[list]:
        """Commands in what has come; the rest is dealt with. Raises Lost."""
        self._heard += len(data)
        found = []
        try:
            for kind, body in self._chunks.take(data):
                if kind == _WINDOW and len(body) >= 4:
                    self._window = max(1, int.from_bytes(body[:4], "big"))
                elif kind == _USER and len(body) >= 6:
                    event = int.from_bytes(body[:2], "big")
                    if event == _PING:
                        pong = struct.pack(">H", _PONG) + body[2:6]
                        self._link.send(self._message(2, _USER, pong))
                    elif event == _PONG:
                        self._link.answer()
                elif kind == _COMMAND:
                    found += self._looked_at(decoded(body))
        except ValueError:
            raise Lost(f"{self._link.place} does not speak RTMP") from None
        if self._heard - self._told >= self._window // 2:
            self._told = self._heard
            self._link.send(self._message(2, _ACK, struct.pack(">I", self._heard & 0xFFFFFFFF)))
        return found

    def _looked_at(self, answer: list) -> list[list]:
        status = next((v for v in answer if isinstance(v, dict) and "code" in v), {})
        code, level = str(status.get("code", "")), status.get("level")
        # some servers do not know the second and third command, which nothing depends on
        if level == "error" or (answer[:1] == ["_error"] and answer[1:2] not in ([2.0], [3.0])):
            said = _NOT_TAKEN.get(code, "does not take the stream")
            raise Lost(f"{self._link.place} {said}")
        return [answer] if answer else []

    def _command(self, stream: int, *values) -> None:
        self._link.send(self._message(3, _COMMAND, coded(*values), stream=stream))

    def _video(self, body: bytes, at: int) -> bytes:
        return self._message(6, _VIDEO, body, at, self._stream)

    def _message(self, chunks: int, kind: int, body: bytes, at: int = 0, stream: int = 0) -> bytes:
        """In chunks; a time that needs more than three bytes follows each of their heads."""
        late = struct.pack(">I", at) if at >= 0xFFFFFF else b""
        head = min(at, 0xFFFFFF).to_bytes(3, "big") + len(body).to_bytes(3, "big")
        out = bytes((chunks,)) + head + bytes((kind,)) + struct.pack("<I", stream) + late
        size = _CHUNK if kind != _SIZE else 128
        for begin in range(0, max(1, len(body)), size):
            if begin:
                out += bytes((0xC0 | chunks,)) + late
            out += body[begin : begin + size]
        return out
