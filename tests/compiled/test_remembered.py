"""Engines that run networks whose frames help each other, against streams of ComfyUI's own UNet."""

import functools
import itertools
import os
import re

import coherent
import pytest
import tiny
from helping import KINDS, SIGMAS, Beside, helping

pytestmark = pytest.mark.comfy
pytest.importorskip("onnxruntime")
LONG = "LIVEDIFFUSION_LONG" in os.environ


@pytest.fixture(autouse=True)
def inference(at_once):
    """Engines are made at once."""


def long(*cases):
    """Cases that run when more of all are asked for."""
    return cases if LONG else ()


def twenty(beside, kind, size=8, channels=4, warm=12, **settings):
    """Twenty frames; from the moment that the memory is full no call is the UNet's."""
    settings |= KINDS[kind]
    for i in range(warm):
        beside.run(tiny.latents(1, i, size, channels), **settings)
    beside.steady(lambda i: tiny.latents(1, warm + i, size, channels), 20 - warm, **settings)
    full = "the memory is not full yet"
    assert any(full in line for line in beside.said) == ("memory" in KINDS[kind])


def embedded(number, clip):
    """A prompt of the embedded model, and the negative."""
    words = ["watercolor", "oil painting", "pencil sketch"][number % 3], ""
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in words]


@pytest.mark.parametrize(("engine", "layout", "kind", "first"), [
    ("onnxruntime", "SD1.5", "merged", True),
    *long(*itertools.product(
        ("onnxruntime", "openvino"), ("SD1.5", "SD2.1", "SDXL", "embedded"), KINDS, (False, True)
    )),
])  # fmt: skip
def test_equals_the_unet(engine, layout, kind, first):
    """The engine may stand before the nodes or after them."""
    equal(engine, layout, kind, first)


@pytest.mark.slow
def test_openvino_equals_the_unet(tmp_path):
    """Compiled, and once more from what was kept on disk."""
    pytest.importorskip("openvino")
    from livediffusion.compiled.ov.network import Asked
    from livediffusion.compiled.ov.unet import OpenVino

    for kept in (False, True):
        beside = Beside(coherent.model(), lambda: OpenVino(Asked("CPU", folder=tmp_path)))
        twenty(beside, "both", warm=14)
        assert [made["kept"] for made in beside.attached.stats()["made"]] == [kept]


def test_auto_measures_calls_with_a_memory():
    """The faster of an engine and the UNet itself: either tells what is to be remembered."""
    from livediffusion.compiled.engine import Eager
    from livediffusion.compiled.faster import Faster
    from livediffusion.compiled.kept import Kept

    class Twin(Eager):
        name = "twin"

    beside = Beside(coherent.model(), lambda: Faster(Twin, Kept(None), lambda: ""))
    for i in range(14):
        beside.run(tiny.latents(1, i), **KINDS["both"])
    beside.steady(lambda i: tiny.latents(1, 14 + i), runs=16, **KINDS["both"])
    assert beside.attached.stats()["made"][0]["measuring"] is False


def equal(engine, layout, kind, first):
    from livediffusion.demo import loader

    pytest.importorskip(engine)
    if layout != "embedded":
        twenty(Beside(coherent.model(layout), engine, first=first), kind, warm=14)
        return
    model, clip, _ = loader.load()
    conds = functools.partial(embedded, clip=clip)
    channels = model.model.latent_format.latent_channels
    beside = Beside(model, engine, first=first, conds=conds)
    twenty(beside, kind, 16, channels, warm=14, cfg=1.2, delta=0.6)


