"""Engines on a GPU: right after every change, and no waiting in a steady stream.

Run by benchmarks/gpu.py; with LIVEDIFFUSION_CUDA=rehearse on a CPU, where `replaying` stands for
CUDA graphs, so that the tests themselves are known to work.
"""

import copy
import gc

import pytest
import replaying
import tiny
import torch
from compiled_models import patched, sampled_once
from on_cuda import CLOSE, DEVICE, REHEARSED, latents, model, no_waits
from pairs import SIGMAS, Pair, settings

pytestmark = [pytest.mark.comfy, pytest.mark.cuda, pytest.mark.usefixtures("at_once")]

MODES = ("off", "self-negative", "onetime-negative", "full")


def pair(**more):
    from livediffusion.compiled.graph import CudaRecording

    return Pair(model(), recording=replaying.Replaying if REHEARSED else CudaRecording, **more)


def void(_):
    pass


@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_ticks_with_every_knob_changing(mode):
    both = pair()
    for i in range(200):
        if i % 9 == 0:
            both.guide(mode=mode, cfg=1.0 + (i % 7) / 5 + 0.1, delta=(i % 5) / 4, prompt=i // 18)
        levels = SIGMAS if i % 30 < 15 else (11.0, 4.0, 1.5, 0.6, 0.0)
        a, b = both.run(settings(levels, seed=i // 20), latents(i))
        assert tiny.rms(b, a) <= CLOSE, i
    assert both.captures == 1 and both.attached.reason is None


def test_lora_unloading_size_and_steps():
    import comfy.model_management

    both = pair()
    base, engine = both.patcher, both.compiled
    for strength in (0.0, 0.05, 0.1, 0.0):
        both.patcher, both.compiled = patched(base, strength), patched(engine, strength)
        both.guide()
        for i in range(10):
            a, b = both.run(settings(), latents(i))
            assert tiny.rms(b, a) <= CLOSE, (strength, i)
    both.patcher, both.compiled = base, engine
    both.guide()
    for _ in range(3):
        comfy.model_management.unload_all_models()
        gc.collect()
        if not REHEARSED:
            torch.cuda.empty_cache()
        for i in range(8):
            a, b = both.run(settings(), latents(i))
            assert tiny.rms(b, a) <= CLOSE
    for asked, size in ((settings(), 16), (settings(SIGMAS[1:]), 16), (settings((8.0, 0.0)), 8)):
        for i in range(8):
            a, b = both.run(asked, latents(i, size))
            assert tiny.rms(b, a) <= CLOSE, (asked, size)
    assert both.attached.reason is None


@pytest.mark.parametrize("mode", MODES)
def test_steady_state_never_waits_and_asks_for_no_memory(mode):
    both = pair()
    both.guide(mode=mode)
    frames = [latents(i) for i in range(4)]
    for i in range(12):
        both.graph.run(both.guiders[1], frames[i % 4], settings())
    before = {} if REHEARSED else torch.cuda.memory_stats()
    with no_waits():
        for i in range(50):
            both.graph.run(both.guiders[1], frames[i % 4], settings())
    after = {} if REHEARSED else torch.cuda.memory_stats()
    for name in ("segment.all.allocated", "num_alloc_retries"):
        assert before.get(name) == after.get(name)
    assert both.captures == 1


def test_recordings_in_turns_share_one_pool():
    """Two streams, and the UNet of a sampler between them, each in the others' memory."""
    from livediffusion.compiled import graph

    recording = replaying.Replaying if REHEARSED else graph.CudaRecording
    base, sizes = model(), (8, 16)
    pairs = [Pair(base, recording=recording) for _ in sizes]
    held = []
    for i in range(24):
        if i % 8 == 0:
            for pair, mode in zip(pairs, ("self-negative", "onetime-negative"), strict=True):
                pair.guide(mode=mode, prompt=i)
        for pair, size in zip(pairs, sizes, strict=True):
            a, b = pair.run(settings(), latents(i, size))
            assert tiny.rms(b, a) <= CLOSE, (i, size)
        once = sampled_once(pairs[0].compiled, 3), sampled_once(base, 3)
        assert tiny.rms(*once) <= CLOSE, i
        held.append(graph.pool_size())
    assert [pair.captures for pair in pairs] == [1, 1]
    assert len(pairs[0].attached.stats()["made"]) == 1
    assert all(pair.attached.reason is None for pair in pairs)
    assert held[-1] == held[8]
    if not REHEARSED:
        assert len(graph._pools) == 1


def test_a_clip_that_fills_the_ring_again_and_again_records_full_rings_only():
    both = pair()
    both.guide()
    for i in range(6):
        a, b = both.run(settings(drain=True), latents(i, n=6))
        assert tiny.rms(b, a) <= CLOSE, i
    stats = both.attached.stats()
    assert (both.captures, stats["made"], stats["reason"]) == (1, [], None)


@pytest.mark.skipif(REHEARSED, reason="test_pool.py has the parts of it that need no GPU")
@pytest.mark.parametrize("trouble", ["python", "wait"])
def test_a_capture_that_breaks_is_not_the_end(trouble):
    """ComfyUI goes on, and so do the recordings that there are."""
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.graph import CudaRecording

    x = torch.ones(1 << 16, device=DEVICE)
    out = torch.zeros_like(x)
    good = CudaRecording()
    good.capture(lambda: void(out.copy_(x * 2 + 1)))
    asynchronous = torch.cuda.get_allocator_backend() == "cudaMallocAsync"
    if asynchronous and trouble == "wait":
        pytest.skip("nothing can be recorded in this process after that")

    def breaks():
        made = x * 3
        if trouble == "python":
            raise ValueError(tuple(made.shape))
        float(made[0])

    broken = CudaRecording()
    with pytest.raises((ValueError, RuntimeError, Refused)):
        broken.capture(breaks)
    del broken
    gc.collect()
    good.replay()
    assert out.eq(3).all()
    later = CudaRecording()
    later.capture(lambda: void(out.copy_(x * 5)))
    later.replay()
    assert out.eq(5).all()
    good.replay()
    assert out.eq(3).all()


def test_a_tiny_autoencoder_as_recordings():
    """Both halves, at two sizes in turns, in channels_last: what the network itself gives."""
    from comfy.taesd.taesd import TAESD
    from livediffusion.compiled.cuda_half import CudaHalf
    from livediffusion.compiled.graph import CudaRecording

    dtype = torch.float32 if REHEARSED else torch.float16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TAESD().train(False)
        for weight in network.parameters():  # ComfyUI's layers leave them as they were allocated
            fan = weight[0].numel() if weight.ndim > 1 else 100
            torch.nn.init.normal_(weight, std=0.5 * fan**-0.5)
        network = network.to(DEVICE, dtype)
    recording = replaying.Replaying if REHEARSED else CudaRecording
    made = []
    for size in (32, 64):
        for part, channels, side in (
            (network.taesd_encoder, 3, size), (network.taesd_decoder, 4, size // 8),
        ):  # fmt: skip
            half, x = CudaHalf(recording), torch.rand(1, channels, side, side).to(DEVICE, dtype)
            half.prepare(copy.deepcopy(part), x)
            made.append((half, part, x))
    for i in range(6):
        for half, part, x in made:
            out, wanted = half(x + i / 10), part(x + i / 10)
            assert tiny.rms(out, wanted) <= (1e-5 if REHEARSED else CLOSE)
            assert out.is_contiguous() and out.dtype == dtype


def test_inductor_in_the_tick():
    """torch.compile inside the recorded tick, through a LoRA."""
    from livediffusion.compiled.inductor import Inductor
    from livediffusion.host.models.engines import Attached, attach

    torch._dynamo.reset()
    both = pair()
    attached = Attached("inductor", "", replaying.inductor if REHEARSED else Inductor)
    both.compiled = attach(both.patcher, attached)
    base, engine = both.patcher, both.compiled
    for strength in (0.0, 0.1):
        both.patcher, both.compiled = patched(base, strength), patched(engine, strength)
        both.guide()
        for i in range(10):
            a, b = both.run(settings(), latents(i))
            assert tiny.rms(b, a) <= max(CLOSE, 1e-5), (strength, i)
    if not REHEARSED:
        frames = [latents(i) for i in range(4)]
        for i in range(8):
            both.graph.run(both.guiders[1], frames[i % 4], settings())
        with no_waits():
            for i in range(20):
                both.graph.run(both.guiders[1], frames[i % 4], settings())
    assert attached.fell_back == 0, attached.reason


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_other_engines(name, tmp_path, monkeypatch):
    """Where they are installed."""
    import folder_paths
    from livediffusion.compiled import choice, ort
    from livediffusion.compiled.trt import api, files
    from livediffusion.host.models import engines, tensorrt

    device = torch.device(DEVICE)
    reason = ort.missing(device) if name == "onnxruntime" else api.missing()
    if reason:
        pytest.skip(reason)
    both = pair()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    if name == "onnxruntime":
        made = lambda: choice.make(name, device)  # noqa: E731
        both.attached = engines.Attached(name, "", made)
        both.compiled = engines.attach(both.patcher, both.attached)
    else:
        asked = tensorrt.wish(both.patcher, 64, 64, 4, 8, False, "fp16")
        path = tensorrt.build(both.patcher, asked, "test", lambda *told: None)
        sidecar = files.check(path, tensorrt.here)
        both.compiled = tensorrt.run_on(both.patcher, path, sidecar, lambda text: None)
        both.attached = engines.engine_of(both.compiled)
    both.guide()
    for i in range(12):
        a, b = both.run(settings(), latents(i))
        assert tiny.rms(b, a) <= max(CLOSE, 1e-5)
    assert both.attached.fell_back == 0, both.attached.reason


def test_the_embedded_model_as_its_node_loads_it():
    """With paged weights, where ComfyUI has them (dynamic VRAM): an engine's stay in place."""
    import comfy.memory_management
    from livediffusion.compiled.graph import CudaRecording
    from livediffusion.demo import loader
    from pairs import compiled
    from pairs import guider as guided

    base, clip, _ = loader.load()
    if getattr(comfy.memory_management, "aimdo_enabled", False):
        assert base.is_dynamic()
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("neon night", "ink")]
    shape = base.model.latent_format.latent_channels, 32, 32
    both = Pair(base)
    both.graph.recorded._new = new = replaying.Replaying if REHEARSED else CudaRecording
    both.compiled, both.attached = compiled(base, new)
    for prompt in prompts:
        both.guiders = guided(both.patcher), guided(both.compiled)
        for one in both.guiders:
            one.set_conds(prompt, prompt)
        for i in range(12):
            frame = torch.randn(1, *shape, generator=torch.Generator().manual_seed(i)).to(DEVICE)
            a, b = both.run(settings(), frame)
            assert tiny.rms(b, a) <= CLOSE, i
    assert both.captures == 1 and both.attached.reason is None
