"""The simulation agrees with queueing theory where there is one, and with itself."""

import collections
import heapq
import json
import math
import os
import pathlib
import random
import re
import types

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import served

ROOT = pathlib.Path(__file__).resolve().parents[2]
plan, s, arrivals = served("plan"), served("simulation"), served("arrivals")
lobby, logs = served("lobby"), served("logs")
Plan, World, Visit = s.Plan, s.World, arrivals.Visit

TRIES = int(os.environ.get("LIVEDIFFUSION_FUZZ", "40"))
VISITS = int(os.environ.get("LIVEDIFFUSION_VISITS", "4000"))
AT_ONCE = World(tick_s=0.02, connect_s=0.0, interval_s=0.0)
PATIENT = {"limit_s": None, "most_waiting": 10**9}


def first_come(visits, slots):
    """The waits of a queue in order of arrival: whoever is first takes the slot that is free."""
    free, waits = [0.0] * slots, []
    for at, seconds, _ in visits:
        begins = max(heapq.heappop(free), at)
        waits.append(begins - at)
        heapq.heappush(free, begins + seconds)
    return waits


def exponential(mean, draw):
    while True:
        yield draw.expovariate(1 / mean)


@settings(max_examples=TRIES, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 500), st.floats(0.01, 200)), min_size=1, max_size=40),
    st.integers(1, 6),
)
@example([(0.0, 1.0)] * 10 + [(0.0, 2.0)], 1)
def test_waits_are_those_of_a_queue_to_the_last_digit(made, slots):
    visits = sorted(Visit(at, seconds) for at, seconds in made)
    result = s.simulate(visits, Plan(low=slots, high=slots, **PATIENT), AT_ONCE, 9000)
    expected = first_come(visits, slots)
    assert sorted(result.waits) == pytest.approx(sorted(expected), abs=1e-6)
    # what was waited is what the queue held, whatever the lengths are (Little)
    assert result.queued == pytest.approx(sum(expected), abs=1e-4)
    assert result.busy == pytest.approx(sum(seconds for _, seconds in made), abs=1e-4)


@pytest.mark.parametrize(("slots", "used"), [(1, 0.5), (2, 0.7), (8, 0.8)])
def test_means_are_those_of_erlang(slots, used):
    mean, waits, waited, busy, seeds = 60.0, 0.0, 0, 0.0, 4
    load = used * slots
    for seed in range(seeds):
        draw = random.Random(seed)
        seconds = VISITS / seeds * mean / load
        visits = arrivals.poisson(load / mean, seconds, exponential(mean, draw), draw)
        result = s.simulate(visits, Plan(low=slots, high=slots, **PATIENT), AT_ONCE, seconds,
                            warm_up=seconds / 10)  # fmt: skip
        waits += result.mean_wait / seeds
        waited += sum(one > 0 for one in result.waits) / len(result.waits) / seeds
        busy += result.utilisation / seeds
    assert busy == pytest.approx(used, rel=0.08)
    assert waited == pytest.approx(plan.erlang_c(slots, load), rel=0.15)
    assert waits == pytest.approx(plan.mean_wait(slots, load, mean), rel=0.35)


def test_erlang_is_right_where_it_is_known():
    assert plan.erlang_c(1, 0.5) == pytest.approx(0.5)  # M/M/1: as often as it is busy
    assert plan.erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert plan.mean_wait(1, 0.5, 10) == pytest.approx(10)
    # constant lengths wait half as long (Pollaczek and Khinchine, exact for one server)
    assert plan.mean_wait(1, 0.5, 10, 0.0) == pytest.approx(5)
    assert plan.erlang_c(3, 3.5) == 1.0 and plan.mean_wait(3, 3.5, 1) == math.inf
    for load in (0.5, 7.3, 99.0, 9_990.0):
        slots = plan.slots_for(load, 120, 10)
        assert plan.slow_wait(slots, load, 120, 0.95) <= 10
        assert slots == math.floor(load) + 1 or plan.slow_wait(slots - 1, load, 120, 0.95) > 10


def test_constant_lengths_wait_as_theory_says():
    draw = random.Random(1)
    seconds = VISITS * 30 / 0.6
    visits = arrivals.poisson(0.6 / 30, seconds, arrivals.lengths(30, 0, draw), draw)
    result = s.simulate(visits, Plan(low=1, high=1, **PATIENT), AT_ONCE, seconds)
    assert result.mean_wait == pytest.approx(plan.mean_wait(1, 0.6, 30, 0.0), rel=0.15)


