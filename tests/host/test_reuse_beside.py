"""Live Reuse beside what lets frames help each other, against naive references (tests/reused.py,
tests/coherent.py)."""


import pytest
import torch
from tiny_models import forget, inference, tiny_model  # noqa: F401

pytestmark = pytest.mark.comfy

SIGMAS = (10.0, 5.0, 2.0, 0.5, 0.0)
NEAR = 1e-5
MEMORY = {"frames": 2, "interval": 2, "bank": "queue", "fuse": 0.4, "threshold": 0.5}


def blocks(model, depth):
    """The output block that a kept feature comes into, and whether a block is an inner one."""
    from livediffusion.host.models.coherence import depth_of

    unet = model.model.diffusion_model
    outer, count = depth_of(unet, depth), len(unet.output_blocks)

    def inner(block):
        side, number = block[:2]
        return {"input": number > outer, "middle": True}.get(side, number < count - 1 - outer)

    return count - 1 - outer, inner


@pytest.mark.parametrize(
    ("f", "mode", "depth", "interval", "memory"),
    [
        (1, "self-negative", "outermost block", 2, {}),
        (1, "full", "two blocks", 3, {"interval": 4}),
        (2, "onetime-negative", "finest level", 2, {"interval": 3}),
        (1, "off", "outermost block", 3, {"bank": "merged", "fuse": 0.0, "interval": 2}),
        (2, "off", "two blocks", 4, {"frames": 1, "interval": 1}),
    ],
)
def test_memory(f, mode, depth, interval, memory):
    import coherent
    import pairs
    import tiny
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.engine.coherence.neighbours import Memory
    from livediffusion.engine.noise import SlotNoise
    from livediffusion.host.models.coherence import attach, places
    from livediffusion.host.sampling.stream import Stream
    from reused import Remembering

    base, memory, sigmas = tiny_model(), {**MEMORY, **memory}, SIGMAS[1:]
    outs = {place.key for place in places(base.model.diffusion_model) if place.fused}
    naive = Remembering(base.model, blocks(base, depth)[0], outs, memory)
    model = attach(base, memory=Memory(levels="all", **memory), reuse=Reuse(interval, depth, 0.0))
    stream, guider, inner = Stream(f), pairs.guider(model, mode, 1.4), base.model
    told = 1, [tiny.conditioning(seed)[0][0] for seed in (1, 2)]
    compared = 0
    coherent.Ties.begin()
    for i in range(8):
        latents = tiny.latents(1, 50) + 0.2 * tiny.latents(f, i)
        ours = stream.run(guider, latents, pairs.settings(sigmas))
        wanted = naive.run(
            inner.process_latent_in(latents), [told] * f, sigmas, SlotNoise(0, (4, 8, 8)),
            (mode, 1.4, 1.0), {"interval": interval, "awake": 0.0},
        )  # fmt: skip
        if wanted is not None:
            assert coherent.near(ours, inner.process_latent_out(wanted)), i
            compared += 1
    assert compared == 6
    assert coherent.Ties.strict
    assert not stream.coherent.neighbours.reusing.why
    rows, whole = stream.coherent.neighbours.reusing.looked()
    assert (rows, whole) == (
        sum(r for _, r in naive.ran), sum(w for w, _ in naive.ran)
    ) and whole < rows  # fmt: skip


