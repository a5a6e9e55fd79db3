"""The embedded model in the pack's own graph: encode, stream, decode."""

import numpy as np
import pytest
import torch

# a real network: on the primary ComfyUI only
pytestmark = [pytest.mark.comfy, pytest.mark.slow]

LOOKS = ("ink drawing", "neon night", "watercolor", "thermal camera", "golden sunset")


@pytest.fixture(scope="module")
def demo(comfyui):
    from livediffusion.nodes.models import LiveDemoModel

    with torch.inference_mode():
        return LiveDemoModel.execute().args


@pytest.fixture(scope="module")
def frames():
    """Four drawn scenes that training never saw, [4, 256, 256, 3]."""
    from livediffusion.demo import scenes

    drawn = [scenes.draw(2_000_000 + i)[0] for i in range(4)]
    return torch.from_numpy(np.stack(drawn)).float() / 255


def restyled(demo, frames, prompt, cfg=1.0, mode="self-negative"):
    """The clip graph of `run.py clip`, node by node."""
    from livediffusion.host.sampling.stream import Settings, Stream
    from livediffusion.nodes.frames import LiveDecode, LiveEncode
    from livediffusion.nodes.sampling import LiveRCFGGuider
    from livediffusion.nodes.schedules import LiveStrength

    import nodes

    model, clip, vae = demo
    with torch.inference_mode():
        positive, negative = (nodes.CLIPTextEncode().encode(clip, t)[0] for t in (prompt, ""))
        sigmas = LiveStrength.execute(model, 4, 0.5, "uniform t").args[0]
        guider = LiveRCFGGuider.execute(model, positive, cfg, 1.0, mode, negative).args[0]
        latents = LiveEncode.execute(frames, vae).args[0]["samples"]
        settings = Settings(tuple(sigmas.tolist()), "lcm", 3, drain=True)
        out = Stream().run(guider, latents, settings)
        return LiveDecode.execute({"samples": out}, vae).args[0]


@pytest.mark.parametrize("mode", ["self-negative", "onetime-negative"])
def test_residual_guidance_of_1_4_is_stronger_than_1(demo, frames, mode):
    """It pushes the picture further from its input, for every look."""
    frames = frames[:2]
    for look in LOOKS:
        moved = [
            float((restyled(demo, frames, look, cfg, mode) - frames).abs().mean())
            for cfg in (1.0, 1.4)
        ]
        assert moved[1] > 1.05 * moved[0], (look, moved)


def test_two_prompts_give_visibly_different_pictures(demo, frames):
    pictures = [restyled(demo, frames[:2], look, 1.4) for look in LOOKS]
    for i, a in enumerate(pictures):
        for j, b in enumerate(pictures[:i]):
            difference = float((a - b).abs().mean())
            assert difference > 0.05, (LOOKS[i], LOOKS[j], difference)


def test_a_frame_keeps_its_place_in_the_clip(demo, frames):
    """Output i resembles input i more than any other input: by its coarse light and dark."""
    out = restyled(demo, frames, "golden sunset", 1.0)

    def coarse(pictures):
        grey = pictures.mean(-1)[:, None]
        small = torch.nn.functional.avg_pool2d(grey, 16).flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True), dim=1)

    likeness = coarse(out) @ coarse(frames).T
    assert torch.equal(likeness.argmax(1), torch.arange(len(frames))), likeness
