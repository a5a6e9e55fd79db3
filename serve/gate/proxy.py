"""The operator's way to a replica's ComfyUI: all of it, behind a ticket that becomes a cookie."""

import asyncio
import contextlib
from collections.abc import Iterable

import aiohttp
from aiohttp import WSMsgType, web
from yarl import URL

from trust import boundary

from .. import access, tickets
from ..closing import passed_on
from .doors import HEADERS, No

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}
_UPLOAD = 2**30  # bytes of a request
_MESSAGE = 2**26  # bytes of a socket's message
_MOST_SOCKETS = 16
_CONNECT_S = 5.0
# all that a link of another site leads to: what stands behind any other path may do something
_PAGE = "/"
# that there is somebody before it ComfyUI has to know: who asks by this way, with a Host of
# loopback, does not sit at the server (trust/boundary.py, at_server)
_VIA = "Via", "1.1 livediffusion"
# of one connection only (RFC 9110, 7.6.1), and what would tell ComfyUI who asks, and where from:
# it looks at Origin and Host itself, and is asked by this process alone
_OWN = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "origin", "referer", "cookie", "forwarded",
    "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "sec-fetch-site",
    "sec-websocket-key", "sec-websocket-version", "sec-websocket-extensions",
    "sec-websocket-protocol", "sec-websocket-accept",
}  # fmt: skip


class Proxy:
    """Passes an operator's requests on to ComfyUI, and its answers back.

    Args:
        comfyui: see comfyui.ComfyUI.
        house: reads tickets.
    """

    def __init__(self, comfyui, house: tickets.Tickets):
        self._comfyui, self._house = comfyui, house
        self._sockets = 0
        self._http = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def close(self) -> None:
        await self._http.close()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Of a request that is no visitor's. Raises No."""
        raw = request.raw_path
        if request.method not in _METHODS or not raw.startswith("/"):
            raise No(405, "This method is not taken.")
        path, _, query = raw.partition("?")
        rest = "&".join(p for p in query.split("&") if p.partition("=")[0] != "ticket")
        asked = request.query.getall("ticket", [])
        given = asked[0] if len(asked) == 1 else request.cookies.get(access.COOKIE)
        foreign = None if asked else _foreign(request, path)
        try:
            self._house.read(given, tickets.OPERATOR)
        except tickets.Refused as reason:
            led = path == _PAGE and access.elsewhere(request.method, request.headers)
            if led and not asked:
                text = access.once_more(_here(path, rest))
                return web.Response(text=text, content_type="text/html", headers=HEADERS)
            raise No(403, foreign or str(reason)) from None
        socket = request.headers.get("Upgrade", "").lower() == "websocket"
        if asked and request.method == "GET" and not socket:
            return _kept(request, given, _here(path, rest))
        if foreign is not None:
            raise No(403, foreign)
        if self._comfyui.url is None:
            raise No(503, "ComfyUI is not there at the moment. Try again.")
        url = URL(self._comfyui.url + _here(path, rest), encoded=True)
        try:
            return await (self._socket if socket else self._passed)(request, url)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            raise No(502, "ComfyUI does not answer at the moment. Try again.") from None

    async def _passed(self, request: web.BaseRequest, url: URL) -> web.StreamResponse:
        length = request.content_length
        if length is not None and length > _UPLOAD:
            raise No(413, f"The request is larger than {_UPLOAD} bytes.")
        headers = [*_kept_headers(request.headers.items()), _VIA]
        if cookies := _others(request):
            headers.append(("Cookie", cookies))
        data = request.content if request.body_exists else None
        async with self._http.request(
            request.method, url, headers=headers, data=data, allow_redirects=False
        ) as reply:
            answer = web.StreamResponse(status=reply.status, reason=reply.reason)
            for name, value in _kept_headers(reply.headers.items()):
                answer.headers.add(name, value)
            answer.headers["Referrer-Policy"] = "no-referrer"
            await answer.prepare(request)
            async for chunk in reply.content.iter_any():
                await answer.write(chunk)
            await answer.write_eof()
            return answer

    async def _socket(self, request: web.BaseRequest, url: URL) -> web.StreamResponse:
        if self._sockets >= _MOST_SOCKETS:
            raise No(429, "Too many sockets are open.")
        self._sockets += 1
        try:
            async with self._http.ws_connect(url, headers=[_VIA], max_msg_size=_MESSAGE) as up:
                down = web.WebSocketResponse(max_msg_size=_MESSAGE, compress=False, heartbeat=30)
                await down.prepare(request)
                ways = [asyncio.create_task(_pass(a, b)) for a, b in ((up, down), (down, up))]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
                with contextlib.suppress(ConnectionError, RuntimeError):
                    await down.close(code=passed_on(up.close_code))
                return down
        finally:
            self._sockets -= 1


async def _pass(one, other) -> None:
    with contextlib.suppress(ConnectionError, RuntimeError, aiohttp.ClientError):
        async for message in one:
            if message.type is WSMsgType.BINARY:
                await other.send_bytes(message.data)
            elif message.type is WSMsgType.TEXT:
                await other.send_str(message.data)


def _kept_headers(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    listed = list(headers)
    named = {
        one.strip().lower()
        for name, value in listed if name.lower() == "connection"
        for one in value.split(",")
    }  # fmt: skip
    return [(name, value) for name, value in listed if name.lower() not in _OWN | named]


def _others(request: web.BaseRequest) -> str:
    """The cookies without ours: nodes in ComfyUI need not see an operator's ticket."""
    return "; ".join(f"{k}={v}" for k, v in request.cookies.items() if k != access.COOKIE)


def _here(path: str, query: str) -> str:
    """An address of this server: two slashes at its beginning would name another."""
    whole = "/" + path.lstrip("/\\")
    return f"{whole}?{query}" if query else whole


def _kept(request: web.BaseRequest, ticket: str, there: str) -> web.Response:
    """The ticket as a cookie, and the same page again without it in its address."""
    answer = web.Response(status=303, headers={**HEADERS, "Location": there})
    secure = request.secure or request.headers.get("X-Forwarded-Proto") == "https"
    answer.set_cookie(
        access.COOKIE, ticket, httponly=True, samesite="Strict", path="/", secure=secure
    )
    return answer


def _foreign(request: web.BaseRequest, path: str) -> str | None:
    """Why a request without a ticket is another page's. A link to ComfyUI's page is anybody's."""
    headers = request.headers
    if (request.method, path) == ("GET", _PAGE) and headers.get("Sec-Fetch-Mode") == "navigate":
        return None
    return boundary.stranger(headers)