@pytest.mark.parametrize("depth", ["outermost block", "two blocks"])
@pytest.mark.parametrize(("n", "f", "interval"), [(4, 1, 2), (3, 2, 2), (4, 1, 3)])
def test_future(n, f, depth, interval):
    """Frames of a tick look at each other, in inner blocks at those alone that run them: a call of
    all rows, in which the others' features are put in by hand."""
    import coherent
    import pairs
    import tiny
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.engine.coherence.neighbours import Future
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    base = tiny_model()
    at, inner = blocks(base, depth)
    model = attach(base, future=Future("all"), reuse=Reuse(interval, depth, 0.0))
    stream, guider = Stream(f), pairs.guider(model, "off")
    ours = [
        stream.run(guider, tiny.latents(f, i), pairs.settings(SIGMAS[4 - n :])) for i in range(9)
    ]
    assert not stream.coherent.neighbours.reusing.why
    # the same rows by the plain stream, whose calls are looked after here
    tick, kept = [0], {}

    class ByHand:
        """Stands around the network's calls."""

        def __call__(self, executor, x, timesteps, context, y, control, options, **kwargs):
            levels = [float(sigma) for sigma in options["sigmas"]]
            row = [(SIGMAS[4 - n :].index(pytest.approx(s, rel=1e-4)), sum(
                other == s for other in levels[:r])) for r, s in enumerate(levels)]
            whole = [
                (tick[0] + k + n * j) % interval == 0 or (k, j) not in kept for k, j in row
            ]
            tick[0] += 1

            def attend(block, q, k, v, heads, options):
                out = []
                for r, (_, j) in enumerate(row):
                    seen = [s for s, (_, other) in enumerate(row)
                            if other == j and (whole[s] or not inner(block))]
                    keys = (torch.cat([*t[seen]]) if seen else t[r] for t in (k, v))
                    out.append(coherent.softmax(q[r], *keys, heads))
                return torch.stack(out)

            def put(h, skip, extra):
                if extra["block"] == ("output", at):
                    h = h.clone()
                    for r, place in enumerate(row):
                        if whole[r]:
                            kept[place] = h[r].clone()
                        h[r] = kept[place]
                return h, skip

            options = {**options, "patches": {"output_block_patch": [put]}}
            with coherent.replaced(lambda block: True, attend):
                return executor(x, timesteps, context, y, control, options, **kwargs)

    from comfy.patcher_extension import WrappersMP
    from livediffusion.host.models import looks

    plain = base.clone()
    plain.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "by hand", ByHand())
    looked = looks.Look.ROWS
    with pytest.MonkeyPatch.context() as patch:
        known = looks._look_of
        patch.setattr(looks, "_look_of", lambda one: (
            looked if isinstance(one, ByHand) else known(one)))  # fmt: skip
        stream, guider = Stream(f), pairs.guider(plain, "off")
        wanted = [
            stream.run(guider, tiny.latents(f, i), pairs.settings(SIGMAS[4 - n :]))
            for i in range(9)
        ]
    assert tick[0] == 9
    for i in range(n - 1, 9):
        assert tiny.rms(ours[i], wanted[i]) <= NEAR, i


@pytest.mark.parametrize(("f", "mode", "depth"), [
    (1, "off", "finest level"), (2, "full", "outermost block"),
])  # fmt: skip
def test_steps_whose_pictures_are_smaller_inside_keep_features_of_their_own(f, mode, depth):
    """Deep Shrink, at the first levels only. Of a scene that stands still what is kept is what
    would be computed, so pictures are those without to rounding."""
    import pairs
    import tiny
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.host.models.coherence import attach
    from livediffusion.host.sampling.stream import Stream

    given = (tiny_model(), 1, 2.0, 0.0, 0.35, False, "bicubic", "bicubic")
    if hasattr(PatchModelAddDownscale, "execute"):
        shrunk = PatchModelAddDownscale.execute(*given).args[0]
    else:
        shrunk = PatchModelAddDownscale().patch(*given)[0]
    streams = [
        (Stream(f), pairs.guider(model, mode))
        for model in (attach(shrunk, reuse=Reuse(4, depth, 0.0)), shrunk)
    ]
    reusing, ran, kept = None, [], []
    for _ in range(14):
        ours, theirs = (
            stream.run(guider, tiny.latents(f, 0, 16), pairs.settings(SIGMAS, immediate=True))
            for stream, guider in streams
        )
        assert tiny.rms(ours, theirs) <= NEAR
        reusing = streams[0][0].coherent.neighbours.reusing
        ran.append(reusing.looked())
        kept.append([bank.features.data_ptr() for bank in reusing.banks])
    sides = 1 if mode == "off" else 2
    assert ran[8:] == [(4 * f * sides, f * sides)] * 6, "as ever, one place in four"
    assert len(kept[-1]) == 2 and kept[8:] == [kept[-1]] * 6 and not reusing.why
