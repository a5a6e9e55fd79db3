"""channels_last while recording: the same function, and nothing of it stays behind."""

import gc
import itertools

import pytest
import tiny
import torch
from compiled_models import call, patched
from helping import helping
from pairs import Pair, settings

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("at_once")]

LAST = torch.channels_last


@pytest.fixture
def forced(monkeypatch):
    """As on a GPU in half precision, with the references in the kernels' place."""
    from livediffusion.compiled import layout

    monkeypatch.setattr(layout, "FORCED", True)
    return layout


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_equals_the_unet_and_is_channels_last_throughout(layout, forced):
    from livediffusion.host.models.unet import ComfyUNet

    patcher = tiny.model(layout=layout, prompt=1.0)
    module = patcher.model.diffusion_model
    unet, seen = ComfyUNet(module), []

    def look(part, args):
        seen.append(args[0].is_contiguous(memory_format=LAST))

    for rows, control in itertools.product((1, 3), (False, True)):
        asked = call(patcher, rows, (8, 16), control=control)
        before = unet(asked)
        norms = [m for m in module.modules() if isinstance(m, torch.nn.GroupNorm)]
        with forced.Led(module).inside():
            hooks = [m.register_forward_pre_hook(look) for m in norms]
            out = unet(asked)
            [hook.remove() for hook in hooks]
        assert out.is_contiguous() and out.shape == before.shape
        assert tiny.rms(out, before) <= 1e-5, (rows, control)
        assert torch.equal(unet(asked), before)
    assert len(seen) == 4 * len(norms) and all(seen)
    assert not any("forward" in vars(part) for part in module.modules())


def test_the_embedded_model(forced):
    """Its time embedding scales and shifts between a norm and its SiLU."""
    from livediffusion.demo import loader

    model = loader.load()[0].model
    module, config = model.diffusion_model, model.model_config.unet_config
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(shape, generator=generator)

    x, pooled = some(2, model.latent_format.latent_channels, 32, 24), config["adm_in_channels"]
    more = {"context": some(2, 4, config.get("context_dim") or 8), "y": some(2, pooled)}
    levels = torch.tensor([900.0, 50.0])
    before = module(x, levels, **more)
    led = forced.Led(module)
    led.try_on(lambda: module(x, levels, **more))
    with led.inside():
        assert tiny.rms(module(x, levels, **more), before) <= 1e-5
    assert led.active


def test_rows_that_go_on_with_what_was_kept_are_channels_last(forced, monkeypatch):
    """By ticks before the recording, which are not."""
    from livediffusion.host.models import walk

    pair, seen = Pair(helping(tiny.model(prompt=1.0), reuse={"interval": 2})), []
    block = walk._Walk._block

    def looked(own, rows, h, side, *more):
        if own.x.is_contiguous(memory_format=LAST):  # as it is where it is led
            seen.append((side, h.is_contiguous(memory_format=LAST)))
        return block(own, rows, h, side, *more)

    monkeypatch.setattr(walk._Walk, "_block", looked)
    pair.guide()
    for i in range(12):
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-5, i
    assert pair.captures and pair.attached.reason is None
    assert {side for side, _ in seen} == {"input", "middle", "output"}
    assert all(lies for _, lies in seen)


def test_what_comes_out_otherwise_is_recorded_as_it_is(forced, caplog):
    """Whatever a UNet of others does inside: both ways are compared before a recording."""
    module = tiny.model().model.diffusion_model
    asked = call(tiny.model(), 2)

    class Reads(torch.nn.Identity):
        def forward(self, x):
            return x if x.is_contiguous() else -x

    module.input_blocks[0].append(Reads())
    led = forced.Led(module)
    led.try_on(lambda: module(asked.x, asked.timesteps, context=asked.context))
    assert not led.active and led.size == 0
    assert "relative error" in led.told()["reason"] in caplog.text
    with led.inside():
        assert not any("forward" in vars(part) for part in module.modules())


def test_an_error_leaves_the_unet_as_it_was(forced):
    module = tiny.model().model.diffusion_model
    with pytest.raises(RuntimeError, match="inside"), forced.Led(module).inside():
        raise RuntimeError("inside")
    assert not any("forward" in vars(part) for part in module.modules())


def test_its_weights_are_shared_and_go_with_the_last_recording(forced):
    module = tiny.model().model.diffusion_model
    one, other = forced.Led(module), forced.Led(module)
    size = sum(m.weight.nbytes for m in module.modules()
               if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1))  # fmt: skip
    assert one.size == other.size == size and one._weights is other._weights
    del one
    assert module in forced._own and forced._own[module]() is not None
    del other
    gc.collect()
    assert forced._own[module]() is None


@pytest.mark.parametrize("flag", ["CHANNELS_LAST", "OWN_WEIGHTS"])
def test_each_part_can_be_left_out(flag, forced, monkeypatch):
    monkeypatch.setattr(forced, flag, False)
    monkeypatch.setattr(forced, "FORCED", flag == "OWN_WEIGHTS")
    led = forced.Led(tiny.model().model.diffusion_model)
    assert led.size == 0 and led.active == (flag == "OWN_WEIGHTS")


def test_a_cpu_in_float32_is_left_alone():
    from livediffusion.compiled.layout import Led

    module = tiny.model().model.diffusion_model
    led = Led(module)
    with led.inside():
        assert not any("forward" in vars(part) for part in module.modules())
    assert not led.active and led.size == 0


def test_a_lora_that_comes_while_it_is_recorded(forced):
    """In place, so that nothing is recorded anew: our own weights have to follow."""
    pair = Pair(tiny.model(prompt=1.0))
    base, engine = pair.patcher, pair.compiled
    for strength in (0.0, 0.05, 0.3, 0.0):
        pair.patcher, pair.compiled = patched(base, strength), patched(engine, strength)
        pair.guide()
        for i in range(8):
            a, b = pair.run(settings(), tiny.latents(1, i))
            assert tiny.rms(b, a) <= 1e-5, (strength, i)
    assert pair.captures and pair.attached.reason is None
    assert pair.attached.notes["ticks"]["channels_last"]
    assert pair.attached.notes["ticks"]["own_weights_mb"] > 0
