"""Views as MJPEG streams: whose an address is, and what FFmpeg makes of the parts."""

import asyncio
import contextlib
import http.server
import threading

import av
import inprocess
import pytest
from aiohttp import ClientError, web
from inprocess import Client, flat, graph, jpeg
from livediffusion.live import routes
from livediffusion.live.sinks.mjpeg import CONTENT_TYPE, Keys, Parts, secret

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

BROWSER = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/156.0 OBS/32"
MINE = "a secret of this page"


@contextlib.contextmanager
def streaming(pictures, go):
    """An address whose pictures, JPEG, each go out at a `go()`; the last stays the last."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            parts = Parts(self.headers.get("User-Agent", ""))
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.end_headers()
            with contextlib.suppress(OSError):
                for data in pictures:
                    self.wfile.write(parts.part(data))
                    self.wfile.flush()
                    go()
                over.wait(60)

        def log_message(self, *args):
            pass

    over = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_ffmpeg_has_each_picture_before_the_next_is_sent():
    """What OBS's media source and VLC do: a part is taken by its length."""
    taken = threading.Semaphore(3)  # av looks at some before it begins
    greys = list(range(20, 240, 20))
    pictures = [jpeg(flat(grey, 64)) for grey in greys]
    with streaming(pictures, lambda: taken.acquire(timeout=20)) as address:
        options = {"probesize": "2048", "analyzeduration": "0", "rw_timeout": "15000000"}
        got = []
        with av.open(address, format="mpjpeg", options=options) as film:
            for packet in film.demux(video=0):
                (frame,) = packet.decode() or (None,)
                got.append(round(float(frame.to_ndarray(format="rgb24").mean())))
                taken.release()
                if len(got) == len(greys):
                    break
    assert got == pytest.approx(greys, abs=1)


def test_bytes_for_browsers_and_for_others():
    one, other = jpeg(flat(1)), jpeg(flat(200))
    for agent, length in (
        (BROWSER, False),
        ("Lavf/62.3.100", True),
        ("VLC/3.0.20", True),
        ("", True),
    ):
        parts = Parts(agent)
        whole = parts.part(one) + parts.part(other)
        head, first, second, rest = whole.split(b"--livediffusion\r\n")
        assert head == b""
        for part, data in ((first, one), (second, other)):
            headers, _, body = part.partition(b"\r\n\r\n")
            assert body == data + b"\r\n" and b"Content-Type: image/jpeg" in headers
            assert (f"Content-Length: {len(data)}".encode() in headers) == length
        # the header of the next part is what makes Chromium show this one
        assert rest == (b"" if length else b"Content-Type: image/jpeg\r\n\r\n")


@pytest.mark.timeless
def test_a_key_is_known_by_itself_and_made_of_all_its_parts():
    keys, others = Keys(), Keys()
    parts = [
        (a, b, c) for a in ("s1", "s2", "") for b in ("w1", "w2", "") for c in ("5", "6", "5:6")
    ]
    made = [keys.key(*one) for one in parts]
    assert len(set(made)) == len(parts) and made == [keys.key(*one) for one in parts]
    assert all(keys.known(key) and not others.known(key) for key in made)
    strange = ["", ".", "a.b", "\u00e4.\u00fc", "\udcff.\udcff", made[0] + "=", made[0][1:],
               made[0].split(".")[0] + "." + made[1].split(".")[1]]  # fmt: skip
    assert not any(map(keys.known, strange))


@pytest.mark.timeless
@pytest.mark.parametrize(
    "sent", [None, 1, [], {}, "", "short", "x" * 201, "with a space" * 3, "\u00e4" * 20]
)
def test_what_is_no_secret_gives_a_fresh_one(sent):
    got = {secret(sent) for _ in range(3)}
    assert len(got) == 3 and not any(sent == one for one in got)
    assert secret("x" * 16) == "x" * 16


