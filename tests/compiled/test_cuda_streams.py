"""Streams on a GPU whose network something else copies, counts or stands in front of, while its
weights are ComfyUI's: by pages under dynamic VRAM. Run as test_cuda.py is."""

import gc

import pytest
import replaying
import tiny
import torch
from helping import helping
from on_cuda import CLOSE, DEVICE, REHEARSED, latents, model
from pairs import Pair, guider, settings

NEAR = 1e-5 if REHEARSED else 5e-2  # bfloat16, in channels_last
pytestmark = [pytest.mark.comfy, pytest.mark.cuda, pytest.mark.usefixtures("at_once")]


@pytest.fixture(scope="module")
def paged():
    """The embedded model and its prompts, as its node loads it."""
    from livediffusion.demo import loader

    base, clip, _ = loader.load()
    return base, [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("neon", "ink")]


def dynamic():
    import comfy.memory_management

    return getattr(comfy.memory_management, "aimdo_enabled", False)


def collected():
    """What nobody holds any more is gone, and the device has said so if it was not its own."""
    gc.collect()
    if not REHEARSED:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def once(base, prompts, size=32):
    """One picture by a stock sampler."""
    import comfy.samplers

    made = comfy.samplers.CFGGuider(base)
    made.set_conds(*prompts)
    made.set_cfg(1.0)
    channels = base.model.latent_format.latent_channels
    noise = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    return made.sample(
        noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"),
        torch.tensor((10.0, 0.0)), disable_pbar=True,
    )  # fmt: skip


@pytest.mark.parametrize("looks", ["reuse", "skips"])
def test_a_network_that_was_counted_is_as_it_was(paged, looks):
    """Live Reuse without an engine, and Live Searched Steps."""
    from livediffusion.host.models import skips
    from livediffusion.host.sampling.stream import Stream

    base, prompts = paged
    assert base.is_dynamic() or not dynamic()
    before = once(base, prompts)
    if looks == "skips":
        assert skips.cost(base, (32, 32), 77).whole > 0
    else:
        stream, made = Stream(1), guider(helping(base, reuse={}))
        made.set_conds(*prompts)
        shape = 1, base.model.latent_format.latent_channels, 32, 32
        for i in range(40):
            given = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(DEVICE)
            out = stream.run(made, given, settings())
        assert out.isfinite().all() and 0 < stream.coherent.looking.share < 1
    for _ in range(3):
        collected()
        assert tiny.rms(once(base, prompts), before) <= CLOSE


def test_a_compiled_vae_that_was_let_go_leaves_the_vae_as_it_was():
    import vaes
    from livediffusion.compiled.cuda_half import CudaHalf
    from livediffusion.compiled.graph import CudaRecording
    from livediffusion.host.frames.compiled_vae import compiled

    recording = replaying.Replaying if REHEARSED else CudaRecording
    vae = vaes.taesd()
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    before = vae.decode(latent)
    for _ in range(3):
        own = compiled(vae, lambda: CudaHalf(recording), lambda text: None)
        assert not getattr(own.patcher, "is_dynamic", lambda: False)()
        for i in range(20):
            if i % 5 == 4:
                vae.decode(latent)  # which loads the other one
            assert tiny.rms(own.decode(latent), before) <= NEAR
            own.encode(before)
        stage = own.first_stage_model
        assert stage.fell_back == 0, stage.reason
        assert len(stage._halves) == 2, "made once each"
        del own, stage
        collected()
        assert tiny.rms(vae.decode(latent), before) <= CLOSE


