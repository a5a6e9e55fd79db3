"""ControlNet: the hint of a frame travels with the frame."""

import types

import pytest
import torch

pytestmark = pytest.mark.comfy

SEED, LEVELS = 4, (8.0, 3.0, 1.2, 0.0)


@pytest.fixture(scope="module")
def world():
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    import tiny
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling.guider import RCFGGuider
    from livediffusion.host.sampling.stream import Settings, Stream

    config = dict(tiny.UNET)
    config.pop("out_channels")
    config.pop("transformer_depth_output")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        net = comfy.cldm.cldm.ControlNet(
            **config, hint_channels=3, operations=comfy.ops.disable_weight_init,
            device=torch.device("cpu"),
        )  # fmt: skip
        for parameter in net.parameters():
            # loud, so that a wrong hint cannot hide
            torch.nn.init.normal_(parameter, std=2.0 / max(parameter[0].numel(), 1) ** 0.5)
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    return types.SimpleNamespace(
        tiny=tiny, model=tiny.model(), control=control, Guidance=Guidance,
        RCFGGuider=RCFGGuider, Settings=Settings, Stream=Stream,
    )  # fmt: skip


def hints(count):
    """One hint picture per frame, [N, 3, 64, 64]."""
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def guider(world, hint, percent=(0.0, 1.0), strength=0.8, chained=None, mode="off"):
    """As ControlNetApplyAdvanced builds it (nodes.py)."""
    control = world.control.copy().set_cond_hint(hint, strength, percent)
    if chained is not None:
        control.set_previous_controlnet(world.control.copy().set_cond_hint(chained, 0.5))
    extra = {"control": control, "control_apply_to_uncond": False}
    out = world.RCFGGuider(world.model, world.Guidance(mode, 1.5))
    conds = {"positive": world.tiny.conditioning(1, **extra)}
    if mode in ("full", "onetime-negative"):
        conds["negative"] = world.tiny.conditioning(2, **extra)
    out.inner_set_conds(conds)
    return out


def alone(world, frame, guide):
    """ComfyUI's own euler, one frame."""
    import comfy.samplers
    from livediffusion.engine.noise import SlotNoise

    if guide.guidance.mode == "onetime-negative":
        settings = world.Settings(LEVELS, "euler", SEED, drain=True)
        return world.Stream().run(guide, frame, settings)
    return guide.sample(
        SlotNoise(SEED, (4, 8, 8)).slot(0)[None].clone(), frame, comfy.samplers.ksampler("euler"),
        torch.tensor(LEVELS), disable_pbar=True, seed=SEED,
    )  # fmt: skip


CASES = {
    "whole": {},
    "first part": {"percent": (0.0, 0.7)},
    "last part": {"percent": (0.6, 1.0)},
    "chain": {"chained": True},
    "full": {"mode": "full"},
    "self": {"mode": "self-negative"},
    "onetime": {"mode": "onetime-negative"},
}


def make(world, case, hint):
    options = dict(CASES[case])
    if options.pop("chained", False):
        options["chained"] = hint.flip(-1)
    return guider(world, hint, **options)


@pytest.mark.parametrize("case", CASES)
def test_clip_with_a_hint_per_frame(world, case):
    latents, pictures = world.tiny.latents(5), hints(5)
    settings = world.Settings(LEVELS, "euler", SEED, drain=True)
    stream = world.Stream(2)
    out = stream.run(make(world, case, pictures), latents, settings)
    assert stream._kept is None, "control takes the slow path"
    for i in range(5):
        want = alone(world, latents[i : i + 1], make(world, case, pictures[i : i + 1]))
        assert world.tiny.rms(out[i : i + 1], want) <= 1e-5, f"frame {i}"


@pytest.mark.parametrize("case", CASES)
def test_live_with_a_hint_per_run(world, case):
    """Each run brings its own hint; frames in flight keep theirs, and one call holds all."""
    latents, pictures = world.tiny.latents(6).split(1), hints(6).split(1)
    settings = world.Settings(LEVELS, "euler", SEED)
    stream = world.Stream()
    out = [
        stream.run(make(world, case, hint), frame, settings)
        for frame, hint in zip(latents, pictures, strict=True)
    ]
    for i in range(4):
        want = alone(world, latents[i], make(world, case, pictures[i]))
        assert world.tiny.rms(out[i + 2], want) <= 1e-5, f"frame {i}"
    if case in ("whole", "chain", "self", "onetime"):
        assert stream.calls.calls == stream.ticks


def test_hint_acts_and_is_the_frames_own(world):
    frame, pictures = world.tiny.latents(1), hints(2)
    a = alone(world, frame, guider(world, pictures[:1]))
    b = alone(world, frame, guider(world, pictures[1:]))
    assert world.tiny.rms(a, b) > 1e-3


def test_strength_changed_live_keeps_each_frames_strength(world):
    """Controls that differ in more than the hint cannot share a call, so they get one each."""
    latents, pictures = world.tiny.latents(6).split(1), hints(6).split(1)
    settings = world.Settings(LEVELS, "euler", SEED)
    stream = world.Stream()
    strengths = [0.8] * 3 + [0.2] * 3
    out = [
        stream.run(guider(world, h, strength=s), f, settings)
        for f, h, s in zip(latents, pictures, strengths, strict=True)
    ]
    for i in range(4):
        want = alone(world, latents[i], guider(world, pictures[i], strength=strengths[i]))
        assert world.tiny.rms(out[i + 2], want) <= 1e-5, f"frame {i}"
