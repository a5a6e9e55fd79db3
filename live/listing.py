"""What there is to choose from for a source: its names, asked for in a thread and for a while."""

import asyncio
import logging
from typing import Any

from .sources import PULLED, kind

_PATIENCE = 4.0  # seconds that a source has to tell its names
_MOST, _LONG = 64, 256  # names, and letters of one

_log = logging.getLogger(__name__)


class Listing:
    """In the server's loop. A source is asked by one at a time: a question that hangs holds up
    those after it, not another thread for each."""

    def __init__(self):
        self._asked: dict[str, asyncio.Future] = {}

    async def names(self, source: str) -> dict[str, Any]:
        """Names of a source of PULLED, and a reason where there are none and it is known."""
        if source not in self._asked or self._asked[source].done():
            self._asked[source] = asyncio.ensure_future(asyncio.to_thread(_listed, source))
        try:
            return await asyncio.wait_for(asyncio.shield(self._asked[source]), _PATIENCE)
        except asyncio.TimeoutError:
            reason = f"{source}: no names have come within {_PATIENCE:.0f} seconds."
            return {"names": [], "reason": reason}


def _listed(source: str) -> dict[str, Any]:
    assert source in PULLED
    try:
        made = kind(source)
        names = [name for name in made.listed() if 0 < len(name) <= _LONG][:_MOST]
        if not names:
            # what is missing, or not allowed, is said there
            made.check("")
        return {"names": names, "reason": None}
    except ValueError as reason:
        return {"names": [], "reason": str(reason)}
    except Exception:
        # also what a library raises that is none of its documented errors
        _log.warning("Live: %s could not be listed", source, exc_info=True)
        return {"names": [], "reason": f"{source}: names cannot be told; the log has more."}
