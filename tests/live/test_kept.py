"""Runs without a page: they outlive pages, failures and ComfyUI, and say what they do."""

import asyncio
import errno
import json
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time

import folder_paths
import inprocess
import pytest
from clock import Limit
from films import write_gif
from inprocess import Client, graph, grey, until
from livediffusion.live import keeper, kept, session
from livediffusion.trust import boundary
from livediffusion.trust.schema import BadData

pytestmark = pytest.mark.comfy

TESTS = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def user(tmp_path, monkeypatch):
    """ComfyUI's user folder; a film in its input folder; pauses and looks that are short."""
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    monkeypatch.delenv(kept.STARTED, raising=False)
    monkeypatch.setattr(kept._Growing, "FIRST", 0.05)
    monkeypatch.setattr(kept._Growing, "MOST", 0.4)
    for name, value in {"_LOOK": 0.05, "_BEAT": 0.1, "_SAVE": 0.0}.items():
        monkeypatch.setattr(keeper, name, value)
    write_gif(tmp_path / "film.gif", 4, 40)
    return tmp_path / "user" / "livediffusion"


@pytest.fixture
def running(user):
    with inprocess.comfy() as both:
        yield both


def film(text="keep", **settings):
    return graph(text, **{"source": "file", "file": "film.gif", "fps": 60, **settings})


def unattended(made, name="Window display"):
    return {**inprocess.begin(made), "unattended": True, "name": name}


async def start(http, comfy, made, role="watch"):
    """A run that is kept, and a page that looks on."""
    status, begun = await inprocess.post(
        http, f"{comfy.url}/livediffusion/start", unattended(made)
    )
    assert status == 200, begun
    assert begun["warning"] is None
    return await Client.join(http, comfy.url, begun, role)


async def runs(http, comfy):
    async with http.get(f"{comfy.url}/livediffusion/runs") as reply:
        assert reply.status == 200
        return (await reply.json())["runs"]


async def one(http, comfy, wanted, seconds=20):
    """What is told of the kept run, once `wanted` is true of it."""
    limit = Limit(seconds)
    while True:
        told = await runs(http, comfy)
        if len(told) == 1 and wanted(told[0]):
            return told[0]
        assert not limit.over, told
        await asyncio.sleep(0.01)


async def none(http, comfy):
    """Once nothing is kept any more."""
    limit = Limit(20)
    while left := await runs(http, comfy):
        assert not limit.over, left
        await asyncio.sleep(0.01)


async def attach(http, comfy, run):
    url = f"{comfy.url}/livediffusion/attach"
    status, begun = await inprocess.post(http, url, {"run": run})
    assert status == 200, begun
    return await Client.join(http, comfy.url, begun, "watch")


async def end(http, comfy, run):
    return await inprocess.post(http, f"{comfy.url}/livediffusion/end", {"run": run})


def heart(user):
    return json.loads((user / "heartbeat.json").read_text("utf-8"))


def written(user):
    return json.loads((user / "runs.json").read_text("utf-8"))["runs"]


def test_it_outlives_its_page_and_another_one_edits_and_stops_it(running, user, monkeypatch):
    monkeypatch.setattr(session, "OWNER_MISSED", 0.25)
    monkeypatch.setattr(session, "OWNER_EXPECTED", 0.25)
    comfy, _ = running

    async def work(http):
        first = await start(http, comfy, film("60"), "owner")
        await first.wait(lambda: len(first.views) >= 3)
        await first.socket.close()
        # a run that a page owns is over after as long
        plain = await Client.start(http, comfy.url, graph(), "other")
        await plain.socket.close()
        other = comfy.sessions.get(plain.begun["session"])
        await plain.wait(lambda: other.over)
        told = await one(http, comfy, lambda run: run["state"] == "live")
        assert (told["name"], told["workflow"], told["restarts"]) == ("Window display", "w", 0)
        assert told["run"] == first.begun["run"] and told["last_frame_age_s"] < 5

        page = await attach(http, comfy, told["run"])
        await page.wait(lambda: len(page.views) >= 3)
        assert page.begun["session"] == first.begun["session"]
        status, _ = await page.post("update", prompt=film("200"), workflow={"id": "w"})
        assert status == 200
        await page.wait(lambda: page.views[-1][0].version == 2)
        assert abs(grey(page.views[-1][0]) - 200) <= 1
        await asyncio.to_thread(
            until, lambda: written(user)[0]["graph"]["2"]["inputs"]["text"] == "200"
        )
        # whoever looks on tells how long its pictures took
        await page.wait(lambda: page.stats.get("latency_ms"))
        await page.stop()
        await none(http, comfy)
        status, answer = await end(http, comfy, told["run"])
        assert status == 410 and "not kept" in answer["error"]["message"]
        return page

    page = inprocess.live(work)
    assert page.state == "ended"
    until(lambda: written(user) == [] and heart(user)["runs"] == [])


