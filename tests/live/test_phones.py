"""A phone's key: one phone, one Live Camera, one run, and nothing else."""

import asyncio
import re

import aiohttp
import inprocess
import numpy as np
import pytest
from ends import count, counted
from inprocess import Client, camera, graph, jpeg, live, post, view
from livediffusion.live import reach, sockets
from livediffusion.live.reach import Asked, address
from livediffusion.live.wire import CAMERA, Packet
from PIL import Image

pytestmark = [pytest.mark.comfy]


@pytest.fixture(scope="module")
def comfy():
    with inprocess.comfy() as (running, _):
        yield running


class Phone:
    """A phone's page, without a browser."""

    def __init__(self, socket):
        self.socket, self.told, self.pictures, self.number = socket, [], 0, 0
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def come(cls, http, url, key, mark="mine"):
        place = f"{url}/livediffusion/phone/{key}/frames?phone={mark}"
        return cls(await http.ws_connect(place))

    async def _read(self):
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                self.pictures += 1
            else:
                self.told.append(message.json())

    async def send(self, picture, place=0):
        self.number += 1
        packet = Packet(CAMERA, 1, place, self.number, 1.0, 0, 0, jpeg(picture))
        await self.socket.send_bytes(packet.packed())

    def heard(self, kind):
        return [one for one in self.told if one["type"] == kind]

    async def gone(self):
        await asyncio.wait_for(self._reader, 20)
        return self.socket.close_code


def phone_graph(**settings):
    wide = {"source": "phone", "width": 96, "height": 96, **settings}
    return {"3": camera(**wide), "5": view(["3", 0])}


def key_in(begun, node="3"):
    place = next(one for one in begun["cameras"] if one["node"] == node)
    return re.search(r"/livediffusion/phone/([\w-]+)/$", place["phone"]["url"]).group(1)


def shown(client):
    def number(packet):
        return count(np.asarray(Image.open(inprocess.io.BytesIO(packet.payload))))

    return [number(packet) for packet, _ in client.views]


def test_a_phones_pictures_go_through_the_graph_in_order(comfy):
    async def work(http):
        client = await Client.start(http, comfy.url, phone_graph())
        states = lambda: client.stats.get("sources", {}).get("3", {}).get("state")  # noqa: E731
        await client.wait(lambda: states() == "waiting")
        phone = await Phone.come(http, comfy.url, key_in(client.begun))
        await client.wait(lambda: states() == "connected")
        for number in range(1, 60):
            await phone.send(counted(number))
            await asyncio.sleep(0.01)
        await client.wait(lambda: client.views and shown(client)[-1] == 59)
        numbers = [one for one in shown(client) if one != 0]  # black until the first
        assert None not in numbers and numbers == sorted(set(numbers)) and len(numbers) > 20
        assert states() in ("connected", "giving")
        # how fast and how large, how the run is, what was taken: and no picture
        assert phone.heard("pace")[-1]["width"] == 96
        assert all(one["refused"] is None for one in phone.heard("received"))
        assert {one["state"] for one in phone.heard("state")} >= {"live"}
        assert phone.pictures == 0 and {one["type"] for one in phone.told} - {"alive"} == {
            "state", "pace", "received"}  # fmt: skip
        await client.stop()
        assert await phone.gone() == 4410
        assert phone.heard("state")[-1] == {"type": "state", "state": "ended"}
        # the key died with the run
        late = await Phone.come(http, comfy.url, key_in(client.begun))
        assert await late.gone() == 4410
        assert late.heard("refused")[0]["why"] == "unknown"

    live(work)


def test_the_first_phone_is_the_only_one_and_may_come_back(comfy):
    async def work(http):
        client = await Client.start(http, comfy.url, phone_graph())
        key = key_in(client.begun)
        first = await Phone.come(http, comfy.url, key, "first")
        await client.wait(lambda: first.heard("state"))
        second = await Phone.come(http, comfy.url, key, "second")
        assert await second.gone() == 4409
        assert second.heard("refused")[0]["why"] == "taken"
        # its connection broke: it is the same phone, and the other still is not
        await first.socket.close()
        again = await Phone.come(http, comfy.url, key, "first")
        other = await Phone.come(http, comfy.url, key, "second")
        assert await other.gone() == 4409
        await again.send(counted(7))
        await client.wait(lambda: client.views and 7 in shown(client))
        # one that comes back while its old connection is not known to be gone takes its place
        third = await Phone.come(http, comfy.url, key, "first")
        assert await again.gone() == 4409
        # another code lets it go, and gives room to another phone
        status, told = await client.post("phone", node="3")
        assert status == 200 and await third.gone() == 4410
        assert key_in({"cameras": [{"node": "3", **told}]}) != key
        new = await Phone.come(http, comfy.url, key_in({"cameras": [{"node": "3", **told}]}), "new")
        await client.wait(lambda: new.heard("state"))
        await client.stop()

    live(work)


