"""The live run's HTTP routes and its frame socket, below /livediffusion."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import WSMsgType, web

from ..trust import boundary
from ..trust.schema import BadData
from . import trusted, whip, wires
from .cameras import PAGE, wanted
from .concealed import changed, texts
from .guard import asked, body, forbid, guarded
from .keeper import Keeper, connected
from .kept import Kept
from .listing import Listing
from .phone_page import PhonePage
from .rtc import Rtc
from .session import OVER, TAKEN_OVER, Session
from .sessions import Invalid, Sessions
from .sinks import mjpeg
from .sockets import messages, send
from .sources import PHONE
from .still import stills
from .viewer import Viewer
from .wire import LARGEST, NotTaken, Packet

_TAKEN = 10.0  # seconds that a stream's player may take for one picture
_AWAITED = 0.5  # seconds between two looks for a run that an open stream waits for


def add_routes(server) -> Sessions:
    """Register the routes on ComfyUI's PromptServer; returns its live runs."""
    sessions = Sessions(server)
    trusted.add(server)
    rtc = whip.add(server.routes.route, sessions)
    api, listing = _Api(sessions, connected(sessions, server), rtc), Listing()
    phone = api.phone
    for method, path, handler in (
        ("POST", "start", guarded(api.start)),
        ("POST", "update", guarded(api.update)),
        ("POST", "stop", guarded(api.stop)),
        ("GET", "stats", guarded(api.stats)),
        ("GET", "runs", guarded(api.runs)),
        ("POST", "keep", guarded(api.keep)),
        ("POST", "attach", guarded(api.attach)),
        ("POST", "end", guarded(api.end)),
        ("POST", "snapshot", guarded(api.snapshot)),
        ("POST", "picture", guarded(api.picture)),
        ("GET", "frames", guarded(api.frames, boundary.MOST_OPEN)),
        ("POST", "phone", guarded(api.renew)),
        ("GET", "phone/{key}", guarded(phone.lead, visited=True)),
        ("GET", "phone/{key}/", guarded(phone.page, visited=True)),
        ("GET", "phone/{key}/frames", guarded(phone.frames, boundary.MOST_OPEN)),
        ("GET", "phone/{key}/{folder}/{file}", guarded(phone.file)),
        ("GET", "sources", guarded(functools.partial(_names, listing), boundary.MOST_OPEN)),
        ("GET", "mjpeg/{key}", guarded(api.mjpeg, boundary.MOST_OPEN)),
    ):
        server.routes.route(method, f"/livediffusion/{path}")(handler)
    return sessions


