"""Contract C1 for every node of ComfyUI's own that gives a MODEL, a GUIDER or CONDITIONING.

Each is called with default inputs, and once more inside its ranges, on tiny models of the families
it is for; a stream through what it gives equals ComfyUI's own sampling of each frame alone, or is
refused in words. tests/node_models.py and tests/node_conditionings.py say how each is exercised.
"""

import functools
import logging
import os
import warnings

import pytest

pytestmark = pytest.mark.comfy
WHOLE = os.environ.get("LIVEDIFFUSION_WALK") == "all"
OLDER = "LIVEDIFFUSION_ONCE" in os.environ and not WHOLE  # set by run.py on older ComfyUIs


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No progress bars and log lines of hundreds of samplings;"""
    import comfy.utils
    import families

    before, comfy.utils.PROGRESS_BAR_ENABLED = comfy.utils.PROGRESS_BAR_ENABLED, False
    logging.disable(logging.WARNING)
    yield
    comfy.utils.PROGRESS_BAR_ENABLED = before
    logging.disable(logging.NOTSET)
    unpatched.cache_clear()
    families.forget()


def table():
    import node_conditionings
    import node_models

    assert not node_models.TABLE.keys() & node_conditionings.TABLE.keys()
    return {**node_models.TABLE, **node_conditionings.TABLE}


def test_every_node_is_classified():
    """A node that a newer ComfyUI adds fails here until somebody says how it is exercised."""
    import registry

    found = registry.concerned()
    assert len(found) > 150, "the registry was read"
    assert sorted(found - table().keys()) == []
    gone = sorted(table().keys() - found)
    if gone:  # the table is shared by all versions
        warnings.warn(f"classified, and not in this ComfyUI: {', '.join(gone)}", stacklevel=1)


def test_reasons_are_told():
    from node_models import Out

    out = [entry.why for entry in table().values() if isinstance(entry, Out)]
    assert all(len(why) > 10 for why in out)


def cases(table):
    """(node, family, variant) of all that is exercised, as parameters.

    One family on each ComfyUI; in more ways and one of the other families, in turns, on the
    primary; and everything in all eight ways where LIVEDIFFUSION_WALK is "all".
    """
    from node_models import Use

    out, slow = [], [pytest.mark.slow]
    for place, (name, use) in enumerate(sorted(table.items())):
        if not isinstance(use, Use):
            continue
        first, *others = use.families
        if not WHOLE and others:
            others = [others[place % len(others)]]
        variants = ["default", "inside"] if use.inside else ["default"]
        out += [
            pytest.param(name, first, v, marks=slow if v == "inside" else []) for v in variants
        ]
        if WHOLE:
            out += [pytest.param(name, first, f"{v}, more", marks=slow) for v in variants]
        out += [pytest.param(name, first, "rows", marks=slow)] if use.rows else []
        out += [pytest.param(name, family, variants[-1], marks=slow) for family in others]
    return out


def reusable(table):
    """(node, family, before) of what a MODEL that reuses may meet, as parameters: behind the node
    or before it, in turns, and all of it where LIVEDIFFUSION_WALK is "all"."""
    import node_models

    out = []
    for place, (name, use) in enumerate(sorted(table.items())):
        families = [f for f in getattr(use, "families", ()) if f in node_models.UNETS]
        for family in families if WHOLE else families[:1]:
            sides = (False, True) if WHOLE else (place % 2 == 0 and not use.loads,)
            out += [pytest.param(name, family, before) for before in sides]
    return out


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize(("name", "family", "variant"), cases(table()))
    if "before" in metafunc.fixturenames:
        import node_models

        metafunc.parametrize(("name", "family", "before"), reusable(node_models.TABLE))


# slow nodes whose MODEL keeps nothing of a sampling, so that one serves all frames
LASTING = ("ModelMerge", "ModelSampling")


def exercised(name, family, variant):
    """The case of a node in a variant."""
    import families
    import framewise
    import loading
    import registry

    node, use = registry.registry()[name], table()[name]
    given = {**use.given, **(use.inside if variant.startswith("inside") else {})}
    known = node.INPUT_TYPES()
    known = {k for part in ("required", "optional") for k in known.get(part, {})}
    given = {k: v for k, v in given.items() if k in known}

    made = {}

    def make(rows):
        out = made.get(rows)
        if out is None:
            with loading.loaded(use.loads, family):
                out = registry.call(node, registry.inputs(node, family, rows, given))
        if name.startswith(LASTING):
            made[rows] = out
        return guider(registry.outputs(node), out, family, rows, use)

    masks = graded() if use.masked else None
    return framewise.Case(
        make, families.latents(family, framewise.FRAMES), lambda n: families.levels(family, n),
        masks, variant == "rows",
    )  # fmt: skip


def graded():
    """Noise masks of more than 0 and 1, one per row."""
    import parts

    return 0.2 + 0.6 * parts.mask("noise mask", (0, 1, 2, 3)) * parts.mask("more", (0, 1, 2, 3), 64)


def guider(kinds, out, family, rows, use):
    """A guider of what a node gave: itself, or one of its model and its conditionings."""
    import framewise
    import registry

    conds = [value for kind, value in zip(kinds, out, strict=False) if kind == "CONDITIONING"]
    given = dict(zip(kinds, out, strict=False))
    if "GUIDER" in given:
        return given["GUIDER"]
    sides = list(registry.plain(family, rows))
    sides[: len(conds)] = conds[:2]
    model = given.get("MODEL") or registry.model(family)
    return framewise.basic(model, sides[0]) if use.basic else framewise.cfg(model, *sides)


@functools.cache
def unpatched(family, masked, basic):
    """The first frame without the node."""
    import families
    import framewise
    import node_models

    use = node_models.Use(masked=masked, basic=basic)
    case = framewise.Case(
        lambda rows: guider((), (), family, rows, use),
        families.latents(family, framewise.FRAMES), lambda n: families.levels(family, n),
        graded() if use.masked else None,
    )  # fmt: skip
    return case.alone(3, 0)


# (n, F, clip); together and with what is more, these are all ways. Of the second and the third pair
# a node has one way, the next node in the table the other
DEFAULT = ((3, 2, True), (1, 1, False))
INSIDE = ((3, 1, False), (1, 2, True))
ROWS = ((3, 1, True), (1, 2, True))


def ways(name, family, variant):
    """How a case is run."""
    import framewise

    use = table()[name]

    def turn(two):
        return two if WHOLE else two[place % 2 : place % 2 + 1]

    place = sorted(table()).index(name)
    if variant == "rows":
        return turn(ROWS)
    if family != use.families[0]:
        # in turns: a clip with two frames per slot, and a live stream
        place = use.families.index(family)
        return turn(framewise.LEAST)
    if variant.endswith("more"):
        return [way for way in framewise.WAYS if way not in DEFAULT + INSIDE]
    if OLDER:
        return turn(DEFAULT)
    if not use.inside:
        return DEFAULT + turn(INSIDE)
    return turn(INSIDE) if variant == "inside" else DEFAULT


def test_equals_each_frame_alone(name, family, variant, record_property):
    import framewise
    import registry
    import tiny

    if name not in registry.concerned():
        pytest.skip("this ComfyUI has no such node")
    use = table()[name]
    case = exercised(name, family, variant)
    last = variant == "inside" or (variant == "default" and not use.inside)
    if use.acts and last and family == use.families[0] and not OLDER:
        without = unpatched(family, use.masked, use.basic)
        assert tiny.rms(case.alone(3, 0), without) > 1e-4, "it acts"
    outcomes, wrong = framewise.judged(case, ways(name, family, variant))
    record_property("walked", (name, dict(outcomes)))
    assert wrong == [], "\n".join([f"{name} on {family}, {variant}:", *wrong])


def whole_rows(unet, plan, x, timesteps, context, y, control, options, **kwargs):
    """A call by a plan, naively: ComfyUI's own network for all rows, and what was kept put in."""
    kept, last = plan.kept, len(unet.output_blocks) - 1

    def put_in(h, skip, known):
        if known["block"] == ("output", last - kept.depth):
            h = kept.take(h.index_select(0, kept.whole) if kept.rows else None)
        return h, skip

    patches = options.get("patches", {})
    after = patches.get("output_block_patch", [])
    options = {**options, "patches": {**patches, "output_block_patch": [put_in, *after]}}
    return unet._forward(x, timesteps, context, y, control, options, **kwargs)


