"""A frame that is sampled alone is sampled as it arrives where ComfyUI runs a sampler.

Nodes wrap a whole sampling: they change its noise, sample it twice or in parts, count its steps by
the callback, and look up what belongs to a picture by its place in the batch.
"""

import functools

import pytest
import torch

pytestmark = pytest.mark.comfy

FAMILY = "SD1.5"


@pytest.fixture(scope="module", autouse=True)
def forget():
    import families

    yield
    families.forget()


def patched(patch):
    """A case whose MODEL `patch` has changed."""
    import families
    import framewise

    def make(rows):
        model = families.model(FAMILY).clone()
        patch(model)
        positive, negative = (families.conditioning(FAMILY, seed) for seed in (1, 2))
        return framewise.cfg(model, positive, negative)

    sources = families.latents(FAMILY, framewise.FRAMES)
    return framewise.Case(make, sources, lambda n: families.levels(FAMILY, n))


def around(wrapper):
    """A patch that wraps a sampling: wrapper(go, noise, latents, sampler, sigmas, *more)."""
    import comfy.patcher_extension

    def outer(executor, *args, **named):
        return wrapper(functools.partial(executor, **named), *args)

    def patch(model):
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "test", outer)

    return patch


def other_noise(go, noise, *more):
    return go(noise.flip(-1) * 0.5, *more)


def twice(go, noise, latents, *more):
    first = go(noise, latents, *more)
    return go(noise.flip(-2), first, *more)


def in_parts(go, noise, latents, sampler, sigmas, *more):
    """With something added in between."""
    middle = 1 if len(sigmas) > 2 else 0
    if middle:
        latents = go(noise, latents, sampler, sigmas[: middle + 1], *more) + 0.3
        noise = torch.zeros_like(noise)
    return go(noise, latents, sampler, sigmas[middle:], *more) * 1.1


def by_callback(go, noise, latents, sampler, sigmas, mask, callback, *more):
    """What a callback hears goes into the result."""
    heard = []

    def listen(step, x0, x, steps):
        callback(step, x0, x, steps)  # as ComfyUI's nodes always pass one
        heard.append((1 + step / steps) * (x0 - 0.2 * x))

    out = go(noise, latents, sampler, sigmas, mask, listen, *more)
    return out + 0.3 * sum(heard).to(out.device)


@pytest.mark.parametrize("wrapper", [other_noise, twice, in_parts, by_callback])
def test_what_is_wrapped_around_a_sampling(wrapper):
    import framewise
    import tiny

    case, plain = patched(around(wrapper)), patched(lambda model: None)
    assert tiny.rms(case.alone(3, 0), plain.alone(3, 0)) > 1e-3, "it acts"
    _, wrong = framewise.judged(case, framewise.WAYS)
    assert wrong == [], "\n".join(wrong)


def test_frames_are_counted_once():
    import framewise
    from livediffusion.host.sampling.stream import Stream

    case = patched(around(twice))
    for frames in (1, 3):
        stream = Stream()
        stream.run(case.guider(), case.sources[:frames], case.settings(3, True))
        assert stream.stats()["frames"] == frames
        assert framewise.clip(case, 3, 1, tuple(range(frames))).checked == frames


def by_place(model):
    """Every picture of a batch has a factor of its own (AnimateDiff-Evolved's words)."""
    import comfy.patcher_extension

    own = torch.tensor([1.3, 0.7, 1.1])

    def go(executor, x, t, *args, **kwargs):
        out = executor(x, t, *args, **kwargs)
        dicts = [v for v in (*args, *kwargs.values()) if isinstance(v, dict)]
        options = next(v for v in dicts if "sigmas" in v)
        place, sides = options.get("ad_params"), len(options["cond_or_uncond"])
        factors = own[: x.shape[0] // sides]
        if place is not None and place["sub_idxs"] is not None:
            assert place["context_length"] == len(place["sub_idxs"]) <= place["full_length"]
            factors = own[place["sub_idxs"]]
        return out * factors.repeat(sides).view(-1, 1, 1, 1)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", go)


def all_there_is(model):
    """Says of every batch that it is the whole one, as AnimateDiff-Evolved does."""
    import comfy.patcher_extension

    def go(executor, x, t, options=None, seed=None):
        place = {"sub_idxs": None, "full_length": x.shape[0], "context_length": None}
        transformer = {**options["transformer_options"], "ad_params": place}
        return executor(x, t, {**options, "transformer_options": transformer}, seed)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "test", go)


