"""The two loops of a WebSocket: what its other end says, and what that is told."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator

from aiohttp import WSMessage, WSMsgType, web

from .viewer import Viewer
from .wire import Packet

BROKEN = 1011  # the code that a page comes back after
_ASKED = 2.0  # seconds without a message after which a listener is asked whether it is there
_UNANSWERED = 5  # times that it is asked before it is taken to be gone

_TOLD = 3.0  # seconds in which a listener is told something, or it would take us to be gone
_ALIVE = json.dumps({"type": "alive"})

_log = logging.getLogger(__name__)


async def messages(
    socket: web.WebSocketResponse, request: web.Request
) -> AsyncIterator[WSMessage]:
    """What a listener sends, until it leaves or answers no more.

    Its silence is counted in looks, not in seconds: while the server itself stands still, what has
    come waits unread, and whoever sent it is not gone. aiohttp's own heartbeat closes after half
    its interval, whoever was busy.
    """
    unanswered = 0
    while True:
        try:
            message = await socket.receive(_ASKED)
        except asyncio.TimeoutError:
            if unanswered == _UNANSWERED:
                # it reads no farewell either
                if request.transport is not None:
                    request.transport.abort()
                return
            unanswered += 1
            # the question is on its way at once; who does not read holds up what waits behind it
            with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
                await asyncio.wait_for(socket.ping(), _ASKED)
            continue
        unanswered = 0
        if message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
            yield message
        elif message.type is WSMsgType.PING:
            with contextlib.suppress(ConnectionError):
                await socket.pong(message.data)
        elif message.type is not WSMsgType.PONG:
            return


async def _next(viewer: Viewer) -> str | Packet | None:
    try:
        return await asyncio.wait_for(viewer.next(), _TOLD)
    except asyncio.TimeoutError:
        return _ALIVE


async def send(socket: web.WebSocketResponse, viewer: Viewer) -> None:
    """What a listener is to be told, until that is over; closes its socket."""
    code = BROKEN
    try:
        while (item := await _next(viewer)) is not None:
            if isinstance(item, Packet):
                await socket.send_bytes(item.packed())
            else:
                await socket.send_str(item)
        code = viewer.over
    except ConnectionError:
        return
    except Exception:
        # its page is to come back, not to listen for nothing
        _log.warning("Live: a listener could not be sent to", exc_info=True)
    await socket.close(code=code, message=viewer.reason.encode()[:120])