def test_a_phone_that_is_told_nothing_hears_that_its_connection_is_there(comfy, monkeypatch):
    monkeypatch.setattr(sockets, "_TOLD", 0.1)

    async def work(http):
        client = await Client.start(http, comfy.url, phone_graph())
        phone = await Phone.come(http, comfy.url, key_in(client.begun))
        await client.wait(lambda: len(phone.heard("alive")) > 3)
        # whom the figures reach needs none
        monkeypatch.setattr(sockets, "_TOLD", 5.0)
        await phone.send(counted(5))
        await client.wait(lambda: client.views and 5 in shown(client))
        await client.stop()
        assert await phone.gone() == 4410

    live(work)


def test_an_edit_that_removes_it_ends_its_key_and_one_that_keeps_it_does_not(comfy):
    async def work(http):
        client = await Client.start(http, comfy.url, phone_graph())
        key = key_in(client.begun)
        phone = await Phone.come(http, comfy.url, key)
        await phone.send(counted(1))
        await client.wait(lambda: client.views)
        status, told = await client.post("update", prompt=phone_graph(width=64), workflow={})
        assert status == 200 and key_in(told) == key
        await phone.send(counted(2))
        await client.wait(lambda: 64 in [pace["width"] for pace in phone.heard("pace")])
        # to the page's camera; the phone's key is over once no graph that may run has it
        without = phone_graph(source="browser")
        status, told = await client.post("update", prompt=without, workflow={})
        assert status == 200 and "phone" not in told["cameras"][0]
        for number in range(30):
            await client.send(counted(number))
            await asyncio.sleep(0.02)
        assert await phone.gone() == 4410
        await client.stop()

    live(work)


def test_a_key_does_one_thing(comfy):
    async def work(http):
        client = await Client.start(http, comfy.url, phone_graph())
        key = key_in(client.begun)
        # it is no token
        for route in ("stop", "update", "picture", "phone"):
            body = {"session": client.begun["session"], "token": key, "prompt": {}, "node": "3"}
            status, _ = await post(http, f"{comfy.url}/livediffusion/{route}", body)
            assert status in (400, 403), route
        place = f"session={client.begun['session']}&token={key}&role=owner"
        async with http.get(f"{comfy.url}/livediffusion/frames?{place}") as reply:
            assert reply.status == 403
        # and its socket takes no orders, and pictures for this one Live Camera only
        phone = await Phone.come(http, comfy.url, key)
        await phone.socket.send_json({"type": "compare", "view": 0, "on": True})
        await phone.send(counted(3), place=1)
        await client.wait(lambda: phone.heard("received"))
        first = phone.heard("received")[0]
        assert first["refused"] and first["camera"] == 1
        await phone.socket.send_bytes(b"no picture")
        await client.wait(lambda: len(phone.heard("received")) == 2)
        assert phone.pictures == 0
        # another node than the phone's has no code to be made anew
        status, told = await client.post("phone", node="5")
        assert status == 400 and "phone" in told["error"]["message"]
        await client.stop()

    live(work)


