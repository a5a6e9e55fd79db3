"""Recorded ticks of streams whose frames help each other: always what the same stream gives without
a recording, and read and written at fixed addresses (tests/compiled/test_graph.py)."""

import itertools
import os

import compiled_models
import pytest
import tiny
import torch
from pairs import SIGMAS, Pair, guider, settings

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("at_once")]

MEMORIES = {
    "merged": {"bank": "merged", "interval": 2},
    "queue": {"bank": "queue", "frames": 2, "interval": 3},
    "every frame": {"bank": "queue", "frames": 1, "interval": 1},
}


def coherent_model(future=None, memory=None, **more):
    import coherent
    from livediffusion.engine.coherence.neighbours import Future, Memory
    from livediffusion.host.models.coherence import attach

    model = coherent.model(**more)
    if future:
        model = attach(model, future=Future(future))
    if memory:
        model = attach(model, memory=Memory(fuse=0.4, threshold=0.5, levels="all", **memory))
    return model


def check(pair, ticks, frames=1, first=0, near=1e-6, **asked):
    for i in range(first, first + ticks):
        a, b = pair.run(settings(seed=i // 20, **asked), tiny.latents(frames, i))
        assert tiny.rms(b, a) <= near, i


@pytest.mark.parametrize(("mode", "frames"), [("onetime-negative", 2), ("full", 1)])
def test_future_attention_is_recorded(frames, mode):
    pair = Pair(coherent_model("all"), frames)
    pair.guide(mode=mode)
    check(pair, 9, frames)
    assert pair.captures == 1
    assert pair.attached.reason is None


ALL = itertools.product(MEMORIES, ["off", "onetime-negative", "full"], [None, "all"])
SOME = [
    ("merged", "onetime-negative", None), ("queue", "off", "all"), ("every frame", "full", "all"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "mode", "future"), ALL if "LIVEDIFFUSION_LONG" in os.environ else SOME
)
def test_memory_is_recorded_once_it_is_full(memory, mode, future):
    pair = Pair(coherent_model(future, MEMORIES[memory]))
    pair.guide(mode=mode)
    check(pair, 16)
    assert pair.captures == 1
    assert pair.attached.reason is None
    assert pair.plain.stats() == pair.graph.stats()


@pytest.mark.parametrize("memory", ["merged", "queue"])
def test_every_knob_changes_between_ticks(memory):
    """What is no constant of a recording: prompt, guidance, seed, noise, fuse, threshold; a bad
    frame, too."""
    import coherent
    from livediffusion.engine.coherence.neighbours import Memory
    from livediffusion.host.models.coherence import attach

    base = coherent.model()
    pair = Pair(base)
    knobs = itertools.cycle([
        {"cfg": 1.4, "delta": 1.0, "prompt": 1}, {"cfg": 2.0, "delta": 0.3, "prompt": 5},
    ])  # fmt: skip
    engine = pair.compiled
    for i in range(28):
        if i % 5 == 0:
            fuse, threshold = (0.4, 0.5) if i % 2 else (0.2, 0.8)
            settled = Memory(fuse=fuse, threshold=threshold, levels="all", **MEMORIES[memory])
            pair.patcher = attach(base, memory=settled)
            pair.compiled = attach(engine, memory=settled)
            pair.guide(**next(knobs))
        latents = tiny.latents(1, i)
        if i == 22:
            latents[:] = float("nan")
        levels = SIGMAS if i < 17 else (11.0, 4.0, 1.5, 0.6, 0.0)
        a, b = pair.run(settings(levels, seed=i // 20), latents)
        assert tiny.rms(b, a) <= 1e-6, i
    assert pair.captures == 1
    assert pair.attached.reason is None


@pytest.mark.parametrize("memory", ["merged", "queue"])
def test_fusion_is_turned_off_and_on_in_recorded_ticks(memory):
    """Where nothing is fused no outputs are kept: what is fused then is of frames since."""
    import coherent
    from livediffusion.engine.coherence.neighbours import Memory

    base = coherent.model()
    pair = Pair(base)
    engine, sizes = pair.compiled, []
    for turn, fuse in enumerate((0.0, 0.4, 0.0, 0.2)):
        settled = Memory(fuse=fuse, threshold=0.5, levels="all", **MEMORIES[memory])
        swapped(pair, base, engine, memory=settled)
        check(pair, 14, first=14 * turn)
        sizes.append(pair.graph.coherent.neighbours.bank.size)
    assert sizes[0] == sizes[2] < sizes[1] == sizes[3]
    assert pair.captures == 4 and pair.attached.reason is None
    assert pair.plain.stats() == pair.graph.stats()


def test_what_a_bank_does_not_outlive_is_recorded_anew():
    pair = Pair(coherent_model(None, MEMORIES["merged"]))
    pair.guide()
    first = 0
    for size, levels in ((8, SIGMAS[1:]), (16, SIGMAS[1:]), (8, SIGMAS[2:])):
        for i in range(first, first + 10):
            a, b = pair.run(settings(levels), tiny.latents(1, i, size))
            assert tiny.rms(b, a) <= 1e-6, (size, levels, i)
        first += 10
    assert pair.captures == 3


def test_a_steady_stream_makes_no_buffers():
    from livediffusion.host.models.coherence import Coherence

    pair = Pair(coherent_model("all", MEMORIES["merged"]))
    pair.guide()
    check(pair, 14)
    neighbours = pair.graph.coherent.neighbours

    def where():
        layers = neighbours.bank.of([0]).layers.values()
        staged = [t for one in neighbours._staged.values() for s in one.values()
                  for t in (s.k, s.v, s.o) if t is not None]  # fmt: skip
        return [t.data_ptr() for t in [*[t for layer in layers for t in layer.all()],
                                       *staged, *neighbours._index.values(), *neighbours.dial]]

    before, calls = where(), []
    real = Coherence.diffusion_model
    try:
        Coherence.diffusion_model = lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
        for i in range(14, 20):
            pair.graph.run(pair.guiders[1], tiny.latents(1, i), settings())
    finally:
        Coherence.diffusion_model = real
    assert where() == before
    assert not calls, "no Python of the network in a recorded tick"


@pytest.mark.parametrize("last", ["engine", "memory"])
def test_other_engines_leave_these_calls_to_the_unet_and_say_so(last):
    """In whatever order the nodes are."""
    import coherent
    from livediffusion.compiled.engine import Eager
    from livediffusion.engine.coherence.neighbours import Memory
    from livediffusion.host.models.coherence import attach as remember
    from livediffusion.host.models.engines import Attached, attach
    from livediffusion.host.sampling.stream import Stream

    class Other(Eager):
        name, remembers = "another", False

    memory = Memory(fuse=0.4, threshold=0.5, levels="all", **MEMORIES["queue"])
    base = coherent.model()
    attached = Attached("another", "test", Other)
    if last == "engine":
        model = attach(remember(base, memory=memory), attached)
    else:
        model = remember(attach(base, attached), memory=memory)
    streams = Stream(), Stream()
    guiders = guider(model), guider(remember(base, memory=memory))
    for i in range(10):
        a, b = (
            stream.run(one, tiny.latents(1, i), settings())
            for stream, one in zip(streams, guiders, strict=True)
        )
        assert tiny.rms(a, b) <= 1e-6
    assert "Live Memory" in attached.reason and "cudagraph" in attached.reason
    assert attached.ran == 0
    # without a stream the engine does what it did
    compiled_models.sampled_once(model)
    assert attached.ran == 1


@pytest.mark.parametrize(("frames", "mode"), [(1, "full"), (2, "self-negative")])
def test_what_is_carried_is_recorded(frames, mode):
    import coherent
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.host.models.coherence import attach

    pair = Pair(attach(coherent.model(), carry=Carry()), frames)
    pair.guide(mode=mode)
    still = tiny.latents(frames, 3)
    for i in range(14):
        noisy = still + 0.05 * tiny.latents(frames, i)
        a, b = pair.run(settings(), noisy)
        assert tiny.rms(b, a) <= 1e-6, i
    assert pair.captures == 1
    assert pair.attached.reason is None


def swapped(pair, base, engine, **asked):
    """Both streams go on with what is asked for, or as they are."""
    from livediffusion.host.models.coherence import attach

    pair.patcher = attach(base, **asked) if asked else base
    pair.compiled = attach(engine, **asked) if asked else engine
    pair.guide()


@pytest.fixture
def apart(monkeypatch):
    """What tells who sees whom never comes to lie where something of before did: each has memory
    of a size of its own."""
    from livediffusion.engine.coherence import attention

    sizes = itertools.count(100)

    def uploaded(values, device):
        room = torch.empty(next(sizes), dtype=values.dtype, device=device)
        return room[: values.numel()].view(values.shape).copy_(values)

    monkeypatch.setattr(attention, "uploaded", uploaded)


@pytest.mark.parametrize("memory", [None, "merged"])
def test_what_is_turned_off_and_on_again(memory, apart):
    """The recording of before is taken, or another one is made: what it reads has to be there."""
    import coherent
    from livediffusion.engine.coherence.neighbours import Future, Memory

    base = coherent.model()
    pair = Pair(base)
    engine, asked = pair.compiled, {"future": Future("all")}
    if memory:
        asked["memory"] = Memory(fuse=0.4, threshold=0.5, levels="all", **MEMORIES[memory])
    for turn in range(2):
        swapped(pair, base, engine, **asked)
        check(pair, 14 if memory else 8, first=20 * turn)
        swapped(pair, base, engine)
        check(pair, 4, first=20 * turn + 15)
    assert pair.attached.reason is None
    # who sees whom depends on the layout alone: one recording serves for good
    assert memory or pair.captures == 2


def test_more_layouts_of_rows_than_are_kept(apart):
    from livediffusion.engine.coherence import neighbours

    pair = Pair(coherent_model("all"))
    pair.guide()
    check(pair, 8)
    known, row = pair.graph.coherent.neighbours, neighbours.Row(0, 0, 4, 0, 0, 1.0)
    for i in range(neighbours._LAYOUTS):
        known._groups([neighbours.Row(0, k, 4, k, k, 1.0) for k in range(i)] + [row] * 2)
    check(pair, 3, first=8)
    assert pair.captures == 1 and pair.attached.reason is None


def test_rows_that_run_whole_see_those_that_are_of_their_index():
    """As many rows of other frames of a slot see each other in another way."""
    import coherent
    from helping import helping

    pair = Pair(helping(coherent.model(), future={}, reuse={"interval": 6, "awake": 0.9}), 2)
    pair.guide()
    for i in range(24):
        latents = 0.02 * tiny.latents(2, i)
        for j in range(2):  # each is cut by itself
            latents[j] += tiny.latents(1, 100 + 60 * j + (i + 2 * j) // (5 + 2 * j))[0]
        a, b = pair.run(settings(), latents)
        assert tiny.rms(b, a) <= 1e-5, i
    assert pair.captures > 1 and pair.attached.reason is None
