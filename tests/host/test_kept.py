"""A guider that is changed in place, between two runs, is not taken for the one it was."""

import gc
import types
import weakref

import pytest
import torch

pytestmark = pytest.mark.comfy

SEED, LEVELS = 11, (8.0, 3.0, 1.2, 0.5, 0.0)


@pytest.fixture
def world():
    import comfy.samplers
    import tiny
    from livediffusion.host.sampling.kept import Snapshot
    from livediffusion.host.sampling.stream import Settings, Stream

    model = tiny.model(prompt=1.0).clone()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.conditioning(1), tiny.conditioning(2))
    guider.set_cfg(2.0)
    return types.SimpleNamespace(
        tiny=tiny, model=model, guider=guider, Settings=Settings, Stream=Stream, Snapshot=Snapshot
    )


def double_time(world):

    sampling = world.model.get_model_object("model_sampling")

    class Late(type(sampling)):
        def timestep(self, sigma):
            return super().timestep(sigma) * 0.5

    late = Late(world.model.model.model_config)
    world.model.add_object_patch("model_sampling", late)
    # as ComfyUI loads it with the next sampling
    world.model.model.model_sampling = late


CHANGES = {
    "cfg": lambda w: w.guider.set_cfg(3.0),
    "conds": lambda w: w.guider.set_conds(w.tiny.conditioning(5), w.tiny.conditioning(6)),
    "conds twice": lambda w: [
        w.guider.set_conds(w.tiny.conditioning(5 + i), w.tiny.conditioning(6)) for i in (0, 1)
    ],
    "an entry": lambda w: w.guider.original_conds["positive"][0].update(
        cross_attn=w.tiny.conditioning(5)[0][0]
    ),
    "cfg function": lambda w: w.model.set_model_sampler_cfg_function(
        lambda a: a["input"] - a["cond_denoised"] * 0.9
    ),
    "patch": lambda w: w.model.set_model_attn2_patch(lambda q, k, v, e: (q, k, v * 0.2)),
    "model sampling": double_time,
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("n", [1, 4])
def test_a_guider_changed_in_place(world, what, n):
    setup, frames = world.Settings(LEVELS[-1 - n :], "euler", SEED), world.tiny.latents(12)
    stream, before = world.Stream(), []
    for frame in frames[:6].split(1):
        before.append(stream.run(world.guider, frame, setup))
    assert stream._kept is not None, "it was kept"
    CHANGES[what](world)
    after = [stream.run(world.guider, frame, setup) for frame in frames[6:].split(1)]
    late = 0 if stream.roads()["road"] == "per frame" else n - 1
    for i, frame in enumerate(frames[6:].split(1)):
        if i + late < len(after):
            want = world.Stream().run(
                world.guider, frame, world.Settings(setup.sigmas, "euler", SEED, drain=True)
            )
            assert world.tiny.rms(after[i + late], want) <= 1e-5, i
    assert world.tiny.rms(after[-1], before[-1]) > 1e-3


def test_nothing_changed_is_nothing_changed(world):
    snapshot = world.Snapshot(world.guider)
    assert snapshot.fits(world.guider)
    world.guider.set_cfg(2.0)
    assert snapshot.fits(world.guider)


def test_a_snapshot_holds_no_model(world):
    other = world.tiny.model(seed=3)
    world.model.set_additional_models("other", [other])
    snapshot, gone = world.Snapshot(world.guider), weakref.ref(other)
    assert snapshot.fits(world.guider)
    world.model.set_additional_models("other", [])
    assert not snapshot.fits(world.guider)
    del other
    gc.collect()
    assert gone() is None


def test_one_tensor_for_another(world):
    snapshot = world.Snapshot(world.guider)
    entry = world.guider.original_conds["positive"][0]
    entry["cross_attn"] = entry["cross_attn"].clone()
    assert not snapshot.fits(world.guider), "equal, but who knows for how long"


def test_a_number_made_of_the_whole_batch_is_refused(world, monkeypatch):
    """Lumina's count of all prompts' tokens, SVD's count of frames: no frame alone has it."""
    import comfy.conds

    model, setup = world.model.model, world.Settings(LEVELS, "euler", SEED, drain=True)
    real = model.extra_conds

    def counted(**kwargs):
        count = kwargs["cross_attn"].shape[0] * kwargs["cross_attn"].shape[1]
        return {**real(**kwargs), "num_tokens": comfy.conds.CONDConstant(count)}

    monkeypatch.setattr(model, "extra_conds", counted)
    monkeypatch.setattr(
        model, "apply_model", lambda x, t, num_tokens=None, **kwargs: x * 0.5 + num_tokens
    )
    frames = world.tiny.latents(3)
    one = world.Stream().run(world.guider, frames, setup)
    assert torch.isfinite(one).all(), "one prompt for all frames is no batch"
    batch = torch.cat([world.tiny.conditioning(i)[0][0] for i in (1, 2, 3)])
    world.guider.set_conds([[batch, {}]], world.tiny.conditioning(2))
    with pytest.raises(ValueError, match=r"guider: the model makes one thing .*num_tokens"):
        world.Stream().run(world.guider, frames, setup)
    assert torch.isfinite(world.Stream().run(world.guider, frames[:1], setup)).all()
