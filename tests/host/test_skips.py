"""Bodies passed by, by noise level, in every sampler and in the stream, against a network that is
cut by hand and runs each frame alone."""

import logging

import pytest
import torch
from cutting import LEVELS, chosen, cut, plain, skipping

pytestmark = pytest.mark.comfy

NEAR = 1e-5


@pytest.fixture(scope="module", autouse=True)
def forget():
    """ComfyUI's patchers complain if they outlive the interpreter's modules."""
    yield
    plain.cache_clear()


def case(skips, make, layout="SD1.5", rule="euler", levels=None):
    """framewise.Case whose oracle is cut by hand, and whose stream passes by."""
    import framewise
    import tiny

    ours, theirs = skipping(skips, layout), cut(skips, layout)

    class Cut(framewise.Case):
        def _sampled(self, guider, n, frame, row):
            self.make = lambda rows: make(theirs)
            try:
                return super()._sampled(self.guider(), n, frame, row)
            finally:
                self.make = lambda rows: make(ours)

    sigmas = levels or (lambda n: (*LEVELS[3 - n :], 0.0))
    return Cut(lambda rows: make(ours), tiny.latents(4), sigmas, rule=rule)


def guiders(layout="SD1.5"):
    import framewise
    import tiny

    pooled = 24 if layout == "SDXL" else None
    one, two = (tiny.conditioning(k, pooled=pooled) for k in (1, 2))
    return {
        "off": lambda model: framewise.basic(model, one),
        "full": lambda model: framewise.cfg(model, one, two),
        "self-negative": lambda model: framewise.residual(model, one),
    }


@pytest.mark.parametrize(
    ("layout", "guidance", "rule", "seed"),
    [("SD1.5", "off", "euler", 0), ("SD1.5", "full", "dpmpp_2m", 1), ("SD2.1", "off", "euler", 2),
     ("SDXL", "self-negative", "euler", 3)],
)  # fmt: skip
def test_each_row_of_a_stream_passes_by_what_its_own_level_says(layout, guidance, rule, seed):
    import framewise

    judge = case(chosen(seed, layout), guiders(layout)[guidance], layout, rule)
    outcomes, wrong = framewise.judged(judge, framewise.FEW)
    assert not wrong and set(outcomes) == {"direct"}, (outcomes, wrong)


@pytest.mark.parametrize("road", ["prepared", "guider", "per_level", "per_frame"])
def test_so_it_is_on_every_road(road, monkeypatch):
    import framewise
    from livediffusion.host.sampling import stream as streams
    from livediffusion.host.sampling.route import Road, route

    to = Road[road.upper()]
    monkeypatch.setattr(streams, "route", lambda *args: route(*args).at_least(to, "a test"))
    judge = case(chosen(4), guiders()["full"])
    outcomes, wrong = framewise.judged(judge, framewise.LEAST)
    assert not wrong and set(outcomes) == {road.replace("_", " ")}, (outcomes, wrong)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "uni_pc", "ddim"])
def test_in_every_sampler_the_nearest_level_speaks(sampler):
    """Also at levels between those that were searched."""
    import comfy.samplers
    import framewise
    import tiny
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    sigmas = torch.tensor([14.6146, 8.0, 4.0, 2.0, 1.0, 0.3, 0.03, 0.0])
    skips = chosen(5)
    latent = {"samples": tiny.latents(2)}

    def sampled(model):
        noise = framewise.SlotZero(latent["samples"].shape[1:])
        return SamplerCustomAdvanced.execute(
            noise, guiders()["full"](model), comfy.samplers.sampler_object(sampler), sigmas, latent
        ).args[0]["samples"]

    ours, wanted = sampled(skipping(skips)), sampled(cut(skips))
    assert tiny.rms(ours, wanted) <= NEAR
    assert tiny.rms(ours, sampled(plain())) > 1e-2


def test_nothing_passed_by_is_the_model_as_it_is_to_the_last_bit():
    import framewise
    import tiny
    from livediffusion.host.sampling.stream import Stream

    def outs(model):
        make = guiders()["full"]
        made = framewise.Case(lambda rows: make(model), tiny.latents(4), lambda n: (*LEVELS, 0.0))
        stream, guider, settings = Stream(1), made.guider(), made.settings(3, False)
        streamed = [stream.run(guider, made.sources[i : i + 1], settings) for i in range(4)]
        return [*streamed, made.alone(3, 0)]

    ours, wanted = outs(skipping([set()] * 3)), outs(plain())
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize(
    ("level", "k"),
    [(100.0, 0), (14.6, 0), (6.63, 0), (6.61, 1), (3.0, 1), (1.56, 1), (1.54, 2), (0.0, 2)],
)
def test_the_nearest_by_ratio(level, k):
    from livediffusion.engine.blocks.skips import Rule

    rule = Rule(LEVELS, tuple(frozenset([str(i)]) for i in range(3)))
    assert rule.at(level) == {str(k)}
    assert Rule((2.0,), (frozenset("a"),)).at(level) == {"a"}
    # in the middle the noisier
    assert Rule((4.0, 1.0), (frozenset("a"), frozenset("b"))).at(2.0) == {"a"}


