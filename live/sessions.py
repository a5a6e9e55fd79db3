"""The live runs of this server, and the door between them and ComfyUI's prompt queue."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import time
import uuid
from collections import OrderedDict
from typing import Any

import execution
import folder_paths

from ..trust import boundary
from .bounds import most
from .executor import NodeKinds
from .graph import GraphError, Split, constant, keepers, split
from .media.folder import inside
from .media.reader import look_at
from .session import Session
from .shared import BROWSER, FILE
from .sinks.mjpeg import Keys, secret
from .sources import SCREEN
from .view import View

# the injected node that runs the frames; no graph's own id looks like it
RUN = "livediffusion-run"
_KEPT = most("sessions.Sessions._all")  # sessions that are over, for those who still ask
# what only a page sends
_PAGE = {BROWSER: "browser's camera", SCREEN: "screen"}
_LOOK = 0.2  # seconds between two looks at the queue


class Invalid(Exception):
    """A graph that ComfyUI, or a live run, does not take.

    Attributes:
        answer: what ComfyUI's own /prompt would answer: error and node_errors.
    """

    def __init__(self, error: dict[str, Any], node_errors: dict[str, Any]):
        super().__init__(error["message"])
        # what a node's check raised comes with the lines of code it was raised in
        for reasons in node_errors.values():
            for reason in reasons["errors"]:
                reason.get("extra_info", {}).pop("traceback", None)
        self.answer = {"error": error, "node_errors": node_errors}

    @classmethod
    def of(cls, message: str) -> "Invalid":
        """What is about no node."""
        return cls(_error(message), {})


class Sessions:
    """Every live run of a server; its methods run in the server's loop."""

    def __init__(self, server):
        self._server = server
        self._all: OrderedDict[str, Session] = OrderedDict()
        self._keys = Keys()
        self._kinds = NodeKinds()

    def get(self, id: Any) -> Session | None:
        return self._all.get(id) if isinstance(id, str) else None

    def authorised(self, id: Any, token: Any) -> Session | None:
        """The session, if the token is its own. Raises PermissionError; None once forgotten."""
        if not (boundary.is_key(id) and boundary.is_key(token)):
            raise PermissionError("session or token is missing")
        session = self._all.get(id)
        if session is not None and not hmac.compare_digest(session.token, token):
            raise PermissionError("wrong token")
        return session

    async def start(
        self, graph: Any, workflow: Any, client_id: str, view_secret: Any = None,
        kept: str | None = None,
    ) -> Session:  # fmt: skip
        """Validate a graph, cut it and queue it.

        Args:
            view_secret: what its views' addresses as streams are made from; see Keys.
            kept: what names it as one that goes on without a page; see keeper.py.

        Raises:
            Invalid: the graph cannot run live.
        """
        prompt_id = str(uuid.uuid4())
        extra = {"extra_pnginfo": _pnginfo(workflow)}
        cut = await self._cut(prompt_id, graph, client_id, extra)
        try:
            if kept:
                _alone(cut)
            await self._look_at_films(cut, set())
            self._room_for(client_id)  # nothing is awaited between the count and the run
            session = Session(cut, self._film, asyncio.get_running_loop())
            session.shared.look_at(cut)
        except GraphError as reason:
            raise _invalid(cut.graph, reason) from None
        session.client, session.kept = client_id, kept
        session.view_secret = secret(view_secret)
        session.shared.prompt_id = prompt_id
        session.shared.extra = {**extra, "preview_method": "none"}
        session.cancel = lambda: self._cancel(session)
        session.forget = self._forget
        self._all[session.id] = session
        self._forget()
        self._queue(session, client_id, extra)
        session.open()
        session.keep("queue", functools.partial(self._follow, session))
        return session

    async def update(self, session: Session, graph: Any, workflow: Any, client_id: str) -> int:
        """Give a running session an edited graph; returns its version. Raises Invalid."""
        extra = {"extra_pnginfo": _pnginfo(workflow)}
        cut = await self._cut(session.prompt_id, graph, client_id, extra)
        try:
            if session.kept:
                _alone(cut)
            await self._look_at_films(cut, set(_films(session.wanted)))
            return session.update(cut)
        except GraphError as reason:
            raise _invalid(cut.graph, reason) from None

    def phone(self, key: str) -> tuple[Session, str] | None:
        """The run, and its Live Camera, that a phone's key is of."""
        found = [(session, session.phones.node(key)) for session in self._all.values()]
        return next(((session, node) for session, node in found if node is not None), None)

    def alone(self, cut: Split) -> None:
        """Raises Invalid for a graph that has something which only a page sends."""
        try:
            _alone(cut)
        except GraphError as reason:
            raise _invalid(cut.graph, reason) from None

    def _room_for(self, client_id: str) -> None:
        """Raises Invalid where as many runs wait or run as may, of this page or of all."""
        clients = [session.client for session in self._all.values() if not session.over]
        most = boundary.MOST_RUNS, boundary.MOST_RUNS_OF_ONE
        if len(clients) >= most[0] or clients.count(client_id) >= most[1]:
            raise Invalid(_error(f"{len(clients)} live runs wait or run. Stop one first."), {})

    async def _cut(self, prompt_id: str, graph: dict, client_id: str, extra: dict) -> Split:
        if RUN in graph:
            raise _invalid(graph, GraphError("This node is put in by Live. Remove it.", RUN))
        # other packs may have asked to see every prompt
        data = {"prompt": graph, "client_id": client_id, "extra_data": extra}
        graph = self._server.trigger_on_prompt(data)["prompt"]
        views = [n for n, node in graph.items() if self._kinds.is_view({"class_type": "", **node})]
        if len(views) > boundary.MOST_VIEWS:
            words = f"{len(views)} Live Views are more than {boundary.MOST_VIEWS}. Remove some."
            raise _invalid(graph, GraphError(words, views[-1]))
        if views:
            # what is no node yet is refused by ComfyUI
            whole = {n: {"class_type": "", **node} for n, node in graph.items()
                     if isinstance(node.get("inputs"), dict)}  # fmt: skip
            outputs = [*views, *keepers(whole, self._kinds)]
            valid = await execution.validate_prompt(prompt_id, graph, outputs)
            if not valid[0] or valid[3]:
                raise Invalid(valid[1] or _error("The graph is not valid."), valid[3])
        try:
            cut = split(graph, self._kinds)
            return dataclasses.replace(cut, workflow=extra["extra_pnginfo"].get("workflow"))
        except GraphError as reason:
            raise _invalid(graph, reason) from None

    def _queue(self, session: Session, client_id: str, extra: dict[str, Any]) -> None:
        cut = session.split
        inputs = {f"frozen_{i}": list(link) for i, link in enumerate(cut.handover)}
        run = {"class_type": "LiveRun", "inputs": {"session": session.id, **inputs}}
        server = self._server
        number, server.number = server.number, server.number + 1
        extra = {**extra, "client_id": client_id, "create_time": int(time.time() * 1000)}
        item = (number, session.prompt_id, {**cut.graph, RUN: run}, extra, [RUN], {})
        server.prompt_queue.put(item)

    async def _look_at_films(self, cut: Split, known: set[tuple[str, str]]) -> None:
        """Raise GraphError for a film that cannot be shown, unless it is known."""
        for node, file in _films(cut):
            try:
                if (node, file) not in known:
                    await asyncio.to_thread(look_at, self._film(file))
            except ValueError as reason:
                raise GraphError(str(reason), node) from None

    def _film(self, name: str):
        return inside(name, folder_paths.get_input_directory())

    async def _follow(self, session: Session) -> None:
        """Tell a session where it stands in the queue, until frames run or it is over."""
        queue = self._server.prompt_queue
        while not session.over and not session.running:
            with queue.mutex:
                running = [item[1] for item in queue.currently_running.values()]
                waiting = sorted(item[:2] for item in queue.queue)
            ids = [item[1] for item in waiting]
            if session.prompt_id in running:
                session.progress("starting")
            elif session.prompt_id in ids:
                session.progress("queued", len(running) + ids.index(session.prompt_id))
            elif not session.running:
                # it ran and never came to its frames, or was taken out of the queue
                entry = queue.get_history(prompt_id=session.prompt_id).get(session.prompt_id)
                state, reason, node = _outcome(entry)
                session.conclude(state, reason, node)
            await asyncio.sleep(_LOOK)

    def _cancel(self, session: Session) -> None:
        """Stop a session that runs no frames yet."""
        queue = self._server.prompt_queue
        with queue.mutex:
            running = [item[1] for item in queue.currently_running.values()]
            if session.prompt_id in running:
                if not session.running:
                    execution.nodes.interrupt_processing()
            elif queue.delete_queue_item(lambda item: item[1] == session.prompt_id):
                session.conclude("ended")

    def running(self) -> list[Session]:
        """Those that are not over."""
        return [session for session in self._all.values() if not session.over]

    def _forget(self) -> None:
        over = [id for id, session in self._all.items() if session.over]
        for id in over[:-_KEPT]:
            del self._all[id]

    def key(self, session: Session, node: str) -> str:
        """The address of a view as a stream: the same for each run of a workflow by its owner."""
        return self._keys.key(session.view_secret, _workflow(session), node)

    def known(self, key: str) -> bool:
        """Whether a view's address was ever given out."""
        return self._keys.known(key)

    def view(self, key: str) -> tuple[Session, View] | None:
        """The running view behind an address; before one that waits in the queue."""
        found = [
            (session, view)
            for session in reversed(self._all.values()) if not session.over
            for node, view in list(session.views.items())
            if hmac.compare_digest(self.key(session, node).encode(), key.encode())
        ]  # fmt: skip
        return max(found, key=lambda one: one[0].running, default=None)


