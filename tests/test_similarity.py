"""The similarity filter's bars, on frames as a camera gives them."""

import pytest
import torch
import torch.nn.functional as F
from livediffusion.engine.similarity import (
    SimilarityFilter,
    on_device,
    score,
    sketch,
    skip_probability,
)

H = W = 256


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(seed, mean=0.5, contrast=0.15, detail=12):
    """A smooth random picture, [H, W, 3]."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(1, 3, detail, detail, generator=g)
    x = F.interpolate(low, (H, W), mode="bicubic")[0].movedim(0, -1)
    return ((x - x.mean()) / x.std() * contrast + mean).clamp(0, 1)


def texture(seed, mean=0.9, contrast=0.05):
    """Grain at the scale of pixels, which has no more structure than noise."""
    g = torch.Generator().manual_seed(seed)
    return (mean + contrast * torch.randn(H, W, 3, generator=g)).clamp(0, 1)


def noisy(frame, g, amount=0.02):
    return (frame + amount * torch.randn(frame.shape, generator=g)).clamp(0, 1)


def still_clip(scene, count, noise=0.02):
    """A still scene under sensor noise; a few noise pictures in random order are enough."""
    g = torch.Generator().manual_seed(1)
    takes = [noisy(scene, g, noise) for _ in range(12)]
    return [takes[i] for i in torch.randint(12, (count,), generator=g)]


def run(frames, filter_=None, settle=3, **kwargs):
    """Which frames run."""
    filter_ = filter_ or SimilarityFilter(0)
    out = []
    for frame in frames:
        decision = filter_.decide(frame[None], **kwargs)
        filter_.commit(decision, frame[None], settle)
        out.append(not decision.skip)
    return out


@pytest.mark.parametrize("contrast", [0.15, 0.05])
@pytest.mark.parametrize("mean", [0.2, 0.5, 0.8])
def test_static_scene_with_sensor_noise_mostly_rests(mean, contrast):
    ran = run(still_clip(picture(3, mean, contrast), 220))
    assert sum(ran) / 220 <= 0.15


@pytest.mark.parametrize("noise", [0.0, 0.005, 0.03])
def test_other_amounts_of_noise_rest_too(noise):
    assert sum(run(still_clip(picture(3), 120, noise))) / 120 <= 0.15


def test_flat_wall_with_sensor_noise_mostly_rests():
    assert sum(run(still_clip(torch.full((H, W, 3), 0.5), 220))) / 220 <= 0.15


def pan(i):
    wide = torch.cat([picture(5), picture(6)], 1)
    return wide[:, 3 * i : 3 * i + W]


def ball(i):
    """A small ball crossing a still scene."""
    frame = picture(3).clone()
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    frame[((y - 128) ** 2 + (x - 20 - 4 * i) ** 2) < 12**2] = torch.tensor([0.9, 0.2, 0.1])
    return frame


@pytest.mark.parametrize("scene", [pan, ball], ids=["pan", "ball"])
def test_moving_clip_runs(scene):
    g = torch.Generator().manual_seed(1)
    # without settling, so that each frame has to be seen to change
    ran = run((noisy(scene(i), g) for i in range(50)), settle=0)
    assert sum(ran) / 50 >= 0.95


@pytest.mark.parametrize("kind", [picture, texture])
def test_unrelated_bright_pictures_are_never_alike(kind):
    for seed in range(20):
        a, b = (sketch(kind(s, 0.85, 0.05)) for s in (2 * seed, 2 * seed + 1))
        assert skip_probability(score(a, b), 0.98) < 0.01


def test_cosine_on_a_device_is_the_same_but_for_8_bits():
    frames = [picture(s, 0.6, 0.1) for s in range(3)]
    for a, b in ((0, 1), (1, 2), (2, 2)):
        here = score(*(sketch(frames[i], "cosine") for i in (a, b)))
        there = score(*(on_device(frames[i]) for i in (a, b)))
        assert there == pytest.approx(here, abs=2e-4)
    assert score(sketch(frames[0], "cosine"), on_device(frames[0])) == -1.0, "it has moved"


def test_the_papers_cosine_calls_them_alike():
    """Why `centred` is the default: on the paper's measure the same pair may be skipped."""
    a, b = (sketch(picture(s, 0.85, 0.04), "cosine") for s in (0, 1))
    assert skip_probability(score(a, b), 0.98) > 0.2


