"""What must hold of kept features, whatever comes between: roads, cuts, interrupts, other streams,
other nodes. tests/host/test_reuse.py has the features themselves."""


import comfy.model_management
import pytest
import torch
from tiny_models import forget, inference, tiny_model  # noqa: F401

pytestmark = pytest.mark.comfy

SIGMAS = (8.0, 2.0, 0.5, 0.0)
NEAR = 1e-5
DEPTH = "outermost block"


def reusing(patcher, interval=2, depth=DEPTH, awake=0.0, tell=None):
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.host.models.coherence import attach

    return attach(patcher, reuse=Reuse(interval, depth, awake), tell_reuse=tell)


class Live:
    """A stream of a scene that moves a little.

    Args:
        knobs: of pairs.guider.
    """

    def __init__(self, model, frames=1, **knobs):
        import pairs
        from livediffusion.host.sampling.stream import Stream

        self.stream, self.frames = Stream(frames), frames
        self.guider = pairs.guider(model, **knobs)
        self.ran = []

    def run(self, i, scene=0, sigmas=SIGMAS, latents=None, **settings):
        import pairs

        if latents is None:
            latents = sources(self.frames, i, scene)
        out = self.stream.run(self.guider, latents, pairs.settings(sigmas, **settings))
        if self.reusing is not None:
            self.ran.append(self.reusing.looked())
        return out

    def runs(self, count, first=0, **more):
        return torch.cat([self.run(i, **more) for i in range(first, first + count)])

    @property
    def reusing(self):
        known = self.stream.coherent.neighbours
        return None if known is None else known.reusing


def sources(count, i, scene=0):
    import tiny

    return tiny.latents(1, 100 + scene) + 0.1 * tiny.latents(count, i)


def rms(a, b):
    import tiny

    return tiny.rms(a, b)


def near(a, b):
    return rms(a, b) <= NEAR


def on_road(monkeypatch, road):
    from livediffusion.host.sampling import stream as streams
    from livediffusion.host.sampling.route import route

    monkeypatch.setattr(streams, "route", lambda *args: route(*args).at_least(road, "a test"))


# -- off is off, and always is the full network -------------------------------------------------


@pytest.mark.parametrize("mode", ["onetime-negative", "full"])
def test_interval_1_is_the_full_network_bit_for_bit(mode):
    model = tiny_model()
    assert torch.equal(Live(reusing(model, 1), mode=mode).runs(5), Live(model, mode=mode).runs(5))


def test_an_ordinary_sampler_gives_what_it_gave():
    from compiled_models import sampled_once

    model = tiny_model()
    assert torch.equal(sampled_once(reusing(model)), sampled_once(model))


def test_without_it_the_stream_forgets():
    import pairs

    live = Live(reusing(tiny_model()))
    live.runs(5)
    assert live.reusing.size > 0
    live.guider = pairs.guider(tiny_model())
    live.run(5)
    assert live.stream.coherent.neighbours is None


# -- roads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("road", "mode", "frames"),
    [("PREPARED", "onetime-negative", 2), ("PREPARED", "full", 1), ("GUIDER", "full", 2),
     ("GUIDER", "onetime-negative", 1), ("PER_LEVEL", "full", 2)],
)
def test_every_road_gives_the_same(monkeypatch, road, mode, frames):
    from livediffusion.host.sampling.route import Road

    model = reusing(tiny_model(), 3)
    direct = Live(model, frames, mode=mode)
    wanted = direct.runs(6)
    on_road(monkeypatch, Road[road])
    live = Live(model, frames, mode=mode)
    assert near(live.runs(6), wanted)
    assert live.ran == direct.ran
    assert live.stream.stats()["road"] == road.lower().replace("_", " ")
    assert sum(whole for _, whole in live.ran) < sum(rows for rows, _ in live.ran)


