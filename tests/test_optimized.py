"""Optimised steps against the figures of the authors' code."""

import json
import pathlib

import numpy as np
import pytest
import torch
from livediffusion.schedules import optimized as module
from livediffusion.schedules.optimized import SOLVERS, error_bound, from_optimized, optimized
from tables import TABLES

# half log-SNRs that scxue/DM-NonUniform, step_optim.py (StepOptim.get_ts_lambdas, eps 1e-3,
# "unif_t"; scipy 1.17.1) gives for Stable Diffusion's betas and for the linear VP schedule
STEPS = json.loads(pathlib.Path(__file__).with_name("xue_steps.json").read_text(encoding="utf-8"))
# and its objective at these steps, truncNum 3
BOUNDS = {
    ("sd", 5): 13.480411901648978,
    ("sd", 6): 11.375430529854551,
    ("sd", 7): 8.586189291802782,
    ("sd", 8): 6.630203608837444,
    ("sd", 9): 4.910662601413268,
    ("sd", 10): 4.30668558797076,
    ("linear", 5): 49.9048192184469,
    ("linear", 6): 38.34771500073464,
    ("linear", 7): 25.854760276359123,
    ("linear", 8): 17.57496258600939,
    ("linear", 9): 13.357444779963352,
    ("linear", 10): 11.541290259352001,
}
# where their optimiser reports that the gradient vanishes; elsewhere it stops on a corner
CONVERGED = [("sd", 5), ("linear", 5), ("linear", 6)]


def uniform_t(name, n):
    """Half log-SNRs at even times from 1 to 1e-3."""
    t = np.linspace(1, 1e-3, n + 1)
    if name == "sd":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        log_alpha = np.interp(t, np.arange(1, 1001) / 1000, 0.5 * np.log(np.cumprod(1 - betas)))
    else:
        log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
    return log_alpha - 0.5 * np.log(1 - np.exp(2 * log_alpha))


@pytest.mark.parametrize(("name", "n"), BOUNDS)
def test_the_bound_is_theirs(name, n):
    steps = np.array(STEPS[name][str(n)])
    assert error_bound(steps, 3) == pytest.approx(BOUNDS[name, n], rel=1e-7)


@pytest.mark.parametrize(("name", "n"), [key for key in BOUNDS if key[1] in (5, 7, 10)])
def test_the_minimum_is_found_from_either_side(name, n):
    """At or below theirs, and the same from two beginnings, which theirs is not."""
    first = uniform_t(name, n)
    best = optimized(first, 3)
    assert (np.diff(best) > 0).all()
    assert (best[0], best[-1]) == (first[0], first[-1])
    assert error_bound(best, 3) <= BOUNDS[name, n] * (1 + 1e-6)
    other = optimized(np.linspace(first[0], first[-1], n + 1), 3)
    assert error_bound(other, 3) == pytest.approx(error_bound(best, 3), rel=2e-3)


@pytest.mark.parametrize(("name", "n"), CONVERGED)
def test_the_steps_are_theirs_where_theirs_converged(name, n):
    best = optimized(uniform_t(name, n), 3)
    assert best == pytest.approx(np.array(STEPS[name][str(n)]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_bound_holds_its_solvers_weights(order):
    """The weights of a step integrate polynomials of their degree exactly."""
    lambdas = np.array([-2.0, -0.7, 0.1, 0.4])
    h, growth = np.diff(lambdas), np.exp(lambdas)
    steps = np.array([order - 1])
    weights = module._coefficients(h, growth, steps, order)[0]
    fine = np.linspace(lambdas[order - 1], lambdas[order], 200_001)
    for degree in range(order):
        exact = np.trapezoid(np.exp(fine) * fine**degree, fine)
        assert (weights * lambdas[:order] ** degree).sum() == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_levels_fall_for_every_family_strength_and_number(family, solver):
    table, flow = TABLES[family]
    for steps in (1, 2, 4, 7):
        for strength in (1.0, 0.05):
            levels = from_optimized(table, solver, steps, strength, flow)
            assert levels.dtype == torch.float32 and len(levels) == steps + 1
            assert (levels[:-1] > levels[1:]).all() and levels[-1] == 0
            assert levels[0] == table[max(1, round(strength * len(table))) - 1]
            assert levels.isfinite().all()


def test_twenty_steps_converge():
    table, flow = TABLES["discrete"]
    levels = from_optimized(table, "unipc", 20, 1.0, flow)
    assert (levels[:-1] > levels[1:]).all()
    lambdas = -np.log(np.array([*levels[:-1].tolist(), float(table[0])], np.float64))
    even = -np.log(np.interp(np.linspace(999, 0, 21), np.arange(1000), table.double().numpy()))
    assert error_bound(lambdas, 3) < 0.7 * error_bound(even, 3)


def test_a_known_schedule_is_not_worked_out_again(monkeypatch):
    table, flow = TABLES["flow"]
    first = from_optimized(table, "dpmpp_2m", 5, 0.7, flow)
    monkeypatch.setattr(module, "optimized", None)
    assert torch.equal(from_optimized(table, "dpmpp_2m", 5, 0.7, flow), first)


@pytest.mark.parametrize(
    ("steps", "strength", "says"),
    [(0, 1.0, "steps: at least 1"), (5, 0.0, "strength: 0"), (5, 1.5, "strength: 1.5"),
     (20, 0.01, "steps: 20 do not fit")],
)  # fmt: skip
def test_bad_input_is_named(steps, strength, says):
    table, flow = TABLES["discrete"]
    with pytest.raises(ValueError, match=says):
        from_optimized(table, "unipc", steps, strength, flow)


@pytest.mark.comfy
@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_the_node_feeds_comfyuis_sampler_and_the_stream(prediction):
    import comfy.samplers
    import tiny
    from comfy_extras.nodes_custom_sampler import Guider_Basic, RandomNoise, SamplerCustomAdvanced
    from livediffusion.nodes.sampling import LiveStreamBatch
    from livediffusion.nodes.schedules import LiveOptimizedSteps

    model = tiny.model(prediction)
    sigmas = LiveOptimizedSteps.execute(model, "unipc", 4, 0.8).args[0]
    guider = Guider_Basic(model)
    guider.set_conds(tiny.conditioning(1))
    noise = RandomNoise.execute(3).args[0]
    stream = LiveStreamBatch.execute("unipc", 1).args[0]
    for sampler in (comfy.samplers.sampler_object("uni_pc"), stream):
        latent = {"samples": tiny.latents(2)}
        out = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas.clone(), latent)
        assert out.args[0]["samples"].shape == (2, 4, 8, 8)
        assert out.args[0]["samples"].isfinite().all()
