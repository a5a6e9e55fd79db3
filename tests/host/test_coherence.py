"""What must hold of frames that help each other, whatever comes between: roads, interrupts, other
streams, other nodes, other models. tests/host/test_memory.py has the memory itself, other
layouts and what acts beside it."""


import itertools

import comfy.model_management
import pytest
import torch
from tiny_models import forget, inference, tiny_model  # noqa: F401

pytestmark = pytest.mark.comfy

SIGMAS = (8.0, 2.0, 0.5, 0.0)
NEAR = 1e-5
MEMORY = {"frames": 2, "interval": 2, "bank": "queue", "fuse": 0.4, "threshold": 0.5}


def helped(patcher, future=True, memory=True, levels="all", **settings):
    from livediffusion.engine.coherence.neighbours import Future, Memory
    from livediffusion.host.models.coherence import attach

    if future:
        patcher = attach(patcher, future=Future(levels))
    if memory:
        patcher = attach(patcher, memory=Memory(**{"levels": levels, **MEMORY, **settings}))
    return patcher


class Live:
    """A stream, and a guider that is made anew whenever its model or knobs change."""

    def __init__(self, model, frames=1, **knobs):
        from livediffusion.host.sampling.stream import Stream

        self.stream = Stream(frames)
        self.use(model, **knobs)

    def use(self, model, **knobs):
        import pairs

        pooled = model.model.model_config.unet_config.get("adm_in_channels")
        self.guider = pairs.guider(model, pooled=pooled, **knobs)
        return self

    def run(self, i, size=8, sigmas=SIGMAS, frames=1, **settings):
        import pairs
        import tiny

        asked = pairs.settings(sigmas, **settings)
        return self.stream.run(self.guider, tiny.latents(frames, i, size), asked)

    def runs(self, count, first=0, **more):
        return torch.cat([self.run(i, **more) for i in range(first, first + count)])

    @property
    def bank(self):
        return self.stream.coherent.neighbours.bank


def near(a, b):
    import tiny

    return tiny.rms(a, b) <= NEAR


def on_road(monkeypatch, road):
    from livediffusion.host.sampling import stream as streams
    from livediffusion.host.sampling.route import route

    monkeypatch.setattr(streams, "route", lambda *args: route(*args).at_least(road, "a test"))


def remembered(live):
    """All that a bank holds."""
    return [t.clone() for layer in live.bank.of([0]).layers.values() for t in layer.all()]


# -- off is off ---------------------------------------------------------------------------------


def test_an_ordinary_sampler_gives_what_it_gave():
    from compiled_models import sampled_once

    model = tiny_model()
    assert torch.equal(sampled_once(helped(model)), sampled_once(model))


def test_each_node_keeps_what_the_other_asked_for():
    from livediffusion.host.models.coherence import coherence_of

    model = tiny_model()
    one, other = helped(model), helped(helped(model, memory=False), future=False)
    first = helped(helped(model, future=False), memory=False)
    wanted = [coherence_of(m) for m in (one, other, first)]
    assert all(w.future and w.memory for w in wanted)
    assert coherence_of(model) is None
    outs = [Live(m).runs(9) for m in (one, other, first)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_without_it_the_stream_forgets_and_is_as_before():
    model = tiny_model()
    live = Live(helped(model))
    live.runs(9)
    assert live.bank.size > 0
    live.use(model)
    plain = Live(model)
    plain.runs(9)
    out, same = live.runs(6, 9), plain.runs(6, 9)
    assert live.stream.coherent.neighbours is None
    assert torch.equal(out[-3:], same[-3:]), "what was in flight has left"


# -- roads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("road", "mode"),
    [("PREPARED", "onetime-negative"), ("GUIDER", "onetime-negative"), ("PER_LEVEL", "full")],
)
def test_memory_is_the_same_on_every_road(monkeypatch, road, mode):
    from livediffusion.host.sampling.route import Road

    model = helped(tiny_model(), future=False)
    direct = Live(model, mode=mode).runs(10)
    on_road(monkeypatch, Road[road])
    live = Live(model, mode=mode)
    assert near(live.runs(10), direct)
    assert live.stream.stats()["road"] == road.lower().replace("_", " ")
    assert "coherence_off" not in live.stream.stats()


