"""ComfyUI's compiler of allocations (0.38 and later), kept out of what is recorded here.

From comfy.model_prefetch: around its blocks a model may let the allocations of its thread be
recorded (malloc_graph_begin), to lay them out anew in the calls that follow. What a CUDA graph of
ours has recorded lies at the addresses that it was recorded with, so of the two only one may.
"""

import contextlib
from collections.abc import Iterator

from comfy.cli_args import args

_SWITCH = "disable_comfy_compiler"


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """While this lasts, no allocation of this thread is ComfyUI's compiler's to place.

    Does nothing where ComfyUI has none. ComfyUI runs one prompt at a time, in one thread, so its
    switch concerns no other.
    """
    if not hasattr(args, _SWITCH):
        yield
        return
    from comfy import model_prefetch

    before = getattr(args, _SWITCH)
    # a recording that runs already looks away as well
    with model_prefetch.pause_malloc_graph(sync=True):
        setattr(args, _SWITCH, True)
        try:
            yield
        finally:
            setattr(args, _SWITCH, before)
