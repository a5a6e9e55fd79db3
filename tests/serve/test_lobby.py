"""The lobby: what it tells ingresses and replicas, through losses of itself and of answers."""

import json
import pathlib
import random
import re
import time
import types

import pytest
from clock import Limit
from serving import ROOT, served

lobby, logs, operators = served("lobby"), served("logs"), served("ingress.operators")


class House:
    """A lobby that can be lost, replicas that report, and visitors, in virtual time."""

    def __init__(self, limit_s=None, most_waiting=1000):
        self.settings = types.SimpleNamespace(
            fps=10.0, limit_s=limit_s, most_waiting=most_waiting, replicas="0:9"
        )  # fmt: skip
        self.now, self.lines, self.woken = 1000.0, [], []
        self.replicas, self.orders, self.turns = {}, {}, {}
        self.again()

    def again(self):
        log = logs.Log(lambda line: self.lines.append(json.loads(line)), clock=lambda: self.now)
        self.lobby = lobby.Lobby(
            self.settings, log, wake=self.woken.append, clock=lambda: self.now
        )

    def replica(self, name, *visitors, **more):
        """It has the streams of these, each of the turn that was asked for last."""
        streams = {v: {"fps": 9.0, "turn": self.turns.get(v)} for v in visitors}
        self.replicas[name] = {
            "replica": name, "address": f"{name}:1", "direct": None, "device": name, "tick_s": 0.01,
            "ready": True, "draining": False, "streams": streams, **more,
        }  # fmt: skip

    def pass_(self, seconds=0.5):
        self.now += seconds
        for name, said in self.replicas.items():
            self.orders[name] = self.lobby.report(json.loads(json.dumps(said)))

    def settle(self):
        for _ in range(6):
            self.pass_()

    def ask(self, *visitors, leaves=(), **more):
        entries = [(v, since, False, more.get("had"), more.get("until"), more.get("missed"))
                   for v, since in visitors]  # fmt: skip
        left = [(v, self.turns.get(v)) for v in leaves]
        self.turns.update(visitors)
        return self.lobby.sync(entries, left, "")["visitors"]

    def events(self, kind):
        return [line for line in self.lines if line["event"] == kind]


def test_who_came_first_goes_first_and_the_others_are_told_their_place():
    house = House()
    house.replica("r1")
    house.settle()
    visitors = [("b", 2.0), ("a", 1.0), ("c", 3.0)]
    for _ in range(3):  # an answer that was lost is the same again
        said = house.ask(*visitors)
        assert said["a"][:2] == ("go", "r1")
        assert [said["b"][:3], said["c"][:3]] == [("wait", 1, 2), ("wait", 2, 2)]
    house.replica("r1", "a")
    house.pass_()
    house.replica("r1")
    house.pass_()
    assert house.ask(*visitors)["a"] == ("over", "gone")
    assert house.ask(*visitors)["b"][:2] == ("go", "r1")


def test_one_that_is_over_can_want_again_and_is_behind_then():
    house = House()
    house.replica("r1")
    house.settle()
    house.ask(("a", 1.0), ("b", 2.0))
    house.ask(("b", 2.0), leaves=["a"])
    assert house.ask(("a", 1.0), ("b", 2.0))["a"] == ("over", "left")
    said = house.ask(("a", house.now), ("b", 2.0))
    assert said["b"][0] == "go" and said["a"][:3] == ("wait", 1, 1)


@pytest.mark.parametrize("reason,act", [
    ("time", lambda house: setattr(house, "now", house.now + 60)),
    ("operator", lambda house: house.lobby.order({"end": "a"})),
    ("left", lambda house: house.ask(("b", 2.0), leaves=["a"])),
])  # fmt: skip
def test_a_replica_is_told_to_end_what_is_over_and_is_not_free_before_it_has(reason, act):
    house = House(limit_s=50)
    house.replica("r1")
    house.settle()
    assert house.ask(("a", 1.0), ("b", 2.0))["a"][0] == "go"
    house.replica("r1", "a")
    house.pass_()
    act(house)
    for _ in range(4):
        house.pass_()
        said = house.ask(("a", 1.0), ("b", 2.0))
        assert house.orders["r1"]["end"] == {"a": (1.0, reason)}
        assert said["a"] == ("over", reason)
        assert said["b"][0] == "wait", "its place is not free yet"
    house.replica("r1")
    house.pass_()
    assert house.ask(("a", 1.0), ("b", 2.0))["b"][:2] == ("go", "r1")
    (end,) = [line for line in house.events("end") if line["visitor"] == "a"]
    assert end["reason"] == reason and end["fps"] == 9.0 and "turn" not in end