@pytest.mark.parametrize("frames", [1, 2])
def test_memory_of_frames_that_are_sampled_alone(frames):
    """A wrapper that nobody knows: frames have a sample() of their own, and memories by step."""
    import pairs
    import tiny

    model = helped(tiny_model(), future=False)
    clip = pairs.settings(SIGMAS, drain=True)
    sources = tiny.latents(8)
    live = Live(model)
    direct = live.stream.run(live.guider, sources, clip)
    strange = model.clone()
    strange.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"])
    )
    alone = Live(strange)
    out = [
        alone.stream.run(alone.guider, part, pairs.settings(SIGMAS))
        for part in sources.split(frames)
    ]
    assert alone.stream.stats()["road"] == "per frame"
    assert near(torch.cat(out), direct)


def test_what_has_no_neighbours_says_so(monkeypatch):
    from livediffusion.host.sampling.route import Road

    model = helped(tiny_model(), memory=False)
    on_road(monkeypatch, Road.PER_LEVEL)
    live, plain = Live(model), Live(tiny_model())
    assert torch.equal(live.runs(5), plain.runs(5))
    assert "noise levels" in live.stream.stats()["future_attention"]


def test_a_prompt_of_several_parts_goes_on_as_it_is():
    import pairs
    import tiny

    parts = tiny.conditioning(1) + tiny.conditioning(4)
    outs = []
    for model in (helped(tiny_model()), tiny_model()):
        live = Live(model)
        live.guider = pairs.guider(model)
        live.guider.set_conds(parts, tiny.conditioning(2))
        outs.append(live.runs(6))
    assert torch.equal(*outs)
    live = Live(helped(tiny_model()))
    live.guider.set_conds(parts, tiny.conditioning(2))
    live.runs(2)
    assert "several parts" in live.stream.stats()["coherence_off"]


# -- what comes between ---------------------------------------------------------------------------


@pytest.mark.parametrize("road", ["DIRECT", "GUIDER", "PER_LEVEL"])
def test_an_interrupt_in_a_tick_changes_nothing(monkeypatch, road):
    """In its last call, where the others have been made: as if the frame had never come."""
    from comfy.ldm.modules.attention import BasicTransformerBlock
    from livediffusion.host.sampling.route import Road

    on_road(monkeypatch, Road[road])
    model = helped(tiny_model())
    live, other = Live(model), Live(model)
    live.runs(6), other.runs(6)
    before = remembered(live)
    calls, real = [0], BasicTransformerBlock.forward
    blocks = 3 * (3 if road == "PER_LEVEL" else 1)

    def broken(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == blocks:
            raise comfy.model_management.InterruptProcessingException
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BasicTransformerBlock, "forward", broken)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            live.run(99)
    assert all(torch.equal(a, b) for a, b in zip(before, remembered(live), strict=True))
    assert torch.equal(live.runs(5, 6), other.runs(5, 6))


@pytest.mark.parametrize("road", ["DIRECT", "GUIDER", "PER_LEVEL"])
def test_memory_that_is_short_has_no_frame_take_its_step_twice(monkeypatch, road):
    """No keyframe can be put, half of each is there: the pictures are those of a stream that
    remembers nothing. When there is room again frames are remembered; the node says both."""
    from livediffusion.engine.coherence import bank
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.route import Road

    on_road(monkeypatch, Road[road])
    said = []
    model = attach(helped(tiny_model(), future=False, interval=1), said.append)
    live, plain = Live(model), Live(tiny_model())

    tried = itertools.count()

    def short(norms):
        raise torch.OutOfMemoryError(f"no more memory: {next(tried)} MiB are free. See the docs.")

    with monkeypatch.context() as patch:
        patch.setattr(bank, "unit", short)  # behind what is made room for
        assert near(live.runs(7), plain.runs(7))
    # once for each size, however often it is tried
    assert next(tried) > len(said) == len(set(said))
    assert "forgotten" in said[0] and "memory is short" in said[0], said
    assert not live.bank.size and "memory is short" in live.stream.stats()["memory"]
    live.runs(6, 7)
    size = live.stream.coherent.neighbours.size
    assert live.bank.size and said[-1] == f"memory: {size / 2**20:.1f} MB"
    assert "forgotten" not in live.stream.stats()["memory"]
    assert live.stream.coherent.number == 13


