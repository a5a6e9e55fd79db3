"""How many replicas, and how many a GPU holds."""

import itertools
import random
import types

import pytest
from serving import served

scaling, capacity = served("scaling"), served("capacity")


@pytest.mark.parametrize("low,high", [(0, 1), (0, 8), (1, 3), (2, 2), (5, 40)])
@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("slots", [1.0, 0.5, 0.25])
def test_wanted_is_enough_and_no_more_than_that(low, high, spare, slots):
    for streams, waiting in itertools.product(range(0, 12), range(0, 12)):
        n = scaling.wanted(streams, waiting, slots, 3, spare, low, high)
        assert low <= n <= high
        here = streams + waiting
        if low < n:
            # one fewer would not do
            assert (n - 1) * slots < here + (spare * slots if here else 0)
        if n < high:
            assert n * slots >= here - 1e-6
        more = scaling.wanted(streams, waiting + 1, slots, 3, spare, low, high)
        assert more >= n, "who waits never makes it fewer"


def test_nobody_here_is_none_needed_however_many_are_to_be_spare():
    assert scaling.wanted(0, 0, 1.0, 4, 3, 0, 8) == 0
    assert scaling.wanted(0, 1, 1.0, 0, 3, 0, 8) == 4


def _context(recorded, target, low=0, high=9, requests=0.0, now=0.0, state=None):
    raw = {}
    for replica, values in recorded.items():
        for name, value in values.items():
            points = [types.SimpleNamespace(value=99.0), types.SimpleNamespace(value=value)]
            raw.setdefault(name, {})[replica] = points
    return types.SimpleNamespace(
        raw_metrics=raw, running_replicas=[r for r in recorded if r != "gone"],
        total_num_requests=requests, target_num_replicas=target, policy_state=state or {"a": 1},
        current_time=now,
        capacity_adjusted_min_replicas=low, capacity_adjusted_max_replicas=high,
    )  # fmt: skip


def _said(streams=0.0, waiting=0.0, slots=1.0, asked=-1.0):
    return {scaling.STREAMS: streams, scaling.WAITING: waiting, scaling.SLOTS: slots,
            scaling.ASKED: asked}  # fmt: skip


@pytest.mark.parametrize("recorded,target,expected", [
    ({"a": _said(1), "b": _said(0)}, 2, 1),
    ({"a": _said(1, 2), "b": _said(1, 2)}, 2, 4),  # each says how many wait: they are no four
    ({"a": _said(1, 2), "b": _said(1, 1)}, 2, 4),
    ({"a": _said(1, slots=0.5), "b": _said(1, slots=0.5)}, 2, 4),
    ({"a": _said(1, asked=3.0)}, 1, 3),
    ({"a": _said(1, asked=0.0)}, 1, 0),
    ({"a": _said(), "gone": _said(5, 7)}, 1, 0),
    ({}, 3, 3),  # nobody has said anything yet
    ({}, 0, 0),
])  # fmt: skip
def test_the_policy_reads_the_latest_that_replicas_recorded(recorded, target, expected):
    number, state = scaling.Policy()(_context(recorded, target))
    assert number == expected and state == {"a": 1}


def test_from_nothing_there_are_as_many_as_call_at_once():
    assert scaling.Policy()(_context({}, 1, high=4, requests=3.0))[0] == 3
    assert scaling.Policy()(_context({}, 1, high=4, requests=30.0))[0] == 4
    assert scaling.Policy()(_context({}, 3, high=4, requests=1.0))[0] == 3


def test_down_is_late_unless_an_operator_asks():
    policy = scaling.Policy(idle_s=60, to_zero_s=300)
    two, one = {"a": _said(1), "b": _said(0)}, {"a": _said(0)}
    number, state = policy(_context(two, 2, now=100.0))
    assert number == 2
    assert policy(_context(two, 2, now=159.0, state=state))[0] == 2
    assert policy(_context(two, 2, now=160.0, state=state)) == (1, {"a": 1})
    # who came meanwhile begins the time anew
    number, state = policy(_context({"a": _said(1), "b": _said(1)}, 2, now=150.0, state=state))
    assert (number, state) == (2, {"a": 1})
    assert policy(_context(two, 2, now=160.0, state=state))[0] == 2
    _, state = policy(_context(one, 1, now=0.0))
    assert policy(_context(one, 1, now=299.0, state=state))[0] == 1
    assert policy(_context(one, 1, now=300.0, state=state))[0] == 0
    asked = {name: {**said, scaling.ASKED: 1.0} for name, said in two.items()}
    assert policy(_context(asked, 2, now=0.0))[0] == 1


def test_the_policy_keeps_to_serves_bounds():
    context = _context({"a": _said(1, 50)}, 1, 0, 4)
    assert scaling.Policy(spare=2)(context)[0] == 4
    assert scaling.Policy()(_context({"a": _said(0, asked=0.0)}, 1, 2, 4))[0] == 2


def test_a_gpu_is_never_promised_more_than_there_is():
    draw = random.Random(1)
    for _ in range(2000):
        tick, fps = 10 ** draw.uniform(-4, 1), draw.uniform(1, 60)
        total = 10 ** draw.uniform(9, 11.5)
        memory = total * 10 ** draw.uniform(-3, 0.3)
        each = capacity.fraction(memory, total, tick, fps)
        n = int(1 / each + 1e-6)
        assert 0 < each <= 1 and n * each <= 1 and 1 <= n <= capacity.MOST
        if n > 1:
            assert n * memory <= total and n * tick * fps <= 1
        assert 0 < capacity.slots(tick, fps, each) <= 1
        assert capacity.slots(tick, fps, each) == 1, "a fraction was chosen so that all keep up"


@pytest.mark.parametrize("tick,fps,each,expected", [
    (0.05, 15, 1, 1.0), (9.0, 15, 1, 1.0), (9.0, 15, 0, 1.0),  # the first one always has room
    (0.05, 15, 0.5, 0.5), (0.025, 15, 0.5, 1.0), (0.05, 15, 0.25, 0.25), (0.02, 15, 0.25, 0.75),
])  # fmt: skip
def test_slots_are_what_time_leaves_of_a_shared_gpu(tick, fps, each, expected):
    assert capacity.slots(tick, fps, each) == expected


def test_memory_that_is_not_known_is_one_replica():
    assert capacity.replicas_by_memory(0, 8e9) == capacity.replicas_by_memory(1e9, 0) == 1
