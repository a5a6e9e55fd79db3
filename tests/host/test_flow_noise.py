"""Noise that moves with the scene, in a stream: every frame as if it were sampled alone with its
own noise at every slot, by ComfyUI's SamplerCustomAdvanced."""

import functools
import itertools

import pytest
import torch
from photographs import noisy, scene, seen

pytestmark = pytest.mark.comfy

SEED = 7
COUNT = 6
# n, rule, mode; the engine's own tests have all of them
STEPS = [
    (1, "lcm", "off"), (2, "lcm", "full"), (4, "lcm", "off"), (2, "euler", "full"),
    pytest.param(4, "dpmpp_2m", "off", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    _model.cache_clear()


@functools.cache
def _model():
    import tiny

    return tiny.model()


def latents(count=COUNT, size=8):
    import tiny

    return tiny.latents(count, size=size)


def pictures(count=COUNT, side=64, first=0):
    """A camera that pans and turns over a photograph, with a sensor's noise."""
    return torch.stack([
        noisy(seen(scene(0), x=5.0 * i, y=-2.0 * i, angle=0.03 * i, side=side), 0.01, i)
        for i in range(first, first + count)
    ])  # fmt: skip


def fields(frames, seed=SEED, shape=(4, 8, 8), slots=4):
    """[S, C, h, w] of each frame, in a loop that only knows the frame before."""
    from livediffusion.engine.flow import match, view
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.engine.warp import begun, moved

    out = [begun(SlotNoise(seed, shape), slots)]
    for old, new in itertools.pairwise(frames):
        out.append(moved(out[-1], match(view(new[None]), view(old[None]))))
    return [field.pixels for field in out]


def guider(mode="off", alone=False):
    import comfy.samplers
    import tiny
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    if mode == "off":
        made = Guider_Basic(_model())
        made.set_conds(tiny.conditioning(1))
    else:
        made = comfy.samplers.CFGGuider(_model())
        made.set_conds(tiny.conditioning(1), tiny.conditioning(2))
        made.set_cfg(2.5)
    if alone:
        made.predict_noise = functools.partial(type(made).predict_noise, made)
    return made


def sigmas(n):
    sampling = _model().get_model_object("model_sampling")
    steps = torch.linspace(900, 100, n) if n > 1 else torch.tensor([600.0])
    return torch.tensor([*(float(sampling.sigma(t)) for t in steps), 0.0])


class Given:
    seed = SEED

    def __init__(self, noise):
        self.noise = noise

    def generate_noise(self, latent):
        return self.noise[None].clone()


def expected(field, latent, n, rule, mode="off", mask=None):
    """One frame through ComfyUI's own sampler, with its own noise at every slot."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    step = iter(range(1, 100))

    def slot(sigma, sigma_next):
        return field[next(step)][None]

    sampler = comfy.samplers.ksampler(rule, {"noise_sampler": slot} if rule == "lcm" else {})
    given = {"samples": latent} | ({} if mask is None else {"noise_mask": mask})
    out = SamplerCustomAdvanced.execute(Given(field[0]), guider(mode), sampler, sigmas(n), given)
    return out.args[0]["samples"]


def brought(frames, flow=None):
    from livediffusion.engine.moving import Pictures
    from livediffusion.host.sampling.noises import Brought

    return Brought(Pictures(frames, flow))


def close(got, want, most=1e-5):
    import tiny

    assert tiny.rms(got, want) <= most


@pytest.mark.parametrize("road", ["fast", "alone"])
@pytest.mark.parametrize(("n", "rule", "mode"), STEPS)
def test_a_clip_equals_frame_by_frame(n, rule, mode, road):
    from livediffusion.host.sampling.stream import Settings, Stream

    frames, clean = pictures(), latents()
    own = fields(frames, slots=n if rule == "lcm" else 1)
    want = [expected(own[i], clean[i : i + 1], n, rule, mode) for i in range(COUNT)]
    settings = Settings(tuple(sigmas(n).tolist()), rule, SEED, drain=True)
    for per_slot in (1, 2):
        stream = Stream(per_slot)
        made = guider(mode, road == "alone")
        got = stream.run(made, clean, settings, brought=brought(frames))
        close(got, torch.cat(want))
        assert (str(stream.route.road) == "per frame") == (road == "alone"), stream.route
    assert (own[-1][0] - own[0][0]).abs().mean() > 0.3  # it did move


@pytest.mark.parametrize("road", ["fast", "alone"])
def test_a_live_stream_with_skips_failures_and_changes(road, monkeypatch):
    """What did not enter leaves no trace: the next frame moves on from the last that did."""
    import comfy.model_management
    from livediffusion.host.sampling.stream import Settings, Stream

    n, alone, stream = 3, road == "alone", Stream()
    frames, clean, want, out = pictures(12), latents(12), [], []
    settings = Settings(tuple(sigmas(n).tolist()), "lcm", SEED)
    made, taken = guider(alone=alone), []
    for i in range(12):
        if i in (3, 4):
            continue  # a similarity filter
        if i == 6:

            def interrupted():
                raise comfy.model_management.InterruptProcessingException

            with monkeypatch.context() as patch:
                patch.setattr(
                    comfy.model_management, "throw_exception_if_processing_interrupted",
                    interrupted,
                )  # fmt: skip
                with pytest.raises(comfy.model_management.InterruptProcessingException):
                    stream.run(
                        made, clean[i : i + 1], settings, brought=brought(frames[i : i + 1])
                    )
            continue
        taken.append(i)
        out.append(stream.run(made, clean[i : i + 1], settings, brought=brought(frames[i : i + 1])))
    own = fields(frames[taken], slots=n)
    want = [expected(f, clean[i : i + 1], n, "lcm") for f, i in zip(own, taken, strict=True)]
    if not alone:
        out, want = out[n - 1 :], want[: -(n - 1)]
    for a, b in zip(out, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("change", ["seed", "size", "unwired", "picture size"])
def test_what_begins_anew(change):
    from livediffusion.host.sampling.stream import Settings, Stream

    levels = tuple(sigmas(1).tolist())
    stream, frames = Stream(), pictures(5)

    def run(i, seed=SEED, size=8, side=64):
        shown = pictures(1, side, i) if side != 64 else frames[i : i + 1]
        return stream.run(
            guider(), latents(1, size), Settings(levels, "lcm", seed), brought=brought(shown)
        )

    first = run(0)
    assert not torch.equal(run(1), first)
    changed = {"seed": {"seed": 9}, "size": {"size": 16}, "picture size": {"side": 96}}
    if change == "unwired":
        plain = stream.run(guider(), latents(1), Settings(levels, "lcm", SEED))
        assert torch.equal(plain, first)
        assert torch.equal(run(2), first)
        return
    asked = changed[change]
    got = run(2, **asked)
    plain = Stream().run(
        guider(), latents(1, asked.get("size", 8)), Settings(levels, "lcm", asked.get("seed", SEED))
    )
    assert torch.equal(got, plain)


@pytest.mark.parametrize("n", [1, 3])
def test_more_steps_while_it_runs(n):
    """Slots that were not there have the noise of that slot."""
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.host.sampling.stream import Settings, Stream

    stream, frames, other = Stream(), pictures(2), 4 - n
    clean = latents(2)
    for i, steps in enumerate((n, other)):
        settings = Settings(tuple(sigmas(steps).tolist()), "lcm", SEED)
        stream.run(guider(), clean[i : i + 1], settings, brought=brought(frames[i : i + 1]))
    now = stream._noises._scene.field.pixels
    assert now.shape[0] == other
    assert not torch.equal(now[0], SlotNoise(SEED, (4, 8, 8)).slot(0))


@pytest.mark.parametrize("per_slot", [1, 2])
def test_a_still_scene_is_as_if_unwired(per_slot):
    from livediffusion.host.sampling.stream import Settings, Stream

    settings = Settings(tuple(sigmas(3).tolist()), "lcm", SEED, drain=True)
    clean, frames = latents(4), pictures(1).expand(4, -1, -1, -1)
    plain = Stream(per_slot).run(guider(), clean, settings)
    moving = Stream(per_slot).run(guider(), clean, settings, brought=brought(frames))
    assert torch.equal(plain, moving)


@pytest.mark.parametrize("road", ["fast", "alone"])
def test_with_a_mask(road):
    """What is kept gets the noise of the frame's own slot 0."""
    from livediffusion.host.sampling.stream import Settings, Stream

    frames, clean, n = pictures(4), latents(4), 3
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    own = fields(frames, slots=1)
    want = [expected(own[i], clean[i : i + 1], n, "euler", mask=mask) for i in range(4)]
    settings = Settings(tuple(sigmas(n).tolist()), "euler", SEED, drain=True)
    for per_slot in (1, 2):
        made = guider(alone=road == "alone")
        got = Stream(per_slot).run(made, clean, settings, mask, brought=brought(frames))
        close(got, torch.cat(want))


def test_without_noise_nothing_moves():
    from livediffusion.host.sampling.stream import Settings, Stream

    settings = Settings(tuple(sigmas(2).tolist()), "euler", SEED, drain=True, add_noise=False)
    for alone in (False, True):
        made, clean = guider(alone=alone), latents(3)
        plain = Stream().run(made, clean, settings)
        assert torch.equal(Stream().run(made, clean, settings, brought=brought(pictures(3))), plain)


def test_a_bad_picture_is_taken_for_the_one_before():
    from livediffusion.host.sampling.stream import Settings, Stream

    frames = pictures(4)
    bad = frames.clone()
    bad[2, 10:20] = float("nan")
    settings = Settings(tuple(sigmas(2).tolist()), "lcm", SEED, drain=True)
    got = Stream().run(guider(), latents(4), settings, brought=brought(bad))
    frames[2] = frames[1]
    want = Stream().run(guider(), latents(4), settings, brought=brought(frames))
    close(got[:3], want[:3])
    assert got.isfinite().all()


def test_a_flow_that_is_wired_is_followed():
    from livediffusion.engine.flow import Motion
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.engine.warp import begun, moved
    from livediffusion.host.sampling.stream import Settings, Stream

    flow = torch.zeros(3, 64, 64, 3)
    flow[..., 0], flow[..., 1] = 16.0, 8.0
    flow[2, :8] = float("nan")
    settings = Settings(tuple(sigmas(1).tolist()), "lcm", SEED, drain=True)
    clean = latents(3)
    got = Stream().run(guider(), clean, settings, brought=brought(pictures(3), flow))
    field = begun(SlotNoise(SEED, (4, 8, 8)), 1)
    for i in range(3):
        if i:
            known = torch.ones(1, 1, 64, 64)
            known[0, 0, : 8 * (i == 2)] = 0
            moving = flow[i, ..., :2].nan_to_num(0.0).movedim(-1, 0)[None]
            before, field = field, moved(field, Motion(moving, known))
        close(got[i : i + 1], expected(field.pixels, clean[i : i + 1], 1, "lcm"))
        if i == 1:
            # by 2 and 1 pixels of the latent
            torch.testing.assert_close(field.pixels[..., :7, :6], before.pixels[..., 1:, 2:])
