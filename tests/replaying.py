"""A CUDA graph without a GPU: records the operations of some work and repeats them.

As with a real graph, no Python runs at a replay, operations read and write the memory they were
recorded with, wherever the tensors have gone since, and waiting for a value is an error while
recording.

And as with graphs that share a pool, a replay writes over whatever the others have made: what was
not copied out of a recording is NaN once another one has run.

A recording keeps nothing alive that was there before it. A GPU would read on where that lay; here
a replay is an error then, unless another tensor of that size has come to lie there, which is read.
"""

import gc
import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_WAITS = ("_local_scalar_dense", "aten.item", "nonzero", "lift_fresh")


class Waited(RuntimeError):
    """What was recorded asks the host for a value, or brings one from it."""


class Freed(RuntimeError):
    """What a recording reads or writes is not there any more."""


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Before:
    """A tensor's place in memory that was there before a recording, and that stays its owner's.

    Args:
        what: the operation that uses it first.
    """

    def __init__(self, tensor, what):
        storage = tensor.untyped_storage()
        self._storage = StorageWeakRef(storage)
        self._at, self._bytes = storage.data_ptr(), storage.nbytes()
        self._told = f"{tuple(tensor.shape)} {tensor.dtype}, first used by {what}"
        self._like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._view = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self):
        """What is there now. Raises Freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            storage = self._there()
            self._storage = StorageWeakRef(storage)
        return self._like.detach().set_(storage, *self._view)

    def _there(self):
        for other in gc.get_objects():
            plain = type(other) in (torch.Tensor, torch.nn.Parameter)
            if plain and other.layout is torch.strided:  # sparse ones have no storage
                storage = other.untyped_storage()
                if (storage.data_ptr(), storage.nbytes()) == (self._at, self._bytes):
                    return storage
        raise Freed(self._told)


class _Recorder(TorchDispatchMode):
    recording = False

    def __init__(self):
        super().__init__()
        self.steps = []
        self.written = []
        self.made = []  # what lies in the pool
        self._own = set()
        self._before = {}
        self._holds = []  # while it records, so that nothing that is made comes to lie there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in _WAITS):
            raise Waited(f"{func} while recording")
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append((value, value.clone()))
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for tensor in tensors(out):
            at = tensor.untyped_storage().data_ptr()
            if at not in given and at not in self._own:
                self._own.add(at)
                self.made.append(tensor.detach())
        given, spec = tree_flatten((args, kwargs or {}))
        given = [self._kept(value, func) for value in given]
        self.steps.append((func, given, spec, [self._kept(v, func) for v in tree_leaves(out)]))
        return out

    def _kept(self, value, func):
        """Of a tensor, an alias: one whose data is set later has other memory then."""
        if not isinstance(value, torch.Tensor):
            return value
        tensor = value.detach()
        if tensor.untyped_storage().data_ptr() in self._own:
            return tensor
        self._holds.append(tensor)
        view = tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype
        key = tensor.untyped_storage()._cdata, view
        if key not in self._before:
            self._before[key] = _Before(tensor, func)
        return self._before[key]


_live: "weakref.WeakSet[Replaying]" = weakref.WeakSet()


class Replaying:
    """compiled.graph.Recording on any device. Capturing leaves everything as it was."""

    made = 0  # recordings in this process
    last = None  # whose the pool is now

    def capture(self, work):
        type(self).made += 1
        _Recorder.recording = True
        try:
            with _Recorder() as recorder:
                left = work()
        finally:
            _Recorder.recording = False
        assert left is None, "what was made in a capture does not outlive it"
        for tensor, before in reversed(recorder.written):
            tensor.copy_(before)
        self._steps, self._made = recorder.steps, recorder.made
        _live.add(self)

    def replay(self):
        if Replaying.last is None or Replaying.last() is not self:
            Replaying.last = weakref.ref(self)
            for other in _live:
                if other is not self:
                    other.overwritten()
        there = {}

        def now(value):
            if not isinstance(value, _Before):
                return value
            if value not in there:
                there[value] = value.tensor()
            return there[value]

        for func, given, spec, made in self._steps:
            args, kwargs = tree_unflatten([now(value) for value in given], spec)
            for old, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                old = now(old)
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @torch.inference_mode()
    def overwritten(self):
        """Another recording has used the pool."""
        for tensor in self._made:
            kind = torch.finfo if tensor.is_floating_point() else torch.iinfo
            if tensor.dtype is not torch.bool:
                tensor.fill_(torch.nan if kind is torch.finfo else kind(tensor.dtype).max)

    def release(self):
        self._steps = None
        self._made = ()


def inductor():
    """An engine for rehearsals: what is compiled cannot be recorded by dispatch, so while that
    lasts the UNet itself runs."""
    from livediffusion.compiled.inductor import Inductor

    class Rehearsed(Inductor):
        def prepare(self, unet, shapes):
            super().prepare(unet, shapes)
            self._unet = unet

        def __call__(self, call):
            if _Recorder.recording:
                return self._unet(call)
            return super().__call__(call)

    return Rehearsed("eager")


def watch(monkeypatch, parts, seen):
    """Have `seen` see calls of these modules; by their classes, since hooks would be noticed."""
    for kind in {type(part) for part in parts}:

        def forward(self, *args, real=kind.forward, **kwargs):
            if self in parts:
                seen(self, *args)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
