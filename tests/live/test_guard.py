"""Others are kept out, and bad data is harmless."""

import asyncio
import random

import aiohttp
import inprocess
import pytest
from inprocess import Client, flat, graph, jpeg
from livediffusion.live.wire import LARGEST

pytestmark = pytest.mark.comfy


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
