"""Pages on a run that is kept: none is its owner, and each of them is told what a page needs."""

import asyncio

import folder_paths
import inprocess
import pytest
from films import write_gif
from inprocess import Client, graph
from livediffusion.live import keeper, rtc
from livediffusion.live.view import About
from livediffusion.live.viewer import Viewer
from livediffusion.trust import boundary

pytestmark = pytest.mark.comfy


@pytest.fixture
def running(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    monkeypatch.setattr(keeper, "_LOOK", 0.05)
    write_gif(tmp_path / "film.gif", 4, 40)
    with inprocess.comfy() as (comfy, _):
        yield comfy


async def kept(http, comfy):
    made = graph("kept", source="file", file="film.gif", fps=30)
    told = {**inprocess.begin(made), "unattended": True, "name": "Window display"}
    status, begun = await inprocess.post(http, f"{comfy.url}/livediffusion/start", told)
    assert status == 200, begun
    return begun


def test_every_page_knows_the_pictures_of_its_tracks(running, monkeypatch):
    """By WebRTC a picture comes without a word about it; that goes by the socket of each page."""
    heard = []
    tell = Viewer.tell

    def telling(viewer, message):
        heard.append((viewer, message["type"]))
        tell(viewer, message)

    monkeypatch.setattr(Viewer, "tell", telling)

    async def work(http):
        begun = await kept(http, running)
        for role in ("watch", "owner"):
            await Client.join(http, running.url, begun, role)
        run = running.sessions.get(begun["session"])
        while len(run.viewers) < 2:
            await asyncio.sleep(0.01)
        rtc._tell(run, 0, About(1, 0.0, 1, 0), 90)
        return {viewer for viewer, kind in heard if kind == "drawn"}, set(run.viewers)

    told, there = inprocess.live(work)
    assert told == there and len(there) == 2


def test_one_page_too_many_is_told_why(running):
    async def work(http):
        begun = await kept(http, running)
        run = running.sessions.get(begun["session"])
        for _ in range(boundary.MOST_LISTENERS):
            run.attach(Viewer(), False)
        for role in ("watch", "owner"):
            page = await Client.join(http, running.url, begun, role)
            await asyncio.wait_for(page._reader, 10)
            assert page.refused and "Too many" in page.refused[0], (role, page.refused)

    inprocess.live(work)
