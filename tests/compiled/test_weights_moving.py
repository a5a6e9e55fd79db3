"""Weights that ComfyUI moves while a stream runs: no recording and no engine reads where they were.

The old memory is overwritten (tests/moving.py), so reading it shows at once.
"""

import os

import moving
import pytest
import tiny
import torch
from compiled_models import lora, patched
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pairs import SIGMAS, Pair, compiled, settings

pytestmark = pytest.mark.comfy

EXAMPLES = int(os.environ.get("LIVEDIFFUSION_EXAMPLES", "8"))


@pytest.fixture(autouse=True)
def at_once(comfyui, monkeypatch):
    """Weights count as settled at once."""
    import comfy.model_management
    from livediffusion.host.models import engines
    from livediffusion.host.sampling import recordings

    monkeypatch.setattr(recordings, "REST", 0.0)
    monkeypatch.setattr(engines, "REST", 0.0)
    comfy.model_management.unload_all_models()
    with torch.inference_mode():
        yield


def running(**more):
    """A pair whose ticks are recorded."""
    pair = Pair(tiny.model(), **more)
    pair.guide()
    agree(pair, 8)
    assert pair.captures == 1
    return pair


def apart(frames_per_slot=1):
    """A pair whose streams have models of their own, alike, and the one on the engine.

    Of one model ComfyUI would patch the weights anew whenever the other stream comes, whose LoRA is
    another to it.
    """
    pair = Pair(tiny.model(prompt=1.0), frames_per_slot)
    pair.compiled, pair.attached = compiled(tiny.model(prompt=1.0))
    return pair, pair.compiled


def agree(pair, ticks, seed=0, asked=None, size=8):
    for i in range(ticks):
        a, b = pair.run(asked or settings(), tiny.latents(pair.f, seed + i, size))
        assert torch.isfinite(a).all() and tiny.rms(b, a) <= 1e-5, i


def bare(patcher):
    """A clone without an engine: loading it calls nobody."""
    from livediffusion.host.models.engines import without

    return without(patcher)


@pytest.mark.parametrize("move", [moving.elsewhere, moving.partly_unloaded])
def test_a_recorded_tick_does_not_replay_where_the_weights_were(move):
    pair = running()
    move(pair.compiled)
    agree(pair, 8, seed=20)
    assert pair.captures == 2


def test_back_through_another_clone():
    """As many bytes as before and the same patches, at other addresses, and nobody has called."""
    import comfy.model_management

    pair = running()
    epoch = pair.attached.epoch
    moving.partly_unloaded(pair.compiled)
    comfy.model_management.load_models_gpu([bare(pair.compiled)])
    moving.elsewhere(pair.compiled, "input_blocks.3")
    assert pair.attached.epoch == epoch
    agree(pair, 8, seed=20)
    assert pair.captures == 2


def test_a_lora_that_is_patched_call_by_call():
    """Half of it lies there without its patches: ComfyUI applies them in each call."""
    import comfy.model_management

    pair, engine = apart()
    pair.patcher, pair.compiled = lora(pair.patcher), lora(engine)
    pair.guide()
    agree(pair, 8)
    assert pair.captures == 1
    unet = pair.compiled.model.diffusion_model
    moving.partly_unloaded(pair.compiled, 60_000)
    assert any(getattr(part, "weight_function", None) for part in unet.modules())
    agree(pair, 1, seed=20)
    comfy.model_management.load_models_gpu([pair.compiled])
    agree(pair, 8, seed=30)
    assert pair.captures == 2 and pair.attached.reason is None


@pytest.fixture
def device(monkeypatch):
    """Says which weights are on another device than the model's: on a CPU there is only one."""
    from livediffusion.compiled import cudagraph, weights
    from livediffusion.compiled.engine import WeightsAway
    from livediffusion.host.sampling import recordings

    gone, real = [], weights.fixed

    def fixed(module, device):
        if gone:
            raise WeightsAway(f"the weights are not all on {device}: {gone[0]}")
        real(module, device)

    monkeypatch.setattr(cudagraph, "fixed", fixed)
    monkeypatch.setattr(recordings, "fixed", fixed)
    return gone


