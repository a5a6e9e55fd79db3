"""JSON from outside, read through schemas in which everything has a bound.

A schema is a function of a value and of where it stands; it returns the value, or raises BadData.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

Schema = Callable[[Any, str], Any]

LARGEST_WHOLE = 2**64  # seeds of ComfyUI reach up to it


class BadData(ValueError):
    """Data from outside that is not taken; the message says why, in one sentence."""


class Limits(NamedTuple):
    """How much of a JSON text is looked at.

    Attributes:
        bytes: of the text.
        depth: of lists and objects in each other.
        items: commas and brackets of the text, which values are fewer than.
    """

    bytes: int
    depth: int
    items: int


def parsed(data: bytes, what: str, limits: Limits) -> Any:
    """The value of a JSON text in UTF-8, within limits, its numbers finite, its text Unicode.

    Args:
        what: the text is, for the message.

    Raises:
        BadData: it is not.
    """
    if len(data) > limits.bytes:
        raise BadData(f"{what}: {len(data)} bytes are more than {limits.bytes}.")
    # counted before anything is made of them: a million empty lists are two bytes each
    if sum(map(data.count, (b",", b"[", b"{"))) > limits.items:
        raise BadData(f"{what}: it holds more than {limits.items} values.")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise BadData(f"{what}: it is nested too deeply.") from None
    except ValueError as reason:
        raise BadData(f"{what}: JSON is expected ({reason}).") from None
    _bounded(value, what, limits.depth)
    return value


def _bounded(value: Any, what: str, depth: int) -> None:
    """Raises BadData for what no JSON text of a browser or of ours has in it."""
    level = [value]
    while level:
        if depth < 0:
            raise BadData(f"{what}: it is nested too deeply.")
        depth -= 1
        below: list[Any] = []
        for one in level:
            if isinstance(one, str):
                _unicode(one, what)
            elif isinstance(one, float):
                if not math.isfinite(one):
                    raise BadData(f"{what}: a number in it is not finite.")
            elif isinstance(one, int):
                if abs(one) > LARGEST_WHOLE:
                    raise BadData(f"{what}: a number in it is too large.")
            elif isinstance(one, dict):
                for key in one:
                    _unicode(key, what)
                below += one.values()
            elif isinstance(one, list):
                below += one
        level = below


def _unicode(text: str, what: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadData(f"{what}: a text in it is no Unicode.") from None


def shown(value: Any, most: int = 60) -> str:
    """A value for a message: short, and nothing in it that a terminal or a log would obey."""
    if not isinstance(value, str):
        return type(value).__name__
    if not value:
        return "''"
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value[:most])
    return f"{plain}..." if len(value) > most else plain


def anything(value: Any, where: str) -> Any:
    """Whatever passed the limits."""
    return value


def unchanged(schema: Schema) -> Schema:
    """What a schema takes, as it came."""

    def check(value: Any, where: str) -> Any:
        schema(value, where)
        return value

    return check


def text(most: int, pattern: str | None = None) -> Schema:
    """Text of at most so many characters, the whole of it as the pattern says."""
    found = re.compile(pattern) if pattern else None

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise BadData(f"{where}: text is expected, not {shown(value)}.")
        if len(value) > most:
            raise BadData(f"{where}: {len(value)} characters are more than {most}.")
        if found and not found.fullmatch(value):
            raise BadData(f"{where}: {shown(value)} is not allowed.")
        return value

    return check


def number(low: float, high: float) -> Schema:
    """A number in a range, both ends included."""

    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadData(f"{where}: a number is expected, not {shown(value)}.")
        if not low <= value <= high:
            raise BadData(f"{where}: {value} is not between {low} and {high}.")
        return value

    return check


def whole(low: int, high: int) -> Schema:
    """A whole number in a range, both ends included."""
    inside = number(low, high)

    def check(value: Any, where: str) -> int:
        if not isinstance(value, int):
            raise BadData(f"{where}: a whole number is expected, not {shown(value)}.")
        return inside(value, where)

    return check


def flag(value: Any, where: str) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise BadData(f"{where}: true or false is expected, not {shown(value)}.")
    return value


def nothing(value: Any, where: str) -> None:
    """null."""
    if value is not None:
        raise BadData(f"{where}: null is expected, not {shown(value)}.")


def one_of(*words: Any) -> Schema:
    """One of a few words or numbers."""

    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(word) and value == word for word in words):
            raise BadData(f"{where}: {' or '.join(map(repr, words))} is expected.")
        return value

    return check


def either(*schemas: Schema) -> Schema:
    """What the first schema takes that takes it; the last one's message."""

    def check(value: Any, where: str) -> Any:
        for schema in schemas[:-1]:
            try:
                return schema(value, where)
            except BadData:
                continue
        return schemas[-1](value, where)

    return check


def items(each: Schema, least: int, most: int) -> Schema:
    """A list; gives a tuple."""

    def check(value: Any, where: str) -> tuple:
        if not isinstance(value, list | tuple):
            raise BadData(f"{where}: a list is expected, not {shown(value)}.")
        if not least <= len(value) <= most:
            raise BadData(f"{where}: {len(value)} items are not {least} to {most}.")
        return tuple(each(one, f"{where}[{i}]") for i, one in enumerate(value))

    return check


def fields(*each: Schema) -> Schema:
    """A list with one schema for each of its items; gives a tuple."""

    def check(value: Any, where: str) -> tuple:
        if not isinstance(value, list | tuple) or len(value) != len(each):
            raise BadData(f"{where}: a list of {len(each)} is expected.")
        return tuple(
            schema(one, f"{where}[{i}]")
            for i, (schema, one) in enumerate(zip(each, value, strict=True))
        )

    return check


def table(key: Schema, each: Schema, most: int) -> Schema:
    """An object with any keys that `key` takes."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise BadData(f"{where}: an object is expected, not {shown(value)}.")
        if len(value) > most:
            raise BadData(f"{where}: {len(value)} entries are more than {most}.")
        for name in value:
            key(name, f"{where}: a key")
        return {name: each(one, f"{where}.{name}") for name, one in value.items()}

    return check


def record(
    required: dict[str, Schema], optional: dict[str, Schema] | None = None, others: bool = False
) -> Schema:
    """An object with these keys.

    Args:
        optional: keys that may be missing.
        others: other keys may stand there, and are left out; else they are refused.
    """
    known = {**required, **(optional or {})}

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise BadData(f"{where}: an object is expected, not {shown(value)}.")
        for name in required:
            if name not in value:
                raise BadData(f"{where}: {name} is missing.")
        for name in value:
            if name not in known and not others:
                raise BadData(f"{where}: {shown(name)} is not known.")
        return {
            name: schema(value[name], f"{where}.{name}")
            for name, schema in known.items()
            if name in value
        }

    return check