async def part(reply):
    """The next picture of a stream with lengths."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += await reply.content.readexactly(1)
    length = int(head.split(b"Content-Length: ")[1].split(b"\r")[0])
    return (await reply.content.readexactly(length + 2))[:-2]


def grey(data):
    return inprocess.grey(inprocess.Packet(*[0] * 7, data))


@pytest.fixture
def running():
    with inprocess.comfy() as both:
        yield both


async def start(http, url, made, workflow, secret):
    data = {**inprocess.begin(made, workflow), "secret": secret}
    status, begun = await inprocess.post(http, f"{url}/livediffusion/start", data)
    assert status == 200
    return await Client.join(http, url, begun)


async def feeding(client):
    while not client.closed:
        await client.send(flat(1))
        await asyncio.sleep(0.05)


def test_an_address_is_its_owners_and_outlives_a_run(running):
    comfy, _ = running

    async def work(http):
        mine = "mine-" * 5
        first = await start(http, comfy.url, graph("60"), "one", mine)
        address = first.begun["views"][0]["mjpeg"]
        got = []
        async with http.get(comfy.url + address) as reply:
            assert reply.content_type == "multipart/x-mixed-replace"
            await first.send(flat(1))
            got.append(grey(await asyncio.wait_for(part(reply), 5)))
            await first.stop()
            # a stranger who names the same workflow, and even starts 300 runs of it
            stranger = await start(http, comfy.url, graph("180"), "one", None)
            theirs = [comfy.sessions.key(comfy.sessions.get(stranger.begun["session"]), str(i))
                      for i in range(300)]  # fmt: skip
            assert stranger.begun["views"][0]["mjpeg"] != address
            assert not {address.rsplit("/")[-1]} & set(theirs)
            feed = asyncio.create_task(feeding(stranger))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(part(reply), 1.2)  # none of theirs comes to me
            await stranger.stop()
            await feed
            second = await start(http, comfy.url, graph("120"), "one", mine)
            assert second.begun["views"][0]["mjpeg"] == address
            other = await start(http, comfy.url, graph("180"), "two", mine)
            assert other.begun["views"][0]["mjpeg"] != address
            feed = asyncio.create_task(feeding(second))
            # the first frame may be over before the stream has found the new run
            got.append(grey(await asyncio.wait_for(part(reply), 5)))
            await second.stop()
            await feed
            await other.stop()
        return got

    assert inprocess.live(work) == pytest.approx([60, 120], abs=1)


def test_a_player_that_takes_nothing_loses_its_stream(running, monkeypatch):
    """A connection that is dead, of which nobody hears: it would stay one of its listeners."""
    comfy, _ = running

    async def never(response, part):
        await asyncio.Event().wait()

    monkeypatch.setattr(web.StreamResponse, "write", never)
    monkeypatch.setattr(routes, "_TAKEN", 0.3)

    async def work(http):
        client = await start(http, comfy.url, graph("90"), "one", None)
        listeners = comfy.sessions.get(client.begun["session"]).viewers
        async with http.get(comfy.url + client.begun["views"][0]["mjpeg"]) as reply:
            await client.wait(lambda: len(listeners) == 2)
            feed = asyncio.create_task(feeding(client))
            with pytest.raises(ClientError):
                await asyncio.wait_for(reply.content.read(), 5)
        await client.wait(lambda: len(listeners) == 1)
        await client.stop()
        await feed

    inprocess.live(work)


def test_a_late_viewer_of_a_still_scene_gets_the_picture(running):
    comfy, _ = running

    async def work(http):
        client = await start(http, comfy.url, graph("90"), "one", None)
        await client.send(flat(1))
        await client.wait(lambda: client.views)
        await asyncio.sleep(0.3)
        async with http.get(comfy.url + client.begun["views"][0]["mjpeg"]) as reply:
            got = grey(await asyncio.wait_for(part(reply), 5))
            # the view goes, and is there again: the stream goes on with the new one
            named = graph("120")
            named["9"] = named.pop("5")
            for i, made in enumerate((named, graph("150")), 2):
                await client.post("update", prompt=made, workflow={"id": "one"})
                while client.views[-1][0].version < i:
                    await client.send(flat(1))
                    await asyncio.sleep(0.05)
            feed = asyncio.create_task(feeding(client))
            while grey(await asyncio.wait_for(part(reply), 5)) != 150:
                pass
            await client.stop()
            await feed
        return got

    assert inprocess.live(work) == 90
