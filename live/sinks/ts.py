"""MPEG-TS over SRT: one program with one stream of H.264 (ISO/IEC 13818-1)."""

import struct
import time

from ...trust.addresses import Address
from .. import srt, wires
from ..sources import Lost
from .coding import CLOCK, Encoder, Unit

_MAP, _VIDEO = 0x1000, 0x100  # packet identifiers
_SIZE, _ROOM = 188, 184
_H264 = 0x1B  # the stream's type
_AHEAD = CLOCK // 20  # ticks that a picture is there before it is shown: for receivers that wait
_OPEN = 2.0  # seconds
_TURN = 1 << 33  # ticks after which the times begin again


def _checksum(data: bytes) -> int:
    """CRC-32 as MPEG has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


def _table(name: int, number: int, body: bytes) -> bytes:
    section = struct.pack(">BHHBBB", name, 0xB000 | len(body) + 9, number, 0xC1, 0, 0) + body
    return b"\0" + section + struct.pack(">I", _checksum(section))


_PROGRAMS = _table(0, 1, struct.pack(">HH", 1, 0xE000 | _MAP))
_PROGRAM = _table(
    2, 1, struct.pack(">HHBHH", 0xE000 | _VIDEO, 0xF000, _H264, 0xE000 | _VIDEO, 0xF000)
)


def _filled(field: bytes, lack: int) -> bytes:
    """An adaptation field, or none, made longer by so many bytes."""
    if lack <= 0:
        return field
    if not field:
        field, lack = (b"\0", 0) if lack == 1 else (b"\0\0", lack - 2)
    return bytes((len(field) + lack - 1,)) + field[1:] + b"\xff" * lack


class Muxer:
    """Units as packets of MPEG-TS."""

    def __init__(self):
        self._counts = {0: 0, _MAP: 0, _VIDEO: 0}

    def packets(self, unit: Unit, sets: list[bytes]) -> bytes:
        """Args:
        sets: the parameter sets, for a unit that is a key.
        """
        out = b""
        if unit.key:
            for name, table in ((0, _PROGRAMS), (_MAP, _PROGRAM)):
                out += self._packet(name, table + b"\xff" * (_ROOM - len(table)), True)
        parts = [b"\x09\xf0", *(sets if unit.key else []), *unit.nals]
        data = b"".join(b"\0\0\0\1" + part for part in parts)
        shown = (unit.at + _AHEAD) % _TURN
        stamp = struct.pack(
            ">BHH", 0x21 | shown >> 29 & 0x0E, shown >> 14 & 0xFFFE | 1, shown << 1 & 0xFFFE | 1
        )
        data = b"\0\0\x01\xe0\0\0\x80\x80\x05" + stamp + data
        clock = unit.at % _TURN
        field = struct.pack(
            ">BBIBB", 7, 0x50 if unit.key else 0x10, clock >> 1, (clock & 1) << 7 | 0x7E, 0
        )
        at, first = 0, True
        while at < len(data):
            field = _filled(field, _ROOM - len(field) - (len(data) - at))
            size = _ROOM - len(field)
            out += self._packet(_VIDEO, field + data[at : at + size], first, bool(field))
            at, first, field = at + size, False, b""
        return out

    def _packet(self, name: int, body: bytes, first: bool, field: bool = False) -> bytes:
        count = self._counts[name]
        self._counts[name] = (count + 1) & 15
        kind = (0x40 if first else 0) << 8 | name
        return struct.pack(">BHB", 0x47, kind, (0x30 if field else 0x10) | count) + body


class Ts:
    """Args:
    address: srt://host:port?..., with its secrets.
    coder: whose units are sent.
    """

    def __init__(self, address: Address, coder: Encoder):
        self._address, self._coder = address, coder
        self._wanted = srt.settings(address.text())
        self._wire: srt.Srt | None = None
        self._muxer = Muxer()

    @staticmethod
    def check(address: Address) -> None:
        """Raises Refused."""
        srt.settings(address.text())

    def open(self) -> None:
        """Raises Lost, Refused."""
        deadline = time.monotonic() + _OPEN
        ips = wires.look_up(self._address)
        left = max(0.1, deadline - time.monotonic())
        try:
            self._wire = srt.called(ips, self._address.port, self._wanted, left)
        except Lost as reason:
            raise Lost(f"{self._address.place}: {reason}") from None

    def room(self) -> None:
        """There always is: what the network does not take is lost, and asked for again."""

    def send(self, unit: Unit) -> None:
        """Raises Lost."""
        try:
            self._wire.write(self._muxer.packets(unit, [self._coder.sps, self._coder.pps]))
        except Lost as reason:
            raise Lost(f"{self._address.place}: {reason}") from None

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
