"""Who is connected to which run by WebRTC: publishers (WHIP), players (WHEP), a run's own page.

In the server's loop, but for what is called from the loop that the connections live in. They have
that one, in a thread of its own, so that packets do not wait for ComfyUI's other work, and so that
all of theirs are daemon threads: aiortc's decoders would else keep ComfyUI from ending.
"""

import asyncio
import contextlib
import functools
import hmac
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..trust import boundary, offers
from ..trust.schema import BadData
from . import webrtc
from .bounds import most
from .cameras import PAGE
from .feeds import CameraFeed
from .sending import SendView
from .session import Session
from .sessions import Sessions
from .shared import key_of
from .sinks.mjpeg import Keys
from .sources import WHIP
from .view import About, View
from .webrtc.loop import Loop

BIT_RATE = 6e6  # bit per second at the most, of a view; a slower network has less
_LOOK = 0.25  # seconds between two looks whether what a connection is for is still there
_FIRST = 10.0  # seconds that an answer may take, aiortc's import included


class Full(Exception):
    """There are as many connections as may be; the message says so."""


class Told(NamedTuple):
    """What a new connection is answered.

    Attributes:
        id: names it, to whoever opened it alone.
        tag: of its one state, as If-Match wants it (RFC 9725, section 4.3).
        answer: SDP.
    """

    id: str
    tag: str
    answer: str


class _Held:
    """A connection and what it is for."""

    def __init__(self, session: Session, what: Any, there: Callable[[], bool]):
        self.id = self.tag = ""
        self.session, self.what, self.there = session, what, there
        self.over = asyncio.Event()
        self.end: Callable[[], None] = lambda: None
        self.peer: Any = None
        self.ufrags: set[str] = set()