@pytest.mark.parametrize("reason", ["time", "operator", "left"])
@pytest.mark.parametrize("late", range(4))
@pytest.mark.parametrize("gone", [True, False])
def test_who_starts_again_has_a_turn_that_no_word_about_the_last_one_ends(reason, late, gone):
    """Whatever is still on its way: the page's leave, reports from before, the stream itself."""
    house = House(limit_s=50)
    house.replica("r1")
    house.settle()
    house.ask(("a", 1.0))
    house.replica("r1", "a")
    house.pass_()
    before = house.replicas["r1"]
    if reason == "time":
        house.now += 60
    elif reason == "operator":
        house.lobby.order({"end": "a"})
    if gone:
        house.replica("r1")
    for _ in range(late):
        house.pass_(0.1)
    again = house.now
    # one sync has both, the leave is said three times, and a report from before comes late
    for old in (False, True, False):
        said = house.lobby.sync([("a", again, False, None, None, None)], [("a", 1.0)], "")
        assert said["visitors"]["a"][0] in ("go", "wait")
        house.pass_(0.1)
        if old:
            end = house.lobby.report(json.loads(json.dumps(before)))["end"]
            assert list(end) == ["a"] and end["a"][0] == 1.0
    house.replica("r1")
    house.pass_()
    house.pass_()
    said = house.ask(("a", again))
    assert said["a"][:2] == ("go", "r1") and said["a"][2] > house.now + 40
    house.replica("r1", "a")
    for _ in range(4):
        house.pass_()
        assert house.orders["r1"]["end"] == {}
        assert house.ask(("a", again))["a"][:2] == ("go", "r1")
    assert house.lobby.state()["streams"] == 1


def test_a_stream_of_a_turn_that_is_over_is_ended_however_late_it_is_heard_of():
    """As of a page that had its ticket already, or of a turn that a new lobby knows nothing of."""
    house = House()
    house.replica("r1")
    house.settle()
    house.ask(("a", 1.0))
    house.lobby.order({"end": "a"})
    for _ in range(20):
        house.pass_()
    house.replica("r1", "a")
    house.pass_()
    assert house.orders["r1"]["end"] == {"a": (1.0, "operator")}
    assert house.lobby.state()["streams"] == 0
    house.again()
    house.turns["a"] = 1.0
    house.replica("r1", "a")
    house.settle()
    said = house.ask(("a", 9.0))
    house.turns["a"] = 1.0
    house.replica("r1", "a")
    house.pass_()
    assert said["a"][0] == "wait" and house.orders["r1"]["end"] == {"a": (1.0, "left")}


def test_a_stream_that_is_over_is_nobody_who_waits_or_whose_time_counts():
    """Also where its replica goes before it does."""
    house = House(limit_s=50)
    house.replica("r1")
    house.settle()
    house.ask(("a", 1.0), ("b", 2.0))
    house.replica("r1", "a")
    for _ in range(80):
        house.pass_()
        house.ask(("a", 1.0), ("b", 2.0))
    house.lobby.order({"end": "a"})
    house.pass_(0.1)
    house.replica("r1", "a", draining=True, ready=False)
    house.replica("r2")
    house.pass_(0.1)
    assert house.ask(("b", 2.0), ("c", 3.0))["c"][3] == pytest.approx(40, abs=1)
    assert house.ask(("b", 2.0))["b"][:2] == ("go", "r2")
    assert [line["visitor"] for line in house.events("start")] == ["a", "b"]


def test_a_draining_replica_s_visitor_moves_before_those_who_wait():
    house = House()
    house.replica("r1")
    house.settle()
    house.ask(("a", 5.0))
    house.replica("r1", "a")
    house.pass_()
    house.ask(("a", 5.0), ("b", 1.0))
    house.replica("r1", "a", draining=True, ready=False)
    house.pass_()
    said = house.ask(("a", 5.0), ("b", 1.0))
    assert said["a"] == ("wait", 1, 2, None, True, "draining")
    house.replica("r2")
    house.pass_()
    said = house.ask(("a", 5.0), ("b", 1.0))
    assert said["a"] == ("go", "r2", None, True) and said["b"][0] == "wait"
    assert [line["event"] for line in house.lines] == ["start", "moving", "move"]


