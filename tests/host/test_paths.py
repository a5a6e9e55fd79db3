"""Short paths equal the long one; what they cannot do takes the long one and acts."""

import inspect
import types

import pytest
import torch

pytestmark = pytest.mark.comfy

SEED, LEVELS = 11, (8.0, 3.0, 1.2, 0.5, 0.0)


@pytest.fixture(scope="module")
def world():
    import comfy.samplers
    import tiny
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling import evaluate
    from livediffusion.host.sampling.direct import Direct
    from livediffusion.host.sampling.guider import RCFGGuider
    from livediffusion.host.sampling.stream import Settings, Stream

    return types.SimpleNamespace(
        tiny=tiny, evaluate=evaluate, Direct=Direct, Guidance=Guidance, RCFGGuider=RCFGGuider,
        Settings=Settings, Stream=Stream, samplers=comfy.samplers, model=tiny.model(),
        pooled=tiny.model(adm=12),
    )  # fmt: skip


def rcfg(world, model, positive, negative=None, mode="off", cfg=1.6):
    guider = world.RCFGGuider(model, world.Guidance(mode, cfg, 0.9))
    conds = {"positive": positive}
    if negative is not None:
        conds["negative"] = negative
    guider.inner_set_conds(conds)
    return guider


def stock(world, model, positive, negative, cfg=2.0):
    guider = world.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def run(world, guider, count=5, per_slot=1, rule="euler", stream=None, **kwargs):
    stream = stream or world.Stream(per_slot)
    settings = world.Settings(LEVELS, rule, SEED, drain=True, **kwargs)
    return stream.run(guider, world.tiny.latents(count), settings), stream


def each_alone(world, make, count=5, rule="euler"):
    """The same frames, one stream per frame and one slot's sigma per call."""
    import comfy.samplers
    from livediffusion.engine.noise import SlotNoise

    noise, out = SlotNoise(SEED, (4, 8, 8)), []
    for frame in world.tiny.latents(count).split(1):
        out.append(
            make().sample(
                noise.slot(0)[None].clone(),
                frame,
                comfy.samplers.ksampler(rule),
                torch.tensor(LEVELS),
                disable_pbar=True,
                seed=SEED,
            )
        )
    return torch.cat(out)


@pytest.fixture
def at_least(world, monkeypatch):
    """Makes every model take a slower road than it needs."""
    from livediffusion.host.sampling import route, stream

    def use(road, real=stream.route):
        def slower(*args):
            found = real(*args).at_least(road, "the test asks for it")
            return found if road < route.Road.GUIDER else route.Route(found.road, found.why)

        monkeypatch.setattr(stream, "route", slower)

    return use


GUIDERS = {
    "basic": lambda w, m, p, n: basic(w, m, p),
    "cfg": lambda w, m, p, n: stock(w, m, p, n),
    "cfg 1": lambda w, m, p, n: stock(w, m, p, n, cfg=1.0),
    "off": lambda w, m, p, n: rcfg(w, m, p),
    "self": lambda w, m, p, n: rcfg(w, m, p, mode="self-negative"),
    "full": lambda w, m, p, n: rcfg(w, m, p, n, "full"),
    "onetime": lambda w, m, p, n: rcfg(w, m, p, n, "onetime-negative"),
}


def basic(world, model, positive):
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    guider = Guider_Basic(model)
    guider.set_conds(positive)
    return guider


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [(8, 8), (8, 16)], ids=["even", "long"])
@pytest.mark.parametrize("name", GUIDERS)
def test_all_roads_give_the_same(world, at_least, monkeypatch, name, tokens, kind):
    """ComfyUI's own evaluation, one prepared call bit for bit, and the direct one to rounding."""
    model = world.model if kind == "sd" else world.pooled
    pooled = None if kind == "sd" else 12
    positive = world.tiny.conditioning(1, tokens[0], pooled)
    negative = world.tiny.conditioning(2, tokens[1], pooled)
    make = GUIDERS[name]
    from livediffusion.host.sampling.route import Road

    calls = []
    real = world.Direct._call
    monkeypatch.setattr(world.Direct, "_call", lambda *args: calls.append(1) or real(*args))
    direct, stream = run(world, make(world, model, positive, negative))
    assert len(calls) == stream.ticks
    assert stream.roads() == {"road": "direct", "why": ""}
    at_least(Road.PREPARED)
    fast, stream = run(world, make(world, model, positive, negative))
    assert stream._kept is not None, "this model is admitted to the fast path"
    at_least(Road.GUIDER)
    plain, stream = run(world, make(world, model, positive, negative))
    assert stream._kept is None
    assert torch.equal(fast, plain)
    assert world.tiny.rms(direct, plain) <= 1e-5


