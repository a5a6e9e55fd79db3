"""The recorded tick, where every frame brings noise of its own."""

import pytest
import tiny
import torch
from pairs import Pair, settings
from photographs import scene, seen

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("at_once")]


def camera(count):
    """One that pans and turns over a photograph, [count, 64, 64, 3]."""
    return torch.stack([
        seen(scene(0), x=5.0 * i, y=-2.0 * i, angle=0.03 * i, side=64) for i in range(count)
    ])  # fmt: skip


def brought(frames):
    from livediffusion.engine.moving import Pictures
    from livediffusion.host.sampling.noises import Brought

    return Brought(Pictures(frames))


@pytest.mark.parametrize("per_slot", [1, 2])
@pytest.mark.parametrize("rule", ["lcm", pytest.param("unipc", marks=pytest.mark.slow)])
def test_recorded_ticks(rule, per_slot):
    """One recording serves moving and fixed noise by turns."""
    pair = Pair(tiny.model(), per_slot)
    pair.guide()
    frames, outs = camera(14 * per_slot), []
    for i in range(14):
        at = slice(i * per_slot, (i + 1) * per_slot)
        given = None if i > 10 else brought(frames[at])
        clean = tiny.latents(per_slot, i)
        a = pair.plain.run(pair.guiders[0], clean, settings(rule=rule), brought=given)
        b = pair.graph.run(pair.guiders[1], clean, settings(rule=rule), brought=given)
        outs.append(b)
        assert tiny.rms(b, a) <= 1e-6, i
        plans = {id(p) for p in pair.graph.ring._plans.values()}
        if i == 6:
            before = plans
        elif i == 7:
            assert plans == before  # none is made for a frame
    # frames that share a slot bring as many noises, or one for all
    assert pair.captures == per_slot
    assert pair.attached.reason is None
