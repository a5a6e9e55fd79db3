"""Others are kept out, and bad data is harmless."""

import asyncio
import json
import random
import time

import aiohttp
import inprocess
import pytest
from inprocess import Client, flat, graph, jpeg
from livediffusion.live.wire import LARGEST

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]


@pytest.fixture
def running():
    with inprocess.comfy() as both:
        yield both


def strangers(url):
    host = url.split("//")[1]
    port = host.split(":")[1]
    return {
        "foreign": {"Origin": "http://evil.example"},
        "null": {"Origin": "null"},
        "other port": {"Origin": "http://127.0.0.1:1"},
        "other name of this host": {"Origin": f"http://localhost:{port}"},
        "no port": {"Origin": "http://127.0.0.1"},
        "host is a prefix": {"Origin": f"http://{host}.evil.example"},
        "cross-site fetch": {"Sec-Fetch-Site": "cross-site"},
        "same-site fetch": {"Sec-Fetch-Site": "same-site"},
        "own origin, cross-site": {"Origin": url, "Sec-Fetch-Site": "cross-site"},
    }


def test_other_sites_are_refused_everywhere(running):
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        keys = {name: client.begun[name] for name in ("session", "token")}
        place = f"session={keys['session']}&token={keys['token']}"
        mjpeg = client.begun["views"][0]["mjpeg"]
        seen = {}
        for name, headers in strangers(comfy.url).items():
            posts = [("start", inprocess.begin(graph())), ("stop", keys),
                     ("update", {**keys, "prompt": graph("1"), "workflow": {}}),
                     ("snapshot?node=1&client_id=a", {})]  # fmt: skip
            answers = [
                (await inprocess.post(http, f"{comfy.url}/livediffusion/{route}", data,
                                      headers=headers))[0]
                for route, data in posts
            ]  # fmt: skip
            for route in (f"/livediffusion/stats?{place}", mjpeg):
                async with http.get(comfy.url + route, headers=headers) as reply:
                    answers.append(reply.status)
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(
                    f"{comfy.url}/livediffusion/frames?{place}&role=watch", headers=headers
                )
            seen[name] = {*answers, refused.value.status}
        # nothing of it reached the run
        await client.send(flat(90))
        await client.wait(lambda: client.views)
        own = {"Origin": comfy.url, "Sec-Fetch-Site": "same-origin"}
        async with http.get(f"{comfy.url}/livediffusion/stats?{place}", headers=own) as reply:
            assert reply.status == 200
        await client.stop()
        return seen

    seen = inprocess.live(work)
    assert seen == {name: {403} for name in strangers(comfy.url)}
    assert len(comfy.sessions._all) == 1


def test_a_missing_or_wrong_token_is_refused(running):
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        session = client.begun["session"]
        seen = set()
        for token in (None, "", "wrong", client.begun["token"][:-1], 5, ["x"], session):
            data = {"session": session, "token": token, "prompt": graph(), "workflow": {}}
            for route in ("stop", "update"):
                seen.add((await inprocess.post(http, f"{comfy.url}/livediffusion/{route}",
                                               data))[0])  # fmt: skip
            place = f"session={session}" + ("" if token is None else f"&token={token}")
            async with http.get(f"{comfy.url}/livediffusion/stats?{place}") as reply:
                seen.add(reply.status)
            for role in ("owner", "watch"):
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await http.ws_connect(f"{comfy.url}/livediffusion/frames?{place}&role={role}")
                seen.add(refused.value.status)
        async with http.get(f"{comfy.url}/livediffusion/mjpeg/guessed") as reply:
            seen.add(reply.status)
        gone = await inprocess.post(http, f"{comfy.url}/livediffusion/stop",
                                    {"session": "unknown", "token": "x"})  # fmt: skip
        await client.stop()
        over = await client.post("update", prompt=graph(), workflow={})
        return seen, gone[0], over[0]

    assert inprocess.live(work) == ({403}, 410, 410)


def test_bodies_that_are_no_json_are_refused(running):
    comfy, _ = running

    async def work(http):
        out = []
        for data in (b"", b"[]", b"{", b"\xff\xfe", b"null", b"5"):
            async with http.post(f"{comfy.url}/livediffusion/start", data=data) as reply:
                out.append(reply.status)
        return out

    assert inprocess.live(work) == [400] * 6


