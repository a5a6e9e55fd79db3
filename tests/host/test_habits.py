"""What a patch may do to a batch does not reach other frames: each is as if sampled alone.

tests/habits.py has the habits and the places. Equal to rounding, or refused in words.
"""

import itertools
import os

import pytest

pytestmark = pytest.mark.comfy

HABITS = (
    "reads sigmas[0]", "finds its step", "counts calls", "keeps by shape", "keeps one",
    "sums rows", "indexes rows", "reads cond_or_uncond",
)  # fmt: skip
PLACES = (
    "attn1 patch", "attn2 patch", "attn1 replace", "input block", "output block",
    "model function", "cfg function", "post cfg function", "CALC_COND_BATCH", "APPLY_MODEL",
    "DIFFUSION_MODEL", "PREDICT_NOISE",
)  # fmt: skip
GUIDERS = ("basic", "cfg", "residual")
FAMILY = "SD1.5"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    import comfy.utils
    import families

    before, comfy.utils.PROGRESS_BAR_ENABLED = comfy.utils.PROGRESS_BAR_ENABLED, False
    yield
    comfy.utils.PROGRESS_BAR_ENABLED = before
    UNPATCHED.clear()
    families.forget()


def made(kind, model, own=lambda kind: kind):
    """A guider; `own` makes another class of its class."""
    import families
    import framewise

    positive, negative = (families.conditioning(FAMILY, seed) for seed in (1, 2))
    if kind == "basic":
        guider = framewise.basic(model, positive)
    elif kind == "cfg":
        guider = framewise.cfg(model, positive, negative)
    else:
        guider = framewise.residual(model, positive)
    guider.__class__ = own(type(guider))
    return guider


def case(make):
    import families
    import framewise

    sources = families.latents(FAMILY, framewise.FRAMES)
    return framewise.Case(lambda rows: make(), sources, lambda n: families.levels(FAMILY, n))


UNPATCHED = {}


def check(make, kind, ways):
    """A case in some ways, and that it acts."""
    import families
    import framewise
    import tiny

    if kind not in UNPATCHED:
        UNPATCHED[kind] = case(lambda: made(kind, families.model(FAMILY).clone())).alone(3, 0)
    one = case(make)
    assert tiny.rms(one.alone(3, 0), UNPATCHED[kind]) > 1e-4, "it acts"
    _, wrong = framewise.judged(one, ways)
    assert wrong == [], "\n".join(wrong)


PAIRS = list(itertools.product(PLACES, HABITS))


@pytest.mark.parametrize(
    ("place", "habit"),
    # all of them on the primary ComfyUI, some on the others
    [pytest.param(*p, marks=[pytest.mark.slow] if i % 4 else []) for i, p in enumerate(PAIRS)],
)
def test_habit(place, habit):
    import framewise

    # guiders and ways in turns: each habit meets all nine of them, each place eight
    at = PAIRS.index((place, habit))
    check_habit(place, habit, GUIDERS[at % 3], framewise.FEW[at // 3 % 3 :][:1])


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("LIVEDIFFUSION_WALK") != "all", reason="many: LIVEDIFFUSION_WALK=all"
)
@pytest.mark.parametrize(
    ("place", "habit"),
    [pair for pair in PAIRS if pair[0] in ("attn1 patch", "cfg function", "APPLY_MODEL")],
)
@pytest.mark.parametrize("kind", GUIDERS)
def test_habit_in_every_way(place, habit, kind):
    import framewise

    check_habit(place, habit, kind, framewise.WAYS)


def check_habit(place, habit, kind, ways):
    import families
    import habits

    def make():
        model = families.model(FAMILY).clone()
        habits.PLACES[place](model, habits.HABITS[habit]())
        return made(kind, model)

    check(make, kind, ways)


def test_all_habits_and_places_are_tested():
    import habits

    assert set(HABITS) == set(habits.HABITS)
    assert set(PLACES) == set(habits.PLACES)


@pytest.mark.parametrize("kind", GUIDERS)
def test_what_only_outer_sample_forgets(kind):
    import families
    import framewise
    import habits

    def make():
        model = families.model(FAMILY).clone()
        habits.forgetting(model)
        return made(kind, model)

    check(make, kind, framewise.WAYS)


@pytest.mark.parametrize("habit", [h for h in HABITS if h != "reads cond_or_uncond"])
@pytest.mark.parametrize("kind", GUIDERS)
def test_guider_of_another_pack(kind, habit):
    import families
    import framewise
    import habits

    def make():
        model = families.model(FAMILY).clone()
        return made(kind, model, lambda base: habits.guider_with(habits.HABITS[habit], base))

    # each habit in all ways, each of them with another guider
    turn = (HABITS.index(habit) + GUIDERS.index(kind)) % 3
    check(make, kind, framewise.FEW[turn:][:1])


@pytest.mark.parametrize("kind", GUIDERS)
def test_without_a_habit(kind):
    """The oracle itself: a plain model is equal in every way."""
    import families
    import framewise

    _, wrong = framewise.judged(
        case(lambda: made(kind, families.model(FAMILY).clone())), framewise.WAYS
    )
    assert wrong == []