def test_two_pages_on_a_kept_run_leave_each_other_alone(running):
    comfy, _ = running

    async def work(http):
        mine = await start(http, comfy, film(), "owner")
        other = await Client.join(http, comfy.url, mine.begun, "owner")
        seen = len(mine.views)
        for page in (mine, other):
            await page.wait(lambda page=page: len(page.views) >= seen + 3)
            assert page.closed is None and page.refused == []
        await other.stop()

    inprocess.live(work)


def test_a_run_of_a_page_is_kept_from_now_on(running, user):
    comfy, _ = running

    async def work(http):
        page = await Client.start(http, comfy.url, film())
        await page.wait(lambda: len(page.views) >= 2)
        status, answer = await page.post("keep", name="Mine")
        assert (status, answer["warning"]) == (200, None)
        again, same = await page.post("keep", name="Mine")
        assert again == 200 and same["run"] == answer["run"]
        assert written(user)[0]["run"] == answer["run"]
        # ComfyUI runs one prompt at a time: another one would wait for ever
        second = await inprocess.post(
            http, f"{comfy.url}/livediffusion/start", unattended(film())
        )
        assert second[0] == 400 and "Mine is kept running" in second[1]["error"]["message"]
        waiting = await Client.start(http, comfy.url, film(), "other")
        assert (await waiting.post("keep"))[0] == 400
        await waiting.stop()
        assert (await end(http, comfy, answer["run"]))[0] == 200
        await page.wait(lambda: page.closed)
        assert page.state == "ended" and await runs(http, comfy) == []

    inprocess.live(work)


@pytest.mark.parametrize("source", ["browser", "screen"])
def test_what_only_a_page_sends_is_refused_in_words(running, source):
    comfy, _ = running

    async def work(http):
        url = f"{comfy.url}/livediffusion/start"
        status, answer = await inprocess.post(http, url, unattended(graph(source=source)))
        assert status == 400
        said = answer["node_errors"]["3"]["errors"][0]["message"]
        assert said.startswith("source: ") and "Choose another source." in said
        page = await Client.start(http, comfy.url, graph(source=source))
        assert (await page.post("keep"))[0] == 400
        await page.stop()
        # nor by an edit
        page = await start(http, comfy, film())
        status, answer = await page.post("update", prompt=graph(source=source), workflow=None)
        assert status == 400 and list(answer["node_errors"]) == ["3"]
        assert await runs(http, comfy)
        await page.stop()

    inprocess.live(work)


def test_a_failing_node_is_tried_again_after_growing_pauses(running, user, caplog):
    comfy, world = running
    url = f"{comfy.url}/livediffusion/attach"

    async def work(http):
        page = await start(http, comfy, film("90"))
        await page.wait(lambda: len(page.views) >= 3)
        world.fail = "90"
        await page.wait(lambda: page.closed)
        assert (page.state, page.states[-1]["node"]) == ("failed", "4")
        told = await one(http, comfy, lambda run: run["failures"] >= 4)
        assert (told["node"], told["restarts"]) == ("4", told["failures"] - 1)
        assert "90 does not work" in told["reason"]
        # whoever comes in a pause is told when the next try is
        answers = []
        while not answers or "session" in answers[-1]:
            answers.append((await inprocess.post(http, url, {"run": told["run"]}))[1])
        assert answers[-1]["state"] == "waiting" and answers[-1]["next_try_s"] <= 0.4
        world.fail = None
        told = await one(http, comfy, lambda run: run["state"] == "live")
        page = await attach(http, comfy, told["run"])
        await page.wait(lambda: len(page.views) >= 3)
        await page.stop()
        await none(http, comfy)
        return told

    inprocess.live(work)
    ends = [entry["status"]["status_str"] for entry in comfy.prompt_queue.history.values()]
    assert ends == ["success"]  # of ten thousand that ComfyUI keeps, none is left
    ours = [r.getMessage() for r in caplog.records if "tried again" in r.getMessage()]
    assert len(ours) == 1 and "node 4" in ours[0], ours
    traces = [r for r in caplog.records if "Exception during" in r.getMessage()]
    # of two failures, in the frame and of the prompt that ran it; the others were the same
    assert len(traces) == 4
    until(lambda: not any(isinstance(f, kept.Hush) for f in logging.getLogger().filters))