def bad_frame(rng):
    """(kind, bytes): a whole message, wrong in one way."""
    good = jpeg(flat(rng.randrange(200)))
    header = inprocess.Packet(1, 1, 0, rng.randrange(2**32), 1.7e9, 0, 0, b"").packed()
    bomb = bytearray(good)
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = (10_000).to_bytes(2, "big") * 2
    kinds = {
        "truncated": header + good[: rng.randrange(1, len(good) // 2)],
        "wrong type": bytes([rng.choice([0, 2, 3, 255])]) + header[1:] + good,
        "wrong codec": header[:1] + bytes([rng.choice([0, 2, 99])]) + header[2:] + good,
        "nothing": b"",
        "half a header": header[: rng.randrange(1, 24)],
        "no picture": header,
        "noise": header + rng.randbytes(rng.randrange(1, 3000)),
        "100 megapixels": header + bytes(bomb),
        "a png": header + b"\x89PNG\r\n\x1a\n" + rng.randbytes(200),
    }
    return rng.choice(sorted(kinds.items()))


@pytest.mark.slow
def test_a_thousand_bad_frames_do_not_stop_a_run(running):
    """Each is refused and counted; good ones of any size between them are shown."""
    comfy, _ = running
    rng = random.Random(0)

    async def work(http):
        client = await Client.start(http, comfy.url, graph(fps=120))
        bad = {}
        for i in range(1000):
            kind, data = bad_frame(rng)
            bad[kind] = bad.get(kind, 0) + 1
            await client.socket.send_bytes(data)
            # each is looked at before the next comes, or the later would replace the earlier
            await client.wait(lambda n=i: len(client.refused) > n)
            if i % 50 == 0:
                seen = len(client.views)
                await client.send(flat(i % 200, rng.choice([1, 16, 32, 33, 500])))
                await client.wait(lambda n=seen: len(client.views) > n)
        await client.socket.send_bytes(b"\1" + b"x" * LARGEST)
        await client.wait(lambda: any("larger than" in reason for reason in client.refused))
        await client.wait(lambda: client.stats.get("refused") == 1001)
        await client.send(flat(77))
        await client.wait(lambda: inprocess.grey(client.views[-1][0]) == 77)
        await client.stop()
        return client, bad

    client, bad = inprocess.live(work)
    assert len(bad) == 9 and sum(bad.values()) == 1000
    assert client.stats["refused"] == 1001
    assert len(client.views) == 21


def test_messages_that_make_no_sense_are_left_alone(running):
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        for text in ("", "{", "[]", "5", '"x"', "{}", '{"type":"shown"}', "null",
                     '{"type":"shown","view":"a"}', '{"type":"shown","latency_ms":"x"}',
                     '{"type":"shown","view":1e400,"latency_ms":1e400}', '{"type":"compare"}',
                     '{"type":"compare","view":[0],"on":true}',
                     '{"type":"compare","view":99,"on":true}'):  # fmt: skip
            await client.socket.send_str(text)
        await client.send(flat(50))
        await client.wait(lambda: client.views)
        await asyncio.sleep(0.05)
        assert not client.closed
        await client.stop()

    inprocess.live(work)


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        ({"token": "\u00e4"}, {}, 403),
        ({"token": "\ud800"}, {}, 400),
        ({"session": "\u00e4"}, {}, 403),
        ({}, {"Origin": "http://[::1"}, 403),
        ({}, {"Content-Type": "application/json; charset=nonsense"}, 410),
        ({"prompt": {"1": {"class_type": ["LiveView"], "inputs": {}}}}, {}, 400),
        ({"prompt": {"1": {"class_type": {}, "inputs": {}}}}, {}, 400),
        ({"prompt": {"1": {"class_type": "LiveView", "inputs": {}, "_meta": 5}}}, {}, 400),
        ({"prompt": {"1": {"class_type": "LiveView", "inputs": {"image": [[], 0]}}}}, {}, 400),
        ({"prompt": {"1": {"class_type": "LiveView", "inputs": {"image": [{}, {}]}}}}, {}, 400),
        ({"prompt": {"livediffusion-run": {"class_type": "LiveView", "inputs": {}}}}, {}, 400),
        ({"prompt": {"1": {"class_type": "LiveView", "inputs": {"quality": 1e400}}}}, {}, 400),
        ({"workflow": {"id": float("nan")}}, {}, 400),
        ({"workflow": "w"}, {}, 400),
        ({"client_id": ["a"]}, {}, 400),
    ],
    ids=str,
)
def test_what_is_wrong_is_no_error_of_ours(running, caplog, data, headers, status):
    """Refused with a sentence: no 500, no traceback, in the log or in the answer."""
    comfy, _ = running
    route = "stop" if not {"prompt", "workflow", "client_id"} & set(data) else "start"
    good = inprocess.begin(graph()) if route == "start" else {"session": "s", "token": "t"}
    text = json.dumps({**good, **data})

    async def work(http):
        url, told = f"{comfy.url}/livediffusion/{route}", {"Content-Type": "application/json"}
        async with http.post(url, data=text, headers={**told, **headers}) as reply:
            return reply.status, await reply.text()

    answered, words = inprocess.live(work)
    assert answered == status
    assert json.loads(words)["error"]["message"] and "traceback" not in words.lower()
    assert not [record for record in caplog.records if record.exc_info]


