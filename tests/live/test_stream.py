"""Live Send to a stream: ffmpeg as the server that takes it, decodes it and is pulled out."""

import asyncio
import itertools
import json
import logging
import os
import socket
import struct
import threading
import time

import inprocess
import numpy as np
import pytest
import streams
from clock import Limit
from ends import BITS, LONG, SIDE, counted, pulls
from inprocess import Client, graph, until
from livediffusion.live import sinks
from livediffusion.live.faults import Refused
from livediffusion.live.sending import Sender
from livediffusion.live.sinks import coding, rtmp, rtsp, stream, ts
from livediffusion.live.sources import Lost
from livediffusion.trust import addresses

pytestmark = pytest.mark.comfy

PULLS = pulls(2)
WAYS = [("rtmp", ""), ("rtsp", ""), ("srt", ""), ("srt", "passphrase=ten letters or more")]
if not LONG:
    WAYS = WAYS[:3]


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """A server whose person has allowed what listens on this machine."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    rules = tmp_path / "livediffusion" / "allowed.json"
    rules.parent.mkdir()
    patterns = [f"{scheme}://127.0.0.1:*/*" for scheme in ("rtmp", "rtsp", "srt")]
    rules.write_text(json.dumps({"addresses": patterns}))
    return tmp_path


def target(address, fps=60, bit_rate=4.0):
    return sinks.checked_target("stream", "", address, fps, bit_rate)


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def own_threads():
    return {t.name for t in threading.enumerate() if t.name.startswith("livediffusion-s")}


class Film:
    """A sender that gets the next number every so many seconds."""

    def __init__(self, address, pause=1 / 60, **settings):
        self.files = open_files()
        self.sender = Sender(target(address, **settings), stream.Kind)
        self.number, self._pause, self._over = 0, pause, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._over.wait(self._pause):
            self.number += 1
            self.sender.put(counted(self.number % 2**BITS), time.monotonic())

    def end(self):
        """The sender is over, and nothing is left of it."""
        self._over.set()
        self._thread.join(5)
        self.sender.end()
        assert self.sender.over.wait(5)
        until(lambda: not own_threads() and open_files() <= self.files, 5)


def in_order(numbers):
    """Rising, over the film's end, too."""
    pairs = itertools.pairwise(numbers)
    return None not in numbers and all(0 < (b - a) % 2**BITS < 2**BITS // 2 for a, b in pairs)


@streams.needed
@pytest.mark.parametrize(("scheme", "query"), WAYS)
def test_a_counter_film_arrives_in_order_and_none_twice(scheme, query):
    if "passphrase" in query:
        pytest.importorskip("cryptography")
    with streams.Server(scheme, query.replace(" ", "%20")) as server:
        film = Film(server.address)
        try:
            until(lambda: len(server.seen) > 60)
        finally:
            film.end()
    assert film.sender.state == "sending" and film.sender.trouble is None
    assert in_order(server.numbers)
    # what the sender left out for newer ones is all that lacks
    assert server.numbers[-1] - server.numbers[0] < len(server.numbers) + film.sender.dropped + 1


@streams.needed
@pytest.mark.parametrize("scheme", ["rtmp", "rtsp", "srt"])
def test_a_cable_pulled_again_and_again_is_told_and_goes_on(scheme, record_property):
    """Killed, as when a connection is reset; and frozen, as when it is half open."""
    back = []
    with streams.Server(scheme) as server:
        film = Film(server.address)
        try:
            for i in range(PULLS):
                seen = len(server.seen)
                until(lambda s=seen: len(server.seen) > s + 5)
                losses = film.sender.losses
                if i % 2:
                    server.freeze()
                else:
                    server.kill()
                until(lambda n=losses: film.sender.losses > n and film.sender.trouble, 6)
                if i % 2:
                    server.kill()
                seen, sent, limit = len(server.seen), film.sender.sent, Limit(3)
                server.begin()
                while film.sender.sent == sent:
                    assert not limit.over, film.sender.trouble
                    time.sleep(0.005)
                back.append(limit.spent)
                # ffmpeg shows them when it has found out what comes, later on a busy machine
                until(lambda s=seen: len(server.seen) > s)
        finally:
            film.end()
    assert in_order([n for n in server.numbers if n is not None])
    record_property("seconds until it went on", [round(s, 2) for s in back])
    if PULLS > 2:
        logging.warning("%s: sends again within %.2f s of %d pulls", scheme, max(back), PULLS)


@streams.needed
def test_a_whole_run_sends_and_says_what_it_does():
    """A webcam's pictures by the page's way -> work -> Live Send."""
    with streams.Server("rtmp") as server, inprocess.comfy() as (comfy, _):

        async def work(http):
            made = graph(width=SIDE, height=SIDE)
            send = {"to": "stream", "name": "", "address": server.address, "fps": 60}
            made["6"] = {
                "class_type": "LiveSend", "inputs": {"image": ["4", 0], "bit_rate": 4.0, **send},
            }  # fmt: skip
            client = await Client.start(http, comfy.url, made)
            number = 0
            while len(server.seen) < 10:
                await client.send(inprocess.jpeg(counted(number)))
                number += 1
                await client.wait(lambda n=number: client.answers >= n)
                await asyncio.sleep(1 / 60)
            stats = await client.wait(lambda: client.stats.get("sends") and client.stats)
            await client.stop()
            return stats

        sends = inprocess.live(work)["sends"]["6"]
    assert sends["state"] == "sending" and sends["sent"] > 3
    assert in_order([n for n in server.numbers if n is not None])


@streams.needed
@pytest.mark.parametrize("scheme", ["rtmp", "rtsp", "srt"])
def test_odd_sides_alpha_and_late_times_arrive(scheme):
    """Five hours later RTMP's times need a fourth byte; days later all of them begin again."""
    height, width = SIDE - 1, SIDE + 1
    with streams.Server(scheme, size=(SIDE, SIDE + 2)) as server:
        made, last = connected(server.address, width, height), 11

        def send(number, at):
            picture = np.full((height, width, 4), 255, np.uint8)
            picture[:, :, :3] = counted(number, SIDE, SIDE + 2)[:height, :width]
            made.send(picture, at)

        for number in range(last + 1):
            send(number, number // 4 * 20_000 + number % 4 / 20)
        more, limit = 60_001.0, Limit(10)
        while last not in server.numbers:  # a receiver gives the last ones when others come
            assert not limit.over
            send(last, more)
            more += 0.02
            time.sleep(0.02)
        made.close()
    assert in_order(server.numbers[: server.numbers.index(last) + 1])
    assert len(set(server.numbers)) >= 11


def connected(address, width=SIDE, height=SIDE):
    """A connection, tried until the other end listens."""
    limit = Limit(10)
    while True:
        made = stream.Kind(target(address))
        try:
            made.open(width, height)
            return made
        except Lost:
            made.close()
            assert not limit.over
            time.sleep(0.02)


def test_the_encoder_that_works_here_is_taken_and_none_waits():
    coder = coding.Encoder(SIDE, SIDE, 30, 1e6)
    assert coder.name in coding.ENCODERS
    for number in range(130):
        (unit,) = coder.code(counted(number), number / 30)
        assert unit.at == round(number / 30 * coding.CLOCK)
        assert unit.key == (number in (0, 15, 30, 45, 60, 120))
    assert all(n[0] & 31 in (1, 5) for n in unit.nals)


def test_without_an_encoder_it_says_so(monkeypatch):
    monkeypatch.setattr(coding, "ENCODERS", {"h264_none": ("yuv420p", {})})
    made = stream.Kind(target("srt://127.0.0.1:9"))
    with pytest.raises(Refused, match=r"^to: no H\.264 encoder works here"):
        made.open(SIDE, SIDE)
    made.close()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("", "address: a stream needs one"),
        ("rtmp://127.0.0.1/live", "address: RTMP needs an application and a key"),
        ("rtmp://elsewhere.example/live/key", "address: .* not allowed"),
        ("http://127.0.0.1/x", "address: http:// cannot be used here"),
        ("file:///etc/passwd", "address: "),
        ("srt://127.0.0.1:9000?mode=listener", "address: SRT goes from here to a listener"),
        ("srt://127.0.0.1:9000?passphrase=short", "address: a passphrase has 10"),
        ("srt://127.0.0.1:9000?latency=x", "address: latency and pbkeylen are numbers"),
        ("srt://127.0.0.1:9000?pbkeylen=17", "address: latency is at most"),
    ],
)
def test_an_address_that_cannot_be_is_refused_before_anything_is_sent(address, told):
    with pytest.raises(Refused, match=f"^{told}"):
        target(address)