def reusing(name, family, before, interval):
    """A guider of what a node gave, whose model reuses; nothing is reused where interval is 0.

    Raises:
        ValueError: it is refused.
    """
    import loading
    import registry
    from livediffusion.engine.blocks.schedule import DEPTHS, Reuse
    from livediffusion.host.models.coherence import attach

    def reused(model):
        # the outermost block: as much as there is between it is kept
        return attach(model, reuse=Reuse(interval, DEPTHS[0], 0.0)) if interval else model

    node, use = registry.registry()[name], table()[name]
    known = node.INPUT_TYPES()
    kinds = {k: v[0] for part in ("required", "optional") for k, v in known.get(part, {}).items()}
    given = {k: v for k, v in {**use.given, **use.inside}.items() if k in kinds}
    outputs = registry.outputs(node)
    first = next((k for k, kind in kinds.items() if kind == "MODEL"), None)
    # a guider has only its front
    before = first is not None and (before or "MODEL" not in outputs)
    if before:
        given[first] = reused(registry.model(family))
    with loading.loaded(use.loads, family):
        out = list(registry.call(node, registry.inputs(node, family, (0,), given)))
    if not before:
        at = outputs.index("MODEL")
        out[at] = reused(out[at])
    return guider(outputs, tuple(out), family, (0,), use)


