"""What packs do that nobody would think of; found by people who tried."""

import types

import pytest
import torch

pytestmark = pytest.mark.comfy

SEED, LEVELS = 11, (8.0, 3.0, 1.2, 0.5, 0.0)


@pytest.fixture
def world():
    import comfy.samplers
    import tiny
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.host.sampling import alone
    from livediffusion.host.sampling.stream import Settings, Stream

    return types.SimpleNamespace(
        tiny=tiny, model=tiny.model(prompt=1.0).clone(), samplers=comfy.samplers, alone=alone,
        Settings=Settings, Stream=Stream, noise=SlotNoise(SEED, (4, 8, 8)).slot(0)[None],
    )  # fmt: skip


def guider(world, kind=None, positive=None):
    made = (kind or world.samplers.CFGGuider)(world.model)
    made.set_conds(positive or world.tiny.conditioning(1), world.tiny.conditioning(2))
    made.set_cfg(2.0)
    return made


def run(world, made, count=3, mask=None, drain=True, stream=None, **more):
    stream = stream or world.Stream()
    settings = world.Settings(LEVELS, "euler", SEED, drain=drain, **more)
    return stream.run(made, world.tiny.latents(count), settings, mask), stream


def each_alone(world, make, count=3, masks=None, noise=None):
    return torch.cat([
        make().sample(
            (world.noise if noise is None else noise).clone(), frame,
            world.samplers.ksampler("euler"), torch.tensor(LEVELS), disable_pbar=True, seed=SEED,
            denoise_mask=None if masks is None else masks[i : i + 1],
        )
        for i, frame in enumerate(world.tiny.latents(count).split(1))
    ])  # fmt: skip


ON_THE_NETWORK = {
    "hook": lambda n: n.middle_block.register_forward_hook(
        lambda m, a, out: out * (1 + 0.1 * float(out.shape[0]))
    ),
    "pre hook": lambda n: n.out.register_forward_pre_hook(lambda m, a: (a[0] - a[0].mean(),)),
    "forward": lambda n: setattr(
        n, "forward", lambda x, *a, real=n.forward, **k: real(x, *a, **k) / x.shape[0]
    ),
    "forward of a part": lambda n: setattr(
        n.out, "forward", lambda h, real=n.out.forward: real(h) - real(h).mean()
    ),
}


@pytest.mark.parametrize(
    ("what", "when"),
    # a forward put on a part while a stream runs is seen when its guider is prepared anew
    [(w, "before") for w in ON_THE_NETWORK] + [(w, "between") for w in list(ON_THE_NETWORK)[:3]],
)
def test_what_is_put_on_the_torch_modules(world, what, when):
    made, stream = guider(world), world.Stream()
    if when == "between":
        run(world, made, stream=stream)
        assert stream._kept is not None
    ON_THE_NETWORK[what](world.model.model.diffusion_model)
    out, stream = run(world, made, stream=stream)
    assert world.tiny.rms(out, each_alone(world, lambda: guider(world))) <= 1e-5
    assert stream.roads()["road"] == "per frame"


def test_comfyuis_own_guider_replaced_on_the_class(world, monkeypatch):
    real = world.samplers.CFGGuider.predict_noise
    made, stream = guider(world), world.Stream()
    settings = world.Settings(LEVELS, "euler", SEED, drain=True)
    plain = stream.run(made, world.tiny.latents(3), settings)
    monkeypatch.setattr(
        world.samplers.CFGGuider, "predict_noise",
        lambda self, x, *args, **kwargs: real(self, x, *args, **kwargs) * 0.9,
    )  # fmt: skip
    out = stream.run(made, world.tiny.latents(3), settings)
    assert world.tiny.rms(out, each_alone(world, lambda: guider(world))) <= 1e-5
    assert world.tiny.rms(out, plain) > 1e-2


def test_a_wrapper_that_catches_everything_and_counts(world):
    """Each frame is sampled once, and nothing of ours is raised through it."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def wrapper(executor, noise, latent, *args, **kwargs):
        seen.append(tuple(latent.shape))
        try:
            return executor(noise, latent, *args, **kwargs)
        except Exception:
            return latent

    world.model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "other", wrapper)
    out, _ = run(world, guider(world))
    assert seen == [(1, 4, 8, 8)] * 3
    seen.clear()
    assert world.tiny.rms(out, each_alone(world, lambda: guider(world))) <= 1e-5


@pytest.mark.parametrize("patched", [False, True])
def test_a_mask_without_added_noise(world, patched):
    if patched:
        world.model.set_model_attn2_patch(lambda q, k, v, extra: (q, k, v * 0.5))
    masks = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out, _ = run(world, guider(world), mask=masks, add_noise=False)
    nothing = torch.zeros_like(world.noise)
    want = each_alone(world, lambda: guider(world), masks=masks, noise=nothing)
    assert world.tiny.rms(out, want) <= 1e-5


def test_a_guider_keeps_its_own_rows(world):
    class Own(world.samplers.CFGGuider):
        rows = 0.5

        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs) * self.rows

    made = guider(world, Own)
    out, _ = run(world, made)
    assert made.rows == 0.5 and "rows" not in vars(made)
    assert world.tiny.rms(out, each_alone(world, lambda: guider(world, Own))) <= 1e-5


def test_a_guider_that_processes_its_conditioning_itself(world):
    """Alike for all frames it is right; one for each frame is refused in a clip, not in a run."""

    class Own(world.samplers.CFGGuider):
        def inner_sample(self, noise, *args, **kwargs):
            self.mine = {k: [dict(e) for e in es] for k, es in self.original_conds.items()}
            return super().inner_sample(noise, *args, **kwargs)

    out, _ = run(world, guider(world, Own))
    assert world.tiny.rms(out, each_alone(world, lambda: guider(world, Own))) <= 1e-5
    batch = [[torch.cat([world.tiny.conditioning(i)[0][0] for i in (1, 5, 6)]), {}]]
    with pytest.raises(ValueError, match=r"guider: Own samples in a way of its own"):
        run(world, guider(world, Own, batch))
    assert torch.isfinite(run(world, guider(world, Own, batch), 1)[0]).all()


def test_masks_of_a_frame(world):
    """As ComfyUI spreads them: channels count as masks, a time axis does not."""
    pick, flat = world.alone.mask_of, torch.arange(12.0).view(3, 2, 2)
    frames, film = torch.zeros(3, 4, 8, 8), torch.zeros(2, 16, 3, 8, 8)
    assert torch.equal(pick(flat, 4, frames), flat[1].view(1, 1, 2, 2))
    assert torch.equal(pick(flat[:2].view(1, 2, 2, 2), 1, frames), flat[1].view(1, 1, 2, 2))
    assert torch.equal(pick(flat, 1, film), flat)
    assert pick(flat.view(3, 1, 1, 2, 2), 1, film).shape == (1, 1, 1, 2, 2)
    assert pick(None, 1, frames) is None
