"""Engines on a MODEL of ComfyUI: when they run, when the UNet itself does, and what is said."""

import logging

import pytest
import replaying
import tiny
import torch
from compiled_models import lora, patched, sampled_once

pytestmark = pytest.mark.comfy
pytest.importorskip("onnxruntime")

SIGMAS = (10.0, 5.0, 1.0, 0.0)


@pytest.fixture(autouse=True)
def inference(comfyui, monkeypatch):
    from livediffusion.host.models import engines

    monkeypatch.setattr(engines, "REST", 0.0)
    with torch.inference_mode():
        yield


def on(patcher, name="onnxruntime", make=None):
    """The MODEL on an engine, and the engine."""
    from livediffusion.compiled import choice
    from livediffusion.host.models.engines import Attached, attach

    said = []
    attached = Attached(
        name, "for a test", make or (lambda: choice.make(name, torch.device("cpu"))), said.append
    )
    attached.said = said
    return attach(patcher, attached), attached


def sampled(model, rows=2, size=(8, 8), tokens=8, prompt=1, **extra):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*(tiny.conditioning(i, tokens, **extra) for i in (prompt, 2)))
    guider.set_cfg(1.5)
    noise = torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(0))
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), torch.tensor(SIGMAS),
        disable_pbar=True,
    )  # fmt: skip


class Engine:
    """An engine of the test's own: fails when and how it is told."""

    name, bakes, capturable, placed, per_shape = "own", True, False, False, False
    remembers = False

    def __init__(self, trouble=None, at="call"):
        self.trouble, self.at, self.released = trouble, at, 0

    def scope(self, shapes):
        return shapes

    def prepare(self, unet, shapes):
        self.unet = unet
        if self.trouble and self.at == "prepare":
            raise self.trouble

    def __call__(self, call):
        if self.trouble and self.at == "call":
            raise self.trouble
        return self.unet(call)

    def moved(self):
        pass

    def describe(self):
        return {"engine": self.name}

    def release(self):
        self.released += 1


def test_runs_what_it_can_and_counts(caplog):
    base = tiny.model()
    model, attached = on(base)
    assert tiny.rms(sampled(model), sampled(base)) <= 1e-5
    assert tiny.rms(sampled(model, 3, (16, 8), 16), sampled(base, 3, (16, 8), 16)) <= 1e-5
    stats = attached.stats()
    assert (stats["calls"], stats["fallbacks"], stats["reason"]) == (6, 0, None)
    assert len(stats["made"]) == 1 and stats["made"][0]["seconds"]["export"] > 0
    assert attached.line() == "onnxruntime: for a test"


@pytest.mark.slow
def test_a_lora_after_the_node_is_baked_anew():
    """Strength by strength, and back."""
    base = tiny.model()
    model, _ = on(base)
    for strength in (None, 0.5, 0.9, None):
        both = (base, model) if strength is None else (lora(base, strength), lora(model, strength))
        for _ in range(2):
            truth, out = (sampled(patcher) for patcher in both)
            assert tiny.rms(out, truth) <= 1e-5, strength


def test_weights_that_change_all_the_time_are_not_baked(monkeypatch):
    from livediffusion.host.models import engines

    monkeypatch.setattr(engines, "REST", 3600.0)
    base = tiny.model()
    model, attached = on(base)
    sampled(model)
    for strength in (0.1, 0.2, 0.3):
        assert tiny.rms(sampled(patched(model, strength)), sampled(patched(base, strength))) <= 1e-6
    assert "weights have just changed" in attached.reason
    assert attached.ran == 3
    assert tiny.rms(sampled(model), sampled(base)) <= 1e-5
    assert attached.ran == 6


def test_two_models_in_turns_both_get_an_engine():
    """Not a slider, but two LoRAs in one graph: neither is made anew for the other."""
    base = tiny.model()
    made = []
    model, attached = on(base, "own", lambda: made.append(Engine()) or made[-1])
    pair = patched(model, 0.1), patched(model, 0.2)
    for _ in range(4):
        for patcher in pair:
            sampled(patcher)
    assert attached.fell_back == 0 and len(made) == 3  # the first is looked at, not used


