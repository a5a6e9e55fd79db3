"""The contracts of the ring (DESIGN.md section 4) on a cheap nonlinear denoiser."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from livediffusion.engine import linear
from livediffusion.engine.buffers import Buffers
from livediffusion.engine.guidance import MODES, Guidance
from livediffusion.engine.linear import Linear
from livediffusion.engine.noise import SlotNoise
from livediffusion.engine.ring import Ring
from livediffusion.engine.step_rules import STEP_RULES, Course
from livediffusion.kernels import stream_enter, stream_step
from rings import SHAPE, SPACES, Model, Raw, alone, clip, course, frames, level, run
from torch.utils._python_dispatch import TorchDispatchMode


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 6),
    count=st.integers(1, 9),
    per_slot=st.integers(1, 4),
    rule=st.sampled_from(sorted(STEP_RULES)),
    space=st.sampled_from(sorted(SPACES)),
    mode=st.sampled_from(MODES),
    cfg=st.floats(0.5, 3),
    delta=st.floats(0, 1.5),
    seed=st.integers(0, 99),
    kind=st.sampled_from([Model, Raw]),
)
def test_each_frame_as_if_alone(n, count, per_slot, rule, space, mode, cfg, delta, seed, kind):
    the_course, guidance = course(rule, n, space), Guidance(mode, cfg, delta)
    sources, noise = frames(count, seed), SlotNoise(seed, SHAPE)
    prompts = [0.1 * i for i in range(count)]
    out, order, ticks = clip(sources, prompts, the_course, guidance, per_slot, kind(), noise)
    assert order == prompts
    assert ticks == -(-count // per_slot) + the_course.n - 1
    for i in range(count):
        want = alone(sources[i], prompts[i], the_course, noise, guidance)
        error = (out[i] - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error <= (1e-5 if kind is Model else 5e-5)


@pytest.mark.parametrize("per_slot", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Model, Raw])
def test_cost_of_a_live_tick(kind, mode, n, per_slot):
    model, ring, noise, c = kind(), Ring(per_slot), SlotNoise(0, SHAPE), course(n=n)
    for i in range(n + 3):
        before = model.calls, model.rows
        inputs = frames(per_slot, i), [0.0] * per_slot, c, noise
        tick = run(ring, model, Guidance(mode, 1.4), *inputs)
        assert len(tick.finished) == (i >= n - 1)
    rows = {"full": 2 * n * per_slot, "onetime-negative": (n + 1) * per_slot}
    assert model.calls - before[0] == 1
    assert model.rows - before[1] == rows.get(mode, n * per_slot)


class Spy(TorchDispatchMode):
    """Sees every aten op that is no view."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


# of lcm; the public class takes 11, 16, 30 and 33 (benchmarks/bench.py counts them)
MOST = {"off": 6, "full": 7, "self-negative": 8, "onetime-negative": 11}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rule", "n", "direct"),
    [
        *((rule, 4, False) for rule in sorted(STEP_RULES)),
        *(("lcm", n, True) for n in (1, 2, 4)),
        ("unipc", 4, True),
    ],
)
def test_steady_state_allocates_no_buffers_and_never_waits(rule, mode, direct, n):
    ring, noise, c = Ring(2), SlotNoise(0, SHAPE), course(rule, n=n)
    guidance, inputs = Guidance(mode, 1.4), frames(2)
    half = torch.tensor(0.5)

    def predict(rows, which):
        asked = {"none": 0, "all": rows.x.shape[0], "entered": 2}[which]
        return rows.x * half, rows.x[:asked] * half if asked else None

    which = {"full": "all", "onetime-negative": "entered"}.get(mode, "none")
    linear = Linear(guidance, which, level, lambda y, fold: y)
    guide = linear if direct else lambda rows: guidance(rows, predict)

    def tick():
        ring.tick(guide, inputs, [0, 0], c, noise)

    def buffers():
        named = [*ring.buffers.all()]
        return [b.data_ptr() for b in named if b is not None]

    for _ in range(8):
        tick()
    before, plans, counts = buffers(), len(ring._plans), set()
    for _ in range(40):
        with Spy() as spy:
            tick()
        if direct and rule == "lcm":
            assert len(spy.ops) <= MOST[mode], spy.ops
        counts.add(len(spy.ops))
        for forbidden in ("_local_scalar_dense", "nonzero", "_to_copy", "zeros", "empty.memory"):
            assert not any(forbidden in op for op in spy.ops), (forbidden, spy.ops)
    assert buffers() == before
    assert len(ring._plans) == plans
    assert len(counts) == 1


