"""Recordings: what is in the file, whatever happens while it is written."""

import asyncio
import errno
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time
from io import FileIO

import av
import inprocess
import numpy as np
import pytest
from clock import crowded
from inprocess import Client, flat, graph, view
from livediffusion.live.sinks import record
from livediffusion.live.sinks.mp4 import Mp4
from livediffusion.live.sinks.names import Wish, reserve
from livediffusion.live.sinks.record import Recorder

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

CHILD = pathlib.Path(__file__).parents[1] / "recording_child.py"
KILLS = int(os.environ.get("LIVEDIFFUSION_KILLS", "6"))


@pytest.fixture
def out(tmp_path, monkeypatch):
    """ComfyUI's output folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.fixture
def running(out):
    with inprocess.comfy() as both:
        yield both


def played(path):
    """All of a film: (times, greys, size, seconds). Raises where it is damaged."""
    with av.open(str(path)) as film:
        stream, times, greys = film.streams.video[0], [], []
        for frame in film.decode(stream):
            times.append(frame.time)
            greys.append(float(frame.to_ndarray(format="rgb24").mean()))
        return times, greys, (stream.width, stream.height), film.duration / av.time_base


def runs(greys):
    """The greys one after the other, each once."""
    return [g for i, g in enumerate(greys) if not i or abs(g - greys[i - 1]) > 4]


def recorder(out, told=None, prefix="r"):
    return Recorder(Wish(True, prefix, None, None), (told if told is not None else []).append)


def still(image):
    """A node that gives the tensor it gave before while the frame has not changed."""
    kept = {}

    def go(self, image):
        if "last" not in kept or abs(float(kept["last"].mean() - image.mean())) > 0.02:
            kept["last"] = image
        return (kept["last"],)

    return type("Still", (), {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {"image": ("IMAGE", {})}}),
        "RETURN_TYPES": ("IMAGE",), "FUNCTION": "go", "CATEGORY": "test", "go": go})  # fmt: skip


def recorded(prefix="live/r", record=True, node="5", text="keep", middle=None):
    """A graph whose view records; `middle` stands between the work and the view."""
    made = graph(text)
    del made["5"]
    source = ["4", 0]
    if middle:
        made["6"], source = {"class_type": middle, "inputs": {"image": source}}, ["6", 0]
    made[node] = view(source, record=record, filename_prefix=prefix)
    return made


async def feed(client, grey=60, fps=25):
    """The same frame again and again, until the run is over."""
    while not client.closed:
        await client.send(flat(grey() if callable(grey) else grey))
        await asyncio.sleep(1 / fps)


def test_what_is_killed_plays_to_within_a_second(tmp_path, record_property):
    chance = random.Random(8)
    ends = [("SIGKILL", chance.uniform(1.5, 5)) for _ in range(KILLS)]
    ends += [("SIGTERM", 2.3), ("SIGINT", 2.6)]
    chance.shuffle(ends)
    told = []
    # more at once would mostly wait for each other
    for some in (ends[i : i + 10] for i in range(0, len(ends), 10)):
        folder = tmp_path / str(len(told))
        command = [sys.executable, str(CHILD), str(folder), json.dumps(some)]
        reply = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        told += json.loads(reply.stdout.splitlines()[-1])
    lost, sounds = [], []
    for place, lived in told:
        (path,) = pathlib.Path(place).iterdir()
        times, _, _, seconds = played(path)
        with av.open(str(path)) as film:
            sounds.append(bool(film.streams.audio))
        assert len(times) >= 2
        lost.append(lived - seconds)
    record_property("lost", sorted(round(one, 2) for one in lost))
    assert max(lost) < crowded() and set(sounds) == {True, False}


def test_a_still_scene_lasts_as_long_as_it_lasted(running, out, monkeypatch):
    """Nothing new comes for seconds, as behind a Live Similarity Filter."""
    comfy, _ = running
    monkeypatch.setitem(inprocess.CLASSES, "Still", still(None))
    began = {}

    async def work(http):
        client = await Client.start(http, comfy.url, recorded(middle="Still"))
        feeding = asyncio.create_task(feed(client))
        await client.wait(lambda: list(out.glob("live/r_00001_.mp4")))
        began["at"] = time.monotonic()
        await asyncio.sleep(2.5)
        await client.post("stop")
        began["end"] = time.monotonic()
        await client.wait(lambda: client.closed)
        await feeding
        return client

    client = inprocess.live(work)
    assert len(client.views) == 1
    lasted = began["end"] - began["at"]
    # the message was there before the socket closed
    (event,) = client.recorded
    assert (event["node"], event["file"], event["left_out"]) == ("5", "r_00001_.mp4", 0)
    times, greys, size, seconds = played(out / "live" / "r_00001_.mp4")
    assert seconds == pytest.approx(lasted, abs=0.1) == pytest.approx(event["seconds"], abs=0.1)
    assert len(runs(greys)) == 1 and size == (32, 32)
    assert max(np.diff(times)) < 0.6


def test_off_and_on_whatever_moves(running, out, monkeypatch):
    """Each time one whole file: also while nothing moves, renamed, removed and stopped."""
    comfy, _ = running
    monkeypatch.setitem(inprocess.CLASSES, "Still", still(None))

    async def work(http):
        client = await Client.start(http, comfy.url, recorded(middle="Still"))
        feeding = asyncio.create_task(feed(client))

        async def change(**settings):
            new = recorded(middle="Still", **settings)
            status, answer = await client.post("update", prompt=new, workflow={"id": "w"})
            assert status == 200
            await client.wait(lambda: client.stats.get("version", 0) >= answer["version"])

        def files():
            return sorted(path.name for path in out.glob("live/*"))

        async def until(count, ended):
            await client.wait(lambda: len(files()) == count and len(client.recorded) == ended)

        await until(1, 0)
        await change(record=False)
        await until(1, 1)
        await change()
        await until(2, 1)
        # faster than a recording ends
        await change(record=False)
        await change()
        await until(3, 2)
        await change(node="7")  # renamed: another view
        await until(4, 3)
        await change(node="8", prefix="live/other")
        await until(5, 4)
        assert files()[0] == "other_00001_.mp4"
        await client.post("stop")
        await client.wait(lambda: client.closed)
        await feeding
        assert len(client.recorded) == 5 and not client.problems
        return files()

    for name in inprocess.live(work):
        _, greys, _, seconds = played(out / "live" / name)
        assert runs(greys) == pytest.approx([60], abs=5) and 0 < seconds < 20


def test_a_run_that_fails_leaves_a_whole_file(running, out):
    comfy, world = running

    async def work(http):
        client = await Client.start(http, comfy.url, recorded(text="50"))
        feeding = asyncio.create_task(feed(client))
        await client.wait(lambda: len(client.views) > 10)
        world.fail = "50"
        await client.wait(lambda: client.closed)
        await feeding
        return client

    client = inprocess.live(work)
    assert client.state == "failed" and len(client.recorded) == 1
    seconds = played(out / "live" / "r_00001_.mp4")[3]
    assert seconds == pytest.approx(client.recorded[0]["seconds"], abs=0.02)


def test_the_graph_that_runs_when_it_begins_is_in_the_file(running, out, monkeypatch):
    comfy, _ = running
    from comfy.cli_args import args

    async def work(http):
        client = await Client.start(http, comfy.url, recorded(record=False))
        feeding = asyncio.create_task(feed(client))
        await client.wait(lambda: client.views)
        edited = recorded(text="later")
        place = {"id": "w", "edited": "\u00e4 <>"}
        await client.post("update", prompt=edited, workflow=place)
        await client.wait(lambda: list(out.glob("live/*")))
        _, answer = await client.post("picture", node="5")
        await client.post("update", prompt=recorded(record=False), workflow={})
        await client.wait(lambda: client.recorded)
        monkeypatch.setattr(args, "disable_metadata", True)
        await client.post("update", prompt=edited, workflow=place)
        await client.wait(lambda: len(list(out.glob("live/*.mp4"))) == 2)
        _, bare = await client.post("picture", node="5")
        await client.stop()
        await feeding
        return edited, place, answer, bare

    edited, place, answer, bare = inprocess.live(work)

    def kept(name):
        path = out / "live" / name
        if path.suffix == ".png":
            from PIL import Image

            with Image.open(path) as picture:
                return {k: v for k, v in picture.info.items() if k in ("workflow", "prompt")}
        with av.open(str(path)) as film:
            return {k: v for k, v in film.metadata.items() if k in ("workflow", "prompt")}

    assert answer == {"filename": "r_00002_.png", "subfolder": "live", "type": "output"}
    for name in ("r_00001_.mp4", "r_00002_.png"):
        found = {key: json.loads(value) for key, value in kept(name).items()}
        assert found == {"workflow": place, "prompt": edited}, name
    assert [kept(name) for name in ("r_00003_.mp4", bare["filename"])] == [{}, {}]


def test_a_picture_is_what_is_shown_to_the_last_bit(running, out):
    comfy, _ = running
    from PIL import Image

    async def work(http):
        client = await Client.start(http, comfy.url, recorded("live/s", record=False, text="77"))
        early = await client.post("picture", node="5")
        await client.send(flat(1))
        await client.wait(lambda: client.views)
        answers = [await client.post("picture", node=node) for node in ("5", "5", "9", [], None)]
        wrong = {"session": client.begun["session"], "token": "no", "node": "5"}
        stranger = await inprocess.post(http, f"{comfy.url}/livediffusion/picture", wrong)
        outside = recorded("../s", record=False, text="77")
        await client.post("update", prompt=outside, workflow={})
        while client.views[-1][0].version < 2:
            await client.send(flat(1))
            await asyncio.sleep(0.02)
        answers.append(await client.post("picture", node="5"))
        await client.stop()
        return early, answers, stranger, await client.post("picture", node="5")

    early, answers, stranger, late = inprocess.live(work)
    assert [status for status, _ in (early, *answers, stranger, late)] == [
        400, 200, 200, 400, 400, 400, 400, 403, 410]  # fmt: skip
    assert "filename_prefix" in answers[-1][1]["error"]["message"]
    assert sorted(os.listdir(out / "live")) == ["s_00001_.png", "s_00002_.png"]
    with Image.open(out / "live" / "s_00001_.png") as picture:
        assert np.array_equal(np.asarray(picture), np.full((32, 32, 3), 77))


def test_a_new_size_begins_a_new_file(out):
    told = []
    one = recorder(out, told)
    sizes = [(48, 64), (48, 64), (32, 40), (32, 40), (33, 41), (1, 1), (48, 64)]
    for i, size in enumerate(sizes):
        one.put(np.full((*size, 3), 30 * i, np.uint8))
        time.sleep(0.06)
    one.end()
    assert one.over.wait(10)
    films = [played(path) for path in sorted(out.iterdir())]
    # odd sides are continued by a copy of the last row and column
    assert [film[2] for film in films] == [(64, 48), (40, 32), (42, 34), (2, 2), (64, 48)]
    greys = [grey for film in films for grey in runs(film[1])]
    assert greys == pytest.approx([30 * i for i in range(7)], abs=4)
    assert [event["file"] for event in told] == sorted(os.listdir(out))
    assert sum(film[3] for film in films) == pytest.approx(0.42, abs=0.2)


def test_colours_and_odd_edges_survive(out):
    one = recorder(out)
    colours = np.array([[200, 40, 60], [30, 180, 70], [50, 60, 210], [128, 128, 128]], np.uint8)
    picture = np.repeat(np.repeat(colours[None], 35, 0), 16, 1)[:, :63]
    one.put(picture)
    one.end()
    assert one.over.wait(10)
    with av.open(str(next(out.iterdir()))) as film:
        frame = next(film.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)
        shown = frame.reformat(format="rgb24", src_colorspace=1).to_ndarray().astype(int)
    for x in (8, 24, 40, 62, 63):
        assert np.abs(shown[[0, 20, 34, 35], x] - picture[0, min(x, 62)]).max() < 9, x


def test_nobody_gets_a_name_twice(out):
    """Recordings and pictures of many views at once, with what ComfyUI has written beside them."""
    for name in ("r_00001_.png", "r_00003_.mp4", "r_00003_.png"):
        (out / name).touch()
    got, barrier = [], threading.Barrier(16)

    def ask(i):
        barrier.wait()
        place, file = reserve("r", 8, 8, (".mp4", ".png")[i % 2])
        with file:
            file.write(str(i).encode())
        got.append((place.path, str(i)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len({path for path, _ in got}) == 16
    assert all(path.read_text() == text for path, text in got)
    assert min(path.name for path, _ in got) >= "r_00004_"
    with pytest.raises(ValueError, match="filename_prefix"):
        reserve("../r", 8, 8, ".mp4")


class Full(FileIO):
    """A file on a disk with room for `left` bytes."""

    left = 0

    def write(self, data):
        if self.left < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= len(data)
        return super().write(data)


@pytest.mark.parametrize("room", [0, 900, 20_000, "end"])
def test_a_full_disk_is_told_when_it_is_full(out, monkeypatch, caplog, room):
    """At the first byte, later, and at the very end."""
    opened = []

    def reserved(*args):
        place, file = reserve(*args)
        file.close()
        opened.append(Full(place.path, "w"))
        opened[0].left = 10**9 if room == "end" else room
        return place, opened[0]

    monkeypatch.setattr(record, "reserve", reserved)
    told, noise = [], np.random.default_rng(0)
    one = recorder(out, told)
    for _ in range(12):
        one.put(noise.integers(0, 255, (64, 64, 3)).astype(np.uint8))
        time.sleep(0.05)
    if room == "end":
        opened[0].left = 0
    else:
        assert one.over.wait(10)  # long before it is switched off
    one.put(np.zeros((64, 64, 3), np.uint8))
    one.end()
    assert one.over.wait(10)
    (event,) = told
    assert event["type"] == "problem" and "No space left" in event["reason"]
    assert "No space left" in caplog.text and opened[0].closed
    assert len(os.listdir(out)) == (room != 0)
    if room == 20_000:
        assert len(played(out / "r_00001_.mp4")[0]) >= 1


def test_a_folder_that_is_gone_is_told(running, out, caplog):
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, recorded())
        feeding = asyncio.create_task(feed(client))
        await client.wait(lambda: list(out.glob("live/*")))
        await asyncio.sleep(0.5)
        shutil.rmtree(out / "live")
        await client.wait(lambda: client.problems)
        seen = len(client.views)
        await client.wait(lambda: len(client.views) > seen + 5)  # the run goes on
        await client.stop()
        await feeding
        return client

    client = inprocess.live(work)
    (problem,) = client.problems
    assert problem["node"] == "5" and "removed" in problem["reason"]
    assert "removed" in caplog.text and not client.recorded and not (out / "live").exists()


def test_frames_that_are_left_out_are_counted_and_told(out, monkeypatch):
    """The disk is slow: nothing waits for it, and the page hears how many did not come in."""
    slow, go = Mp4.show, threading.Event()
    monkeypatch.setattr(Mp4, "show", lambda *args: (go.wait(10), slow(*args)))
    told = []
    one = recorder(out, told)
    began = time.monotonic()
    for i in range(30):
        one.put(np.full((32, 32, 3), i, np.uint8))
    assert time.monotonic() - began < 5
    go.set()
    one.end()
    assert one.over.wait(10)
    (event,) = told
    times = played(out / "r_00001_.mp4")[0]
    assert 20 <= event["left_out"] <= 22 and len(times) == 31 - event["left_out"]


@pytest.mark.timeless
def test_recordings_that_are_not_written_yet_do_not_pile_up(monkeypatch):
    """A disk that hangs, and somebody who switches on and off: told, and what runs goes on."""
    from livediffusion.live import view as views
    from livediffusion.live.bounds import most

    class Hanging:
        def __init__(self, wish, tell):
            self.over, self.ended = threading.Event(), False

        def end(self):
            self.ended = True

    monkeypatch.setattr(views, "Recorder", Hanging)
    limit, told = most("view.View._recorders"), []
    one = views.View(0)
    for i in range(limit + 1):
        one.wish = Wish(True, "r", None, None)
        one.record(told.append)
        one.record(told.append)  # asked again while it runs: nothing to tell
        assert len(told) == (i == limit) * 2
        one.wish = one.wish._replace(record=False)
        one.record(told.append)
    assert len(one._recorders) == limit and all(made.ended for made in one._recorders)
    one._recorders[0].over.set()
    one.wish = one.wish._replace(record=True)
    one.record(told.append)
    assert one._recorder is not None and len(told) == 2
    assert {(event["type"], event["reason"][:7]) for event in told} == {("problem", "record:")}
