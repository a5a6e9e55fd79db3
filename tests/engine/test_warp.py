"""Noise that moves stays white, and stays with what moves."""

import math
import os
import weakref

import pytest
import torch
import torch.nn.functional as F
from livediffusion.engine import warp as warping
from livediffusion.engine.flow import Motion, places
from livediffusion.engine.moving import Pictures, Scenes, follow
from livediffusion.engine.noise import FrameNoise, SlotNoise
from livediffusion.engine.warp import begun, gathered, grown, moved

ALL = "LIVEDIFFUSION_WARPED" in os.environ  # every flow over as many frames (112 s)
COUNT = int(os.environ.get("LIVEDIFFUSION_WARPED", "200"))
SIDE = 32  # of a latent


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def warp(noise, flow, draw):
    """[K, h, w] after a motion as the paper has it: each pixel asks the four around where it was
    for as much as it covers of them."""
    h, w = noise.shape[-2:]
    at = flow + places(h, w, flow.device)
    low = at.floor()
    high = at - low
    index, area = [], []
    for right in (0, 1):
        for down in (0, 1):
            corner = torch.stack([low[0] + right, low[1] + down])
            part = (high[0] if right else 1 - high[0]) * (high[1] if down else 1 - high[1])
            inside = warping._inside(corner, h, w)
            index.append(warping._index(corner, h, w))
            area.append((part * inside).flatten())
    out = gathered(noise.flatten(1), torch.stack(index), torch.stack(area), draw)
    return out.view_as(noise)


def turned(zoom=1.0, angle=0.0, x=0.0, y=0.0, side=SIDE):
    """The flow of a camera, [2, side, side]."""
    at = places(side, side) - (side - 1) / 2
    c, s = math.cos(angle) * zoom, math.sin(angle) * zoom
    turn = torch.tensor([[c, -s], [s, c]])
    return (turn @ at.flatten(1)).view_as(at) - at + torch.tensor([x, y]).view(2, 1, 1)


def rough(number, size=2.0, side=SIDE):
    return size * drawn(number)(2, side, side)


def smooth(number, size=3.0, side=SIDE):
    low = drawn(number)(1, 2, 5, 5) * size
    return F.interpolate(low, (side, side), mode="bicubic")[0]


FLOWS = {
    "pan by pixels": lambda i: turned(x=2.0, y=-1.0),
    "slow pan": lambda i: turned(x=0.3, y=0.11),
    "half pixels": lambda i: turned(x=0.5, y=-0.5),
    "zoom in": lambda i: turned(zoom=0.97, x=0.4),
    "zoom out": lambda i: turned(zoom=1.04, y=0.2),
    "turn": lambda i: turned(angle=0.05),
    "smooth": smooth,
    "rough": rough,
    "a shrug": lambda i: smooth(i, 6.0) * (i % 3 == 0),
}


MOST = list(FLOWS) if ALL else ["slow pan", "zoom in", "smooth"]


class Whiteness:
    """Mean, variance, and correlations at lags 1 to 4 along both axes, over pictures [K, h, w]."""

    def __init__(self):
        self.sums = torch.zeros(10, dtype=torch.float64)
        self.counts = torch.zeros(10, dtype=torch.float64)

    def add(self, picture):
        picture = picture.double()
        parts = [picture, picture * picture]
        for lag in range(1, 5):
            parts.append(picture[..., lag:] * picture[..., :-lag])
            parts.append(picture[..., lag:, :] * picture[..., :-lag, :])
        for i, part in enumerate(parts):
            self.sums[i] += part.sum()
            self.counts[i] += part.numel()

    def check(self, bound=0.01):
        values = self.sums / self.counts
        assert abs(values[0]) < bound, values
        assert abs(values[1] - 1) < bound, values
        assert values[2:].abs().max() < bound, values


def sure(confidence=None, side=SIDE):
    return torch.ones(1, 1, side, side) if confidence is None else confidence