@pytest.mark.parametrize("seed", range(20))
def test_a_lost_lobby_takes_nobody_s_stream_nor_place(seed):
    draw = random.Random(seed)
    house = House(limit_s=100)
    names = [f"r{i}" for i in range(draw.randint(1, 4))]
    for name in names:
        house.replica(name)
    house.settle()
    visitors = [(f"v{i}", 10.0 + i) for i in range(draw.randint(1, 9))]
    draw.shuffle(visitors)
    said = house.ask(*visitors)
    running = {v: s for v, s in said.items() if s[0] == "go"}
    for visitor, (_, name, _, _) in running.items():
        house.replica(name, visitor)
    house.pass_()
    before = house.ask(*visitors)
    house.again()
    for _ in range(12):
        house.pass_(0.25)
        entries = [(v, since, False, *(running[v][1:3] if v in running else (None, None)), None)
                   for v, since in visitors]  # fmt: skip
        draw.shuffle(entries)
        after = house.lobby.sync(entries, (), "")["visitors"]
    for visitor, state in before.items():
        assert after[visitor][:3] == state[:3], visitor
    assert not house.events("end")


def test_who_is_away_for_long_is_forgotten():
    house = House()
    for i in range(50):
        house.ask((f"v{i}", float(i)))
    house.now += 100
    house.pass_(0)
    house.ask()
    own = house.lobby
    kept = (own._turns, own._gone, own._moving, own._last, own._over)
    assert not any(kept), kept


def test_visitors_without_a_replica_have_one_woken_now_and_then():
    house = House()
    for _ in range(40):
        house.now += 0.25
        house.ask(("a", 1.0), ("b", 2.0))
    assert house.woken in ([2, 2], [2, 2, 2])
    house.replica("r1", ready=False)
    house.pass_()
    before = len(house.woken)
    for _ in range(40):
        house.pass_(0.25)
        house.ask(("a", 1.0))
    assert len(house.woken) == before


def test_a_full_queue_says_so():
    house = House(most_waiting=2)
    said = house.ask(("a", 1.0), ("b", 2.0), ("c", 3.0))
    assert [said[v][0] for v in "abc"] == ["wait", "wait", "full"]


@pytest.mark.parametrize("order", [
    {}, {"end": "nobody"}, {"drain": "none"}, {"replicas": -1}, {"replicas": 10**6},
    {"replicas": "3"}, {"end": None}, {"drain": ["r1"]}, {"other": 1},
])  # fmt: skip
def test_orders_that_cannot_be_are_refused_in_a_sentence(order):
    house = House()
    house.replica("r1")
    house.pass_()
    with pytest.raises(ValueError, match=r"^[A-Z].*\.$"):
        house.lobby.order(order)


def test_orders_reach_the_replicas():
    house = House()
    house.replica("r1")
    house.pass_()
    assert house.lobby.order({"replicas": 3}) == "Replicas: 3."
    house.lobby.order({"drain": "r1"})
    house.pass_()
    assert house.orders["r1"]["asked"] == 3 and house.orders["r1"]["drain"]
    house.lobby.order({"replicas": None})
    house.lobby.close()
    house.pass_()
    assert house.orders["r1"]["asked"] is None and house.orders["r1"]["closing"]
    assert house.ask(("a", 1.0))["a"] == ("over", "closed")


def test_the_operator_sees_all_that_went_wrong():
    """Whatever a gate logs with a reason, and why a replica has no ComfyUI."""
    source = (ROOT / "serve" / "gate" / "stream.py").read_text("utf-8")
    kinds = re.findall(r'_log\(\s*"([a-z ]+)"[^)]*\bwhy=', source)
    assert {"start refused", "not started", "given up", "not understood"} <= set(kinds)
    kinds += ["problem", "failed"]  # messages.for_log
    house = House()
    events = [{"event": kind, "visitor": "a", "why": f"<why {kind}>"} for kind in kinds]
    events += [{"event": kind, "visitor": "a"} for kind in ("started", "live", "ended")]
    house.replica("r1", events=events, failed="ComfyUI died <3> times.")
    house.pass_()
    state = house.lobby.state()
    assert [one["event"] for one in state["problems"]] == kinds
    page = operators.operators_page(state)
    for kind in kinds:
        assert f"&lt;why {kind}&gt;" in page
    assert "ComfyUI died &lt;3&gt; times." in page and "<3>" not in page


def test_the_log_has_neither_tickets_nor_what_visitors_write():
    lines = []
    secret = {"ticket": "t", "token": "t", "origin": "o", "values": {"3.text": "p"}, "prompt": "p"}
    logs.Log(lines.append).event("start", visitor="a", until=None, **secret)
    logs.Log(lines.append, prompts=True).event("start", visitor="a", **secret)
    first, second = map(json.loads, lines)
    assert set(first) == {"at", "event", "visitor"}
    assert set(second) == {"at", "event", "visitor", "values", "prompt"}


class Unwritable:
    """A log's way out that fails as long as it is to."""

    def __init__(self):
        self.fails, self.lines = True, []

    def __call__(self, line):
        if self.fails:
            raise OSError(28, "No space left on device")
        self.lines.append(line)


