"""One visitor's live run: one session for the page, whichever ComfyUI does the work.

Frames pass unread both ways. Of the messages those pass that a page needs; what they say of a
failure goes to the operator's log, and the page gets one sentence.
"""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

from trust import boundary
from trust.schema import BadData

from ..comfyui.warm import answered, complaint
from . import messages
from .doors import Bucket, No

TAKEN_OVER, OVER, GOING = 4409, 4410, 1001  # codes that the page's socket is closed with
LARGEST = 4 * 2**20  # bytes of a camera frame, as the pack takes them
GRACE_S = 20.0  # seconds that a page may be away: the ingress it came by may have to start anew
LEFT_S = 5.0  # the same of one whose browser said that it closes or loads it anew
EXPECTED_S = 15.0  # seconds in which it comes for the first time
_ASKED_S = 2.0  # seconds without a message after which a page is asked whether it is there
_UNANSWERED = 5  # times that it is asked before it is taken to be gone
_TOLD_S = 3.0  # seconds in which a page is told something, or it would take us to be gone
_STUCK_S = 8.0  # seconds that a page may take for one message; ComfyUI waits for us a bit longer
_LOOK_S = 0.25  # seconds between two looks
_START_S = 30.0  # seconds that ComfyUI may take to look at a graph
_BACK_S = 60.0  # seconds that a ComfyUI that died has to be there again
_DEATHS = 3  # ComfyUIs that may die of a run one after the other, before a picture
_MISSES = 8  # looks at one that knows the run and takes no socket of it
_DOWN = 2**26  # bytes of a picture, with the frame it was made from
_MOST_VIEWS = boundary.MOST_VIEWS
_TEXTS = Bucket, 500.0, 500.0  # messages of a page: one for each picture it has shown
_EDITS = Bucket, 10.0, 20.0

Log = Callable[..., None]


