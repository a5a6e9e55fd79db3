"""The recorded tick: always what the same stream gives without it, and never stale.

`replaying` stands for a CUDA graph: it repeats recorded operations on the tensors they were
recorded with, so a knob that Python had baked in, or an address that has changed, shows.
"""

import itertools

import pytest
import replaying
import tiny
import torch
from compiled_models import patched
from pairs import SIGMAS, Pair, compiled, settings

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("at_once")]

MODES = ("off", "self-negative", "onetime-negative", "full")


@pytest.mark.parametrize(
    ("mode", "rule", "ticks"),
    [
        *(pytest.param(mode, "lcm", 40, marks=pytest.mark.slow) for mode in MODES[:2] + MODES[3:]),
        *(
            pytest.param("self-negative", rule, 40, marks=pytest.mark.slow)
            for rule in ("euler", "dpmpp_2m", "unipc")
        ),
        ("onetime-negative", "lcm", 60),
    ],
)
def test_every_knob_changes_between_ticks(mode, rule, ticks):
    """Prompt, cfg, delta, seed, noise levels: one recording serves them all."""
    pair = Pair(tiny.model())
    knobs = itertools.cycle([
        {"cfg": 1.4, "delta": 1.0, "prompt": 1}, {"cfg": 2.0, "delta": 0.3, "prompt": 1},
        {"cfg": 1.2, "delta": 0.7, "prompt": 5}, {"cfg": 1.7, "delta": 1.0, "prompt": 6},
    ])  # fmt: skip
    for i in range(ticks):
        if i % 9 == 0:
            pair.guide(mode=mode, **next(knobs))
        levels = SIGMAS if i % 30 < 15 else (11.0, 4.0, 1.5, 0.6, 0.0)
        a, b = pair.run(settings(levels, rule, seed=i // 20), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6, i
    assert pair.captures == 1
    assert pair.attached.reason is None
    assert pair.plain.stats() == pair.graph.stats()


@pytest.mark.parametrize("mode", ["self-negative", "onetime-negative"])
def test_frames_that_share_a_slot(mode):
    pair = Pair(tiny.model(), frames_per_slot=2)
    pair.guide(mode=mode)
    for i in range(12):
        a, b = pair.run(settings(), tiny.latents(2, i))
        assert tiny.rms(b, a) <= 1e-6
    assert pair.captures == 1


@pytest.mark.parametrize("layout", ["SD2.1", "SDXL"])
def test_layouts(layout):
    """SDXL's pooled prompt is part of what is folded with the time."""
    patcher = tiny.model(layout=layout)
    pooled = patcher.model.model_config.unet_config.get("adm_in_channels")
    if pooled:
        patcher.model.encode_adm = lambda **kwargs: kwargs["pooled_output"]
    pair = Pair(patcher)
    for i in range(24):
        if i % 8 == 0:
            pair.guide(prompt=i, pooled=pooled)
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6, i
    assert pair.captures == 1


@pytest.mark.slow
def test_size_steps_mode_and_rule_change():
    """Each asks for a recording of its own, made after two ticks; outputs stay right."""
    pair = Pair(tiny.model())
    pair.guide()
    plans = [
        (settings(), 8), (settings(), 16), (settings(SIGMAS[1:]), 16),
        (settings((8.0, 0.0)), 8), (settings(rule="unipc"), 8), (settings(), 8),
    ]  # fmt: skip
    for asked, size in plans:
        for i in range(9):
            a, b = pair.run(asked, tiny.latents(1, i, size))
            assert tiny.rms(b, a) <= 1e-6, (asked, size, i)
    before = pair.captures
    assert before >= 5
    pair.guide(mode="onetime-negative")
    for i in range(9):
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6
    assert pair.captures == before + 1


@pytest.mark.slow
def test_lora_added_changed_and_taken_away():
    base = tiny.model()
    pair = Pair(base)
    pair.guide()
    outs = []
    for strength in (0.0, 0.05, 0.1, 0.0):
        compiled_before = pair.compiled
        pair.patcher = patched(base, strength)
        pair.compiled = patched(compiled_before, strength)
        pair.guide()
        for i in range(10):
            a, b = pair.run(settings(), tiny.latents(1, i))
            assert tiny.rms(b, a) <= 1e-6, (strength, i)
        outs.append(b)
        pair.compiled = compiled_before
    assert tiny.rms(outs[1], outs[0]) > 1e-3 and tiny.rms(outs[2], outs[1]) > 1e-3
    assert tiny.rms(outs[3], outs[0]) <= 1e-5


def test_a_model_that_comes_back_elsewhere_is_recorded_anew():
    """ComfyUI has unloaded it and loaded it again: the old addresses hold something else."""
    import comfy.model_management

    pair = Pair(tiny.model())
    pair.guide()
    for i in range(8):
        pair.run(settings(), tiny.latents(1, i))
    assert pair.captures == 1
    comfy.model_management.unload_all_models()
    for parameter in pair.patcher.model.parameters():
        old, parameter.data = parameter.data, parameter.data.clone()
        old.fill_(float("nan"))
    for i in range(8):
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6
    assert pair.captures == 2


def test_new_weights_at_the_same_place_reach_what_is_folded():
    """Keys and values of the prompt and the blocks' time are computed once, from the weights."""
    import comfy.model_management

    pair = Pair(tiny.model())
    pair.guide()
    for _ in range(8):
        before = pair.run(settings(), tiny.latents(1, 0))[1]
    comfy.model_management.unload_all_models()
    for name, parameter in pair.patcher.model.named_parameters():
        if "attn2.to_" in name or "emb_layers" in name:
            parameter.data.mul_(1.5)
    for i in range(8):
        a, b = pair.run(settings(), tiny.latents(1, 0))
        assert tiny.rms(b, a) <= 1e-6, i
    assert tiny.rms(b, before) > 1e-3


def test_another_time_scale_is_not_a_stale_graph():
    """Nodes such as ModelSamplingDiscrete put another model_sampling in the model's place."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
    from livediffusion.host.models.time_shift import shifted

    base = tiny.model()
    pair = Pair(base)
    engine = pair.compiled
    changes = (
        lambda model: model,
        lambda model: ModelSamplingDiscrete().patch(model, "lcm", False)[0],
        lambda model: ModelSamplingDiscrete().patch(model, "v_prediction", True)[0],
        lambda model: shifted(model, SIGMAS[:-1], (0.1, -0.2, 0.3, 0.1)),
        lambda model: model,
    )
    outs = []
    for change in changes:
        pair.patcher, pair.compiled = change(base), change(engine)
        pair.guide()
        for i in range(9):
            a, b = pair.run(settings(), tiny.latents(1, i))
            assert tiny.rms(b, a) <= 1e-6, i
        outs.append(b)
    for one, other in itertools.pairwise(outs):
        assert tiny.rms(one, other) > 1e-4
    assert tiny.rms(outs[-1], outs[0]) <= 1e-6


def test_what_is_constant_is_computed_once(monkeypatch):
    """In a steady stream no key, value or time embedding is computed again."""
    patcher = tiny.model()
    pair = Pair(patcher)
    pair.guide()
    for i in range(12):
        pair.graph.run(pair.guiders[1], tiny.latents(1, i), settings())
    calls = []
    parts = {
        part: name for name, part in patcher.model.diffusion_model.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v", "emb_layers", "time_embed"))
    }  # fmt: skip
    replaying.watch(monkeypatch, parts, lambda part, *args: calls.append(parts[part]))
    for i in range(8):
        pair.graph.run(pair.guiders[1], tiny.latents(1, i), settings())
    assert calls == []
    pair.guide(prompt=9)
    for i in range(8):
        pair.graph.run(pair.guiders[1], tiny.latents(1, i), settings())
    assert any(name.endswith("to_k") for name in calls)
    calls.clear()
    for i in range(8):
        pair.graph.run(pair.guiders[1], tiny.latents(1, i), settings())
    assert calls == []


def test_steady_state_makes_no_buffers_and_never_waits():
    """The recorder raises where a value is waited for; addresses are those of the first tick."""
    from livediffusion.compiled.tick import where

    pair = Pair(tiny.model())
    pair.guide()
    for i in range(8):
        pair.run(settings(), tiny.latents(1, i))
    ring, recorded = pair.graph.ring, next(iter(pair.graph.recorded._kept.values())).recorded
    before = where(ring.buffers), [t.data_ptr() for t in recorded.tensors.values()]
    outs = [pair.graph.run(pair.guiders[1], tiny.latents(1, i), settings()) for i in range(12)]
    assert before == (where(ring.buffers), [t.data_ptr() for t in recorded.tensors.values()])
    # what went out is the receiver's: the next tick does not write over it
    assert len({out.data_ptr() for out in outs}) == len(outs)
    assert all(out.isfinite().all() for out in outs)


class Broken(replaying.Replaying):
    def capture(self, work):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(caplog):
    pair = Pair(tiny.model(), recording=Broken)
    pair.guide()
    for i in range(12):
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6
    assert "not permitted when stream is capturing" in pair.attached.reason
    assert pair.attached.fell_back > 0
    assert any("calls ran eager" in line for line in pair.attached.said)
    lines = [r for r in caplog.records if "could not be recorded" in r.getMessage()]
    assert len(lines) == 1


def test_a_wait_inside_the_model_is_not_recorded():
    """A patch that looks at a value works; it only cannot be part of a graph."""
    patcher = tiny.model()
    unet = patcher.model.diffusion_model
    before = unet._forward

    def looking(x, timesteps, *args, **kwargs):
        assert float(timesteps[0]) >= 0
        return before(x, timesteps, *args, **kwargs)

    unet._forward = looking
    pair = Pair(patcher)
    pair.guide()
    for i in range(8):
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6
    assert "while recording" in pair.attached.reason
    assert pair.captures == 0


def test_bad_frames_are_replaced_inside_the_graph():
    pair = Pair(tiny.model())
    pair.guide()
    for i in range(20):
        latents = tiny.latents(1, i)
        if i in (11, 12):
            latents[0, 0, 0, 0] = float("nan")
        a, b = pair.run(settings(), latents)
        assert b.isfinite().all() and tiny.rms(b, a) <= 1e-6
    assert pair.graph.stats()["dropped"] == 2
    assert pair.captures == 1


def test_masks_and_controls_in_flight_take_the_ordinary_way():
    """A tick that needs more than one plain call runs as it is, between two that do not."""
    pair = Pair(tiny.model())
    pair.guide()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    for i in range(20):
        asked = {"mask": mask} if 8 <= i < 11 else {}
        latents = tiny.latents(1, i)
        a = pair.plain.run(pair.guiders[0], latents, settings(), **asked)
        b = pair.graph.run(pair.guiders[1], latents, settings(), **asked)
        assert tiny.rms(b, a) <= 1e-6, i
    assert pair.captures == 1


def test_a_stream_keeps_neither_guider_nor_model():
    """A recording in a stream that lives on does not hold a model that ComfyUI has dropped."""
    import gc
    import weakref

    import comfy.model_management

    pair = Pair(tiny.model())
    pair.guide()
    for i in range(8):
        pair.run(settings(), tiny.latents(1, i))
    assert pair.captures == 1
    stream, model = pair.graph, weakref.ref(pair.patcher.model)
    comfy.model_management.unload_all_models()
    del pair
    gc.collect()
    assert model() is None
    assert stream.ring is not None


def test_the_unet_alone_on_a_graph():
    """In a stock sampler: each call a replay, equal to the UNet, prompt changes included."""
    import comfy.samplers

    base = tiny.model()
    model, attached = compiled(base)
    for seed in (1, 5):
        outs = []
        for patcher in (base, model):
            asked = comfy.samplers.CFGGuider(patcher)
            asked.set_conds(tiny.conditioning(seed), tiny.conditioning(2))
            asked.set_cfg(1.5)
            noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            outs.append(asked.sample(
                noise, torch.zeros(2, 4, 8, 8), comfy.samplers.ksampler("dpmpp_2m"),
                torch.tensor(SIGMAS), disable_pbar=True,
            ))  # fmt: skip
        assert tiny.rms(outs[1], outs[0]) <= 1e-6
    stats = attached.stats()
    assert (stats["fallbacks"], stats["unsettled"], stats["calls"]) == (0, 2, 6)
    assert len(stats["made"]) == 1


def test_what_is_warmed_is_what_is_recorded():
    """Full guidance of scale 1 needs no negative, but its recording has one for when the scale
    changes: libraries must have seen that many rows before the capture, and kernels been built."""

    class Watching(replaying.Replaying):
        def capture(self, work):
            before.extend(rows)
            rows.clear()
            out = super().capture(work)
            recorded.extend(rows)
            return out

    before, recorded, rows = [], [], []
    pair = Pair(tiny.model(), recording=Watching)
    pair.guide(mode="full", cfg=1.0)
    unet = pair.compiled.model.diffusion_model
    first = unet.input_blocks[0][0]
    for i in range(8):
        a = pair.plain.run(pair.guiders[0], tiny.latents(1, i), settings())
        with pytest.MonkeyPatch.context() as patches:
            replaying.watch(patches, [first], lambda part, x: rows.append(len(x)))
            b = pair.graph.run(pair.guiders[1], tiny.latents(1, i), settings())
        assert tiny.rms(b, a) <= 1e-5, i
    assert recorded == [8]
    assert before == [1, 2, 3, 8, 8, 8]  # the ring fills, two ticks, and the call to be recorded


def test_a_ring_that_fills_makes_no_engines():
    """Of the row counts on the way to a full ring none comes again: not one is recorded, compiled
    or called a fallback."""
    made = replaying.Replaying.made
    pair = Pair(tiny.model())
    pair.guide()
    for i in range(12):
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6
    assert pair.captures == replaying.Replaying.made - made == 1
    stats = pair.attached.stats()
    assert stats["made"] == [] and (stats["fallbacks"], stats["reason"]) == (0, None)
    assert stats["unsettled"] == 5  # one, two, three rows; two of four before they are recorded


def test_the_stats_say_which_kernels_were_recorded(monkeypatch):
    from livediffusion.engine.buffers import Buffers
    from livediffusion.kernels import stream_step

    whole = Buffers.__init__

    def fits(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        self.unfused = ""

    def kernels():
        pair = Pair(tiny.model())
        pair.guide()
        for i in range(8):
            a, b = pair.run(settings(), tiny.latents(1, i))
            assert tiny.rms(b, a) <= 1e-5
        return pair.attached.stats()["ticks"]["kernels"]

    assert "not a CUDA tensor" in kernels()
    monkeypatch.setattr(Buffers, "__init__", fits)
    assert kernels() == "triton"
    monkeypatch.setattr(stream_step, "failed", "Triton failed: no compiler")
    assert kernels() == "Triton failed: no compiler"


def test_buffers_of_another_size_at_the_same_place_are_another_layout():
    import types

    from livediffusion.compiled.tick import layout

    memory = torch.zeros(4096)
    fold = types.SimpleNamespace(form=(("sigma", 4),), which="none", base=None)

    def work(*shape):
        buffers = types.SimpleNamespace(
            shape=shape, all=lambda: [memory], entry=lambda noise, mix: None
        )
        plan = types.SimpleNamespace(mix=None)
        return types.SimpleNamespace(buffers=buffers, noise=None, plan=plan, carried=None)

    assert layout(work(4, 8, 16), fold) == layout(work(4, 8, 16), fold)
    assert layout(work(4, 8, 16), fold) != layout(work(4, 16, 8), fold)