def test_one_poisoned_frame_among_fifty_disturbs_no_other():
    sources, c, guidance = frames(50), course("dpmpp_2m", 4), Guidance("self-negative", 1.4)
    clean, *_ = clip(sources, [0.2] * 50, c, guidance, 1)
    for where in ("source", "model"):
        model, poisoned = Model(), sources.clone()
        if where == "source":
            poisoned[20, 0, 0, 0] = float("nan")
        else:
            honest = model.predict

            def predict(rows, which, honest=honest):
                out, negative = honest(rows, which)
                bad = [p == "bad" for place in rows.places for p in place.payloads]
                out[torch.tensor(bad)] = float("inf")
                return out, negative

            model.predict = predict
        prompts = [0.2] * 50
        if where == "model":
            prompts[20] = Bad(0.2)
        ring_out, _, ticks = clip(poisoned, prompts, c, guidance, 1, model)
        assert ticks == 53
        assert torch.isfinite(ring_out).all()
        others = [i for i in range(50) if i != 20]
        assert torch.equal(ring_out[others], clean[others])
        if where == "source":
            assert torch.equal(ring_out[20], clean[19]), "replaced by the frame before"
        else:
            assert not torch.equal(ring_out[20], clean[20])


class Bad(float):
    def __eq__(self, other):
        return other == "bad" or float.__eq__(self, other)

    __hash__ = float.__hash__


@pytest.mark.parametrize("per_slot", [1, 2])
@pytest.mark.parametrize("rule", ["lcm", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_get_what_they_need(monkeypatch, mode, rule, per_slot):
    """The references stand for the kernels, which need a GPU (tests/kernels compares the two)."""
    inputs = frames(24)
    inputs[6, 0, 0, 0] = float("nan")
    prompts, guidance, c = [0.05 * i for i in range(24)], Guidance(mode, 1.6, 0.7), course(rule, 4)
    plain, *_ = clip(inputs, prompts, c, guidance, per_slot, Raw())
    calls, unfused = [], Buffers.__init__

    def fused(self, *args):
        unfused(self, *args)
        self.unfused = ""

    def counted(*args):
        calls.append(1)
        return stream_step.reference(*args)

    monkeypatch.setattr(Buffers, "__init__", fused)
    monkeypatch.setattr(linear, "stream_enter", stream_enter.reference)
    monkeypatch.setattr(linear, "stream_step", counted)
    out, *_ = clip(inputs, prompts, c, guidance, per_slot, Raw())
    assert len(calls) == 24 // per_slot - 3
    assert (out - plain).abs().max() <= 1e-4 * plain.abs().max()
    ring, model, noise = Ring(1), Raw(), SlotNoise(3, SHAPE)
    for source in inputs.split(1):
        run(ring, model, guidance, source, [0.2], c, noise)
    assert ring.dropped == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Model, Raw])
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_bad_rows_are_counted_and_never_stay(kind, mode, value):
    """Among 300 frames: the count is kept in a short buffer that is emptied now and then."""
    ring, model, noise, c = Ring(1), kind(), SlotNoise(0, SHAPE), course("dpmpp_2m", n=2)
    out = []
    for i in range(300):
        source = frames(1, i)
        if i in (7, 290, 291):
            source[0, 1] = float(value)
        out += run(ring, model, Guidance(mode), source, [0.0], c, noise).finished
        if i == 8:
            assert ring.dropped == 1
    assert ring.dropped == 3
    assert all(torch.isfinite(latents).all() for _, latents in out)
    assert all(torch.isfinite(buffer).all() for buffer in ring.buffers.all())


def live(ring, model, inputs, courses, guidance, noise):
    """One frame per tick; returns (payload of the frame shown or None, latents) per tick."""
    shown = []
    for i, source in enumerate(inputs):
        tick = run(ring, model, guidance, source[None], [0.01 * i], courses[i], noise)
        payload = tick.finished[-1][0][-1] if tick.finished else None
        shown.append((payload, tick.finished[-1][1] if tick.finished else tick.estimate))
    return shown