def test_it_goes_on_through_every_change():
    """Prompt, guidance, noise, size, steps, settings of the memory and a LoRA."""
    beside, size, n = Beside(coherent.model()), 8, 4
    asked = {**KINDS["both"]}
    changes = (
        {}, {"prompt": 3}, {"cfg": 1.8, "delta": 0.5}, {"seed": 5}, {"mode": "full"},
        {"mode": "onetime-negative"}, {"mode": "off"}, {"size": 16}, {"n": 3},
        {"memory": {"bank": "merged", "interval": 2, "fuse": 0.2}}, {"memory": {"frames": 3}},
        {"strength": 0.8},
    )  # fmt: skip
    if not LONG:
        changes = ({"n": 1}, {"prompt": 3, "seed": 5, "size": 16}, {"n": 2}, {"strength": 0.8})
    for change in changes:
        size, n = change.pop("size", size), change.pop("n", n)
        asked |= change
        settings = {**asked, "sigmas": SIGMAS[4 - n :]}
        warm = n + (8 if LONG else 3)
        for i in range(warm):
            beside.run(tiny.latents(1, i, size), **settings)
        beside.steady(lambda i, size=size: tiny.latents(1, 20 + i, size), **settings)
    # but for the LoRA all were of the same layers: one export, and one where groups are unequal
    assert len(beside.attached.stats()["made"]) == 2


def test_fusion_that_comes_later_has_a_graph_of_its_own():
    """The one without it neither takes nor gives outputs of layers."""
    from livediffusion.host.models.coherence import coherence_of
    from livediffusion.host.models.remembering import layers

    base = coherent.model()
    beside = Beside(base)
    for kind in ("unfused", "queue"):
        asked = {**KINDS[kind], "sigmas": SIGMAS[2:]}
        for i in range(6):
            beside.run(tiny.latents(1, i), **asked)
        beside.steady(lambda i: tiny.latents(1, 6 + i), **asked)
        known = coherence_of(helping(base, **KINDS[kind]))
        given = layers(known, base.model.diffusion_model).outputs
        assert any(name.startswith("own_o_") for name in given) == (kind == "queue")
    assert len(beside.attached.stats()["made"]) == 2


@pytest.mark.parametrize(("frames", "mode"), [
    (2, "onetime-negative"), *long((3, "onetime-negative"), (2, "full"), (3, "self-negative")),
])  # fmt: skip
def test_frames_of_a_slot(frames, mode):
    beside = Beside(coherent.model(), frames=frames)
    asked = {**KINDS["queue"], **KINDS["future"], "mode": mode}
    for i in range(7):
        beside.run(tiny.latents(frames, i), **asked)
    beside.steady(lambda i: tiny.latents(frames, 7 + i), **asked)


def test_a_row_that_is_no_number_does_not_spread():
    """It is not remembered and nobody attends to it, in an engine either."""
    beside = Beside(coherent.model())
    asked = {**KINDS["both"], "sigmas": SIGMAS[2:]}
    for i in range(6):
        beside.run(tiny.latents(1, i), **asked)

    def bad(i):
        latents = tiny.latents(1, 6 + i)
        return latents * float("nan") if i == 1 else latents

    beside.steady(bad, runs=5, **asked)


def test_what_cannot_is_said_and_the_unet_does_it():
    """Not silently without a memory."""
    from livediffusion.compiled.inductor import Inductor

    beside = Beside(coherent.model(), Inductor)
    for i in range(6):
        beside.run(tiny.latents(1, i), **KINDS["both"], sigmas=SIGMAS[2:])
    assert beside.attached.ran == 0 and beside.attached.fell_back == 6
    assert re.search(
        r"own knows no Live Memory and no Live Future Attention \(future attention in \d layers "
        r"and memory in \d layers\): choose cudagraph", beside.attached.reason,
    )  # fmt: skip


def test_what_acts_outside_of_the_network_is_no_matter_of_an_engine():
    """Predictions that are carried along: the layers are as ever, and the engine runs each call."""
    import pairs
    from livediffusion.compiled.engine import Eager
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.host.models import coherence, engines
    from livediffusion.host.sampling.stream import Stream

    class Other(Eager):
        name, remembers = "another", False

    base = coherence.attach(coherent.model(), carry=Carry())
    attached = engines.Attached("another", "for a test", Other)
    streams, guiders = (Stream(), Stream()), []
    for model in (base, engines.attach(base, attached)):
        guiders.append(pairs.guider(model))
    for i in range(6):
        wanted, ours = (
            stream.run(guider, tiny.latents(1, i), pairs.settings(SIGMAS[2:]))
            for stream, guider in zip(streams, guiders, strict=True)
        )
        assert tiny.rms(ours, wanted) <= 1e-6
    assert (attached.ran, attached.fell_back) == (6, 0)
