"""Contract C1 against ComfyUI's own SamplerCustomAdvanced, run frame by frame."""

import functools
import os

import pytest
import torch

pytestmark = pytest.mark.comfy

RULES = ("lcm", "euler", "dpmpp_2m", "unipc", "deis", "pfdiff-1_1", "pfdiff-3_1")
STOCK = {"unipc": "uni_pc"}  # ComfyUI's names where ours differ
# in one step the others are euler, but for ComfyUI's uni_pc, which does nothing at all
STEPS = [(n, rule) for n in (1, 2, 4) for rule in RULES[:3]] + [
    pytest.param(n, rule, marks=pytest.mark.slow) for n in (2, 4) for rule in RULES[3:]
]
# all of them on the primary ComfyUI, some on the other
PREDICTIONS = ["epsilon", *(pytest.param(p, marks=pytest.mark.slow) for p in ("v", "flow"))]
SEED = 7
LONG = "LIVEDIFFUSION_LONG" in os.environ


@pytest.fixture(scope="module", autouse=True)
def forget():
    """ComfyUI's patchers complain if they outlive the interpreter's modules."""
    yield
    _model.cache_clear()
    _one_by_one.cache_clear()


class FixedNoise:
    """A NOISE that gives every frame the noise of slot 0."""

    seed = SEED

    def __init__(self, noise):
        self.noise = noise

    def generate_noise(self, latent):
        return self.noise.slot(0).expand_as(latent["samples"]).clone()


def _batches(prediction):
    """Frames N and frames per slot F; the ring itself has all of them in tests/engine."""
    if prediction != "epsilon":
        return [(5, 2)]
    if LONG:
        return [(frames, per_slot) for frames in (1, 3, 8) for per_slot in (1, 2)]
    return [(1, 2), (3, 2), (6, 1)]


@functools.cache
def _tiny():
    import tiny

    return tiny


@functools.cache
def _model(prediction):
    return _tiny().model(prediction)


def _guider(prediction, mode):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    if mode == "off":
        guider = Guider_Basic(_model(prediction))
        guider.set_conds(_tiny().conditioning(1))
        return guider
    guider = comfy.samplers.CFGGuider(_model(prediction))
    guider.set_conds(_tiny().conditioning(1), _tiny().conditioning(2))
    guider.set_cfg(2.5)
    return guider


def _sigmas(prediction, n, rule):
    """Levels that end in 0; for unipc above it, because ComfyUI's own writes 0.001 over a 0."""
    sampling = _model(prediction).get_model_object("model_sampling")
    steps = torch.linspace(900, 100, n) if n > 1 else torch.tensor([600.0])
    levels = [float(sampling.sigma(t)) for t in steps] + [0.05 if rule == "unipc" else 0.0]
    return torch.tensor(levels)


def _sampler(rule, noise):
    import comfy.samplers

    step = iter(range(1, 100))

    def slot_noise(sigma, sigma_next):
        return noise.slot(next(step))[None]

    if rule.startswith("pfdiff"):
        from livediffusion.nodes.sampling import LivePFDiff

        return LivePFDiff.execute("euler", *map(int, rule[-3:].split("_"))).args[0]
    if rule in STOCK:
        return comfy.samplers.sampler_object(STOCK[rule])
    return comfy.samplers.ksampler(rule, {"noise_sampler": slot_noise} if rule == "lcm" else {})


@functools.cache
def _one_by_one(prediction, mode, rule, n):
    """As many frames as the batches need, each alone through SamplerCustomAdvanced."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
    from livediffusion.engine.noise import SlotNoise

    noise = SlotNoise(SEED, (4, 8, 8))
    out = []
    for frame in _tiny().latents(8)[: max(_batches(prediction))[0]].split(1):
        result = SamplerCustomAdvanced.execute(
            FixedNoise(noise), _guider(prediction, mode), _sampler(rule, noise),
            _sigmas(prediction, n, rule), {"samples": frame},
        )  # fmt: skip
        out.append(result.args[0]["samples"])
    return torch.cat(out)


@pytest.mark.parametrize("mode", ["off", "full"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("n", "rule"), STEPS)
def test_stream_equals_frame_by_frame(n, rule, prediction, mode):
    from livediffusion.host.sampling.stream import Settings, Stream

    expected = _one_by_one(prediction, mode, rule, n)
    sigmas = tuple(_sigmas(prediction, n, rule).tolist())
    guider = _guider(prediction, mode)
    for frames, per_slot in _batches(prediction):
        settings = Settings(sigmas, rule, SEED, drain=True)
        out = Stream(per_slot).run(guider, _tiny().latents(8)[:frames], settings)
        assert out.shape[0] == frames
        error = _tiny().rms(out, expected[:frames])
        assert error <= 1e-5, f"N={frames} F={per_slot}: {error:.2e}"


@pytest.mark.parametrize("mode", ["off", "full"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("n", "rule"), STEPS[:9])
def test_stream_batch_inside_sampler_custom_advanced(n, rule, prediction, mode):
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.nodes.sampling import LiveStreamBatch

    expected = _one_by_one(prediction, mode, rule, n)
    noise = SlotNoise(SEED, (4, 8, 8))
    for frames, per_slot in _batches(prediction):
        sampler = LiveStreamBatch.execute(rule, per_slot).args[0]
        result = SamplerCustomAdvanced.execute(
            FixedNoise(noise), _guider(prediction, mode), sampler, _sigmas(prediction, n, rule),
            {"samples": _tiny().latents(8)[:frames]},
        )  # fmt: skip
        error = _tiny().rms(result.args[0]["samples"], expected[:frames])
        assert error <= 1e-5, f"N={frames} F={per_slot}: {error:.2e}"


@pytest.mark.parametrize("mode", ["off", "full"])
@pytest.mark.parametrize("alone", [False, True], ids=["direct", "per frame"])
def test_what_ends_above_zero_has_a_prediction_of_its_own(mode, alone):
    """SamplerCustomAdvanced's second output, as after SplitSigmas."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.nodes.sampling import LiveStreamBatch

    noise, frames = SlotNoise(SEED, (4, 8, 8)), _tiny().latents(5)
    sigmas = _sigmas("epsilon", 4, "euler")[:3]

    def guider():
        made = _guider("epsilon", mode)
        if alone:
            made.predict_noise = functools.partial(type(made).predict_noise, made)
        return made

    def sampled(sampler, latents):
        out = SamplerCustomAdvanced.execute(
            FixedNoise(noise), guider(), sampler, sigmas, {"samples": latents}
        )
        return [latent["samples"] for latent in out.args]

    each = [sampled(_sampler("euler", noise), frame) for frame in frames.split(1)]
    for per_slot in (1, 2):
        got = sampled(LiveStreamBatch.execute("euler", per_slot).args[0], frames)
        for ours, theirs in zip(got, map(torch.cat, zip(*each, strict=True)), strict=True):
            assert _tiny().rms(ours, theirs) <= 1e-5
        assert _tiny().rms(got[1], got[0]) > 1e-2