CROWD = [Visit(3.0 * i, 40.0 + i % 7, 1e6) for i in range(200)]


def test_a_limit_ends_visits_and_a_full_queue_refuses():
    result = s.simulate(CROWD, Plan(low=2, high=2, limit_s=10, most_waiting=5), World(), 700)
    assert result.visits == 200
    assert result.refused + len(result.waits) + result.gave_up == pytest.approx(200, abs=7)
    assert result.refused > 50 and result.most_waiting == 5
    # a turn takes the limit and the look of the lobby, not the visitor's own 40 s
    assert len(result.waits) == pytest.approx(2 * 600 / 10.25, rel=0.1)
    hasty = [one._replace(patience=1.0) for one in CROWD]
    result = s.simulate(hasty, Plan(low=1, high=1, limit_s=None), World(), 700)
    assert result.gave_up > 100 and result.wait(1.0) <= 1.3


def test_replicas_that_share_a_gpu_have_the_streams_that_its_time_allows():
    crowd = [Visit(0.0, 1e6) for _ in range(20)]
    # 25 frames of 10 ms are a quarter of a second: three streams fit into 0.9 of it
    result = s.simulate(crowd, Plan(fps=25, low=2, high=2, per_gpu=4, limit_s=None),
                        World(tick_s=0.01), 60)  # fmt: skip
    assert result.most_streams == 6 and result.most_gpus == 2
    assert result.utilisation == pytest.approx(1.0, abs=0.05)


def test_autoscaling_follows_the_crowd_and_no_stream_is_lost():
    draw = random.Random(4)
    crowd = arrivals.rush(30, 300, 60, arrivals.lengths(120, 0.5, draw), draw)
    house = Plan(low=0, high=20, idle_s=60, to_zero_s=60, limit_s=None)
    result = s.simulate(crowd, house, World(start_s=20), 3000)
    assert len(result.waits) == 30 and result.refused == 0
    assert result.most_gpus == 20 and result.starts >= 20
    assert result.wait(0.5) >= 20  # nobody starts before the first replica is warm
    assert result.paid < 0.5 * 20 * 3000  # and afterwards they are gone
    assert result.busy == pytest.approx(sum(one.seconds for one in crowd), rel=0.02)
    assert result.moves and max(result.gaps) <= 120


def test_streams_go_on_elsewhere_when_replicas_fail():
    crowd = [Visit(float(i), 600.0) for i in range(8)]
    world = World(fails_s=900, start_s=30)
    result = s.simulate(crowd, Plan(low=10, high=10, limit_s=None), world, 5000, seed=2)
    assert result.losses > 5 and result.moves > 0
    assert len(result.waits) == 8 and max(result.waits) < 1
    assert max(result.gaps) <= 31
    # each stayed its 600 s, however often it moved
    assert result.busy == pytest.approx(8 * 600, rel=0.01)


def log_of(visits, slots):
    """The log that a real lobby writes of these visits, in virtual time."""
    now, lines = 990.0, []
    house = lobby.Lobby(
        types.SimpleNamespace(fps=10.0, limit_s=None, most_waiting=10**6, replicas=f"{slots}"),
        logs.Log(lines.append, clock=lambda: now), clock=lambda: now,
    )  # fmt: skip
    streams = {f"r{i}": {} for i in range(slots)}
    todo, here, until = collections.deque(enumerate(visits)), {}, {}
    while todo or here:
        now += 0.25
        while todo and 1000 + todo[0][1].at <= now:
            number, visit = todo.popleft()
            here[f"v{number}"] = now, visit
            until[f"v{number}"] = now + visit.patience
        left = [(v, since) for v, (since, _) in here.items() if until[v] <= now]
        for visitor, _ in left:
            del here[visitor]
            for one in streams.values():
                one.pop(visitor, None)
        asked = [(v, since, False, None, None, None) for v, (since, _) in here.items()]
        for visitor, answer in house.sync(asked, left)["visitors"].items():
            if answer[0] == "go" and visitor not in streams[answer[1]]:
                streams[answer[1]][visitor] = {"fps": 10.0, "turn": here[visitor][0]}
                until[visitor] = now + here[visitor][1].seconds
        for name, running in streams.items():
            house.report({
                "replica": name, "address": f"{name}:1", "direct": None, "device": name,
                "tick_s": 0.01, "ready": True, "draining": False, "streams": running,
            })  # fmt: skip
    return lines


