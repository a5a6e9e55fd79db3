"""Moving pictures without a camera or a library: coloured tiles as JPEG. Standard library only."""

import functools
import math
import struct

_TILE = 8  # pixels, a JPEG's block
# one code of 4 bits for each category of a DC difference (12 of them); of AC coefficients there is
# only the end of a block, one bit (ITU-T T.81, F.1.2 and annex C)
_CATEGORY_BITS = 4
_QUANTUM = 8  # of the DC coefficient, which is 8 times a block's mean: a step is one level


def frames(width: int, height: int, count: int = 8) -> list[bytes]:
    """A moving picture as JPEGs, each unlike the one before all over.

    Args:
        width, height: in pixels.
        count: frames of one period.
    """
    head = _head(width, height)
    scans = (_scan(width, height, 2 * math.pi * k / count) for k in range(count))
    return [head + scan + b"\xff\xd9" for scan in scans]


def _scan(width: int, height: int, phase: float) -> bytes:
    columns, rows = -(-width // _TILE), -(-height // _TILE)
    bits, last = [], [0, 0, 0]
    for y in range(rows):
        for x in range(columns):
            colour = (
                round(90 * math.sin(phase + x / 3) * math.cos(y / 5)),
                round(60 * math.sin(phase + y / 4)),
                round(60 * math.cos(phase + (x + y) / 6)),
            )
            for i, level in enumerate(colour):
                bits.append(_coded(level - last[i]))
                last[i] = level
    whole = "".join(bits)
    whole += "1" * (-len(whole) % 8)
    return int(whole, 2).to_bytes(len(whole) // 8, "big").replace(b"\xff", b"\xff\x00")


@functools.cache
def _coded(difference: int) -> str:
    """The bits of a block whose mean is so much more than that of the one before."""
    size = abs(difference).bit_length()
    more = difference if difference > 0 else difference + (1 << size) - 1
    return f"{size:0{_CATEGORY_BITS}b}" + (f"{more:0{size}b}" if size else "") + "0"


def _head(width: int, height: int) -> bytes:
    def segment(marker: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

    categories = bytes(range(12))
    components = b"".join(bytes((i, 0x11, 0)) for i in (1, 2, 3))
    return b"\xff\xd8" + b"".join(
        [
            segment(0xDB, bytes([0]) + bytes([_QUANTUM]) * 64),
            segment(0xC0, struct.pack(">BHHB", 8, height, width, 3) + components),
            segment(0xC4, bytes([0x00]) + bytes([0, 0, 0, 12] + [0] * 12) + categories),
            segment(0xC4, bytes([0x10]) + bytes([1] + [0] * 15) + b"\x00"),
            segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])),
        ]
    )
