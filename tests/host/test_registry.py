"""Contract C1 for every node of ComfyUI's own that gives a MODEL, a GUIDER or CONDITIONING.

Each is called with default inputs, and once more inside its ranges, on tiny models of the families
it is for; a stream through what it gives equals ComfyUI's own sampling of each frame alone, or is
refused in words. tests/node_models.py and tests/node_conditionings.py say how each is exercised.
"""

import functools
import logging

import pytest

pytestmark = pytest.mark.comfy


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


def test_reasons_are_told():
    from node_models import Out

    out = [entry.why for entry in table().values() if isinstance(entry, Out)]
    assert all(len(why) > 10 for why in out)


def cases(table):
    """(node, family, variant) of all that is exercised, as parameters."""
    from node_models import Use

    out = []
    for name, use in sorted(table.items()):
        if not isinstance(use, Use):
            continue
        for at, family in enumerate(use.families):
            variants = ["default"] + (["inside"] if use.inside else [])
            variants += ["rows"] if use.rows and at == 0 else []
            if at > 0:
                variants = variants[-1:]
            for variant in variants:
                # one family in every way on each ComfyUI; the others on the primary one
                marks = [pytest.mark.slow] if at > 0 else []
                out.append(pytest.param(name, family, variant, marks=marks))
    return out


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize(("name", "family", "variant"), cases(table()))


def exercised(name, family, variant):
    """The case of a node in a variant."""
    import families
    import framewise
    import loading
    import parts
    import registry

    node, use = registry.registry()[name], table()[name]
    given = {**use.given, **(use.inside if variant == "inside" else {})}
    known = node.INPUT_TYPES()
    known = {k for part in ("required", "optional") for k in known.get(part, {})}
    given = {k: v for k, v in given.items() if k in known}

    def make(rows):
        with loading.loaded(use.loads, family):
            out = registry.call(node, registry.inputs(node, family, rows, given))
        return guider(registry.outputs(node), out, family, rows, use.basic)

    masks = parts.mask("noise mask", (0, 1, 2, 3)) if use.masked else None
    return framewise.Case(
        make, families.latents(family, framewise.FRAMES), lambda n: families.levels(family, n),
        masks, variant == "rows" or use.masked,
    )  # fmt: skip


def guider(kinds, out, family, rows, basic):
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
    return framewise.basic(model, sides[0]) if basic else framewise.cfg(model, *sides)


@functools.cache
def unpatched(family, masked, basic):
    """The first frame without the node."""
    import families
    import framewise
    import parts

    case = framewise.Case(
        lambda rows: guider((), (), family, rows, basic),
        families.latents(family, framewise.FRAMES), lambda n: families.levels(family, n),
        parts.mask("noise mask", (0,)) if masked else None,
    )  # fmt: skip
    return case.alone(3, 0)


def ways(use, family, variant):
    """How a case is run: both variants of the first family together are all ways."""
    import framewise

    if variant == "rows":
        return [way for way in framewise.WAYS if way[2] and way[1] == (1 if way[0] == 3 else 2)]
    if family != use.families[0]:
        return framewise.LEAST
    if not use.inside:
        return framewise.WAYS
    half = 0 if variant == "default" else 1
    return [w for w in framewise.WAYS if (w[0] // 2 + w[1] + w[2]) % 2 == half]


def test_equals_each_frame_alone(name, family, variant, record_property):
    import framewise
    import registry
    import tiny

    if name not in registry.concerned():
        pytest.skip("this ComfyUI has no such node")
    use = table()[name]
    case = exercised(name, family, variant)
    last = variant == "inside" or (variant == "default" and not use.inside)
    if use.acts and last:
        without = unpatched(family, use.masked, use.basic)
        assert tiny.rms(case.alone(3, 0), without) > 1e-4, "it acts"
    outcomes, wrong = framewise.judged(case, ways(use, family, variant))
    record_property("walked", (name, dict(outcomes)))
    assert wrong == [], "\n".join([f"{name} on {family}, {variant}:", *wrong])
