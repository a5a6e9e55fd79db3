"""Live Future Attention against one attention over all rows of a tick, written out."""

import itertools
import os

import pytest
import torch
from tiny_models import forget, tiny_model  # noqa: F401

pytestmark = pytest.mark.comfy

SIGMAS = (10.0, 5.0, 2.0, 0.5, 0.0)
MODES = ("off", "self-negative", "onetime-negative", "full")
NEAR = 1e-5


def with_future(patcher, levels="all"):
    from livediffusion.engine.coherence.neighbours import Future
    from livediffusion.host.models.coherence import attach

    return attach(patcher, future=Future(levels))


def sides_of(mode, frames):
    """Which side each row of a call is on."""

    def sides(rows, labels):
        if labels == [1, 0]:
            return [1] * (rows // 2) + [0] * (rows // 2)
        # the last slot's worth of rows is asked again, as the negative, while frames enter
        if mode == "onetime-negative" and sides.enters:
            return [0] * (rows - frames) + [1] * frames
        return [labels[0]] * rows

    sides.enters = True
    return sides


def streamed(patcher, mode, n, f):
    """What a stream gives, run by run, and the stream."""
    import pairs
    import tiny
    from livediffusion.host.sampling.stream import Stream

    pooled = patcher.model.model_config.unet_config.get("adm_in_channels")
    guider, stream = pairs.guider(patcher, mode, cfg=1.6, pooled=pooled), Stream(f)
    settings = pairs.settings(SIGMAS[4 - n :])
    outs = [stream.run(guider, tiny.latents(f, i), settings) for i in range(n + 2)]
    return torch.cat(outs), stream


@pytest.fixture
def road(request, monkeypatch):
    """The road that a plain tick takes."""
    from livediffusion.host.sampling import stream as streams
    from livediffusion.host.sampling.route import Road, route

    name = request.param
    if name != "direct":
        to = Road[name.upper()]
        monkeypatch.setattr(streams, "route", lambda *args: route(*args).at_least(to, "a test"))
    return name


ALL = itertools.product([(1, 1), (1, 2), (2, 1), (3, 2), (4, 1)], MODES,
                        ["direct", "prepared", "guider"])  # fmt: skip
SOME = [
    *[((3, 2), mode, "direct") for mode in MODES],
    *[((3, 2), mode, road) for mode in MODES[2:] for road in ("prepared", "guider")],
    ((1, 2), "onetime-negative", "direct"), ((1, 1), "full", "guider"), ((4, 1), "off", "direct"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "mode", "road"), ALL if "LIVEDIFFUSION_LONG" in os.environ else SOME,
    indirect=["road"],
)  # fmt: skip
def test_equals_one_attention_over_the_reshaped_batch(size, mode, road):
    """All of ALL with LIVEDIFFUSION_LONG set."""
    import coherent
    import tiny

    model, (n, f) = tiny_model(), size
    ours, stream = streamed(with_future(model), mode, n, f)
    assert stream.stats()["road"] == road
    assert not stream.coherent.neighbours.why
    sides = sides_of(mode, f)
    with coherent.replaced(lambda block: True, coherent.future(sides, f)):
        wanted, _ = streamed(model, mode, n, f)
    assert tiny.rms(ours, wanted) <= NEAR
    alone, _ = streamed(model, mode, n, f)
    assert (tiny.rms(ours, alone) <= NEAR) == (n == 1)


@pytest.mark.parametrize(("layout", "mode"), [("SD2.1", "onetime-negative"), ("SDXL", "full")])
def test_layouts(layout, mode):
    """Attention two blocks deep, and a pooled prompt: rows of all layers see each other."""
    import coherent
    import tiny

    model = tiny_model(layout)
    ours, _ = streamed(with_future(model), mode, 3, 2)
    with coherent.replaced(lambda block: True, coherent.future(sides_of(mode, 2), 2)):
        wanted, _ = streamed(model, mode, 3, 2)
    assert tiny.rms(ours, wanted) <= NEAR
    assert tiny.rms(ours, streamed(model, mode, 3, 2)[0]) > 1e-3


def test_the_embedded_model():
    """Its own layout, with one level of attention, which is all but the finest, too."""
    import coherent
    import tiny
    from livediffusion.demo import loader
    from livediffusion.host.models.coherence import coherence_of

    model = loader.load_model(disable_dynamic=True)
    conds = [[torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0)), {}]]
    helped = with_future(model, "all but the finest")
    assert len(coherence_of(helped).layers(model.model.diffusion_model)[0]) == 4

    def run(patcher):
        import framewise
        import pairs
        from livediffusion.host.sampling.stream import Stream

        stream, guider = Stream(), framewise.residual(patcher, conds)
        with torch.inference_mode():
            return [
                stream.run(guider, tiny.latents(1, i, 16, 48), pairs.settings(SIGMAS[2:]))
                for i in range(4)
            ]

    outs = torch.cat(run(helped))
    with coherent.replaced(lambda block: True, coherent.future(sides_of("off", 1), 1)):
        wanted = torch.cat(run(model))
    assert tiny.rms(outs, wanted) <= NEAR
    assert tiny.rms(outs, torch.cat(run(model))) > 1e-3