def test_frames_that_are_sampled_alone():
    """A wrapper that nobody knows: frames have a sample() of their own, each like the one before
    it at its step."""
    import pairs

    model = reusing(tiny_model(), 3)
    sources_ = torch.cat([sources(1, i) for i in range(7)])
    clip = pairs.settings(SIGMAS, drain=True)
    live = Live(model)
    direct = live.stream.run(live.guider, sources_, clip)
    strange = model.clone()
    strange.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"])
    )
    alone = Live(strange)
    out = alone.stream.run(alone.guider, sources_, clip)
    assert alone.stream.stats()["road"] == "per frame"
    assert near(out, direct)
    assert alone.reusing.looked() == live.reusing.looked()


def test_a_node_that_is_wrapped_around_the_network_has_it_run_whole(monkeypatch):
    from comfy.patcher_extension import WrappersMP
    from livediffusion.host.models import looks

    def theirs(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    known = looks._look_of
    monkeypatch.setattr(
        looks, "_look_of", lambda one: looks.Look.ROWS if one is theirs else known(one)
    )
    base = tiny_model()
    wrapped = base.clone()
    ours = reusing(base).clone()
    for patcher in (wrapped, ours):
        patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", theirs)
    live = Live(ours)
    assert torch.equal(live.runs(6), Live(wrapped).runs(6))
    assert "wrapped the UNet" in live.stream.stats()["reuse"]
    assert all(rows == whole for rows, whole in live.ran)


# -- what comes between ---------------------------------------------------------------------------


def test_a_cut_has_everything_computed_at_once():
    live = Live(reusing(tiny_model(), 4, awake=0.5))
    live.runs(8)
    assert {whole for _, whole in live.ran[4:]} <= {0, 1}
    live.ran.clear()
    live.runs(8, 8, scene=1)
    # the new scene is another at every step that it comes to, for the first time
    assert [whole for _, whole in live.ran[:3]] == [1 + due for due in expected(8, 4)]
    assert {whole for _, whole in live.ran[3:]} <= {0, 1}


def expected(first, interval):
    """Of the three ticks behind a cut, whether one of the old frames is due."""
    return [
        sum((tick + k) % interval == 0 for k in range(tick - first + 1, 3))
        for tick in range(first, first + 3)
    ]


@pytest.mark.parametrize("interval", [2, 3, 8])
def test_a_prompt_that_changes_in_flight_is_in_nothing_that_is_kept(interval):
    """Of a scene that stands still what is kept is what would be computed, so pictures are the full
    network's to rounding; also of frames that began under one prompt and go on under another."""
    import pairs

    model, latents = tiny_model(), sources(1, 0)
    both = Live(reusing(model, interval)), Live(model)
    prompts = iter([5, 7, 1, 3])
    for i in range(24):
        if i % 6 == 4:
            prompt = next(prompts)
            for live in both:
                live.guider = pairs.guider(live.guider.model_patcher, prompt=prompt)
        ours, theirs = (live.run(i, latents=latents, immediate=True) for live in both)
        assert near(ours, theirs), i
    rows, whole = (sum(part) for part in zip(*both[0].ran, strict=True))
    assert whole < rows, "something was reused"


def test_a_still_picture_is_never_awake():
    live = Live(reusing(tiny_model(), 16, awake=0.99))
    for _ in range(12):
        live.run(0)
    assert sum(whole for _, whole in live.ran[3:]) == sum(
        (tick + k) % 16 == 0 for tick in range(3, 12) for k in range(3)
    )


@pytest.mark.parametrize("road", ["DIRECT", "GUIDER", "PER_LEVEL"])
def test_an_interrupt_in_a_tick_leaves_nothing_behind(monkeypatch, road):
    """In its last call, behind what is kept: the places are forgotten, and computed anew."""
    from livediffusion.host.sampling.route import Road

    on_road(monkeypatch, Road[road])
    model = reusing(tiny_model(), 2)
    live, plain = Live(model), Live(tiny_model())
    live.runs(6), plain.runs(6)
    unet, calls = model.model.diffusion_model, [0]
    last = 3 if road == "PER_LEVEL" else 1

    def broken(*args):
        calls[0] += 1
        if calls[0] == last:
            raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        handle = unet.out.register_forward_pre_hook(broken)
        patch.setattr("livediffusion.host.models.looks.of_model", lambda model: iter(()))
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            live.run(99)
        handle.remove()
    live.ran.clear()
    out = live.run(6)
    # what had been kept for this tick's whole rows is gone, what had not is there
    assert live.ran[0][1] >= 2 or road != "DIRECT"
    assert out.isfinite().all()
    live.runs(8, 7)
    assert live.reusing.looked() == (0, 0)


def test_two_streams_share_nothing():
    model = reusing(tiny_model())
    apart = [Live(model).runs(8, first) for first in (0, 50)]
    lives = [Live(model), Live(model)]
    together = [[], []]
    for i in range(8):
        for live, outs, first in zip(lives, together, (0, 50), strict=True):
            outs.append(live.run(first + i))
    assert all(torch.equal(torch.cat(a), b) for a, b in zip(together, apart, strict=True))


def test_a_clip_begins_with_nothing():
    import pairs

    live = Live(reusing(tiny_model(), 4))
    clip, settings = sources(6, 0), pairs.settings(SIGMAS, drain=True)
    first = live.stream.run(live.guider, clip, settings)
    one = live.reusing.looked()
    # ticks have gone on, so other rows are due
    again = live.stream.run(live.guider, clip, settings)
    assert again[0].isfinite().all() and near(again[:1], first[:1])
    assert live.reusing.looked()[1] >= 3 and one[1] >= 3


@pytest.mark.parametrize("road", ["DIRECT", "GUIDER"])
def test_a_bad_frame_poisons_nobody(monkeypatch, road):
    from livediffusion.host.sampling.route import Road

    on_road(monkeypatch, Road[road])
    live = Live(reusing(tiny_model(), 2, awake=0.3))
    for i in range(14):
        latents = sources(1, i)
        if i in (0, 7, 8):
            latents[:] = float("nan")
        out = live.run(i, latents=latents)
        assert i < 2 or out.isfinite().all(), i
        assert all(bank.features.isfinite().all() for bank in live.reusing.banks), i
    assert live.stream.stats()["dropped"] > 0


def test_another_weight_begins_anew():
    import pairs
    from compiled_models import lora

    base = tiny_model()
    live = Live(reusing(base, 4))
    live.runs(8)
    live.ran.clear()
    live.guider = pairs.guider(reusing(lora(base, 0.7), 4))
    out = live.runs(4, 8)
    assert live.ran[0] == (3, 3)
    assert sum(whole for _, whole in live.ran[1:]) <= 3
    assert out.isfinite().all()


def test_a_prompt_for_each_frame():
    """Of a batch of prompts each frame has its own; the same one comes again at its index."""
    import tiny

    live = Live(reusing(tiny_model(), 4), frames=2)
    words = torch.cat([tiny.conditioning(seed)[0][0] for seed in (1, 5)])
    live.guider.set_conds([[words, {}]], tiny.conditioning(2))
    live.runs(8)
    assert sum(whole for _, whole in live.ran[3:]) < sum(rows for rows, _ in live.ran[3:]) / 2
    live.ran.clear()
    live.guider.set_conds([[words.flip(0), {}]], tiny.conditioning(2))
    live.run(8)
    assert live.ran[0][1] >= 2, "those that enter have another prompt"


def test_a_noise_of_its_own_for_each_frame_is_no_features_of_another():
    import pairs
    from livediffusion.host.sampling.noises import Brought

    live = Live(reusing(tiny_model(), 8))
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    live.stream.run(
        live.guider, sources(6, 0), pairs.settings(SIGMAS, drain=True), brought=Brought(entry=noise)
    )
    rows, whole = live.reusing.looked()
    assert rows == whole == 18


NODES = ["PerturbedAttentionGuidance", "FreeU_V2", "SelfAttentionGuidance"]


@pytest.mark.parametrize("node", NODES)
def test_nodes_beside_it(node):
    import importlib

    file = {"P": "nodes_pag", "S": "nodes_sag", "F": "nodes_freelunch"}[node[0]]
    kind = getattr(importlib.import_module(f"comfy_extras.{file}"), node)
    given = {"P": (2.0,), "S": (0.5, 2.0), "F": (1.1, 1.2, 0.9, 0.4)}[node[0]]
    if hasattr(kind, "execute"):
        patched = kind.execute(tiny_model(), *given).args[0]
    else:
        patched = getattr(kind(), kind.FUNCTION)(tiny_model(), *given)[0]
    outs = [
        Live(model, mode="full", cfg=2.0).runs(4)
        for model in (patched, reusing(patched, 1), reusing(patched, 2))
    ]
    assert torch.equal(outs[0], outs[1])
    # one takes down the attention of the middle in every call
    assert rms(outs[2], outs[0]) < 0.2 and (rms(outs[2], outs[0]) == 0) == (node == NODES[2])


@pytest.mark.parametrize("interval", [1, 2])
def test_a_controlnet_is_not_in_its_way(interval):
    """test_reuse.py has what it makes of the pictures."""
    import parts
    import tiny

    net = parts.control_net("SD1.5").copy().set_cond_hint(parts.image().movedim(-1, 1), 0.8)
    positive = [[tokens, {**extra, "control": net, "control_apply_to_uncond": True}]
                for tokens, extra in tiny.conditioning(1)]  # fmt: skip
    models = reusing(tiny_model(), interval), tiny_model()
    ours, plain = (Live(model, mode="full", cfg=2.0) for model in models)
    for live in (ours, plain):
        live.guider.set_conds(positive, tiny.conditioning(2))
    # not to the bit: counting FLOPs hooks modules for a moment, behind which rounding is another
    assert near(ours.runs(5), plain.runs(5)) == (interval == 1)
    ran = sum(whole for _, whole in ours.ran) / sum(rows for rows, _ in ours.ran)
    assert (ran < 0.8) == (interval == 2)


# -- what is told ---------------------------------------------------------------------------------


def test_the_node_says_what_share_of_the_network_ran(monkeypatch):
    import pairs
    from livediffusion.host.models.coherence import depth_of
    from livediffusion.host.models.flops import cost_of
    from livediffusion.host.models.walk import is_inner
    from livediffusion.host.sampling import reusing as looking

    monkeypatch.setattr(looking, "_TOLD", 8)
    said = []
    live = Live(reusing(tiny_model(), 2, tell=said.append))
    for i in range(16):
        live.stream.run(live.guider, sources(1, i), pairs.settings(SIGMAS))
    unet = tiny_model().model.diffusion_model
    depth = depth_of(unet, DEPTH)
    cost = cost_of(unet, (4, 8, 8), 8)
    inner = sum(f for name, f in cost.parts.items() if is_inner(name, depth, unet)) / cost.whole
    assert len(said) == 2
    assert said[1] == f"{1 - inner / 2:.0%} of the network runs"
    stats = live.stream.stats()
    assert stats["reuse"] == f"{1 - inner / 2:.0%} of the network"
    assert stats["kept_mb"] > 0


def test_the_embedded_model():
    """Its own layout, by hand: at every other frame its inside is that of the frame before."""
    import framewise
    import pairs
    import tiny
    from livediffusion.demo import loader
    from livediffusion.host.models.coherence import depth_of
    from livediffusion.host.sampling.stream import Stream

    model, depth = loader.load_model(disable_dynamic=True), "finest level"
    unet = model.model.diffusion_model
    at, kept, number = len(unet.output_blocks) - 1 - depth_of(unet, depth), [], 0

    def patch(h, skip, extra):
        if extra["block"] == ("output", at):
            if number % 2 == 0:
                kept[:] = [h.clone()]
            h = kept[0].clone()
        return h, skip

    by_hand = model.clone()
    by_hand.set_model_output_block_patch(patch)
    words = [[torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)), {}]]
    asked = pairs.settings((2.0, 0.0))
    both = reusing(model, 2, depth), by_hand
    streams = [(Stream(), framewise.residual(one, words)) for one in both]
    outs = []
    for number in range(5):
        ours, wanted = (s.run(g, tiny.latents(1, number, 16, 48), asked) for s, g in streams)
        assert near(ours, wanted), number
        outs.append(ours)
    plain = Stream()
    guider = framewise.residual(model, words)
    full = [plain.run(guider, tiny.latents(1, i, 16, 48), asked) for i in range(5)]
    assert [near(a, b) for a, b in zip(outs, full, strict=True)] == [True, False, True, False, True]
