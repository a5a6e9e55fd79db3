"""Live Reuse against a naive reference: the full UNet for each row, features put in by hand
(tests/reused.py)."""

import functools
import os
import random

import pytest
from tiny_models import forget, inference, tiny_model  # noqa: F401

pytestmark = pytest.mark.comfy

SIGMAS = (10.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.0)
MODES = ("off", "self-negative", "onetime-negative", "full")
DEPTHS = ("outermost block", "two blocks", "finest level")
NEAR = 1e-5
LONG = "LIVEDIFFUSION_LONG" in os.environ


@functools.cache
def conditioning(seed, width, pooled=None):
    """The same as long as nobody writes another prompt, whatever else changes."""
    import tiny

    return tiny.conditioning(seed, width=width, pooled=pooled)


class Both:
    """A stream that reuses, and the naive one.

    Args:
        moves: how much of a frame's picture is another than the one before's.
        control: a ControlNet with its hint.
    """

    def __init__(self, model, frames=1, depth=DEPTHS[0], moves=0.1, control=None):
        from livediffusion.host.models.coherence import depth_of
        from livediffusion.host.sampling.stream import Stream
        from reused import Naive

        unet = model.model.diffusion_model
        blocks = len(unet.output_blocks)
        self.stream, self.frames, self.depth, self.moves = Stream(frames), frames, depth, moves
        residuals = None if control is None else residuals_of(control, model.model)
        self.naive = Naive(model.model, blocks - 1 - depth_of(unet, depth), residuals)
        self.control = control
        self.base, self.asked, self.count = model, None, 0
        self.compared, self.worst = 0, 0.0

    def latents(self, size, scene=0):
        import tiny

        channels = self.base.model.latent_format.latent_channels
        still = tiny.latents(1, 100 + scene, size, channels)
        self.count += 1
        return still + self.moves * tiny.latents(self.frames, self.count, size, channels)

    def run(self, n=4, size=8, mode="self-negative", cfg=1.4, delta=1.0, prompt=1, seed=0,
            interval=2, awake=0.0, scene=0, model=None, first=0, bad=()):  # fmt: skip
        """One run of both; notes how far they are apart."""
        import pairs
        import tiny
        from livediffusion.engine.blocks.schedule import Reuse
        from livediffusion.engine.guidance import Guidance
        from livediffusion.engine.noise import SlotNoise
        from livediffusion.host.models.coherence import attach
        from livediffusion.host.sampling.guider import RCFGGuider

        base = self.base if model is None else model
        config = base.model.model_config.unet_config
        width, pooled = config["context_dim"], config.get("adm_in_channels")
        made_of = interval, awake, id(base)
        if self.asked is None or self.asked[0] != made_of:
            self.model = attach(base, reuse=Reuse(interval, self.depth, awake))
        words = conditioning(prompt, width, pooled), conditioning(2, width, pooled)
        if self.asked != (made_of, mode, cfg, delta, prompt):
            self.asked = made_of, mode, cfg, delta, prompt
            self.guider = RCFGGuider(self.model, Guidance(mode, cfg, delta))
            self.guider.set_conds(self.controlled(words[0]), words[1])
        sigmas = SIGMAS[first : first + n] + SIGMAS[-1:]
        latents = self.latents(size, scene)
        for i, value in bad:
            latents[i] = value
        ours = self.stream.run(self.guider, latents, pairs.settings(sigmas, seed=seed))
        told = prompt, [cond[0][0] for cond in words]
        inner = self.naive.model = base.model
        wanted = self.naive.run(
            inner.process_latent_in(latents), [told] * self.frames, sigmas,
            SlotNoise(seed, tuple(latents.shape[1:])), (mode, cfg, delta),
            {"interval": interval, "awake": awake}, made_of,
            ys=[cond[0][1].get("pooled_output") for cond in words],
        )  # fmt: skip
        if wanted is not None:
            wanted = inner.process_latent_out(wanted)
            error = tiny.rms(ours, wanted) if wanted.any() else float(ours.abs().max())
            assert error <= NEAR, (self.count, error)
            self.compared += 1
        return ours

    def controlled(self, positive):
        """As ControlNetApplyAdvanced gives it."""
        extra = {"control": self.control, "control_apply_to_uncond": True}
        own = extra if self.control is not None else {}
        return [[tokens, {**known, **own}] for tokens, known in positive]

    def same_rows(self):
        """Whether as many rows ran whole as by the naive stream, since this was asked last."""
        ran, self.naive.ran = self.naive.ran, []
        return self.stream.coherent.neighbours.reusing.looked() == (
            sum(rows for _, rows in ran), sum(whole for whole, _ in ran),
        )  # fmt: skip


