"""WHIP and WHEP below /livediffusion: how programs publish to a run, and play its views.

WHIP is RFC 9725, WHEP draft-ietf-wish-whep. A key in an address does one thing: it publishes to one
Live Camera of one run and ends with that, or it plays one Live View, as its MJPEG address does.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ..trust import boundary, offers
from . import webrtc
from .faults import Refused
from .guard import body, forbid, guarded, told
from .rtc import Full, Rtc, Told
from .session import Session
from .sessions import Sessions

SDP, FRAGMENT = "application/sdp", "application/trickle-ice-sdpfrag"
_SOON = "2"  # seconds after which somebody who was turned away may ask again


def add(route: Callable[..., Any], sessions: Sessions) -> Rtc:
    """Register the routes.

    Args:
        route: takes method and path, gives what takes a handler.
    """
    rtc = Rtc(sessions)
    api = _Api(sessions, rtc)
    for method, path, handler in (
        ("POST", "whip", api.publish),
        ("POST", "whip/{key}", api.publish),
        ("OPTIONS", "whip/{key}", api.options),
        ("POST", "whep/{key}", api.play),
        ("OPTIONS", "whep/{key}", api.options),
        ("PATCH", "rtc/{key}", api.patch),
        ("DELETE", "rtc/{key}", api.delete),
    ):
        route(method, f"/livediffusion/{path}")(guarded(handler, boundary.MOST_PEERS))
    return rtc


class _Api:
    def __init__(self, sessions: Sessions, rtc: Rtc):
        self._sessions, self._rtc = sessions, rtc

    async def publish(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info.get("key") or _bearer(request)
        try:
            found = self._rtc.published(key)
        except PermissionError:
            forbid("This address, or its token, is not known. Copy it from the Live Camera again.")
        if found is None:
            raise web.HTTPGone(**told("This live run is over, or the Live Camera is gone."))
        session, feed = found
        offer = await self._offer(request)
        return await self._opened(request, self._rtc.publish(session, feed, offer))

    async def play(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        if not self._sessions.known(key):
            forbid("This address is not known. Copy it from the Live View again.")
        found = self._sessions.view(key)
        if found is None or not found[0].running:
            raise web.HTTPConflict(
                **told("This view is not live now. Try again."), headers={"Retry-After": _SOON}
            )
        session, view = found
        offer = await self._offer(request)
        page = "token" in request.query and self._speaks_for(request, session)
        return await self._opened(request, self._rtc.play(session, view, offer, page))

    async def patch(self, request: web.Request) -> web.StreamResponse:
        """Candidates that are told later (RFC 9725, section 4.3)."""
        held = self._connection(request)
        if request.content_type != FRAGMENT:
            raise web.HTTPUnsupportedMediaType(
                **told(f"{FRAGMENT} is expected."), headers={"Accept-Patch": FRAGMENT}
            )
        tag = request.headers.get("If-Match")
        if tag is None:
            raise web.HTTPPreconditionRequired(**told("If-Match is missing."))
        if tag not in (held.tag, "*"):
            raise web.HTTPPreconditionFailed(**told("If-Match is of another connection."))
        data = await body(request, offers.LARGEST)
        ufrag, candidates = offers.fragment(data, request.remote or "")
        if tag == "*" or (ufrag is not None and ufrag not in held.ufrags):
            raise web.HTTPUnprocessableEntity(
                **told("A connection is not begun anew (ICE restart). Open another.")
            )
        await self._rtc.tell(held, candidates)
        return web.Response(status=204)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        self._rtc.close(self._connection(request))
        return web.Response()

    async def options(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=204, headers={"Accept-Post": SDP})

    def _connection(self, request: web.Request) -> Any:
        try:
            held = self._rtc.connection(request.match_info["key"])
        except PermissionError:
            forbid("This connection is not known.")
        if held is None:
            raise web.HTTPGone(**told("This connection is over."))
        return held

    def _speaks_for(self, request: web.Request, session: Session) -> bool:
        try:
            named = self._sessions.authorised(
                request.query.get("session"), request.query.get("token")
            )
        except PermissionError as reason:
            forbid(str(reason))
        return named is session

    async def _offer(self, request: web.Request) -> str:
        try:
            webrtc.check("WebRTC")
        except Refused as reason:
            raise web.HTTPNotImplemented(**told(str(reason))) from None
        if request.content_type != SDP:
            raise web.HTTPUnsupportedMediaType(
                **told(f"{SDP} is expected."), headers={"Accept-Post": SDP}
            )
        return offers.offer(await body(request, offers.LARGEST), request.remote or "")

    async def _opened(self, request: web.Request, work: Awaitable[Told]) -> web.StreamResponse:
        try:
            made = await work
        except Full as reason:
            raise web.HTTPServiceUnavailable(
                **told(str(reason)), headers={"Retry-After": _SOON}
            ) from None
        base = request.path.partition("/livediffusion/")[0]
        headers = {
            "Location": f"{base}/livediffusion/rtc/{made.id}",
            "ETag": made.tag,
            "Accept-Patch": FRAGMENT,
            "Access-Control-Expose-Headers": "Location, ETag",
        }
        return web.Response(status=201, text=made.answer, content_type=SDP, headers=headers)


def _bearer(request: web.Request) -> str:
    """The token of an Authorization header, as OBS sends it beside an address without one."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not boundary.is_key(token):
        raise web.HTTPUnauthorized(
            **told("The Bearer token is missing. Copy it from the Live Camera."),
            headers={"WWW-Authenticate": "Bearer"},
        )
    return token
