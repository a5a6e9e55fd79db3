"""Recordings in one pool of memory: what it asks of them, and what a capture that breaks leaves."""

import contextlib
import gc
import itertools
import weakref

import pytest
import replaying
import tiny
import torch
from compiled_models import sampled_once
from pairs import Pair, settings

pytestmark = pytest.mark.comfy


class Cuda:
    """torch.cuda as far as a capture needs it."""

    def __init__(self, monkeypatch):
        from livediffusion.compiled import graph

        self.pools, self.device, self.held, self.backend = [], 0, 0, "native"
        handles = itertools.count()
        for name, value in {
            "CUDAGraph": object, "graph": self._graph, "Stream": object,
            "graph_pool_handle": lambda: next(handles),
            "current_device": lambda: self.device,
            "memory_reserved": lambda: self.held,
            "get_allocator_backend": lambda: self.backend, "is_available": lambda: True,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        self.closed = []
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end, raising=False)
        monkeypatch.setattr(graph._Pool, "warm", lambda pool: None)
        monkeypatch.setattr(graph.CudaRecording, "_broke", "")

    def _end(self, *asked):
        self.closed.append(asked)
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    @contextlib.contextmanager
    def _graph(self, graph, pool, stream, capture_error_mode):
        self.pools.append(pool)
        yield


@pytest.fixture
def cuda(monkeypatch, comfyui):
    return Cuda(monkeypatch)


def nothing():
    pass


def test_recordings_share_memory_while_one_of_them_lives(cuda):
    """A pool that all have left cannot be captured into again."""
    from livediffusion.compiled.graph import CudaRecording, pool_size

    recordings = [CudaRecording() for _ in range(4)]

    def grows():
        cuda.held += 2**20

    def broken():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        recordings[0].capture(broken)
    for one in recordings[:2]:
        one.capture(grows)
    assert pool_size() == 2**21
    recordings[0].release()
    recordings[0].capture(nothing)
    cuda.device = 1
    recordings[3].capture(grows)
    assert pool_size() == 3 * 2**20
    cuda.device = 0
    first, shared, again, later, other = cuda.pools
    assert shared == again == later and len({first, shared, other}) == 3
    for one in recordings:
        one.release()
    assert pool_size() == 0
    recordings[2].capture(nothing)
    assert cuda.pools[-1] not in cuda.pools[:-1]


def test_a_broken_capture_leaves_its_pool_to_those_that_live_in_it(cuda):
    """torch leaves it open then; the next capture could not go there, and much was never freed."""
    from livediffusion.compiled.graph import CudaRecording

    good, later = CudaRecording(), CudaRecording()

    def broken():
        raise RuntimeError

    good.capture(nothing)
    with pytest.raises(RuntimeError):
        CudaRecording().capture(broken)
    later.capture(nothing)
    first, same, other = cuda.pools
    assert first == same != other and cuda.closed == [(0, first)]


class Made:
    """What a capture has allocated."""


@pytest.mark.parametrize("backend", ["native", "cudaMallocAsync"])
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_a_broken_capture_has_made(cuda, backend, kind):
    """It is freed while the capture lasts, or not at all where to free it would be the end."""
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.graph import CudaRecording

    cuda.backend, there, freed = backend, [], []

    def inner():
        made = Made()
        there.append(weakref.ref(made))
        raise kind("CUDA error: operation not permitted when stream is capturing\nmore of it")

    @contextlib.contextmanager
    def captured(*args, **more):
        try:
            yield
        finally:
            freed.append(there[0]() is None)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch.cuda, "graph", captured)
        with pytest.raises(kind):
            CudaRecording().capture(inner)
    lost = backend == "cudaMallocAsync" and kind is RuntimeError
    gc.collect()
    assert freed == [not lost] and (there[0]() is None) == (not lost)
    if not lost:
        CudaRecording().capture(nothing)
        return
    said = r"RuntimeError: CUDA error: operation not permitted when stream is capturing\), .*"
    with pytest.raises(Refused, match=said + "--disable-cuda-malloc"):
        CudaRecording().capture(nothing)


def test_kernels_stay_out_of_a_graph_whose_memory_they_cannot_take(monkeypatch):
    """An old Triton asks the driver about each pointer; before the first replay it knows none."""
    from livediffusion.kernels import choice

    monkeypatch.setattr(choice, "triton_missing", lambda: "")
    for backend, available, version, reason in (
        ("native", True, (3, 2), ""), ("cudaMallocAsync", False, (3, 2), ""),
        ("cudaMallocAsync", True, (3, 2), "--disable-cuda-malloc"),
        ("cudaMallocAsync", True, (3, 3), ""), ("cudaMallocAsync", True, (3, 10), ""),
    ):  # fmt: skip
        monkeypatch.setattr(choice, "_triton", lambda made=version: made)
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda name=backend: name)
        choice.graph_unfit.cache_clear()
        assert reason in choice.graph_unfit() and bool(choice.graph_unfit()) == bool(reason)
    choice.graph_unfit.cache_clear()


def test_recordings_in_turns_never_read_each_others_memory(comfyui, monkeypatch):
    """Two streams and the UNet of a sampler between them: with `replaying`, what one has left in
    the pool is NaN after another one's replay."""
    from livediffusion.host.models import engines
    from livediffusion.host.sampling import recordings

    monkeypatch.setattr(recordings, "REST", 0.0)
    monkeypatch.setattr(engines, "REST", 0.0)
    with torch.inference_mode():
        in_turns()


def in_turns():
    base = tiny.model()
    pairs = [Pair(base), Pair(base)]
    for i in range(12):
        if i in (0, 9):
            for pair, mode in zip(pairs, ("self-negative", "onetime-negative"), strict=True):
                pair.guide(mode=mode, prompt=i)
        for pair, size in zip(pairs, (8, 16), strict=True):
            a, b = pair.run(settings(), tiny.latents(1, i, size))
            assert tiny.rms(b, a) <= 1e-6, (i, size)
        once = sampled_once(pairs[0].compiled, 3), sampled_once(base, 3)
        assert tiny.rms(*once) <= 1e-6, i
    assert [pair.captures for pair in pairs] == [1, 1]
    assert [made["engine"] for made in pairs[0].attached.stats()["made"]] == ["cudagraph"]


@torch.inference_mode()
def test_the_stand_in_tells_what_was_not_copied_out():
    """Else the test above could not fail."""
    x = torch.ones(3)
    outs = []
    first, second = replaying.Replaying(), replaying.Replaying()
    first.capture(lambda: outs.append(x * 2))
    second.capture(lambda: outs.append(x + 1))
    first.replay()
    assert outs[0].tolist() == [2, 2, 2]
    second.replay()
    assert outs[0].isnan().all() and outs[1].tolist() == [2, 2, 2]


@torch.inference_mode()
def test_the_stand_in_tells_what_is_not_there_any_more():
    """A recording holds nothing of before; what has come to lie there is read instead."""
    read, into = torch.full((1000,), 2.0), torch.zeros(1000)
    at = read.data_ptr()
    one = replaying.Replaying()
    one.capture(lambda: void(into.copy_(read * 2)))
    one.replay()
    assert into.unique().tolist() == [4]
    del read
    sparse = torch.eye(2).to_sparse()  # as another test leaves one lying about
    with pytest.raises(replaying.Freed, match=r"\(1000,\) torch.float32, first used by aten.mul"):
        one.replay()
    assert sparse.is_sparse
    read = torch.full((1000,), 5.0)
    if read.data_ptr() == at:
        one.replay()
        assert into.unique().tolist() == [10]


def void(_):
    """A capture leaves nothing."""
