"""Every stream's state, in one place: keyed, bounded, with an owner and an end.

Nodes are classes without instances in ComfyUI, so what must live from one run to the next lives
here. A key is (owner, execution id, kind); the owner is the workflow, or a live run of it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class StreamKey(NamedTuple):
    """Who a state belongs to."""

    owner: str
    execution: str
    kind: str


class Registry:
    """Least recently used states fall out once there are more than `limit`. Thread-safe.

    Args:
        limit: the most states kept.
    """

    def __init__(self, limit: int = 32):
        self.limit = limit
        self._lock = threading.Lock()
        self._states: OrderedDict[StreamKey, Any] = OrderedDict()

    def get(self, key: StreamKey, factory: Callable[[], T]) -> T:
        """The state under `key`, made by `factory` if there is none."""
        with self._lock:
            if key not in self._states:
                self._states[key] = factory()
            self._states.move_to_end(key)
            self._shrink()
            return self._states[key]

    def put(self, key: StreamKey, state: Any) -> None:
        """Replace the state under `key`."""
        with self._lock:
            self._states[key] = state
            self._states.move_to_end(key)
            self._shrink()

    def end(self, key: StreamKey) -> None:
        """Forget one state; no error if there is none."""
        with self._lock:
            self._states.pop(key, None)

    def owned(self, owner: str) -> list[Any]:
        """Every state of an owner."""
        with self._lock:
            return [state for key, state in self._states.items() if key.owner == owner]

    def end_owner(self, owner: str) -> None:
        """Forget every state of an owner."""
        with self._lock:
            for key in [k for k in self._states if k.owner == owner]:
                del self._states[key]

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._states

    def _shrink(self) -> None:
        while len(self._states) > self.limit:
            self._states.popitem(last=False)


streams = Registry()
# who owns the states of the nodes that run now, if it is not their workflow: a live run
owner: ContextVar[str | None] = ContextVar("livediffusion_owner", default=None)


def stream_key(hidden, kind: str) -> StreamKey:
    """The key of a node's state.

    Args:
        hidden: the node's `cls.hidden`, with unique_id and extra_pnginfo asked for in its schema.
        kind: the node's class name, so that ids used again by another node do not mix.
    """
    node = str(getattr(hidden, "unique_id", ""))
    if (run := owner.get()) is not None:
        return StreamKey(run, node, kind)
    info = getattr(hidden, "extra_pnginfo", None) or {}
    workflow = info.get("workflow") or {} if isinstance(info, dict) else {}
    name = workflow.get("id", "") if isinstance(workflow, dict) else ""
    return StreamKey(str(name), node, kind)