def test_a_graph_that_cannot_even_begin_is_tried_a_hundred_times_in_few_lines(
    running, user, caplog, monkeypatch
):
    monkeypatch.setattr(kept._Growing, "MOST", 0.01)
    monkeypatch.setattr(kept._Growing, "FIRST", 0.01)
    monkeypatch.setattr(keeper, "_LOOK", 0.005)
    comfy, world = running

    async def work(http):
        page = await start(http, comfy, film())
        await page.wait(lambda: page.views)
        (user.parent.parent / "film.gif").unlink()
        world.fail = "keep"
        told = await one(http, comfy, lambda run: run["failures"] > 101)
        assert told["reason"].startswith("file: there is no film.gif") and told["node"] == "3"
        assert len(comfy.sessions._all) <= 9
        write_gif(user.parent.parent / "film.gif", 4, 40)
        world.fail = None
        await one(http, comfy, lambda run: run["state"] == "live")
        await end(http, comfy, told["run"])

    inprocess.live(work)
    ours = [r.getMessage() for r in caplog.records if "tried again" in r.getMessage()]
    assert 2 <= len(ours) <= 5 and "(100 times now)" in ours[-1], ours


def test_cancel_and_the_end_of_a_film_end_it_for_good(running, user):
    comfy, _ = running
    from execution import nodes as comfy_nodes

    async def work(http):
        page = await start(http, comfy, film())
        await page.wait(lambda: len(page.views) >= 2)
        comfy_nodes.interrupt_processing()
        await none(http, comfy)
        await page.wait(lambda: page.closed)
        assert page.states[-1]["reason"] == "Cancelled."
        page = await start(http, comfy, film(loop=False))
        await none(http, comfy)
        await page.wait(lambda: page.closed)
        assert page.state == "ended"
        # one that waits in the queue is taken out of it
        owned = await Client.start(http, comfy.url, graph(), "other")
        page = await start(http, comfy, film())
        await page.wait(lambda: page.state == "queued")
        assert (await end(http, comfy, page.begun["run"]))[0] == 200
        assert page.begun["prompt_id"] not in [item[1] for item in comfy.prompt_queue.queue]
        await owned.stop()

    inprocess.live(work)
    assert written(user) == []


def test_it_is_there_again_after_comfyuis_restart_where_that_is_wanted(user, monkeypatch):
    async def begun(http):
        page = await start(http, comfy, film("70"))
        await page.wait(lambda: len(page.views) >= 2)
        return page.begun["run"]

    async def there(http):
        told = await one(http, comfy, lambda run: run["state"] == "live")
        page = await attach(http, comfy, told["run"])
        await page.wait(lambda: len(page.views) >= 2)
        assert abs(grey(page.views[-1][0]) - 70) <= 1
        return page.begun["run"]

    async def asked(http):
        await asyncio.sleep(0.3)
        return await runs(http, comfy)

    def again(name, runs_, **settings):
        """A ComfyUI whose user folder has this in it, as it was left by one that was killed."""
        folder = user.parent.with_name(name)
        (folder / "livediffusion").mkdir(parents=True)
        (folder / "default").mkdir()
        text = json.dumps({"livediffusion": 1, "runs": runs_})
        (folder / "livediffusion" / "runs.json").write_text(text, "utf-8")
        text = json.dumps({"Comfy.Locale": "en", **settings})
        (folder / "default" / "comfy.settings.json").write_text(text, "utf-8")
        monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(folder))
        return inprocess.comfy()

    with inprocess.comfy() as (comfy, _):
        run = inprocess.live(begun)
        left = written(user)
    for i, value in enumerate((None, False, "yes")):
        with again(f"off {i}", left, **{kept._SETTING: value}) as (comfy, _):
            assert inprocess.live(asked) == []
    with again("on", left, **{kept._SETTING: True}) as (comfy, _):
        assert inprocess.live(there) == run
    monkeypatch.setenv(kept.STARTED, run)
    with again("command", left) as (comfy, _):
        assert inprocess.live(there) == run
    # a run of before that was cut off is not in the way of the command's own, whatever is set
    for name in ("none", "another"):
        monkeypatch.setenv(kept.STARTED, name)
        with again(name, left, **{kept._SETTING: True}) as (comfy, _):
            assert inprocess.live(asked) == []
            mine = inprocess.live(begun)
            assert mine != run and [one["run"] for one in inprocess.live(asked)] == [mine]
    # what cannot be read is said, and no reason not to start
    with again("bad", [{"run": "../x"}]) as (comfy, _):
        assert inprocess.live(asked) == []


def test_the_heartbeat_tells_the_age_of_the_last_frame_whatever_the_clock_does(
    running, user, monkeypatch
):
    comfy, world = running

    async def work(http):
        page = await start(http, comfy, film())
        await page.wait(lambda: len(page.views) >= 2)
        first = await asyncio.to_thread(until, lambda: heart(user)["runs"] and heart(user))
        assert first["process"] == os.getpid() and abs(first["written"] - time.time()) < 60
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() - 86_400)
        later = await asyncio.to_thread(
            until, lambda: heart(user)["beat"] > first["beat"] + 1 and heart(user)
        )
        assert 0 <= later["runs"][0]["last_frame_age_s"] < 5
        monkeypatch.setattr(time, "time", now)
        world.seconds = 1.5
        await asyncio.to_thread(
            until, lambda: heart(user)["runs"][0]["last_frame_age_s"] > 0.5
        )
        world.seconds = 0.0
        assert heart(user)["runs"][0]["state"] == "live"
        await page.stop()

    inprocess.live(work)