def whole(guider, sources, levels):
    """All frames at once in ComfyUI's own sampler, [B, C, H, W]."""
    import comfy.samplers
    import framewise
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    return SamplerCustomAdvanced.execute(
        framewise.SlotZero(tuple(sources.shape[1:])), guider, comfy.samplers.ksampler("euler"),
        torch.tensor(levels), {"samples": sources},
    ).args[0]["samples"]  # fmt: skip


def check_rows(make, case):
    """Frame i of a clip is row i of the whole batch, and rows are not alike."""
    import framewise
    import tiny
    from livediffusion.host.sampling.stream import Stream

    sources, settings = case.sources[:3], case.settings(3, True)
    want = whole(make(), sources, settings.sigmas)
    same = whole(make(), sources[:1].expand(3, -1, -1, -1), settings.sigmas)
    assert tiny.rms(same[1:2], same[:1]) > 1e-3, "a picture has something of its own"
    out = Stream(2).run(make(), sources, settings)
    for i in range(3):
        assert tiny.rms(out[i : i + 1], want[i : i + 1]) <= framewise.NEAR, f"frame {i}"


@pytest.mark.parametrize("claimed", [False, True])
def test_place_in_the_batch(claimed):
    def patch(model):
        by_place(model)
        if claimed:
            all_there_is(model)

    case = patched(patch)
    check_rows(case.guider, case)


def test_place_is_not_told_to_a_compiled_model_alone():
    """Its guards do not see transformer_options, so a key must not come and go."""
    import comfy.patcher_extension
    from livediffusion.host.sampling.stream import Stream

    keys = []

    def patch(model):
        def go(executor, *args, **kwargs):
            keys.extend(k for v in args if isinstance(v, dict) for k in v)
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.APPLY_MODEL, "torch.compile", go
        )

    case = patched(patch)
    Stream().run(case.guider(), case.sources[:2], case.settings(3, True))
    assert "sigmas" in keys and "ad_params" not in keys


def placed_control():
    """A ControlNet of another pack, which picks its picture, counts steps, and goes by identity."""
    import comfy.controlnet
    import parts

    net = parts.control_net(FAMILY)

    class Placed(comfy.controlnet.ControlNet):
        sub_idxs = None
        steps = 0

        def copy(self):
            raise AssertionError("its pack knows it by identity")

        def pre_run(self, *args):
            super().pre_run(*args)
            self.steps, self.known = 0, self.cond_hint_original

        def get_control(self, x, t, cond, batched, options):
            self.steps += 1
            place = options.get("ad_params")
            if place is not None:
                # the last picture goes on where there are too few
                picked = [min(i, self.known.shape[0] - 1) for i in place["sub_idxs"]]
            else:
                picked = [min(i, self.known.shape[0] - 1) for i in range(x.shape[0] // batched)]
            self.cond_hint_original, self.cond_hint = self.known[picked], None
            strength, self.strength = self.strength, self.strength / self.steps
            try:
                return super().get_control(x, t, cond, batched, options)
            finally:
                self.cond_hint_original, self.strength = self.known, strength

    net.__class__ = Placed
    return net


@pytest.mark.parametrize("pictures", [3, 2])
def test_control_that_knows_its_place(pictures):
    import families
    import framewise

    loud = torch.rand(pictures, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 8

    def make():
        control = placed_control().set_cond_hint(loud, 2.0)
        extra = {"control": control, "control_apply_to_uncond": True}
        positive = families.conditioning(FAMILY, 1, **extra)
        return framewise.basic(families.model(FAMILY).clone(), positive)

    check_rows(make, patched(lambda model: None))
