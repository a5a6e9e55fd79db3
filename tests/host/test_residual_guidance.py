"""Residual guidance against the paper's equations, and the public package where it is right.

Both references work on the same ComfyUI UNet, in the paper's own variables (epsilon, alpha, beta).
"""

import types

import pytest
import torch

pytestmark = pytest.mark.comfy

INDICES = {1: "32", 2: "26, 40", 4: "18, 26, 35, 45"}
SEED, CFG, DELTA = 5, 1.7, 0.8


@pytest.fixture(scope="module")
def world():
    import tiny

    model = tiny.model("epsilon")
    positive, negative = tiny.conditioning(1), tiny.conditioning(2)
    scale = model.model.latent_format.scale_factor

    def eps(x, t, cond):
        context = cond[0][0].expand(x.shape[0], -1, -1)
        return model.model.diffusion_model(x, t.float(), context=context)

    return types.SimpleNamespace(
        model=model, positive=positive, negative=negative, scale=scale, eps=eps, tiny=tiny
    )


def sigmas(world, n):
    from livediffusion.nodes.schedules import LiveTimesteps

    return tuple(LiveTimesteps.execute(world.model, INDICES[n], 50).args[0].tolist())


def guider(world, mode, cfg=CFG, delta=DELTA):
    from livediffusion.nodes.sampling import LiveRCFGGuider

    return LiveRCFGGuider.execute(
        world.model, world.positive, cfg, delta, mode, world.negative
    ).args[0]


def slots(n):
    from livediffusion.engine.noise import SlotNoise

    noise = SlotNoise(SEED, (4, 8, 8))
    return torch.stack([noise.slot(k) for k in range(n)])


def timesteps(n):
    """The LCM grid written out: 50 of 1000 training timesteps, 999 first."""
    grid = [999 - 20 * i for i in range(50)]
    return [grid[int(i)] for i in INDICES[n].split(",")]


