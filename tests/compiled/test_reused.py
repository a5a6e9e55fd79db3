"""Engines that run networks whose rows go on with kept features, against ComfyUI's own UNet."""

import functools
import itertools
import os
import types

import coherent
import pytest
import tiny
import torch
from helping import KINDS, NEAR, SIGMAS, Beside

pytestmark = pytest.mark.comfy
pytest.importorskip("onnxruntime")
ROWS = 4
LONG = "LIVEDIFFUSION_LONG" in os.environ


def long(cases):
    """Cases that run when more of all are asked for."""
    return cases if LONG else ()


def embedded(number, clip):
    """A prompt of the embedded model, and the negative."""
    words = ["watercolor", "oil painting", "pencil sketch"][number % 3], ""
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in words]


@pytest.fixture(autouse=True)
def inference(at_once):
    """Engines are made at once."""


def calls(unet, depth, layout, rows=ROWS, size=(10, 6), seed=0):
    """Calls of one shape, each with so many rows that run the inner blocks."""
    from livediffusion.compiled.engine import Call
    from livediffusion.compiled.reused import Reused
    from livediffusion.host.models.reused import feature

    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(rows, *shape, generator=g)

    width = unet.input_blocks[0][0].in_channels
    y = some(24) if layout == "SDXL" else None
    for count in range(rows + 1):
        whole = torch.randperm(rows, generator=g)[:count].sort().values
        reuse = Reused.of(depth, whole, some(*feature(unet, depth, size)))
        steps = torch.linspace(900, 30, rows)
        yield Call(some(width, *size), steps, some(6, 16), y, reuse=reuse)


@pytest.mark.parametrize(("engine", "layout", "depth"), [
    ("onnxruntime", "SDXL", 1), ("openvino", "SD1.5", 0),
    *long(itertools.product(("onnxruntime", "openvino"), ("SD1.5", "SD2.1", "SDXL"), range(4))),
])  # fmt: skip
def test_an_engine_gives_what_the_unet_does(engine, layout, depth):
    """However many rows run the inner blocks: one graph for all numbers but none."""
    pytest.importorskip(engine)
    from livediffusion.compiled import choice
    from livediffusion.compiled.engine import Shapes
    from livediffusion.host.models.unet import ComfyUNet

    module = coherent.model(layout).model.diffusion_model
    unet, made = ComfyUNet(module), {}
    # of the last, which runs them all, the graph is made that serves the others
    for call in sorted(calls(module, depth, layout), key=lambda call: -len(call.reuse.whole)):
        shapes = Shapes.of(call)
        wanted = unet(call)
        own = dict(call.reuse.wrote)
        call.reuse.wrote.clear()
        one = choice.make(engine, torch.device("cpu"))
        scope = one.scope(shapes)
        if scope not in made:
            one.prepare(unet, shapes)
            made[scope] = one
        assert tiny.rms(made[scope](call), wanted) <= NEAR
        assert call.reuse.wrote.keys() == own.keys()
        for name, features in own.items():
            assert tiny.rms(call.reuse.wrote[name], features) <= NEAR
    assert len(made) == 2
    for one in made.values():
        one.release()


@pytest.mark.parametrize(("engine", "layout", "mode", "asked"), [
    ("onnxruntime", "SD1.5", "onetime-negative", {"interval": 3}),
    *long(itertools.product(
        ("onnxruntime", "openvino"), ("SD1.5", "SDXL", "embedded"),
        ("off", "self-negative", "onetime-negative", "full"),
        ({"interval": 2}, {"interval": 6, "depth": "outermost block"}),
    )),
])  # fmt: skip
def test_a_stream_on_an_engine_equals_one_without(engine, layout, mode, asked):
    """Some ticks run as many rows whole as before, some none, and the first ones all."""
    from livediffusion.demo import loader

    pytest.importorskip(engine)
    if layout == "embedded":
        model, clip, _ = loader.load()
        conds = functools.partial(embedded, clip=clip)
        beside = Beside(model, engine, conds=conds)
        size, channels = 16, model.model.latent_format.latent_channels
    else:
        beside, size, channels = Beside(coherent.model(layout), engine), 8, 4
    for i in range(6):
        beside.run(tiny.latents(1, i, size, channels), mode=mode, reuse=asked)
    beside.steady(lambda i: tiny.latents(1, 6 + i, size, channels), 7, mode=mode, reuse=asked)
    reusing = beside.streams[1].coherent.neighbours.reusing
    rows, whole = reusing.looked()
    assert reusing.why == "" and whole < rows


