"""Recorded ticks of streams whose rows go on with kept features: always what the same stream gives
without a recording (tests/compiled/test_graph.py)."""

import itertools
import os

import coherent
import pytest
import tiny
from helping import KINDS, helping
from pairs import SIGMAS, Pair, settings

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("at_once")]
LONG = "LIVEDIFFUSION_LONG" in os.environ
DEPTHS = ("outermost block", "two blocks", "finest level")


def model(layout="SD1.5", **asked):
    return helping(coherent.model(layout), reuse=asked)


def check(pair, ticks, frames=1, first=0, levels=SIGMAS, near=1e-6, **asked):
    for i in range(first, first + ticks):
        a, b = pair.run(settings(levels, seed=i // 40, **asked), tiny.latents(frames, i))
        assert tiny.rms(b, a) <= near, i


SOME = [
    (2, 4, DEPTHS[2], "self-negative"), (1, 6, DEPTHS[1], "onetime-negative"),
]  # fmt: skip
ALL = itertools.product((1, 2, 3), (2, 3, 4, 6), DEPTHS, ("off", "onetime-negative", "full"))


@pytest.mark.parametrize(("frames", "interval", "depth", "mode"), ALL if LONG else SOME)
def test_one_recording_for_each_number_of_rows_that_run_whole(frames, interval, depth, mode):
    pair = Pair(model(interval=interval, depth=depth), frames)
    pair.guide(mode=mode)
    check(pair, 3 * interval + 8, frames)
    places = 4 * frames
    counts = {places // interval, -(-places // interval)}
    assert pair.attached.reason is None
    # one mode has the sides of the newest frames only, and these come with it or not
    most = 2 * len(counts) if mode == "onetime-negative" else len(counts)
    assert len(counts) <= pair.captures <= most
    before = pair.captures
    check(pair, 2 * interval, frames, first=20)
    assert pair.captures == before, "a steady stream records no more"
    assert pair.plain.stats() == pair.graph.stats()


@pytest.mark.parametrize("layout", ["SD2.1", "SDXL"] if LONG else ["SDXL"])
def test_other_layouts(layout):
    pair = Pair(model(layout, interval=2))
    pair.guide(pooled=24 if layout == "SDXL" else None)
    check(pair, 10)
    assert pair.captures == 1 and pair.attached.reason is None


@pytest.mark.parametrize(("kind", "mode"), [
    ("queue", "off"), *(itertools.product(KINDS, ("off", "full")) if LONG else ()),
])  # fmt: skip
def test_with_what_frames_remember_of_each_other(kind, mode):
    pair = Pair(helping(coherent.model(), **KINDS[kind], reuse={"interval": 2}))
    pair.guide(mode=mode)
    warm = 40 if LONG else 20
    check(pair, warm)
    assert pair.captures and pair.attached.reason is None
    before = pair.captures
    check(pair, 4, first=warm)
    assert pair.captures == before
    rows, whole = pair.graph.coherent.neighbours.reusing.looked()
    assert whole < rows


def test_every_knob_changes_between_ticks():
    """Prompt, guidance, seed and noise levels are no constants of a recording; nor is a frame that
    is no number, or which rows are awake."""
    pair = Pair(model(interval=3, awake=0.9))
    knobs = itertools.cycle([
        {"cfg": 1.4, "delta": 1.0, "prompt": 1}, {"cfg": 2.0, "delta": 0.3, "prompt": 5},
    ])  # fmt: skip
    for i in range(36):
        if i % 7 == 0:
            pair.guide(**next(knobs))
        # alike, but for a cut now and then
        latents = 0.02 * tiny.latents(1, i) + tiny.latents(1, 100 + i // 9)
        if i == 22:
            latents[:] = float("nan")
        levels = SIGMAS if i < 17 else (11.0, 4.0, 1.5, 0.6, 0.0)
        a, b = pair.run(settings(levels, seed=i // 20), latents)
        assert tiny.rms(b, a) <= 1e-5, i
    assert pair.attached.reason is None
    # one for each number of rows that run whole, and none twice
    assert pair.captures <= 5


def test_led_through_channels_last(monkeypatch):
    from livediffusion.compiled import layout

    monkeypatch.setattr(layout, "FORCED", True)
    pair = Pair(model(interval=3, depth=DEPTHS[0]))
    pair.guide()
    check(pair, 12, near=1e-5)
    assert pair.captures and pair.attached.reason is None
    assert pair.attached.notes["ticks"]["channels_last"]


def test_rows_stay_in_their_layout():
    """Those that run the inner blocks are as their convolutions want them."""
    import torch
    from livediffusion.compiled import layout

    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    index = torch.tensor([0, 3])
    with layout._Led():
        got = x.index_select(0, index)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, x[index])


def test_a_recording_that_is_made_leaves_what_is_kept_as_it_was(monkeypatch):
    """It is tried on with noise."""
    from livediffusion.host.sampling import recordings

    pair = Pair(model(interval=2))
    pair.guide()
    seen = []
    real = recordings.RecordedTick

    def recorded(*args):
        seen.append(pair.graph.coherent.neighbours.reusing.banks[0].features.clone())
        made = real(*args)
        seen.append(pair.graph.coherent.neighbours.reusing.banks[0].features.clone())
        return made

    monkeypatch.setattr(recordings, "RecordedTick", recorded)
    before = None
    for i in range(12):
        reusing = getattr(pair.graph.coherent.neighbours, "reusing", None)
        before = None if reusing is None else reusing.banks[0].features.clone()
        check(pair, 1, first=i)
        if seen:
            break
    assert seen and all((one == before).all() for one in seen)
