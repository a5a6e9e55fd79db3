"""The embedded model in the pack's own graph: encode, stream, decode."""

import functools

import pytest
import torch
from pictures import pictures

# a real network: on the primary ComfyUI only
pytestmark = [pytest.mark.comfy, pytest.mark.slow]

LOOKS = ("ink drawing", "neon night", "watercolor", "thermal camera", "golden sunset")
MODES = ("off", "self-negative", "onetime-negative", "full")
# enough for four steps of two frames each, no two runs with the same frames in the same order
RUNS = ((0, 1), (2, 3), (1, 0), (3, 2))
NEAR = 1e-4  # relative RMS: rows of a batch are rounded otherwise than alone


@pytest.fixture(scope="module")
def demo(comfyui):
    from livediffusion.nodes.models import LiveDemoModel

    with torch.inference_mode():
        return LiveDemoModel.execute().args


@pytest.fixture(scope="module")
def frames():
    """Four pictures, [4, 256, 256, 3]."""
    return pictures(4, 20)


def prompted(demo, text):
    import nodes

    return nodes.CLIPTextEncode().encode(demo[1], text)[0]


def guided(demo, prompt, cfg=1.0, mode="self-negative", delta=1.0):
    from livediffusion.nodes.sampling import LiveRCFGGuider

    positive, negative = prompted(demo, prompt), prompted(demo, "")
    return LiveRCFGGuider.execute(demo[0], positive, cfg, delta, mode, negative).args[0]


def restyled(demo, frames, prompt, cfg=1.0, mode="self-negative", steps=2, stream=None):
    """The clip graph of `run.py clip`, node by node."""
    from livediffusion.host.sampling.stream import Settings, Stream
    from livediffusion.nodes.frames import LiveDecode, LiveEncode
    from livediffusion.nodes.schedules import LiveStrength

    with torch.inference_mode():
        sigmas = LiveStrength.execute(demo[0], steps, 0.5, "uniform t").args[0]
        latents = LiveEncode.execute(frames, demo[2]).args[0]["samples"]
        settings = Settings(tuple(sigmas.tolist()), "lcm", 3, drain=True)
        out = (stream or Stream()).run(guided(demo, prompt, cfg, mode), latents, settings)
        return LiveDecode.execute({"samples": out}, demo[2]).args[0]


@pytest.mark.parametrize("mode", MODES)
def test_takes_the_direct_road(demo, mode):
    from livediffusion.host.sampling.stream import Stream

    stream = Stream()
    out = restyled(demo, pictures(3, 0, 64, 96), "neon night", 1.4, mode, stream=stream)
    assert stream.roads() == {"road": "direct", "why": ""}
    assert out.shape == (3, 64, 96, 3) and out.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "n"),
    [("off", 2), ("off", 4), ("cfg", 1), ("cfg", 3), ("self-negative", 1), ("self-negative", 4)],
)
def test_equals_each_frame_alone(demo, n, kind):
    """ComfyUI's own sampler on each frame, and prompts that differ from frame to frame."""
    import framewise

    make = {
        "off": lambda rows: framewise.basic(demo[0], prompts(rows)),
        "cfg": lambda rows: framewise.cfg(demo[0], prompts(rows), prompted(demo, "photo"), 1.5),
        "self-negative": lambda rows: framewise.residual(demo[0], prompts(rows)),
    }[kind]

    @functools.cache
    def prompts(rows):
        parts = [prompted(demo, LOOKS[row])[0] for row in rows]
        pooled = torch.cat([extra["pooled_output"] for _, extra in parts])
        return [[torch.cat([tokens for tokens, _ in parts]), {"pooled_output": pooled}]]

    def levels(count):
        sampling = demo[0].get_model_object("model_sampling")
        times = torch.linspace(500, 500 / count, count)
        return (*(float(sampling.sigma(t)) for t in times), 0.0)

    with torch.inference_mode():
        sources = demo[2].encode(pictures(4, 30, 64, 96))
        case = framewise.Case(make, sources, levels, rows=True, rule="euler")
        for found in (framewise.clip(case, n, 1), framewise.live(case, n, 2, RUNS)):
            assert found.road == "direct" and found.error <= NEAR, found


