"""PFDiff where the exact answer is known, and its count of calls."""

import math

import analytic
import pytest
import torch
from livediffusion.engine.noise import SlotNoise
from livediffusion.engine.ring import Ring
from livediffusion.engine.sequential import walk
from livediffusion.engine.step_rules import STEP_RULES, Course, PFDiff
from livediffusion.host.sampling.pfdiff import sample_pfdiff
from rings import SPACES, pfdiff_alone

CALLS = range(4, 11)
GRID = [(n, f) for n in analytic.TARGETS for f in analytic.FAMILIES]


def solve(name, family, rule, sigmas):
    """A step rule on a closed-form denoiser: the end points and the number of calls."""
    course = Course(tuple(sigmas.tolist()), STEP_RULES[rule], analytic.Space(family))
    calls = list(walk(analytic.predictor(name, family), analytic.start(name, family), course))
    return calls[-1].x, len(calls)


def error(name, family, rule, steps):
    exact = analytic.reference(name, family)
    x, calls = solve(name, family, rule, analytic.uniform_t(family, steps))
    return analytic.rmse(x, exact), calls


@pytest.mark.parametrize(("name", "family"), GRID)
def test_the_reference_is_known_well_enough(name, family):
    exact = analytic.reference(name, family)
    assert exact.isfinite().all()
    uncertain = analytic.rmse(exact, analytic.reference(name, family, steps=400))
    smallest = min(error(name, family, rule, 10)[0] for rule in ("euler", "pfdiff-1_1"))
    assert uncertain < 1e-4 * smallest


@pytest.mark.parametrize("name", analytic.TARGETS)
def test_the_denoiser_is_the_posterior_mean(name):
    """Against the definition, by sampling: E[x0 | x] minimises the squared error."""
    target, generator = analytic.TARGETS[name](), torch.Generator().manual_seed(1)
    count, sigma = 20_000, 0.8
    noise = torch.randn(count, target.dim, generator=generator, dtype=torch.float64)
    if isinstance(target, analytic.Gaussian):
        clean = noise * target.variance.sqrt() + target.mean
    else:
        pick = torch.randint(len(target.points), (count,), generator=generator)
        clean = target.points[pick] + target.width * noise
    x = clean + sigma * torch.randn(count, target.dim, generator=generator, dtype=torch.float64)
    best = target.denoise(x, sigma)
    # what is left is orthogonal to any function of x, its own prediction among them
    left = ((clean - best) * best).mean()
    assert abs(left) < 4 * ((clean - best) * best).std() / math.sqrt(count * target.dim) + 1e-3
    assert (clean - best).square().mean() < (clean - x).square().mean()


@pytest.mark.parametrize("rule", ["pfdiff-1_1", "pfdiff-2_1", "pfdiff-3_1"])
def test_calls_are_what_the_name_promises(rule):
    skipped = int(rule[7]) + 1
    for steps in range(1, 20):
        _, calls = error("mixture", "VP", rule, steps)
        assert calls == 1 + math.ceil((steps - 1) / skipped)


def test_it_beats_euler_with_as_many_calls():
    """At 4 to 10 calls, on every target and family: in 90 % of the cells, and on the whole."""
    ratios = {}
    for name, family in GRID:
        for calls in CALLS:
            ours, count = error(name, family, "pfdiff-1_1", 2 * calls - 1)
            plain, _ = error(name, family, "euler", calls)
            assert count == calls
            ratios[name, family, calls] = ours / plain
    better = sum(ratio < 1 for ratio in ratios.values())
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    assert better >= 0.9 * len(ratios), ratios
    assert mean < 0.8, mean


def prediction(x, sigma):
    """Of latents of size 1, and not linear."""
    return torch.tanh(1.3 * x / (1 + sigma * sigma) ** 0.5) * 1.5


# of a ZSNR model in ComfyUI, whose highest level is 4518; and one that stays high for long
HIGH = {
    "even": [4518.0, *torch.logspace(3.3, -1.5, 9).tolist(), 0.0],
    "steep": [4518.0, 36.0, 9.0, 3.0, 1.0, 0.4, 0.0],
}


@pytest.mark.parametrize("levels", HIGH)
@pytest.mark.parametrize(("k", "h"), [(1, 1), (2, 1), (3, 1), (3, 2)])
def test_float32_is_enough_at_the_highest_levels(levels, k, h):
    """As a sampler of its own and in the ring, against the paper's lines in double precision."""
    sigmas, rule = torch.tensor(HIGH[levels]), PFDiff(k, h)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    want = pfdiff_alone(x.double(), sigmas.tolist(), rule, prediction)
    own = sample_pfdiff(lambda x, s: prediction(x, s.view(-1, 1, 1, 1)), x, sigmas, k=k, h=h)
    course = Course(tuple(sigmas.tolist()), rule, SPACES["ve"], add_noise=False)
    ring, noise = Ring(3), SlotNoise(0, (4, 8, 8))

    def guide(rows):
        return prediction(rows.x, rows.sigma.view(-1, 1, 1, 1))

    tick = ring.tick(guide, x, [0, 0, 0], course, noise)
    while not tick.finished:
        tick = ring.tick(guide)
    for got in (own, tick.finished[0][1]):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(("k", "h"), [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_as_a_sampler_it_tells_what_it_does(n, k, h):
    """Callbacks get the place in the schedule, the level, x and prediction of each model call."""
    sigmas, told, asked = torch.linspace(9, 0, n + 1), [], []

    def model(x, sigma, scale):
        asked.append((x.clone(), sigma))
        return prediction(x, sigma.view(-1, 1)) * scale

    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)) * 9
    end = sample_pfdiff(model, x, sigmas, {"scale": 0.5}, told.append, None, k, h)
    assert len(told) == len(asked) == 1 + math.ceil((n - 1) / (k + 1))
    assert told[0]["i"] == 0 and torch.equal(told[0]["x"], x)
    places = [call["i"] for call in told]
    assert places == sorted(set(places)) and places[-1] < n
    for call, (point, sigma) in zip(told, asked, strict=True):
        assert torch.equal(call["x"], point)
        assert call["sigma"] == call["sigma_hat"] == sigmas[call["i"]]
        assert torch.equal(sigma, sigmas[call["i"]].expand(2))
        assert torch.equal(call["denoised"], prediction(point, sigma.view(-1, 1)) * 0.5)
    want = pfdiff_alone(
        x.double(), sigmas.tolist(), PFDiff(k, h), lambda x, sigma: 0.5 * prediction(x, sigma)
    )
    assert (end - want).abs().max() < 1e-5
    assert sample_pfdiff(model, x, sigmas[:1], {"scale": 0.5}) is x


@pytest.mark.parametrize(("family", "least"), [("VP", 5), ("flow", 5), ("EDM", 8)])
def test_it_is_better_where_the_docs_say_so(family, least):
    """On mixtures that nothing was made on: in every cell from so many calls on, and not below."""

    def ratios(calls):
        return [
            error(name, family, "pfdiff-1_1", 2 * calls - 1)[0]
            / error(name, family, "euler", calls)[0]
            for name in analytic.OTHERS
        ]

    assert max(r for calls in range(least, 11) for r in ratios(calls)) < 1
    assert max(ratios(least - 3)) > 1.2