def _alone(cut: Split) -> None:
    """Raises GraphError for a source that only a page sends."""
    for node in cut.sources:
        source = constant(cut.graph[node]["inputs"], "source", BROWSER, node)
        if source in _PAGE:
            words = f"source: a run without a page has nobody who sends it a {_PAGE[source]}."
            raise GraphError(f"{words} Choose another source.", node)


def _films(cut: Split) -> list[tuple[str, str]]:
    """The sources that show a file: node and file. Raises GraphError."""
    inputs = {node: cut.graph[node]["inputs"] for node in cut.sources}
    return [
        (node, constant(settings, "file", "", node))
        for node, settings in inputs.items()
        if constant(settings, "source", BROWSER, node) == FILE
    ]


def _pnginfo(workflow: Any) -> dict[str, Any]:
    # ComfyUI's list of jobs takes a workflow that is there for one
    return {} if workflow is None else {"workflow": workflow}


def _workflow(session: Session) -> str:
    workflow = session.extra["extra_pnginfo"].get("workflow")
    name = workflow.get("id") if isinstance(workflow, dict) else None
    return str(name or session.id)


def _error(message: str) -> dict[str, Any]:
    return {"type": "livediffusion", "message": message, "details": "", "extra_info": {}}


def _invalid(graph: dict, reason: GraphError) -> Invalid:
    error, nodes = _error(str(reason)), {}
    if reason.allow is not None:
        error["extra_info"] = {"allow": reason.allow}
    if reason.node in graph:
        kind = graph[reason.node]["class_type"]
        nodes[reason.node] = {
            "errors": [error], "dependent_outputs": [reason.node], "class_type": kind
        }  # fmt: skip
    return Invalid(error, nodes)


def _outcome(entry: dict | None) -> tuple[str, str | None, str | None]:
    """State, reason and node of a prompt's history entry."""
    messages = ((entry or {}).get("status") or {}).get("messages") or []
    with contextlib.suppress(StopIteration):
        failed = next(data for event, data in messages if event == "execution_error")
        return "failed", failed["exception_message"].strip(), failed["node_id"]
    return "ended", None, None
