"""WebRTC connections by aiortc: one that gives pictures, one that takes them, one that offers.

All of it runs in the loop of loop.py, and is imported when the first connection is made. aiortc has
no say over addresses here: no STUN or TURN server is asked, and the other side's candidates are
those that trust/offers.py left in its offer.
"""

import asyncio
import contextlib
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import av
import numpy as np
from aioice.stun import TransactionFailed, TransactionTimeout
from aiortc import (
    RTCConfiguration,
    RTCPeerConnection,
    RTCRtpSender,
    RTCRtpTransceiver,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError
from aiortc.rtp import RtcpSrPacket
from aiortc.sdp import candidate_from_sdp

from ...trust.schema import BadData
from ..bounds import most
from ..mailbox import Closed, Slot
from .arrival import Prompt
from .coder import CLOCK, H264, VP8, Coder
from .track import Newest

JOINED = 10.0  # seconds that the other end has to come after the answer
SIDE, PIXELS = 4096, 4096 * 2304  # of a picture that is taken
_PREFERRED = (f"video/{H264}", f"video/{VP8}")
_PACKETS = 1024  # that may be missing one before them
_JITTER = "_RTCRtpReceiver__jitter_buffer"
_LOOK = 0.25  # seconds between two looks for the other end's reports
_MISSED = 2.5  # seconds without one, at the least, after which it is taken to be gone
_CHECKED = 4.0  # seconds between two checks by ICE, at the least (RFC 7675, section 5.1)
_REPEATS = 2  # times that one is sent again, after 0.5 and 1 s; it is lost 2 s later
_ALIKE = 5.0  # seconds that two clocks may differ and be taken for one
_BROKEN = 30  # pictures in a row that cannot be taken, after which no more are waited for


class Came(NamedTuple):
    """A picture that came.

    Attributes:
        frame: as it was decoded.
        captured: seconds since the epoch by the sender's clock; None while that is not known.
        arrived: seconds since the epoch.
    """

    frame: av.VideoFrame
    captured: float | None
    arrived: float


class Peer:
    """Args:
        over: called once, in the loop, when the connection is there no more, with why in words,
            or None where it was closed from here.

    Attributes:
        state: aiortc's: new, connecting, connected, failed, closed.
    """

    def __init__(self, over: Callable[[str | None], None]):
        self._over: Callable[[str | None], None] | None = over
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._connection.on("connectionstatechange", self._changed)
        self._tasks = [asyncio.ensure_future(self._watch())]
        self._ending: asyncio.Future | None = None

    @property
    def state(self) -> str:
        return self._connection.connectionState

    async def answer(self, offer: str) -> str:
        """The answer to an offer that trust.offers has looked at.

        Raises:
            BadData: it cannot be answered.
        """
        try:
            self._begin()
            asked = RTCSessionDescription(offer, "offer")
            await self._connection.setRemoteDescription(asked)
            self._choose([t for t in self._connection.getTransceivers() if t.kind == "video"])
            # with all its candidates: setLocalDescription waits for them
            await self._connection.setLocalDescription(await self._connection.createAnswer())
            self._agreed(self._connection.localDescription.sdp)
        except Exception as reason:
            # aiortc's reader of offers raises whatever went wrong in it
            await self.close()
            if isinstance(reason, BadData):
                raise
            codecs = type(reason).__name__ == "OperationError"
            words = "has no codec that is known here" if codecs else "cannot be answered"
            raise BadData(f"The offer {words}.") from None
        return self._connection.localDescription.sdp

    def _begin(self) -> None:
        """Before the offer is read."""

    def _choose(self, video: list[RTCRtpTransceiver]) -> None:
        """One track of pictures is wanted; sound, and what else there is, is declined."""
        for one in self._connection.getTransceivers():
            if one is not video[0]:
                one.direction = "inactive"

    def _agreed(self, answer: str) -> None:
        """Raises BadData: what is answered is not what is wanted."""

    async def tell(self, candidates: list[str]) -> None:
        """Try these as well, which trust.offers has looked at."""
        for text in candidates:
            one = candidate_from_sdp(text.partition(":")[2])
            one.sdpMLineIndex = 0
            await self._connection.addIceCandidate(one)

    async def close(self, why: str | None = None) -> None:
        """End it; nothing of it is left. Any number of times."""
        over, self._over = self._over, None
        mine = asyncio.current_task()
        for task in self._tasks:
            if task is not mine:
                task.cancel()
        await self._connection.close()
        if over is not None:
            over(why)

    async def _watch(self) -> None:
        await asyncio.sleep(JOINED)
        if self.state != "connected":
            await self.close("The other end did not come within 10 seconds.")

    def _changed(self) -> None:
        if self.state in ("failed", "closed") and self._over is not None:
            self._ending = asyncio.ensure_future(self.close("The other end is gone."))


class Ingest(Peer):
    """Pictures come.

    Args:
        take: called with each that is not older than one that waits, in a thread of the loop's.
            It counts what it raises; the next picture may be well.
    """

    def __init__(self, over: Callable[[str | None], None], take: Callable[[Came], None]):
        super().__init__(over)
        self._take = take
        self._slot: Slot[Came] = Slot()
        self._report: Any = None
        self._receiver: Any = None
        self._connection.on("track", self._came)

    def _choose(self, video: list[RTCRtpTransceiver]) -> None:
        super()._choose(video)
        video[0].direction = "recvonly"
        self._receiver = video[0].receiver
        waiting = getattr(self._receiver, "_RTCRtpReceiver__decoder_queue", None)
        if waiting is not None and hasattr(self._receiver, _JITTER):
            setattr(self._receiver, _JITTER, Prompt(_PACKETS, waiting.qsize))
        heard = self._receiver._handle_rtcp_packet

        async def hear(packet):
            if isinstance(packet, RtcpSrPacket):
                self._report = packet.sender_info
            await heard(packet)

        self._receiver._handle_rtcp_packet = hear

    def _agreed(self, answer: str) -> None:
        if "a=recvonly" not in answer:
            raise BadData("The offer sends no video.")

    def _came(self, track) -> None:
        if track.kind == "video" and len(self._tasks) == 1:
            self._tasks += [
                asyncio.ensure_future(work) for work in (self._read(track), self._give())
            ]

    async def _read(self, track) -> None:
        """Everything that is decoded, at once: what waits at aiortc's side waits without bound."""
        with contextlib.suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                if max(frame.width, frame.height) > SIDE or frame.width * frame.height > PIXELS:
                    return await self.close("Its pictures are larger than 4096 x 2304.")
                self._slot.put(Came(frame, self._captured(frame), time.time()))
        await self.close("The other end has left.")

    def _captured(self, frame: av.VideoFrame) -> float | None:
        """By the sender's report, which says its clock's time of one RTP time (RFC 3550, 6.4.1)."""
        mapper = getattr(self._receiver, "_RTCRtpReceiver__timestamp_mapper", None)
        first = getattr(mapper, "_origin", None)
        if self._report is None or first is None:
            return None
        apart = (frame.pts + first - self._report.rtp_timestamp + 2**31) % 2**32 - 2**31
        return _unix(self._report.ntp_timestamp) + apart / CLOCK

    async def _give(self) -> None:
        loop, broken = asyncio.get_running_loop(), 0
        with contextlib.suppress(Closed):
            while broken < _BROKEN:
                came = await self._slot.get()
                try:
                    await loop.run_in_executor(None, self._take, came)
                    broken = 0
                except Exception:
                    broken += 1
                del came  # or it would be kept until the next comes
            await self.close("Its pictures cannot be read.")

    async def close(self, why: str | None = None) -> None:
        self._slot.end()
        await super().close(why)


class Playback(Peer):
    """Pictures go: those of `track`, whose encoder is ours.

    Args:
        sent: told of each picture, and its RTP time, or None while that is not known.
        bit_rate: bit per second at the most.
    """

    def __init__(
        self,
        over: Callable[[str | None], None],
        bit_rate: float,
        sent: Callable[[Any, int], None] | None = None,
    ):
        super().__init__(over)
        self._told = sent
        self._waiting: tuple[Any, int] | None = None
        self._bit_rate = bit_rate
        self._sender: RTCRtpSender | None = None
        self.coder: Coder | None = None
        self.track = Newest(self._sent if sent is not None else None)
        self.track.on("ended", self._broke)

    def _begin(self) -> None:
        one = self._connection.addTransceiver(self.track, direction="sendonly")
        known = RTCRtpSender.getCapabilities("video").codecs
        wanted = [codec for name in _PREFERRED for codec in known if codec.mimeType == name]
        one.setCodecPreferences(wanted)
        self._sender = one.sender

    def _agreed(self, answer: str) -> None:
        """Also of an answer that came."""
        sends = re.search(r"^m=video \d+ \S+ (\d+)", answer, re.M)
        name = sends and re.search(rf"^a=rtpmap:{sends[1]} (H264|VP8)/90000", answer, re.M | re.I)
        if not name or not re.search("^a=(sendonly|recvonly)", answer, re.M):
            raise BadData("The offer takes no video that is known here (H.264 or VP8).")
        self._encode(name[1])

    def _encode(self, name: str) -> None:
        self.coder = Coder(H264 if name.upper() == H264 else VP8, self._bit_rate)
        # aiortc makes an encoder where it has none yet, and has no other way to be given one
        self._sender._RTCRtpSender__encoder = self.coder

    def _sent(self, about: Any, ticks: int, before: int) -> None:
        """aiortc begins its times anywhere: where, is known when one picture has gone.

        Args:
            ticks, before: times of this picture and of the frame that went last, be it new or sent
                again; see Newest.
        """
        last = getattr(self._sender, "_RTCRtpSender__rtp_timestamp", 0)
        if before >= 0 and last:
            first = last - before
            if self._waiting is not None:
                self._told(self._waiting[0], (first + self._waiting[1]) % 2**32)
            self._told(about, (first + ticks) % 2**32)
            self._waiting = None
        else:
            self._waiting = about, ticks

    def _broke(self) -> None:
        # aiortc's sender logs whatever it meets, ends the track, and leaves the connection up
        if self.state not in ("failed", "closed"):
            self._ending = asyncio.ensure_future(self.close("The pictures cannot be sent."))

    async def close(self, why: str | None = None) -> None:
        self.track.remove_all_listeners("ended")
        self.track.stop()
        await super().close(why)

    async def round_trip(self) -> float | None:
        """Seconds, as the other end's reports say; None while there is none."""
        if self._sender is None:
            return None
        for one in (await self._sender.getStats()).values():
            if one.type == "remote-inbound-rtp" and one.roundTripTime is not None:
                return one.roundTripTime
        return None


class Reports:
    """How long the other end's next report may stay away, by those of late.

    Attributes:
        any: whether one has come at all.
    """

    def __init__(self):
        self._gaps: deque[float] = deque(maxlen=most("webrtc.peers.Reports._gaps"))

    @property
    def any(self) -> bool:
        return bool(self._gaps)

    @property
    def patience(self) -> float:
        """Seconds; more for who sends few. One that came late is forgotten after some more."""
        return max(_MISSED, 3 * max(self._gaps, default=0.0))

    def came(self, gap: float) -> None:
        """One came, so many seconds after the one before it."""
        self._gaps.append(gap)


class Publisher(Playback):
    """Pictures go to somebody who is asked to take them."""

    async def offer(self) -> str:
        """With all its candidates."""
        self._begin()
        await self._connection.setLocalDescription(await self._connection.createOffer())
        return self._connection.localDescription.sdp

    async def accept(self, answer: str) -> None:
        """Raises BadData: it answers something else."""
        try:
            self._agreed(answer)
            said = RTCSessionDescription(answer, "answer")
            await self._connection.setRemoteDescription(said)
        except Exception:
            # aiortc's reader of answers raises whatever went wrong in it
            raise BadData("its answer is of no video that is known here") from None
        self._tasks.append(asyncio.ensure_future(self._listen()))

    async def _listen(self) -> None:
        """UDP says nothing of a cable that is pulled: the other end's reports stay away.

        aiortc itself hears of it after half a minute (RFC 7675). Who sends few reports is given
        longer. Who has sent none since the connection was made is asked by ICE: some servers never
        send any, and each has to answer that.
        """
        last, reports, joined = None, Reports(), False
        heard = checked = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK)
            found = [one for one in (await self._sender.getStats()).values()
                     if one.type == "remote-inbound-rtp"]  # fmt: skip
            now, said = time.monotonic(), found[0].timestamp if found else None
            if self.state == "connected" and not joined:
                # what passed before is not time without a report
                joined, heard, checked = True, now, now - _CHECKED
            if said != last:
                reports.came(now - heard)
                last, heard = said, now
            if not joined or now - heard <= reports.patience:
                continue
            if reports.any:
                return await self.close("it does not answer any more")
            if now - checked >= _CHECKED:
                if not await self._answers():
                    return await self.close("it does not answer any more")
                checked = time.monotonic()

    async def _answers(self) -> bool:
        """Whether the other end answers a check of the way that the pictures take (RFC 8445, 7.3).

        aioice has no call for it: this is what it does for consent, but asked more than once.
        """
        ice = getattr(self._sender.transport.transport, "_connection", None)
        for pair in list(getattr(ice, "_nominated", {}).values()):
            asked, key = ice.build_request(pair, nominate=False), ice.remote_password.encode()
            try:
                await pair.protocol.request(
                    asked, pair.remote_addr, integrity_key=key, retransmissions=_REPEATS
                )
            except TransactionTimeout:
                return False
            except TransactionFailed:
                pass  # an answer, too
        return True


def _unix(ntp: int) -> float:
    # NTP counts seconds from 1900, in 2^32nds (RFC 3550, section 4), and begins again in 2036:
    # without its highest bit, it is of the time since then (RFC 4330, section 3)
    return (ntp - _EPOCH + ((ntp < 1 << 63) << 64)) / 2**32


_EPOCH = 2_208_988_800 << 32


def picture(came: Came, same_clock: bool) -> tuple[np.ndarray, float]:
    """[H, W, 3] uint8 and when it was taken, seconds since the epoch. In a worker thread.

    Args:
        same_clock: who sends it is the page, whose clock is the one that counts; of others a clock
            that is far from ours is not believed.
    """
    at = came.captured
    if at is None or (not same_clock and abs(at - came.arrived) > _ALIKE):
        at = came.arrived
    elif not same_clock:
        # some report when they sent a picture, not when they took it: aiortc does
        at = min(at, came.arrived)
    return came.frame.to_ndarray(format="rgb24"), at
