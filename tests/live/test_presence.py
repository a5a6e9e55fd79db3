"""Whether a page is there: one that is held up stays, one that is gone does not."""

import asyncio
import time

import inprocess
import pytest
from inprocess import Client, flat, graph
from livediffusion.live import session, sockets

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

ASKED, MISSED = 0.3, 0.6
LIMIT = ASKED * (sockets._UNANSWERED + 1)  # of silence


@pytest.fixture
def comfy(monkeypatch):
    monkeypatch.setattr(sockets, "_ASKED", ASKED)
    monkeypatch.setattr(session, "OWNER_MISSED", MISSED)
    with inprocess.comfy() as (running, _):
        yield running


async def begun(http, comfy):
    """A page whose run is live."""
    client = await Client.start(http, comfy.url, graph())
    while not client.views:
        await client.send(flat(client.sequence % 250))
        await asyncio.sleep(0.01)
    return client


async def goes_on(client):
    seen = len(client.views)
    while len(client.views) < seen + 2:
        assert client.closed is None, client.states[-1]
        await client.send(flat(client.sequence % 250))
        await asyncio.sleep(0.01)
    assert (await client.post("update", prompt=graph("other"), workflow={}))[0] == 200
    await client.stop()


def test_who_is_held_up_is_there(comfy):
    """On a busy machine neither side answers for a while, and none of them is gone."""

    async def work(http):
        client = await begun(http, comfy)
        time.sleep(LIMIT / 2)  # the page, for longer than it takes to ask it
        await asyncio.sleep(ASKED)
        assert client.closed is None
        # the server, for longer than a page may be silent: what it is sent waits unread
        comfy.loop.call_soon_threadsafe(time.sleep, 1.2 * LIMIT)
        await asyncio.sleep(1.2 * LIMIT + ASKED)
        assert client.closed is None
        await goes_on(client)

    inprocess.live(work)


def test_who_answers_no_more_is_gone(comfy):
    """Its machine is off, or its cable: nothing says goodbye, and nobody hears one."""

    async def work(http):
        answer = await inprocess.post(
            http, f"{comfy.url}/livediffusion/start", inprocess.begin(graph())
        )
        place = f"session={answer[1]['session']}&token={answer[1]['token']}&role=owner"
        # a socket that does not answer
        url = f"{comfy.url}/livediffusion/frames?{place}"
        silent = await http.ws_connect(url, autoping=False)
        run = comfy.sessions.get(answer[1]["session"])
        began = time.monotonic()
        await asyncio.to_thread(inprocess.until, lambda: run.owner is not None)
        await asyncio.to_thread(inprocess.until, lambda: run.over)
        assert time.monotonic() - began > LIMIT
        assert run.reason == "The page that started it is gone."
        await silent.close()

    inprocess.live(work)


def test_who_comes_back_while_the_server_stands_still_is_in_time(comfy):
    """Its new connection waits to be taken when the time without it is over."""

    async def work(http):
        client = await begun(http, comfy)
        run = comfy.sessions.get(client.begun["session"])
        await client.socket.close()
        await client.wait(lambda: run.owner is None)
        comfy.loop.call_soon_threadsafe(time.sleep, 2 * MISSED)
        again = await Client.join(http, comfy.url, client.begun)
        again.sequence = 100
        await goes_on(again)

    inprocess.live(work)
