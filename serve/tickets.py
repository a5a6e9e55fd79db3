"""Tickets: what the one address gives to a page, and what a replica opens for it.

A ticket is signed, not kept: whoever has the house's key can read it, also after a restart of all
else. Each is of one kind, and a kind opens one thing (docs/serve.md, "Who may do what").
"""

import base64
import binascii
import hashlib
import hmac
import json
import math
import secrets
import time
from collections.abc import Callable
from typing import Any

VISIT = "visit"  # this page's place in the house: its number, and since when it waits
STREAM = "stream"  # one stream at one replica
OPERATOR = "operator"  # the house itself, and each ComfyUI in it

_LONGEST = 2048  # characters; ours have less than 500
_KEY = 32  # bytes


class Refused(ValueError):
    """A ticket that does not open what it is for; the message says why, in one sentence."""


class Over(Refused):
    """One of this house, and of the right kind, whose time is over."""


def decoded(key: str) -> bytes:
    """A key as bytes.

    Raises:
        ValueError: it is not base64url.
    """
    try:
        return base64.urlsafe_b64decode(key + "=" * (-len(key) % 4))
    except (ValueError, binascii.Error):
        raise ValueError("a house's key is base64url of 16 bytes or more") from None


def new_key() -> bytes:
    """A key for a house."""
    return secrets.token_bytes(_KEY)


def new_id() -> str:
    """A visitor's number: not to be guessed, short enough for a log."""
    return secrets.token_hex(8)


class Tickets:
    """Makes and reads the tickets of one house.

    Args:
        key: at least 16 bytes, the same wherever the house's tickets are read.
        clock: seconds since 1970.
    """

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time):
        if len(key) < 16:
            raise ValueError("A house's key has at least 16 bytes.")
        self._key = key
        self._clock = clock

    def make(self, kind: str, seconds: float, **claims: Any) -> str:
        """A ticket.

        Args:
            kind: VISIT, STREAM or OPERATOR.
            seconds: for which it opens something, from now.
            claims: JSON values; `kind` and `exp` are the ticket's own.
        """
        whole = {**claims, "kind": kind, "exp": self._clock() + seconds}
        body = _coded(json.dumps(whole, separators=(",", ":"), sort_keys=True).encode())
        return f"{body}.{_coded(self._signed(body))}"

    def read(self, text: str | None, kind: str) -> dict[str, Any]:
        """What a ticket says.

        Raises:
            Refused: it is none of this house, of another kind, or over (Over).
        """
        if not text:
            raise Refused("A ticket is needed: open the house's own page.")
        body, dot, signature = text.partition(".")
        if not dot or len(text) > _LONGEST or not text.isascii():
            raise Refused("This is not a ticket.")
        # what is signed is the text itself, so that no other spelling of it is one, too
        if not hmac.compare_digest(_coded(self._signed(body)), signature):
            raise Refused("This ticket is not from here.")
        try:
            claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        except (ValueError, binascii.Error, RecursionError):
            raise Refused("This is not a ticket.") from None
        if not isinstance(claims, dict) or claims.get("kind") != kind:
            raise Refused("This ticket opens something else.")
        until = claims.get("exp")
        if not isinstance(until, (int, float)) or not math.isfinite(until):
            raise Refused("This is not a ticket.")
        if until <= self._clock():
            raise Over("This ticket is over: open the house's page again.")
        return claims

    def _signed(self, body: str) -> bytes:
        # a purpose in front: the key may sign other things, and none of them is a ticket
        signed = b"livediffusion ticket\0" + body.encode()
        return hmac.new(self._key, signed, hashlib.sha256).digest()


def _coded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
