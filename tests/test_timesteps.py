"""Schedules: StreamDiffusion's index list and the strength dial."""

import pytest
import torch
from livediffusion.schedules.timesteps import SPACINGS, from_indices, from_strength, parse_indices
from tables import TABLES, discrete_table


def test_indices_are_streamdiffusions():
    """t_index_list [18, 26, 35, 45] of 50 is t = 639, 479, 299, 99 (research: run in the class)."""
    table = discrete_table()
    levels = from_indices(table, parse_indices("18, 26, 35, 45", 50), 50)
    assert torch.equal(levels, torch.cat([table[[639, 479, 299, 99]], torch.zeros(1)]))
    alpha = (1 / (1 + levels[:4] ** 2)).sqrt()
    assert alpha.tolist() == pytest.approx([0.355, 0.552, 0.770, 0.946], abs=1e-3)


@pytest.mark.parametrize(("grid", "t"), [(50, 19), (4, 249), (1, 999), (1000, 0)])
def test_the_grid_is_even_and_counts_from_the_noisiest(grid, t):
    table = torch.arange(1, 1001).float()
    assert from_indices(table, [0], grid)[0] == 1000 // grid * grid
    assert from_indices(table, [grid - 1], grid)[0] == t + 1


@pytest.mark.parametrize("text", ["1,2,3", " 1 2 3 ", "1; 2;3", "1,\n2,\n3,"])
def test_indices_may_be_written_freely(text):
    assert parse_indices(text, 50) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("a, 2", "whole numbers"),
        ("1.5, 2", "whole numbers"),
        ("1, 50", r"0\.\.49"),
        ("-1, 3", r"0\.\.49"),
        ("3, 2", "rise"),
        ("2, 2", "rise"),
    ],
)
def test_bad_indices_are_named(text, says):
    with pytest.raises(ValueError, match=f"indices: .*{says}"):
        parse_indices(text, 50)


@pytest.mark.parametrize("grid", [0, 1001])
def test_a_grid_beyond_the_models_timesteps_is_named(grid):
    with pytest.raises(ValueError, match="grid: "):
        from_indices(discrete_table(), [0], grid)


def suits(kind, spacing):
    """Align Your Steps is no schedule for flow models."""
    return not (TABLES[kind][1] and spacing.startswith("ays"))


PAIRS = [(kind, spacing) for kind in TABLES for spacing in SPACINGS if suits(kind, spacing)]


@pytest.mark.parametrize(("kind", "spacing"), PAIRS)
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize("strength", [0.05, 0.6, 1.0])
def test_strength_gives_n_falling_levels_and_zero(kind, spacing, steps, strength):
    table, flow = TABLES[kind]
    if spacing == "lcm" and steps > 50 * strength:
        with pytest.raises(ValueError, match=r"steps: .* the LCM grid has 2 levels"):
            from_strength(table, steps, strength, spacing, flow)
        return
    levels = from_strength(table, steps, strength, spacing, flow)
    assert levels.shape == (steps + 1,)
    assert levels.dtype == torch.float32
    assert levels[-1] == 0
    assert (levels[:-1] > levels[1:]).all()
    assert levels.isfinite().all()


@pytest.mark.parametrize(("kind", "spacing"), PAIRS)
def test_strength_is_where_the_run_starts(kind, spacing):
    table, flow = TABLES[kind]
    full, half = (from_strength(table, 4, s, spacing, flow) for s in (1.0, 0.5))
    assert full[0] == table[-1]
    assert half[0] == table[len(table) // 2 - 1]


def test_uniform_t_is_even_in_timesteps():
    table = torch.arange(1, 1001).float()
    assert from_strength(table, 4, 1.0).tolist() == [1000, 750, 500, 250, 0]
    assert from_strength(table, 3, 0.6).tolist() == [600, 400, 200, 0]


def test_log_snr_is_even_in_log_snr():
    for kind in ("discrete", "flow"):
        table, flow = TABLES[kind]
        levels = from_strength(table, 6, 0.6, "log-snr", flow)[:-1].double()
        signal = 1 - levels if flow else torch.ones_like(levels)
        gaps = (signal / levels).log().diff()
        assert gaps.min() == pytest.approx(gaps.max().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "strength", "says"),
    [
        (0, 0.5, "steps: "),
        (4, 0.0, "strength: .*nothing"),
        (4, -0.1, "strength: "),
        (4, 1.5, "strength: "),
        (4, 0.001, "steps: .*do not fit"),
    ],
)
def test_bad_dials_are_named(steps, strength, says):
    with pytest.raises(ValueError, match=says):
        from_strength(discrete_table(), steps, strength)


