"""The other end of WebRTC, by aiortc: who publishes the counter film, and who plays a view.

Both talk HTTP as RFC 9725 has it, and know nothing of the pack.
"""

import asyncio
import contextlib
import threading
import time
from fractions import Fraction

import av
import numpy as np
from aiohttp import web
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from ends import count, counted

SIDE = 192
SDP = {"Content-Type": "application/sdp"}


class Film(MediaStreamTrack):
    """Counts from `number` on; `times` has when each was given."""

    kind = "video"

    def __init__(self, fps=30, side=SIDE, number=0):
        super().__init__()
        self.fps, self.side, self.number, self.times = fps, side, number, {}
        self._begun = None

    async def recv(self):
        self._begun = self._begun or time.monotonic() - self.number / self.fps
        self.number += 1
        await asyncio.sleep(max(0, self._begun + self.number / self.fps - time.monotonic()))
        frame = av.VideoFrame.from_ndarray(counted(self.number % 4096, self.side, self.side))
        frame.pts, frame.time_base = self.number, Fraction(1, self.fps)
        self.times[self.number] = time.time()
        return frame


class End:
    """One connection: `sent` to a server, which answers."""

    def __init__(self, http, url, track=None, headers=None):
        self.http, self.url, self.track, self.headers = http, url, track, headers or {}
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.status = self.location = self.tag = None
        self.numbers, self.times, self.sizes = [], [], set()
        self._reading = None
        self.connection.on("track", self._track)

    async def open(self, change=lambda sdp: sdp):
        """Returns the HTTP status; 201 where it is well."""
        if self.track is None:
            self.connection.addTransceiver("video", direction="recvonly")
        else:
            self.connection.addTransceiver(self.track, direction="sendonly")
        await self.connection.setLocalDescription(await self.connection.createOffer())
        offer = change(self.connection.localDescription.sdp)
        async with self.http.post(self.url, data=offer, headers={**SDP, **self.headers}) as reply:
            self.status, text = reply.status, await reply.text()
            self.location, self.tag = reply.headers.get("Location"), reply.headers.get("ETag")
            self.answer = text
        if self.status == 201:
            await self.connection.setRemoteDescription(RTCSessionDescription(text, "answer"))
        return self.status

    def _track(self, track):
        self._reading = asyncio.ensure_future(self._read(track))

    async def _read(self, track):
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                picture = frame.to_ndarray(format="rgb24")
                self.sizes.add((frame.width, frame.height))
                self.numbers.append(count(picture))
                self.times.append(time.time())

    async def close(self):
        if self._reading is not None:
            self._reading.cancel()
        await self.connection.close()


def in_order(numbers):
    """The numbers of a film without those that came again: never one that was there before."""
    seen = [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1]]
    assert None not in seen and seen == sorted(set(seen)), seen
    return seen


def flat_offer():
    """An offer as a stranger writes it, of one track of video."""
    return "\r\n".join(
        ["v=0", "o=- 1 1 IN IP4 0.0.0.0", "s=-", "t=0 0", "a=group:BUNDLE 0",
         "m=video 9 UDP/TLS/RTP/SAVPF 96", "c=IN IP4 0.0.0.0", "a=mid:0", "a=sendonly",
         "a=ice-ufrag:abcd", "a=ice-pwd:abcdefghijklmnopqrstuv", "a=setup:actpass", "a=rtcp-mux",
         "a=fingerprint:sha-256 " + ":".join(["AB"] * 32), "a=rtpmap:96 VP8/90000", ""]
    )  # fmt: skip


def noise(side, seed=0):
    """A picture that is hard to encode."""
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)


async def _unsent(packet):
    pass


class Taker:
    """A WHIP server as a service is one: aiortc behind aiohttp, in a thread of its own.

    Attributes:
        numbers: of the counter film, as they were decoded; `keys` the Authorization headers.
        plugged: False has it cut every connection, and take none.
        leads: where who asks while it is not plugged is led to, or None.
        reports: False has it send none of what it received, as some servers do.
        deaf: it answers, and no packet of UDP reaches it or comes from it.
    """

    def __init__(self):
        self.numbers, self.keys, self.deleted, self.plugged = [], [], 0, True
        self.reports, self.leads, self.deaf = True, None, False
        self.loop, self._open, self._up = asyncio.new_event_loop(), [], threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *error):
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    def pull(self):
        """Cut everything, and take no more until `plugged`."""
        self.plugged = False
        asyncio.run_coroutine_threadsafe(self._cut(), self.loop).result(10)

    async def _cut(self):
        for connection in self._open:
            for transport in connection._RTCPeerConnection__iceTransports:
                for protocol in transport._connection._protocols:
                    protocol.transport.abort()

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._begin())
        self.loop.run_forever()

    async def _begin(self):
        app = web.Application()
        app.router.add_post("/whip", self._take)
        app.router.add_delete("/whip/1", self._delete)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self._up.set()

    async def _delete(self, request):
        self.deleted += 1
        return web.Response()

    async def _take(self, request):
        self.keys.append(request.headers.get("Authorization"))
        if not self.plugged and self.leads:
            return web.Response(status=307, headers={"Location": self.leads})
        if not self.plugged:
            return web.Response(status=503)
        connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._open.append(connection)
        connection.on("track", lambda track: asyncio.ensure_future(self._read(track)))
        said = RTCSessionDescription(await request.text(), "offer")
        await connection.setRemoteDescription(said)
        if not self.reports:
            for receiver in connection.getReceivers():
                receiver._send_rtcp = _unsent
        await connection.setLocalDescription(await connection.createAnswer())
        if self.deaf:
            await self._cut()
        headers = {"Location": "/whip/1"}
        text = connection.localDescription.sdp
        kind = "application/sdp"
        return web.Response(status=201, text=text, content_type=kind, headers=headers)

    async def _read(self, track):
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                self.numbers.append(count(frame.to_ndarray(format="rgb24")))

    async def _close(self):
        for connection in self._open:
            await connection.close()
        await self._runner.cleanup()


def numbered(number, side=SIDE):
    """A frame of the counter film at 30 per second, in the clock of RTP."""
    frame = av.VideoFrame.from_ndarray(counted(number, side, side))
    frame.pts, frame.time_base = 3000 * number, Fraction(1, 90_000)
    return frame
