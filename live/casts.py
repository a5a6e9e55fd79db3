"""What ComfyUI does after each node under dynamic VRAM, in a live run only where it has something
to do.

After each node its executor calls reset_cast_buffers: the device is waited for, buffers through
which weights came are given back, and all of PyTorch's free memory with them. A frame has several
nodes and most of them move no weights, so the next frame would be launched into an empty device
and its memory asked for anew.
"""

import contextlib
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management

from ..host.models.looks import file_of

# of comfy.model_management, what it gives back: buffers for weights of models that are not whole on
# the device, and for pages that found no room there; files that were read on the way; what a text
# encoder keeps from token to token, its CUDA graphs with it, which are freed after the wait
_GIVEN_BACK = (
    "STREAM_CAST_BUFFERS", "STREAM_AIMDO_CAST_BUFFERS", "DIRTY_MMAPS", "CROSS_STEP_STATE",
)  # fmt: skip
# of which weight such a buffer is: as long as there is none, of no weight
_BESIDE = {"LARGEST_CASTED_WEIGHT", "LARGEST_AIMDO_CASTED_WEIGHT"}


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """While it lasts ComfyUI resets its buffers only where there are any; at the end it does."""
    management = comfy.model_management
    reset = getattr(management, "reset_cast_buffers", None)
    if not _is_understood(reset):
        yield
        return
    over = False

    def where_needed() -> None:
        if over or any(getattr(management, name, ()) for name in _GIVEN_BACK):
            reset()

    def give_back() -> None:
        nonlocal over
        over = True
        # who has wrapped it since goes on to call the real one
        if management.reset_cast_buffers is where_needed:
            management.reset_cast_buffers = reset

    management.reset_cast_buffers = where_needed
    try:
        yield
    except BaseException:
        give_back()
        try:
            reset()
        except Exception:  # the run is to end with what went wrong first
            logging.warning("LiveDiffusion: ComfyUI's buffers are not reset", exc_info=True)
        raise
    give_back()
    reset()


def _is_understood(reset: Callable[[], Any] | None) -> bool:
    """Whether all that it gives back is known here, and can be asked for."""
    memory = getattr(comfy, "memory_management", None)  # older ComfyUIs have none
    if not getattr(memory, "aimdo_enabled", False):
        return False  # nobody calls it
    own = isinstance(reset, types.FunctionType) and file_of(reset) == "comfy/model_management.py"
    if not own:
        return False  # another pack's, or of a ComfyUI that keeps it elsewhere
    held = {name for name in reset.__code__.co_names if name.isupper()}
    # without streams pages come without a buffer, so nothing tells that there is something to do
    return held <= {*_GIVEN_BACK, *_BESIDE} and comfy.model_management.NUM_STREAMS > 0
