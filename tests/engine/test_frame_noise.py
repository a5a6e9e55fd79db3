"""Frames that bring their own noise into the ring, on a cheap nonlinear denoiser."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from livediffusion.engine.guidance import MODES, Guidance
from livediffusion.engine.noise import FrameNoise, SlotNoise
from livediffusion.engine.ring import Ring
from livediffusion.engine.step_rules import STEP_RULES
from rings import SHAPE, SPACES, Model, Raw, alone, clip, course, frames, run
from torch.utils._python_dispatch import TorchDispatchMode

LATER = SlotNoise(99, SHAPE)


def fields(count, slots, seed=0):
    """[count, slots, C, H, W]: each frame's noise at every slot."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(count, slots, *SHAPE, generator=generator)


def own_clip(sources, prompts, own, the_course, guidance, per_slot, model, every=1):
    """As rings.clip, each frame with its noise; of those that enter together where i % every is
    not 0 all take the stream's."""
    ring, out, ticks = Ring(per_slot), [], 0
    for i in range(0, len(sources), per_slot):
        part = slice(i, i + per_slot)
        noise = FrameNoise(list(own[part]), LATER) if i // per_slot % every == 0 else LATER
        tick = run(ring, model, guidance, sources[part], prompts[part], the_course, noise)
        ticks += 1
        out += tick.finished
    while ring.in_flight:
        out += run(ring, model, guidance).finished
        ticks += 1
    return torch.cat([latents for _, latents in out]), ticks, ring


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 6),
    count=st.integers(1, 9),
    per_slot=st.integers(1, 4),
    rule=st.sampled_from(sorted(STEP_RULES)),
    space=st.sampled_from(sorted(SPACES)),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
    kind=st.sampled_from([Model, Raw]),
    slots=st.integers(1, 6),
    every=st.integers(1, 3),
)
def test_each_frame_as_if_alone_with_its_noise(
    n, count, per_slot, rule, space, mode, seed, kind, slots, every
):
    the_course, guidance = course(rule, n, space), Guidance(mode, 1.4, 0.8)
    sources, own = frames(count, seed), fields(count, slots, seed)
    prompts = [0.1 * i for i in range(count)]
    out, ticks, _ = own_clip(sources, prompts, own, the_course, guidance, per_slot, kind(), every)
    assert ticks == -(-count // per_slot) + the_course.n - 1
    for i in range(count):
        moves = i // per_slot % every == 0
        noise = FrameNoise([own[i]], LATER) if moves else LATER
        want = alone(sources[i], prompts[i], the_course, noise, guidance)
        error = (out[i] - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error <= (1e-5 if kind is Model else 5e-5)


@pytest.mark.parametrize("kind", [Model, Raw])
@pytest.mark.parametrize("per_slot", [1, 2])
def test_the_same_noise_for_all_is_the_fixed_noise(kind, per_slot):
    the_course, guidance = course("lcm", 4), Guidance("self-negative", 1.4, 0.8)
    sources, noise = frames(6), SlotNoise(3, SHAPE)
    own = torch.stack([noise.slot(k) for k in range(4)]).expand(6, 4, *SHAPE)
    prompts = [0.1] * 6
    got, *_ = own_clip(sources, prompts, own, the_course, guidance, per_slot, kind())
    want, *_ = clip(sources, prompts, the_course, guidance, per_slot, kind(), noise)
    assert torch.equal(got, want)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["lcm", "euler", "unipc"])
@pytest.mark.parametrize("kind", [Model, Raw])
def test_a_steady_stream_makes_no_plan_and_never_waits(kind, rule):
    ring, the_course, guidance = Ring(), course(rule, 4), Guidance("off", 1.0)
    sources, own = frames(60), fields(60, 4)
    made, counts = [], set()
    for i in range(24):
        noise = FrameNoise([own[i]], LATER)
        with Seen() as spy:
            run(ring, kind(), guidance, sources[i : i + 1], [0.0], the_course, noise)
        plans = {key: (id(p), id(p.fold), p.planes is not None) for key, p in ring._plans.items()}
        addresses = [t.data_ptr() for t in ring.buffers.all()]
        if i >= 12:
            made.append((plans, addresses))
            counts.add(len(spy.ops))
            for waits in ("_local_scalar_dense", "nonzero"):
                assert not any(waits in op for op in spy.ops), waits
    assert all(each == made[0] for each in made)
    assert len(counts) == 1


@pytest.mark.parametrize("kind", [Model, Raw])
def test_a_frame_that_fails_takes_its_noise_with_it(kind):
    """And those in flight keep theirs."""
    the_course, guidance = course("lcm", 4), Guidance("off", 1.0)
    sources, own = frames(8), fields(8, 4)
    ring, model, out = Ring(), kind(), []

    class Stop(Exception):
        pass

    def stops(*_):
        raise Stop

    for i in range(8):
        entering = sources[i : i + 1], [0.1], the_course, FrameNoise([own[i]], LATER)
        if i == 3:
            with pytest.raises(Stop):
                ring.tick(stops, *entering)
            continue
        out += run(ring, model, guidance, *entering).finished
    while ring.in_flight:
        out += run(ring, model, guidance).finished
    got = torch.cat([latents for _, latents in out])
    for i, each in zip([0, 1, 2, 4, 5, 6, 7], got, strict=True):
        want = alone(sources[i], 0.1, the_course, FrameNoise([own[i]], LATER), guidance)
        torch.testing.assert_close(each, want, atol=1e-4, rtol=1e-4)