def spoil(patcher, how):
    """Hang on a MODEL what an engine cannot do."""
    import comfy.patcher_extension

    def attention(q, context, value, extra):
        return q * 0.5, context, value

    def replaced(q, k, v, extra):
        return q * 0.3

    def block(h, options):
        return h * 0.9

    def wrapped(executor, x, *args, **kwargs):
        return executor(x * 0.9, *args, **kwargs)

    clone = patcher.clone()
    if how == "attn1_patch":
        clone.set_model_attn1_patch(attention)
    elif how == "attn2_replace":
        clone.set_model_attn2_replace(replaced, "middle", 0)
    elif how == "input_block_patch":
        clone.set_model_input_block_patch(block)
    elif how == "wrapped":
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        clone.add_wrapper_with_key(kind, "another", wrapped)
    elif how == "part":
        attn2 = "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k"
        wide = clone.get_model_object(attn2).weight.shape
        other = torch.nn.Linear(wide[1], wide[0], bias=False)
        torch.nn.init.zeros_(other.weight)
        clone.add_object_patch(attn2, other)
    elif how == "option":
        clone.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda func, *args, **kwargs: func(*args, **kwargs) * 0.9
        )
    return clone


@pytest.mark.parametrize(
    ("how", "said", "engine"),
    [
        ("attn1_patch", "patched the UNet (patches: attn1_patch)", "onnxruntime"),
        ("attn2_replace", "patched the UNet (patches_replace: attn2)", "cudagraph"),
        ("input_block_patch", "patches: input_block_patch", "onnxruntime"),
        ("wrapped", "another node has wrapped the UNet", "onnxruntime"),
        ("wrapped", "another node has wrapped the UNet", "cudagraph"),
        ("part", "replaced a part of the UNet (diffusion_model.input_blocks.3.1", "cudagraph"),
        ("option", "patched the UNet (optimized_attention_override)", "cudagraph"),
    ],
)
def test_what_only_the_unet_can_do_is_done_by_it(engine, how, said, caplog):
    """Not a call by the engine, the right picture, and the reason said once."""
    from livediffusion.compiled.cudagraph import CudaGraph

    base = tiny.model()
    make = None if engine == "onnxruntime" else lambda: CudaGraph(replaying.Replaying)
    model, attached = on(base, engine, make)
    truth = sampled(spoil(base, how))
    assert tiny.rms(truth, sampled(base)) > 1e-4
    with caplog.at_level(logging.WARNING):
        assert tiny.rms(sampled(spoil(model, how)), truth) <= 1e-6
        sampled(spoil(model, how))
    assert attached.ran == 0 and attached.fell_back == 6
    assert said in attached.reason
    assert caplog.text.count("calls ran eager") == 1
    assert tiny.rms(sampled(model), sampled(base)) <= 1e-5
    # a shape has to come three times before it is recorded
    assert (attached.ran, attached.unsettled) == ((3, 0) if engine == "onnxruntime" else (1, 2))


@pytest.mark.parametrize("at", ["prepare", "call"])
@pytest.mark.parametrize(
    "trouble",
    [
        RuntimeError("kernel exploded"),
        torch.cuda.OutOfMemoryError("out of memory"),
        OSError("disk"),
    ],
    ids=lambda trouble: type(trouble).__name__,
)
def test_a_failure_never_stops_the_picture(trouble, at, caplog):
    base = tiny.model()
    made = []

    def make():
        made.append(Engine(trouble, at))
        return made[-1]

    model, attached = on(base, "own", make)
    for _ in range(3):
        assert tiny.rms(sampled(model), sampled(base)) <= 1e-6
    assert str(trouble) in attached.reason
    assert attached.ran == 0 and attached.fell_back == 9
    # tried once for this shape and these weights, not at every call
    assert len(made) == 2 and made[-1].released >= 1
    assert caplog.text.count("calls ran eager") == 1


def test_a_failure_belongs_to_the_weights_it_came_with():
    base = tiny.model()
    fails = [True]
    model, attached = on(base, "own", lambda: Engine(RuntimeError("once") if fails else None))
    sampled(model)
    assert attached.ran == 0
    fails.clear()
    sampled(patched(model, 0.1))
    assert attached.ran == 3
    sampled(model)
    assert attached.ran == 3


def test_an_interrupt_is_not_a_failure():
    import comfy.model_management

    stop = comfy.model_management.InterruptProcessingException()
    model, attached = on(tiny.model(), "own", lambda: Engine(stop))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(model)
    assert attached.fell_back == 0


def test_hooks_change_weights_while_sampling():
    """A LoRA as a hook: its weights are not those the engine was made with."""
    import comfy.hooks

    base = tiny.model()
    model, attached = on(base)
    key = "diffusion_model.input_blocks.3.0.in_layers.2.weight"
    change = torch.ones_like(base.model.state_dict()[key]) * 0.05
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = {key: ("diff", (change,))}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    truth = sampled(base, hooks=group)
    assert tiny.rms(truth, sampled(base)) > 1e-3
    assert tiny.rms(sampled(model, hooks=group), truth) <= 1e-6
    assert "hooks change the weights" in attached.reason


