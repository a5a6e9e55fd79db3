"""A visitor's place in the queue, through absences of all lengths: ingresses and the lobby."""

import json
import random
import types

import pytest
from serving import served

visits, tickets = served("ingress.visits"), served("tickets")
lobby, logs, admission = served("lobby"), served("logs"), served("admission")
STEP = 0.25  # seconds between two calls of an ingress


class Page:
    """A visitor's page: what it keeps is its last ticket, and whether it wants something."""

    def __init__(self, world, name):
        self.world, self.name = world, name
        self.ticket, self.at, self.visit, self.front = None, None, None, None
        self.place, self.overs = None, []
        self.came = world.now

    def come(self):
        """Its socket is there, at any of the ingresses."""
        self.front = self.world.draw.choice(self.world.fronts)
        self.visit = visit = visits.Visit(
            lambda message: self.visit is visit and self.hear(message), lambda code, why: None,
            "http://house",
        )  # fmt: skip
        self.front.opened(self.visit)
        self.say({"type": "hello", "ticket": self.ticket})
        self.say({"type": "want"})

    def say(self, message):
        self.front.heard(self.visit, json.dumps(message).encode())

    def hear(self, message):
        self.ticket = message.get("ticket", self.ticket) if message["type"] != "go" else self.ticket
        if message["type"] == "place":
            self.place = message["place"]
        elif message["type"] == "go":
            self.at, self.place = message["replica"], None
            self.world.streams[self.at] = {self.visit.id: {"turn": self.visit.since}}
            self.world.went.append(self)
        elif message["type"] == "over":
            self.overs.append(message["reason"])

    def go_away(self, half_open=0.0):
        """Without a word; the house may take a while to find out."""
        front, visit = self.front, self.visit
        self.visit = self.place = None
        self.world.later(half_open, lambda: front.closed(visit))

    def leave(self):
        self.say({"type": "leave"})
        for streams in self.world.streams.values():
            streams.pop(self.visit.id, None)
        self.at = self.place = None


class World:
    """Ingresses, a lobby and replicas, in virtual time."""

    def __init__(self, seed=0, replicas=1, most=1000, fronts=2):
        self.now, self.draw = 10_000.0, random.Random(seed)
        keys = tickets.Tickets(b"k" * 32, self.time)
        self.fronts = [visits.Visits(keys, "", 15.0, None, False, 100, clock=self.time)
                       for _ in range(fronts)]  # fmt: skip
        told = types.SimpleNamespace(fps=10.0, limit_s=None, most_waiting=most, replicas="1")
        self.lobby = lobby.Lobby(told, logs.Log(lambda line: None), clock=self.time)
        self.streams = {f"r{i}": {} for i in range(replicas)}
        self.went, self.todo = [], []
        self.pass_(3)

    def time(self):
        return self.now

    def later(self, seconds, what):
        self.todo.append((self.now + seconds, what))

    def pass_(self, seconds):
        end = self.now + seconds - 1e-6
        while self.now < end:
            due, self.todo = ([t for t in self.todo if t[0] <= self.now],
                              [t for t in self.todo if t[0] > self.now])  # fmt: skip
            for _, what in sorted(due, key=lambda one: one[0]):
                what()
            for name, streams in self.streams.items():
                self.lobby.report({
                    "replica": name, "address": f"{name}:1", "device": name, "tick_s": 0.01,
                    "ready": True, "draining": False, "streams": dict(streams),
                })  # fmt: skip
            for front in self.fronts:
                here, leaves = front.entries()
                front.apply(self.lobby.sync(here, leaves, ""), {e[0]: e[1] for e in here})
                front.tick()
            self.now += STEP

    def pages(self, names):
        made = []
        for name in names:
            made.append(Page(self, name))
            made[-1].come()
            self.pass_(0.5)
        return made


AWAY = [0.25, 2, 5, 9.75, 10.25, 11, 15, 16, 29, 31, 45, 46, 60, 90, 91, 110, 119, 120]


@pytest.mark.parametrize("half_open", [0, 20, 40])  # until the house's own pings tell it
@pytest.mark.parametrize("away", AWAY)
def test_who_is_away_for_two_minutes_or_less_has_the_same_place(away, half_open):
    for waits in (0, 15, 29.5):  # how old the page's ticket is
        world = World()
        runs, a, b, c = world.pages("xabc")
        assert (runs.at, a.place, b.place, c.place) == ("r0", 1, 2, 3)
        world.pass_(waits)
        a.go_away(min(half_open, away))
        world.pass_(away)
        a.come()
        world.pass_(1)
        assert (a.place, b.place, c.place, a.overs) == (1, 2, 3, []), (away, waits)


@pytest.mark.parametrize("half_open", [0, 20, 40])
@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("full", [False, True])
def test_whose_turn_comes_while_they_are_away_is_next(away, half_open, full):
    """Others go meanwhile; nobody comes to have gone, or to be a newcomer to a full queue."""
    world = World(most=3 if full else 1000)
    runs, a, b, c = world.pages("xabc")
    a.go_away(min(half_open, away))
    world.later(1, runs.leave)
    for number in range(3):  # take the room that is left
        world.later(12 + number, Page(world, number).come)
    world.pass_(away)
    went = [page.name for page in world.went]
    a.come()
    world.pass_(1)
    assert a.overs == [] and (a.at == "r0" or a.place == 1)
    assert went == ["x"] or went == ["x", "b"]
    if a.at is None:
        assert c.place == 2
        world.later(20, b.leave)  # or one whose page did not come holds it for a moment
        world.pass_(40)
        assert a.at == "r0" and c.place == 1


def test_who_is_away_for_longer_comes_last():
    world = World()
    _, a, b, c = world.pages("xabc")
    a.go_away()
    world.pass_(visits.VISIT_S + 1)
    a.come()
    world.pass_(1)
    assert (b.place, c.place, a.place) == (1, 2, 3)


@pytest.mark.parametrize("seed", range(8))
def test_whoever_is_there_goes_before_all_who_came_later(seed):
    world = World(seed, replicas=2)
    draw, pages, away = world.draw, [], {}
    for step in range(200):
        if draw.random() < 0.08 and len(pages) < 12:
            pages += world.pages([f"p{step}"])
        there = [p for p in pages if p not in away]
        waiting = [p for p in there if p.at is None]
        if waiting and draw.random() < 0.1:
            page = draw.choice(waiting)
            length = draw.choice([0.5, 5, 11, 20, 60, 119])
            away[page] = world.now + length
            page.go_away(draw.choice([0, min(length, 30)]))
        for page in [p for p, until in away.items() if until <= world.now]:
            del away[page]
            page.come()
            world.pass_(0.5)
        if draw.random() < 0.05 and (running := [p for p in there if p.at]):
            gone = draw.choice(running)
            gone.leave()
            pages.remove(gone)
        before, since = len(world.went), [p for p in pages if p not in away and p.at is None]
        world.pass_(0.5)
        for page in world.went[before:]:
            assert not [p for p in since if p.came < page.came and p.at is None], (step, page.name)
        queue = [p.came for p in sorted(since, key=lambda p: p.place or 0) if p.at is None]
        assert queue == sorted(queue), step
        assert not [p.name for p in pages if p.overs]