def streamed(name, family, before, interval):
    """(what a stream of two slots gives in each of five runs, why it reused nothing, how many of
    its rows ran whole and all of them) of a node's model."""
    import families
    import framewise
    import torch
    from livediffusion.host.sampling.stream import Settings, Stream

    made, stream, outs = reusing(name, family, before, interval), Stream(1), []
    masks = graded() if table()[name].masked else None
    settings = Settings(families.levels(family, 2), "euler", framewise.SEED)
    still = families.latents(family, framewise.FRAMES)
    for i in range(5):
        frame = still[:1] + 0.1 * still[i % 4 : i % 4 + 1]
        mask = None if masks is None else masks[:1]
        torch.manual_seed(i)  # what nodes draw
        outs.append(stream.run(made, frame, settings, mask))
    reusing_ = stream.coherent.neighbours.reusing if interval else None
    why, rows = ("", (0, 0)) if reusing_ is None else (reusing_.why, reusing_.looked())
    return torch.cat(outs), why, rows


@pytest.mark.slow
def test_reuse_beside_each_node(name, family, before, monkeypatch):
    """Whatever is on a MODEL: at interval 1 it is as without, to the last bit; at interval 2 it is
    as if all of the network had run and what was kept was put in, or it runs whole and says why."""
    import registry
    import tiny
    import torch
    from livediffusion.host.models import walk

    if name not in registry.concerned():
        pytest.skip("this ComfyUI has no such node")
    plain, _, _ = streamed(name, family, before, 0)
    always, _, _ = streamed(name, family, before, 1)
    assert torch.equal(always, plain)
    ours, why, (rows, ran) = streamed(name, family, before, 2)
    if why or ran == rows:
        assert len(why) > 10 and torch.equal(ours, plain), "it runs whole and says why"
        return
    monkeypatch.setattr(walk, "walk", whole_rows)
    wanted, _, _ = streamed(name, family, before, 2)
    assert tiny.rms(wanted, plain) > 1e-6, "something was reused"
    assert tiny.rms(ours, wanted) <= 1e-5
