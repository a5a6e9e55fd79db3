"""ComfyUI's own executor, once per frame, over the part of the graph behind the live frontier.

Nothing of a frame reaches the queue, the history or the browser: messages go to a server that
keeps silent, results before the frontier stay in the executor's cache, those behind it are not
kept. An error is kept for the run to report.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.utils
import execution
from comfy_execution.caching import NullCache
from comfy_execution.graph import get_input_info
from comfy_execution.progress import (
    WebUIProgressHandler,
    add_progress_handler,
    reset_progress_state,
)

from .graph import Split, unchanged

_CLASSES = execution.nodes.NODE_CLASS_MAPPINGS


class NodeKinds:
    """live.graph.Kinds over ComfyUI's registered classes."""

    def is_source(self, node: dict[str, Any]) -> bool:
        return bool(getattr(self._class(node), "LIVE_SOURCE", False))

    def is_view(self, node: dict[str, Any]) -> bool:
        return bool(getattr(self._class(node), "LIVE_VIEW", False))

    def sends(self, node: dict[str, Any]) -> bool:
        return bool(getattr(self._class(node), "LIVE_SENDS", False))

    def is_output(self, node: dict[str, Any]) -> bool:
        return bool(getattr(self._class(node), "OUTPUT_NODE", False))

    def keeps(self, node: dict[str, Any]) -> bool:
        return bool(getattr(self._class(node), "LIVE_KEEPS", False))

    def recalls(self, node: dict[str, Any]) -> bool:
        return bool(getattr(self._class(node), "LIVE_LASTS", False))

    def is_lazy(self, node: dict[str, Any], name: str) -> bool:
        _, _, info = get_input_info(self._class(node), name)
        return bool(info and info.get("lazy"))

    def outputs(self, node: dict[str, Any]) -> int:
        return len(self._class(node).RETURN_TYPES or ())

    def _class(self, node: dict[str, Any]):
        return _CLASSES.get(node["class_type"])


class FrontierCache(NullCache):
    """Outputs of frozen nodes, kept until an edit reaches them; of live nodes none."""

    def __init__(self):
        self.frozen: frozenset[str] = frozenset()
        self.entries: dict[str, execution.CacheEntry] = {}

    def get_local(self, node_id):
        return self.entries.get(node_id)

    def set_local(self, node_id, value):
        if node_id in self.frozen:
            self.entries[node_id] = value

    # the executor awaits these since ComfyUI 0.22, and calls them before
    if inspect.iscoroutinefunction(NullCache.get):

        async def get(self, node_id):
            return self.get_local(node_id)

        async def set(self, node_id, value):
            self.set_local(node_id, value)

    else:

        def get(self, node_id):
            return self.get_local(node_id)

        def set(self, node_id, value):
            self.set_local(node_id, value)


class FrameExecutor(execution.PromptExecutor):
    """Runs frames. One per live run, in the prompt worker's thread and event loop.

    Attributes:
        failure: (node id, exception) of the last frame, or None.
    """

    def __init__(self):
        super().__init__(_Silent(), cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0})
        self.failure: tuple[str, BaseException] | None = None
        self.split: Split | None = None

    def reset(self):
        super().reset()
        # objects stay, because some nodes of the older kind keep their state on themselves
        self.frontier = FrontierCache()
        self.caches.outputs = self.frontier
        self.caches.all = [self.caches.outputs, self.caches.objects]

    def handle_execution_error(self, prompt_id, prompt, current_outputs, executed, error, ex):
        self.failure = (error["node_id"], ex)

    def adopt(self, split: Split, handed: dict[tuple[str, int], list] | None = None) -> None:
        """Run this graph from the next frame on.

        Args:
            handed: values of split.handover, each a list as ComfyUI keeps outputs.
        """
        cache = self.frontier
        cache.frozen = split.frozen
        if self.split is not None:
            keep = unchanged(self.split, split, lambda s: s.frozen)
            cache.entries = {n: entry for n, entry in cache.entries.items() if n in keep}
        self.split = split
        nodes: dict[str, list] = {}
        for (node, _), value in (handed or {}).items():
            nodes.setdefault(node, []).append(value)
        for node, outputs in nodes.items():
            cache.entries[node] = execution.CacheEntry(ui=None, outputs=outputs)

    async def frame(self, prompt_id: str, extra: dict[str, Any]) -> None:
        """One frame; `failure` says whether it went well."""
        self.failure = None
        split = self.split
        kept = dict(extra.get("extra_pnginfo", {}))
        if split.workflow is not None:
            kept["workflow"] = split.workflow
        extra = {**extra, "extra_pnginfo": kept}
        await self.execute_async(split.graph, prompt_id, extra, [*split.views, *split.keeps])


class _Silent:
    """Where the frame's messages go."""

    client_id = None
    last_node_id = None
    sockets_metadata: dict = {}  # noqa: RUF012

    def send_sync(self, event, data, sid=None):
        pass


@contextlib.contextmanager
def quiet(prompt_id: str, dynprompt: Any, server: Any) -> Iterator[None]:
    """No progress bar in the log and no progress message while frames run; all back afterwards."""
    bars, hook = comfy.utils.PROGRESS_BAR_ENABLED, comfy.utils.PROGRESS_BAR_HOOK

    def interruptible(*args, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()

    comfy.utils.set_progress_bar_enabled(False)
    comfy.utils.set_progress_bar_global_hook(interruptible)
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_enabled(bars)
        comfy.utils.set_progress_bar_global_hook(hook)
        # each frame made a progress state of its own; the ordinary prompt goes on with its own
        reset_progress_state(prompt_id, dynprompt)
        add_progress_handler(WebUIProgressHandler(server))
