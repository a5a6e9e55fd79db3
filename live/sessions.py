"""The live runs of this server, and the door between them and ComfyUI's prompt queue."""

import asyncio
import contextlib
import functools
import hmac
import secrets
import time
import uuid
from collections import OrderedDict
from typing import Any

import execution
import folder_paths

from .bounds import most
from .executor import NodeKinds
from .film import inside
from .graph import GraphError, Split, split
from .session import Session
from .view import View

# the injected node that runs the frames; no graph's own id looks like it
RUN = "livediffusion-run"
_KEPT = most("sessions.Sessions._all")  # sessions that are over, for those who still ask
_KEYS = most("sessions.Sessions._keys")
_LOOK = 0.2  # seconds between two looks at the queue


class Invalid(Exception):
    """A graph that ComfyUI, or a live run, does not take.

    Attributes:
        answer: what ComfyUI's own /prompt would answer: error and node_errors.
    """

    def __init__(self, error: dict[str, Any], node_errors: dict[str, Any]):
        super().__init__(error["message"])
        self.answer = {"error": error, "node_errors": node_errors}


class Sessions:
    """Every live run of a server; its methods run in the server's loop."""

    def __init__(self, server):
        self._server = server
        self._all: OrderedDict[str, Session] = OrderedDict()
        self._keys: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._kinds = NodeKinds()

    def get(self, id: str) -> Session | None:
        return self._all.get(id)

    def authorised(self, id: Any, token: Any) -> Session | None:
        """The session, if the token is its own. Raises PermissionError; None once forgotten."""
        if not isinstance(id, str) or not isinstance(token, str) or not token:
            raise PermissionError("session or token is missing")
        session = self._all.get(id)
        if session is not None and not hmac.compare_digest(session.token, token):
            raise PermissionError("wrong token")
        return session

    async def start(self, graph: Any, workflow: Any, client_id: str) -> Session:
        """Validate a graph, cut it and queue it.

        Raises:
            Invalid: the graph cannot run live.
        """
        prompt_id = str(uuid.uuid4())
        extra = {"extra_pnginfo": {"workflow": workflow}}
        cut = await self._cut(prompt_id, graph, client_id, extra)
        try:
            session = Session(cut, self._film, asyncio.get_running_loop())
        except GraphError as reason:
            raise _invalid(cut.graph, reason) from None
        session.client = client_id
        session.shared.prompt_id = prompt_id
        session.shared.extra = {**extra, "preview_method": "none"}
        session.cancel = lambda: self._cancel(session)
        self._all[session.id] = session
        self._forget()
        self._queue(session, client_id, extra)
        session.open()
        session.keep("queue", functools.partial(self._follow, session))
        return session

    async def update(self, session: Session, graph: Any, workflow: Any, client_id: str) -> int:
        """Give a running session an edited graph; returns its version. Raises Invalid."""
        extra = {"extra_pnginfo": {"workflow": workflow}}
        cut = await self._cut(session.prompt_id, graph, client_id, extra)
        try:
            return session.update(cut)
        except GraphError as reason:
            raise _invalid(cut.graph, reason) from None

    async def _cut(self, prompt_id: str, graph: Any, client_id: str, extra: dict) -> Split:
        if not isinstance(graph, dict) or not all(
            isinstance(node, dict) and isinstance(node.get("inputs"), dict)
            for node in graph.values()
        ):
            raise _invalid({}, GraphError("prompt: this is not a graph in ComfyUI's API format."))
        # other packs may have asked to see every prompt
        data = {"prompt": graph, "client_id": client_id, "extra_data": extra}
        graph = self._server.trigger_on_prompt(data)["prompt"]
        views = [n for n, node in graph.items() if self._kinds.is_view({"class_type": "", **node})]
        if views:
            valid = await execution.validate_prompt(prompt_id, graph, views)
            if not valid[0] or valid[3]:
                raise Invalid(valid[1] or _error("The graph is not valid."), valid[3])
        try:
            return split(graph, self._kinds)
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

    def _forget(self) -> None:
        over = [id for id, session in self._all.items() if session.over]
        for id in over[:-_KEPT]:
            del self._all[id]

    def key(self, session: Session, node: str) -> str:
        """The address of a view as a stream: the same for each run of a workflow."""
        place = (_workflow(session), node)
        for key, known in self._keys.items():
            if known == place:
                return key
        key = secrets.token_urlsafe(12)
        self._keys[key] = place
        while len(self._keys) > _KEYS:
            self._keys.popitem(last=False)
        return key

    def known(self, key: str) -> bool:
        """Whether a view's address was ever given out."""
        return any(hmac.compare_digest(key.encode(), k.encode()) for k in self._keys)

    def view(self, key: str) -> tuple[Session, View] | None:
        """The running view behind an address."""
        workflow, node = self._keys[key]
        for session in reversed(self._all.values()):
            if not session.over and node in session.views and _workflow(session) == workflow:
                return session, session.views[node]
        return None


def _workflow(session: Session) -> str:
    workflow = session.extra["extra_pnginfo"]["workflow"]
    name = workflow.get("id") if isinstance(workflow, dict) else None
    return str(name or session.id)


def _error(message: str) -> dict[str, Any]:
    return {"type": "livediffusion", "message": message, "details": "", "extra_info": {}}


def _invalid(graph: dict, reason: GraphError) -> Invalid:
    error, nodes = _error(str(reason)), {}
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