def test_its_page_is_served_and_nothing_else_is(comfy):
    async def work(http):
        async def get(path, **headers):
            place = f"{comfy.url}/livediffusion/phone/{path}"
            async with http.get(place, headers=headers) as reply:
                return reply.status, reply.headers, await reply.text()

        # a link in somebody's chat leads there, and another site's frame shows nothing
        status, headers, text = await get("x/", **{"Sec-Fetch-Site": "cross-site"})
        assert status == 200 and "phone.mjs" in text
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
        for file in ("phone/phone.mjs", "phone/style.css", "live/worker.mjs", "live/camera.mjs"):
            status, headers, _ = await get(f"x/{file}")
            assert status == 200 and headers["Cache-Control"] == "no-store", file
        for file in ("live/session.mjs", "phone/index.html", "live/..%2f..%2frun.py", "docs/x.md"):
            status, _, _ = await get(f"x/{file}")
            assert status in (403, 404), file
        # what its modules import is what is served
        root = inprocess.live_nodes.pathlib.Path(reach.__file__).parents[1] / "web"
        text = (root / "phone" / "phone.mjs").read_text("utf-8")
        for name in re.findall(r"'\.\./(live/\w+\.mjs)'", text):
            assert (await get(f"x/{name}"))[0] == 200, name
        status, _, _ = await get("x/frames", **{"Sec-Fetch-Site": "cross-site"})
        assert status == 403
        assert (await get("x/frames"))[0] == 400  # a phone says what it calls itself

    live(work)


@pytest.mark.parametrize(
    ("scheme", "host", "listens", "url", "trouble"),
    [
        ("https", "192.168.1.5:8188", "0.0.0.0", "https://192.168.1.5:8188/p", None),
        ("https", "comfy.example", "127.0.0.1", "https://comfy.example/p", None),
        ("https", "[2001:db8::5]:8188", "::", "https://[2001:db8::5]:8188/p", None),
        ("http", "192.168.1.5:8188", "0.0.0.0", "http://192.168.1.5:8188/p", "insecure"),
        ("https", "localhost:8188", "0.0.0.0,::", "https://10.0.0.7:8188/p", None),
        ("https", "127.0.0.1:8188", "10.0.0.9", "https://10.0.0.9:8188/p", None),
        ("http", "localhost:8188", "0.0.0.0", "http://10.0.0.7:8188/p", "insecure"),
        ("http", "localhost:8188", "127.0.0.1", "http://localhost:8188/p", "local"),
        ("https", "127.0.0.1:8188", "127.0.0.1,::1", "https://127.0.0.1:8188/p", "local"),
        ("https", "not a host", "127.0.0.1", "https://localhost/p", "local"),
    ],
)
def test_where_a_phone_reaches_the_server(monkeypatch, scheme, host, listens, url, trouble):
    monkeypatch.setattr(reach, "own_address", lambda: "10.0.0.7")
    assert address(Asked(scheme, host, listens), "/p") == (url, trouble)


def test_a_proxy_says_how_it_was_asked():
    headers = {"Host": "127.0.0.1:8188", "X-Forwarded-Host": "comfy.example, inner",
               "X-Forwarded-Proto": "https"}  # fmt: skip
    assert reach.asked(headers, "http")[:2] == ("https", "comfy.example")
    assert reach.asked({**headers, "X-Forwarded-Proto": "javascript"}, "http").scheme == "http"


def test_a_code_holds_the_address_and_is_none_without_segno(monkeypatch):
    segno = pytest.importorskip("segno")
    made = reach.told(Asked("https", "10.0.0.7:8188", "0.0.0.0"), "/livediffusion/phone/k/")
    wanted = segno.make("https://10.0.0.7:8188/livediffusion/phone/k/", error="m", micro=False)
    assert made["qr"] == wanted.svg_data_uri(border=3, light="#fff")
    assert made["qr"].startswith("data:image/svg+xml")
    reach.code.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "segno", None)
    made = reach.told(Asked("https", "10.0.0.7:8188", "0.0.0.0"), "/livediffusion/phone/k/")
    assert made == {"url": "https://10.0.0.7:8188/livediffusion/phone/k/", "qr": None,
                    "trouble": None}  # fmt: skip
    reach.code.cache_clear()
    # and where no phone can come, none is shown
    assert reach.told(Asked("https", "localhost", "127.0.0.1"), "/p")["qr"] is None


def test_two_cameras_have_two_keys(comfy):
    async def work(http):
        both = {**phone_graph(), "7": camera(source="phone"), "8": view(["7", 0])}
        client = await Client.start(http, comfy.url, both)
        keys = {key_in(client.begun, "3"), key_in(client.begun, "7")}
        assert len(keys) == 2
        # the graph of the tests that have none is told of none
        await client.stop()
        plain = await Client.start(http, comfy.url, graph())
        assert "phone" not in plain.begun["cameras"][0]
        await plain.stop()

    live(work)