@pytest.mark.parametrize("what", ["finish", "looked", "tell"])
def test_whatever_fails_behind_the_step_leaves_the_step_taken(monkeypatch, what):
    from livediffusion.engine.blocks.reuse import Reusing
    from livediffusion.engine.blocks.schedule import DEPTHS, Reuse
    from livediffusion.host.models.coherence import attach

    broken = []

    def fails(*args):
        broken.append(1)
        raise RuntimeError("it broke")

    asked = {"memory": None, "reuse": Reuse(2, DEPTHS[1], 0.0), "tell_reuse": lambda line: None}
    live, other = (Live(attach(helped(tiny_model()), **asked)) for _ in range(2))
    if what == "tell":
        live.use(attach(helped(tiny_model()), **asked | {"tell_reuse": fails}))
    with monkeypatch.context() as patch:
        if what != "tell":
            patch.setattr(Reusing, what, fails)
        outs = live.runs(40)
    assert broken and live.stream.coherent.number == live.stream.ticks == 40
    if what == "finish":  # nothing is kept, so all is computed
        asked = {"memory": None}
        other = Live(attach(helped(tiny_model()), **asked))
    assert near(outs, other.runs(40))


def test_two_streams_share_nothing():
    model = helped(tiny_model())
    apart = [Live(model).runs(10, first) for first in (0, 50)]
    lives = [Live(model), Live(model)]
    together = [[], []]
    for i in range(10):
        for live, outs, first in zip(lives, together, (0, 50), strict=True):
            outs.append(live.run(first + i))
    assert all(torch.equal(torch.cat(a), b) for a, b in zip(together, apart, strict=True))


def test_a_clip_begins_with_nothing():
    import pairs
    import tiny

    model = helped(tiny_model())
    outs = []
    for _ in range(2):
        live = Live(model)
        outs.append(
            live.stream.run(live.guider, tiny.latents(9), pairs.settings(SIGMAS, drain=True))
        )
    assert torch.equal(*outs)
    assert outs[0].shape[0] == 9


def test_a_run_of_frames_that_was_skipped_is_no_gap():
    """Only frames that enter are numbered; time without them is none."""
    model = helped(tiny_model())
    live, other = Live(model), Live(model)
    a = live.runs(5), live.runs(5, 5)
    assert torch.equal(torch.cat(a), other.runs(10))


@pytest.mark.parametrize("road", ["DIRECT", "GUIDER"])
def test_a_bad_frame_poisons_nobody(monkeypatch, road):
    import pairs
    import tiny
    from livediffusion.host.sampling.route import Road

    on_road(monkeypatch, Road[road])
    live = Live(helped(tiny_model(), interval=1))
    for i in range(16):
        latents = tiny.latents(1, i)
        if i in (0, 7, 8):
            latents[:] = float("nan")
        out = live.stream.run(live.guider, latents, pairs.settings(SIGMAS))
        # before that it is an estimate, of a bad frame a bad one
        assert i < 2 or out.isfinite().all(), i
        assert all(t.isfinite().all() for t in remembered(live)), i
    assert live.stream.stats()["dropped"] > 0


# -- what a bank outlives, and what it does not ----------------------------------------------------

KEEPS = {
    "prompt": {"knobs": {"prompt": 5}},
    "guidance": {"knobs": {"cfg": 2.0, "delta": 0.4}},
    "seed": {"seed": 3},
    "levels of noise": {"sigmas": (9.0, 3.0, 0.7, 0.0)},
    "interval": {"memory": {"interval": 3}},
    "threshold": {"memory": {"threshold": 0.9}},
    "fuse": {"memory": {"fuse": 0.2}},
    "future": {"memory": {"future": False}},
}
ENDS = {
    "size": {"size": 16},
    "steps": {"sigmas": (8.0, 2.0, 0.0)},
    "queue": {"memory": {"frames": 3}},
    "bank": {"memory": {"bank": "merged"}},
    "fusion": {"memory": {"fuse": 0.0}},
    "weights": {"lora": 0.7},
    "model": {"other": True},
}


