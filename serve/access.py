"""The operator's way in: addresses that are given out, the cookies that they become, a command.

An address bears a secret, and ends up in histories, terminals and logs: it opens the house for
ADDRESS_S and no longer. A browser gets a cookie for it, which is renewed while it is used and ends
after SESSION_S in any case. Then it takes another address: a house prints one before the last is
over, and who has its key makes one (`run.py serve --operator`).
"""

import argparse
import contextlib
import html
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from .tickets import OPERATOR, Over, Refused, Tickets, decoded

COOKIE = "livediffusion_operator"
ADDRESS_S = 12 * 3600.0  # seconds for which an address is good
AGAIN_S = ADDRESS_S - 3600  # after which a house prints another
COOKIE_S = 12 * 3600.0  # from its last use for which a cookie is good
SESSION_S = 7 * 24 * 3600.0  # for which it is renewed
_OFTEN_S = 600.0  # between two cookies for the same browser
_KEY = "LIVEDIFFUSION_KEY"
_NONE = "This page is for who has the operator's address: run.py serve prints it."
_OTHER = "This is no operator's address of this house: take the one that it printed last."
_OVER = (
    "The operator's address, or its cookie, is over: take the one that the house printed last, or "
    "make one with its key (run.py serve --operator; docs/serve.md tells how)."
)

Send = Callable[[dict[str, Any]], Awaitable[None]]


def address(tickets: Tickets, where: str) -> str:
    """The operator's address of a house that is opened at `where`."""
    return f"{where}/operator?ticket={tickets.make(OPERATOR, ADDRESS_S, id='operator')}"


def due(printed: float, now: float) -> bool:
    """Whether it is time for another address, in seconds since 1970 as tickets have them."""
    return not 0 <= now - printed < AGAIN_S  # below 0 the clock was set back


class Door:
    """Reads what an operator's browser comes with, and keeps its cookie.

    Args:
        tickets: of the house.
        secure: whether cookies are for HTTPS only.
        clock: of the tickets.
    """

    def __init__(self, tickets: Tickets, secure: bool, clock: Callable[[], float] = time.time):
        self._tickets, self._secure, self._clock = tickets, secure, clock

    def opened(self, given: str | None, held: str) -> dict[str, Any]:
        """The claims of the ticket in an address, else of the cookie: a bookmark may be older.

        Raises:
            Refused: neither opens it; the message is for an operator.
        """
        found: Refused | None = None
        for text in filter(None, (given, held)):
            try:
                return self._tickets.read(text, OPERATOR)
            except Refused as reason:
                found = found or reason
        raise Refused(words(found)) from found

    def cookie(self, claims: Mapping[str, Any]) -> str:
        """A new cookie, as the header Set-Cookie has it, for who came with these claims."""
        now = self._clock()
        # in the ticket, so that no use of a cookie, as an address either, makes it last longer
        last = claims.get("last", now + SESSION_S)
        seconds = max(0.0, min(COOKIE_S, last - now))
        made = self._tickets.make(OPERATOR, seconds, id=claims["id"], last=last)
        text = f"{COOKIE}={made}; Max-Age={int(seconds)}; Path=/; HttpOnly; SameSite=Strict"
        return f"{text}; Secure" if self._secure else text

    def renewing(self, scope: Mapping[str, Any], send: Send) -> Send:
        """`send` of a request over HTTP, whose answer has a new cookie where one is due."""
        try:
            claims = self._tickets.read(cookie(scope), OPERATOR)
        except Refused:
            return send
        now = self._clock()
        until = min(now + COOKIE_S, claims.get("last", now + SESSION_S))
        if until < claims["exp"] + _OFTEN_S:
            return send

        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # what has a cookie in it is nothing for a proxy to keep for others
                kept = [(name, value) for name, value in message.get("headers", ())
                        if name.lower() != b"cache-control"]  # fmt: skip
                ours = f"{COOKIE}=".encode()
                if not any(n.lower() == b"set-cookie" and v.startswith(ours) for n, v in kept):
                    more = [(b"set-cookie", self.cookie(claims).encode()),
                            (b"cache-control", b"no-store")]  # fmt: skip
                    message = {**message, "headers": [*kept, *more]}
            await send(message)

        return sent


def words(reason: Refused | None) -> str:
    """Why it is not opened, for who takes himself for its operator; None: without any ticket."""
    return _NONE if reason is None else _OVER if isinstance(reason, Over) else _OTHER


def cookie(scope: Mapping[str, Any]) -> str:
    """The operator's ticket that a browser keeps, or nothing."""
    for name, value in scope["headers"]:
        if name.lower() == b"cookie":
            with contextlib.suppress(CookieError):
                held = SimpleCookie(value.decode("latin-1")).get(COOKIE)
                if held is not None:
                    return held.value
    return ""


def elsewhere(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a page of another site led a browser here: a strict cookie does not come along with
    that, nor with where it is sent on to."""
    return (
        method == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-site") == "cross-site"
    )


def once_more(there: str) -> str:
    """A page that goes to this path of the same house at once: now with the cookie."""
    return f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(there)}">'


def main(arguments: list[str] | None = None) -> int:
    """`run.py serve --operator`: prints an address. Standard library only."""
    parser = argparse.ArgumentParser(
        prog="run.py serve --operator", description="An operator's address of a house that runs "
        f"with {_KEY}, good for {ADDRESS_S / 3600:.0f} hours. The same {_KEY} has to be set here.",
    )  # fmt: skip
    parser.add_argument("where", nargs="?", default="http://localhost:8000", metavar="ADDRESS",
                        help="where visitors open it (default %(default)s)")  # fmt: skip
    where = parser.parse_args(arguments).where.rstrip("/")
    if not where.startswith(("http://", "https://")):
        parser.error(f"{where} is no address of a house: https://live.example.org, for example")
    key = os.environ.get(_KEY, "")
    if not key:
        parser.error(
            f"{_KEY} is not set. A house that was started without it has a key that nobody knows: "
            "take the address that it printed last"
        )
    try:
        tickets = Tickets(decoded(key))
    except ValueError:
        parser.error(f"{_KEY} is not base64url of 16 bytes or more")
    print(address(tickets, where), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
