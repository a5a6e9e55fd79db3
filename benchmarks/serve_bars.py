"""`python run.py bench --only serve`: what a house of `run.py serve` has to hold, on this machine.

CPU replicas, a plain graph (camera to view), bounded visitors of colours of their own
(tests/serve/visitors.py). Each part is told by itself; a bar that is missed is said.
"""

import asyncio
import json
import os
import pathlib
import random
import signal
import statistics
import sys
import tempfile
import time

import aiohttp
from measure import Bar, Report

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "serve"), str(ROOT / "tests"), str(ROOT)]

import house  # noqa: E402
import visitors  # noqa: E402

GAP, BACK, NEXT, MOVED, OVERHEAD, NEAR = 1.0, 15.0, 3.0, 5.0, 5.0, 0.15
KINDS = {
    "comfyui": "comfyui", "replica": ":Replica", "ingress": ":Ingress", "lobby": ":Lobby",
    "proxy": "haproxy -", "proxy actor": "ray::ProxyActor",
}  # fmt: skip
HUES = (0.0, 0.3, 0.55, 0.8)
INPUTS = ("1.mirror", "1.width", "1.height")


def serve(report: Report, quick: bool) -> None:
    """All of it, on one house."""
    only = os.environ.get("LIVEDIFFUSION_SERVE_BARS", ",".join(PARTS)).split(",")
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        more = os.environ.get("LIVEDIFFUSION_SERVE_OPTIONS", "").split()
        there = house.House(folder, "--replicas", "1:3", "--fps", "10", *more, inputs=INPUTS)
        try:
            there.wait(1)
            report.add("serve: the house", [{
                "seconds to the first replica": round(time.monotonic() - began, 1),
                "load of the machine": os.getloadavg()[0],
            }])  # fmt: skip
            for name in only:
                with report.part(f"serve, {name}"):
                    asyncio.run(PARTS[name](report, there, 3 if quick else 10))
        finally:
            began = time.monotonic()
            there.end()
            took = round(time.monotonic() - began, 1)
            report.add("serve: the end", [{"seconds": took, "left": str(there.left())}])
            left = float(len(there.left()))
            report.bars.append(Bar("serve: what is left", left, 0.0, counted=True))


async def sized(there, count: int) -> None:
    """A house of so many replicas, all of them ready."""
    await asyncio.to_thread(there.order, replicas=count)
    await visitors.until(
        lambda: standing(there) == count, 150, lambda: json.dumps(there.state())[-400:]
    )


def standing(there) -> int:
    """Replicas that are ready; -1 where the lobby does not answer."""
    try:
        said = there.state()["replica"]
    except (OSError, ValueError, KeyError):
        return -1
    whole = [one for one in said.values() if one["ready"] and not one["draining"]]
    return len(whole) if len(whole) == len(said) else -len(said) - 1


class Crowd:
    """Visitors who have come."""

    def __init__(self, there, count, relays=(), **more):
        self.all = [
            visitors.Visitor(there.url, HUES[i % 4], relay=i in relays, **more)
            for i in range(count)
        ]

    async def __aenter__(self):
        for one in self.all:
            await one.__aenter__()
        return self

    async def __aexit__(self, *error):
        for one in self.all:
            await one.leave()
        await asyncio.sleep(0.5)
        for one in self.all:
            await one.__aexit__(*error)

    def told(self):
        return [(v.phase, v.replica, v.place, v.errors[-3:], v.overs) for v in self.all]

    async def running(self, some=None, seconds=60):
        """Until each of them gets pictures, and has for a second."""
        some = self.all if some is None else some
        await visitors.until(
            lambda: all(v.phase == "running" and self.flows(v) for v in some), seconds, self.told
        )

    @staticmethod
    def flows(visitor):
        now = time.monotonic()
        return sum(now - 1 < t for t in visitor.pictures[-20:]) >= 4


