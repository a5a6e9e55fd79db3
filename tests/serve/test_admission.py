"""Admission: who waits, who runs and where, in virtual time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import served

a = served("admission")
SETTLED = 10.0


class House:
    """An admission, and replicas and pages that do what it says."""

    def __init__(self, replicas=2, **options):
        self.admission = a.Admission(10, **options)
        self.now = 0.0
        self.streams = {f"r{i}": set() for i in range(replicas)}
        self.draining, self.device, self.tick = set(), {}, 0.01
        self.since, self.went, self.moving, self.over = {}, {}, [], {}
        self.operators = set()
        self.step(SETTLED)

    def report(self):
        for name, streams in self.streams.items():
            self.admission.report(self.now, a.Report(
                name, "", device=self.device.get(name, name), tick_s=self.tick,
                streams=frozenset(streams), draining=name in self.draining,
            ))  # fmt: skip

    def step(self, seconds=0.5):
        """Everybody says how it is, and does what it is told; then time passes."""
        self.report()
        for visitor, since in self.since.items():
            self.admission.wants(self.now, visitor, since, visitor in self.operators)
        for event in self.admission.decide(self.now):
            if isinstance(event, a.Go):
                for streams in self.streams.values():
                    streams.discard(event.visitor)
                if event.replica in self.streams:
                    self.streams[event.replica].add(event.visitor)
                else:
                    self.admission.missed(self.now, event.visitor)
                self.went.setdefault(event.visitor, []).append(event)
            elif isinstance(event, a.Moving):
                self.moving.append(event)
            elif isinstance(event, a.Over):
                self.over[event.visitor] = event.reason
                self.since.pop(event.visitor, None)
                for streams in self.streams.values():
                    streams.discard(event.visitor)
        self.now += seconds

    def come(self, *visitors):
        for visitor in visitors:
            self.since[visitor] = self.now
            self.admission.wants(self.now, visitor, self.now)
            self.now += 0.001

    def leave(self, visitor):
        self.since.pop(visitor, None)
        for streams in self.streams.values():
            streams.discard(visitor)
        self.admission.leaves(self.now, visitor)

    def running(self):
        return {v for streams in self.streams.values() for v in streams}


def test_two_run_and_two_wait_in_order():
    house = House()
    house.come("a", "b", "c", "d")
    house.step()
    house.step()
    assert house.running() == {"a", "b"}
    places = house.admission.places(house.now)
    assert {v: (p.place, p.of, p.warming) for v, p in places.items()} == {
        "c": (1, 2, False), "d": (2, 2, False)
    }  # fmt: skip
    house.leave("a")
    house.step()
    house.step()
    assert house.running() == {"b", "c"}
    assert house.admission.places(house.now)["d"].place == 1
    assert house.admission.load() == (2, 1, 0, 2, 0)


def test_an_operator_comes_first_and_has_no_limit():
    house = House(1, limit_s=20)
    house.come("a", "b")
    house.step()
    house.operators.add("op")
    house.since["op"] = house.now
    house.step()
    assert list(house.admission.places(house.now)) == ["op", "b"]
    # a visitor who waits becomes one
    house.operators.add("b")
    house.step()
    assert list(house.admission.places(house.now)) == ["b", "op"]
    house.leave("a")
    house.step()
    assert house.went["b"][0].until is None


def test_a_turn_ends_in_time_and_the_next_begins():
    house = House(1, limit_s=20)
    house.come("a", "b")
    house.step()
    assert house.went["a"][0].until == pytest.approx(house.now + 20, abs=1)
    assert house.admission.places(house.now)["b"].wait_s == pytest.approx(20, abs=1)
    for _ in range(45):
        house.step()
    assert house.over == {"a": "time"} and house.running() == {"b"}


def test_what_waits_is_told_how_long_only_where_something_tells():
    house = House(1)
    house.come("a", "b", "c")
    house.step()
    assert house.admission.places(house.now)["b"].wait_s is None
    house.step(30)
    house.leave("a")
    house.step()
    wait = house.admission.places(house.now)["c"].wait_s
    assert wait == pytest.approx(30, abs=2)


def test_a_full_queue_takes_no_more():
    house = House(0, most_waiting=3)
    took = [house.admission.wants(house.now, v, house.now) for v in "abcde"]
    assert took == [True, True, True, False, False]
    assert house.admission.places(house.now)["a"].warming


@pytest.mark.parametrize("how", ["draining", "lost"])
def test_a_stream_moves_before_others_who_wait_and_keeps_its_end(how):
    house = House(2, limit_s=100)
    house.come("a", "b", "c")
    house.step()
    until = house.went["a"][0].until
    gone = house.admission.where("a")
    if how == "draining":
        house.draining.add(gone)
    else:
        del house.streams[gone]
        house.now += 4  # the other one says in time how it is
    house.step()
    house.step()
    assert house.moving == [a.Moving("a", how)]
    # the other one is taken: who moves is the first of those who wait
    assert house.admission.places(house.now)["a"].place == 1
    house.leave("b")
    house.step()
    house.step()
    assert house.went["a"][-1].moved and house.went["a"][-1].until == until
    assert house.admission.where("a") != gone and "c" not in house.running()


@pytest.mark.parametrize("after", [6, 8, 10])
def test_a_killed_replica_s_successor_is_for_its_stream_however_soon_it_comes(after):
    house = House(2)
    house.come("a", "b", "c")
    house.step()
    house.step(0.01)
    del house.streams[house.admission.where("a")]
    for i in range(16):
        if i == after:  # quarters of a second: the lobby has not lost the other one yet
            house.streams["new"] = set()
        house.step(0.25)
        assert "c" not in house.running()
    assert house.went["a"][-1].replica == "new" and house.went["a"][-1].moved


def test_the_lobby_is_lost_and_a_new_one_knows_all_and_the_order():
    house = House(2, limit_s=100)
    house.come("a", "b", "c", "d")
    for _ in range(3):
        house.step()
    untils = {v: house.went[v][0].until for v in "ab"}
    house.admission = a.Admission(10, limit_s=100)
    went = {v: len(e) for v, e in house.went.items()}
    # pages come back in any order, before and after the replicas
    for visitor in "dcba":
        had = next((r for r, s in house.streams.items() if visitor in s), None)
        house.admission.wants(house.now, visitor, house.since[visitor], had=had,
                              until=untils.get(visitor))  # fmt: skip
    for _ in range(3):
        assert house.admission.places(house.now).keys() >= {"c", "d"}
        house.step()
    assert house.running() == {"a", "b"}
    assert list(house.admission.places(house.now)) == ["c", "d"]
    assert {v: len(house.went.get(v, ())) for v in "cd"} == {"c": 0, "d": 0}
    for visitor in "ab":
        again = house.went[visitor][went[visitor] :]
        # told where it is, if at all
        assert all(e.replica == house.went[visitor][0].replica for e in again)
    for _ in range(210):
        house.step()
    assert house.over["a"] == house.over["b"] == "time"


def test_who_does_not_arrive_gets_another_place_and_after_three_none():
    house = House(3)
    seen = []
    for _ in range(3):
        house.admission.wants(house.now, "a", 0.0)
        house.report()
        seen += house.admission.decide(house.now)
        house.now += a.ARRIVES / 2
        house.admission.wants(house.now, "a", 0.0)
        house.report()
        seen += house.admission.decide(house.now)
        house.now += a.ARRIVES / 2 + 0.1
    house.admission.wants(house.now, "a", 0.0)
    house.report()
    seen += house.admission.decide(house.now)
    assert sum(isinstance(e, a.Go) for e in seen) == 3 and seen[-1] == a.Over("a", "nowhere")


def test_an_old_ticket_does_not_get_to_the_front_again():
    house = House(1)
    house.come("a", "b")
    house.step()
    house.step()
    house.leave("a")
    house.step(0.1)
    house.come("c")
    house.admission.wants(house.now, "a", 0.0)
    house.come("d")
    order = list(house.admission.places(house.now))
    assert order.index("a") < order.index("d") and ("c" not in order or order[0] == "c")


def test_replicas_that_share_a_gpu_take_what_its_time_allows():
    house = House(4)
    house.device = dict.fromkeys(house.streams, "gpu0")
    house.tick = 0.04  # at 10 a second, two of them are 0.8 of its time
    house.come(*"abcd")
    for _ in range(3):
        house.step()
    assert house.running() == {"a", "b"} and house.admission.load().slots == 0
    house.tick = 0.02
    for _ in range(3):
        house.step()
    assert house.running() == set("abcd")
    # one always runs, however slow
    slow = House(2)
    slow.device, slow.tick = dict.fromkeys(slow.streams, "gpu0"), 5.0
    slow.come("a", "b")
    slow.step()
    slow.step()
    assert len(slow.running()) == 1


def test_a_page_that_is_gone_does_not_wait_for_ever():
    house = House(1)
    house.come("a", "b", "c")
    house.step()
    house.since.pop("b")
    for _ in range(30):
        house.step()
    assert list(house.admission.places(house.now)) == ["c"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_one_stream_a_replica_one_place_a_visitor(data):
    house = House(data.draw(st.integers(1, 4)), limit_s=data.draw(st.sampled_from([None, 5.0])),
                  most_waiting=5)  # fmt: skip
    names = iter(range(10_000))
    doing = ["come", "leave", "drain", "kill", "add", "lobby", "step", "step", "close"]
    for _ in range(data.draw(st.integers(5, 40))):
        what = data.draw(st.sampled_from(doing))
        everybody = sorted({*house.since, *house.running()})
        if what == "come":
            house.come(f"v{next(names)}")
        elif what == "leave" and everybody:
            house.leave(data.draw(st.sampled_from(everybody)))
        elif what == "close" and house.running():
            gone = data.draw(st.sampled_from(sorted(house.running())))
            house.since.pop(gone, None)
            for streams in house.streams.values():
                streams.discard(gone)
        elif what == "drain" and house.streams:
            house.draining.add(data.draw(st.sampled_from(sorted(house.streams))))
        elif what == "kill" and house.streams:
            del house.streams[data.draw(st.sampled_from(sorted(house.streams)))]
        elif what == "add":
            house.streams[f"n{next(names)}"] = set()
        elif what == "lobby":
            house.admission = a.Admission(10, house.admission.limit_s, 5)
        house.step(data.draw(st.sampled_from([0.1, 0.5, 2.0])))
        for name, streams in house.streams.items():
            assert len(streams) <= 1, name
        waiting = list(house.admission.places(house.now))
        assert len(waiting) == len(set(waiting))
        assert not [v for v in waiting if house.admission.where(v)]
    # it comes to rest: nobody waits while a replica is free
    house.admission.limit_s = None
    for _ in range(60):
        house.step()
    load = house.admission.load()
    assert load.waiting == 0 or load.slots == 0
    assert load.streams <= load.replicas + load.draining