class _Api:
    def __init__(self, sessions: Sessions, keeper: Keeper, rtc: Rtc):
        self._sessions, self._keeper, self._rtc = sessions, keeper, rtc
        self.phone = PhonePage(sessions)

    async def start(self, request: web.Request) -> web.StreamResponse:
        data = await asked(request, boundary.START)
        client, kept = data.get("client_id", ""), data.get("unattended", False)
        came = texts(data["prompt"])
        try:
            run = self._keeper.place() if kept else None
            session = await self._sessions.start(
                data["prompt"], data.get("workflow"), client, data.get("secret"), run
            )
            name = data.get("name", "")
            warning = await self._keeper.keep(session, name) if kept else None
        except Invalid as reason:
            return web.json_response(reason.answer, status=400)
        begun = self._begun(session, request)
        return web.json_response({**begun, "warning": warning, "concealed": _told(came, session)})

    async def runs(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"runs": self._keeper.told()})

    async def keep(self, request: web.Request) -> web.StreamResponse:
        data = await asked(request, boundary.KEEP)
        session = self._session(data)
        try:
            warning = await self._keeper.keep(session, data.get("name", ""))
        except Invalid as reason:
            return web.json_response(reason.answer, status=400)
        return web.json_response({"run": session.kept, "warning": warning})

    async def attach(self, request: web.Request) -> web.StreamResponse:
        kept = self._kept(await asked(request, boundary.RUN))
        session = kept.session
        if session is None or session.over:
            return web.json_response(kept.told(time.monotonic()))
        return web.json_response(self._begun(session, request))

    async def end(self, request: web.Request) -> web.StreamResponse:
        warning = await self._keeper.end(self._kept(await asked(request, boundary.RUN)))
        return web.json_response({"warning": warning})

    async def update(self, request: web.Request) -> web.StreamResponse:
        data = await asked(request, boundary.UPDATE)
        session = self._session(data)
        came = texts(data["prompt"])
        try:
            version = await self._sessions.update(
                session, data["prompt"], data.get("workflow"), session.client
            )
        except Invalid as reason:
            return web.json_response(reason.answer, status=400)
        told = {"version": version, "concealed": _told(came, session)}
        return web.json_response({**told, **self._described(session, request)})

    async def stop(self, request: web.Request) -> web.StreamResponse:
        session = self._session(await asked(request, boundary.STOP), ended=True)
        if not session.over:
            session.stop()
        return web.json_response({"state": session.state})

    async def renew(self, request: web.Request) -> web.StreamResponse:
        data = await asked(request, boundary.PICTURE)
        return await self.phone.renew(request, self._session(data), data["node"])

    async def stats(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request.query, ended=True)
        return web.json_response(session.stats())

    async def snapshot(self, request: web.Request) -> web.StreamResponse:
        place = boundary.SNAPSHOT(dict(request.query), "snapshot")
        data = await body(request, LARGEST)
        stills.put((place["client_id"], place["node"]), data)
        return web.json_response({})

    async def frames(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request.query, ended=True)
        owner = request.query.get("role") == "owner"
        # a page on a kept run is told in words, by `attach`
        full = len(session.viewers) >= boundary.MOST_LISTENERS
        if full and not owner and not session.kept:
            raise web.HTTPTooManyRequests(text="This live run has too many listeners.")
        # larger messages than a frame may be are refused by us, one by one, not by closing
        socket = web.WebSocketResponse(max_msg_size=4 * LARGEST, autoping=False, compress=False)
        await socket.prepare(request)
        if session.over:
            # it may end before its page can listen, and the page is to know why
            await socket.send_json(session.state_message())
            await socket.close(code=OVER)
            return socket
        viewer = Viewer()
        try:
            session.attach(viewer, owner)
        except NotTaken as reason:
            await socket.send_json({"type": "refused", "reason": str(reason)})
            await socket.close(code=TAKEN_OVER, message=str(reason).encode()[:120])
            return socket
        sender = asyncio.create_task(send(socket, viewer))
        try:
            async for message in messages(socket, request):
                if message.type is WSMsgType.BINARY and owner:
                    session.cameras.receive(viewer, message.data, PAGE)
                elif message.type is WSMsgType.TEXT:
                    _hear(session, viewer, owner, message.data)
        finally:
            session.detach(viewer)
            sender.cancel()
        return socket

    async def mjpeg(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        if not self._sessions.known(key):
            forbid("This stream's address is not known. Copy it from the Live View again.")
        response = web.StreamResponse(
            headers={"Content-Type": mjpeg.CONTENT_TYPE, "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        parts = mjpeg.Parts(request.headers.get("User-Agent", ""))
        # the stream outlives a run: whoever watches need not open it again for the next
        with contextlib.suppress(ConnectionError, NotTaken):
            while not _closing(request):
                found = self._sessions.view(key)
                if found is None:
                    await asyncio.sleep(_AWAITED)
                    continue
                session, view = found
                viewer = Viewer(patient=False, view=view.index)
                session.attach(viewer, owner=False)
                try:
                    while viewer.over is None and not _closing(request):
                        with contextlib.suppress(asyncio.TimeoutError):
                            item = await asyncio.wait_for(viewer.next(), _AWAITED)
                            if isinstance(item, Packet):
                                await _write(request, response, parts.part(item.payload))
                            continue
                        # the view may be another one after an edit
                        if view not in session.views.values():
                            break
                finally:
                    session.detach(viewer)
        return response

    async def picture(self, request: web.Request) -> web.StreamResponse:
        data = await asked(request, boundary.PICTURE)
        session = self._session(data)
        try:
            place = await session.save(data["node"])
        except (OSError, ValueError) as reason:
            raise BadData(str(reason)) from None
        named = {"filename": place.path.name, "subfolder": place.subfolder, "type": "output"}
        return web.json_response(named)

    def _kept(self, data: Mapping[str, Any]) -> Kept:
        kept = self._keeper.get(data["run"])
        if kept is None:
            raise web.HTTPGone(text='{"error": {"message": "It is not kept running any more."}}')
        return kept

    def _session(self, data: Mapping[str, Any], ended: bool = False) -> Session:
        """The session that a request names and may speak for."""
        try:
            session = self._sessions.authorised(data.get("session"), data.get("token"))
        except PermissionError as reason:
            forbid(str(reason))
        if session is None or (session.over and not ended):
            raise web.HTTPGone(text='{"error": {"message": "This live run is over."}}')
        return session

    def _begun(self, session: Session, request: web.Request) -> dict[str, Any]:
        """What a page needs to listen to a run, and to drive it."""
        return {
            "session": session.id, "token": session.token, "prompt_id": session.prompt_id,
            "version": session.version, "ahead": session.ahead, "run": session.kept,
            **self._described(session, request),
        }  # fmt: skip

    def _described(self, session: Session, request: web.Request) -> dict[str, Any]:
        cut = session.wanted
        cameras = wanted(cut)
        for camera in cameras:
            if camera["source"] == PHONE:
                camera["phone"] = self.phone.told(request, session, camera["node"])
        told = {
            "cameras": cameras,
            "views": [
                {
                    "node": node,
                    "index": session.view(node).index,
                    "mjpeg": f"/livediffusion/mjpeg/{self._sessions.key(session, node)}",
                }
                for node in cut.views
                if node not in cut.sends
            ],
            "sends": cut.sends,
            "idle": [{"node": n, "type": cut.graph[n]["class_type"]} for n in cut.idle],
        }
        return self._rtc.described(session, told)


def _told(came: dict[str, dict[str, str]], session: Session) -> dict[str, dict[str, str]]:
    """What the page is to put into its nodes; see `concealed.changed`."""
    return changed(came, session.wanted.graph, wires.concealed())


async def _names(listing: Listing, request: web.Request) -> web.StreamResponse:
    """What there is to choose from for a source."""
    source = boundary.SOURCES(dict(request.query), "sources")["kind"]
    return web.json_response(await listing.names(source))


def _hear(session: Session, viewer: Viewer, owner: bool, text: str) -> None:
    """A message of a listener; what is not understood is left alone."""
    try:
        data = boundary.told(text.encode(), "message", boundary.MESSAGE, boundary.HEARD)
    except BadData:
        return
    if data["type"] == "compare":
        session.compare(viewer, data["view"], data.get("on", False))
        return
    if data["type"] == "elsewhere":
        viewer.leave_out(data["view"], data["on"])
        return
    viewer.shown(data["view"])
    if owner or session.kept:
        session.showed(data.get("latency_ms"))


async def _write(request: web.Request, response: web.StreamResponse, part: bytes) -> None:
    """Send to a stream; who reads no more, and perhaps is not there any more, loses it."""
    try:
        await asyncio.wait_for(response.write(part), _TAKEN)
    except asyncio.TimeoutError:
        if request.transport is not None:
            request.transport.abort()


def _closing(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()