def test_only_so_many_shapes_are_kept():
    released = []

    class Counting(Engine):
        def release(self):
            released.append(self)

    model, attached = on(tiny.model(), "own", Counting)
    for rows in range(1, 8):
        sampled(model, rows)
    assert len(attached.stats()["made"]) == 2 and len(released) == 5
    attached.release()
    assert attached.stats()["made"] == [] and len(released) == 7


def test_one_engine_replaces_another():
    """Two nodes in a row: the second one's engine runs, the first one's does not."""
    base = tiny.model()
    first, one = on(base, "own", Engine)
    second, two = on(first, "own", Engine)
    sampled(second)
    assert (one.ran, two.ran) == (0, 3)
    sampled(first)
    assert (one.ran, two.ran) == (3, 3)


def test_shapes_in_turns_both_get_an_engine_and_passing_ones_do_not():
    """A sampler asks for two shapes in each step; a ring that fills asks once for each."""

    class Shaped(Engine):
        bakes, per_shape = False, True

    base = tiny.model()
    model, attached = on(base, "own", Shaped)
    for rows in (1, 2, 3, 4, 3, 2, 1):
        sampled_once(model, rows)
    assert (attached.ran, attached.fell_back, attached.unsettled) == (0, 0, 7)
    for _ in range(6):
        for rows in (5, 6):
            assert tiny.rms(sampled_once(model, rows), sampled_once(base, rows)) <= 1e-6
    assert (attached.ran, attached.unsettled) == (8, 11)
    assert len(attached.stats()["made"]) == 2 and attached.reason is None


def test_inductor_compiles_more_engines_than_torch_recompiles():
    """torch compiles one code object eight times, and then runs it as it is without a word."""
    from livediffusion.compiled.engine import Call, Shapes
    from livediffusion.compiled.inductor import Inductor

    compiled, ran = [], []

    def backend(graph, example):
        compiled.append(graph)

        def run(*args):
            ran.append(graph)
            return graph(*args)

        return run

    def unet(call):
        return call.x * 2 + call.timesteps.view(-1, 1, 1, 1)

    unet.bare = lambda: unet
    torch._dynamo.reset()
    most = torch._dynamo.config.recompile_limit
    with torch.inference_mode(False):
        for rows in range(1, most + 4):
            call = Call(torch.ones(rows, 4, 8, 8), torch.ones(rows), None)
            engine = Inductor(backend)
            engine.prepare(unet, Shapes.of(call))
            ran.clear()
            assert torch.equal(engine(call), torch.full_like(call.x, 3.0))
            assert len(compiled) == rows and ran == [compiled[-1]]


@pytest.mark.slow
def test_inductor_keeps_up_with_the_weights():
    """What torch.compile makes reads ComfyUI's weights: a LoRA's strength compiles nothing.

    With dynamo alone, since its code generator takes a minute on a CPU; run.py engines runs that.
    """
    from livediffusion.compiled.inductor import Inductor

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    base = tiny.model()
    model, attached = on(base, "inductor", lambda: Inductor("eager"))
    made = []
    for strength in (None, 0.1, 0.2):
        both = (base, model)
        if strength is not None:
            both = (patched(base, strength), patched(model, strength))
        truth, out = (sampled(patcher) for patcher in both)
        assert tiny.rms(out, truth) <= 1e-5
        made.append(graphs["unique_graphs"])
    # the first change replaces a parameter, which costs one compilation; strengths cost none
    assert made[0] >= 1 and made[1] <= made[0] + 1 and made[2] == made[1]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert attached.fell_back == 0 and len(attached.stats()["made"]) == 1


@pytest.mark.parametrize("mode", ["off", "self-negative", "onetime-negative", "full"])
def test_streams_take_the_fast_path_with_an_engine(mode):
    """The engine's wrapper does not send a stream through ComfyUI's slow evaluation."""
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling.guider import RCFGGuider
    from livediffusion.host.sampling.stream import Settings, Stream

    base = tiny.model()
    model, attached = on(base)
    settings = Settings(SIGMAS, drain=True)
    outs = []
    for patcher in (base, model):
        guider = RCFGGuider(patcher, Guidance(mode))
        guider.set_conds(tiny.conditioning(1), tiny.conditioning(2))
        stream = Stream()
        outs.append(stream.run(guider, tiny.latents(6), settings))
        assert stream._kept is not None
    assert tiny.rms(outs[1], outs[0]) <= 1e-5
    assert attached.fell_back == 0 and attached.ran == 8