def answering(*answers):
    """A server that gives these bytes one by one, each after the client has said something."""
    door = socket.create_server(("127.0.0.1", 0))

    def serve():
        wire, _ = door.accept()
        with wire, door:
            for answer in answers:
                wire.recv(1 << 16)
                wire.sendall(answer)
            wire.settimeout(3)
            try:
                while wire.recv(1 << 16):
                    pass
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    return door.getsockname()[1]


def command(*values):
    body = rtmp.coded(*values)
    return b"\x03\0\0\0" + len(body).to_bytes(3, "big") + b"\x14\0\0\0\0" + body


SHAKEN = b"\x03" + bytes(2 * 1536)


@pytest.mark.parametrize(
    ("scheme", "answers", "told"),
    [
        ("rtmp", [b"HTTP/1.0 400"], "does not speak RTMP"),
        ("rtmp", [SHAKEN, command("_error", 1.0, None, {
            "level": "error", "code": "NetConnection.Connect.InvalidApp"})], "first part"),
        ("rtmp", [SHAKEN, command("_result", 1.0, None, {}) + command("_result", 4.0, None, 1.0)
                  + command("onStatus", 0.0, None, {
                      "level": "error", "code": "NetStream.Publish.BadName"})], "its key"),
        ("rtmp", [SHAKEN + b"\xc9 no such chunk"], "does not speak RTMP"),
        ("rtmp", [SHAKEN], "does not answer"),
        ("rtsp", [b"RTSP/1.0 401 Who\r\nCSeq: 1\r\nWWW-Authenticate: Basic realm=\"a\"\r\n\r\n"],
         "wants a user"),
        ("rtsp", [b"RTSP/1.0 405 No\r\nCSeq: 1\r\n\r\n"], "only gives them"),
        ("rtsp", [b"x" * 40_000], "does not speak RTSP"),
        ("rtsp", [], "does not answer"),
    ],
)  # fmt: skip
def test_what_a_server_says_no_to_is_told_in_words(scheme, answers, told):
    files = open_files()
    port = answering(*answers)
    made = stream.Kind(target(f"{scheme}://127.0.0.1:{port}/live/secret-key"))
    with pytest.raises(Lost, match=told) as reason:
        made.open(SIDE, SIDE)
    made.close()
    assert f"127.0.0.1:{port}" in str(reason.value) and "secret-key" not in str(reason.value)
    until(lambda: open_files() <= files, 5)


