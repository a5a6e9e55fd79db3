"""SRT's live mode against ffmpeg's libsrt, over a wire that loses and mixes up packets, too."""

import contextlib
import socket
import struct
import threading
import time

import numpy as np
import pytest
import streams
from clock import Limit
from ends import SIDE, counted
from inprocess import until
from livediffusion.live import srt, wires
from livediffusion.live.sinks.coding import Encoder
from livediffusion.live.sinks.ts import Muxer, Ts
from livediffusion.live.sources import Lost, Wanted, address
from livediffusion.trust.addresses import parsed

pytestmark = pytest.mark.comfy


def connected(port, query="", seconds=10):
    limit = Limit(seconds)
    while True:
        made = srt.Srt("127.0.0.1", port, srt.settings(f"srt://127.0.0.1:{port}?{query}"))
        try:
            made.open(1.0)
            return made
        except Lost:
            made.close()
            if limit.over:
                raise
            time.sleep(0.05)


class Wire:
    """Between a caller and a listener: some packets are lost, some come later than others."""

    def __init__(self, there, lost=0.0, late=0.0):
        self.lost, self.late, self.passed, self.dropped = lost, late, 0, 0
        self.here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.here.bind(("127.0.0.1", 0))
        self.port, self._there = self.here.getsockname()[1], ("127.0.0.1", there)
        self.out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._random, self._caller, self._over = np.random.default_rng(3), None, False
        self._threads = [threading.Thread(target=self._run, args=(back,)) for back in (False, True)]
        for thread in self._threads:
            thread.start()

    def _run(self, back):
        wire, held = (self.out if back else self.here), None
        wire.settimeout(0.05)
        while not self._over:
            try:
                data, where = wire.recvfrom(2048)
            except (TimeoutError, ConnectionError, OSError):
                continue
            self._caller = self._caller if back else where
            handshake = data[:2] == b"\x80\0"
            luck = 1.0 if handshake else self._random.random()
            if luck < self.lost:
                self.dropped += 1
                continue
            self.passed += 1
            if luck < self.lost + self.late and held is None:
                held = data
                continue
            for one in (data, *([held] if held else [])):
                if back:
                    self.here.sendto(one, self._caller)
                else:
                    self.out.sendto(one, self._there)
            held = None

    def close(self):
        self._over = True
        for thread in self._threads:
            thread.join()
        self.here.close()
        self.out.close()


@streams.needed
def test_what_is_lost_and_mixed_up_on_the_way_arrives_whole():
    """7 of 100 packets lost each way, as many late: every picture is there, in order."""
    with streams.Server("srt", "latency=1000000") as server:
        wire = Wire(server.port, lost=0.07, late=0.07)
        made = connected(wire.port, "latency=1000")
        coder, muxer = Encoder(SIDE, SIDE, 60, 2e6), Muxer()
        random, number = np.random.default_rng(0), 0
        try:
            limit = Limit(15)
            while len(server.seen) < 100 and not limit.over:
                for unit in coder.code(counted(number), number / 60):
                    # filler, so that a picture has several packets
                    filler = bytes([12]) + random.integers(1, 255, 3000, np.uint8).tobytes()
                    unit = unit._replace(nals=[filler, *unit.nals])
                    made.write(muxer.packets(unit, [coder.sps, coder.pps]))
                number += 1
                time.sleep(1 / 60)
        finally:
            made.close()
            wire.close()
    assert wire.dropped > 20
    numbers = server.numbers
    assert len(numbers) >= 100
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


class Giver:
    """A listener that gives a stream of bytes to who calls: messages of consecutive numbers."""

    def __init__(self, seen=0x4A17):
        self.wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.wire.bind(("127.0.0.1", 0))
        self.wire.settimeout(3)
        self.port, self.magic = self.wire.getsockname()[1], seen
        self.first, self.reports, self.acks = 0x7FFFFFF0, [], []

    def shake(self, kind=0xFFFFFFFF):
        """Answers the handshake; returns the number that the caller goes by, None if none comes."""
        while True:
            try:
                data, self.caller = self.wire.recvfrom(2048)
            except TimeoutError:
                return None
            words = struct.unpack(">IIIIIIII", data[16:48])
            own, cookie = words[6], 77
            if words[5] == 1:
                answer = struct.pack(">HHIIIIII", 0, self.magic, self.first, 1500, 8192, 1, 9, 77)
            else:
                answer = struct.pack(">IIIIIII", 1, self.first, 1500, 8192, kind, 9, cookie)
            self.own = own
            self.control(0, 0, struct.pack(">I", 5) + answer + bytes(16))
            if words[5] != 1:
                return own

    def control(self, kind, info, body=b""):
        self.wire.sendto(
            struct.pack(">HHIII", 0x8000 | kind, 0, info, 0, self.own) + body, self.caller
        )

    def give(self, i, flags=0):
        number = (self.first + i) % 2**31
        head = struct.pack(">IIII", number, 0xE0000000 | flags | i + 1, 0, self.own)
        self.wire.sendto(head + struct.pack(">I", i) * 47, self.caller)

    def hear(self, seconds=0.3):
        """Takes what the caller says: its loss reports and acknowledgements."""
        limit = Limit(seconds)
        self.wire.settimeout(0.05)
        while not limit.over:
            with contextlib.suppress(TimeoutError):
                data = self.wire.recv(2048)
                kind = data[1] if data[0] == 0x80 else None
                if kind == 3:
                    words = struct.unpack(f">{len(data) // 4 - 4}I", data[16:])
                    self.reports.append([w & 0x7FFFFFFF for w in words])
                elif kind == 2:
                    self.acks.append(struct.unpack(">I", data[16:20])[0])