def test_deep_json_is_refused_in_requests_and_messages(running, caplog):
    comfy, _ = running
    deep = "[" * 100_000 + "]" * 100_000

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        begun = json.dumps(inprocess.begin("DEEP")).replace('"DEEP"', deep)
        async with http.post(f"{comfy.url}/livediffusion/start", data=begun) as reply:
            status = reply.status
        for text in (deep, '{"type":"shown","view":' + deep + "}", "[" * 2_000_000):
            await client.socket.send_str(text)
        await client.send(flat(50))
        await client.wait(lambda: client.views)
        await client.stop()
        return status

    assert inprocess.live(work) == 400
    assert not [record for record in caplog.records if record.exc_info]


def test_a_packed_request_is_not_unpacked(running):
    """A little may be much; and aiohttp waits for ever for the end of one that is cut."""
    import zlib

    comfy, _ = running

    async def work(http):
        out = []
        for data in (zlib.compress(b" " * (100 * 2**20)), b"[" * 100_000 + b"]" * 100_000):
            async with http.post(f"{comfy.url}/livediffusion/start", data=data,
                                 headers={"Content-Encoding": "deflate"}) as reply:  # fmt: skip
                out.append((reply.status, "packed" in await reply.text()))
        return out

    assert inprocess.live(work) == [(400, True)] * 2


def test_a_site_that_comfyui_lets_in_may_talk(running, monkeypatch):
    """--enable-cors-header names it."""
    from livediffusion.live import guard

    comfy, _ = running
    site = {"Origin": "https://page.example", "Sec-Fetch-Site": "cross-site"}

    async def work(http):
        out = []
        for allowed in (None, "https://page.example", "https://other.example", "*"):
            monkeypatch.setattr(guard.args, "enable_cors_header", allowed)
            url = f"{comfy.url}/livediffusion/start"
            out.append((await inprocess.post(http, url, inprocess.begin(graph()), headers=site))[0])
        return out

    assert inprocess.live(work) == [403, 200, 403, 200]


def test_floods_end_at_a_bound(running):
    """Runs of one page, listeners of one run, views of one graph."""
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        begun = [await inprocess.post(http, f"{comfy.url}/livediffusion/start",
                                      inprocess.begin(graph())) for _ in range(9)]  # fmt: skip
        watching = []
        place = "&".join(f"{name}={client.begun[name]}" for name in ("session", "token"))
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            for _ in range(40):
                watching.append(
                    await http.ws_connect(f"{comfy.url}/livediffusion/frames?{place}&role=watch")
                )
        for _ in range(2000):
            for on in (True, False):
                await client.compare(on=on)
        await client.send(flat(50))
        await client.wait(lambda: client.views)
        for socket in watching:
            await socket.close()
        many = {**graph(), **{f"v{i}": inprocess.view(["4", 0]) for i in range(40)}}
        views = await client.post("update", prompt=many, workflow={})
        for _, one in begun:
            if "session" in one:
                keys = {name: one[name] for name in ("session", "token")}
                await inprocess.post(http, f"{comfy.url}/livediffusion/stop", keys)
        await client.stop()
        again = await Client.start(http, comfy.url, graph())
        await again.stop()
        return [status for status, _ in begun], refused.value.status, len(watching), views

    begun, refused, watching, views = inprocess.live(work)
    assert begun == [200] * 7 + [400] * 2
    assert (refused, watching) == (429, 31)
    assert views[0] == 400 and "41 Live Views" in views[1]["error"]["message"]


