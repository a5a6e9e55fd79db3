"""A stream over many runs: everything may change between two ticks, and nothing is lost."""

import gc
import types
import weakref

import pytest
import torch

pytestmark = pytest.mark.comfy

SEED, LEVELS = 11, (8.0, 3.0, 1.2, 0.5, 0.0)
MODES = ("self-negative", "onetime-negative", "full", "off")


@pytest.fixture(scope="module")
def world():
    import tiny
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling.guider import RCFGGuider
    from livediffusion.host.sampling.stream import Settings, Stream

    return types.SimpleNamespace(
        tiny=tiny, model=tiny.model(), pooled=tiny.model(adm=12), Guidance=Guidance,
        RCFGGuider=RCFGGuider, Settings=Settings, Stream=Stream,
    )  # fmt: skip


def guider(world, mode="off", positive=1, negative=2, cfg=1.6, delta=0.9, model=None, **extra):
    cond = world.tiny.conditioning
    out = world.RCFGGuider(model or world.model, world.Guidance(mode, cfg, delta))
    conds = {"positive": cond(positive, **extra) if isinstance(positive, int) else positive}
    if mode in ("onetime-negative", "full"):
        conds["negative"] = cond(negative, **extra)
    out.inner_set_conds(conds)
    return out


def settings(world, levels=LEVELS, rule="lcm", seed=SEED, **kwargs):
    return world.Settings(levels, rule, seed, **kwargs)


