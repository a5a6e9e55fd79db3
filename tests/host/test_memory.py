"""Live Memory against a naive reference: a list of frames, a model call for each, lists for a bank
and a softmax per row (tests/coherent.py)."""

import dataclasses
import os
import random

import pytest
import torch
from tiny_models import forget, tiny_model  # noqa: F401

pytestmark = pytest.mark.comfy

SIGMAS = (10.0, 5.0, 2.0, 0.5, 0.0)


DEFAULT = {
    "frames": 2, "interval": 2, "bank": "queue", "fuse": 0.4, "threshold": 0.5, "levels": "all",
}  # fmt: skip
# with more of it a queue's frames are alike to rounding, and which is nearest is chance


class Both:
    """A stream with a memory, and the naive one.

    Args:
        levels: see coherent.Naive.
        control: a ControlNet with its picture, for both prompts.
    """

    def __init__(self, model, frames=1, levels=None, control=None):
        from coherent import Naive, Ties
        from livediffusion.host.models.coherence import places
        from livediffusion.host.sampling.stream import Stream

        unet = model.model.diffusion_model
        outs = {place.key for place in places(unet) if place.fused}
        self.model, self.stream, self.control = model, Stream(frames), control
        self.pooled = model.model.model_config.unet_config.get("adm_in_channels")
        options = model.model_options.get("transformer_options")
        self.naive = Naive(model.model, outs, options, levels)
        Ties.begin()
        self.changed = None

    @torch.inference_mode()
    def run(self, latents, sigmas=SIGMAS, seed=0, mode="self-negative", cfg=1.4, delta=1.0,
            prompt=1, **memory):  # fmt: skip
        """What both give; None of the naive one while nothing leaves."""
        import pairs
        import tiny
        from livediffusion.engine.coherence.neighbours import Memory
        from livediffusion.engine.noise import SlotNoise
        from livediffusion.host.models.coherence import attach

        memory = {**DEFAULT, **memory}
        asked = memory, mode, cfg, delta, prompt
        told = [tiny.conditioning(number, pooled=self.pooled) for number in (prompt, 2)]
        if asked != self.changed:
            self.changed = asked
            model = attach(self.model, memory=Memory(**memory))
            self.guider = pairs.guider(model, mode, cfg, delta, prompt, pooled=self.pooled)
            if self.control is not None:
                more = {"control": self.control, "control_apply_to_uncond": True}
                positive = [[tokens, {**extra, **more}] for tokens, extra in told[0]]
                self.guider.set_conds(positive, told[1])
        ours = self.stream.run(self.guider, latents, pairs.settings(sigmas, seed=seed))
        conds = [self._given(*one[0]) for one in told]
        noise = SlotNoise(seed, tuple(latents.shape[1:]))
        inner = self.model.model
        wanted = self.naive.run(
            inner.process_latent_in(latents), conds, (sigmas, noise), (mode, cfg, delta), memory
        )
        return ours, wanted if wanted is None else inner.process_latent_out(wanted)

    def _given(self, tokens, extra):
        """See coherent.Naive.run."""
        given = {"c_crossattn": tokens}
        if self.pooled is not None:
            given["y"] = extra["pooled_output"]
        if self.control is not None:
            inner, control = self.model.model, self.control.copy()
            control.set_cond_hint(self.control.cond_hint_original, self.control.strength)
            control.pre_run(inner, inner.model_sampling.percent_to_sigma)
            told = {"c_crossattn": tokens}
            given["control"] = lambda x, sigma: control.get_control(x, sigma, told, 1, {})
        return given


def check(both, i, latents, **settings):
    import coherent

    ours, wanted = both.last = both.run(latents, **settings)
    if wanted is not None:
        assert coherent.near(ours, wanted), (i, settings)
    return wanted is not None


def to_rounding():
    """How many pictures were compared to rounding; behind a tie they are not."""
    import coherent

    return coherent.Ties.strict


@pytest.mark.parametrize(
    ("mode", "bank"),
    [("self-negative", "queue"), ("onetime-negative", "merged"), ("full", "merged")],
)
def test_equals_the_naive_memory(mode, bank):
    import tiny

    both = Both(tiny_model())
    count = sum(check(both, i, tiny.latents(1, i), mode=mode, bank=bank) for i in range(9))
    assert count == 6
    assert to_rounding() >= 6
    assert both.stream.stats()["road"] == "direct"


@pytest.mark.parametrize("preset", ["calm", "calmer"])
def test_presets(preset, monkeypatch):
    """With pictures that are alike, so that features are."""
    import coherent
    import tiny
    from livediffusion.nodes.coherence import PRESETS

    real, changed = coherent.fused, []

    def fused(o, *given):
        out = real(o, *given)
        changed.append(not torch.equal(out, o))
        return out

    monkeypatch.setattr(coherent, "fused", fused)
    both, memory = Both(tiny_model()), dataclasses.asdict(PRESETS[preset][0])
    for i in range(12):
        latents = tiny.latents(1, 50) + 0.3 * tiny.latents(1, i)
        check(both, i, latents, sigmas=SIGMAS[2:], **memory)
    assert to_rounding() >= 8
    assert any(changed) == (preset == "calmer")