@settings(max_examples=80, deadline=None)
@given(data=st.data(), mode=st.sampled_from(MODES), kind=st.sampled_from([Model, Raw]))
def test_schedule_and_rule_may_change_between_ticks(data, mode, kind):
    pool = [course(r, n) for r in sorted(STEP_RULES) for n in (1, 2, 3, 4)]
    picks = data.draw(st.lists(st.sampled_from(range(len(pool))), min_size=6, max_size=20))
    guidance, noise, inputs = Guidance(mode, 1.3), SlotNoise(1, SHAPE), frames(len(picks), 5)
    shown = live(Ring(1), kind(), inputs, [pool[p] for p in picks], guidance, noise)
    last = -1.0
    for payload, latents in shown:
        assert torch.isfinite(latents).all()
        if payload is not None:
            i = round(payload / 0.01)
            assert payload > last, "never an older frame after a newer one"
            last = payload
            want = alone(inputs[i], payload, pool[picks[i]], noise, guidance)
            error = (latents[0] - want).square().mean().sqrt() / want.square().mean().sqrt()
            assert error <= (1e-5 if kind is Model else 5e-5)


def test_growing_and_shrinking_keeps_what_it_can():
    short, long = course("euler", 2), course("euler", 4)
    ring, noise, inputs = Ring(1), SlotNoise(1, SHAPE), frames(12)
    plan = [short] * 4 + [long] * 5 + [short] * 3
    shown = [p for p, _ in live(ring, Model(), inputs, plan, Guidance("off"), noise)]
    frame = [None if p is None else round(p / 0.01) for p in shown]
    assert frame == [None, 0, 1, 2, 3, None, None, 4, 5, 6, 9, 10]
    assert ring.overtaken == 1, "frame 8; frame 7 was done together with the newer 9"
    assert len(ring._places) == 2


def test_size_changes_between_ticks():
    ring, c, model = Ring(1), course(n=3), Model()
    for size in (3, 3, 5, 5, 5, 5, 2):
        source = torch.randn(1, 2, size, size)
        noise = SlotNoise(0, (2, size, size))
        tick = ring.tick(model.guide(Guidance("onetime-negative")), source, [0.0], c, noise)
        shown = tick.finished[-1][1] if tick.finished else tick.estimate
        assert shown.shape == source.shape
        assert torch.isfinite(shown).all()


@pytest.mark.parametrize("kind", [Model, Raw])
def test_bad_rows_stay_counted_when_the_size_changes(kind):
    ring, c, bad = Ring(1), course(n=3), 0
    for i, size in enumerate((3, 3, 3, 5, 5, 2, 2, 2)):
        source = torch.randn(1, 2, size, size)
        if i in (1, 4):
            source[0, 0, 0, 0] = float("nan")
            bad += 1
        noise = SlotNoise(0, (2, size, size))
        run(ring, kind(), Guidance("self-negative"), source, [0.0], c, noise)
        assert ring.dropped == bad


@pytest.mark.parametrize("kind", [Model, Raw])
@pytest.mark.parametrize("what", ["seed", "course"])
def test_what_no_frame_has_any_more_is_let_go(kind, what):
    """A new seed per frame, say: its noise, weighted for each row, lies in every plan it was in."""
    n, ring, model, made = 4, Ring(1), kind(), []
    c, noise = course("lcm", n), SlotNoise(0, SHAPE)
    for i in range(40):
        c = course("lcm", n) if what == "course" else c
        noise = SlotNoise(i, SHAPE) if what == "seed" else noise
        made.append(weakref.ref(noise if what == "seed" else c))
        run(ring, model, Guidance("off"), frames(1, i), [0.0], c, noise)
        assert sum(ref() is not None for ref in made) <= n
        assert len(ring._plans) <= n
    for _ in range(n):
        run(ring, model, Guidance("off"))
    steady = []
    for i in range(3 * n):
        run(ring, model, Guidance("off"), frames(1, i), [0.0], c, noise)
        steady.append(set(map(id, ring._plans.values())))
    assert steady[-1] == steady[-n - 1], "what comes again is kept"