class Stream:
    """A visitor's run.

    Args:
        comfyui: see comfyui.ComfyUI.
        http: a client for it.
        exposed: what a visitor may set, see workflow.Exposed.
        visitor, turn: whose it is, and which turn of theirs.
        values: that it begins with, checked.
        fps: frames a second that a page may send.
        log: called with an event's name and fields.
        over: called once when it has ended.
        changed: called when its figures changed.
    """

    def __init__(
        self, comfyui: Any, http: aiohttp.ClientSession, exposed: Any, visitor: str, turn: Any,
        values: dict[str, Any], fps: float, log: Log, over: Callable[["Stream"], None],
        changed: Callable[[], None],
    ):  # fmt: skip
        self.id, self.token = secrets.token_urlsafe(12), secrets.token_urlsafe(24)
        self.visitor, self.turn = visitor, turn
        self.values = values
        self._graph: dict[str, Any] = {}  # with them: texts with {a|b} are the same in the next one
        self._before: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._shown_nodes = frozenset(str(view["node"]) for view in exposed.views)
        self._hidden: set[int] = set()  # indices of views that visitors do not see
        self.reason: str | None = None  # why it is over
        self.stats: dict[str, Any] = {}
        self.began = time.monotonic()
        self._comfyui, self._http, self._exposed, self._fps = comfyui, http, exposed, fps
        self._log, self._over, self._changed = log, over, changed
        self._prompt_id = secrets.token_hex(8)
        self._keys: dict[str, str] = {}
        self._begun: dict[str, Any] = {}
        self._generation = 0
        self._up: aiohttp.ClientWebSocketResponse | None = None
        self._page: web.WebSocketResponse | None = None
        self._alone: float | None = time.monotonic() + EXPECTED_S - GRACE_S
        self._wire: asyncio.BaseTransport | None = None  # the page's
        self._sending: float | None = None
        self._sent = 0.0  # when the page was told something
        self._unanswered = 0  # camera frames
        self._away: dict[int, int] = {}  # pictures of each view that the page has not shown
        self._latest: dict[int, bytes] = {}
        self._told: dict[str, str] = {}  # the last state and pace
        self._wishes: set[tuple[str, int]] = set()  # compare and elsewhere of the page, with views
        # browsers keep a camera's own rhythm and may send a little early
        self._frames = Bucket(1.25 * fps, max(3.0, fps / 4))
        self._texts, self._edits = (kind(*rates) for kind, *rates in (_TEXTS, _EDITS))
        self._deaths = self._misses = 0
        self._moving = self._draining = False  # moving: between two ComfyUIs
        self._until: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task] = []

    # -- its course -------------------------------------------------------------------------

    async def begin(self, left_s: float | None) -> dict[str, Any]:
        """Start it; returns what its page is answered. Raises No.

        Args:
            left_s: seconds that the visitor has; None for any.
        """
        self._graph = self._with(self.values)
        try:
            begun = await self._start()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as reason:
            self._log("not started", visitor=self.visitor, why=str(reason))
            raise No(503, "ComfyUI is not there at the moment. Try again.") from None
        if left_s is not None:
            self._until = asyncio.get_running_loop().call_later(left_s, self.end, "time")
        self._tasks = [asyncio.create_task(self._drive()), asyncio.create_task(self._look())]
        return {
            "session": self.id, "token": self.token, "prompt_id": self._prompt_id,
            "ahead": begun.get("ahead", 0), **self._described(begun),
        }  # fmt: skip

    async def update(self, values: dict[str, Any]) -> dict[str, Any]:
        """Give it other values, all of them, checked. Raises No; those before go on."""
        if not self._edits.take():
            raise No(429, "These are too many changes. Wait a second.")
        graph = self._with(values)
        if self._up is None:  # between two ComfyUIs: the next one begins with them
            self._edited(values, graph)
            return self._described({})
        try:
            async with self._post("update", {**self._keys, "prompt": graph}) as reply:
                answer = await answered(reply)
                if reply.status == 400:
                    self._log("edit refused", visitor=self.visitor, why=complaint(answer))
                    raise No(400, messages.NOT_TAKEN)
                reply.raise_for_status()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as reason:
            if self._up is not None and self._comfyui.alive:
                self._log("edit lost", visitor=self.visitor, why=repr(reason))
                raise No(503, "ComfyUI has not taken this change. Try again.") from None
            answer = {}  # it has gone: the next one begins with them
        self._edited(values, graph)
        return self._described(answer)

    def _with(self, values: dict[str, Any]) -> dict[str, Any]:
        """The graph with values. Raises No."""
        try:
            return self._exposed.graph(values)
        except ValueError as reason:
            raise No(400, str(reason)) from None

    def _edited(self, values: dict[str, Any], graph: dict[str, Any]) -> None:
        self._before = self.values, self._graph
        self.values, self._graph = values, graph

    def _take_back(self) -> bool:
        """The settings before the last edit, if there was one."""
        if self._before is None:
            return False
        (self.values, self._graph), self._before = self._before, None
        return True

    def end(self, reason: str, tell: bool = True, code: int = OVER) -> None:
        """It is over. In the event loop.

        Args:
            reason: time, operator, left, gone, failed, moved.
            tell: say so to the page.
        """
        if self.reason is not None:
            return
        self.reason = reason
        if self._until is not None:
            self._until.cancel()
        self._over(self)
        ending = asyncio.get_running_loop().create_task(self._end(tell, code))
        self._tasks.append(ending)

    async def ended(self) -> None:
        """Wait until nothing of it is left, after `end`."""
        me = asyncio.current_task()
        await asyncio.gather(*(t for t in self._tasks if t is not me), return_exceptions=True)

    async def _end(self, tell: bool, code: int) -> None:
        page, up = self._page, self._up
        self._page = None
        for task in self._tasks[:2]:
            task.cancel()
        if page is not None:
            with contextlib.suppress(ConnectionError, RuntimeError, asyncio.TimeoutError):
                if tell:
                    message = {"type": "over", "reason": self.reason}
                    await asyncio.wait_for(page.send_json(message), 2)
                await asyncio.wait_for(page.close(code=code), 2)
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
            if up is not None:
                async with self._post("stop", self._keys, seconds=5) as reply:
                    await reply.read()
                await asyncio.wait_for(up.close(), 2)

    def drain(self) -> None:
        """The page is to go elsewhere; once it is gone, so is this."""
        self._draining = True
        self._tell({"type": "moving", "reason": "draining"})

    # -- ComfyUI's side ---------------------------------------------------------------------

    def _post(self, route: str, data: dict[str, Any], seconds: float = _START_S):
        url = f"{self._comfyui.url}/livediffusion/{route}"
        return self._http.post(url, json=data, timeout=aiohttp.ClientTimeout(total=seconds))

    async def _start(self) -> dict[str, Any]:
        self._generation = self._comfyui.generation
        body = {"client_id": self.id, "prompt": self._graph, "workflow": None}
        async with self._post("start", body) as reply:
            begun = await answered(reply)
            if reply.status == 400:
                self._log("start refused", visitor=self.visitor, why=complaint(begun))
                raise No(400, messages.NOT_TAKEN)
            reply.raise_for_status()
        self._keys = {key: begun[key] for key in ("session", "token")}
        return begun

    async def _drive(self) -> None:
        """One ComfyUI after the other, until the run is over."""
        try:
            while self.reason is None:
                await self._one()
                if self.reason is None and not await self._another():
                    self.end("failed")
        except Exception as reason:
            self._log("bug", visitor=self.visitor, why=repr(reason))
            self.end("failed")

    async def _one(self) -> None:
        url = f"{self._comfyui.url}/livediffusion/frames"
        query = {**self._keys, "role": "owner"}
        with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
            async with self._http.ws_connect(url, params=query, max_msg_size=_DOWN) as up:
                self._up, self._misses = up, 0
                try:
                    for wish in list(self._wishes):
                        if wish in self._wishes:  # the page may have changed its mind meanwhile
                            await self._wish(*wish, True)
                    async for message in up:
                        if message.type is WSMsgType.BINARY:
                            await self._picture(message.data)
                        elif message.type is WSMsgType.TEXT:
                            await self._heard(message.data)
                finally:
                    self._up = None
                if up.close_code == OVER and self.reason is None:
                    state = json.loads(self._told.get("state", "{}")).get("state")
                    self.end("failed" if state == "failed" else "left", tell=False)

    async def _another(self) -> bool:
        """Whether the run goes on, with the same session of ComfyUI or in the next ComfyUI."""
        await self._answer_frames()
        if self._comfyui.alive and self._generation == self._comfyui.generation:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
                url = f"{self._comfyui.url}/livediffusion/stats"
                async with self._http.get(url, params=self._keys) as reply:
                    if reply.status == 200 and self._misses < _MISSES:
                        await asyncio.sleep(_LOOK_S if self._misses else 0)
                        self._misses += 1
                        return True
        now = time.monotonic()
        self._deaths += 1
        if self._deaths == _DEATHS:
            self._log("given up", visitor=self.visitor, why=f"{_DEATHS} ComfyUIs were lost to it")
            return False
        self._moving = True
        await self._send(json.dumps({"type": "moving", "reason": "restart"}))
        self._away.clear()
        until = now + _BACK_S
        while self.reason is None and time.monotonic() < until:
            if not await self._comfyui.ready(1.0):
                continue
            try:
                self._described(await self._start())
                self._moving = False
                self._log("restarted", visitor=self.visitor, seconds=time.monotonic() - now)
                return True
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                await asyncio.sleep(0.1)
            except No:
                if not self._take_back():
                    return False
        return False

    async def _picture(self, data: bytes) -> None:
        self._deaths = 0
        view = data[2] | data[3] << 8  # docs/live.md, "On the wire"
        if view not in self._hidden and (len(self._latest) < _MOST_VIEWS or view in self._latest):
            self._latest[view] = data
        if self._page is None or view in self._hidden:
            return await self._shown_for_it(view)
        self._away[view] = self._away.get(view, 0) + 1
        return await self._send(data)

    async def _say(self, message: dict[str, Any]) -> None:
        """To ComfyUI, if there is one."""
        if self._up is not None:
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                await self._up.send_str(json.dumps(message))

    async def _shown_for_it(self, view: int) -> None:
        await self._say({"type": "shown", "view": view, "latency_ms": None})

    async def _wish(self, kind: str, view: int, on: bool) -> None:
        await self._say({"type": kind, "view": view, "on": on})

    async def _heard(self, text: str) -> None:
        """A message of ComfyUI's: what of it a page may know is sent on."""
        try:
            said = json.loads(text)
            data = messages.for_page(said, self._fps)
        except (ValueError, TypeError, AttributeError) as reason:  # a later pack's
            self._log("not understood", visitor=self.visitor, why=repr(reason))
            return
        # also what no page is told, as that a Live Send has lost its receiver
        if (event := messages.for_log(said)) is not None:
            told = {"kind": said.get("kind"), "node": said.get("node"), "why": said.get("reason")}
            self._log(event, visitor=self.visitor, **told)
        if data is None:
            return
        kind = data["type"]
        if kind == "received":
            self._unanswered = max(0, self._unanswered - 1)
        elif kind == "stats":
            self.stats = said
            self._changed()
        elif kind == "problem" and data["kind"] == "edit":
            self._take_back()
        whole = json.dumps(data)
        if kind in ("state", "pace"):
            self._told[kind] = whole
        await self._send(whole)

    async def _answer_frames(self) -> None:
        """What a ComfyUI that died will not answer: the page sends no more than two unanswered."""
        lost, self._unanswered = self._unanswered, 0
        for _ in range(lost):
            await self._send(json.dumps({"type": "received", "seq": None, "refused": None}))

    # -- the page's side --------------------------------------------------------------------

    async def serve(self, page: web.WebSocketResponse, request: web.BaseRequest) -> None:
        """Talk to a page as long as it is there. The one that comes last is the run's."""
        before, self._page, self._wire = self._page, page, request.transport
        if before is not None:
            reason = "Another page has this stream now."
            with contextlib.suppress(ConnectionError, RuntimeError):
                await before.send_json({"type": "refused", "reason": reason})
                await before.close(code=TAKEN_OVER)
        self._alone = None
        self._unanswered = 0
        try:
            # each page says its own
            wishes, self._wishes = self._wishes, set()
            for wish in wishes:
                await self._wish(*wish, False)
            await self._welcome()
            await self._listen(page, request)
        except ConnectionError:
            pass
        finally:
            if self._page is page:
                self._page, self._alone = None, time.monotonic()
                if page.close_code == GOING:
                    self._alone -= GRACE_S - LEFT_S
                if self._draining:
                    self.end("moved")

    async def _welcome(self) -> None:
        away, self._away = self._away, {}
        for view, count in away.items():
            for _ in range(count):
                await self._shown_for_it(view)
        if self._draining:
            self._told["moving"] = json.dumps({"type": "moving", "reason": "draining"})
        elif self._moving:
            await self._send(json.dumps({"type": "moving", "reason": "restart"}))
        for text in list(self._told.values()):
            await self._send(text)
        for view, picture in list(self._latest.items()):
            self._away[view] = self._away.get(view, 0) + 1
            await self._send(picture)

    async def _listen(self, page: web.WebSocketResponse, request: web.BaseRequest) -> None:
        unanswered = 0
        while self._page is page:
            try:
                message = await page.receive(_ASKED_S)
            except asyncio.TimeoutError:
                if unanswered == _UNANSWERED:
                    if request.transport is not None:
                        request.transport.abort()
                    return
                unanswered += 1
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(page.ping(), _ASKED_S)
                continue
            unanswered = 0
            if message.type is WSMsgType.BINARY:
                await self._frame(message.data)
            elif message.type is WSMsgType.TEXT:
                await self._told_by_page(message.data)
            elif message.type is WSMsgType.PING:
                if self._texts.take():
                    await page.pong(message.data)
            elif message.type is not WSMsgType.PONG:
                return

    async def _frame(self, data: bytes) -> None:
        refused = None
        if len(data) > LARGEST:
            refused = f"A frame is at most {LARGEST} bytes."
        elif not self._frames.take():
            refused = f"Frames come at most {self._fps:g} times a second."
        elif self._up is not None:
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                self._unanswered += 1
                await self._up.send_bytes(data)
            return
        await self._send(json.dumps({"type": "received", "seq": None, "refused": refused}))

    async def _told_by_page(self, text: str) -> None:
        if not self._texts.take():
            return
        try:
            data = boundary.told(text.encode(), "message", boundary.MESSAGE, boundary.HEARD)
        except (BadData, UnicodeEncodeError):
            return
        kind, view = data["type"], data["view"]
        if kind != "shown":
            # kept for the next socket to ComfyUI, which knows nothing of this one's
            on = data.get("on", False)
            self._wishes.discard((kind, view))
            if on and len(self._wishes) < 2 * _MOST_VIEWS:
                self._wishes.add((kind, view))
            await self._wish(kind, view, on)
            return
        if self._away.get(view):
            self._away[view] -= 1
        await self._say({k: data[k] for k in ("type", "view", "latency_ms") if k in data})

    async def _send(self, message: str | bytes) -> None:
        """To the page, if there is one; a page that takes too long is cut off by `_look`."""
        page = self._page
        if page is None:
            return
        self._sending = time.monotonic()
        try:
            if isinstance(message, bytes):
                await page.send_bytes(message)
            else:
                await page.send_str(message)
        except (ConnectionError, RuntimeError):  # RuntimeError: it has not been prepared or closes
            pass
        finally:
            self._sending, self._sent = None, time.monotonic()

    def _tell(self, message: dict[str, Any]) -> None:
        self._tasks = [*self._tasks[:2], *(t for t in self._tasks[2:] if not t.done())]
        self._tasks.append(asyncio.create_task(self._send(json.dumps(message))))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            if self._alone is not None and now - self._alone > GRACE_S:
                self.end("gone")
            page = self._page
            if page is not None and self._sending and now - self._sending > _STUCK_S:
                self._page, self._alone = None, now
                if self._wire is not None:
                    self._wire.abort()
            elif page is not None and self._sending is None and now - self._sent > _TOLD_S:
                self._tell({"type": "alive"})

    @property
    def tick_s(self) -> float | None:
        """Median of one frame through the graph; None before the first."""
        median = (self.stats.get("compute_ms") or {}).get("p50")
        return None if median is None else median / 1000

    def figures(self) -> dict[str, Any]:
        """What a page may know of it."""
        return messages.figures(self.stats)

    def _described(self, begun: dict[str, Any]) -> dict[str, Any]:
        """What a page is told of ComfyUI's answer; of the last one while there is none."""
        begun = self._begun = {**self._begun, **begun}
        every = begun.get("views", [])
        self._hidden = {one["index"] for one in every if one["node"] not in self._shown_nodes}
        return messages.described(begun, self._shown_nodes, self._fps)
