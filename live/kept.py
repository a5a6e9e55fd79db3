"""What is known of a run that nobody owns, and what of it is written: runs, heartbeat, log lines.

Files lie in ComfyUI's user folder and appear whole or not at all: a process that is killed while it
writes leaves the file before.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from ..trust import boundary, whole
from ..trust.schema import BadData, shown
from .bounds import most
from .retried import Pauses
from .session import Session

_WELL = 600.0  # seconds live after which a failure is a first one again
_HOUR = 3600.0
_NODE = ("class_type", "inputs", "_meta")
_RUNS, _HEART, _SETTINGS = "runs.json", "heartbeat.json", "comfy.settings.json"
_SETTING = "livediffusion.startUnattended"
# in the environment, by `run.py live --unattended`: the run that is to go on, else a name of none
STARTED = "LIVEDIFFUSION_UNATTENDED"


class _Growing(Pauses):
    FIRST, MOST = 1.0, 60.0


@dataclasses.dataclass
class Kept:
    """A run that goes on without a page, whatever fails.

    Attributes:
        id: the same through all its sessions, and after ComfyUI's restart.
        name: for people.
        graph, workflow: what runs, or ran last without a failure in its first frame.
        since: seconds since the epoch.
        secret: what its views' addresses are made from; never written.
        session: None while it waits for the next try.
        version: of the session's graph that is `graph`.
        unwritten: the file does not have it as it is, and is to.
        begun, failures: sessions so far, counted; failures in a row.
        same: failures in a row that are the same one.
        reason, node: of the last failure, until it has gone well for long.
        due: when the next try is, by the clock of time.monotonic.
        live_at, frame_at: when it went live, and its last frame, by the same clock.
        spent: prompt of the last session that failed.
        over: it is to be kept no more.
    """

    id: str
    name: str
    graph: dict[str, Any]
    workflow: Any
    since: float
    secret: str
    session: Session | None = None
    version: int = 1
    begun: int = 0
    failures: int = 0
    same: int = 0
    reason: str | None = None
    node: str | None = None
    due: float = 0.0
    live_at: float | None = None
    frame_at: float | None = None
    spent: str | None = None
    over: bool = False
    unwritten: bool = False
    pauses: Pauses = dataclasses.field(default_factory=_Growing)

    @property
    def state(self) -> str:
        """The session's; "waiting" between two of them."""
        return self.session.state if self.session is not None else "waiting"

    def failed(self, reason: str, node: str | None, now: float) -> None:
        """It failed, and is to be tried again after a pause that grows."""
        again = (kind_of(reason), node) == (kind_of(self.reason or ""), self.node)
        self.same = self.same + 1 if again else 1
        # a file's name in it may be no Unicode, which no file of JSON can have
        reason = reason.encode(errors="backslashreplace").decode()
        self.reason, self.node, self.failures = reason, node, self.failures + 1
        self.session, self.live_at, self.due = None, None, now + self.pauses.next()

    def alive(self, now: float) -> None:
        """It is live."""
        self.live_at = now if self.live_at is None else self.live_at
        if self.reason is not None and now - self.live_at >= _WELL:
            self.reason, self.node, self.failures, self.same = None, None, 0, 0
            self.pauses.well()

    def told(self, now: float) -> dict[str, Any]:
        """What pages and the heartbeat file are told of it."""
        workflow = self.workflow.get("id") if isinstance(self.workflow, dict) else None
        session = self.session
        return {
            "run": self.id, "name": self.name, "workflow": workflow, "since": round(self.since, 3),
            "state": self.state, "ahead": session.ahead if session is not None else 0,
            "last_frame_age_s": None if self.frame_at is None else round(now - self.frame_at, 2),
            "next_try_s": None if session is not None else round(max(0.0, self.due - now), 1),
            "restarts": max(0, self.begun - 1), "failures": self.failures,
            "reason": self.reason, "node": self.node,
        }  # fmt: skip


class Files:
    """Args:
    user: gives ComfyUI's user folder.
    """

    def __init__(self, user: Callable[[], str]):
        self._user = user

    @property
    def _folder(self) -> pathlib.Path:
        return pathlib.Path(self._user()) / "livediffusion"

    def wanted(self) -> bool:
        """Whether what was kept is to be started with ComfyUI: the command or the setting says so.

        The setting is the one of ComfyUI's default user.
        """
        if os.environ.get(STARTED):
            return True
        path = pathlib.Path(self._user()) / "default" / _SETTINGS
        with contextlib.suppress(OSError, BadData):
            data = boundary.contents(path, boundary.SETTINGS.bytes)
            settings = boundary.told(data, _SETTINGS, boundary.SETTINGS, boundary.UNATTENDED)
            return settings.get(_SETTING, False)
        return False

    def read(self) -> list[dict[str, Any]]:
        """What is written of kept runs: run, name, graph, workflow, since.

        Raises:
            OSError, BadData: there is nothing, or it cannot be used.
        """
        data = boundary.contents(self._folder / _RUNS, boundary.KEPT.bytes)
        return list(boundary.told(data, _RUNS, boundary.KEPT, boundary.KEPT_RUNS)["runs"])

    def write(self, runs: list[dict[str, Any]]) -> None:
        """Raises OSError; ValueError for what is no JSON."""
        whole.write(self._folder / _RUNS, {"livediffusion": 1, "runs": runs})

    def beat(self, told: dict[str, Any]) -> None:
        """Raises OSError."""
        whole.write(self._folder / _HEART, told, lasting=False)


def plain(graph: dict[str, Any]) -> dict[str, Any]:
    """A graph without what ComfyUI notes in it while it runs."""
    return {id: {k: node[k] for k in _NODE if k in node} for id, node in graph.items()}


def kind_of(reason: str) -> str:
    """A failure without what is another number in each."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+", "#", reason)


class Lines:
    """Which failures are worth a line in the log: the same one is one line, and a count of it.

    The first, the tenth, the hundredth and so on are; of all together so many an hour.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._times: deque[float] = deque(maxlen=most("kept.Lines._times"))

    def of(self, reason: str) -> str | None:
        """What to write of a failure, or None."""
        kind = kind_of(reason)
        count = self._counts[kind] = self._counts.pop(kind, 0) + 1
        if len(self._counts) > most("kept.Lines._counts"):
            self._counts.popitem(last=False)
        now = self._clock()
        full = len(self._times) == self._times.maxlen and now - self._times[0] < _HOUR
        if full or count != 10 ** (len(str(count)) - 1):
            return None
        self._times.append(now)
        return shown(reason, 400) + (f" ({count} times now)" if count > 1 else "")


class Hush(logging.Filter):
    """ComfyUI's own lines of a failure that is the one before again, traceback and all, left out.

    It is asked on the root logger, where ComfyUI writes. What the server's own thread says stays.

    Attributes:
        prompt: the one that is hushed, or None.
    """

    def __init__(self, server: Any):
        super().__init__()
        self._server = server
        self._loop = threading.get_ident()
        self.prompt: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        ours = self.prompt is not None and record.thread != self._loop
        return not (ours and getattr(self._server, "last_prompt_id", None) == self.prompt)
