"""What cudagraph does and says where frames help each other and their tick is not recorded: nothing
is left out in silence, and the pictures are what the same stream gives without it."""

import time

import coherent
import compiled_models
import pytest
import tiny
import torch
from helping import helping
from pairs import Pair, settings

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("at_once")]
WHOLE = "cudagraph records whole ticks of a stream and nothing else, and "
SIZE = 8
MEMORY = {"frames": 1, "interval": 1}


def asked(patcher, skips=False, **wishes):
    """A MODEL with what nodes ask for."""
    from livediffusion.engine.blocks.skips import Rule
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.models.walk import bodies

    unet = patcher.model.diffusion_model
    helps = {name: wishes.pop(name) for name in ("memory", "future", "reuse") if name in wishes}
    if skips:
        wishes["skips"] = Rule((10.0,), (frozenset(list(bodies(unet))[1:3]),))
    return helping(attach(patcher, **wishes) if wishes else patcher, **helps)


def patchwork():
    from livediffusion.engine.patchwork.mask import Patchwork

    return Patchwork(0.05)


def carry():
    from livediffusion.engine.coherence.carry import Carry

    return Carry()


def prompts(pair, what):
    """The guiders' positive side with something that no recorded tick has."""
    other = {
        "range": [*tiny.conditioning(1, end_percent=0.9)],
        "parts": [*tiny.conditioning(1), *tiny.conditioning(3)],
    }[what]  # fmt: skip
    for guider in pair.guiders:
        guider.set_conds(other, tiny.conditioning(2))


def run(pair, ticks, size=SIZE, **more):
    for i in range(ticks):
        a = pair.plain.run(pair.guiders[0], tiny.latents(1, i, size), settings(), **more)
        b = pair.graph.run(pair.guiders[1], tiny.latents(1, i, size), settings(), **more)
        assert tiny.rms(b, a) <= 1e-6, i


@pytest.mark.parametrize("wishes", [
    {"reuse": {}}, {"memory": MEMORY}, {"future": {}, "skips": True},
], ids=lambda wishes: "-".join(wishes))  # fmt: skip
def test_a_tick_that_is_never_recorded_is_told_while_it_lasts(wishes):
    from livediffusion.host.models import engines

    pair = Pair(asked(coherent.model(), **wishes))
    attached, began = pair.attached, time.monotonic()
    pair.guide()
    prompts(pair, "range")
    run(pair, 5)
    assert attached.fell_back >= 5 and attached.said[-1].endswith(attached.reason)
    assert WHOLE + "the conditioning has areas, masks, percent ranges" in attached.reason
    nodes = {"reuse": "Live Reuse", "memory": "Live Memory", "future": "Live Future Attention",
             "skips": "Live Searched Steps"}  # fmt: skip
    for wish, node in nodes.items():
        assert (node in attached.reason) == (wish in wishes)
    assert attached.stats() in engines.in_use(began)
    pair.guide()
    run(pair, 4)  # frames of before are still on their way
    fell = attached.fell_back
    run(pair, 6)
    assert pair.captures and attached.fell_back == fell
    assert attached.reason is None and attached.said[-1] == attached.line()


def test_what_leaves_nothing_to_go_on_with_is_told():
    """Live Reuse with skipped blocks, while frames help each other."""
    pair = Pair(asked(coherent.model(), reuse={}, future={}, skips=True))
    pair.guide()
    run(pair, 5)
    assert pair.captures == 0
    assert WHOLE + "Live Reuse can keep nothing here" in pair.attached.reason


def test_a_mask_is_told_and_what_is_not_yet_recorded_is_not():
    pair = Pair(asked(coherent.model(), reuse={}))
    pair.guide()
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., :4] = 1
    run(pair, 3, mask=mask)  # the ring fills
    assert pair.attached.reason is None
    run(pair, 2, mask=mask)
    assert WHOLE + "its frames have a mask" in pair.attached.reason
    run(pair, 8)
    assert pair.captures and pair.attached.reason is None


@pytest.mark.parametrize("what", ["", "range"])
def test_beside_live_patchwork_it_stands_aside_and_says_so(what):
    pair = Pair(asked(tiny.model(), patchwork=patchwork()))
    pair.guide()
    if what:
        prompts(pair, what)
    run(pair, 5, 16)
    attached = pair.attached
    assert "Live Patchwork" in attached.reason and attached.fell_back >= 5 and attached.used
    assert any("Live Patchwork" in line for line in attached.said)
    assert attached.ran == pair.captures == 0


def test_frames_that_are_sampled_one_by_one_are_told():
    pair = Pair(asked(coherent.model(), reuse={}))
    pair.guide()
    for guider in pair.guiders:
        guider.sample = guider.sample  # its own, as far as anybody can see
    run(pair, 1)
    assert WHOLE + "each frame is sampled by itself" in pair.attached.reason


@pytest.mark.parametrize(("wishes", "what"), [
    ({"reuse": {}}, "parts"), ({"memory": MEMORY, "future": {}}, "parts"),
    ({"carry": None}, "range"),
], ids=["reuse", "memory", "carried"])  # fmt: skip
def test_calls_that_are_as_ever_have_a_graph_of_their_own(wishes, what):
    """Whose rows nobody can tell, or of which nothing inside is changed."""
    if "carry" in wishes:
        wishes = {"carry": carry()}
    pair = Pair(asked(coherent.model(), **wishes))
    pair.guide()
    prompts(pair, what)
    run(pair, 9)
    attached = pair.attached
    assert attached.reason is None and attached.fell_back == pair.captures == 0
    assert attached.ran and [one["engine"] for one in attached.stats()["made"]] == ["cudagraph"]
    assert pair.plain.stats() == pair.graph.stats()
    # an ordinary sampler's, too
    ran = attached.ran
    for _ in range(4):
        compiled_models.sampled_once(pair.compiled)
    assert attached.ran > ran
