"""The contracts of the ring (DESIGN.md section 4) on a cheap nonlinear denoiser."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from livediffusion.engine.guidance import MODES, Guidance
from livediffusion.engine.linear import Level, Linear
from livediffusion.engine.noise import SlotNoise
from livediffusion.engine.ring import Ring
from livediffusion.engine.space import Mix
from livediffusion.engine.step_rules import STEP_RULES, Course
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = (2, 3, 3)


class VarianceExploding:
    """Epsilon, v and EDM models (Karras et al. 2022): x = latent + sigma * noise."""

    def mix(self, sigma: float) -> Mix:
        return Mix(1.0, sigma)

    entry = mix

    def unmix(self, sigma: float) -> float:
        return 1.0


class Flow:
    """Rectified flow (Liu et al. 2022): x = (1 - sigma) * latent + sigma * noise, sigma in 0..1."""

    def mix(self, sigma: float) -> Mix:
        return Mix(1.0 - sigma, sigma)

    entry = mix

    def unmix(self, sigma: float) -> float:
        return 1.0 / (1.0 - sigma)


SPACES = {"ve": VarianceExploding(), "flow": Flow()}


def levels(space, n):
    top = 0.9 if space == "flow" else 9.0
    return (*[top * (n - i) / n for i in range(n)], 0.0)


def course(rule="lcm", n=4, space="ve", **kwargs):
    return Course(levels(space, n), STEP_RULES[rule], SPACES[space], **kwargs)


def frames(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def denoise(x, sigma, prompt):
    """Row-wise, nonlinear, different for every prompt; float64 inside for exact comparisons."""
    s = sigma.view(-1, 1, 1, 1)
    p = prompt.view(-1, 1, 1, 1)
    return torch.tanh(x / (1 + s) + p) + 0.1 * torch.sin(x * p)


class Model:
    """Counts calls and rows; a payload is the number a prompt is to this model."""

    def __init__(self):
        self.calls, self.rows = 0, 0

    def predict(self, rows, which):
        prompt = torch.tensor([float(p) for place in rows.places for p in place.payloads])
        x, sigma, r = rows.x, rows.sigma, rows.x.shape[0]
        if which != "none":
            at = slice(None) if which == "all" else rows.entered
            x, sigma = torch.cat([x, x[at]]), torch.cat([sigma, sigma[at]])
            prompt = torch.cat([prompt, torch.full((x.shape[0] - r,), -0.7)])
        self.calls += 1
        self.rows += x.shape[0]
        out = denoise(x, sigma, prompt)
        return out[:r], (out[r:] if which != "none" else None)

    def guide(self, guidance):
        return lambda rows: guidance(rows, self.predict)


def level(sigma):
    """A v-like family: the model sees a scaled x, and x0 takes of x and of the output."""
    scale = 1 / math.sqrt(1 + sigma**2)
    return Level(scale, scale**2, -sigma * scale, 100 * sigma)


class Raw(Model):
    """The same model, known by its raw output only (engine.linear)."""

    def guide(self, guidance):
        def through(work, _):
            prompt = [float(p) for place in work.places for p in place.payloads]
            r = len(prompt)
            which = {"full": "all", "onetime-negative": "entered"}.get(guidance.mode, "none")
            if which == "entered" and work.source is None:
                which = "none"
            extra = {"none": 0, "all": r}.get(which, len(range(r)[work.plan.entered]))
            prompt = [-0.7] * extra + prompt if which == "all" else prompt + [-0.7] * extra

            def call(y, fold):
                sigmas = (fold.timestep / 100).tolist()
                seen, of_x, of_output, _ = torch.tensor([level(s) for s in sigmas]).T.unbind()
                wide = [t.view(-1, 1, 1, 1) for t in (seen, of_x, of_output)]
                x = y / wide[0]
                self.calls += 1
                self.rows += y.shape[0]
                d = denoise(x, fold.timestep / 100, torch.tensor(prompt))
                return (d - x * wide[1]) / wide[2]

            return work(Linear(guidance, which, level, call))

        return through


def unipc_update(x, given, sigmas, k, order, arrived=None):
    """Zhao et al. 2023: from level k - 1 to level k; corrected by the prediction made there.

    The Lagrange polynomial through the predictions at `order` levels (and the arrived one) is
    matched in its Taylor terms, as the paper's equations 5 and 9 ask for.
    """
    h = math.log(sigmas[k - 1] / sigmas[k])
    places = [math.log(sigmas[k - 1] / sigmas[k - 1 - i]) / h for i in range(1, order)]
    slopes = [(given[-1 - i] - given[-1]) / place for i, place in enumerate(places, 1)]
    if arrived is not None:
        places, slopes = [*places, 1.0], [*slopes, arrived - given[-1]]
    count = len(places)
    # phi_1(-h) = (1 - exp(-h)) / h, then phi_(i+1)(-h) = (1 / i! - phi_i(-h)) / h
    phi = [(1 - math.exp(-h)) / h]
    for i in range(1, count + 1):
        phi.append((1 / math.factorial(i) - phi[-1]) / h)
    wanted = [phi[i] * math.factorial(i) for i in range(1, count + 1)]
    if count < 2:
        rhos = [0.5] * count
    else:
        powers = torch.tensor([[p**i for p in places] for i in range(count)], dtype=torch.float64)
        rhos = torch.linalg.solve(powers, torch.tensor(wanted, dtype=torch.float64)).tolist()
    ratio = sigmas[k] / sigmas[k - 1]
    out = ratio * x + (1 - ratio) * given[-1]
    for rho, slope in zip(rhos, slopes, strict=True):
        out = out + h * rho * slope
    return out


def unipc_order(k, n):
    most = max(1, min(3, n - 1))
    return k if k < most else min(most, n + 1 - k)


def pfdiff_alone(x, sigmas, rule, predict):
    """Wang et al. 2025, Algorithm 1, over Euler: x, then a call at each springboard."""
    n, at = len(sigmas) - 1, 1
    noise = (x - predict(x, sigmas[0])) / sigmas[0]
    x = x + (sigmas[1] - sigmas[0]) * noise
    calls = 1
    while at < n:
        to = min(at + rule.k + 1, n)
        call = min(at + rule.h, to - 1)
        springboard = x + (sigmas[call] - sigmas[at]) * noise
        noise = (springboard - predict(springboard, sigmas[call])) / sigmas[call]
        x = x + (sigmas[to] - sigmas[at]) * noise
        at, calls = to, calls + 1
    assert calls == 1 + -(-(n - 1) // (rule.k + 1))
    return x


def alone(source, prompt, the_course, noise, guidance):
    """Sequential sampling of one frame, written without the engine's ring or weights."""
    sigmas, space, rule = the_course.sigmas, the_course.space, the_course.rule
    name, z, mix = type(rule).__name__, source[None], the_course.space.mix(the_course.sigmas[0])
    x = mix.source * z + mix.noise * noise.slot(0)
    reference = []  # of a onetime-negative frame, made with its first call

    def predict(x, sigma):
        s = torch.tensor([sigma])
        d = denoise(x, s, torch.tensor([prompt]))
        negative = denoise(x, s, torch.tensor([-0.7]))
        reference.append(z if guidance.mode == "self-negative" else negative)
        if guidance.mode == "full":
            return negative + guidance.cfg * (d - negative)
        if guidance.mode == "off":
            return d
        u = x - guidance.delta * (x - reference[0])
        return u + guidance.cfg * (d - u)

    if name == "PFDiff":
        return pfdiff_alone(x, sigmas, rule, predict)[0].float()
    old, base, given, n = None, x, [], len(sigmas) - 1
    for k in range(n):
        d = predict(x, sigmas[k])
        a, b = sigmas[k], sigmas[k + 1]
        if name == "Lcm":
            mix = space.mix(b)
            x = d if b == 0 else mix.source * d + mix.noise * noise.slot(k + 1)
        elif name == "UniPC":
            if k > 0:
                base = unipc_update(base, given, sigmas, k, unipc_order(k, n), d)
            given.append(d)
            x = d if b == 0 else unipc_update(base, given, sigmas, k + 1, unipc_order(k + 1, n))
        elif name == "Deis":
            given.append((x - d) / a)
            order = 1 if b == 0 else min(3, k + 1)
            # the coefficients are compared with ComfyUI's in tests/host/test_equivalence.py
            gains = [b - a] if order == 1 else rule._gains(rule._times(sigmas[: k + 2]), order)
            for gain, one in zip(gains, reversed(given), strict=False):
                x = x + gain * one
        elif name == "Euler" or k == 0 or b == 0:
            x = x + (x - d) / a * (b - a)
        else:
            t, tn, tl = (-torch.tensor(v, dtype=torch.float64).log() for v in (a, b, sigmas[k - 1]))
            r = (t - tl) / (tn - t)
            mixed = (1 + 1 / (2 * r)) * d - (1 / (2 * r)) * old
            x = (b / a) * x - float(torch.expm1(-(tn - t))) * mixed
        old = d
    return x[0].float()


def run(ring, model, guidance, *args):
    """A tick of either kind of model."""
    guide = model.guide(guidance)
    return ring.tick(guide, *args, through=guide if isinstance(model, Raw) else None)


def clip(sources, prompts, the_course, guidance, per_slot, model=None, noise=None):
    """All frames through a ring that is drained at the end: outputs, ticks."""
    model = model or Model()
    ring, noise = Ring(per_slot), noise or SlotNoise(3, SHAPE)
    out, ticks = [], 0
    for i in range(0, len(sources), per_slot):
        part = slice(i, i + per_slot)
        tick = run(ring, model, guidance, sources[part], prompts[part], the_course, noise)
        ticks += 1
        out += tick.finished
    while ring.in_flight:
        out += run(ring, model, guidance).finished
        ticks += 1
    return torch.cat([latents for _, latents in out]), [p for ps, _ in out for p in ps], ticks


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
MOST = {"off": 6, "full": 8, "self-negative": 14, "onetime-negative": 14}


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rule", "direct"),
    [*((rule, False) for rule in sorted(STEP_RULES)), ("lcm", True), ("unipc", True)],
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
    for _ in range(100):
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Model, Raw])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
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
