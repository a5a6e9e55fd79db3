"""A run without a page for a long time: pages come and go, it fails now and then, nothing grows."""

import asyncio
import ctypes
import gc
import os
import sys
import threading

import folder_paths
import inprocess
import pytest
from clock import Limit
from films import write_gif
from inprocess import Client, graph, until
from livediffusion.live import keeper, kept

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]

CONNECTS = int(os.environ.get("LIVEDIFFUSION_CONNECTS", "60"))
MINUTES = float(os.environ.get("LIVEDIFFUSION_MINUTES", "0.1"))
STEPS = 30 if MINUTES >= 1 else 4


@pytest.fixture
def running(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    monkeypatch.setattr(kept._Growing, "FIRST", 0.1)
    monkeypatch.setattr(kept._Growing, "MOST", 0.1)
    monkeypatch.setattr(keeper, "_LOOK", 0.1)
    write_gif(tmp_path / "film.gif", 4, 40)
    with inprocess.comfy() as both:
        yield both


async def start(http, comfy):
    made = graph(source="file", file="film.gif", fps=30, width=64, height=64)
    body = {**inprocess.begin(made), "unattended": True}
    status, begun = await inprocess.post(http, f"{comfy.url}/livediffusion/start", body)
    assert status == 200, begun
    return begun


async def attached(http, comfy, run):
    """A page that comes to the kept run, waited for while it begins anew."""
    url, limit = f"{comfy.url}/livediffusion/attach", Limit(20)
    while "session" not in (begun := (await inprocess.post(http, url, {"run": run}))[1]):
        assert not limit.over, begun
        await asyncio.sleep(0.05)
    return await Client.join(http, comfy.url, begun, "watch")


async def visit(http, comfy, begun, polite=True):
    """A page that looks in and leaves, with a word or without one."""
    page = await Client.join(http, comfy.url, begun, "watch")
    await page.wait(lambda: page.views or page.states)
    if polite:
        await page.socket.close()
    else:
        page.socket._response.close()
    page._reader.cancel()


def test_pages_come_and_go_as_viewers(running):
    """1,000 of them by LIVEDIFFUSION_CONNECTS."""
    comfy, _ = running

    async def work(http):
        begun = await start(http, comfy)
        page = await Client.join(http, comfy.url, begun, "watch")
        live = comfy.sessions.get(begun["session"])
        for i in range(CONNECTS):
            await visit(http, comfy, begun, polite=i % 3 > 0)
        await page.wait(lambda: len(live.viewers) == 1)
        seen = len(page.views)
        await page.wait(lambda: len(page.views) >= seen + 5)
        assert live.state == "live"
        await page.stop()

    limit = Limit(0.2 * CONNECTS)
    inprocess.live(work)
    sys.stderr.write(f"{CONNECTS} connects: {limit.spent:.1f} s\n")
    assert not limit.over


def figures() -> dict[str, float]:
    """Of this process: MB resident, objects, threads, open files."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what its allocator holds back
    with open("/proc/self/statm", encoding="ascii") as file:
        mb = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {
        "MB": round(mb, 1), "objects": len(gc.get_objects()), "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat(running):
    """30 minutes by LIVEDIFFUSION_MINUTES; a failure and five pages in each of its steps."""
    comfy, world = running
    told = []

    async def step(http, run):
        limit = Limit(60 * MINUTES / STEPS)
        page = await attached(http, comfy, run)
        for _ in range(5):
            await visit(http, comfy, page.begun)
        world.fail = "keep"
        await page.wait(lambda: page.closed)
        assert page.state == "failed"
        world.fail = None
        page = await attached(http, comfy, run)
        await page.wait(lambda: page.views)
        while limit.spent < limit.seconds:
            for kept_here in (page.views, page.states, world.seen, comfy.messages):
                kept_here.clear()
            await asyncio.sleep(0.05)
        await page.socket.close()
        # what is left of the steps before: sessions that are over, and the history of one
        assert len(comfy.sessions._all) <= 9
        errors = [e["status"]["status_str"] for e in comfy.prompt_queue.history.values()]
        assert errors.count("error") <= 1

    async def work(http):
        run = (await start(http, comfy))["run"]
        for i in range(STEPS + 1):
            await step(http, run)
            told.append(figures())
            sys.stderr.write(f"{i}: {told[-1]}\n")
        await inprocess.post(http, f"{comfy.url}/livediffusion/end", {"run": run})

    inprocess.live(work)
    until(lambda: not comfy.prompt_queue.currently_running)
    if STEPS < 30:
        # the eight sessions that are remembered fill up meanwhile
        assert told[-1]["MB"] - told[1]["MB"] < 40, told
        # what ends in its own time is seen now and then
        assert told[-1]["threads"] - told[1]["threads"] <= 2, told
        assert told[-1]["files"] - told[1]["files"] <= 4, told
    else:
        early, late = told[10:15], told[-5:]
        for name, most in {"MB": 5, "objects": 500, "threads": 1, "files": 3}.items():
            grown = sum(one[name] for one in late) / 5 - sum(one[name] for one in early) / 5
            assert grown <= most, (name, grown, told)