async def kills(report: Report, there, times: int) -> None:
    """kill -9 of each kind under load: two streams, one of them relayed, and two who wait."""
    await sized(there, 2)
    rows = []
    async with Crowd(there, 4, relays=(1, 3)) as crowd:
        pair, line = crowd.all[:2], crowd.all[2:]
        for one in crowd.all:
            one.values["1.mirror"] = one is pair[1]
            await one.want()
            await asyncio.sleep(0.5)
        await crowd.running(pair)
        for kind, what in KINDS.items():
            if not await asyncio.to_thread(there.named, what):
                continue
            before = await asyncio.to_thread(held, there)
            every = [await one_kill(there, crowd, pair, line, kind, what, i) for i in range(times)]
            await asyncio.sleep(3)
            after = await asyncio.to_thread(held, there)
            grown = {name: after[name] - before[name] for name in before}
            rows.append({
                "killed": kind, "times": times,
                "others' longest gap, s": max(one["other"] for one in every),
                "hit: longest gap, s": max(one["hit"] for one in every),
                "hit: median gap, s": statistics.median(one["hit"] for one in every),
                "settings kept": f"{sum(one['kept'] for one in every)} of {times}",
                "order of the queue kept": f"{sum(one['order'] for one in every)} of {times}",
                "wrong pictures": sum(len(v.wrong) for v in crowd.all),
                "ended": sum(len(v.overs) for v in crowd.all),
                "grown": ", ".join(f"{n} {v:+d}" for n, v in grown.items() if v) or "nothing",
            })  # fmt: skip
            report.bars += [
                Bar(f"serve: kill of {kind}, others' longest gap, s", rows[-1][
                    "others' longest gap, s"], GAP),
                Bar(f"serve: kill of {kind}, hit ones back, s", rows[-1]["hit: longest gap, s"],
                    BACK),
                Bar(f"serve: kill of {kind}, settings or order lost, wrong pictures, ended",
                    2.0 * times - sum(one["kept"] + one["order"] for one in every)
                    + rows[-1]["wrong pictures"] + rows[-1]["ended"], 0.0, counted=True),
                Bar(f"serve: kill of {kind}, grown", float(sum(max(0, v) for v in grown.values())),
                    0.0, counted=True),
            ]  # fmt: skip
            report.add("serve: kill -9 under load", rows)


async def one_kill(there, crowd, pair, line, kind, what, turn):
    """One kill, and how long each stream was without a picture."""
    await visitors.until(lambda: standing(there) == 2, 90, lambda: (standing(there), turn))
    await crowd.running(pair)
    places = [v.place for v in line]
    pids = await asyncio.to_thread(there.named, what)
    began = time.monotonic()
    os.kill(pids[turn % len(pids)], signal.SIGKILL)
    # what is hit stops with its last frames on their way
    await asyncio.sleep(1.5)
    await crowd.running(pair, 60)
    gaps = sorted((v.gap(began - 0.5) for v in pair), reverse=True)
    if kind in ("lobby", "ingress"):
        await visitors.until(
            lambda: [v.place for v in line] == places or standing(there) == 2, 20, crowd.told
        )
        await asyncio.sleep(2.5)  # settle
    kept = [v.lights == v.values["1.mirror"] for v in pair]
    # only what the kill is about is hit; where nobody is, all are others
    hit = gaps[0] if kind in ("comfyui", "replica") else pair[1].gap(began - 0.5)
    other = gaps[1] if kind in ("comfyui", "replica") else pair[0].gap(began - 0.5)
    return {"hit": round(hit, 2), "other": round(other, 2), "kept": all(kept),
            "order": [v.place for v in line] == places}  # fmt: skip


def held(there) -> dict[str, int]:
    """What a house has of what can leak."""
    found = there.processes()
    sockets = set()
    for pid in found:
        try:
            for one in pathlib.Path(f"/proc/{pid}/fd").iterdir():
                link = os.readlink(one)
                if link.startswith("socket:["):
                    sockets.add(link[8:-1])
        except OSError:
            pass
    listening = 0
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            part = line.split()
            listening += part[3] == "0A" and part[9] in sockets
    shared = len(list(pathlib.Path("/dev/shm").iterdir()))
    return {"processes": len(found), "listening ports": listening, "in /dev/shm": shared}


