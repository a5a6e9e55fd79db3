"""A port that strangers reach: connections, requests and what they hold up are bounded.

One handler for all of it, which sees the address as it came: nothing is routed by a path that
somebody else has made plain before.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from trust import schema

MOST_OPEN = 256  # connections; more push out the ones that have asked for nothing yet
BEGIN_S = 10.0  # seconds that a request's head may take, and as many a visitor's body
_IDLE_S = 30.0  # seconds that a connection is kept for the next request
_LOOK_S = 1.0  # seconds between two looks at them

# what each answer says: addresses have tickets in them, and answers are nobody else's
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Server": "LiveDiffusion",
    "X-Content-Type-Options": "nosniff",
}


class No(Exception):
    """A request that is not taken, with the status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status

    def answer(self) -> web.Response:
        return said({"error": {"message": str(self)}}, self.status)


def said(data: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        text=json.dumps(data), status=status, content_type="application/json", headers=HEADERS
    )


class Bucket:
    """How often something may happen: `rate` a second on the average, `burst` at once."""

    def __init__(self, rate: float, burst: float):
        self._rate, self._burst = rate, burst
        self._left, self._last = burst, time.monotonic()

    def take(self, amount: float = 1.0) -> bool:
        """Whether it may happen now."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._last) * self._rate)
        self._last = now
        if self._left < amount:
            return False
        self._left -= amount
        return True


async def body(request: web.BaseRequest, limits: schema.Limits) -> Any:
    """The JSON of a request's body within limits. Raises No."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise No(400, "A request must not be packed (Content-Encoding).")
    data = bytearray()

    async def read() -> None:
        async for chunk in request.content.iter_any():
            data.extend(chunk)
            if len(data) > limits.bytes:
                raise No(413, f"The request is larger than {limits.bytes} bytes.")

    try:
        await asyncio.wait_for(read(), BEGIN_S)
        return schema.parsed(bytes(data), "request", limits)
    except asyncio.TimeoutError:
        raise No(408, "The request took too long.") from None
    except schema.BadData as reason:
        raise No(400, str(reason)) from None
    except web.RequestPayloadError:
        raise No(400, "The request cannot be read.") from None


class Doors(web.Server):
    """An HTTP server that lets nobody wait at its doors for ever.

    Args:
        answer: of a request. What it raises other than No is told as a bug, and to `failed`.
    """

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        failed: Callable[[str, BaseException], None],
    ):
        super().__init__(
            self._asked, access_log=None, keepalive_timeout=_IDLE_S, lingering_time=1.0,
            auto_decompress=False, max_line_size=8190, max_field_size=16380,
        )  # fmt: skip
        self._answer, self._failed = answer, failed
        self._waiting: dict[asyncio.Transport, float] = {}
        self._open: set[asyncio.Transport] = set()
        self._runner: web.ServerRunner | None = None
        self._task: asyncio.Task | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError where it is taken."""
        runner = web.ServerRunner(self, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        self._task = asyncio.create_task(self._look())
        return runner.addresses[0][1]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = self._task = None

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open.add(transport)
        self._waiting[transport] = time.monotonic() + BEGIN_S
        if len(self._open) > MOST_OPEN:
            # the one that has asked for nothing for the longest, which may be the new one
            self._shut(next(iter(self._waiting)))

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        transport = self._connections.get(handler)
        super().connection_lost(handler, exc)
        self._open.discard(transport)
        self._waiting.pop(transport, None)

    def _shut(self, transport: asyncio.Transport) -> None:
        self._waiting.pop(transport, None)
        transport.abort()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            for transport in [one for one, until in self._waiting.items() if now >= until]:
                self._shut(transport)

    async def _asked(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        self._waiting.pop(transport, None)
        try:
            return await self._answer(request)
        except No as reason:
            return reason.answer()
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as reason:
            self._failed(request.path, reason)
            return No(500, "A bug; the log has it.").answer()
        finally:
            if transport is not None and transport in self._open:
                with contextlib.suppress(RuntimeError):
                    self._waiting[transport] = time.monotonic() + _IDLE_S