@pytest.mark.parametrize("flow", MOST)
@pytest.mark.parametrize("hidden", [0.0, 0.1] if ALL else [0.1])
def test_carried_noise_is_white(flow, hidden):
    field, white = begun(SlotNoise(3, (24, SIDE, SIDE)), 1 + ALL), Whiteness()
    for i in range(COUNT):
        known = (drawn(i)(1, 1, SIDE, SIDE) > (-9.0 if hidden == 0 else -1.28)).float()
        field = moved(field, Motion(FLOWS[flow](i)[None], known))
        white.add(field.pixels.flatten(0, 1))
        assert field.off.abs().max() <= 0.5
    white.check()


@pytest.mark.parametrize("u", [1, 2, 4])
@pytest.mark.parametrize("flow", ["slow pan", "zoom in", "smooth"] if ALL else ["zoom in"])
def test_white_at_every_fineness(u, flow, monkeypatch):
    monkeypatch.setattr(warping, "FINEST", u)
    field, white, cells = begun(SlotNoise(5, (8, SIDE, SIDE)), 2), Whiteness(), Whiteness()
    assert field.cells.shape == (16, u * SIDE, u * SIDE)
    for i in range(COUNT if ALL else 40):
        field = moved(field, Motion(FLOWS[flow](i)[None], sure()))
        white.add(field.pixels.flatten(0, 1))
        cells.add(field.cells)
    white.check(0.01 if ALL else 0.03)
    cells.check(0.01 if ALL else 0.02)


@pytest.mark.parametrize("flow", MOST)
def test_noise_read_between_pixels_is_white(flow):
    noise, draw, white = drawn(1)(24, SIDE, SIDE), drawn(2), Whiteness()
    for i in range(COUNT if ALL else 40):
        noise = warp(noise, FLOWS[flow](i), draw)
        white.add(noise)
    white.check()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_of_one_value(count):
    """Everybody who asks gets a Brownian bridge's increment: each white, none like another, and
    weighted by their shares they make up the value again."""
    noise, draw = drawn(0)(20_000, 1), drawn(1)
    area = torch.rand(1, count, generator=torch.Generator().manual_seed(count)) + 0.1
    out = gathered(noise, torch.zeros(1, count, dtype=torch.int64), area, draw)
    share = (area / area.sum())[0]
    torch.testing.assert_close((out * share.sqrt()).sum(1), noise[:, 0], atol=1e-5, rtol=0)
    covariance = out.T @ out / len(out)
    torch.testing.assert_close(covariance, torch.eye(count), atol=0.04, rtol=0)
    with_value = (out * noise).mean(0)
    torch.testing.assert_close(with_value, share.sqrt(), atol=0.04, rtol=0)


def test_identity_is_exact():
    for shape in ((4, 16, 16), (16, 32, 32), (48, 64, 64)):
        slots = SlotNoise(7, shape)
        first = field = begun(slots, 3)
        for k in range(3):
            assert torch.equal(field.pixels[k], slots.slot(k))
        still = torch.zeros(1, 2, *shape[1:])
        for known in (1.0, 0.6):
            field = moved(field, Motion(still, torch.full((1, 1, *shape[1:]), known)))
            assert torch.equal(field.pixels, first.pixels)
            assert torch.equal(field.cells, first.cells)
        assert torch.equal(warp(first.pixels[0], still[0], drawn()), first.pixels[0])


def test_what_stands_still_beside_what_moves_is_exact():
    flow = torch.zeros(1, 2, SIDE, SIDE)
    flow[..., :, 16:] = torch.tensor([0.7, 1.3]).view(1, 2, 1, 1)
    field = begun(SlotNoise(7, (8, SIDE, SIDE)), 2)
    first = field.pixels
    for i in range(30):
        field = moved(field, Motion(flow, sure()))
        assert torch.equal(field.pixels[..., :14], first[..., :14]), i
    assert not torch.equal(field.pixels[..., 18:], first[..., 18:])