@pytest.mark.parametrize(("engine", "layout", "kind", "asked"), [
    ("onnxruntime", "SD1.5", "both", {"interval": 3}),
    *long(itertools.product(
        ("onnxruntime", "openvino"), ("SD1.5", "SDXL"), KINDS,
        ({"interval": 2}, {"interval": 6, "depth": "outermost block"}),
    )),
])  # fmt: skip
def test_with_what_frames_remember_of_each_other(engine, layout, kind, asked):
    """Inner layers are those of the rows that run whole, and outer ones of all."""
    pytest.importorskip(engine)
    beside, settings = Beside(coherent.model(layout), engine), {**KINDS[kind], "reuse": asked}
    warm = 36 if LONG else 18
    for i in range(warm):
        beside.run(tiny.latents(1, i), **settings)
    beside.steady(lambda i: tiny.latents(1, warm + i), 6, **settings)
    reusing = beside.streams[1].coherent.neighbours.reusing
    rows, whole = reusing.looked()
    assert reusing.why == "" and whole < rows


def test_it_goes_on_through_every_change():
    """Prompt, noise, size, steps, a LoRA, a cut, a bad frame, and reuse in other ways or off."""
    beside = Beside(coherent.model())
    asked, size, levels = {"reuse": {"interval": 2}}, 8, SIGMAS
    changes = (
        {"prompt": 3, "seed": 5}, {"size": 16}, {"sigmas": SIGMAS[2:]}, {"strength": 0.8},
        {"reuse": {"interval": 3, "depth": "outermost block", "awake": 0.9}}, {"reuse": None},
    )  # fmt: skip
    if not LONG:
        changes = ({"prompt": 3, "size": 16}, {"sigmas": SIGMAS[2:], "strength": 0.8}, changes[4])
    for at, change in enumerate(changes):
        size = change.pop("size", size)
        levels = change.pop("sigmas", levels)
        asked |= change
        for i in range(6 if LONG else 4):
            latents = tiny.latents(1, 10 * at + i, size)
            if i == 3 and at == 0:
                latents[:] = float("nan")
            beside.run(latents, sigmas=levels, **asked)
    assert beside.attached.reason is None and beside.attached.fell_back == 0


def test_what_cannot_is_said_and_the_unet_does_it():
    """As it would without the engine: by the plan."""
    from livediffusion.compiled.inductor import Inductor

    beside = Beside(coherent.model(), Inductor)
    for i in range(6):
        beside.run(tiny.latents(1, i), sigmas=SIGMAS[2:], reuse={"interval": 2})
    assert beside.attached.ran == 0 and beside.attached.fell_back == 6
    assert beside.attached.reason.startswith("own knows no Live Reuse: choose cudagraph, onnx")
    rows, whole = beside.streams[1].coherent.neighbours.reusing.looked()
    assert whole < rows


def test_auto_measures_like_with_like():
    """Ticks of few and of many rows that run whole come in turns, and so do the two that are
    compared: the gain is that of calls that run the same."""
    from livediffusion.compiled.engine import Call, Eager, Shapes
    from livediffusion.compiled.faster import Faster
    from livediffusion.compiled.kept import Kept
    from livediffusion.compiled.reused import Reused

    class Twin(Eager):
        name = "twin"

        def __call__(self, call):
            clock.now += cost(call)
            return call.x

    class Unet:
        module = torch.nn.Linear(1, 1)

        def __call__(self, call):
            clock.now += 2 * cost(call)
            return call.x

        def copied(self):
            return self

    def cost(call):
        return 1.0 + 10.0 * len(call.reuse.whole)

    clock = types.SimpleNamespace(now=0.0)
    faster = Faster(Twin, Kept(None), lambda: "", clock=lambda: clock.now)
    x = torch.randn(4, 1, 2, 2)
    made = [
        Call(x, torch.zeros(4), None, reuse=Reused.of(0, torch.arange(count), x))
        for count in (1, 3)
    ]
    scopes = {faster.scope(Shapes.of(call)) for call in made}
    assert len(scopes) == 1
    faster.prepare(Unet(), Shapes.of(made[0]))
    faster._made.wait(10)
    for i in range(100):
        faster(made[i % 2])
    assert faster.chosen == "twin" and faster.gain == pytest.approx(2.0)