@pytest.mark.parametrize("name", [*KEEPS, *ENDS])
def test_what_a_bank_outlives(name):
    import coherent
    from compiled_models import lora

    change = {**KEEPS, **ENDS}[name]
    base = tiny_model()
    live = Live(helped(base))
    live.runs(8)
    bank = live.bank
    if "other" in change:
        base = coherent.model()
    if "lora" in change:
        base = lora(base, change["lora"])
    live.use(helped(base, **change.get("memory", {})), **change.get("knobs", {}))
    more = {key: change[key] for key in ("size", "seed", "sigmas") if key in change}
    out = live.runs(6, 8, **more)
    assert out.isfinite().all()
    assert (live.bank is bank) == (name in KEEPS)
    assert live.bank.of([0]).full(range(3 if name != "steps" else 2))


# -- other nodes and other models ------------------------------------------------------------------


def test_another_nodes_attention_is_called_with_what_is_remembered():
    from comfy.ldm.modules.attention import optimized_attention

    keys = []

    def theirs(q, k, v, extra):
        keys.append((q.shape[1], k.shape[1]))
        return optimized_attention(q, k, v, heads=extra["n_heads"])

    model = tiny_model()
    patched = model.clone()
    for block in (("input", 3), ("middle", 0), ("output", 0)):
        patched.set_model_attn1_replace(theirs, *block)
    ours = Live(helped(patched, future=False))
    out = ours.runs(12)
    assert ours.stream.stats()["road"] == "per frame"
    # alone, frames come out n - 1 runs earlier
    wanted = Live(helped(model, future=False)).runs(14)
    assert any(k == q * 3 for q, k in keys), "two keyframes behind its own"
    assert near(out, wanted[2:])


@pytest.mark.parametrize("wrong", ["one key for every query", "as many rows as it likes"])
def test_another_nodes_attention_that_takes_no_more_keys(wrong):
    def theirs(q, k, v, extra):
        return v  # perturbed attention

    patched = tiny_model().clone()
    if wrong.startswith("one"):
        patched.set_model_attn1_replace(theirs, "middle", 0)
    else:
        # hypertile: pictures in pieces
        patched.set_model_attn1_patch(
            lambda n, k, v, extra: [t.unflatten(1, (2, -1)).flatten(0, 1) for t in (n, k, v)]
        )
        patched.set_model_attn1_output_patch(
            lambda n, extra: n.unflatten(0, (-1, 2)).flatten(1, 2)
        )
    live = Live(helped(patched))
    out = live.runs(8)
    assert out.isfinite().all()


@pytest.mark.parametrize("node", ["PerturbedAttentionGuidance", "SelfAttentionGuidance"])
def test_nodes_that_look_at_attention(node):
    import importlib

    file = {"P": "nodes_pag", "S": "nodes_sag"}[node[0]]
    kind = getattr(importlib.import_module(f"comfy_extras.{file}"), node)
    given = (2.0,) if node[0] == "P" else (0.5, 2.0)
    if hasattr(kind, "execute"):
        patched = kind.execute(tiny_model(), *given).args[0]
    else:
        patched = getattr(kind(), kind.FUNCTION)(tiny_model(), *given)[0]
    live = Live(helped(patched), mode="full", cfg=2.0)
    assert live.runs(8).isfinite().all()
    assert live.bank.of([0]).filled[0] == 2


def test_levels():
    """SD1.5's own layout, without its weights: four levels, and what each choice takes of them."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from livediffusion.host.models.coherence import chosen, places

    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 16,
        "use_spatial_transformer": True, "legacy": False,
    }  # fmt: skip
    known = places(UNetModel(**config, device="meta", dtype=torch.float32))
    scales = {place.name: place.scale for place in known}
    assert sorted(scales.values()) == [1] * 5 + [2] * 5 + [4] * 5 + [8]
    assert scales["middle.0.0"] == 8
    assert {scales[n] for n in chosen(known, "all but the finest")} == {2, 4, 8}
    assert {scales[n] for n in chosen(known, "deepest")} == {4, 8}
    assert len(chosen(known, "all")) == 16
    fused = {place.name for place in known if place.fused}
    assert fused == {"middle.0.0", *[f"output.{i}.0" for i in range(3, 9)]}