def residuals_of(control, model):
    """What a ControlNet gives a row by itself, as Naive takes it."""
    alone = control.copy()
    alone.pre_run(model, model.model_sampling.percent_to_sigma)
    return lambda x, sigma, words: alone.get_control(x, sigma, {"c_crossattn": words}, 1, {})


CASES = [
    (n, f, mode, depth, interval)
    for i, (n, f, interval) in enumerate(
        [(1, 1, 2), (1, 2, 3), (2, 1, 2), (3, 2, 3), (4, 1, 2), (4, 2, 4), (5, 1, 3), (8, 1, 2),
         (6, 1, 2), (7, 1, 2),
         *[(6, 2, 2), (7, 1, 16), (2, 2, 2), (3, 1, 2), (8, 2, 7)] * LONG]
    )
    for mode in (MODES if LONG else [MODES[i % 4]])
    for depth in (DEPTHS if LONG else [DEPTHS[i % 3]])
]  # fmt: skip


@pytest.mark.parametrize(("n", "f", "mode", "depth", "interval"), CASES)
def test_equals_the_naive_stream(n, f, mode, depth, interval):
    """All modes and depths with LIVEDIFFUSION_LONG set."""
    both = Both(tiny_model(), f, depth)
    for _ in range(n + interval + 1):
        both.run(n, mode=mode, interval=interval)
    assert both.compared >= interval
    assert both.stream.stats()["road"] == "direct"
    assert both.same_rows()


CHANGES = {
    "prompt": lambda c: {"prompt": c.randrange(1, 4)},
    "guidance": lambda c: {"cfg": c.choice([1.0, 1.2, 1.8]), "delta": c.choice([1.0, 0.5])},
    "seed": lambda c: {"seed": c.randrange(3)},
    "mode": lambda c: {"mode": c.choice(["off", "full"])},
    "interval": lambda c: {"interval": c.randint(1, 5)},
    "awake": lambda c: {"awake": c.choice([0.0, 0.3, 0.9])},
    "scene": lambda c: {"scene": c.randrange(3)},
    "steps": lambda c: {"n": c.randint(1, 5)},
    "strength": lambda c: {"first": c.randint(0, 2)},
    "size": lambda c: {"size": c.choice([8, 12])},
    "nothing": lambda c: {},
}


@pytest.mark.parametrize("chance", range(int(os.environ.get("LIVEDIFFUSION_LONG", "2"))))
def test_everything_changes(chance):
    """Each at its own time, with a frame of NaN, or one that overflows, now and then.
    LIVEDIFFUSION_LONG: how many such streams."""
    choice = random.Random(chance)
    both = Both(tiny_model(), choice.choice([1, 2]), choice.choice(DEPTHS))
    # a bad frame is something else on each road where guidance points at its source
    asked = {"mode": "off", "n": 3, "first": 2}
    for _ in range(18):
        name = choice.choice([*CHANGES, "nothing", "nothing", "nothing"])
        asked |= CHANGES[name](choice)
        bad = ()
        if choice.random() < 0.15:
            bad = [(choice.randrange(both.frames), choice.choice([float("nan"), 1e30]))]
        both.run(**asked, bad=bad)
    assert both.compared > 8
    assert both.same_rows()


@pytest.mark.parametrize("layout", ["SD2.1", "SDXL"])
def test_layouts(layout):
    both = Both(tiny_model(layout), depth=DEPTHS[1])
    for _ in range(5):
        both.run(2, mode="full", interval=2, first=4)
    assert both.compared and both.same_rows()


def test_the_embedded_model():
    from livediffusion.demo import loader

    both = Both(loader.load_model(disable_dynamic=True), depth=DEPTHS[2])
    for _ in range(8):
        both.run(4, size=16, interval=3)
    assert both.compared > 3 and both.same_rows()


@pytest.mark.parametrize("depth", DEPTHS if LONG else DEPTHS[1:2])
def test_a_controlnet(depth):
    """Every row takes its residuals, in the blocks that it runs."""
    import parts

    net = parts.control_net("SD1.5").set_cond_hint(parts.image().movedim(-1, 1), 0.8)
    both = Both(tiny_model(), depth=depth, control=net)
    for _ in range(7):
        both.run(3, mode="full", cfg=2.0, interval=2)
    assert both.compared > 3 and both.same_rows()