def test_a_log_that_cannot_be_written_changes_nothing_of_what_the_lobby_does():
    """The same house twice, one with a full disk: a lobby's whole life."""
    full, well = House(limit_s=20), House(limit_s=20)
    full.lobby._log = logs.Log(Unwritable(), clock=lambda: full.now)
    told = []
    for house in (full, well):
        said = []
        event = {"event": "problem", "visitor": "a", "why": object.__doc__, "odd": {1, 2}}
        for step in range(60):
            streams = ["a"] if 8 < step < 30 else ["b"] if step > 40 else []
            house.replica("r1", *streams)
            house.replicas["r1"]["events"] = [event] if step % 7 == 0 else []
            house.now += 0.5
            said.append(house.lobby.report(dict(house.replicas["r1"])))
            said.append(house.ask(("a", 1.0), ("b", 2.0), ("c", 3.0)))
            if step == 50:
                house.lobby.order({"end": "b"})
                house.lobby.order({"replicas": 3})
        house.lobby.lost("r1")
        house.lobby.close()
        said.append(house.ask(("c", 3.0)))
        told.append(said)
    assert told[0] == told[1] and len(well.lines) > 5 and full.lines == []
    (problem,) = [p for p in full.lobby.state()["problems"] if "lines of the log" in p["why"]]
    assert "No space left on device" in problem["why"] and well.lobby._log.problem is None
    # nor does what no JSON can be made of
    odd = {(): 1}
    odd[()] = odd
    well.lobby._log.event("start", visitor=odd)


def test_a_log_s_file_that_is_away_for_a_while_has_all_lines_once_and_whole(tmp_path):
    folder = tmp_path / "away"
    path = folder / "house.log"
    write = logs.to_file(str(path), again_s=0.01)
    log = logs.Log(write)
    began = time.monotonic()
    for number in range(2000):
        log.event("start", number=number)
        if number == 1000:
            limit = Limit(5)
            while write.problem is None:
                assert not limit.over
                time.sleep(0.01)
            assert "tried again" in log.problem and str(path) in log.problem
            folder.mkdir()
    assert time.monotonic() - began < 5, "nobody waits for a disk"
    limit = Limit(5)
    while not path.exists() or path.read_text("utf-8").count("\n") < 2000:
        assert not limit.over, write.problem
        time.sleep(0.01)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["number"] for line in lines] == list(range(2000))
    limit = Limit(5)
    while log.problem:
        assert not limit.over
        time.sleep(0.01)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_disk_that_stays_full_costs_lines_and_neither_time_nor_room(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(logs, "_HELD", 100)
    path = tmp_path / "house.log"
    path.symlink_to("/dev/full")
    log = logs.Log(logs.to_file(str(path), again_s=0.01))
    for number in range(500):
        log.event("start", number=number)
    limit = Limit(5)
    while "tried again" not in log.problem:
        assert not limit.over
        time.sleep(0.01)
    assert "of its lines are lost" in log.problem and "No space left" in log.problem
    time.sleep(0.05)
    assert capfd.readouterr().err.count("The log cannot be written") == 1
    path.unlink()
    while "tried again" in log.problem:
        assert not limit.over
        time.sleep(0.01)
    lost = int(re.match(r"(\d+) of its lines are lost\.$", log.problem)[1])  # and stays said
    while path.read_text("utf-8").count("\n") + lost < 500:
        assert not limit.over
        time.sleep(0.01)
    assert path.read_text("utf-8").count("\n") + lost == 500


@pytest.mark.parametrize("replicas", ["2", "2:2", "1:1", "0:3", "1:4"])
def test_an_order_is_taken_where_serve_would_follow_it_and_nowhere_else(replicas):
    """Serve's policy keeps to the fewest and the most, without a word."""
    scaling = served("scaling")
    house = House()
    house.settings.replicas = replicas
    house.again()
    house.replica("r1")
    low, high = served("options").bounds(replicas, 1)
    for asked in range(6):
        context = types.SimpleNamespace(
            raw_metrics={scaling.ASKED: {"r1": [types.SimpleNamespace(value=float(asked))]}},
            running_replicas=["r1"], target_num_replicas=1, policy_state={}, current_time=0.0,
            capacity_adjusted_min_replicas=low, capacity_adjusted_max_replicas=high,
        )  # fmt: skip
        follows = low < high and scaling.Policy()(context)[0] == asked
        before = house.lobby.state()["asked"]
        if follows:
            assert house.lobby.order({"replicas": asked}) == f"Replicas: {asked}."
        else:
            with pytest.raises(ValueError, match=rf"{low}.*MIN:MAX\.$"):
                house.lobby.order({"replicas": asked})
        assert house.lobby.state()["asked"] == (asked if follows else before)