def test_seed_changes_between_ticks():
    ring, c, model = Ring(1), course("lcm", 3), Model()
    inputs, a, b = frames(8), SlotNoise(1, SHAPE), SlotNoise(2, SHAPE)
    out = []
    for i, source in enumerate(inputs):
        tick = ring.tick(
            model.guide(Guidance("off")), source[None], [0.0], c, a if i < 4 else b
        )  # fmt: skip
        out += [latents for _, latents in tick.finished]
    for i, got in enumerate(out):
        want = alone(inputs[i], 0.0, c, a if i < 4 else b, Guidance("off"))
        assert torch.allclose(got[0], want, atol=1e-5)


def test_noise_off_lets_frames_enter_as_they_are():
    c = course("euler", 3, add_noise=False)
    ring, seen = Ring(1), []

    def guide(rows):
        seen.append(rows.x.clone())
        return rows.x * 0.5

    source = frames(1)
    ring.tick(guide, source, [0.0], c, SlotNoise(0, SHAPE))
    assert torch.equal(seen[0], source)


def test_self_negative_at_one_step_stays_bounded():
    """Every public implementation feeds its residual back here (peers.md 2.8, row 3)."""
    ring, c, noise = Ring(1), course("lcm", 1), SlotNoise(0, SHAPE)
    peaks = []
    for i in range(200):
        tick = ring.tick(
            Model().guide(Guidance("self-negative", 1.8)), frames(1, i % 5), [0.3], c, noise
        )  # fmt: skip
        peaks.append(float(tick.finished[0][1].abs().max()))
    assert peaks[:5] == peaks[-5:]


def test_wrong_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="cannot enter a slot"):
        Ring(1).tick(lambda rows: rows.x, frames(2), [0, 0], course(), SlotNoise(0, SHAPE))
    with pytest.raises(ValueError, match="frames_per_slot"):
        Ring(0)
    with pytest.raises(ValueError, match="two noise levels"):
        course(n=0)
    with pytest.raises(ValueError, match="above 0"):
        Course((3.0, 0.0, 0.0), STEP_RULES["euler"], SPACES["ve"])


@pytest.mark.parametrize("at", [0, 2, 7, 8])
def test_a_failed_model_call_costs_its_own_frame_only(at):
    """Out of memory, an interrupt, a prompt of the wrong width: the ring goes on, full or not."""
    c, noise, inputs, model = course("dpmpp_2m", 4), SlotNoise(1, SHAPE), frames(14), Model()
    guidance, ring, out = Guidance("onetime-negative", 1.4), Ring(1), {}

    def broken(rows):
        raise RuntimeError("out of memory")

    for i, source in enumerate(inputs):
        if i in (at, at + 1):
            with pytest.raises(RuntimeError, match="out of memory"):
                ring.tick(broken, source[None], [0.01 * i], c, noise)
            continue
        tick = ring.tick(model.guide(guidance), source[None], [0.01 * i], c, noise)
        out |= {round(p[0] / 0.01): latents[0] for p, latents in tick.finished}
    assert sorted(out) == [i for i in range(14) if i not in (at, at + 1)][:-3]
    for i, got in out.items():
        want = alone(inputs[i], 0.01 * i, c, noise, guidance)
        assert torch.allclose(got, want, atol=1e-5), f"frame {i}"


def test_memory_that_is_short_for_what_leaves_costs_that_only(monkeypatch):
    """The step is taken: no row takes it again."""
    c, noise, inputs = course("dpmpp_2m", 4), SlotNoise(1, SHAPE), frames(12)
    guidance, ring, out, model = Guidance("off", 1.0), Ring(1), {}, Model()

    def short(tensor):
        raise torch.OutOfMemoryError

    for i, source in enumerate(inputs):
        given = model.guide(guidance), source[None], [0.01 * i], c, noise
        with monkeypatch.context() as patch:
            if i in (5, 6):
                patch.setattr(torch.Tensor, "clone", short)
                with pytest.raises(torch.OutOfMemoryError):
                    ring.tick(*given)
                continue
            tick = ring.tick(*given)
        out |= {round(p[0] / 0.01): latents[0] for p, latents in tick.finished}
    assert sorted(out) == [0, 1, 4, 5, 6, 7, 8]
    for i, got in out.items():
        want = alone(inputs[i], 0.01 * i, c, noise, guidance)
        assert torch.allclose(got, want, atol=1e-5), f"frame {i}"