@pytest.mark.parametrize("what", ["patchwork", "percent range"])
def test_an_engine_that_stands_aside_says_so(what):
    """Where a tick is not recorded and its calls are others than the UNet's."""
    from livediffusion.compiled.graph import CudaRecording
    from livediffusion.engine.patchwork.mask import Patchwork
    from livediffusion.host.models.coherence import attach

    base, patched = model(), what == "patchwork"
    base = attach(base, patchwork=Patchwork(0.05)) if patched else helping(base, reuse={})
    both = Pair(base, recording=replaying.Replaying if REHEARSED else CudaRecording)
    both.guide()
    asked = {} if patched else {"end_percent": 0.9}
    for one in both.guiders:
        one.set_conds(tiny.conditioning(1, **asked), tiny.conditioning(2))
    for i in range(8):
        a, b = both.run(settings(), latents(i, 16))
        assert tiny.rms(b, a) <= CLOSE, i
    attached = both.attached
    assert both.captures == attached.ran == 0 and attached.used and attached.fell_back >= 8
    assert ("Live Patchwork" if patched else "with Live Reuse cudagraph") in attached.reason
    assert attached.said[-1].endswith(attached.reason)
    if patched:
        return
    both.guide()
    for i in range(20):
        a, b = both.run(settings(), latents(i, 16))
        assert tiny.rms(b, a) <= CLOSE, i
    assert both.captures and attached.ran and attached.reason is None


def test_a_network_that_cannot_be_counted_runs_all_the_same(monkeypatch):
    """A pack's closure around a part, which meets weights that hold nothing."""
    from livediffusion.host.sampling.stream import Stream

    base = model()
    part = base.model.diffusion_model.output_blocks[0][0]
    old = part.forward
    monkeypatch.setattr(part, "forward", lambda *args: old(*args))
    stream, made = Stream(1), guider(helping(base, reuse={"interval": 2}))
    for i in range(12):
        assert stream.run(made, latents(i), settings()).isfinite().all()
    assert "of the rows" in stream.stats()["reuse"]


def test_patchwork_acts_whatever_comfyui_does_with_the_weights(paged):
    """On a scene that stands still, with the picture that the whole network gives."""
    from livediffusion.engine.patchwork.mask import Patchwork
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    base, prompts = paged
    models = base, attach(base, patchwork=Patchwork())
    assert not getattr(models[1], "is_dynamic", bool)()
    shape = 1, base.model.latent_format.latent_channels, 32, 32
    still = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    streams, guiders = (Stream(1), Stream(1)), [guider(one) for one in models]
    for made in guiders:
        made.set_conds(*prompts)
    for _ in range(12):
        a, b = (s.run(g, still, settings()) for s, g in zip(streams, guiders, strict=True))
    assert tiny.rms(b, a) <= CLOSE if a.any() else not b.any()
    patching = streams[1].coherent.neighbours.patching
    assert patching.why == "" and patching.share < 1


@pytest.mark.parametrize("memory", [False, True])
def test_frames_that_help_each_other_now_and_then(memory):
    """A recording that is found again reads what was there when it was made."""
    from livediffusion.compiled.graph import CudaRecording

    base = model()
    both = Pair(base, recording=replaying.Replaying if REHEARSED else CudaRecording)
    engine, held = both.compiled, []
    asked = {"future": {}, **({"memory": {}} if memory else {})}
    for turn in range(3):
        for on in (True, False):
            both.patcher, both.compiled = (
                helping(one, **asked) if on else one for one in (base, engine)
            )
            both.guide()
            for i in range(14):
                a, b = both.run(settings(), latents(100 * turn + 50 * on + i))
                assert tiny.rms(b, a) <= CLOSE, (turn, on, i)
            collected()
            # out of range wherever it is taken for an index
            held += [torch.full((1 << k,), 1 << 40, device=DEVICE) for k in range(8)] * 4
    assert both.attached.reason is None and both.captures >= 2


@pytest.mark.parametrize("kind", ["future", "queue"])
def test_onnxruntime_reads_what_torch_has_just_written(kind):
    """Of each call, while the device is busy with what came before."""
    pytest.importorskip("onnxruntime")
    from helping import KINDS, Beside
    from livediffusion.compiled import ort

    if missing := ort.missing(torch.device(DEVICE)):
        pytest.skip(missing)
    beside = Beside(model(), engine=ort.OnnxRuntime, near=max(CLOSE, 1e-4))
    busy = torch.randn(64 if REHEARSED else 4096, 64 if REHEARSED else 4096, device=DEVICE)
    for i in range(30):
        busy = (busy @ busy).tanh()
        beside.run(latents(i), **KINDS[kind])
    assert beside.attached.ran and beside.attached.reason is None
