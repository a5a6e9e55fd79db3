"""What becomes of a run in which something goes wrong, decided without a run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import camera
from livediffusion.live import cameras, faults, shared
from livediffusion.live.pictures import Refused, checked_shape, landed, on_its_way, showable

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]


@pytest.mark.parametrize(
    ("reason", "settled", "edited", "wanted"),
    [
        (faults.Refused("x"), True, False, faults.Fate.ON),
        (faults.Refused("x"), True, True, faults.Fate.ON),
        (ValueError("x"), True, False, faults.Fate.END),
        (faults.Refused("x"), False, True, faults.Fate.BACK),
        (ValueError("x"), False, True, faults.Fate.BACK),
        (faults.Refused("x"), False, False, faults.Fate.END),
        (ValueError("x"), False, False, faults.Fate.END),
    ],
)
def test_what_becomes_of_a_run(reason, settled, edited, wanted):
    assert faults.fate(reason, settled, edited) is wanted


def test_a_fault_is_told_once_until_it_goes_well():
    told = []
    found = faults.Faults(lambda *what: told.append(what))
    for _ in range(3):
        found.refuse("picture", "5", ValueError("bad"))
    found.refuse("picture", "6", ValueError())
    found.well("picture", "5")
    found.refuse("picture", "5", ValueError("worse"))
    assert told == [("picture", "bad", "5"), ("picture", "ValueError", "6"),
                    ("picture", "worse", "5")]  # fmt: skip
    assert found.counts["picture"] == 5


def test_a_task_is_begun_again_three_times_in_ten_seconds():
    now = [0.0]
    often = faults.Restarts(lambda: now[0])
    assert [often.again() for _ in range(5)] == [True, True, True, False, False]
    seldom, answers = faults.Restarts(lambda: now[0]), []
    for _ in range(20):
        now[0] += 4
        answers.append(seldom.again())
    assert all(answers)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8,
                     torch.int64, torch.bool, torch.complex64]),
    st.sampled_from([0.0, 0.5, 7.0, -1.0, float("nan"), float("inf"), -float("inf")]),
)  # fmt: skip
def test_any_tensor_is_shown_or_refused_in_words(shape, dtype, value):
    image = torch.full(shape, value if dtype.is_floating_point else 1).to(dtype)
    try:
        showable(image)
    except Refused as reason:
        assert str(reason).startswith("image: ") and str(reason).endswith(".")
        return
    picture = landed(on_its_way(image))
    assert picture.dtype == np.uint8 and picture.shape == (*shape[1:3], 3)


@settings(max_examples=60, deadline=None)
@given(*[st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.lists(st.integers()),
                   st.booleans(), st.sampled_from(["crop", "pad", 32, 64.0]))] * 4)  # fmt: skip
def test_any_settings_are_a_shape_or_refused_in_words(width, height, fit, mirror):
    try:
        shape = checked_shape(width, height, fit, mirror)
    except Refused as reason:
        assert str(reason).split(":")[0] in ("width", "height", "fit", "mirror")
        assert len(str(reason)) < 200
        return
    assert 16 <= shape.width <= 4096 and 16 <= shape.height <= 4096
    assert type(shape.width) is int and shape.fit in ("crop", "pad", "stretch")


def test_what_the_browser_is_asked_for_is_the_most_that_any_node_wants():
    sources = {
        "1": camera(width=640, height=360, fps=24), "2": camera(width=320, height=720, fps=60),
        "3": camera(source="file", file="a.gif", width=1024, height=1024, fps=120),
        "4": camera(width=["9", 0], height=256),
    }  # fmt: skip
    split = type("Split", (), {"graph": sources, "sources": list(sources)})
    found = {one.pop("node"): one for one in cameras.wanted(split)}
    most = {"source": "browser", "width": 640, "height": 720, "fps": 60}
    assert found["1"] == found["2"] == found["4"] == most
    assert found["3"] == {"source": "file", "width": 1024, "height": 1024, "fps": 120}
    assert shared.SIZES == {"width": 512, "height": 512, "fps": 30}