@pytest.mark.parametrize("u", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_pan_takes_the_noise_along(u, steps, monkeypatch):
    """Four pixels in any number of steps: who has been in sight all the time keeps its noise."""
    monkeypatch.setattr(warping, "FINEST", u)
    first = field = begun(SlotNoise(1, (8, SIDE, SIDE)), 2)
    flow = turned(x=4 / steps)[None]
    for _ in range(steps):
        field = moved(field, Motion(flow, sure()))
    now, then = field.pixels[..., :-4], first.pixels[..., 4:]
    if steps == 7:
        # a rounded sum ends a hair from the whole cell
        assert (now * then).mean() > 0.9
    else:
        torch.testing.assert_close(now, then, atol=1e-5, rtol=0)
    entered = field.pixels[..., -4:]
    assert (entered * first.pixels[..., -4:]).mean().abs() < 0.05


def test_slow_noise_is_not_worn_down():
    """A tenth of a pixel at a time for forty frames; gathered between pixels it is a third."""
    field = begun(SlotNoise(1, (8, SIDE, SIDE)), 2)
    first, worn, draw = field.pixels, field.pixels.flatten(0, 1), drawn()
    for _ in range(40):
        field = moved(field, Motion(turned(x=0.1)[None], sure()))
        worn = warp(worn, turned(x=0.1), draw)
    then = first[..., 4:]
    assert (field.pixels[..., :-4] * then).mean() > 0.85
    assert (worn[..., :-4] * then.flatten(0, 1)).mean() < 0.45


def test_what_is_uncovered_is_fresh():
    field = begun(SlotNoise(1, (8, SIDE, SIDE)), 2)
    known = sure().clone()
    known[..., 8:24, 8:24] = 0
    now = moved(field, Motion(turned(x=1.0)[None], known))
    inside = now.pixels[..., 9:23, 9:23]
    for there in (field.pixels[..., 9:23, 10:24], field.pixels[..., 9:23, 9:23]):
        assert (inside * there).mean().abs() < 0.05
    assert abs(float(inside.var()) - 1) < 0.1
    torch.testing.assert_close(now.pixels[..., :7, :30], field.pixels[..., :7, 1:31])


def test_a_frame_is_the_same_whatever_was_drawn_before():
    field, motion = begun(SlotNoise(1, (4, SIDE, SIDE)), 2), Motion(rough(0)[None], sure())
    one = moved(field, motion)
    torch.randn(100)
    other = moved(field, motion)
    assert torch.equal(one.pixels, other.pixels)
    again = moved(one, motion)
    assert not torch.equal(again.pixels, one.pixels)
    assert (again.pixels * one.pixels).mean().abs() < 0.4


def test_more_slots_and_fewer():
    slots = SlotNoise(1, (4, SIDE, SIDE))
    field = moved(begun(slots, 2), Motion(turned(x=1.0)[None], sure()))
    more = grown(field, slots, 4)
    assert torch.equal(more.pixels[:2], field.pixels)
    assert torch.equal(more.pixels[3], slots.slot(3))
    assert more.cells.shape[0] == 16
    fewer = grown(more, slots, 1)
    assert torch.equal(fewer.pixels, field.pixels[:1])
    both = moved(more, Motion(turned(x=1.0)[None], sure()))
    assert both.pixels.shape == (4, 4, SIDE, SIDE)


def test_noise_of_frames_that_enter_together():
    slots = SlotNoise(1, (4, 8, 8))
    one, two = begun(slots, 2).pixels, torch.zeros(2, 4, 8, 8)
    noise = FrameNoise([one, two], slots)
    assert not noise.fixed and slots.fixed
    for k in range(2):
        assert torch.equal(noise.slot(k), torch.stack([one[k], two[k]]))
    assert torch.equal(noise.slot(3), torch.stack([slots.slot(3)] * 2))


def test_whole_values_asked_for_by_one_are_exact():
    """As a GPU has it, where all values are gathered alike."""
    noise = drawn(0)(6, 100)
    index = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:90]
    out = gathered(noise, index[None], torch.ones(1, 90), drawn(1))
    assert torch.equal(out, noise[:, index])