def test_prepared_guider_is_used_again_and_gives_the_same(world, monkeypatch):
    guider = stock(world, world.model, world.tiny.conditioning(1), world.tiny.conditioning(2))
    first, stream = run(world, guider)
    asked: list[int] = []
    monkeypatch.setattr(world.samplers, "process_conds", lambda *args, **kwargs: asked.append(1))
    again, _ = run(world, guider, stream=stream)
    assert not asked
    assert torch.equal(first, again)
    assert not hasattr(guider, "inner_model"), "nothing is left on the guider"


def assert_slow_and_acting(world, make_guider, make_plain, count=5, calls_per_tick=None):
    """The guider leaves the fast path, equals ComfyUI frame by frame, and is not ignored."""
    out, stream = run(world, make_guider(), count)
    assert stream._kept is None, "the fast path was taken"
    want = each_alone(world, make_guider, count)
    assert world.tiny.rms(out, want) <= 1e-5
    ignored, _ = run(world, make_plain(), count)
    assert world.tiny.rms(out, ignored) > 1e-3, "it acts"
    return stream


def test_attention_patch(world):
    patched = world.model.clone()
    patched.set_model_attn2_patch(lambda q, k, v, extra: (q, k, v * 0.2))
    cond = world.tiny.conditioning(1)
    stream = assert_slow_and_acting(
        world, lambda: rcfg(world, patched, cond), lambda: rcfg(world, world.model, cond)
    )
    assert stream.roads()["road"] == "per frame", "nobody knows what it looks at"


@pytest.mark.parametrize("setter", ["cfg", "post", "pre"])
@pytest.mark.parametrize("mode", ["full", "self-negative"])
def test_cfg_functions(world, setter, mode):
    """Functions that read sigma[0] are right too: they get one level at a time."""
    patched = world.model.clone()

    def one_level(sigma):
        assert torch.all(sigma == sigma[0])
        return float(sigma[0])

    if setter == "cfg":
        patched.set_model_sampler_cfg_function(
            lambda a: a["cond"] * (1 + 0.1 * one_level(a["sigma"])), True
        )
    elif setter == "post":
        patched.set_model_sampler_post_cfg_function(
            lambda a: a["denoised"] * (1 + 0.05 * one_level(a["sigma"]))
        )
    else:
        patched.set_model_sampler_pre_cfg_function(
            lambda a: [a["conds_out"][0] * (1 + 0.05 * one_level(a["sigma"])), a["conds_out"][1]]
        )
    positive, negative = world.tiny.conditioning(1), world.tiny.conditioning(2)
    assert_slow_and_acting(
        world,
        lambda: rcfg(world, patched, positive, negative, mode),
        lambda: rcfg(world, world.model, positive, negative, mode),
    )


def test_model_function_wrapper(world):
    patched = world.model.clone()
    patched.set_model_unet_function_wrapper(
        lambda apply, a: apply(a["input"], a["timestep"], **a["c"]) * 0.9
    )
    cond = world.tiny.conditioning(1)
    assert_slow_and_acting(
        world, lambda: rcfg(world, patched, cond), lambda: rcfg(world, world.model, cond)
    )


