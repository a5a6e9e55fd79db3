"""The head of a request, HTTP's or RTSP's: a line stays one line."""

import re

from .sources import Lost

_BREAKS = re.compile(r"[\r\n\0]")


def head(lines: list[str]) -> bytes:
    """Lines as they are sent, and the empty one behind them.

    Addresses were looked at before (trust/addresses.py): whatever slips through there brings no
    header of its own and no second request.

    Args:
        lines: a character for each byte.

    Raises:
        Lost: one of them would be two.
    """
    if any(_BREAKS.search(line) for line in lines):
        raise Lost("what is to be asked for has a line break in it, and is not sent")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