def test_a_real_house_again(tmp_path, capsys):
    draw = random.Random(3)
    visits = arrivals.poisson(2 / 40, 4000, arrivals.lengths(30, 1.0, draw), draw, patience=60)
    lines = log_of(visits, 2)
    found, result = s.replay(lines, Plan(low=2, high=2, most_waiting=10**6), World())
    compared = plan.compared(found, result, 2)
    assert compared["visits"] == len(visits)
    gave_up = [one for one in found.visits if one.seconds == 0]
    assert len(gave_up) == len(visits) - len(found.waits) > 10
    for one in gave_up:
        at = one.at + found.began - 1000
        assert any(abs(at - v.at) < 0.5 and abs(one.patience - v.patience) < 0.5 for v in visits)
    assert compared["wait"] == pytest.approx(compared["real_wait"], rel=0.15)
    assert compared["p95"] == pytest.approx(compared["real_p95"], rel=0.15)
    assert compared["used"] == pytest.approx(compared["real_used"], rel=0.05)
    path = tmp_path / "house.log"
    path.write_text("\n".join(lines))
    assert plan.main(["--replay", str(path), "--gpus", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["real_wait"] == compared["real_wait"]
    for data in ("", "{}", "[]\n", "nonsense", '{"at": "x", "event": "start"}', "[" * 100_000):
        path.write_text(data)
        assert plan.main(["--replay", str(path)]) == 2
        assert "cannot be replayed" in capsys.readouterr().err


def test_the_command_line_prints_a_table(capsys):
    assert plan.main(["--streams", "3", "20", "--hours", "0.2", "--rush", "1", "--fails", "5"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    for bad in (["--streams", "0"], ["--fps", "nan"], ["--low", "-1"], ["--per-gpu", "99"]):
        with pytest.raises(SystemExit):
            plan.main(bad)


def test_ten_thousand_streams_are_planned_in_seconds():
    """By the number of decisions, not the clock: each looks at everybody."""
    asked = plan.parser().parse_args([])
    assert plan.world(asked, 10_000).interval_s * 240 >= plan.Crowd(asked, 10_000).seconds
    assert plan.slots_for(10_000, 138, 10) < 10_100


# the board and the words about the house


def test_each_option_that_the_words_name_is_there():
    words = (ROOT / "docs" / "serve.md").read_text("utf-8")
    ours = re.findall(r"(?<![\w-])--[a-z][a-z-]+", words.replace("--from-literal", " "))
    known = {option for parser in (plan.parser(), served("options").parser())
             for action in parser._actions for option in action.option_strings}  # fmt: skip
    others = {"--base-directory", "--user-directory", "--plan", "--frames"}  # ComfyUI's, run.py's
    assert len(set(ours)) > 15 and not set(ours) - known - others


def test_each_query_of_the_board_asks_for_a_metric_that_there_is():
    figures = {f"ray_{one.name}": one.kind for one in served("metrics").FIGURES}
    board = json.loads((ROOT / "serve" / "grafana.json").read_text("utf-8"))
    panels = [one for one in board["panels"] if one["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    found = collections.Counter(name for expr in asked
                                for name in re.findall(r"ray_livediffusion_\w+", expr))  # fmt: skip
    known = {name if kind == "gauge" else f"{name}{end}" for name, kind in figures.items()
             for end in {"gauge": ("",), "counter": ("_total",),
                         "histogram": ("_bucket", "_sum", "_count")}[kind]}  # fmt: skip
    assert found and not set(found) - known
    # and none is measured for nothing
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in found}
    assert shown >= set(figures) - {"ray_livediffusion_restarts"} and len(panels) >= 10
    assert len({panel["id"] for panel in panels}) == len(panels)
    spots = [(p["gridPos"]["x"], p["gridPos"]["y"], p["gridPos"]["w"], p["gridPos"]["h"])
             for p in board["panels"]]  # fmt: skip
    for i, (x, y, w, h) in enumerate(spots):
        assert x + w <= 24
        for x2, y2, w2, h2 in spots[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
