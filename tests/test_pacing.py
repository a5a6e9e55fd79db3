"""Who sets the pace of a run with several sources: a virtual clock, no run."""

import heapq
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from livediffusion.live import pacing
from livediffusion.live.meters import Rate


@pytest.mark.parametrize("fps", [1, 7, 24, 30, 60, 90, 120, 144, 165, 240, 360, 500, 1000])
def test_a_camera_is_asked_for_as_many_pictures_as_the_graph_says(fps):
    told = pacing.milliseconds(pacing.capture_interval(0.0, fps))
    assert 1000 / told == pytest.approx(fps, rel=0.02)


class World:
    """Sources that send at their own rates, and a graph that takes `compute` seconds."""

    def __init__(self, rates, compute=0.0, begins=None, ends=None, jitter=()):
        self.rates = rates
        self.meters = [Rate(10) for _ in rates]
        self.fresh, self.known = [False] * len(rates), [False] * len(rates)
        self.ends = ends or [1e9] * len(rates)
        self.events = []
        for i, rate in enumerate(rates):
            at, n = (begins or [0.0] * len(rates))[i], 0
            while rate and at < min(12, self.ends[i]):
                late = jitter[n % len(jitter)] / rate if jitter else 0
                heapq.heappush(self.events, (at + late, i))
                at, n = at + 1 / rate, n + 1
        self.compute = compute
        self.leader, self.now, self.ticks = None, 0.0, []

    def arrive(self, until):
        while self.events and self.events[0][0] <= until:
            at, i = heapq.heappop(self.events)
            self.meters[i].add(at)
            self.fresh[i] = True

    def run(self, seconds=10.0):
        """Seconds at which the graph ran, each with the sources that were fresh."""
        while self.now < seconds:
            self.arrive(self.now)
            due = pacing.due(
                [
                    pacing.Source(fresh, known, self.now >= end, meter.value(self.now))
                    for fresh, known, end, meter in zip(
                        self.fresh, self.known, self.ends, self.meters, strict=True
                    )
                ],
                self.leader, self.now,
            )  # fmt: skip
            self.leader = due.leader
            if due.run:
                self.ticks.append((self.now, tuple(self.fresh)))
                self.known = [a or b for a, b in zip(self.known, self.fresh, strict=True)]
                self.fresh = [False] * len(self.fresh)
                self.now += self.compute
                continue
            if not due.awaited:
                break
            coming = [at for at, i in self.events if i in due.awaited]
            coming += [self.ends[i] for i in due.awaited if self.ends[i] > self.now]
            look = self.now + due.look if due.look is not None else 1e9
            self.now = min(min(coming, default=1e9), look)
            if self.now >= 1e9:
                break
        return self.ticks


def per_second(ticks, since=2.0):
    times = [at for at, _ in ticks if at >= since]
    return (len(times) - 1) / (times[-1] - times[0])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.5, 1, 5, 10, 24, 25, 30, 60]), min_size=1, max_size=4),
    st.sampled_from([(), (0, 0.1, 0.3), (0.2, 0, 0, 0.1)]),
)
def test_a_run_follows_its_fastest_source(rates, jitter):
    """Whatever the order of the nodes: no slower, and no faster."""
    fastest = max(rates)
    ticks = World(rates, jitter=jitter).run(8)
    assert per_second(ticks) == pytest.approx(fastest, rel=0.1, abs=0.15)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 10, 25, 30]), min_size=2, max_size=4), st.floats(0.0, 0.3))
def test_a_slow_graph_runs_whenever_it_can_on_the_latest_of_each(rates, compute):
    ticks = World(rates, compute).run(8)
    if compute > 1.3 / max(rates):
        assert per_second(ticks) >= 0.9 * min(max(rates), 1 / (compute + 1 / max(rates)))
    for i, rate in enumerate(rates):
        taken = [at for at, fresh in ticks if fresh[i] and at >= 2]
        # none is starved: each of its frames is taken before the next two have come
        assert max(b - a for a, b in itertools.pairwise(taken)) < 2 / rate + 3 * (
            compute + 1 / max(rates)
        )


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_source_holds_nobody_up(silent):
    rates = [25, 25]
    rates[silent] = 0
    ticks = World(rates).run(5)
    assert ticks[0][0] <= pacing.GRACE + 1 / 25
    assert per_second(ticks, 1) == pytest.approx(25, rel=0.05)


def test_sources_that_begin_a_moment_apart_are_first_seen_together():
    ticks = World([25, 10], begins=[0.0, 0.3]).run(5)
    assert ticks[0] == (0.3, (True, True))


def test_all_silent_runs_nothing():
    assert World([0, 0]).run(5) == []


def test_a_leader_that_stops_gives_way_at_once_and_has_it_back():
    world = World([30, 10], ends=[2.0, 1e9])
    ticks = world.run(6)
    after = [at for at, _ in ticks if at > 2]
    assert per_second(ticks, 2.5) == pytest.approx(10, rel=0.1)
    assert after[0] - 2 < 0.3
    world = World([10, 30], begins=[0.0, 4.0])
    assert per_second(world.run(10), 5) == pytest.approx(30, rel=0.1)


def test_a_run_is_over_when_all_its_sources_are():
    world = World([25, 10], ends=[1.0, 2.0])
    ticks = world.run(9)
    assert 1.8 < ticks[-1][0] <= 2.1 and world.now < 3
