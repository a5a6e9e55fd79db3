"""The frame loop: what the injected LiveRun node does for as long as a run is live."""

from typing import Any

import comfy.model_management

from ..host.registry import owner
from .executor import FrameExecutor, quiet
from .graph import GraphError, Split
from .mailbox import Closed
from .session import Session
from .sessions import current

_LOOK = 0.1  # seconds without a frame after which Cancel, Stop and edits are looked at


async def run(session: Session, values: list[list], dynprompt: Any, node: str, server: Any) -> None:
    """Run frames until the session is stopped, its source ends, or a node fails.

    Args:
        values: of session.split.handover.
        dynprompt: ComfyUI's DynamicPrompt of the ordinary prompt.
        node: id of the injected node in it.
        server: ComfyUI's PromptServer.

    Raises:
        What a node of the frame raised; ComfyUI reports it for that node.
        InterruptProcessingException: Cancel was pressed.
    """
    executor = FrameExecutor()
    executor.adopt(session.split, dict(zip(session.split.handover, values, strict=True)))
    tokens = current.set(session), owner.set(session.id)
    try:
        with quiet(session.prompt_id, dynprompt, server):
            session.begin()
            await _frames(session, executor)
        session.later(session.conclude, "ended")
    except comfy.model_management.InterruptProcessingException:
        session.later(session.conclude, "ended", "Cancelled.")
        raise
    except _Failed as failed:
        session.later(session.conclude, "failed", str(failed.reason), failed.node)
        _blame(dynprompt, node, failed.node, executor.split)
        raise failed.reason from None
    except BaseException as reason:
        session.later(session.conclude, "failed", str(reason))
        raise
    finally:
        current.reset(tokens[0])
        owner.reset(tokens[1])
        executor.reset()


class _Failed(Exception):
    def __init__(self, node: str, reason: BaseException):
        self.node, self.reason = node, reason


async def _frames(session: Session, executor: FrameExecutor) -> None:
    before: tuple[int, Split] | None = None  # what an edit replaced, until a frame has run on it
    while not session.stopping:
        try:
            if edit := session.take_over():
                before = before or (session.version, executor.split)
                session.adopt(*edit)
                executor.adopt(edit[1])
            if not await session.next_frame(_LOOK):
                comfy.model_management.throw_exception_if_processing_interrupted()
                continue
            await session.room()
            # the frame's execution clears the flag first of all
            comfy.model_management.throw_exception_if_processing_interrupted()
            await executor.frame(session.prompt_id, session.extra)
        except Closed:
            return
        except GraphError as reason:
            executor.failure = reason.node, reason
        if executor.failure is None:
            session.frame_done()
            before = None
            continue
        node, reason = executor.failure
        if isinstance(reason, comfy.model_management.InterruptProcessingException):
            raise reason
        if before is None:
            raise _Failed(node, reason)
        # the edit does not run: say so, and go on as before
        session.problem(str(reason), node)
        session.adopt(*before)
        executor.adopt(before[1])
        before = None


def _blame(dynprompt: Any, node: str, failed: str, split: Split) -> None:
    """Have ComfyUI report the failed node of the frame, not the node that ran the frame.

    The executor names the parent of the node that raised; an asynchronous node is looked up
    again when it is done.
    """
    dynprompt.original_prompt.setdefault(failed, split.graph[failed])
    dynprompt.ephemeral_parents[node] = failed