def alphas_cumprod():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def paper(world, z, n, mode):
    """One frame, arXiv 2312.12491, LCM steps, in the paper's variables.

    Eq. 5: the virtual residual noise is (x - sqrt(alpha) * reference) / sqrt(beta).
    Eq. 6: eps = delta * R + cfg * (eps_positive - delta * R).
    Onetime-negative takes the reference from the negative prompt at the first step.
    """
    noise, reference = slots(n), z
    x = None
    for k, t in enumerate(timesteps(n)):
        bar = alphas_cumprod()[t]
        a, b = float(bar.sqrt()), float((1 - bar).sqrt())
        x = a * (z if k == 0 else x0) + b * noise[k]  # noqa: F821
        step = torch.tensor([t])
        eps = world.eps(x[None], step, world.positive)[0]
        if mode == "full":
            negative = world.eps(x[None], step, world.negative)[0]
            eps = negative + CFG * (eps - negative)
        elif mode != "off":
            if mode == "onetime-negative" and k == 0:
                reference = (x - b * world.eps(x[None], step, world.negative)[0]) / a
            residual = (x - a * reference) / b
            eps = DELTA * residual + CFG * (eps - DELTA * residual)
        x0 = (x - b * eps) / a
    return x0


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("mode", ["off", "self-negative", "onetime-negative", "full"])
@torch.inference_mode()
def test_equals_the_papers_equations(world, mode, n):
    from livediffusion.host.sampling.stream import Settings, Stream

    latents = world.tiny.latents(5)
    settings = Settings(sigmas(world, n), "lcm", SEED, drain=True)
    out = Stream().run(guider(world, mode), latents, settings) * world.scale
    want = torch.stack([paper(world, z * world.scale, n, mode) for z in latents])
    assert world.tiny.rms(out, want) <= 1e-5


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("mode", ["self-negative", "onetime-negative", "full", "off"])
@torch.inference_mode()
def test_is_a_guider_for_ordinary_samplers(world, mode, n):
    """SamplerCustomAdvanced with ComfyUI's own lcm gives what the stream gives."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced
    from livediffusion.host.sampling.stream import Settings, Stream

    latents, noise = world.tiny.latents(3), slots(4)
    step = iter(range(1, 9))
    sampler = comfy.samplers.ksampler(
        "lcm", {"noise_sampler": lambda *_: noise[next(step)].expand(3, -1, -1, -1)}
    )
    generator = types.SimpleNamespace(
        seed=SEED, generate_noise=lambda _: noise[0].expand(3, -1, -1, -1).clone()
    )
    ours = guider(world, mode)
    out = SamplerCustomAdvanced.execute(
        generator, ours, sampler, torch.tensor(sigmas(world, n)), {"samples": latents}
    ).args[0]["samples"]
    settings = Settings(sigmas(world, n), "lcm", SEED, drain=True)
    assert world.tiny.rms(out, Stream().run(ours, latents, settings)) <= 1e-5


class Pipe:
    """What the public class needs of a diffusers pipeline, with our UNet inside."""

    vae_scale_factor, device, vae, text_encoder = 8, torch.device("cpu"), None, None

    def __init__(self, world):
        from diffusers import LCMScheduler

        self.world = world
        self.scheduler = LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )

    def encode_prompt(self, **kwargs):
        return self.world.positive[0][0], self.world.negative[0][0]

    def unet(self, x, t, encoder_hidden_states, return_dict=False):
        return (self.world.model.model.diffusion_model(x, t.float(), encoder_hidden_states),)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("none", "off"),
        ("self", "self-negative"),
        ("initialize", "onetime-negative"),
        ("full", "full"),
    ],
)
@torch.inference_mode()
def test_equals_the_public_package_where_that_is_right(world, theirs, ours):
    """streamdiffusion 0.1.1: n = 4, noise on, one frame per slot, nothing changed live."""
    from livediffusion.host.sampling.stream import Settings, Stream
    from streamdiffusion import StreamDiffusion

    n, latents = 4, world.tiny.latents(7)
    public = StreamDiffusion(Pipe(world), [18, 26, 35, 45], torch.float32, 64, 64, cfg_type=theirs)
    public.prepare("", "", 50, guidance_scale=CFG, delta=DELTA)
    public.init_noise = slots(n)
    out = []
    for z in latents:
        noised = public.add_noise(z[None] * world.scale, public.init_noise[0], 0)
        out.append(public.predict_x0_batch(noised))
    stream = Stream()
    settings = Settings(sigmas(world, n), "lcm", SEED)
    guide = guider(world, ours)
    mine = [stream.run(guide, z[None], settings) * world.scale for z in latents]
    # the first n - 1 outputs of theirs come from its zero buffer
    assert world.tiny.rms(torch.cat(mine[n - 1 :]), torch.cat(out[n - 1 :])) <= 1e-4


def test_self_negative_at_one_step_is_bounded_where_the_public_package_is_not(world):
    """peers.md 2.8 row 3, over 200 frames of the same picture."""
    from livediffusion.host.sampling.stream import Settings, Stream
    from streamdiffusion import StreamDiffusion

    z = world.tiny.latents(1)
    stream, guide = Stream(), guider(world, "self-negative", 1.4, 1.0)
    settings = Settings(sigmas(world, 1), "lcm", SEED)
    ours = [float(stream.run(guide, z, settings).abs().max()) for _ in range(200)]
    assert ours == [ours[0]] * 200
    public = StreamDiffusion(Pipe(world), [32], torch.float32, 64, 64, cfg_type="self")
    public.prepare("", "", 50, guidance_scale=1.4, delta=1.0)
    with torch.inference_mode():
        noised = public.add_noise(z * world.scale, public.init_noise[0], 0)
        theirs = [float(public.predict_x0_batch(noised).abs().max()) for _ in range(12)]
    assert theirs[-1] > 5 * theirs[0], "the baseline no longer breaks here: compare it fully"