@pytest.mark.parametrize("extra", [["nobody", 0], ["nobody", 10**9], ["5", 0], ["4", 0]], ids=str)
def test_a_link_that_comfyui_does_not_check_is_checked(running, extra):
    """Of an input that the class does not declare; the executor would follow it, and fail."""
    comfy, _ = running
    bad = graph()
    bad["4"]["inputs"]["more"] = extra

    async def work(http):
        url = f"{comfy.url}/livediffusion/start"
        refused = await inprocess.post(http, url, inprocess.begin(bad))
        client = await Client.start(http, comfy.url, graph())
        edited = await client.post("update", prompt=bad, workflow={})
        await client.send(flat(50))
        await client.wait(lambda: client.views)
        await client.stop()
        return refused, edited

    for status, answer in inprocess.live(work):
        assert status == 400 and set(answer["node_errors"]) <= {"4", "5"}
        assert answer["node_errors"]


def test_a_long_graph_is_cut_at_once(running):
    """A chain that ComfyUI can still check, in the order that is worst."""
    comfy, _ = running
    long, image = graph(), ["3", 0]
    for i in range(300):
        long[f"n{i}"] = {"class_type": "TestWork", "inputs": {"image": image, "cond": ["2", 0]}}
        image = [f"n{i}", 0]
    long = dict(reversed({**long, "5": inprocess.view(image)}.items()))
    took = []

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        for _ in range(3):
            began = time.process_time()
            status, _ = await client.post("update", prompt=long, workflow={})
            took.append(time.process_time() - began)
            assert status == 200
        await client.stop()

    inprocess.live(work)
    assert max(took) < 1


@pytest.mark.parametrize(
    "sent",
    [
        {"Origin": "http://studio.lan:8080", "Host": "studio.lan:8080"},
        {"Origin": "http://studio.lan:8080", "Host": "studio.lan"},
        {"Origin": "https://studio.lan", "Host": "studio.lan", "X-Forwarded-Proto": "https"},
        {"Origin": "https://studio.lan", "Host": "inner:8188", "X-Forwarded-Host": "studio.lan"},
        {"Origin": "http://[::1]:8080", "Host": "[::1]"},
    ],
    ids=str,
)
def test_a_page_behind_a_proxy_is_live(running, sent):
    """With the headers that nginx gave in front of it; another site's page still may not."""
    comfy, _ = running

    async def work(http):
        url = f"{comfy.url}/livediffusion"
        status, begun = await inprocess.post(http, f"{url}/start", inprocess.begin(graph()),
                                             headers=sent)  # fmt: skip
        assert status == 200, begun
        place = f"session={begun['session']}&token={begun['token']}&role=owner"
        socket = await http.ws_connect(f"{url}/frames?{place}", headers=sent)
        client = Client(http, comfy.url, begun, socket)
        await client.send(flat(50))
        await client.wait(lambda: client.views)
        async with http.get(comfy.url + begun["views"][0]["mjpeg"], headers=sent) as reply:
            first = await asyncio.wait_for(reply.content.readany(), 20)
        foreign = {**sent, "Origin": "http://evil.example"}
        refused = await inprocess.post(http, f"{url}/start", inprocess.begin(graph()),
                                       headers=foreign)  # fmt: skip
        await client.stop()
        return first, refused[0]

    first, refused = inprocess.live(work)
    assert first.startswith(b"--livediffusion") and refused == 403


def test_pictures_go_on_whatever_a_camera_says_of_the_time(running):
    """What its page then tells of their latency is out of bounds; that it has shown them counts."""
    comfy, _ = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        for i in range(6):
            seen = len(client.views)
            await client.send(flat(10 * i), captured=0.0 if i % 2 else 9e11)
            await client.wait(lambda seen=seen: len(client.views) > seen)
        await client.stop()

    inprocess.live(work)
