"""The frame loop: what the injected LiveRun node does for as long as a run is live."""

from typing import Any

import comfy.model_management

from ..host.registry import owner
from .casts import unhurried
from .executor import FrameExecutor, quiet
from .faults import Fate
from .frames import Frames, current
from .graph import GraphError, Split
from .mailbox import Closed

_LOOK = 0.1  # seconds without a frame after which Cancel, Stop and edits are looked at


async def run(frames: Frames, values: list[list], dynprompt: Any, node: str, server: Any) -> None:
    """Run frames until the run is stopped, its source ends, or a node fails.

    Args:
        frames: the run's.
        values: of the graph's handover.
        dynprompt: ComfyUI's DynamicPrompt of the ordinary prompt.
        node: id of the injected node in it.
        server: ComfyUI's PromptServer.

    Raises:
        What a node of the frame raised; ComfyUI reports it for that node.
        InterruptProcessingException: Cancel was pressed.
    """
    shared, executor = frames.shared, FrameExecutor()
    executor.adopt(shared.split, dict(zip(shared.split.handover, values, strict=True)))
    tokens = current.set(frames), owner.set(shared.id)
    try:
        with unhurried(), quiet(shared.prompt_id, dynprompt, server):
            frames.begin()
            await _loop(frames, executor)
        frames.server.ended("ended")
    except comfy.model_management.InterruptProcessingException:
        frames.server.ended("ended", "Cancelled.")
        raise
    except _Failed as failed:
        frames.server.ended("failed", str(failed.reason), failed.node)
        _blame(dynprompt, node, failed.node, executor.split)
        raise failed.reason from None
    except BaseException as reason:
        frames.server.ended("failed", str(reason))
        raise
    finally:
        current.reset(tokens[0])
        owner.reset(tokens[1])
        executor.reset()


class _Failed(Exception):
    def __init__(self, node: str, reason: BaseException):
        self.node, self.reason = node, reason


async def _loop(frames: Frames, executor: FrameExecutor) -> None:
    shared = frames.shared
    while not shared.stopping:
        executor.failure = None
        try:
            if edited := frames.take_over():
                executor.adopt(edited)
            if not await frames.next_frame(_LOOK):
                comfy.model_management.throw_exception_if_processing_interrupted()
                continue
            await frames.room()
            # the frame's execution clears the flag first of all
            comfy.model_management.throw_exception_if_processing_interrupted()
            await executor.frame(shared.prompt_id, shared.extra)
        except Closed:
            return
        except GraphError as reason:
            executor.failure = reason.node, reason
        if executor.failure is None:
            frames.frame_done()
        else:
            _failed(frames, executor, *executor.failure)


def _failed(frames: Frames, executor: FrameExecutor, node: str, reason: BaseException) -> None:
    """Go on, on the graph before an edit if it was one that does not run, or raise."""
    if isinstance(reason, comfy.model_management.InterruptProcessingException):
        raise reason
    match frames.fate(reason):
        case Fate.END:
            raise _Failed(node, reason)
        case Fate.BACK:
            frames.server.problem("edit", str(reason), node)
            executor.adopt(frames.go_back())
        case Fate.ON:
            frames.left_out(node, reason)


def _blame(dynprompt: Any, node: str, failed: str, split: Split) -> None:
    """Have ComfyUI report the failed node of the frame, not the node that ran the frame.

    The executor names the parent of the node that raised; an asynchronous node is looked up
    again when it is done.
    """
    dynprompt.original_prompt.setdefault(failed, split.graph[failed])
    dynprompt.ephemeral_parents[node] = failed