def test_a_full_disk_is_said_once_and_the_run_goes_on(running, user, monkeypatch, caplog):
    comfy, _ = running

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def work(http):
        replace = os.replace
        monkeypatch.setattr(os, "replace", full)
        url = f"{comfy.url}/livediffusion/start"
        status, begun = await inprocess.post(http, url, unattended(film()))
        assert status == 200 and "No space left" in begun["warning"]
        page = await Client.join(http, comfy.url, begun, "watch")
        await asyncio.to_thread(
            until, lambda: "heartbeat file cannot" in caplog.text and len(page.views) > 3
        )
        await asyncio.sleep(0.5)
        seen = len(page.views)
        await page.wait(lambda: len(page.views) > seen)
        # and nothing half written lies about, longer than it is written
        await asyncio.to_thread(until, lambda: list(user.iterdir()) == [])
        monkeypatch.setattr(os, "replace", replace)
        run = begun["run"]
        await asyncio.to_thread(until, lambda: (user / "runs.json").exists())
        assert [one["run"] for one in written(user)] == [run]
        await page.stop()

    inprocess.live(work)
    assert caplog.text.count("heartbeat file cannot") == 1


def test_a_stop_is_written_before_it_is_told_and_answered(running, user, monkeypatch):
    comfy, _ = running
    write, writes, free = kept.Files.write, [], threading.Event()

    def slow(self, runs_):
        writes.append(runs_)
        assert runs_ or free.wait(20)
        write(self, runs_)

    async def work(http):
        page = await start(http, comfy, film())
        await page.wait(lambda: page.views)
        monkeypatch.setattr(kept.Files, "write", slow)
        ended = asyncio.ensure_future(end(http, comfy, page.begun["run"]))
        await page.wait(lambda: page.closed and writes == [[]])
        # while it is written, nobody says that it is gone, and nobody begins it again
        assert [run["run"] for run in await runs(http, comfy)] == [page.begun["run"]]
        assert len(written(user)) == 1 and not ended.done()
        again = asyncio.ensure_future(end(http, comfy, page.begun["run"]))
        await asyncio.sleep(0.2)
        assert not ended.done() and not again.done()
        free.set()
        assert await ended == (200, {"warning": None}) and (await again)[0] == 200
        assert written(user) == [] == await runs(http, comfy)
        assert page.state == "ended" and len(comfy.prompt_queue.history) <= 1

    inprocess.live(work)


WRITER = """
import pathlib, sys
from trust import whole
graph, i = {str(n): {"class_type": "X" * 200, "inputs": {}} for n in range(300)}, 0
while True:
    i += 1
    run = {"run": "r", "name": str(i), "graph": graph, "since": 1.0}
    whole.write(pathlib.Path(sys.argv[1]), {"livediffusion": 1, "runs": [run]})
    if i == 3:
        print("on", flush=True)
"""


def test_killed_while_it_writes_leaves_the_file_before(tmp_path):
    path = tmp_path / "livediffusion" / "runs.json"
    for i in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=TESTS.parent
        )
        assert process.stdout.readline() == b"on\n"
        time.sleep(0.013 * i)
        process.kill()
        process.wait()
        process.stdout.close()
        (run,) = kept.Files(lambda: str(tmp_path)).read()
        assert int(run["name"]) >= 3
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0


def test_what_is_read_is_bounded(tmp_path):
    files = kept.Files(lambda: str(tmp_path))
    with pytest.raises(OSError):
        files.read()
    run = {"run": "r", "name": "n", "graph": {"1": {"class_type": "A", "inputs": {}}}, "since": 1}
    files.write([run])
    assert files.read() == [run]
    with pytest.raises(ValueError):
        files.write([{**run, "since": float("nan")}])
    assert files.read() == [run]
    bad = [
        [run, run], [{**run, "more": 1}], [{**run, "run": "../../x"}], [{**run, "graph": []}],
        [{**run, "since": -1}], [{**run, "name": "n" * 300}],
    ]  # fmt: skip
    for runs_ in bad:
        files.write(runs_)
        with pytest.raises(BadData):
            files.read()
    (tmp_path / "livediffusion" / "runs.json").write_bytes(b"[" * (boundary.KEPT.bytes + 1))
    with pytest.raises(BadData):
        files.read()
