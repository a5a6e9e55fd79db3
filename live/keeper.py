"""Runs without a page: kept, started again after a failure, written down. In the server's loop."""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from typing import Any

import folder_paths

from ..trust.schema import BadData, shown
from .bounds import most
from .kept import STARTED, Files, Hush, Kept, Lines, plain
from .session import Session
from .sessions import Invalid, Sessions

_LOOK = 0.5  # seconds between two looks after what is kept
_BEAT = 2.0  # seconds between two heartbeats
_SAVE = 5.0  # seconds between two edits that are written down
_HUSHED = 2  # failures of one kind after which ComfyUI's own lines of the next are left out
_log = logging.getLogger(__name__)


class Keeper:
    """What runs without a page. There is one place: ComfyUI runs one prompt at a time, and a second
    run would wait for as long as the first goes on.

    Args:
        sessions: the live runs.
        server: ComfyUI's PromptServer.
        files: where it is written.
    """

    def __init__(self, sessions: Sessions, server: Any, files: Files | None = None):
        self._sessions, self._server = sessions, server
        self._files = files or Files(folder_paths.get_user_directory)
        self._runs: dict[str, Kept] = {}
        self._lines = Lines()
        self._hush: Hush | None = None
        self._task: asyncio.Task | None = None
        self._writing = asyncio.Lock()
        self._beaten = self._saved = 0.0
        self._beats = self._silent = 0

    # -- what routes ask ---------------------------------------------------------------------

    def get(self, id: Any) -> Kept | None:
        return self._runs.get(id) if isinstance(id, str) else None

    def told(self) -> list[dict[str, Any]]:
        """All that is kept, for pages."""
        now = time.monotonic()
        return [kept.told(now) for kept in self._runs.values()]

    def place(self) -> str:
        """The name of a run that is to be kept. Raises Invalid where there is no room for it."""
        if len(self._runs) >= most("keeper.Keeper._runs"):
            there = next(iter(self._runs.values()))
            raise Invalid.of(
                f"{there.name} is kept running, and ComfyUI runs one prompt at a time. Stop it "
                "first."
            )
        return secrets.token_urlsafe(12)

    async def keep(self, session: Session, name: str) -> str | None:
        """Have a session go on without a page. One that is kept stays as it is.

        Args:
            session: one that was started to be kept, or one that a page owns.
            name: for people.

        Returns:
            A sentence where it could not be written down, and so will not outlive ComfyUI.

        Raises:
            Invalid: there is no room, or its graph needs a page.
        """
        if session.kept in self._runs:
            return None
        try:
            id = self.place()
            self._sessions.alone(session.wanted)
        except Invalid:
            if session.kept is not None:
                session.stop()  # another one was faster
            raise
        session.kept, now = session.kept or id, time.time()
        name = shown(name, 80) if name else "A live run"
        what = plain(session.split.graph), session.split.workflow, now, session.view_secret
        kept = Kept(session.kept, name, *what, session, session.version, 1)
        self._add(kept)
        _log.info("Live: %s is kept running", kept.name)
        return await self._save()

    async def end(self, kept: Kept) -> str | None:
        """Stop it, for good. It is written down when this returns, so that it is not begun again.

        Returns:
            A sentence where it could not be.
        """
        if kept.session is not None:
            kept.session.stop()
        return await self._forget(kept, "was stopped")

    # -- its course --------------------------------------------------------------------------

    async def begin(self, app: Any = None) -> None:
        """At ComfyUI's start: start what was kept, if that is wanted.

        A ComfyUI of the command's begins the command's own run and no other: that one would have
        the only place.
        """
        try:
            if not await asyncio.to_thread(self._files.wanted):
                return
            runs = await asyncio.to_thread(self._files.read)
        except FileNotFoundError:
            return
        except (OSError, BadData) as reason:
            _log.warning("Live: what was kept running cannot be read: %s", reason)
            return
        own = os.environ.get(STARTED)
        for one in runs:
            if own and one["run"] != own:
                _log.info("Live: %s is kept no more: the command has a run of its own", one["name"])
                continue
            secret = secrets.token_urlsafe(24)
            what = one["run"], one["name"], one["graph"], one.get("workflow"), one["since"]
            self._add(Kept(*what, secret))
            _log.info("Live: starting %s, which was kept running", one["name"])

    def _add(self, kept: Kept) -> None:
        self._runs[kept.id] = kept
        if self._hush is None:
            self._hush = Hush(self._server)
            logging.getLogger().addFilter(self._hush)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        try:
            while self._runs:
                for kept in list(self._runs.values()):
                    try:
                        await self._look(kept)
                    except Exception as reason:
                        # whatever is wrong with a look, the next may be well
                        self._say(kept, str(reason) or "a bug")
                await self._beat()
                await asyncio.sleep(_LOOK)
        finally:
            self._task = None
            logging.getLogger().removeFilter(self._hush)
            self._hush = None
        await self._beat(last=True)

    async def _look(self, kept: Kept) -> None:
        now, session = time.monotonic(), kept.session
        if kept.over:
            return  # it is being forgotten
        if session is None:
            if now >= kept.due:
                await self._start(kept)
            return
        last = session.shared.frame_rate.last
        kept.frame_at = kept.frame_at if last is None else last
        if session.over:
            kept.spent = session.prompt_id
            if session.state == "failed" or session.broken:
                self._failed(kept, session.reason or "it ended by itself", session.node)
            else:
                await self._forget(kept, session.reason or "has ended")
        elif session.state == "live":
            kept.alive(now)
            if kept.reason is None:
                self._hush.prompt = None
            await self._follow(kept, session, now)

    async def _start(self, kept: Kept) -> None:
        kept.begun += 1
        try:
            session = await self._sessions.start(
                kept.graph, kept.workflow, "", kept.secret, kept.id
            )
        except Invalid as reason:
            return self._failed(kept, *_why(reason.answer))
        except Exception as reason:
            # a bug of ours or of a pack that is asked; it may go well the next time
            return self._failed(kept, str(reason) or "it cannot be started", None)
        if kept.over:
            return session.stop()  # stopped meanwhile
        kept.session, kept.version = session, session.version
        self._hush.prompt = session.prompt_id if kept.same >= _HUSHED else None
        if kept.spent is not None:
            # ComfyUI keeps ten thousand prompts with their graphs: of these, one
            self._server.prompt_queue.delete_history_item(kept.spent)
            kept.spent = None

    def _failed(self, kept: Kept, reason: str, node: str | None) -> None:
        kept.failed(reason, node, time.monotonic())
        self._say(kept, reason if node is None else f"node {node}: {reason}")

    def _say(self, kept: Kept, reason: str) -> None:
        if (line := self._lines.of(reason)) is not None:
            _log.warning("Live: %s failed and is tried again: %s", kept.name, line)

    async def _follow(self, kept: Kept, session: Session, now: float) -> None:
        """Keep an edit, once a frame has gone through it; write what could not be written."""
        edited = session.version != kept.version and len(session.shared.graphs) == 1
        if not (edited or kept.unwritten) or now - self._saved < _SAVE:
            return
        self._saved = now
        if edited:
            kept.version = session.version
            kept.graph, kept.workflow = plain(session.split.graph), session.split.workflow
        await self._save()

    async def _forget(self, kept: Kept, why: str) -> str | None:
        """Keep it no more. Whoever looks finds it until the file does not have it any more."""
        if not kept.over:
            kept.over = True
            _log.info("Live: %s is kept no more: %s", kept.name, shown(why, 200))
        try:
            return await self._save("it may be there again after ComfyUI's restart")
        finally:
            self._runs.pop(kept.id, None)

    # -- what is written ---------------------------------------------------------------------

    async def _save(self, so: str = "it ends with ComfyUI") -> str | None:
        async with self._writing:
            there = [kept for kept in self._runs.values() if not kept.over]
            runs = [
                {"run": kept.id, "name": kept.name, "graph": kept.graph, "since": kept.since,
                 "workflow": kept.workflow}
                for kept in there
            ]  # fmt: skip
            words = None
            try:
                await asyncio.to_thread(self._files.write, runs)
            except Exception as reason:
                # also where there is no room for one more thread
                why = getattr(reason, "strerror", None) or reason
                words = f"It could not be written down ({why}): {so}."
                if (line := self._lines.of(words)) is not None:
                    _log.warning("Live: %s", line)
            for kept in there:
                kept.unwritten = words is not None
        return words

    async def _beat(self, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._beaten < _BEAT:
            return
        self._beaten, self._beats = now, self._beats + 1
        try:
            told = {
                "livediffusion": 1, "written": round(time.time(), 3), "beat": self._beats,
                "process": os.getpid(), "runs": self.told(),
            }  # fmt: skip
            await asyncio.to_thread(self._files.beat, told)
            self._silent = 0
        except Exception as reason:
            # whatever it is, runs are looked after; and one that is being read cannot be replaced
            # on Windows, once or twice
            self._silent += 1
            why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            if self._silent == 3:
                _log.warning("Live: the heartbeat file cannot be written: %s", shown(why, 400))


def _why(answer: dict[str, Any]) -> tuple[str, str | None]:
    """Reason and node of a graph that ComfyUI, or a live run, does not take."""
    for node, told in answer["node_errors"].items():
        with contextlib.suppress(IndexError):
            first = told["errors"][0]
            words = [first.get("message"), first.get("details")]
            return ": ".join(word for word in words if word), node
    return answer["error"]["message"], None


def connected(sessions: Sessions, server: Any) -> Keeper:
    """A keeper that begins with ComfyUI's server."""
    keeper = Keeper(sessions, server)
    app = getattr(server, "app", None)
    if app is not None:
        app.on_startup.append(keeper.begin)
    return keeper
