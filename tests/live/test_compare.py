"""The frame that a picture was made from, as the graph saw it; and only for who asks."""

import asyncio
import io

import inprocess
import numpy as np
import pytest
from films import write_gif
from inprocess import Client, camera, flat, graph, grey, view
from livediffusion.live import origins
from livediffusion.live.viewer import Viewer
from livediffusion.live.wire import VIEW, Packet
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]


@pytest.fixture
def running():
    with inprocess.comfy() as both:
        yield both


def scene(number):
    """A picture in which nothing is as its mirror image or its neighbour, 60 x 40."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 250, 60)
    picture[..., 1] = np.linspace(250, 0, 40)[:, None]
    picture[10:20, 5:15] = number
    return picture


async def feed(client, until, picture=scene, fps=60):
    for i in range(2000):
        if until():
            return
        await client.send(picture(i % 250))
        await asyncio.sleep(1 / fps)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_the_input_is_what_the_graph_saw(running, fit, mirror):
    """A graph that gives its frames back: picture and input are the same bytes."""
    comfy, _ = running
    shape = {"width": 48, "height": 64, "fit": fit, "mirror": mirror, "fps": 120}

    async def work(http):
        client = await Client.start(http, comfy.url, graph(**shape))
        await client.compare()
        await feed(client, lambda: len(client.views) >= 12)
        await client.stop()
        return client.views

    views = [packet for packet, _ in inprocess.live(work)]
    asked = [p for p in views if p.input]
    assert len(asked) >= 10
    assert all(p.input == p.payload for p in asked)
    assert Image.open(io.BytesIO(asked[-1].input)).size == (48, 64)
    assert len({p.input for p in asked}) == len(asked)


def test_an_edit_of_the_mirror_reaches_both_at_once(running):
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph(fps=120))
        await client.compare()
        await feed(client, lambda: len(client.views) >= 5)
        await client.post("update", prompt=graph(fps=120, mirror=True), workflow={})
        await feed(client, lambda: client.views[-1][0].version == 2)
        await client.stop()
        return client.views

    views = [packet for packet, _ in inprocess.live(work)]
    assert {p.version for p in views} == {1, 2}
    assert all(p.input in (p.payload, b"") for p in views)


def test_the_frame_of_a_file_is_sent_too(running, tmp_path, monkeypatch):
    comfy, _ = running
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    write_gif(tmp_path / "a.gif", 6, 40)

    async def work(http):
        settings = {"source": "file", "file": "a.gif", "fps": 60}
        client = await Client.start(http, comfy.url, graph("200", **settings))
        await client.compare()
        await client.wait(lambda: len(client.views) >= 12)
        await client.stop()
        return client.views

    asked = [packet for packet, _ in inprocess.live(work) if packet.input]
    assert all(abs(grey(p) - 200) <= 1 for p in asked)
    assert len({p.input for p in asked}) == 6


def test_nothing_is_made_or_sent_unless_somebody_asked(running, monkeypatch):
    comfy, _ = running
    made = []
    whole = origins.Moment.picture
    monkeypatch.setattr(origins.Moment, "picture", lambda *of: made.append(1) or whole(*of))

    async def work(http):
        client = await Client.start(http, comfy.url, graph(fps=120))
        await feed(client, lambda: len(client.views) >= 10)
        assert not made and not any(packet.input for packet, _ in client.views)
        await client.compare()
        await feed(client, lambda: client.views[-1][0].input)
        await client.compare(on=False)
        await feed(client, lambda: not client.views[-1][0].input)
        before, seen = len(made), len(client.views)
        await feed(client, lambda: len(client.views) >= seen + 10)
        assert len(made) <= before + 1  # one may have been on its way
        await client.stop()

    inprocess.live(work)


def test_a_still_picture_gets_its_input_when_it_is_asked_for(running):
    """The filter lets no new picture come, so the last one comes again."""
    comfy, _ = running
    filtered = graph("200", fps=120)
    filtered["6"] = {"class_type": "LiveSimilarityFilter", "inputs": {
        "image": ["3", 0], "processed": ["4", 0], "threshold": 0.9, "max_skip": 1000,
        "settle": 2, "measure": "centred", "seed": 0}}  # fmt: skip
    filtered["5"] = view(["6", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, filtered)
        await feed(client, lambda: client.stats.get("skipped", 0) >= 10, lambda i: scene(9))
        seen = len(client.views)
        await client.compare()
        await client.wait(lambda: len(client.views) > seen)
        await client.stop()
        return client.views[seen - 1 : seen + 1]

    (before, _), (again, _) = inprocess.live(work)
    assert again.sequence == before.sequence and again.payload == before.payload
    assert again.input and abs(grey(again) - 200) <= 1 and grey(again, "input") < 150


def test_each_view_gets_the_frame_of_its_own_camera(running, tmp_path, monkeypatch):
    comfy, _ = running
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "still.png")
    two = graph(fps=120)
    two["6"] = camera(source="file", file="still.png", fps=60)
    two["7"] = view(["6", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, two)
        places = {v["node"]: v["index"] for v in client.begun["views"]}
        for index in places.values():
            await client.compare(index)

        def both():
            found = {p.view for p, _ in client.views if p.input}
            return len(client.views) >= 20 and found == {*places.values()}

        await feed(client, both, lambda i: flat(180))
        await client.stop()
        return client.views, places

    views, places = inprocess.live(work)
    asked = [p for p, _ in views if p.input]
    for node, value in (("5", 180), ("7", 90)):
        greys = {grey(p, "input") for p in asked if p.view == places[node]}
        assert greys and all(abs(g - value) <= 1 for g in greys), node


def test_only_the_view_that_was_asked_for_carries_inputs():
    async def work():
        viewer = Viewer()
        viewer.inputs.add(1)
        got = []
        for index in (0, 1):
            viewer.offer(Packet(VIEW, 1, index, 5, 0.0, 1, 5, b"picture", b"frame"))
            got.append((await viewer.next()).input)
        return got

    assert asyncio.run(work()) == [b"", b"frame"]