@pytest.mark.parametrize("levels", [(), (1.0, 2.0), (1.0, 1.0), (1.0, 0.0), (3.0, 2.0, 1.0)])
def test_levels_that_are_none_are_refused(levels):
    from livediffusion.engine.blocks.skips import Rule

    with pytest.raises(ValueError, match="level"):
        Rule(levels, (frozenset(),) * 2)


def test_what_cannot_be_walked_is_refused_in_words(caplog):
    import tiny
    from livediffusion.host.models.skips import cost, skipping

    with pytest.raises(ValueError, match=r"model: UNetModel has no block input.9.9. Use what"):
        skipping(plain(), LEVELS, [{"input.9.9"}] * 3)

    class Other(torch.nn.Module):
        pass

    odd = tiny.model()
    odd.model.diffusion_model = Other()
    for ask in (lambda: skipping(odd, LEVELS, [set()] * 3), lambda: cost(odd, (8, 8), 8)):
        with pytest.raises(ValueError, match="skip_up_to: nothing of this model can be left out"):
            ask()


def test_where_another_node_has_wrapped_the_network_all_of_it_runs_and_it_is_said(caplog):
    import comfy.samplers
    import framewise
    import tiny
    from comfy.patcher_extension import WrappersMP
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    def wrapper(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    skips, outs = chosen(6), []
    for model in (skipping(skips).clone(), plain().clone()):
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another pack", wrapper)
        with caplog.at_level(logging.WARNING):
            outs.append(SamplerCustomAdvanced.execute(
                framewise.SlotZero((4, 8, 8)), guiders()["off"](model),
                comfy.samplers.ksampler("euler"), torch.tensor([*LEVELS, 0.0]),
                {"samples": tiny.latents(1)},
            ).args[0]["samples"])  # fmt: skip
    assert torch.equal(*outs)
    assert "nothing of the network is left out: another node has wrapped the UNet" in caplog.text


@pytest.mark.parametrize("seed", range(4))
def test_the_splits_of_any_call_say_who_runs(seed):
    from livediffusion.engine.blocks.skips import Splits

    chance = torch.Generator().manual_seed(seed)
    made, bodies, at = Splits(torch.device("cpu")), [f"input.{i}.0" for i in range(4)], {}

    def inner(name):
        return name in bodies[2:]

    for _ in range(20):
        rows = int(torch.randint(1, 6, (), generator=chance))
        skipped = [frozenset(b for b in bodies if torch.rand((), generator=chance) < 0.4)
                   for _ in range(rows)]  # fmt: skip
        whole = [r for r in range(rows) if torch.rand((), generator=chance) < 0.5]
        whole = None if seed % 2 else whole
        out = made.of(skipped, whole, inner)
        for name in bodies:
            here = whole if whole is not None and inner(name) else list(range(rows))
            past = [i for i, r in enumerate(here) if name in skipped[r]]
            if not past:
                assert name not in out
                continue
            split = out[name]
            assert split.rest.tolist() == past
            assert sorted([*split.run.tolist(), *past]) == list(range(len(here)))
            back = torch.cat([split.run, split.rest]).index_select(0, split.order)
            assert back.tolist() == list(range(len(here)))
        if made.key:
            # as many rows lie where as many lay
            layout, address = made.key
            assert at.setdefault(layout, address) == address


@pytest.mark.parametrize("interval", [2, 3])
def test_rows_that_go_on_with_a_kept_feature_pass_by_too(interval):
    """With Live Reuse: inner bodies for the rows that run whole, outer ones for all."""
    import pairs
    import tiny
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.host.models.coherence import attach, depth_of
    from livediffusion.host.sampling.stream import Stream
    from reused import Naive

    depth, mode = "finest level", ("full", 1.4, 1.0)
    model = attach(skipping(chosen(8)), reuse=Reuse(interval, depth, 0.0))
    unet = cut(chosen(8)).model
    inner = model.model.diffusion_model
    naive = Naive(unet, len(inner.output_blocks) - 1 - depth_of(inner, depth))
    stream, guider, compared = Stream(1), pairs.guider(model, *mode), 0
    told = 1, [tiny.conditioning(k)[0][0] for k in (1, 2)]
    with torch.inference_mode():
        for i in range(9):
            latents, sigmas = tiny.latents(1, i), (10.0, 3.0, 0.8, 0.0)
            ours = stream.run(guider, latents, pairs.settings(sigmas))
            wanted = naive.run(
                unet.process_latent_in(latents), [told], sigmas, SlotNoise(0, (4, 8, 8)), mode,
                {"interval": interval, "awake": 0.0}, 0, ys=[None, None],
            )  # fmt: skip
            if wanted is not None:
                compared += 1
                assert tiny.rms(ours, unet.process_latent_out(wanted)) <= NEAR
    assert compared >= 6
    assert not stream.coherent.neighbours.reusing.why
