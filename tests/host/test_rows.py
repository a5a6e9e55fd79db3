"""Conditioning with a row per frame: frame i is sampled under row i, wherever it is in the ring.

The oracle is the frame alone with row i of every tensor of its conditioning.
"""

import os

import pytest
import torch

pytestmark = pytest.mark.comfy
LONG = "LIVEDIFFUSION_LONG" in os.environ

PAIRS = ((0, 1), (2, 3), (1, 0))  # the frames of each run of a live stream
# n, F, and how frames come: as a clip, live in runs of two under one conditioning, and live with
# the conditioning changing from run to run
WAYS = [(n, f, how) for n in (1, 3) for f in (1, 2) for how in ("clip", "live", "moving")]
# every two values of different columns together; all of WAYS with LIVEDIFFUSION_LONG set
SOME = [(1, 1, "live"), (1, 2, "clip"), (1, 2, "moving"), (3, 1, "clip"), (3, 1, "moving"),
        (3, 2, "live")]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet():
    import comfy.utils
    import families

    before, comfy.utils.PROGRESS_BAR_ENABLED = comfy.utils.PROGRESS_BAR_ENABLED, False
    yield
    comfy.utils.PROGRESS_BAR_ENABLED = before
    families.forget()


def prompts(family, guide):
    """Prompts of a batch; the other side of a batch too, or of one row."""

    def make(rows):
        import framewise
        import parts
        import registry

        positive, negative = registry.plain(family, rows)
        model = registry.model(family)
        if guide == "basic":
            return framewise.basic(model, positive)
        if guide == "residual":
            return framewise.residual(model, positive)
        if guide == "cfg, one negative":
            negative = parts.conditioning(family, "negative")
        if guide == "cfg, one positive":
            positive = parts.conditioning(family, "positive")
        if guide == "cfg, odd lengths":
            negative = parts.conditioning(family, "negative", rows, tokens=16)
        return framewise.cfg(model, positive, negative)

    return family, make


def through(family, node, given=None):
    """What a node of ComfyUI makes of parts with a row per frame, under CFG."""

    def make(rows):
        import framewise
        import registry

        entry = registry.registry()[node]
        values = registry.inputs(entry, family, rows, given)
        out = registry.call(entry, values)
        conds = [v for k, v in zip(registry.outputs(entry), out, strict=True)
                 if k == "CONDITIONING"]  # fmt: skip
        pair = [*conds, *registry.plain(family, rows)[len(conds) :]][:2]
        return framewise.cfg(registry.model(family), *pair)

    return family, make


def entries(family, alike=True):
    """Two entries per side, of a batch each, one of them gated by percent."""

    def make(rows):
        import framewise
        import parts
        import registry

        def side(name):
            first = parts.conditioning(family, name, rows)
            more = {} if alike else {"start_percent": 0.2, "end_percent": 0.6}
            return first + parts.conditioning(family, f"{name} again", rows, **more)

        return framewise.cfg(registry.model(family), side("positive"), side("negative"))

    return family, make


def masked(family, bounds=False):
    """Masks of a batch, over a prompt that is everywhere."""

    def make(rows):
        import framewise
        import parts
        import registry

        extra = {"mask": parts.mask("mask", rows), "mask_strength": 0.8,
                 "set_area_to_bounds": bounds}  # fmt: skip
        positive = parts.conditioning(family, "positive", rows, **extra)
        positive += parts.conditioning(family, "around", rows)
        negative = parts.conditioning(family, "negative", rows)
        return framewise.cfg(registry.model(family), positive, negative)

    return family, make


def referring(family, count=2):
    """Reference latents of a batch."""

    def make(rows):
        import framewise
        import parts
        import registry

        latents = [parts.latent(family, f"reference {i}", rows)["samples"] for i in range(count)]
        positive = parts.conditioning(family, "positive", rows, reference_latents=latents)
        negative = parts.conditioning(family, "negative", rows, reference_latents=latents)
        return framewise.cfg(registry.model(family), positive, negative)

    return family, make


def hooked(family):
    """Prompts of a batch under a LoRA hook."""

    def make(rows):
        import framewise
        import parts
        import registry

        positive = parts.conditioning(family, "positive", rows, hooks=parts.hooks(family))
        return framewise.cfg(registry.model(family), positive, registry.plain(family, rows)[1])

    return family, make


def patched(family):
    """Prompts of a batch on a model with a patch."""

    def make(rows):
        import framewise
        import registry

        model = registry.model(family)
        model.set_model_attn2_patch(lambda q, k, v, extra: (q, k, v * 0.7))
        return framewise.cfg(model, *registry.plain(family, rows))

    return family, make


def attention_masked(family):
    """Attention masks of a batch."""

    def make(rows):
        import framewise
        import parts
        import registry

        tokens = torch.arange(8)
        mask = torch.stack([(tokens < 8 - r).long() for r in rows])
        positive = parts.conditioning(family, "positive", rows, attention_mask=mask)
        return framewise.cfg(registry.model(family), positive, registry.plain(family, rows)[1])

    return family, make


