"""Several sources: the fastest sets the pace, a silent one holds nobody up."""

import asyncio
import time

import inprocess
import pytest
from films import write_gif, write_video
from inprocess import Client, camera, flat, graph, grey, view
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture
def running(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    with inprocess.comfy() as (comfy, _):
        yield comfy, tmp_path


def film(name, **settings):
    return camera(source="file", file=name, fps=60, **settings)


@pytest.mark.parametrize("first", ["still", "film"])
def test_a_run_follows_its_fastest_source(running, first):
    """Whichever camera comes first in the graph. A still picture comes ten times a second."""
    comfy, folder = running
    Image.new("RGB", (32, 32), (90, 90, 90)).save(folder / "still.png")
    write_video(folder / "film.mp4", 16, 25)
    cameras = {"still": film("still.png"), "film": film("film.mp4")}
    ordered = dict(sorted(cameras.items(), key=lambda one: one[0] != first))
    made = {**ordered, "a": view(["still", 0]), "b": view(["film", 0])}

    async def work(http):
        client = await Client.start(http, comfy.url, made)
        await client.wait(lambda: client.stats.get("frames", 0) >= 25)
        began, before = time.monotonic(), client.stats["frames"]
        await client.wait(lambda: client.stats["frames"] >= before + 40)
        seconds, frames = time.monotonic() - began, client.stats["frames"] - before
        session = comfy.sessions.get(client.begun["session"])
        pace = session.shared.feed_of["film"].rate.value(time.monotonic())
        await client.stop()
        return frames / seconds, pace

    fps, pace = inprocess.live(work)
    # against what the film itself came at, on a machine that has other things to do
    assert fps > 0.7 * min(25, pace) and fps > 13
    assert fps < 32


def test_a_silent_camera_holds_no_film_up_and_is_named(running):
    comfy, folder = running
    write_gif(folder / "a.gif", 4, 40)
    made = graph(fps=60)
    made["6"] = film("a.gif")
    made["7"] = view(["6", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, made)
        await client.wait(lambda: len(client.views) >= 20)
        shown = {p.view: grey(p) for p, _ in client.views}
        await client.wait(lambda: client.stats.get("silent") == ["3"])
        await client.compare(0)
        for _ in range(400):
            if any(p.view == 0 and grey(p) > 100 for p, _ in client.views[-4:]):
                break
            await client.send(flat(150))
            await asyncio.sleep(0.02)
        else:
            raise AssertionError("the camera is not seen")
        await client.wait(lambda: client.stats.get("silent") == [])
        await client.wait(lambda: client.stats.get("silent") == ["3"], 10)
        seen = len(client.views)
        await client.wait(lambda: len(client.views) > seen + 10)
        # its last picture stays, and is not sent again
        assert abs(grey([p for p, _ in client.views if p.view == 0][-1]) - 150) <= 1
        await client.stop()
        return shown

    shown = inprocess.live(work)
    assert shown[0] == 0  # black until it sends


def test_two_silent_sources_run_nothing(running):
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        await client.wait(lambda: client.stats.get("silent") == ["3"])
        assert client.stats["frames"] == 0 and client.stats["fps"] == 0
        await client.stop()

    inprocess.live(work)


def test_a_film_that_ends_leaves_its_last_picture_to_the_others(running):
    comfy, folder = running
    write_gif(folder / "a.gif", 3, 60)
    made = graph(fps=60)
    made["6"] = film("a.gif", loop=False)
    made["7"] = view(["6", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, made)

        async def feed(until):
            for i in range(1500):
                if until():
                    return
                await client.send(flat(60 + i % 100))
                await asyncio.sleep(0.01)
            raise AssertionError(client.stats)

        await feed(lambda: client.stats.get("silent") == ["6"])
        before = client.stats["frames"]
        await feed(lambda: client.stats["frames"] > before + 20)
        last = [p for p, _ in client.views if p.view == 1][-1]
        await client.stop()
        return client, grey(last)

    client, last = inprocess.live(work)
    assert client.state == "ended" and last == 40  # the red of its last frame
    assert not client.problems


def test_a_run_of_films_is_over_with_the_longest(running):
    comfy, folder = running
    write_gif(folder / "a.gif", 3, 40)
    write_gif(folder / "b.gif", 12, 60)
    made = {"1": film("a.gif", loop=False), "2": film("b.gif", loop=False),
            "3": view(["1", 0]), "4": view(["2", 0])}  # fmt: skip

    async def work(http):
        client = await Client.start(http, comfy.url, made)
        await client.wait(lambda: client.closed)
        return client

    client = inprocess.live(work)
    assert client.state == "ended" and client.states[-1]["reason"] is None
    assert client.stats["frames"] >= 5


def test_a_slow_film_has_its_fps_told(running):
    """One frame in three seconds; it read 0.00."""
    comfy, folder = running
    write_gif(folder / "a.gif", 2, 3000)

    async def work(http):
        client = await Client.start(http, comfy.url, {"1": film("a.gif"), "2": view(["1", 0])})
        await client.wait(lambda: client.stats.get("frames", 0) >= 2)
        await client.wait(lambda: client.stats["fps"] > 0)
        await client.stop()
        return client.stats

    stats = inprocess.live(work)
    assert 0.2 < stats["fps"] < 0.4 and stats["silent"] == []


def test_the_page_is_told_what_size_the_graph_wants(running):
    comfy, _ = running
    made = graph(width=640, height=360, fps=24)
    made["6"] = camera(width=320, height=720)
    made["7"] = view(["6", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, made)
        await client.wait(lambda: client.paces)
        await client.stop()
        return client.begun["cameras"], client.paces

    cameras, paces = inprocess.live(work)
    assert [(c["node"], c["width"], c["height"], c["fps"]) for c in cameras] == [
        ("3", 640, 720, 30), ("6", 640, 720, 30)]  # fmt: skip
    assert {(p["width"], p["height"]) for p in paces} == {(640, 720)}
    assert all(p["interval_ms"] >= 33 for p in paces)
