"""Recorded work: a CUDA graph, and the tensors that it reads its knobs from."""

import contextlib
import functools
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..engine.blocks import rows
from ..kernels.choice import driver_allocates
from .engine import Refused


class Recording(Protocol):
    """Work that was recorded once and is repeated on the same tensors."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record. What `work` makes is gone when it returns; results go to tensors of before."""

    def replay(self) -> None:
        """Do it, on the values that its tensors have now."""

    def release(self) -> None: ...


class _Pool:
    """Memory that the recordings of a device share, for as long as one of them lives.

    A pool that all its graphs have left cannot be captured into again (CUDACachingAllocator), so
    its handle goes with the last recording that holds it.

    Attributes:
        size: bytes that captures have asked the device for.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self.size = 0

    def close(self, device: int) -> None:
        """End what a capture that CUDA broke off has left open in torch's allocator.

        Nothing can be captured into it before, and what several streams use is never freed.
        """
        # it is closed already, or an old torch has another name for this
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device, self.handle)

    def warm(self) -> None:
        """Have cuBLAS take the workspaces it keeps for this stream, outside of any capture."""
        with torch.cuda.stream(self.stream):
            for dtype in (torch.float32, torch.float16):
                some = torch.zeros(16, 16, dtype=dtype, device="cuda")
                torch.nn.functional.linear(some, some, some[0]).mm(some)


# by device, those that captures go to; and all that recordings live in
_pools: weakref.WeakValueDictionary[int, _Pool] = weakref.WeakValueDictionary()
_inhabited: weakref.WeakSet[_Pool] = weakref.WeakSet()


def pool_size() -> int:
    """Bytes that all recordings of this process hold together."""
    return sum(pool.size for pool in list(_inhabited))


class CudaRecording:
    """A torch.cuda.CUDAGraph. Capturing does no work, so the first replay is the first run.

    All recordings of a device share a pool of memory. Whatever a recording writes, its result
    too, may thus lie where another's intermediate results do. That is right because no two run at
    the same time: ComfyUI runs one prompt at a time, in one thread, and replays go to that thread's
    current stream. And nothing in the pool outlives the next replay: what a replay reads of
    before (knobs, the ring, weights, what is folded) was made outside of any capture, and results
    are written to what was made before it. Nor may anything that is made during a capture be kept.

    On cudaMallocAsync, which ComfyUI sets, that is a matter of life: the driver knows what was
    allocated in a capture from the first replay on. To free it before, or after a capture that
    broke, is an error in a destructor, which ends the process.
    """

    _broke = ""  # how a capture failed for good

    def __init__(self) -> None:
        self._graph: Any = None
        self._pool: _Pool | None = None

    def capture(self, work: Callable[[], None]) -> None:
        """See Recording.

        Raises:
            Refused: a capture has failed in a way that cudaMallocAsync does not get over.
        """
        if CudaRecording._broke:
            raise Refused(
                f"a recording has failed ({CudaRecording._broke}), and with cudaMallocAsync no "
                "other can be made: start ComfyUI with --disable-cuda-malloc"
            )
        device = torch.cuda.current_device()
        pool = _pools.get(device) or _Pool()
        _pools[device] = pool
        graph = torch.cuda.CUDAGraph()
        pool.warm()
        try:
            # thread_local: pictures are encoded and decoded in other threads meanwhile
            with torch.cuda.graph(
                graph, pool.handle, stream=pool.stream, capture_error_mode="thread_local"
            ):
                before = _reserved()
                try:
                    work()
                except BaseException as error:
                    _let_go(error)
                    raise
                grown = _reserved() - before
        except BaseException:
            _pools.pop(device, None)
            pool.close(device)
            raise
        pool.size += grown
        _inhabited.add(pool)
        self._graph, self._pool = graph, pool

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        self._graph = self._pool = None


_lost: list[BaseException] = []  # and with them what must never be freed


def _reserved() -> int:
    """Bytes that torch's own allocator has; of a graph's memory the driver tells it nothing."""
    return 0 if driver_allocates() else torch.cuda.memory_reserved()


def _let_go(error: BaseException) -> None:
    """Free what a failed capture has made, which the frames of its error hold, while it lasts.

    An error of CUDA's own has spoilt the capture, and nothing can be freed any more.
    """
    if not driver_allocates() or not isinstance(error, RuntimeError):
        traceback.clear_frames(error.__traceback__)
        return
    CudaRecording._broke = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    _lost.append(error)


class Knobs:
    """Tensors at fixed addresses, filled from others before each replay.

    A tensor that is the same object as last time is not copied again: what is prepared once, such
    as a prompt, is never written over in place.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = {name: t.detach().clone() for name, t in tensors.items()}
        self._last: dict[str, Tensor | None] = dict.fromkeys(tensors)

    def fill(self, tensors: dict[str, Tensor], always: frozenset[str] = frozenset()) -> set[str]:
        """Copy in what is new; returns the names of that."""
        new = set()
        for name, tensor in tensors.items():
            if name in always or tensor is not self._last[name]:
                self.tensors[name].copy_(tensor)
                self._last[name] = None if name in always else tensor
                new.add(name)
        return new


class Folded:
    """What a UNet computes from its prompt and its time alone, computed once.

    Keys and values of cross-attention depend on the prompt, the blocks' time embeddings on the
    noise levels; neither changes from frame to frame. docs/engines.md says what
    that is worth.

    Args:
        module: a UNet with `attn2.to_k`, `attn2.to_v` and `emb_layers` (the SD layouts).
        context: prompt, [R, tokens, D].
        emb: time embedding, [R, E], or None to leave time as it is.
    """

    def __init__(self, module: nn.Module, context: Tensor, emb: Tensor | None = None):
        named = list(module.named_modules())
        prompt = [m for name, m in named if name.endswith(("attn2.to_k", "attn2.to_v"))]
        time = [m for name, m in named if name.endswith("emb_layers")] if emb is not None else []
        # the weights are not ours to keep
        self._prompt = [(weakref.ref(m), m(context).clone()) for m in prompt]
        self._time = [(weakref.ref(m), m(emb).clone()) for m in time]
        self._unused: list[tuple] = []
        if time:
            # with every block's share kept, the embedding itself is not used
            whole = [getattr(module, name, None) for name in ("time_embed", "label_emb")]
            blank = torch.zeros_like(emb)
            self._unused = [(weakref.ref(m), blank) for m in whole if m is not None]

    def prompt(self, context: Tensor) -> None:
        """The prompt has changed, or the weights have."""
        for module, out in self._prompt:
            out.copy_(module()(context))

    @property
    def timed(self) -> bool:
        """True where the time embeddings are kept."""
        return bool(self._time)

    def embeddings(self, emb: Tensor) -> list[Tensor]:
        """The blocks' time embeddings of these levels, for `levels`."""
        return [module()(emb) for module, _ in self._time]

    def levels(self, embeddings: list[Tensor]) -> None:
        """Rows are at other levels from now on."""
        for (_, out), new in zip(self._time, embeddings, strict=True):
            out.copy_(new)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """While this lasts, the UNet takes what is kept instead of computing it."""
        kept = [(module(), out) for module, out in (*self._prompt, *self._time, *self._unused)]
        try:
            for module, out in kept:
                module.forward = functools.partial(_known, out)
            yield
        finally:
            for module, _ in kept:
                module.__dict__.pop("forward", None)


def _known(out: Tensor, given: Tensor, *args: Any) -> Tensor:
    """What is kept for the rows that a layer is given."""
    index = rows.of(given)
    return out if index is None else out.index_select(0, index)
