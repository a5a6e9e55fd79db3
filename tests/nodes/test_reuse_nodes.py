"""Live Reuse as a node: what it asks for, says and refuses."""

import types

import pytest
import torch

pytestmark = pytest.mark.comfy


@pytest.fixture
def said(comfyui, monkeypatch):
    """What the node is told to say, newest last."""
    from livediffusion.nodes import reuse

    lines = []
    monkeypatch.setattr(reuse, "teller", lambda node: lines.append)
    monkeypatch.setattr(
        reuse.LiveReuse, "hidden", types.SimpleNamespace(unique_id="7"), raising=False
    )
    with torch.inference_mode():
        yield lines


def reusing(model, *inputs):
    from livediffusion.nodes.reuse import LiveReuse

    return LiveReuse.execute(model, *inputs).args[0]


def test_interval_1_is_the_model_itself(said):
    import tiny

    model = tiny.model()
    assert reusing(model, 1, "two blocks", 0.4) is model
    assert "as it is" in said[-1]


def test_the_inputs_arrive_and_leave_what_others_asked_for(said):
    import tiny
    from livediffusion.engine.blocks.schedule import DEPTHS, Reuse
    from livediffusion.engine.coherence.neighbours import Memory
    from livediffusion.host.models.coherence import attach, coherence_of

    asked = Memory(), Reuse(3, DEPTHS[1], 0.2)
    first = reusing(attach(tiny.model(), memory=asked[0]), 3, DEPTHS[1], 0.2)
    then = attach(reusing(tiny.model(), 3, DEPTHS[1], 0.2), memory=asked[0])
    for model in (first, then):
        known = coherence_of(model)
        assert (known.memory, known.reuse) == asked


def test_depths_of_layouts():
    """SD1.5's own: its finest level are two blocks beside the first convolution."""
    import tiny
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from livediffusion.engine.blocks.schedule import DEPTHS
    from livediffusion.host.models.coherence import depth_of

    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 16,
        "use_spatial_transformer": True, "legacy": False,
    }  # fmt: skip
    unets = UNetModel(**config, device="meta"), tiny.model().model.diffusion_model
    assert [[depth_of(unet, name) for name in DEPTHS] for unet in unets] == [[0, 1, 2], [0, 1, 1]]


def test_what_is_no_unet_is_refused(said):
    import families

    with pytest.raises(ValueError, match=r"^model: .* is no UNet"):
        reusing(families.model("SD3"), 2, "two blocks", 0.0)
    families.forget()


def test_it_says_what_share_runs_and_why_all_of_it(said, monkeypatch):
    import pairs
    import tiny
    from livediffusion.host.sampling import reusing as looking
    from livediffusion.host.sampling.stream import Stream

    monkeypatch.setattr(looking, "_TOLD", 8)
    model = reusing(tiny.model(), 2, "two blocks", 0.0)
    stream, guider = Stream(), pairs.guider(model)
    for i in range(8):
        stream.run(guider, tiny.latents(1, i), pairs.settings((5.0, 0.0)))
    assert said[-1].endswith("% of the network runs") and not said[-1].startswith("100")
    guider.set_conds(tiny.conditioning(1) + tiny.conditioning(4), tiny.conditioning(2))
    for i in range(8):
        stream.run(guider, tiny.latents(1, i), pairs.settings((5.0, 0.0)))
    assert said[-1] == "100% of the network runs: a prompt has several parts"
    assert "several parts" in stream.stats()["reuse"]