class Rtc:
    """The connections of a server.

    Args:
        sessions: its live runs.
    """

    def __init__(self, sessions: Sessions):
        self._sessions = sessions
        self._keys, self._ids = Keys(), Keys()
        self._held: dict[str, _Held] = {}
        self._opening = self._closing = 0
        self._loop: Loop | None = None
        self._server: asyncio.AbstractEventLoop | None = None

    # -- keys -------------------------------------------------------------------------------

    def described(self, session: Session, told: dict[str, Any]) -> dict[str, Any]:
        """What the page is told of a run's cameras and views, with where they take WebRTC."""
        if not webrtc.available():
            return told
        for camera in told["cameras"]:
            graph = session.wanted.graph
            key = key_of(graph[camera["node"]]["inputs"], camera["node"])
            if key in PAGE or key == (WHIP, camera["node"]):
                secret = self._key(session, key)
                url = f"/livediffusion/whip/{secret}"
                # the page sends by `send` what it shows itself; `whip` is to be copied elsewhere
                camera |= {"send": url} if key in PAGE else {"whip": {"url": url, "token": secret}}
        for place in told["views"]:
            if not isinstance(session.view(place["node"]), SendView):
                place["whep"] = place["mjpeg"].replace("/mjpeg/", "/whep/")
        return told

    def _key(self, session: Session, key: Any) -> str:
        return self._keys.key(session.token, session.id, str(key))

    def published(self, secret: str) -> tuple[Session, Any] | None:
        """The run and the feed that a key is for; None once that is over.

        Raises:
            PermissionError: no such key was given out.
        """
        if not self._keys.known(secret):
            raise PermissionError
        for session in self._sessions.running():
            for key in list(session.shared.feeds):
                if hmac.compare_digest(self._key(session, key).encode(), secret.encode()):
                    return session, key
        return None

    def connection(self, id: str) -> _Held | None:
        """Raises PermissionError: no such connection was ever opened. None once it is over."""
        if not self._ids.known(id):
            raise PermissionError
        return self._held.get(id)

    # -- opening and closing ------------------------------------------------------------------

    async def publish(self, session: Session, key: Any, offer: str) -> Told:
        """Take pictures; who sent them before is sent away. Raises BadData, Full."""

        def there() -> bool:
            return isinstance(session.shared.feeds.get(key), CameraFeed)

        page = key in PAGE
        held = _Held(session, key, there)

        def take(came: Any) -> None:
            try:
                session.cameras.given(key, *webrtc.loaded().picture(came, page))
            except Exception:
                session.shared.faults.count("frame")
                raise

        return await self._open(held, offer, lambda over: webrtc.loaded().Ingest(over, take))

    async def play(self, session: Session, view: View, offer: str, page: bool) -> Told:
        """Give a view's pictures.

        Args:
            page: it is the run's own, which is told of each picture what it is.

        Raises:
            BadData, Full.
        """
        held = _Held(session, None, lambda: view in session.views.values())

        def told(about: About, time: int) -> None:
            self._server.call_soon_threadsafe(_tell, session, view.index, about, time)

        def make(over: Callable[[str | None], None]) -> Any:
            return webrtc.loaded().Playback(over, BIT_RATE, told if page else None)

        done = await self._open(held, offer, make)

        def tap(picture: np.ndarray, about: About) -> None:
            held.peer.track.put(picture, about)

        view.watch(tap)
        held.end = functools.partial(view.unwatch, tap)
        return done

    async def _open(self, held: _Held, offer: str, make: Callable[..., Any]) -> Told:
        session = held.session
        mine = sum(
            one.session is session and (held.what is None or one.what != held.what)
            for one in self._held.values()
        )
        if len(self._held) + self._opening >= most("rtc.Rtc._held"):
            raise Full("This server has as many WebRTC connections as it may. Close some.")
        if mine >= boundary.MOST_PEERS_OF_RUN:
            raise Full("This live run has as many WebRTC connections as it may. Close some.")
        self._server = asyncio.get_running_loop()
        self._opening += 1
        try:
            if self._loop is None:
                # the import of aiortc is half a second, once
                await asyncio.to_thread(webrtc.loaded)
                self._loop = self._loop or Loop()
            work = _answered(make, functools.partial(self._gone, held), offer)
            opened = asyncio.wrap_future(self._loop.start(work))
            held.peer, answer = await asyncio.wait_for(opened, _FIRST)
            self._hold(held, offers.ufrags(offer))
        finally:
            self._opening -= 1
            self._rest()
        if session.over:
            self._end(held)
            raise BadData("This live run is over.")
        session.keep("webrtc", functools.partial(self._kept, held), again=False)
        return Told(held.id, held.tag, answer)

    def _hold(self, held: _Held, ufrags: set[str]) -> None:
        """In place of who sent the same pictures before."""
        held.id, held.ufrags = self._ids.key(secrets.token_urlsafe(18), "", ""), ufrags
        held.tag = f'"{secrets.token_hex(8)}"'
        for one in list(self._held.values()):
            if held.what is not None and (one.session, one.what) == (held.session, held.what):
                self._end(one)
        self._held[held.id] = held

    def _gone(self, held: _Held, why: str | None) -> None:
        # in the connections' loop
        with contextlib.suppress(RuntimeError):  # the server is going down
            self._server.call_soon_threadsafe(held.over.set)

    async def _kept(self, held: _Held) -> None:
        try:
            while held.there() and not held.over.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(held.over.wait(), _LOOK)
        finally:
            # also where the run is over, whose tasks are cancelled
            self._end(held)

    async def tell(self, held: _Held, candidates: list[str]) -> None:
        """Try these, too."""
        if self._loop is not None and candidates:
            await asyncio.wrap_future(self._loop.start(held.peer.tell(candidates)))

    def close(self, held: _Held) -> None:
        """Whoever opened it is done with it."""
        held.over.set()

    def _end(self, held: _Held) -> None:
        if self._held.pop(held.id, None) is None:
            return
        held.end()
        self._closing += 1
        future = self._loop.start(held.peer.close())

        def closed(_: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server is going down
                self._server.call_soon_threadsafe(self._closed)

        future.add_done_callback(closed)

    def _closed(self) -> None:
        self._closing -= 1
        self._rest()

    def _rest(self) -> None:
        """No thread is left while nobody is connected."""
        if not (self._held or self._opening or self._closing) and self._loop is not None:
            self._loop.close()
            self._loop = None


async def _answered(
    make: Callable[[Callable[[str | None], None]], Any],
    gone: Callable[[str | None], None],
    offer: str,
) -> tuple[Any, str]:
    peer = make(gone)
    try:
        return peer, await peer.answer(offer)
    except asyncio.CancelledError:
        await peer.close()
        raise


def _tell(session: Session, index: int, about: About, time: int) -> None:
    """Pages know a picture of a track by its RTP time, which begins at random for each of them."""
    pages = session.viewers if session.kept else {session.owner} - {None}
    for page in list(pages):
        page.tell({"type": "drawn", "view": index, "rtp": time, **about._asdict()})