def sampled(model, prompt=1):
    import comfy.samplers

    asked = comfy.samplers.CFGGuider(model)
    asked.set_conds(tiny.conditioning(prompt), tiny.conditioning(2))
    asked.set_cfg(1.5)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return asked.sample(
        noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"),
        torch.tensor(SIGMAS), disable_pbar=True,
    )  # fmt: skip


def test_the_engine_says_that_they_are_away_and_comes_back(device):
    """In a stock sampler: eager for as long as it lasts, and nothing has to be reset."""
    base = tiny.model()
    pair = Pair(base)
    attached = pair.attached
    truth = sampled(base)
    assert tiny.rms(sampled(pair.compiled), truth) <= 1e-5
    ran = attached.ran
    assert ran > 0 and attached.reason is None
    device.append("partly unloaded")
    for _ in range(2):
        moving.partly_unloaded(pair.compiled)
        # the node's clone is what ComfyUI has loaded, so its sampling loads nothing
        assert tiny.rms(sampled(pair.compiled), truth) <= 1e-5
    assert attached.ran == ran
    assert "the weights are not all on" in attached.reason
    assert "calls ran eager: the weights" in attached.line()
    assert attached._broken == {}
    device.clear()
    moving.elsewhere(pair.compiled)
    for _ in range(2):
        assert tiny.rms(sampled(pair.compiled), truth) <= 1e-5
    assert attached.ran > ran
    assert attached.reason is None and "eager" not in attached.said[-1]


def test_a_stream_says_so_too_and_is_recorded_again(device):
    pair = running()
    device.append("partly unloaded")
    moving.elsewhere(pair.compiled)
    agree(pair, 8, seed=20)
    assert pair.captures == 1
    assert "the weights are not all on" in pair.attached.reason
    device.clear()
    moving.elsewhere(pair.compiled)
    agree(pair, 8, seed=40)
    assert pair.captures == 2 and pair.attached.reason is None


def test_an_engine_is_not_refitted_with_weights_that_lack_their_patches():
    """TensorRT takes a copy of what lies there."""
    import types

    import comfy.model_management
    from livediffusion.compiled.engine import WeightsAway
    from livediffusion.host.models.tensorrt import _Weights

    model, refitted = lora(tiny.model()), []
    engine = types.SimpleNamespace(loads=0, refittable=True, refit=refitted.append)
    comfy.model_management.load_models_gpu([model])
    model.pre_run()
    moving.partly_unloaded(model, 60_000)
    follow = _Weights(None)
    with pytest.raises(WeightsAway, match="patched call by call"):
        follow(model.model, engine)
    assert refitted == []
    comfy.model_management.load_models_gpu([model])
    follow(model.model, engine)
    assert len(refitted) == 1
    model.cleanup()


def test_moved_weights_are_left_alone_until_they_stay(monkeypatch):
    """Memory so short that they move every few frames: recording would never pay."""
    from livediffusion.host.models import engines
    from livediffusion.host.sampling import recordings

    pair = running()
    monkeypatch.setattr(recordings, "REST", 3600.0)
    monkeypatch.setattr(engines, "REST", 3600.0)
    for i in range(3):
        moving.elsewhere(pair.compiled)
        agree(pair, 4, seed=10 * i)
    assert pair.captures == 1 and pair.attached.stats()["made"] == []


def test_weights_that_move_within_a_run():
    """A clip is one run; a hint that has to be encoded may make room in the middle of it."""
    pair = running()
    stream, guider = pair.graph, pair.guiders[1]
    truth = pair.plain.run(pair.guiders[0], tiny.latents(6, 3), settings(drain=True))

    def move(done, total, estimate):
        if done == 5:
            moving.elsewhere(pair.compiled)

    out = stream.run(guider, tiny.latents(6, 3), settings(drain=True), progress=move)
    assert tiny.rms(out, truth) <= 1e-5