def test_who_takes_nothing_more_is_lost_after_two_seconds():
    """A connection that is there and never read from: what is sent fills it, then it is told."""
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    door.bind(("127.0.0.1", 0))
    door.listen()
    address = addresses.parsed(f"rtmp://127.0.0.1:{door.getsockname()[1]}/live/key")
    link = rtmp.Link(address)
    wire, _ = door.accept()
    with door, wire, pytest.raises(Lost, match="takes no more data"):
        limit = Limit(10)
        while not limit.over:
            link.room()
            link.send(bytes(20_000))
    link.close()


def test_a_connection_of_any_number_is_waited_for():
    """Of a process that has more than a thousand files open."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("no process here has so many files")
    link = rtmp.Link.__new__(rtmp.Link)
    link.place, (near, there) = "server:1935", socket.socketpair()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    try:
        link._wire = socket.socket(fileno=os.dup2(near.fileno(), 1900))
        with near, there:
            link.room()
            assert link.heard() == b""
            there.sendall(b"x")
            assert link.heard(1.0) == b"x"
            link.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("now", [2.0**31, 2085978496.5, 2.0**32])
def test_reports_go_on_in_2036_and_later(monkeypatch, now):
    monkeypatch.setattr(rtsp.time, "time", lambda: now)
    made = rtsp.Rtsp(addresses.parsed("rtsp://server/film"), None)
    seconds, part = struct.unpack(">II", made._report(7)[12:20])
    assert (seconds, part >> 31) == (int(now + 2208988800) % 2**32, int(now % 1 * 2))


def test_commands_are_read_as_they_are_written():
    values = ["connect", 1.0, None, True, {"app": "live", "deep": {"a": 2.5}}]
    assert rtmp.decoded(rtmp.coded(*values)) == values
    random = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(rtmp.coded(*values))
        for at in random.integers(0, len(data), 3):
            data[at] = random.integers(0, 256)
        assert len(rtmp.decoded(bytes(data))) <= 64
    assert rtmp.decoded(b"\x03\0\1a" * 5000) == []


def test_chunks_of_any_size_are_put_together():
    whole = SHAKEN[:0]
    wanted = []
    for number in range(5):
        body = rtmp.coded("onStatus", float(number), "x" * 300)
        wanted.append((20, body))
        parts = [body[i : i + 128] for i in range(0, len(body), 128)]
        whole += b"\x43" if number else b"\x03"
        whole += b"\0\0\0" + len(body).to_bytes(3, "big") + b"\x14" + (b"" if number else bytes(4))
        whole += b"\xc3".join(parts)
    for step in (1, 7, 5000):
        chunks = rtmp._Chunks()
        found = [m for i in range(0, len(whole), step) for m in chunks.take(whole[i : i + step])]
        assert found == wanted


def test_a_large_unit_is_cut_for_rtp_and_for_ts():
    nal = bytes([0x65]) + bytes(range(256)) * 20
    parts = rtsp._cut(nal)
    assert all(len(part) <= 1400 for part in parts)
    assert parts[0][1] & 0x80 and parts[-1][1] & 0x40
    assert bytes([parts[0][0] & 0xE0 | parts[0][1] & 31]) + b"".join(p[2:] for p in parts) == nal
    for size in range(1, 400):
        unit = coding.Unit([bytes([0x65]) + b"\x80" * size], 9000, False)
        data = ts.Muxer().packets(unit, [])
        assert len(data) % 188 == 0 and all(data[i] == 0x47 for i in range(0, len(data), 188))
        payload = b""
        for i in range(0, len(data), 188):
            packet = data[i : i + 188]
            field = packet[4] + 1 if packet[3] & 0x20 else 0
            payload += packet[4 + field :]
        assert payload.endswith(b"\0\0\0\x01" + unit.nals[0])
        (_, flags, high, low) = struct.unpack(">BBIB", data[4:11])
        assert flags == 0x10 and (high << 1 | low >> 7) == 9000
