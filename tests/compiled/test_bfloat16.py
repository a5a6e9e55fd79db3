"""The UNet in bfloat16 by torch: only the UNet, and only where that is worth it."""

import pytest
import tiny
import torch
from compiled_models import call

pytestmark = pytest.mark.comfy


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def multiplies(monkeypatch, comfyui):
    """As on a processor that multiplies bfloat16; torch computes it everywhere."""
    from livediffusion.compiled import bfloat16

    monkeypatch.setattr(bfloat16, "missing_bfloat16", lambda: None)


def test_a_copy_rounds_and_tells_its_error(multiplies):
    from livediffusion.compiled.bfloat16 import Bfloat16
    from livediffusion.compiled.engine import Shapes
    from livediffusion.host.models.unet import ComfyUNet

    patcher = tiny.model(prompt=1.0)
    unet = ComfyUNet(patcher.model.diffusion_model)
    before = {name: t.clone() for name, t in unet.module.state_dict().items()}
    asked, said = call(patcher, 3), []
    made = Bfloat16(said.append)
    made.prepare(unet, Shapes.of(asked))
    out = made(asked)
    error = tiny.rms(out, unet(asked))
    assert out.dtype == torch.float32 and 1e-4 <= error <= 3e-2
    assert said == [f"bfloat16 by torch, relative error {error:.1e} against the UNet itself"]
    assert made.describe()["error"] == pytest.approx(error)
    assert all(torch.equal(t, before[name]) for name, t in unet.module.state_dict().items())


def tensors(holder, seen=None):
    """Every tensor that an object of the pack holds."""
    seen = set() if seen is None else seen
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, dict):
        for one in holder.values():
            yield from tensors(one, seen)
    elif isinstance(holder, list | tuple | set):
        for one in holder:
            yield from tensors(one, seen)
    elif type(holder).__module__.startswith("livediffusion"):
        names = [n for kind in type(holder).__mro__ for n in getattr(kind, "__slots__", ())]
        held = {n: getattr(holder, n, None) for n in names} | getattr(holder, "__dict__", {})
        yield from tensors(held, seen)


def test_the_state_of_a_stream_stays_in_float32(multiplies):
    """Through the node: the ring's tensors, and frames as near as the UNet's rounding."""
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling.guider import RCFGGuider
    from livediffusion.host.sampling.stream import Settings, Stream
    from livediffusion.nodes.compiled import LiveCompile

    LiveCompile.hidden = type("Hidden", (), {"unique_id": None})
    base = tiny.model(prompt=1.0)
    model = LiveCompile.execute(base, "eager", "bfloat16").result[0]
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(1, 4, 8, 8, generator=generator) for _ in range(6)]
    outs = []
    for patcher in (base, model):
        guider = RCFGGuider(patcher, Guidance("self-negative", 1.4, 0.8))
        guider.set_conds(tiny.conditioning(1), tiny.conditioning(2))
        stream = Stream()
        settings = Settings((10.0, 5.0, 1.0, 0.0), "lcm", 3)
        outs.append([stream.run(guider, frame, settings).clone() for frame in frames])
        kinds = {tensor.dtype for tensor in tensors(stream.ring)}
        assert torch.float32 in kinds and not kinds & {torch.bfloat16, torch.float16}
    errors = [tiny.rms(b, a) for a, b in zip(*outs, strict=True)]
    assert 1e-5 < max(errors) <= 5e-2
    assert all(out.dtype == torch.float32 for out in outs[1])


@pytest.mark.parametrize(("told", "said"), [
    ({"avx512_bf16": False, "amx_bf16": False}, "does not multiply bfloat16"),
    ({"avx512_bf16": True}, None),
    ({"amx_bf16": True}, None),
])  # fmt: skip
def test_a_processor_that_only_converts_is_refused(told, said, monkeypatch, comfyui):
    from livediffusion.compiled import choice, precision

    precision.missing_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    reason = choice.missing("eager", torch.device("cpu"), choice.Wish("bfloat16"))
    precision.missing_bfloat16.cache_clear()
    assert reason is None if said is None else said in reason
    for engine in ("cudagraph", "inductor", "onnxruntime"):
        reason = choice.missing(engine, torch.device("cpu"), choice.Wish("bfloat16"))
        assert reason.startswith("precision: ") and "needs openvino or eager" in reason
    reason = choice.missing("eager", torch.device("cpu"), choice.Wish(place="GPU"))
    assert reason.startswith("device: only openvino")