@pytest.mark.parametrize("gain", [0.5, 0.75, 1.25, 1.5])
@pytest.mark.parametrize("mixed", [0.0, 0.1, 0.2, 1.0], ids=["same", "near", "far", "other"])
def test_brightness_scaling_does_not_move_the_score(mixed, gain):
    a = picture(3, 0.35, 0.08)
    b = torch.lerp(a, picture(4, 0.35, 0.08), mixed)
    assert max(a.max(), b.max()) * gain <= 1
    unscaled = score(sketch(a), sketch(b))
    assert abs(score(sketch(a), sketch(b * gain)) - unscaled) < 0.01
    assert abs(score(sketch(a * gain), sketch(b * gain)) - unscaled) < 0.01


@pytest.mark.parametrize("settle", [0, 1, 3, 5])
def test_settles_on_the_newest_frame(settle):
    """A ring of settle + 1 slots shows the newest frame within `settle` frames of the stop."""
    frames = [pan(i) for i in range(12)] + [pan(11)] * 30
    ran = run(frames, SimilarityFilter(4), settle)
    assert all(ran[: 12 + settle])
    assert not all(ran[12 + settle :])


@pytest.mark.parametrize("seed", range(12))
def test_a_last_slight_change_is_shown_too(seed):
    """Alike enough to be skipped by chance, it still comes through once the picture rests."""
    still = picture(3)
    slight = still.clone()
    slight[100:108, 100:108] += 0.04
    assert 0.98 < score(sketch(still), sketch(slight)) < 1
    settle, frames = 3, [still] * 8 + [slight] * 20
    ran = run(frames, SimilarityFilter(seed), settle)
    first = ran.index(True, 8)
    assert first <= 9
    assert all(ran[first : first + settle + 1])


def test_a_light_switched_off_runs():
    still = picture(3)
    ran = run([still] * 8 + [still * 0.5] * 8, settle=2)
    assert ran[8:11] == [True, True, True]


def test_forced_frame_after_max_skip():
    filter_, still = SimilarityFilter(0), picture(3)
    ran = run([still] * 200, filter_, settle=0, max_skip=10)
    gaps, last = [], 0
    for i, r in enumerate(ran):
        if r:
            gaps.append(i - last)
            last = i
    assert max(gaps) == 11
    assert run([still] * 5, SimilarityFilter(0), settle=0, max_skip=0) == [True] * 5


def test_looking_is_not_committing():
    filter_ = SimilarityFilter(0)
    first = filter_.decide(picture(1)[None])
    assert not first.skip
    again = filter_.decide(picture(1)[None])
    assert not again.skip, "the first frame was never processed"


def test_a_batch_runs_for_its_worst_frame():
    still = picture(3)[None].repeat(3, 1, 1, 1)
    moved = still.clone()
    moved[1] = picture(4)
    for last, skipped in ((still, True), (moved, False)):
        filter_ = SimilarityFilter(0)
        for frames in (still, still):
            filter_.commit(filter_.decide(frames), frames, 0)
        assert filter_.decide(last).skip is skipped


def test_a_frame_that_is_not_finite_runs_and_is_forgotten():
    still = picture(3)
    ran = run([still] * 6 + [still * float("nan")] + [still] * 8)
    assert ran[6] and ran[7] and not ran[-1]


def test_measure_may_change():
    filter_, still = SimilarityFilter(0), picture(3)
    run([still] * 6, filter_)
    assert run([still] * 6, filter_, measure="cosine")[0]
    assert run([still], filter_)[0]


def test_small_and_narrow_pictures():
    for shape in ((1, 1, 3), (3, 200, 3), (65, 7, 4)):
        a, b = torch.rand(2, *shape)
        assert score(sketch(a), sketch(a)) == 1
        assert -1 <= score(sketch(a), sketch(b)) <= 1


def test_no_frame_is_an_error():
    with pytest.raises(ValueError, match="image"):
        SimilarityFilter(0).decide(torch.zeros(0, 8, 8, 3))


def test_size_and_batch_changes_run():
    filter_, still = SimilarityFilter(0), picture(3)
    run([still] * 8, filter_)
    assert not filter_.decide(still[None, :128]).skip
    assert not filter_.decide(still[None].repeat(2, 1, 1, 1)).skip


def test_seed_repeats_and_leaves_torch_alone():
    g = [torch.Generator().manual_seed(9) for _ in range(2)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = run([noisy(picture(3), g[0]) for _ in range(25)], SimilarityFilter(7))
    b = run([noisy(picture(3), g[1]) for _ in range(25)], SimilarityFilter(7))
    assert a == b
    assert torch.equal(torch.get_rng_state(), before)


def test_skip_probability_is_the_papers():
    assert skip_probability(0.97, 0.98) == 0
    assert skip_probability(0.99, 0.98) == pytest.approx(0.5)
    assert skip_probability(1.0, 0.98) == 1
    assert skip_probability(1.0, 1.0) == 0