def test_levels():
    """Which layers remember, and that others are as ever."""
    import tiny

    coarse = {("input", 3, 0), ("middle", 0, 0), ("output", 0, 0), ("output", 1, 0)}
    levels = {"all but the finest": coarse, "deepest": coarse}
    both = Both(tiny_model("fine"), levels=levels)
    for i in range(12):
        asked = ("all but the finest", "all", "deepest")[i // 4]
        check(both, i, tiny.latents(1, i), sigmas=SIGMAS[2:], interval=1, frames=1, levels=asked)
        layers = both.stream.coherent.neighbours.bank.of([0]).layers
        assert len(layers) == (7 if asked == "all" else 4)
    assert to_rounding() >= 8


ALWAYS = [("queue", 1, 0), ("merged", 2, 0)]  # what runs without LIVEDIFFUSION_LONG


@pytest.mark.parametrize(
    ("bank", "frames", "chance"),
    [
        (("queue", "merged")[i % 2], (1, 2, 3)[i % 3], i // 6)
        for i in range(int(os.environ.get("LIVEDIFFUSION_LONG", "2")))
    ],
)
def test_every_setting_changes_over_fifty_frames(bank, frames, chance):
    """Prompt, guidance, noise, steps, size and the memory's own, each at its own time; a bad frame
    now and then. LIVEDIFFUSION_LONG: how many such streams."""
    import tiny

    both = Both(tiny_model(), frames)
    choice = random.Random(f"{bank} {frames} {chance}")
    # a bad frame is itself something else on each road where its source is what guidance points at
    asked, counted, size = {"bank": bank, "mode": "off"}, 0, 8
    for i in range(-(-50 // frames)):
        name = choice.choice(["prompt", "cfg", "delta", "seed", "mode", "interval", "threshold",
                              "fuse", "levels", "sigmas", "frames", "nothing",
                              "nothing"])  # fmt: skip
        asked |= {
            "prompt": {"prompt": choice.randrange(9)},
            "cfg": {"cfg": choice.choice([1.0, 1.2, 1.8])},
            "delta": {"delta": choice.choice([1.0, 0.5])},
            "seed": {"seed": choice.randrange(4)},
            "mode": {"mode": choice.choice(["off", "full"])},
            "interval": {"interval": choice.randint(1, 8)},
            "threshold": {"threshold": choice.choice([0.2, 0.5, 0.8, 0.9])},
            "fuse": {"fuse": choice.choice([0.0, 0.2, 0.4, 0.8])},
            "levels": {"levels": choice.choice(["all but the finest", "all", "deepest"])},
            "sigmas": {"sigmas": choice.choice([SIGMAS, (11.0, 4.0, 1.5, 0.6, 0.0), SIGMAS[1:]])},
            "frames": {"frames": choice.randint(1, 3)},
            "nothing": {},
        }[name]
        if i * frames > 40:
            size = 16
        latents = tiny.latents(frames, i, size)
        if i == 5 or choice.random() < 0.1:
            latents[choice.randrange(frames)] = float("nan")
        counted += check(both, i, latents, **asked)
    assert counted > 20 / frames
    # a tie may come at once, and does in others
    assert to_rounding() > counted / 2 or (bank, frames, chance) not in ALWAYS
    assert both.stream.stats()["dropped"] > 0


@pytest.mark.parametrize(
    ("bank", "interval"),
    [*[(("queue", "merged")[i % 2], i) for i in range(1, 9)],
     ("merged", 2), ("merged", 4), ("queue", 1), ("queue", 3)],
)  # fmt: skip
def test_every_interval(bank, interval):
    import tiny

    both = Both(tiny_model())
    for i in range(interval + 6):
        check(both, i, tiny.latents(1, i), sigmas=SIGMAS[2:], bank=bank, interval=interval)
    assert to_rounding() > (interval + 5) / 2
    written, bank_of = -(-(interval + 5) // interval), both.stream.coherent.neighbours.bank.of
    assert max(bank_of([0]).filled) == min(2 if bank == "queue" else 1, written)


@pytest.mark.parametrize(("road", "bank"), [("DIRECT", "merged"), ("GUIDER", "queue")])
def test_outputs_are_kept_where_they_are_fused_and_nowhere_else(monkeypatch, road, bank):
    """Nor is anything patched for them; fusion that is turned on begins with a new bank."""
    import tiny
    from livediffusion.engine.coherence.exchange import Remembering
    from livediffusion.host.sampling import stream as streams
    from livediffusion.host.sampling.route import Road, route

    monkeypatch.setattr(streams, "route", lambda *args: route(*args).at_least(Road[road], "a test"))
    real, wrote = Remembering.write_out, []
    monkeypatch.setattr(
        Remembering, "write_out", lambda self, *given: wrote.append(1) or real(self, *given)
    )
    both = Both(tiny_model())
    for turn, fuse in enumerate((0.0, 0.4, 0.0)):
        wrote.clear()
        for i in range(6 * turn, 6 * turn + 6):
            check(both, i, tiny.latents(1, i), sigmas=SIGMAS[2:], bank=bank, fuse=fuse)
        neighbours = both.stream.coherent.neighbours
        layers = neighbours.bank.of([0]).layers
        outs = {name for name, layer in layers.items() if layer.unit is not None}
        assert len(layers) == 3 and len(outs) == (2 if fuse else 0)
        assert bool(wrote) == bool(fuse)
        for staged in neighbours._staged.values():
            assert {name for name, one in staged.items() if one.o is not None} == outs


@pytest.mark.parametrize("bank", ["queue", "merged"])
def test_slots_whose_pictures_are_smaller_inside_have_a_memory_of_their_own(bank):
    """Deep Shrink, at the first level only."""
    import pairs
    import tiny
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
    from livediffusion.engine.coherence.neighbours import Memory
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    given = (tiny_model(), 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic")
    if hasattr(PatchModelAddDownscale, "execute"):
        shrunk = PatchModelAddDownscale.execute(*given).args[0]
    else:
        shrunk = PatchModelAddDownscale().patch(*given)[0]
    memory = Memory(**{**DEFAULT, "bank": bank})
    stream, guider = Stream(1), pairs.guider(attach(shrunk, memory=memory), "off")
    sizes = []
    for i in range(14):
        stream.run(guider, tiny.latents(1, i, 16), pairs.settings(SIGMAS))
        sizes.append(stream.stats()["memory_mb"])
    banks = stream.coherent.neighbours.bank
    assert all(banks.of([slot]).full([slot]) for slot in range(4))
    assert banks.of([0]) is not banks.of([3]) and sizes[-1] == sizes[-6] > 0


# -- other layouts, and other nodes beside it ------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "layers", "mode", "bank"),
    [("SD2.1", 3, "self-negative", "merged"), ("SDXL", 8, "full", "queue")],
)
def test_layouts(layout, layers, mode, bank):
    """Attention two blocks deep, and a pooled prompt: every layer remembers."""
    import tiny

    both = Both(tiny_model(layout))
    for i in range(7):
        check(both, i, tiny.latents(1, i), sigmas=SIGMAS[1:], mode=mode, bank=bank)
    assert to_rounding() >= 3
    assert len(both.stream.coherent.neighbours.bank.of([0]).layers) == layers


@pytest.mark.parametrize("mode", ["full", "self-negative"])
def test_a_controlnet_beside_it(mode):
    import parts
    import tiny

    net = parts.control_net("SD1.5").copy().set_cond_hint(parts.image().movedim(-1, 1), 0.8)
    both, without = Both(tiny_model(), control=net), Both(tiny_model())
    for i in range(7):
        latents, asked = tiny.latents(1, i), {"sigmas": SIGMAS[1:], "mode": mode}
        check(both, i, latents, **asked)
        ours, _ = both.last
        other, _ = without.run(latents, **asked)
    assert to_rounding() >= 4
    assert tiny.rms(ours, other) > 1e-3, "the ControlNet acts"


def test_a_patch_in_the_place_of_cross_attention():
    """As an IP-Adapter makes one: a picture's tokens beside the prompt's, each side its own."""
    import coherent
    import tiny

    acted = []

    def looked(q, k, v, extra):
        acted.append(q.shape[0])
        sides, heads, rows = extra["cond_or_uncond"], extra["n_heads"], []
        for r in range(len(q)):
            side = sides[r * len(sides) // len(q)]
            picture = torch.randn(4, k.shape[2], generator=torch.Generator().manual_seed(side))
            own = coherent.softmax(q[r], k[r], v[r], heads)
            rows.append(own + 0.5 * coherent.softmax(q[r], picture, picture, heads))
        return torch.stack(rows)

    patched = tiny_model().clone()
    for block in (("input", 3), ("middle", 0), ("output", 1)):
        patched.set_model_attn2_replace(looked, *block)
    both, outs = Both(patched), []
    for i in range(9):
        ours, wanted = both.run(tiny.latents(1, i), sigmas=SIGMAS[1:], mode="full")
        outs.append(ours)
        # alone, frames come out n - 1 runs earlier
        assert wanted is None or coherent.near(outs[i - 2], wanted), i
    assert both.stream.stats()["road"] == "per frame" and acted
    assert to_rounding() >= 4
