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

    One family in two ways on each ComfyUI, in four and the other families on the primary, and
    everything in all eight ways where LIVEDIFFUSION_WALK is "all".
    """
    from node_models import Use

    out, slow = [], [pytest.mark.slow]
    for name, use in sorted(table.items()):
        if not isinstance(use, Use):
            continue
        first, *others = use.families
        variants = ["default", "inside"] if use.inside else ["default"]
        out += [
            pytest.param(name, first, v, marks=slow if v == "inside" else []) for v in variants
        ]
        if WHOLE:
            out += [pytest.param(name, first, f"{v}, more", marks=slow) for v in variants]
        out += [pytest.param(name, first, "rows", marks=slow)] if use.rows else []
        out += [pytest.param(name, family, variants[-1], marks=slow) for family in others]
    return out


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize(("name", "family", "variant"), cases(table()))


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


# (n, F, clip); together and with what is more, these are all ways
DEFAULT = ((3, 2, True), (1, 1, False))
INSIDE = ((3, 1, False), (1, 2, True))
ROWS = ((3, 1, True), (1, 2, True))


def ways(use, family, variant):
    """How a case is run."""
    import framewise

    if variant == "rows":
        return ROWS
    if family != use.families[0]:
        # in turns: a clip with two frames per slot, and a live stream
        turn = use.families.index(family) % 2
        return framewise.LEAST if WHOLE else framewise.LEAST[turn : turn + 1]
    if variant.endswith("more"):
        return [way for way in framewise.WAYS if way not in DEFAULT + INSIDE]
    if not use.inside:
        return DEFAULT + INSIDE
    return INSIDE if variant == "inside" else DEFAULT


def test_equals_each_frame_alone(name, family, variant, record_property):
    import framewise
    import registry
    import tiny

    if name not in registry.concerned():
        pytest.skip("this ComfyUI has no such node")
    use = table()[name]
    case = exercised(name, family, variant)
    last = variant == "inside" or (variant == "default" and not use.inside)
    if use.acts and last and family == use.families[0]:
        without = unpatched(family, use.masked, use.basic)
        assert tiny.rms(case.alone(3, 0), without) > 1e-4, "it acts"
    outcomes, wrong = framewise.judged(case, ways(use, family, variant))
    record_property("walked", (name, dict(outcomes)))
    assert wrong == [], "\n".join([f"{name} on {family}, {variant}:", *wrong])