def port_of(pid: int) -> int:
    """The port that a process listens at."""
    links = {os.readlink(one) for one in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    for line in pathlib.Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        part = line.split()
        if part[3] == "0A" and f"socket:[{part[9]}]" in links:
            return int(part[1].rpartition(":")[2], 16)
    raise RuntimeError(f"{pid} listens at no port")


async def scaling(report: Report, there, times: int) -> None:
    """1 to 3 to 1 under load: nobody's stream ends, who has to go is told and moved."""
    await sized(there, 1)
    oldest = (await asyncio.to_thread(there.ready))[0]
    async with Crowd(there, 3) as crowd:
        first, second, third = crowd.all
        for one in crowd.all:
            await one.want()
            await asyncio.sleep(0.3)
        await crowd.running([first])
        began = time.monotonic()
        await asyncio.to_thread(there.order, replicas=3)
        await crowd.running(seconds=150)
        up = time.monotonic() - began
        gap_up = max(v.gap(began) for v in [first])
        # two stay on the replicas that go first, and one of them has room on the oldest
        await first.leave()
        await visitors.until(lambda: standing(there) == 3, 20, crowd.told)
        moves = {v: len(v.moves) for v in (second, third)}
        assert oldest not in (second.replica, third.replica), crowd.told()
        began = time.monotonic()
        await asyncio.to_thread(there.order, replicas=1)
        await visitors.until(
            lambda: any(len(v.moves) > n for v, n in moves.items()), 30, crowd.told
        )
        await visitors.until(lambda: oldest in (second.replica, third.replica), 60, crowd.told)
        moved, other = (second, third) if second.replica == oldest else (third, second)
        asked = next(t for t, why in moved.moves if t >= began)
        # it was seen there just now
        took = moved.pictures[-1] - asked
        await crowd.running([moved])
        gap = moved.gap(began)
        # the other one waits, is told, and goes on when there is room
        await visitors.until(lambda: other.moves and other.place == 1, 60, crowd.told)
        await moved.leave()
        left = time.monotonic()
        after = await visitors.until(
            lambda: other.replica == oldest and other.pictures[-1] > left, 60, crowd.told
        )
        await visitors.until(lambda: standing(there) == 1, 90, crowd.told)
        ended = [r for v in (second, third) for r in v.overs if r != "left"]
        report.add("serve: scale 1, 3, 1 under load", [{
            "s to 3 that run": round(up, 1), "longest gap while growing, s": round(gap_up, 2),
            "why": ", ".join(sorted({why for _, why in moved.moves + other.moves})),
            "told to moved, s": round(took, 2), "gap of the moved, s": round(gap, 2),
            "the other one after room, s": round(after, 2), "ended": len(ended),
            "wrong pictures": sum(len(v.wrong) for v in crowd.all),
        }])  # fmt: skip
        report.bars += [
            Bar("serve: scale, longest gap while growing, s", gap_up, GAP),
            Bar("serve: scale, told to moved, s", took, MOVED),
            Bar("serve: scale, the next one after room, s", after, NEXT),
            Bar("serve: scale, streams that ended", float(len(ended)), 0.0, counted=True),
        ]


async def overhead(report: Report, there, times: int) -> None:
    """Frames of 30 kB there and back: a ComfyUI itself, its gate, the relay; in turns."""
    await sized(there, 1)
    (pid,) = await asyncio.to_thread(there.named, "comfyui")
    comfyui = f"http://127.0.0.1:{port_of(pid)}"
    jpeg = visitors.frame(0.3, 256, noise=30)
    values = {"1.width": 256, "1.height": 256}
    graph = json.loads(json.dumps(house.GRAPH))
    graph["1"]["inputs"] |= {"width": 256, "height": 256}
    every = {"comfyui": [], "direct": [], "relay": []}
    for turn in range(2 * max(1, times // 4)):
        order = [*every] if turn % 2 else [*every][::-1]
        for way in order:
            if way == "comfyui":
                every[way] += await echoes(comfyui, graph, jpeg)
                await asyncio.sleep(3)  # a run's end, so that the gate's is the next
                continue
            async with Crowd(there, 1, relays=(0,) if way == "relay" else (), jpeg=jpeg,
                             values=values, check=False) as crowd:  # fmt: skip
                await crowd.all[0].want()
                await crowd.running()
                crowd.all[0].delays.clear()
                await asyncio.sleep(8)
                every[way] += crowd.all[0].delays
    rows = [{
        "way": way, "frames": len(found), "kB": round(len(jpeg) / 1000),
        "p50, ms": round(1e3 * statistics.median(found), 2),
        "p99, ms": round(1e3 * sorted(found)[int(0.99 * len(found))], 2),
    } for way, found in every.items()]  # fmt: skip
    report.add("serve: a frame there and back", rows, f"load {os.getloadavg()[0]:.1f}")
    base = rows[0]["p50, ms"]
    report.bars += [
        Bar(f"serve: overhead of the {row['way']} way, p50, ms", row["p50, ms"] - base, OVERHEAD)
        for row in rows[1:]
    ]


async def echoes(base, graph, jpeg, count=60, fps=8.0):
    """Delays of frames through a ComfyUI without a house, seconds."""
    delays = []
    async with aiohttp.ClientSession(base) as http:
        body = {"client_id": "bars", "prompt": graph, "workflow": None}
        async with http.post("/livediffusion/start", json=body) as reply:
            begun = await reply.json()
        keys = {key: begun[key] for key in ("session", "token")}
        async with http.ws_connect(
            "/livediffusion/frames", params={**keys, "role": "owner"}, max_msg_size=2**24
        ) as ws:

            async def send():
                for i in range(count):
                    head = visitors.HEADER.pack(1, 1, 0, i, time.time() * 1000, 0, i)
                    await ws.send_bytes(head + jpeg)
                    await asyncio.sleep(1 / fps)

            sending = asyncio.create_task(send())
            until = time.monotonic() + count / fps + 2
            while time.monotonic() < until:
                try:
                    message = await ws.receive(timeout=1)
                except asyncio.TimeoutError:
                    continue
                if message.type is aiohttp.WSMsgType.BINARY:
                    sent = visitors.HEADER.unpack_from(message.data)
                    delays.append(time.time() - sent[4] / 1000)
                    await ws.send_json({"type": "shown", "view": sent[2], "latency_ms": None})
            await sending
        async with http.post("/livediffusion/stop", json=keys) as reply:
            await reply.read()
    # the first ones start the run
    return delays[8:]


async def tries(report: Report, there, times: int) -> None:
    """What a visitor's tickets open: nothing else."""
    import tries as table

    await sized(there, 2)
    async with Crowd(there, 2) as crowd:
        for one in crowd.all:
            await one.want()
        await crowd.running()
        began = time.monotonic()
        rows = await table.tried(there, *crowd.all)
        await crowd.running()
        gap = max(v.gap(began) for v in crowd.all)
    opened = [row["try"] for row in rows if not row["refused"]]
    report.add("serve: tries with a visitor's tickets", rows)
    report.bars += [
        Bar("serve: tries that opened something", float(len(opened)), 0.0, counted=True),
        Bar("serve: tries, fewer than 30", float(max(0, 30 - len(rows))), 0.0, counted=True),
        Bar("serve: streams' longest gap during the tries, s", gap, GAP),
    ]


async def simulated(report: Report, there, times: int) -> None:
    """A while of visitors who come and go, here and in the simulation of the same log."""
    await sized(there, 2)
    # nobody may have come yet
    at = there.log.stat().st_size if there.log.exists() else 0
    draw, until = random.Random(1), time.monotonic() + 12.0 * times

    async def visit(i, stay):
        async with Crowd(there, 1, check=False) as crowd:
            await crowd.all[0].want()
            await visitors.until(lambda: crowd.all[0].phase == "running", 120, crowd.told)
            await asyncio.sleep(stay)

    running = set()
    while time.monotonic() < until:
        running.add(asyncio.create_task(visit(len(running), draw.uniform(4, 10))))
        await asyncio.sleep(draw.expovariate(1 / 4.0))
    await asyncio.gather(*running)
    await asyncio.sleep(1)
    with there.log.open(encoding="utf-8") as log:
        log.seek(at)
        lines = log.readlines()
    from serve import plan, simulation

    found, result = simulation.replay(
        lines, simulation.Plan(fps=10, low=2, high=2), simulation.World(tick_s=0.005)
    )
    row = {name: round(v, 3) for name, v in plan.compared(found, result, 2).items()}
    report.add("serve: the simulation beside the house", [row])
    report.bars += [
        Bar(f"serve: simulation, {what}, off by", abs(row[ours] / row[f"real_{ours}"] - 1), NEAR)
        for what, ours in (("mean wait", "wait"), ("utilisation", "used"))
    ]


PARTS = {"overhead": overhead, "tries": tries, "scaling": scaling, "simulated": simulated,
         "kills": kills}  # fmt: skip