def alone(world, guide, frame, setup):
    """One frame through a stream of its own."""
    return world.Stream().run(
        guide, frame, world.Settings(setup.sigmas, setup.step_rule, setup.seed, drain=True)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("same_length", [True, False], ids=["even", "longer"])
def test_prompt_change_keeps_each_frames_prompt(world, mode, same_length):
    """Frames in flight finish with the prompt (pooled vector included) they entered with."""
    first = guider(world, mode, model=world.pooled, pooled=12)
    second = guider(
        world, mode, 5, 6, model=world.pooled, pooled=12, tokens=8 if same_length else 16
    )
    stream, frames, setup = world.Stream(), world.tiny.latents(12).split(1), settings(world)
    out, calls = [], []
    for i, frame in enumerate(frames):
        before = stream.calls.calls
        out.append(stream.run(first if i < 6 else second, frame, setup))
        calls.append(stream.calls.calls - before)
    for i in range(9):
        # guidance scale and delta are the same, so only the prompt tells them apart
        guide = first if i < 6 else second
        assert world.tiny.rms(out[i + 3], alone(world, guide, frames[i], setup)) <= 1e-5
    assert calls == [1] * 12, "mixed prompts still share one call"


def test_immediate_switches_frames_in_flight(world):
    first, second = guider(world), guider(world, positive=5)
    frames, out = world.tiny.latents(8).split(1), {}
    for immediate in (False, True):
        stream = world.Stream()
        setup = settings(world, immediate=immediate)
        out[immediate] = [
            stream.run(first if i < 4 else second, f, setup) for i, f in enumerate(frames)
        ]
    assert torch.equal(out[False][3], out[True][3])
    assert world.tiny.rms(out[True][4], out[False][4]) > 1e-3
    assert world.tiny.rms(out[True][7], out[False][7]) <= 1e-5, "frame 4 saw only the second"


CHANGES = {
    "negative": {"negative": 7},
    "cfg": {"cfg": 3.0},
    "cfg to 1": {"cfg": 1.0},
    "delta": {"delta": 0.3},
    "prompt": {"positive": 5},
}


@pytest.mark.parametrize("what", [*CHANGES, "seed", "more steps", "fewer steps", "rule", "size"])
@pytest.mark.parametrize("mode", MODES)
def test_anything_may_change_between_ticks(world, mode, what):
    """After the change has passed through, the stream gives what a fresh one gives."""
    before, after = guider(world, mode), guider(world, mode, **CHANGES.get(what, {}))
    old = settings(world)
    new = {
        "seed": settings(world, seed=99),
        "more steps": settings(world, (8.0, 5.0, 3.0, 1.2, 0.8, 0.5, 0.0)),
        "fewer steps": settings(world, (3.0, 0.5, 0.0)),
        "rule": settings(world, rule="dpmpp_2m"),
    }.get(what, old)
    size = 10 if what == "size" else 8
    stream = world.Stream()
    for frame in world.tiny.latents(6).split(1):
        assert stream.run(before, frame, old).shape == frame.shape
    frames = world.tiny.latents(len(new.sigmas) + 1, seed=3, size=size).split(1)
    out = [stream.run(after, frame, new) for frame in frames]
    assert all(o.shape == frames[0].shape and torch.isfinite(o).all() for o in out)
    late = len(new.sigmas) - 2
    for i in range(len(frames) - late):
        want = alone(world, after, frames[i], new)
        assert world.tiny.rms(out[i + late], want) <= 1e-5, f"frame {i} after the change"
    assert stream.stats()["dropped"] == 0


def test_slots_survive_an_edit(world):
    """The first frame after an edit has no warm-up: it is a finished one."""
    stream, frames = world.Stream(), world.tiny.latents(6).split(1)
    for frame in frames[:5]:
        stream.run(guider(world), frame, settings(world))
    out = stream.run(guider(world, cfg=1.7, positive=4), frames[5], settings(world))
    assert world.tiny.rms(out, alone(world, guider(world), frames[2], settings(world))) <= 1e-5


def test_batches_of_any_size_come_out_as_many(world):
    stream = world.Stream(2)
    for count in (1, 4, 3, 1, 5, 2, 2):
        out = stream.run(guider(world), world.tiny.latents(count), settings(world))
        assert out.shape[0] == count
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("per_slot", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_calls_and_rows_of_a_clip(world, mode, per_slot):
    stream, n, count = world.Stream(per_slot), 4, 8
    stream.run(guider(world, mode), world.tiny.latents(count), settings(world, drain=True))
    stats = stream.stats()
    assert stats["calls"] == stats["ticks"] == count // per_slot + n - 1
    extra = {"full": count * n, "onetime-negative": count}.get(mode, 0)
    assert stats["rows"] == count * n + extra


def test_model_unloaded_in_the_middle(world):
    import comfy.model_management

    guide, setup = guider(world), settings(world)
    frames, streams = world.tiny.latents(10).split(1), (world.Stream(), world.Stream())
    out = ([], [])
    for i, frame in enumerate(frames):
        for which, stream in enumerate(streams):
            if which == 1 and i in (3, 4, 7):
                comfy.model_management.unload_all_models()
            out[which].append(stream.run(guide, frame, setup))
    assert torch.equal(torch.cat(out[0]), torch.cat(out[1]))


def test_lora_added_in_the_middle_is_not_read_stale(world):
    patched = world.model.clone()
    key = next(k for k in world.model.model_state_dict() if "attn2.to_v.weight" in k)
    shape = world.model.model_state_dict()[key].shape
    patched.add_patches({key: (torch.ones(shape),)}, 1.0)
    stream, setup, frames = world.Stream(), settings(world), world.tiny.latents(12).split(1)
    plain, lora = guider(world), guider(world, model=patched)
    out = [stream.run(lora if 4 <= i < 8 else plain, f, setup) for i, f in enumerate(frames)]
    assert world.tiny.rms(out[7], alone(world, lora, frames[4], setup)) <= 1e-5
    assert world.tiny.rms(out[11], alone(world, plain, frames[8], setup)) <= 1e-5
    assert world.tiny.rms(out[7], alone(world, plain, frames[4], setup)) > 1e-3


def test_another_model_family_starts_the_ring_anew(world):
    stream, setup = world.Stream(), settings(world)
    for frame in world.tiny.latents(4).split(1):
        stream.run(guider(world), frame, setup)
    other = guider(world, model=world.pooled, pooled=12)
    frames = world.tiny.latents(5).split(1)
    out = [stream.run(other, frame, setup) for frame in frames]
    assert world.tiny.rms(out[3], alone(world, other, frames[0], setup)) <= 1e-5


def test_interrupt_in_the_middle_of_a_clip(world):
    import comfy.model_management

    stream, ticks = world.Stream(), []

    def progress(done, total, estimate):
        ticks.append(done)
        if done == 3:
            comfy.model_management.interrupt_current_processing()

    clip = settings(world, drain=True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        stream.run(guider(world), world.tiny.latents(8), clip, progress=progress)
    assert ticks == [1, 2, 3]
    fresh = world.Stream().run(guider(world), world.tiny.latents(8), clip)
    assert torch.isfinite(fresh).all()
    # a live stream that is interrupted goes on with its frames in flight
    live, setup, frames = world.Stream(), settings(world), world.tiny.latents(7).split(1)
    for i, frame in enumerate(frames):
        if i == 4:
            comfy.model_management.interrupt_current_processing()
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                live.run(guider(world), frame, setup)
        out = live.run(guider(world), frame, setup)
    assert world.tiny.rms(out, alone(world, guider(world), frames[3], setup)) <= 1e-5


@pytest.mark.parametrize("prediction", ["v", "flow"])
@pytest.mark.parametrize("mode", MODES)
def test_noise_off_and_other_families_stay_bounded(world, prediction, mode):
    """peers.md 2.8 rows 4 and 16: residuals without added noise, v and flow models."""
    model = world.tiny.model(prediction)
    levels = (0.8, 0.6, 0.3, 0.1, 0.0) if prediction == "flow" else LEVELS
    setup = settings(world, levels, add_noise=False)
    guide, stream = guider(world, mode, model=model), world.Stream()
    seen = [float(stream.run(guide, world.tiny.latents(1), setup).abs().max()) for _ in range(12)]
    assert seen[4:] == pytest.approx([seen[4]] * 8, rel=1e-4)


def test_stream_holds_no_model(world):
    """ComfyUI may drop a model between two runs: the stream must not keep it."""
    model = world.tiny.model(seed=5)
    stream, watch = world.Stream(), weakref.ref(model.model)
    guide = guider(world, model=model)
    for frame in world.tiny.latents(3).split(1):
        stream.run(guide, frame, settings(world))
    import comfy.model_management

    comfy.model_management.unload_all_models()
    del model, guide
    gc.collect()
    assert watch() is None


def test_steady_live_run_keeps_its_buffers(world):
    """C5 through the host: 100 runs, the ring's memory stays where it is."""
    stream, guide, setup = world.Stream(), guider(world), settings(world)
    frame = world.tiny.latents(1)
    for _ in range(8):
        stream.run(guide, frame, setup)
    ring = stream.ring
    before = [b.data_ptr() for b in ring.buffers.all()], len(ring._plans)
    for _ in range(100):
        stream.run(guide, frame, setup)
    assert ([b.data_ptr() for b in ring.buffers.all()], len(ring._plans)) == before


def test_an_empty_latent_is_left_as_comfyui_leaves_it():
    import comfy.latent_formats
    from livediffusion.host.sampling.space import scaled_in

    some, nothing = torch.ones(1, 16, 4, 4), torch.zeros(1, 16, 4, 4)
    for name in ("SD15", "SD3", "Wan21"):
        form = getattr(comfy.latent_formats, name)()
        latent = (some[:, :4], nothing[:, :4]) if name == "SD15" else (some, nothing)
        if name == "Wan21":
            latent = tuple(t[:, :, None] for t in latent)
        model = types.SimpleNamespace(latent_format=form, process_latent_in=form.process_in)
        assert torch.equal(scaled_in(model, latent[0]), form.process_in(latent[0]))
        assert not scaled_in(model, latent[1]).any(), name


@pytest.mark.parametrize("path", ["direct", "wrapped"])
@pytest.mark.parametrize("where", ["frame", "model"])
def test_one_bad_frame_among_many_disturbs_no_other(world, monkeypatch, where, path):
    """NaN in a source latent, or in the model's answer for one row (peers.md 2.8 row 19)."""
    frames, bad, calls = world.tiny.latents(20), 8, []
    # a wrapped model is asked for each frame alone, four times, and the frame leaves at once
    late, asked = (0, 4 * bad) if path == "wrapped" else (3, bad)
    unet = world.model.model.diffusion_model
    honest = unet._forward

    def poisoned_unet(x, timesteps, *args, **kwargs):
        out = honest(x, timesteps, *args, **kwargs)
        calls.append(1)
        if where == "model" and len(calls) == asked + 1:
            out[timesteps.argmax()] = float("nan")
        return out

    def run(frames):
        patched = world.model.clone()
        if path == "wrapped":  # a node has wrapped the model: ComfyUI's own evaluation
            patched.set_model_unet_function_wrapper(
                lambda apply, args: apply(args["input"], args["timestep"], **args["c"])
            )
        stream, guide = world.Stream(), guider(world, "self-negative", model=patched)
        out = [stream.run(guide, frame, settings(world)) for frame in frames.split(1)]
        return torch.cat(out), stream.stats()["dropped"]

    clean, none = run(frames)
    poisoned = frames.clone()
    if where == "frame":
        poisoned[bad, 0, 2, 2] = float("nan")
    monkeypatch.setattr(unet, "_forward", poisoned_unet)
    out, dropped = run(poisoned)
    assert (none, dropped) == (0, 1)
    assert torch.isfinite(out).all()
    others = [i for i in range(20) if i != bad + late]
    assert torch.equal(out[others], clean[others])
    assert not torch.equal(out[bad + late], clean[bad + late])


def test_a_model_call_that_fails_leaves_the_stream_running(world):
    """A prompt made for another model: an error, and the next frame goes on where it was."""
    stream, good, setup = world.Stream(), guider(world), settings(world)
    wrong = guider(world, positive=[[torch.randn(1, 8, 5), {}]])
    frames = world.tiny.latents(10).split(1)
    for frame in frames[:6]:
        stream.run(good, frame, setup)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            stream.run(wrong, frames[6], setup)
    for i in range(6, 10):
        out = stream.run(good, frames[i], setup)
        assert world.tiny.rms(out, alone(world, good, frames[i - 3], setup)) <= 1e-5
