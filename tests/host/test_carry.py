"""What is carried along the motion, against the equation written out frame by frame."""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.comfy

SIGMAS = (10.0, 5.0, 2.0, 0.5, 0.0)
NEAR = 1e-5


@pytest.fixture(scope="module")
def model():
    import tiny

    return tiny.model()


def film(count, size=32, step=1):
    """Latents of a camera that moves over a smooth scene, [count, 4, size, size]."""
    wide = size + step * count
    generator = torch.Generator().manual_seed(3)
    scene = torch.randn(1, 4, wide // 2 + 4, wide // 2 + 4, generator=generator)
    scene = F.interpolate(scene, size=(wide, wide), mode="bicubic")
    at = [step * i for i in range(count)]
    frames = torch.cat([scene[..., i : i + size, i : i + size] for i in at])
    return frames + 0.05 * torch.randn(frames.shape, generator=generator)


class Naive:
    """One frame at a time and plain dicts, in the place of host.sampling.stream.evaluate."""

    def __init__(self, carry, latents, model, before):
        from livediffusion.engine import flow
        from livediffusion.host.sampling.carry import seen_motion, view

        seen = model.process_latent_in(latents)
        views = [view(one[None], model.latent_format) for one in seen]
        size = latents.shape[-2:]
        self.motions = [None] + [
            flow.resized(seen_motion(new, old), *size) for old, new in itertools.pairwise(views)
        ]
        self.carry, self.before, self.flow = carry, before, flow
        self.slots = {}  # the frame whose prediction it is, and that

    def __call__(self, visit, rows):
        denoised = self.before(visit, rows).clone()
        for place, span in zip(rows.places, rows.spans, strict=True):
            for r, payload in zip(range(span.start, span.stop), place.payloads, strict=True):
                number, last = payload.number, place.k + 1 == place.course.n
                d = denoised[r : r + 1]
                if place.k < place.course.n - 2:
                    continue
                kept = self.slots.get(place.k)
                if kept is not None and kept[0] == number - 1:
                    d = self.carried(d, kept[1], self.motions[number], last)
                denoised[r : r + 1] = d
                self.slots[place.k] = number, d.clone()
        return denoised

    def carried(self, d, before, motion, last):
        moved = self.flow.warped(before, motion.flow, "bicubic")
        unlike = (moved - d).abs().mean(1, keepdim=True)
        unlike = F.avg_pool2d(unlike, 3, 1, 1, count_include_pad=False)
        speed = motion.flow.square().sum(1, keepdim=True).sqrt()
        still = ((1 - speed) / 0.75).clamp(0, 1)
        at_last = self.carry.moving * (1 - still) + self.carry.still * still
        share = motion.confidence * (at_last if last else self.carry.early)
        weight = share * torch.exp(-((unlike / (self.carry.tolerance * d.std())) ** 2))
        return d + weight * (moved - d)


def with_carry(model, **settings):
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.host.models.coherence import attach

    return attach(model, carry=Carry(**settings))


def run(patcher, latents, n, f, mode, rule="lcm", clip=False):
    import pairs
    from livediffusion.host.sampling.stream import Stream

    guider = pairs.guider(patcher, mode, cfg=1.6)
    stream = Stream(f)
    settings = pairs.settings(SIGMAS[4 - n :], rule, drain=clip)
    if clip:
        return stream.run(guider, latents, settings), stream
    parts = latents.split(f)
    return torch.cat([stream.run(guider, part, settings) for part in parts]), stream


@pytest.fixture
def taken(monkeypatch):
    """Makes streams take a road."""
    from livediffusion.host.sampling import stream as streams
    from livediffusion.host.sampling.route import Road, route

    def take(name):
        to = Road[name.upper().replace(" ", "_")]
        monkeypatch.setattr(streams, "route", lambda *args: route(*args).at_least(to, "a test"))

    return take


@pytest.mark.parametrize(
    ("n", "f", "mode", "rule", "road", "clip"),
    [
        (1, 1, "off", "lcm", "direct", False),
        (2, 1, "self-negative", "lcm", "prepared", False),
        (2, 1, "self-negative", "lcm", "direct", True),
        (3, 1, "full", "lcm", "direct", False),
        (3, 1, "onetime-negative", "euler", "direct", False),
        (3, 1, "onetime-negative", "lcm", "guider", True),
        (3, 1, "off", "dpmpp_2m", "direct", True),
        (2, 3, "off", "lcm", "direct", False),
        (2, 2, "full", "lcm", "guider", True),
        (3, 2, "self-negative", "unipc", "direct", True),
        (3, 1, "full", "lcm", "per level", False),
        (2, 2, "off", "lcm", "per level", True),
        (3, 1, "full", "lcm", "per frame", True),
        (2, 2, "off", "lcm", "per frame", True),
    ],
)
def test_equals_the_equation_frame_by_frame(
    n, f, mode, rule, road, clip, model, taken, monkeypatch
):
    import tiny
    from livediffusion.host.sampling import stream as streams

    latents = film(3 * f + n)
    patcher = with_carry(model)
    taken(road)
    ours, stream = run(patcher, latents, n, f, mode, rule, clip)
    assert stream.stats()["road"] == road
    carry = stream.coherent.carrying.carried.carry
    naive = Naive(carry, latents, model.model, streams.evaluate)
    assert any(motion.confidence.mean() > 0.3 for motion in naive.motions[1:])
    taken("guider")
    # payloads are numbered where somebody asks for neighbours
    monkeypatch.setattr(streams, "evaluate", naive)
    nothing = with_carry(model, early=0.0, moving=0.0, still=0.0)
    wanted, _ = run(nothing, latents, n, f, mode, rule, clip)
    assert tiny.rms(ours, wanted) <= NEAR
    monkeypatch.setattr(streams, "evaluate", naive.before)
    off, _ = run(model, latents, n, f, mode, rule, clip)
    assert tiny.rms(ours, off) > 100 * NEAR


class Broken(Exception):
    pass


def test_a_tick_that_breaks_off_leaves_nothing_behind(model, monkeypatch, taken):
    import pairs
    import tiny
    from livediffusion.host.sampling import stream as streams

    latents, settings = film(8), pairs.settings(SIGMAS)
    taken("guider")
    plain = streams.evaluate

    def streamed(patcher, evaluate, breaks):
        stream, outs = streams.Stream(), []
        guider = pairs.guider(patcher, "off")
        for i, frame in enumerate(latents.split(1)):
            monkeypatch.setattr(streams, "evaluate", evaluate)
            outs.append(stream.run(guider, frame, settings))
            if i == 4:
                breaks(stream, guider)
        return torch.cat(outs)

    def breaks(stream, guider):
        def fails(visit, rows):
            raise Broken

        monkeypatch.setattr(streams, "evaluate", fails)
        with pytest.raises(Broken):
            stream.run(guider, 5 * latents[:1], settings)

    ours = streamed(with_carry(model), plain, breaks)
    naive = Naive(with_carry_settings(), latents, model.model, plain)
    nothing = with_carry(model, early=0.0, moving=0.0, still=0.0)
    wanted = streamed(nothing, naive, lambda stream, guider: None)
    assert tiny.rms(ours, wanted) <= NEAR


def with_carry_settings():
    from livediffusion.engine.coherence.carry import Carry

    return Carry()


@pytest.mark.parametrize("road", ["direct", "guider"])
def test_a_broken_frame_is_not_remembered(road, model, taken):
    import pairs
    from livediffusion.host.sampling.stream import Stream

    latents, settings = film(9), pairs.settings(SIGMAS[2:])
    latents[3, :, 5, 7] = float("nan")
    taken(road)
    stream, guider = Stream(), pairs.guider(with_carry(model), "self-negative")
    outs = [stream.run(guider, frame, settings) for frame in latents.split(1)]
    assert stream.stats()["dropped"] > 0
    assert torch.cat(outs).isfinite().all()
    assert stream.coherent.carrying.carried._bank.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("road", ["direct", "guider"])
def test_what_is_carried_breaks_no_prediction(road, bad, model, taken):
    """Nothing looks at predictions behind it: where it would spoil one, that one stays as it is."""
    taken(road)
    latents = film(8)
    out, stream = run(with_carry(model, early=bad, moving=bad, still=bad), latents, 3, 1, "off")
    assert torch.equal(out, run(model, latents, 3, 1, "off")[0])
    carried = stream.coherent.carrying.carried
    assert carried._bank.isfinite().all() and stream.stats()["dropped"] == 0


def test_another_size_and_another_number_of_steps_begin_anew(model):
    import pairs
    import tiny
    from livediffusion.host.sampling.stream import Stream

    stream, fresh = Stream(), Stream()
    guider = pairs.guider(with_carry(model), "off")
    two, three = pairs.settings(SIGMAS[2:]), pairs.settings(SIGMAS[1:])
    for frame in film(4).split(1):
        stream.run(guider, frame, two)
    for frame in film(4, size=24).split(1):
        a, b = (one.run(guider, frame, two) for one in (stream, fresh))
        assert tiny.rms(a, b) <= NEAR
    assert stream.coherent.carrying.carried is not fresh.coherent.carrying.carried
    for frame in film(9, size=24)[4:].split(1):
        stream.run(guider, frame, three)
    assert stream.stats()["carried_mb"] > fresh.stats()["carried_mb"] > 0


def test_outside_of_a_mask_a_frame_stays_its_source(model):
    import pairs
    import tiny
    from livediffusion.host.sampling.stream import Stream

    latents, settings = film(5), pairs.settings(SIGMAS[2:])
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1.0
    stream, plain = Stream(), Stream()
    for frame in latents.split(1):
        ours = stream.run(pairs.guider(with_carry(model), "off"), frame, settings, mask)
        off = plain.run(pairs.guider(model, "off"), frame, settings, mask)
    assert tiny.rms(ours[..., 16:], off[..., 16:]) <= NEAR


def test_a_cut_and_another_look_are_not_held_up(model):
    import pairs
    import tiny
    from livediffusion.host.sampling.stream import Stream

    settings = pairs.settings(SIGMAS[2:])
    scenes = torch.cat([film(4), -3 * film(8)[4:].flip(-1)])[:6]

    def last(patcher):
        stream, guider = Stream(), pairs.guider(patcher, "off")
        return [stream.run(guider, frame, settings) for frame in scenes.split(1)][-1]

    # the first frames of the other scene are out
    off, ours, blind = last(model), last(with_carry(model)), last(with_carry(model, tolerance=1e3))
    assert tiny.rms(ours, off) < 0.5 * tiny.rms(blind, off)