@pytest.mark.parametrize("size", [(192, 320), (250, 262)], ids=["even", "odd"])
def test_other_sizes(demo, size):
    from livediffusion.host.sampling.stream import Stream

    stream, source = Stream(), pictures(2, 40, *size)
    out = restyled(demo, source, "photo", stream=stream)
    height, width = (side // 4 * 4 for side in size)
    assert out.shape == (2, height, width, 3)
    assert stream.roads()["road"] == "direct"
    shift = [(side - side // 4 * 4) // 2 for side in size]
    cropped = source[:, shift[0] : shift[0] + height, shift[1] : shift[1] + width]
    assert (out - cropped).abs().mean() < 0.1


def test_pictures_pass_the_live_nodes_unharmed(demo, frames):
    from livediffusion.nodes.frames import LiveDecode, LiveEncode

    with torch.inference_mode():
        latents = LiveEncode.execute(frames, demo[2]).args[0]
        again = LiveDecode.execute(latents, demo[2]).args[0]
    assert (again - frames).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["self-negative", "onetime-negative"])
def test_residual_guidance_of_1_4_is_stronger_than_1(demo, frames, mode):
    """It pushes the picture further from its input, for every look."""
    for look in LOOKS:
        moved = [
            float((restyled(demo, frames[:1], look, cfg, mode) - frames[:1]).abs().mean())
            for cfg in (1.0, 1.4)
        ]
        assert moved[1] > 1.02 * moved[0], (look, moved)


def test_two_prompts_give_visibly_different_pictures(demo, frames):
    shown = [restyled(demo, frames[:2], look) for look in LOOKS]
    for i, a in enumerate(shown):
        for j, b in enumerate(shown[:i]):
            difference = float((a - b).abs().mean())
            assert difference > 0.05, (LOOKS[i], LOOKS[j], difference)


def test_a_frame_keeps_its_place_in_the_clip(demo, frames):
    """Output i resembles input i more than any other input: by its coarse light and dark."""
    out = restyled(demo, frames, "golden sunset", 1.0)

    def coarse(shown):
        grey = shown.mean(-1)[:, None]
        small = torch.nn.functional.avg_pool2d(grey, 16).flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)

    likeness = coarse(out) @ coarse(frames).T
    assert torch.equal(likeness.argmax(1), torch.arange(len(frames))), likeness


def calmed(demo):
    """The model behind Live Memory's preset calm."""
    from livediffusion.host.models.coherence import attach
    from livediffusion.nodes.coherence import PRESETS

    memory, carry = PRESETS["calm"]
    return (attach(demo[0], memory=memory, carry=carry), *demo[1:])


def test_calm_follows_the_light(demo, frames):
    scene = frames[:1].repeat(7, 1, 1, 1)[:, ::2, ::2]
    fading = scene * 0.97 ** torch.arange(7).view(-1, 1, 1, 1)
    off, calm = (restyled(model, fading, "photo") for model in (demo, calmed(demo)))
    lag = (calm - off)[2:].mean((1, 2, 3)).abs().max()
    step = (off[-1] - off[2]).mean().abs() / 4
    assert lag < 0.2 * step


def test_calm_takes_the_flicker_of_a_still_scene_away(demo, frames):
    scene = frames[:1].repeat(12, 1, 1, 1)[:, ::2, ::2]
    noise = torch.randn(scene.shape, generator=torch.Generator().manual_seed(0))
    noisy = (scene + 0.02 * noise).clamp(0, 1)
    off, calm = (restyled(model, noisy, "oil painting")[4:] for model in (demo, calmed(demo)))
    assert calm.std(0).mean() < 0.5 * off.std(0).mean()
    # it is calm since it moves less, not since it shows less
    detail = [(out.diff(dim=1).square().mean() + out.diff(dim=2).square().mean()) for out in
              (calm, off)]  # fmt: skip
    assert detail[0] > 0.9 * detail[1]