def test_a_device_is_not_waited_for(monkeypatch):
    """Tensors without values: whoever asks for one fails."""
    monkeypatch.setattr(
        warping, "_draws", lambda *_: lambda *shape: torch.empty(shape, device="meta")
    )
    for shape in ((4, 8, 8), (48, 16, 16)):
        noise = SlotNoise(0, shape, "meta")
        frames = torch.empty(3, 64, 64, 3, device="meta")
        first = list(follow(None, Pictures(frames), noise, 2))
        later = list(follow(first[-1], Pictures(frames), noise, 3))
        flow = torch.empty(3, 32, 32, 2, device="meta")
        given = list(follow(later[-1], Pictures(frames, flow), noise, 1))
        for scenes, slots in ((first, 2), (later, 3), (given, 1)):
            assert [scene.field.pixels.shape for scene in scenes] == [(slots, *shape)] * 3
        assert given[-1].field.number == 8


def test_noise_of_patches_moves_by_their_pixels():
    """A latent's pixel that is 4 x 4 of a picture's: the picture's noise is what moves."""
    slots, white = SlotNoise(1, (48, 16, 16)), Whiteness()
    first = field = begun(slots, 2, 4)
    assert field.cells.shape == (6, 64, 64) and torch.equal(field.pixels[1], slots.slot(1))
    still = moved(field, Motion(torch.zeros(1, 2, 16, 16), sure(side=16) * 0.6))
    assert torch.equal(still.pixels, first.pixels)
    for _ in range(3):
        field = moved(field, Motion(turned(x=0.25, y=0.5, side=16)[None], sure(side=16)))
    picture, before = (F.pixel_shuffle(each.pixels, 4) for each in (field, first))
    assert torch.equal(picture[..., :58, :61], before[..., 6:, 3:])
    more = grown(field, slots, 3)
    assert torch.equal(more.pixels[2], slots.slot(2)) and len(more.cells) == 9
    for _ in range(60):
        field = moved(field, Motion(turned(0.97, 0.03, side=16)[None], sure(side=16)))
        white.add(F.pixel_shuffle(field.pixels, 4).flatten(0, 1))
    white.check(0.03)


@pytest.mark.parametrize(
    ("shape", "size", "patch"),
    [
        ((48, 16, 16), (64, 64), True), ((48, 16, 8), (64, 32), True),
        ((12, 16, 16), (32, 32), True),
        ((48, 16, 16), (256, 256), False), ((48, 16, 16), (66, 64), False),
        ((4, 8, 8), (64, 64), False), ((3, 64, 64), (64, 64), False),
    ],
)  # fmt: skip
def test_which_latents_are_patches(shape, size, patch):
    scenes = list(follow(None, Pictures(torch.rand(2, *size, 3)), SlotNoise(0, shape), 1))
    assert [scene.field.patch for scene in scenes] == [patch] * 2
    assert scenes[1].field.pixels.shape == (1, *shape)


def test_of_a_long_clip_the_newest_scenes_alone_are_held():
    """As frames enter, each the same as if all had been made at once, and what was is let go."""
    noise, frames = SlotNoise(3, (4, 8, 8)), torch.rand(37, 16, 16, 3)
    frames[20, 3, 4] = float("nan")
    whole = list(follow(None, Pictures(frames), noise, 2))
    made = []

    def make():
        for scene in follow(None, Pictures(frames), noise, 2):
            made.append(weakref.ref(scene))
            yield scene

    scenes = Scenes(make, 37)
    for first in [*range(0, 37, 2), 37, 5, 36]:  # one run, its end, and two of another
        got = scenes.at(slice(first, first + 2))
        assert len(got) == len(whole[first : first + 2])
        for one, wanted in zip(got, whole[first : first + 2], strict=True):
            assert torch.equal(one.field.pixels, wanted.field.pixels)
            assert torch.equal(one.field.cells, wanted.field.cells)
        assert sum(ref() is not None for ref in made) <= 3
    entry = torch.cat([scene.field.pixels[:1] for scene in whole])
    assert torch.equal(scenes.entry(), entry)
