"""A step, and guidance, are the same weighted sum wherever they are taken."""

import pytest
import torch
from livediffusion.engine.buffers import Buffers
from livediffusion.engine.fold import Level, fold
from livediffusion.engine.guidance import MODES, Guidance, guided, residual_negative
from livediffusion.engine.noise import SlotNoise
from livediffusion.engine.plan import Place, plan
from livediffusion.engine.sequential import State, stepped
from livediffusion.engine.step_rules import STEP_RULES
from livediffusion.engine.sums import Sum, weighted
from rings import SHAPE, course, level

N = 4
G = torch.Generator().manual_seed(0)


def rows(count=N):
    return torch.randn(count, *SHAPE, generator=G)


def full_plan(rule="unipc"):
    """A frame at every step of a course, the newest in the first place."""
    the_course, noise = course(rule, N), SlotNoise(0, SHAPE)
    n = the_course.n
    places = [Place(the_course, noise, [0.0], n - k, k) for k in range(n)]
    history = the_course.rule.history
    made = plan(places, list(range(n)), 0, 1, history, SHAPE, torch.device("cpu"))
    return the_course, noise, made


@pytest.mark.parametrize("cfg", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("mode", MODES)
def test_weights_guide_as_guidance_does(mode, cfg):
    """engine.fold's weights of the prediction, against engine.guidance on tensors."""
    guidance, (_, _, made) = Guidance(mode, cfg, 0.8), full_plan()
    x, output, negative, reference = (rows() for _ in range(4))
    known = [level(sigma) for sigma, _ in made.steps]
    of_x, of_output = (
        torch.tensor([getattr(one, name) for one in known]).view(-1, 1, 1, 1)
        for name in ("of_x", "of_output")
    )

    class Rows:
        entered = slice(0, 1)
        source = reference
        sigma = made.sigma

        def remember(self, negative):
            return reference

    Rows.x = x

    def predict(asked, which):
        return x * of_x + output * of_output, x * of_x + negative * of_output

    want = guidance(Rows(), predict)
    terms = {"x": x, "output": output, "negative": negative, "reference": reference}
    for which in {"full": ["all"], "onetime-negative": ["none", "entered"]}.get(mode, ["none"]):
        got = weighted(fold(made, guidance, which, level).weights["denoised"], terms)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("rule", sorted(STEP_RULES))
def test_a_step_is_the_same_everywhere(rule):
    """Of the stream batch on either road and of a batch by itself, as written out here."""
    the_course, noise, made = full_plan(rule)
    n, history = the_course.n, the_course.rule.history
    x, denoised, past = rows(n), rows(n), [rows(n) for _ in range(history)]
    # the model's output is the prediction, and nothing guides it
    folded = fold(made, Guidance("off"), "none", lambda sigma: Level(1.0, 0.0, 1.0, sigma))
    ring = Buffers(n, 1, SHAPE, torch.device("cpu"), history)
    ring.x.copy_(x)
    for mine, given in zip(ring.past, past, strict=True):
        mine.copy_(given)
    after = ring.step(made, x, denoised)
    terms = {"x": x, "output": denoised, **{f"past{i}": old for i, old in enumerate(past)}}
    begun = (x * folded.gain[-1]) if folded.base is None else x * folded.gain[-1] + folded.base[-1]
    direct = weighted(folded.weights["after"], terms, onto=begun)
    for k, step in enumerate(the_course.steps):
        want = x[k] * step.x + denoised[k] * step.denoised
        for weight, old in zip(step.past, past, strict=False):
            want = want + weight * old[k]
        fresh = want + step.noise * noise.slot(k + 1)
        limit = 1e-5 * max(1.0, float(fresh.abs().max()))
        assert (after[k] - fresh).abs().max() <= limit
        assert (direct[k] - fresh).abs().max() <= limit
        if not step.noise:
            alone = stepped(State(x[k], tuple(old[k] for old in past)), denoised[k], the_course, k)
            assert (alone.x - want).abs().max() <= limit
        if not history:
            continue
        keep = step.keep
        kept = x[k] * keep.x + denoised[k] * keep.denoised + past[0][k] * keep.past
        limit = 1e-5 * max(1.0, float(kept.abs().max()))
        linear = weighted(folded.weights["kept"], terms)[k]
        for got in (ring.past[0][k], linear, alone.past[0]):
            assert (got - kept).abs().max() <= limit
        for older, newer, mine in zip(ring.past[1:], past, alone.past[1:], strict=False):
            assert torch.equal(older[k], newer[k]) and torch.equal(mine, newer[k])


def test_formulas_take_sums_for_tensors():
    assert guided(Sum(output=0.5), Sum(x=1.0), 3.0) == Sum(x=-2.0, output=1.5)
    assert residual_negative(Sum(x=1.0), Sum(reference=1.0), 0.25) == Sum(x=0.75, reference=0.25)
    step = Sum(x=0.5, denoised=2.0, past0=1.0)
    assert step.put("denoised", Sum(x=3.0, output=0.5)) == Sum(x=6.5, past0=1.0, output=1.0)


def test_a_sum_of_tensors():
    a, b, column = rows(), rows(), torch.arange(N).view(-1, 1, 1, 1) + 0.5
    assert weighted({"a": None}, {"a": a}) is a
    before = a.clone()
    got = weighted({"a": None, "b": column, "c": 0.0}, {"a": a, "b": b})
    assert torch.equal(got, torch.addcmul(a, b, column)) and torch.equal(a, before)
    assert torch.allclose(weighted({"a": 2.0, "b": None}, {"a": a, "b": b}), 2 * a + b)
    kept = b.clone()
    assert weighted({"a": column}, {"a": a}, onto=kept) is kept
    assert torch.allclose(kept, b + a * column)
    assert weighted({"a": column, "b": column}, {"a": a, "b": b}, out=kept) is kept
    assert torch.allclose(kept, (a + b) * column)
