"""WHIP and WHEP against aiortc's own end: pictures in order, keys, limits, the cable pulled."""

import asyncio
import io
import os
import sys
import threading
import time
import types

import inprocess
import numpy as np
import pytest
from ends import count, pulls
from inprocess import Client, flat, graph, until
from PIL import Image

pytest.importorskip("aiortc", reason="aiortc is not installed")

from livediffusion.live import rtc as rtc_module
from livediffusion.live import webrtc
from livediffusion.trust import boundary
from rtc import SDP, End, Film, flat_offer, in_order

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
PULLS = pulls(3)


@pytest.fixture
def comfy():
    with inprocess.comfy() as (running, _):
        yield running
    until(lambda: not threads())


def threads():
    """Those of WebRTC, aiortc's decoders included."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if "webrtc" in name or "decoder" in name]


def published(side=96):
    return graph(source="whip", width=side, height=side)


def shown(client):
    """The numbers in the pictures that came by the WebSocket."""
    pictures = [Image.open(io.BytesIO(packet.payload)) for packet, _ in client.views]
    return [count(np.asarray(picture)) for picture in pictures]


def address(comfy, client):
    return comfy.url + client.begun["cameras"][0]["whip"]["url"]


def played(comfy, client):
    return comfy.url + client.begun["views"][0]["whep"]


def test_a_counter_film_goes_in_and_out_in_order_and_none_twice(comfy):
    async def work(http):
        client = await Client.start(http, comfy.url, published())
        film = Film(30)
        source = End(http, address(comfy, client), film)
        assert await source.open() == 201, source.answer
        await client.wait(lambda: len(client.views) > 5)
        player = End(http, played(comfy, client))
        assert await player.open() == 201, player.answer
        await client.wait(lambda: len(player.numbers) > 60)
        stats, late = client.stats, [at - p.captured for p, at in client.views]
        await client.stop()
        await client.wait(lambda: source.connection.connectionState == "closed")
        gone = await End(http, address(comfy, client), Film()).open()
        for end in (source, player):
            await end.close()
        return client, player, stats, late, gone

    client, player, stats, late, gone = inprocess.live(work)
    seen, out = in_order(shown(client)), in_order(player.numbers)
    # newest frame wins, and there was time for nearly all
    assert len(seen) > 0.8 * (seen[-1] - seen[0]) and len(out) > 0.8 * (out[-1] - out[0])
    assert player.sizes == {(96, 96)}
    assert stats["camera_fps"] > 20 and stats["silent"] == []
    # by the sender's own clock, which here is ours
    assert 0 < np.median(late) < 1 and stats["latency_ms"]["p50"] < 1000
    assert gone == 410


def test_a_key_does_one_thing_and_for_one_run(comfy):
    async def tell(http, method, url, data=None, **headers):
        async with http.request(method, url, data=data, headers=headers) as reply:
            return reply.status, reply.headers, await reply.text()

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        session = comfy.sessions.get(client.begun["session"])
        await client.wait(lambda: session.running)
        place = client.begun["cameras"][0]["whip"]
        base, offer = f"{comfy.url}/livediffusion", flat_offer()
        view = played(comfy, client).rpartition("/")[2]
        asked = {
            "view's key": tell(http, "POST", f"{base}/whip/{view}", offer, **SDP),
            "camera's key": tell(http, "POST", f"{base}/whep/{place['token']}", offer, **SDP),
            "made up": tell(http, "POST", f"{base}/whip/{'A' * 24}.{'A' * 24}", offer, **SDP),
            "no token": tell(http, "POST", f"{base}/whip", offer, **SDP),
            "made up token": tell(http, "POST", f"{base}/whip", offer, **SDP,
                                  Authorization=f"Bearer {'A' * 24}.{'A' * 24}"),
            "another site": tell(http, "POST", comfy.url + place["url"], offer, **SDP,
                                 Origin="https://elsewhere.example"),
            "made up connection": tell(http, "DELETE", f"{base}/rtc/{'A' * 24}.{'A' * 24}"),
            "no type": tell(http, "POST", comfy.url + place["url"], offer),
            "no offer": tell(http, "POST", comfy.url + place["url"], "hello", **SDP),
            "nothing sent": tell(http, "POST", comfy.url + place["url"],
                                 offer.replace("sendonly", "recvonly"), **SDP),
            "no codec": tell(http, "POST", comfy.url + place["url"],
                             offer.replace("VP8", "AV1"), **SDP),
            "nothing taken": tell(http, "POST", played(comfy, client), offer, **SDP),
            "options": tell(http, "OPTIONS", comfy.url + place["url"]),
        }  # fmt: skip
        told = {what: await work for what, work in asked.items()}
        # OBS sends the token beside an address without it
        bearer = {"Authorization": f"bearer {place['token']}"}
        source = End(http, f"{base}/whip", Film(), bearer)
        told["token"] = (await source.open(), {}, "")
        await client.wait(lambda: len(client.views) > 3)
        await client.stop()
        told["over"] = await tell(http, "POST", comfy.url + place["url"], offer, **SDP)
        told["not live"] = await tell(http, "POST", played(comfy, client), offer, **SDP)
        told["gone"] = await tell(http, "DELETE", comfy.url + source.location)
        await source.close()
        return told

    told = inprocess.live(work)
    assert {what: one[0] for what, one in told.items()} == {
        "view's key": 403, "camera's key": 403, "made up": 403, "no token": 401,
        "made up token": 403, "another site": 403, "made up connection": 403, "no type": 415,
        "no offer": 400, "nothing sent": 400, "no codec": 400, "nothing taken": 400, "options": 204,
        "token": 201, "over": 410, "not live": 409, "gone": 410,
    }  # fmt: skip
    assert told["options"][1]["Accept-Post"] == "application/sdp"
    assert "Retry-After" in told["not live"][1]
    # no key, class or line of code in what is said
    assert not any(word in one[2] for one in told.values() for word in ("Error", "Trace", "secret"))


def test_a_publisher_who_comes_again_takes_the_place_of_the_one_before(comfy):
    async def work(http):
        client = await Client.start(http, comfy.url, published())
        first = End(http, address(comfy, client), Film())
        await first.open()
        await client.wait(lambda: len(client.views) > 3)
        second = End(http, address(comfy, client), Film(number=1000))
        await second.open()
        await client.wait(lambda: first.connection.connectionState == "closed")
        await client.wait(lambda: (shown(client) or [0])[-1] > 1000)
        async with http.delete(comfy.url + second.location) as reply:
            assert reply.status == 200
        await client.wait(lambda: "3" in client.stats.get("silent", ()))
        client.views.clear()
        await client.stop()
        for end in (first, second):
            await end.close()

    inprocess.live(work)


async def pulled(end, film):
    """The cable of a publisher: from one moment on nothing leaves it, not even a farewell."""
    for transport in end.connection._RTCPeerConnection__iceTransports:
        for protocol in transport._connection._protocols:
            protocol.transport.abort()
    film.stop()


def test_the_cable_is_pulled_and_plugged_in_again(comfy):
    took = []

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        ends = []
        for pull in range(PULLS):
            film = Film(number=100 * pull)
            ends.append(End(http, address(comfy, client), film))
            begun = time.monotonic()
            assert await ends[-1].open() == 201
            client.views.clear()
            await client.wait(lambda n=100 * pull: any(c > n for c in shown(client)[-1:]), 3)
            took.append(round(time.monotonic() - begun, 2))
            await pulled(ends[-1], film)
            client.stats = {}
            await client.wait(lambda: "3" in client.stats.get("silent", ()), 6)
            assert client.state == "live" and not client.problems
        assert len(comfy_rtc(comfy)._held) == 1
        await client.stop()
        for end in ends:
            await end.close()

    inprocess.live(work)
    sys.stderr.write(f"pictures again after {max(took)} s at the most, {PULLS} pulls\n")


def comfy_rtc(comfy):
    import gc

    return next(one for one in gc.get_objects()
                if type(one) is rtc_module.Rtc and one._sessions is comfy.sessions)  # fmt: skip


def test_a_picture_that_cannot_be_taken_is_counted_and_many_end_the_connection(comfy, monkeypatch):
    peers, bad, why = webrtc.loaded(), [3], []
    picture, gone = peers.picture, rtc_module.Rtc._gone

    def broken(*came):
        if bad[0] <= 0:
            return picture(*came)
        bad[0] -= 1
        raise ValueError("no such picture")

    monkeypatch.setattr(peers, "picture", broken)
    monkeypatch.setattr(rtc_module.Rtc, "_gone", lambda *of: (why.append(of[-1]), gone(*of)))

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        source = End(http, address(comfy, client), Film(60))
        assert await source.open() == 201
        await client.wait(lambda: client.views)
        counts = comfy.sessions.get(client.begun["session"]).shared.faults.counts
        assert counts["frame"] == 3 and source.connection.connectionState == "connected"
        bad[0] = 1000
        await client.wait(lambda: source.connection.connectionState == "closed")
        assert counts["frame"] == 3 + peers._BROKEN
        await client.stop()
        await source.close()

    inprocess.live(work)
    assert why[0] == "Its pictures cannot be read."


@pytest.mark.parametrize("where", ["_frame", "encode"])
def test_a_picture_that_cannot_be_sent_ends_the_players_connection(comfy, monkeypatch, where):
    """Who plays it comes again, or takes it another way: what is up and says nothing stands."""
    from livediffusion.live.webrtc import coder, track

    of = track.Newest if where == "_frame" else coder.Coder
    real, bad = getattr(of, where), []

    def broken(*what, **how):
        if bad:
            raise ValueError("a side of no pixels")
        return real(*what, **how)

    monkeypatch.setattr(of, where, broken)

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        source = End(http, address(comfy, client), Film())
        await source.open()
        await client.wait(lambda: client.views)
        player = End(http, played(comfy, client))
        assert await player.open() == 201
        await client.wait(lambda: player.numbers)
        bad.append(True)
        await client.wait(lambda: player.connection.connectionState == "closed", 8)
        assert len(comfy_rtc(comfy)._held) == 1 and client.state == "live"
        await client.stop()
        for end in (source, player):
            await end.close()

    inprocess.live(work)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_nothing_is_left_after_the_run(comfy):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    async def work(http):
        for again in range(3):
            client = await Client.start(http, comfy.url, published())
            source = End(http, address(comfy, client), Film())
            await source.open()
            await client.wait(lambda client=client: len(client.views) > 3)
            player = End(http, played(comfy, client))
            await player.open()
            await client.wait(lambda player=player: len(player.numbers) > 3)
            await client.stop()
            await source.close()
            await player.close()
            await asyncio.to_thread(until, lambda: not threads())
            if again == 0:  # what is opened once
                before = descriptors()
        return before

    before = inprocess.live(work)
    assert descriptors() <= before


def test_there_are_no_more_connections_than_may_be(comfy, monkeypatch):
    monkeypatch.setattr(boundary, "MOST_PEERS_OF_RUN", 2)

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        ends = [End(http, address(comfy, client), Film())]
        assert await ends[0].open() == 201
        await client.wait(lambda: client.views)
        ends += [End(http, played(comfy, client)) for _ in range(3)]
        told = [await end.open() for end in ends[1:3]]
        # a publisher who comes again takes a place that is its own
        ends.append(End(http, address(comfy, client), Film()))
        told.append(await ends[-1].open())
        await ends[1].close()
        await client.wait(lambda: len(comfy_rtc(comfy)._held) == 1)
        told.append(await ends[3].open())
        await client.stop()
        for end in ends:
            await end.close()
        return told, ends[2].answer

    told, answer = inprocess.live(work)
    assert told == [201, 503, 201, 201] and "Close some" in answer


def test_who_never_comes_is_forgotten(comfy, monkeypatch):
    monkeypatch.setattr(webrtc.loaded(), "JOINED", 0.3)

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        async with http.post(address(comfy, client), data=flat_offer(), headers=SDP) as reply:
            assert reply.status == 201
            there = comfy.url + reply.headers["Location"]
        rtc = comfy_rtc(comfy)
        await client.wait(lambda: not rtc._held)
        async with http.delete(there) as reply:
            assert reply.status == 410
        await client.stop()

    inprocess.live(work)


def test_candidates_may_come_later(comfy):
    """RFC 9725, section 4.3.1: what a PATCH must say, and what it is answered."""

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        source = End(http, address(comfy, client), Film())
        assert await source.open() == 201
        url = comfy.url + source.location
        kind = {"Content-Type": "application/trickle-ice-sdpfrag"}
        line = "a=candidate:1 1 udp 1 10.0.0.1 40000 typ host\r\n"
        tag = {"If-Match": source.tag}
        told = []
        for headers, data in (
            ({**kind, **tag}, line),
            ({**kind, **tag}, "a=ice-ufrag:another\r\n" + line),
            ({**kind, "If-Match": '"x"'}, line),
            ({**kind, "If-Match": "*"}, line),
            (kind, line),
            ({**SDP, **tag}, line),
        ):
            async with http.patch(url, data=data, headers=headers) as reply:
                told.append(reply.status)
        await client.wait(lambda: len(client.views) > 3)
        await client.stop()
        await source.close()
        return told

    assert inprocess.live(work) == [204, 422, 412, 422, 428, 415]


def test_no_packet_goes_to_a_host_that_an_offer_names(comfy):
    """A socket of ours stands for the host: at another address of this machine than asked."""
    import socket

    trap = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    trap.bind(("127.0.0.77", 0))
    trap.settimeout(0.1)
    port = trap.getsockname()[1]

    async def work(http):
        client = await Client.start(http, comfy.url, published())
        source = End(http, address(comfy, client), Film())
        line = f"a=candidate:9 1 udp 2130706431 127.0.0.77 {port} typ host\r\n"

        def change(sdp):
            return sdp.replace("a=ice-ufrag", line * 50 + "a=ice-ufrag", 1)

        assert await source.open(change) == 201
        await client.wait(lambda: len(client.views) > 10)
        await client.stop()
        await source.close()

    inprocess.live(work)
    with trap, pytest.raises(TimeoutError):
        trap.recv(100)


def test_without_aiortc_it_is_said_what_to_install(comfy, monkeypatch):
    monkeypatch.setattr(webrtc.importlib.util, "find_spec", lambda name: None)

    async def work(http):
        refused = await inprocess.post(
            http, f"{comfy.url}/livediffusion/start", inprocess.begin(published())
        )
        client = await Client.start(http, comfy.url, graph())
        await client.send(flat(9))
        await client.wait(lambda: client.views)
        await client.stop()
        return refused, client.begun

    (status, answer), begun = inprocess.live(work)
    assert status == 400 and "source: WebRTC needs the package aiortc" in str(answer)
    assert "send" not in begun["cameras"][0] and "whep" not in begun["views"][0]


@pytest.mark.parametrize("codec", ["H264", "VP8"])
def test_pictures_that_cannot_be_decoded_in_time_are_left_out_up_to_a_whole_one(codec):
    """What is decoded is decodable: nothing is missing before it but where a whole one begins."""
    from aiortc.codecs import depayload, get_capabilities
    from aiortc.rtp import RtpPacket
    from livediffusion.live.webrtc import arrival, coder
    from rtc import numbered

    kind = next(one for one in get_capabilities("video").codecs if one.name == codec)
    made, waiting, number, given, asked = coder.Coder(codec, 1e6), 0, 0, [], 0
    buffer = arrival.Prompt(128, lambda: waiting)
    for i in range(60):
        waiting = 20 if 20 <= i < 30 else 0
        payloads, at = made.encode(numbered(i), force_keyframe=i in (0, 25, 40))
        for place, payload in enumerate(payloads):
            packet = RtpPacket(marker=place == len(payloads) - 1, sequence_number=number)
            packet.timestamp, packet._data = at, depayload(kind, payload)
            number += 1
            asks, frame = buffer.add(packet)
            asked += asks
            if frame is not None:
                given.append(i)
                assert arrival.whole(frame.data) is (i in (0, 25, 40))
    # 25 was left out as well, for too many waited then; each came with its own last packet
    assert given == [*range(20), *range(40, 60)]
    assert asked == 1 and buffer.left_out == 20


def test_each_picture_is_told_under_its_own_time_whatever_is_sent_again(monkeypatch):
    """The page knows a picture by its RTP time; aiortc counts those that are sent again, too."""
    from livediffusion.live.webrtc import peers, track

    monkeypatch.setattr(track, "AGAIN", 0.005)
    origin, wanted, told = 2**32 - 7, [], []

    async def work():
        one = peers.Playback(lambda why: None, 1e6, lambda *what: told.append(what))
        one._sender = types.SimpleNamespace()

        async def gone(about=None):
            """As aiortc has it: the time is known once a frame has gone."""
            if about is not None:
                one.track.put(flat(about), about)
            frame = await one.track.recv()
            at = one._sender._RTCRtpSender__rtp_timestamp = (origin + frame.pts) % 2**32
            if about is not None:
                wanted.append((about, at))

        for about, again in enumerate([2, 0, 1, 0, 0, 3, 0]):
            await gone(about)
            for _ in range(again):
                await gone()
        one._sender = None
        await one.close()

    asyncio.run(work())
    assert told == wanted


def test_a_report_that_comes_late_once_is_forgotten():
    from livediffusion.live.webrtc import peers

    reports = peers.Reports()
    assert not reports.any and reports.patience == peers._MISSED
    for _ in range(3):
        reports.came(reports.patience - 0.1)
    assert reports.any and reports.patience > 8 * peers._MISSED
    for _ in range(10):
        reports.came(1.0)
    assert reports.patience == 3.0
    # who sends few is given longer, always
    for _ in range(20):
        reports.came(5.0)
    assert reports.patience == 15.0


@pytest.mark.parametrize("seconds", [1_795_000_000.25, 2_085_978_495.5, 2_085_978_496.5, 2.2e9])
def test_a_senders_clock_is_read_after_2036_too(seconds):
    from livediffusion.live.webrtc import peers

    ntp = int((seconds + 2_208_988_800) * 2**32) % 2**64
    assert peers._unix(ntp) == pytest.approx(seconds, abs=1e-6)
