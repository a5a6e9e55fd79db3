"""What a phone is given and takes: its page, and the socket that its pictures come by."""

import asyncio
import pathlib

from aiohttp import WSMsgType, web

from ..trust import boundary
from ..trust.schema import BadData
from . import reach
from .phones import GONE, TAKEN, with_phones
from .session import Session
from .sessions import Sessions
from .sockets import messages, send
from .sources import PHONE
from .viewer import Viewer
from .wire import LARGEST

_WEB = pathlib.Path(__file__).resolve().parents[1] / "web"
_FILES = {
    "phone": {"phone.mjs": "text/javascript", "style.css": "text/css"},
    "live": dict.fromkeys(
        ("awake.mjs", "camera.mjs", "words.mjs", "worker.mjs"), "text/javascript"
    ),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address is the key
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; worker-src 'self'; "
    "style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
}


class PhonePage:
    """Args:
    sessions: the server's live runs.
    """

    def __init__(self, sessions: Sessions):
        self._sessions = sessions

    async def lead(self, request: web.Request) -> web.StreamResponse:
        """An address that was typed without its last slash."""
        raise web.HTTPFound(f"{request.match_info['key']}/")

    async def page(self, request: web.Request) -> web.StreamResponse:
        """Whoever has an address sees the page; whether a run is behind it its socket says."""
        return web.FileResponse(_WEB / "phone" / "index.html", headers=_HEADERS)

    async def file(self, request: web.Request) -> web.StreamResponse:
        folder, name = request.match_info["folder"], request.match_info["file"]
        kind = _FILES.get(folder, {}).get(name)
        if kind is None:
            raise web.HTTPNotFound
        return web.FileResponse(_WEB / folder / name, headers={**_HEADERS, "Content-Type": kind})

    async def frames(self, request: web.Request) -> web.StreamResponse:
        """The phone's socket: pictures up, and down how the run is."""
        key, mark = request.match_info["key"], request.query.get("phone")
        if not boundary.is_key(mark):
            raise BadData("phone: what the phone calls itself is missing.")
        socket = web.WebSocketResponse(max_msg_size=4 * LARGEST, autoping=False, compress=False)
        await socket.prepare(request)
        found = self._sessions.phone(key)
        if found is None:
            return await _refuse(socket, "unknown", "This code is over.", GONE)
        session, node = found
        viewer, keys = Viewer(), [(PHONE, node)]
        try:
            before = session.phones.join(node, mark, viewer)
        except PermissionError as reason:
            return await _refuse(socket, "taken", str(reason), TAKEN)
        if before is not None:
            before.close(TAKEN, "This phone has connected anew.")
        session.cameras.admit(viewer, keys)
        viewer.tell({"type": "state", "state": session.state})
        sender = asyncio.create_task(send(socket, viewer))
        try:
            async for message in messages(socket, request):
                if message.type is WSMsgType.BINARY:
                    session.cameras.receive(viewer, message.data, keys)
        finally:
            session.phones.leave(node, viewer)
            session.cameras.leave(viewer)
            sender.cancel()
        return socket

    async def renew(self, request: web.Request, session: Session, node: str) -> web.StreamResponse:
        """Another code for a Live Camera of a run, for whoever drives that."""
        if node not in with_phones((*session.shared.graphs, session.wanted)):
            raise BadData("There is no Live Camera with a phone at this node.")
        session.phones.drop(node)
        return web.json_response({"phone": self.told(request, session, node)})

    def told(self, request: web.Request, session: Session, node: str) -> dict | None:
        """What a run's page is told of a Live Camera's phone; None where a run has too many."""
        key = session.phones.key(node)
        if key is None:
            return None
        asked = reach.asked(request.headers, request.scheme)
        return reach.told(asked, f"/livediffusion/phone/{key}/")


async def _refuse(
    socket: web.WebSocketResponse, why: str, reason: str, code: int
) -> web.WebSocketResponse:
    await socket.send_json({"type": "refused", "why": why, "reason": reason})
    await socket.close(code=code, message=reason.encode())
    return socket