@pytest.fixture
def giver():
    made = Giver()
    yield made
    made.wire.close()


def joined(giver, kind=0xFFFFFFFF, delay=0.3):
    made = srt.Srt("127.0.0.1", giver.port, srt.Settings(delay=delay))
    shaking = threading.Thread(target=giver.shake, args=(kind,), daemon=True)
    shaking.start()
    try:
        made.open(2.0)
    except Lost:
        made.close()
        raise
    shaking.join(5)
    return made


def messages(made, count):
    return [struct.unpack(">I", made.read(2048)[:4])[0] for _ in range(count)]


def test_numbers_go_over_the_wrap_in_order_and_gaps_are_asked_for(giver):
    made = joined(giver, delay=5.0)
    for i in (0, 1, 2, 5, 4, 6):  # 3 comes later
        giver.give(i)
    assert messages(made, 3) == [0, 1, 2]
    giver.hear()
    lost = (giver.first + 3) % 2**31
    assert [lost] in giver.reports and giver.acks[-1] == lost
    giver.give(3)
    for i in range(7, 40):
        giver.give(i)
    giver.give(3)  # once more: too late
    assert messages(made, 37) == list(range(3, 40))
    made.close()
    assert made.read(100) == b""


def test_what_never_comes_is_left_out_after_the_delay(giver):
    made = joined(giver, delay=0.15)
    for i in (0, 3, 4):
        giver.give(i)
    assert messages(made, 3) == [0, 3, 4]
    giver.give(9)
    giver.control(7, 0, struct.pack(">II", *[(giver.first + i) % 2**31 for i in (5, 8)]))
    assert messages(made, 1) == [9]
    giver.give(20_000)  # and so much is lost that nobody waits for it
    assert messages(made, 1) == [20_000]
    made.close()


def test_who_ends_or_falls_silent_is_lost(giver, monkeypatch):
    made = joined(giver)
    giver.control(5, 0)
    with pytest.raises(Lost, match="has ended it"):
        made.read(100)
    with pytest.raises(Lost):
        made.write(b"x")
    made.close()
    monkeypatch.setattr(srt, "SILENT", 0.2)
    made = joined(giver)
    with pytest.raises(Lost, match="does not answer any more"):
        made.read(100)
    made.close()


@pytest.mark.parametrize(
    ("kind", "told"), [(1010, "passphrase is wrong"), (2409, "somebody else"), (1099, "1099")]
)
def test_a_no_is_told_in_words(giver, kind, told):
    with pytest.raises(Lost, match=told):
        joined(giver, kind)


@pytest.fixture
def mute(giver):
    """Another address of the same name, where packets go and nothing comes back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.2", giver.port))
        yield made


@pytest.mark.parametrize("end", ["source", "sink"])
def test_of_a_names_addresses_the_one_that_answers_is_found(giver, mute, end, monkeypatch):
    """As where a name has AAAA and A, and who listens has IPv4 only."""
    ips = ["::1", "127.0.0.2", "127.0.0.1"]
    name = parsed(f"srt://both.example:{giver.port}")
    for module in (wires, address):
        monkeypatch.setattr(module, "look_up", lambda name: ips)
    monkeypatch.setattr(address, "checked", lambda *given: name)
    shaken = []
    shaking = threading.Thread(target=lambda: shaken.append(giver.shake()), daemon=True)
    shaking.start()
    made = Ts(name, None) if end == "sink" else address.Kind(Wanted(name.text(), 64, 64, 30))
    with contextlib.closing(made):
        made.open()
        shaking.join(5)
        assert shaken and shaken[0]


def test_a_no_is_told_also_where_another_address_says_nothing(giver, mute):
    threading.Thread(target=giver.shake, args=(1010,), daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(Lost, match="passphrase is wrong"):
        srt.called(["127.0.0.1", "127.0.0.2"], giver.port, srt.Settings(), 0.6)
    assert time.monotonic() - begun < 1.5
    assert "livediffusion-srt" not in {t.name for t in threading.enumerate()}


def test_an_old_other_end_and_none_are_told(giver):
    giver.magic = 2
    with pytest.raises(Lost, match=r"older than 1\.3"):
        joined(giver)
    nobody = srt.Srt("127.0.0.1", streams.free_port(socket.SOCK_DGRAM), srt.Settings())
    with pytest.raises(Lost, match="nobody answers"):
        nobody.open(0.3)
    nobody.close()


def test_whatever_comes_from_the_other_end_is_taken(giver):
    """Hostile packets: nothing raises, nothing grows, and close is quick."""
    made = joined(giver)
    random = np.random.default_rng(1)
    for _ in range(3000):
        size = int(random.integers(0, 120))
        head = struct.pack(">HHIII", 0x8000 | int(random.integers(0, 9)), 0,
                           int(random.integers(0, 2**32)), 0, giver.own)  # fmt: skip
        if random.random() < 0.4:
            head = struct.pack(">IIII", int(random.integers(0, 2**31)),
                               int(random.integers(0, 2**32)), 0, giver.own)  # fmt: skip
        if head[1] != 5:  # the end is the end
            giver.wire.sendto(head + random.bytes(size), giver.caller)
    time.sleep(0.2)
    assert len(made._parked) <= 8192 and len(made._ready) <= 8192
    limit = Limit(1)
    made.close()
    assert not limit.over
    until(lambda: "livediffusion-srt" not in {t.name for t in threading.enumerate()})


@streams.needed
def test_a_wrong_passphrase_is_told():
    pytest.importorskip("cryptography")
    server = streams.Server("srt", "passphrase=the-right-one")
    with server, pytest.raises(Lost, match="passphrase"):
        connected(server.port, "passphrase=another-one", 3)