KINDS = {
    "prompts": prompts("SD1.5", "basic"),
    "prompts, cfg": prompts("SD1.5", "cfg"),
    "prompts, one negative": prompts("SD1.5", "cfg, one negative"),
    "prompts, one positive": prompts("SD1.5", "cfg, one positive"),
    "prompts, odd lengths": prompts("SD1.5", "cfg, odd lengths"),
    "prompts, residual": prompts("SD1.5", "residual"),
    "prompts, patched": patched("SD1.5"),
    "prompts, hooked": hooked("SD1.5"),
    "pooled": prompts("SDXL", "basic"),
    "pooled, cfg": prompts("SDXL", "cfg"),
    "SD3": prompts("SD3", "cfg"),
    "Flux": prompts("Flux", "basic"),
    "Flux, cfg": prompts("Flux", "cfg"),
    "Lumina2": prompts("Lumina2", "cfg"),
    "attention masks": attention_masked("Lumina2"),
    "inpaint": through("inpaint", "InpaintModelConditioning", {"noise_mask": False}),
    "instruct": through("ip2p", "InstructPixToPixConditioning"),
    "masks": masked("SD1.5"),
    "mask bounds": masked("SD1.5", bounds=True),
    "hints": through("SD1.5", "ControlNetApplyAdvanced"),
    "hints, gated": through(
        "SD1.5", "ControlNetApplyAdvanced", {"start_percent": 0.2, "end_percent": 0.6}
    ),
    "references": referring("Flux"),
    "references, Lumina2": referring("Lumina2"),
    "entries": entries("SD1.5"),
    "entries, gated": entries("SD1.5", alike=False),
    "zeroed": through("SD1.5", "ConditioningZeroOut"),
}  # fmt: skip
# on the primary ComfyUI only; 0.8.0 itself fails on the first
SLOW = {
    "attention masks", "prompts, odd lengths", "pooled", "SD3", "Flux", "zeroed", "mask bounds",
    "entries", "hints",
}  # fmt: skip


def case(kind):
    import families
    import framewise

    family, make = KINDS[kind]
    sources = families.latents(family, framewise.FRAMES)
    return framewise.Case(make, sources, lambda n: families.levels(family, n), rows=True)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS]
)
def test_rows_of_frames(kind):
    import framewise
    import tiny

    one, wrong = case(kind), []
    rows = torch.cat([one.alone(3, 0, row) for row in range(3)])
    assert tiny.rms(rows[:1], rows[1:2]) > 1e-4 < tiny.rms(rows[1:2], rows[2:]), "rows differ"
    for n, f, how in WAYS if LONG else SOME:
        try:
            if how == "clip":
                found = framewise.clip(one, n, f)
            else:
                found = framewise.live(one, n, f, PAIRS, moving=how == "moving")
            assert found.error <= framewise.NEAR, f"{found.error:.1e} off, {found.where}"
        except Exception as error:  # all failures tell more than the first one
            if not framewise.refused(error):
                name = f"n={n} F={f} {how}"
                wrong.append(f"{name}: {type(error).__name__} {str(error).splitlines()[0][:160]}")
    assert wrong == [], "\n".join(wrong)


def test_five_latents_under_five_prompts():
    """The smallest input of this kind: BasicGuider, CONDITIONING of batch 5, five latents."""
    import families
    import framewise
    import parts
    import registry
    import tiny
    from livediffusion.host.sampling.stream import Stream

    family, rows = "SD1.5", (0, 1, 2, 3, 4)

    def make(rows):
        cond = parts.conditioning(family, "positive", rows)
        return framewise.basic(registry.model(family), cond)

    one = framewise.Case(
        make, families.latents(family, 5), lambda n: families.levels(family, n), rows=True
    )
    for n in (1, 3):
        out = Stream(1).run(one.guider(rows), one.sources, one.settings(n, True))
        errors = [tiny.rms(out[i : i + 1], one.alone(n, i, i)) for i in rows]
        assert max(errors) <= framewise.NEAR, f"n={n}: {errors}"


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_rows_than_frames_repeat(n):
    """Two rows for three frames: the third is under the first again, as ComfyUI repeats them."""
    import framewise
    import tiny
    from livediffusion.host.sampling.stream import Stream

    one = case("prompts, cfg")
    out = Stream(1).run(one.guider((0, 1)), one.sources[:3], one.settings(n, True))
    for i, row in enumerate((0, 1, 0)):
        assert tiny.rms(out[i : i + 1], one.alone(n, i, row)) <= framewise.NEAR


def test_noise_masks_and_inpaint_rows():
    """InpaintModelConditioning as ComfyUI's templates have it, with its noise mask per frame."""
    import families
    import framewise
    import parts

    family, make = through("inpaint", "InpaintModelConditioning", {"noise_mask": True})
    masks = parts.mask("noise mask", (0, 1, 2, 3), families.SIZE * 8)
    one = framewise.Case(
        make, families.latents(family, framewise.FRAMES), lambda n: families.levels(family, n),
        masks, rows=True,
    )  # fmt: skip
    _, wrong = framewise.judged(one, [way for way in framewise.WAYS if way[2]])
    assert wrong == []