# --- in ComfyUI ----------------------------------------------------------------------------------


def model(sampling):
    """What the schedule nodes ask of a MODEL."""

    class Model:
        def get_model_object(self, name):
            return {"model_sampling": sampling}[name]

    return Model()


def samplings():
    import comfy.model_sampling as ms
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscreteDistilled

    class Flow(ms.ModelSamplingDiscreteFlow, ms.CONST):
        pass

    class Flux(ms.ModelSamplingFlux, ms.CONST):
        pass

    class Edm(ms.ModelSamplingContinuousEDM, ms.EDM):
        pass

    class Discrete(ms.ModelSamplingDiscrete, ms.EPS):
        pass

    class Zsnr(ms.ModelSamplingDiscrete, ms.V_PREDICTION):
        def __init__(self):
            super().__init__(zsnr=True)

    class Distilled(ModelSamplingDiscreteDistilled, ms.EPS):
        pass

    class Cascade(ms.StableCascadeSampling, ms.EPS):
        pass

    return [kind() for kind in (Discrete, Zsnr, Distilled, Flow, Flux, Edm, Cascade)]


@pytest.mark.comfy
def test_every_family_of_models():
    from livediffusion.nodes.schedules import LiveStrength, LiveTimesteps

    for sampling in samplings():
        a = LiveTimesteps.execute(model(sampling), "0, 18, 26, 35, 45", 50).args[0]
        assert a.shape == (6,)
        assert a[0] == sampling.sigmas[-1].cpu()
        assert (a[:-1] > a[1:]).all() and a[-1] == 0
        for spacing in SPACINGS[:5]:
            b = LiveStrength.execute(model(sampling), 4, 0.6, spacing).args[0]
            assert b.shape == (5,) and (b[:-1] > b[1:]).all() and b[-1] == 0
            assert b[0] < sampling.sigmas[-1].cpu()


@pytest.mark.comfy
def test_karras_at_full_strength_is_comfyuis():
    from comfy.k_diffusion.sampling import get_sigmas_karras
    from livediffusion.nodes.schedules import LiveStrength

    sampling = samplings()[0]
    stock = get_sigmas_karras(8, float(sampling.sigma_min), float(sampling.sigma_max))
    ours = LiveStrength.execute(model(sampling), 8, 1.0, "karras").args[0]
    assert torch.allclose(ours, stock, rtol=1e-5)


@pytest.mark.comfy
def test_a_model_without_noise_levels_is_named():
    from livediffusion.nodes.schedules import LiveStrength

    with pytest.raises(ValueError, match="model: "):
        LiveStrength.execute(model(object()), 4, 0.6, "uniform t")
    with pytest.raises(ValueError, match="model: "):
        LiveStrength.execute(None, 4, 0.6, "uniform t")


def test_fast_ddpm_is_the_published_rule():
    """Their formula for any number of steps: 4 of 10 evenly in 0..699, 6 evenly in 699..999."""
    places = from_strength(torch.arange(1000.0) + 1, 10, 1.0, "fast-ddpm")[:-1].long() - 1
    assert places.tolist() == [999, 939, 879, 819, 759, 699, 525, 350, 175, 0]
    assert (places > 690).sum() == 6


def test_lcm_takes_its_places_from_its_own_grid():
    """diffusers' LCMScheduler.set_timesteps(4): 999, 759, 499, 259."""
    places = from_strength(torch.arange(1000.0) + 1, 4, 1.0, "lcm")[:-1].long() - 1
    assert places.tolist() == [999, 759, 499, 259]


@pytest.mark.comfy
@pytest.mark.parametrize(("spacing", "kind"), [("ays", "SD1"), ("ays sdxl", "SDXL")])
@pytest.mark.parametrize("steps", [3, 10, 12])
def test_ays_at_full_strength_is_comfyuis(spacing, kind, steps):
    from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler

    ours = from_strength(discrete_table(), steps, 1.0, spacing)
    theirs = AlignYourStepsScheduler.execute(kind, steps, 1.0).args[0]
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_ays_is_refused_for_flow_models():
    table, flow = TABLES["flow"]
    with pytest.raises(ValueError, match="spacing: ays was made for"):
        from_strength(table, 4, 1.0, "ays", flow)