def test_recordings_end_with_the_engine():
    """The MODEL is wired without it: what was recorded for it holds memory for nothing."""
    from pairs import guider

    pair = running()
    assert pair.graph.recorded._kept
    bare = guider(pair.patcher)
    for i in range(3):
        a = pair.plain.run(pair.guiders[0], tiny.latents(1, i), settings())
        assert tiny.rms(pair.graph.run(bare, tiny.latents(1, i), settings()), a) <= 1e-5
    assert not pair.graph.recorded._kept
    agree(pair, 8)
    assert pair.captures == 2


# -- sequences of everything ----------------------------------------------------------------------

MODES = ("off", "self-negative", "onetime-negative", "full")
STEPS = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 6)),
    st.tuples(st.just("move"), st.sampled_from(["", "input_blocks", "out", "middle_block"])),
    st.tuples(st.just("part"), st.sampled_from([1, 20_000, 200_000])),
    st.tuples(st.just("unload"), st.booleans()),
    st.tuples(st.just("another"), st.booleans()),
    st.tuples(st.just("lora"), st.sampled_from([0.0, 0.05, 0.1])),
    st.tuples(st.just("cfg"), st.sampled_from([1.0, 1.4, 2.0])),
    st.tuples(st.just("delta"), st.sampled_from([0.3, 1.0])),
    st.tuples(st.just("mode"), st.sampled_from(MODES)),
    st.tuples(st.just("prompt"), st.integers(1, 3)),
    st.tuples(st.just("size"), st.sampled_from([8, 16])),
    st.tuples(st.just("n"), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("sampling"), st.booleans()),
)  # fmt: skip


class World:
    """Both streams, and everything that a user or ComfyUI may do to them."""

    def __init__(self, frames_per_slot):
        self.pair, self.engine = apart(frames_per_slot)
        self.base = self.pair.patcher
        self.moved = self.engine.model
        self.knobs = {"cfg": 1.4, "delta": 1.0, "prompt": 1, "mode": "self-negative"}
        self.strength, self.zero_terminal = 0.0, False
        self.size, self.n, self.seed = 8, 4, 0
        self.model()

    def model(self):
        """What is wired: LoRA and sampling patch behind the base, or the engine's node."""
        from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

        both = []
        for patcher in (self.base, self.engine):
            if self.strength:
                patcher = patched(patcher, self.strength)
            if self.zero_terminal:
                patcher = ModelSamplingDiscrete().patch(patcher, "v_prediction", False)[0]
            both.append(patcher)
        self.pair.patcher, self.pair.compiled = both
        self.pair.guide(**self.knobs)

    def do(self, what, how):
        import comfy.model_management

        if what == "run":
            sigmas = SIGMAS[-self.n - 1 :]
            agree(self.pair, how, self.seed, settings(sigmas), self.size)
            self.seed += how
        elif what == "move":
            moving.elsewhere(self.engine, how)
        elif what == "part":
            if self.moved.model_loaded_weight_memory > how and not self.moved.model_lowvram:
                moving.partly_unloaded(self.engine, how)
        elif what == "unload":
            comfy.model_management.unload_all_models()
            if how:
                moving.elsewhere(self.engine)
        elif what == "another":
            without = self.pair.compiled if how else self.engine
            comfy.model_management.load_models_gpu([bare(without)])
        elif what in ("size", "n"):
            setattr(self, what, how)
        else:
            if what == "lora":
                self.strength = how
            elif what == "sampling":
                self.zero_terminal = how
            else:
                self.knobs[what] = how
            self.model()


@given(st.sampled_from([1, 1, 2]), st.lists(STEPS, min_size=3, max_size=14))
@pytest.mark.slow
@hypothesis_settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_happens_both_streams_agree(f, steps):
    import comfy.model_management

    world = World(f)
    world.do("run", 8)
    assert world.pair.captures == 1
    for step in steps:
        world.do(*step)
    world.do("run", 4)
    comfy.model_management.unload_all_models()
