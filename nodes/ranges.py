"""Numbers that nodes' inputs may have, looked at whenever a node runs.

ComfyUI looks at numbers that are typed in. What comes by a wire nobody looks at, and one NaN in the
state of a stream spoils every picture that follows.
"""

import functools
import inspect
import operator
from typing import Any, NamedTuple

from ..live.faults import Refused
from ..live.frames import current
from ..live.pictures import short
from .compat import io

_ENTRANCES = ("execute", "check_lazy_status")
_HAIR = 1e-5


class Range(NamedTuple):
    """What an input may be.

    Attributes:
        least, most: both may be.
        whole: it is an INT.
    """

    least: int | float
    most: int | float
    whole: bool


def ranges(node: type[io.ComfyNode]) -> dict[str, Range]:
    """Of the inputs of a node that are numbers, by name, as its schema has them."""
    return {
        one.id: Range(one.min, one.max, isinstance(one, io.Int.Input))
        for one in node.define_schema().inputs
        if isinstance(one, io.Int.Input | io.Float.Input)
    }


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A node class that runs with numbers in their ranges only.

    Its entrances raise Refused for others, so that a live run goes on: an edit is taken back, and
    later the frame is left out. In a live run a node with LIVE_CHECKS looks at them itself.
    """
    known = ranges(node)
    for name in _ENTRANCES if known else ():
        entrance = vars(node).get(name)
        if entrance is not None and not hasattr(entrance.__func__, "__wrapped__"):
            setattr(node, name, classmethod(_checking(entrance.__func__, known)))
    return node


def _checking(entrance, known: dict[str, Range]):
    order = list(inspect.signature(entrance).parameters)[1:]

    @functools.wraps(entrance)
    def enter(cls, *args, **kwargs):
        if current.get() is not None and getattr(cls, "LIVE_CHECKS", False):
            return entrance(cls, *args, **kwargs)
        given = dict(zip(order, args, strict=False)) | kwargs
        for name, allowed in known.items():
            if name in given:
                given[name] = number(name, given[name], allowed)
        return entrance(cls, **given)

    return enter


def number(name: str, value: Any, allowed: Range) -> int | float:
    """An input's number, as Python has it.

    Raises:
        Refused: it is none, not finite, out of its range or no whole one; names the input.
    """
    found = _plain(value)
    # what comes out of arithmetic lies a hair beyond the end that is meant
    hair = 0 if allowed.whole else _HAIR
    if found is not None and allowed.least - hair <= found <= allowed.most + hair:
        found = min(max(found, allowed.least), allowed.most)
    # NaN and infinity are in no range
    fine = found is not None and allowed.least <= found <= allowed.most
    if not fine or (allowed.whole and found != int(found)):
        kind = "whole number" if allowed.whole else "number"
        raise Refused(
            f"{name}: {short(value)} cannot be. Give a {kind} from {allowed.least} to "
            f"{allowed.most}."
        )
    return int(found) if allowed.whole else float(found)


def _plain(value: Any) -> int | float | None:
    """A number of Python, NumPy or torch; None for what is none."""
    if type(value) in (int, float):
        return value
    if isinstance(value, str | bytes | bytearray):  # float() would read them
        return None
    for take in (operator.index, float):
        try:
            return take(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            continue
    return None
