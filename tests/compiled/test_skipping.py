"""Recorded ticks and engines on a MODEL that passes bodies by (tests/host/test_skips.py)."""

import comfy.samplers
import framewise
import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
from cutting import LEVELS, chosen, plain, skipping
from pairs import Pair, compiled, settings

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("at_once")]


@pytest.fixture(scope="module", autouse=True)
def forget():
    """ComfyUI's patchers complain if they outlive the interpreter's modules."""
    yield
    plain.cache_clear()


@pytest.mark.parametrize(("mode", "frames"), [("onetime-negative", 2), ("full", 1)])
def test_ticks_are_recorded_with_it(mode, frames):
    """One recording for each layout of a ring, whose rows take turns in what they pass by."""
    pair = Pair(skipping(chosen(7)), frames)
    pair.guide(mode=mode)
    for i in range(9):
        a, b = pair.run(settings((*LEVELS, 0.0)), tiny.latents(frames, i))
        assert tiny.rms(b, a) <= 1e-6, i
    assert pair.captures == 1 and pair.attached.reason is None


def test_an_engine_says_that_it_leaves_nothing_out_and_the_network_does():
    ours = skipping(chosen(9))
    engine, attached = compiled(ours)
    latent = {"samples": tiny.latents(1)}
    outs = [
        SamplerCustomAdvanced.execute(
            framewise.SlotZero((4, 8, 8)), framewise.basic(model, tiny.conditioning(1)),
            comfy.samplers.ksampler("euler"), torch.tensor([*LEVELS, 0.0]), latent,
        ).args[0]["samples"]
        for model in (ours, engine)
    ]  # fmt: skip
    assert torch.equal(*outs)
    assert "which blocks run depends on the noise level" in attached.reason