@pytest.mark.parametrize("kind", ["APPLY_MODEL", "DIFFUSION_MODEL", "CALC_COND_BATCH"])
def test_wrappers(world, kind):
    import comfy.patcher_extension

    patched = world.model.clone()

    def wrapper(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        return [o * 0.9 for o in out] if isinstance(out, list) else out * 0.9

    name = getattr(comfy.patcher_extension.WrappersMP, kind)
    patched.add_wrapper_with_key(name, "test", wrapper)
    cond = world.tiny.conditioning(1)
    assert_slow_and_acting(
        world, lambda: rcfg(world, patched, cond), lambda: rcfg(world, world.model, cond)
    )


def lora(model, seed=0, strength=1.0):
    """A weight patch on every cross attention."""
    patched = model.clone()
    g = torch.Generator().manual_seed(seed)
    keys = [k for k in model.model_state_dict() if "attn2.to_v.weight" in k]
    shapes = {k: model.model_state_dict()[k].shape for k in keys}
    weights = {k: (torch.randn(s, generator=g) * 0.3,) for k, s in shapes.items()}
    patched.add_patches(weights, strength)
    return patched


def test_lora_acts_on_the_fast_path(world):
    cond = world.tiny.conditioning(1)
    out, stream = run(world, rcfg(world, lora(world.model), cond))
    assert stream._kept is not None
    want = each_alone(world, lambda: rcfg(world, lora(world.model), cond))
    assert world.tiny.rms(out, want) <= 1e-5
    assert world.tiny.rms(out, run(world, rcfg(world, world.model, cond))[0]) > 1e-3


def hooked(world, *keyframes):
    """Conditioning with a LoRA hook, scheduled by (strength, start percent) pairs."""
    import comfy.hooks

    state = world.model.model_state_dict()
    g = torch.Generator().manual_seed(3)
    weight = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    weight.weights = {
        k: (torch.randn(v.shape, generator=g) * 0.3,)
        for k, v in state.items()
        if "attn2.to_v.weight" in k
    }
    weight.need_weight_init = False
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in keyframes:
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    weight.hook_keyframe = frames
    group = comfy.hooks.HookGroup()
    group.add(weight)
    return world.tiny.conditioning(1, hooks=group)


def test_lora_hook(world):
    assert_slow_and_acting(
        world,
        lambda: rcfg(world, world.model, hooked(world)),
        lambda: rcfg(world, world.model, world.tiny.conditioning(1)),
    )


def test_scheduled_hook(world):
    """Keyframes are gone through in one direction: each frame goes through them alone."""
    stream = assert_slow_and_acting(
        world,
        lambda: rcfg(world, world.model, hooked(world, (0.0, 0.0), (1.0, 0.2))),
        lambda: rcfg(world, world.model, world.tiny.conditioning(1)),
    )
    assert stream.roads() == {"road": "per frame", "why": "the conditioning has hooks"}


@pytest.mark.parametrize("ends", [(0.0, 0.7), (0.7, 1.0), (0.5, 0.9)])
def test_percent_ranges_are_resolved_per_slot(world, ends):
    """ComfyUI gates a whole batch by its first row; here each slot is gated by its own level."""
    early = world.tiny.conditioning(1, start_percent=ends[0], end_percent=ends[1])
    both = early + world.tiny.conditioning(2)
    stream = assert_slow_and_acting(
        world,
        lambda: rcfg(world, world.model, both),
        lambda: rcfg(world, world.model, world.tiny.conditioning(2)),
    )
    assert stream.calls.calls > stream.ticks


def test_area_and_mask(world):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    masked = world.tiny.conditioning(1, mask=mask, mask_strength=1.0) + world.tiny.conditioning(2)
    area = world.tiny.conditioning(3, area=(4, 4, 2, 2), strength=0.7) + world.tiny.conditioning(2)
    for cond in (masked, area):
        assert_slow_and_acting(
            world,
            lambda cond=cond: rcfg(world, world.model, cond),
            lambda: rcfg(world, world.model, world.tiny.conditioning(2)),
        )


def test_unknown_guider_is_asked_itself(world):
    class Halved(world.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs) * 0.5

    def make():
        guider = Halved(world.model)
        guider.set_conds(world.tiny.conditioning(1), world.tiny.conditioning(2))
        guider.set_cfg(2.0)
        return guider

    assert_slow_and_acting(
        world,
        make,
        lambda: stock(world, world.model, world.tiny.conditioning(1), world.tiny.conditioning(2)),
    )


@pytest.mark.parametrize("looks", [False, True], ids=["stock", "looks at the mask"])
def test_inpainting_mask_of_each_frame(world, looks, monkeypatch):
    """A noise_mask per frame travels with its frame, to a model that asks for it too."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
    from livediffusion.engine.noise import SlotNoise

    masks = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    if not looks:
        masks = (masks > 0.5).float()
    elif "denoise_mask=denoise_mask" not in inspect.getsource(world.samplers.KSamplerX0Inpaint):
        pytest.skip("this ComfyUI does not tell the model the mask")
    else:
        known = world.model.model.scale_latent_inpaint
        monkeypatch.setattr(
            world.model.model, "scale_latent_inpaint",
            lambda denoise_mask, **kwargs: known(**kwargs) + denoise_mask,
        )  # fmt: skip
    guider = rcfg(world, world.model, world.tiny.conditioning(1))
    settings = world.Settings(LEVELS, "euler", SEED, drain=True)
    out = world.Stream(2).run(guider, world.tiny.latents(5), settings, masks)
    noise = SlotNoise(SEED, (4, 8, 8))
    for i, frame in enumerate(world.tiny.latents(5).split(1)):
        fixed = types.SimpleNamespace(
            seed=SEED, generate_noise=lambda _: noise.slot(0)[None].clone()
        )
        alone = SamplerCustomAdvanced.execute(
            fixed, guider, world.samplers.ksampler("euler"), torch.tensor(LEVELS),
            {"samples": frame, "noise_mask": masks[i : i + 1]},
        ).args[0]["samples"]  # fmt: skip
        assert world.tiny.rms(out[i : i + 1], alone) <= 1e-5
