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
        held = [v for v in vars(stream.ring).values() if isinstance(v, torch.Tensor)]
        assert held and all(not t.is_floating_point() or t.dtype == torch.float32 for t in held)
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
