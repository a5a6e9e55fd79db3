"""Forbidden addresses: refused before anything is sent. Resolver and sockets are doubles."""

import contextlib
import io
import socket

import pytest
from livediffusion.live import allowed, sinks, wires
from livediffusion.live.faults import Refused
from livediffusion.live.relay import Relay
from livediffusion.live.sinks import Target, whip
from livediffusion.live.sources import Lost, Wanted
from livediffusion.live.sources.address import SCHEMES, Kind
from livediffusion.trust.whole import write

pytestmark = pytest.mark.comfy

# what a name stands for at each look; None: as it stands there
TABLE = [
    ("file:///etc/passwd", None), ("FILE:///etc/passwd", None), ("file:/etc/passwd", None),
    ("/etc/passwd", None), (r"\\server\share\film", None), ("//server/share", None),
    ("C:/film.mp4", None), ("concat:/etc/passwd|/etc/hosts", None), ("concatf:list", None),
    ("data:video/mp4;base64,AAAA", None), ("subfile,,start,0,end,9,,:/etc/passwd", None),
    ("pipe:0", None), ("fd:0", None), ("unix:/var/run/docker.sock", None),
    ("crypto+http://host/", None), ("crypto:/etc/passwd", None), ("cache:http://host/", None),
    ("async:http://host/", None), ("ftp://host/film", None), ("gopher://host/", None),
    ("tcp://host:22", None), ("udp://host:53", None), ("tls://host:443", None),
    ("ipfs://host/", None), ("rtmpt://host/app/x", None), ("mmsh://host/", None),
    ("http://169.254.169.254/latest/meta-data/", None), ("http://2852039166/", None),
    ("http://0xa9fea9fe/", None),
    ("http://0251.0376.0251.0376/", None), ("http://169.254.43518/", None),
    ("http://[::ffff:169.254.169.254]/", None), ("http://[64:ff9b::a9fe:a9fe]/", None),
    ("http://[2002:a9fe:a9fe::]/", None), ("http://[fd00:ec2::254]/", None),
    ("http://[fe80::a9fe:a9fe]/", None), ("http://100.100.100.200/", None),
    ("http://168.63.129.16/", None), ("rtsp://0.0.0.0/", None), ("rtsp://[::]/", None),
    ("srt://239.1.2.3:9000", None), ("srt://[ff02::1]:9000", None),
    ("rtmp://255.255.255.255/app/x", None), ("http://127.1/", None), ("http://2130706433/", None),
    ("http://metadata.example/", ["169.254.169.254"]),
    ("rtsp://both.example/", ["10.0.0.5", "169.254.169.254"]),
    ("rtsp://inside.example/", ["127.0.0.1"]), ("rtmp://inside.example/app/x", ["::1"]),
    ("srt://inside.example:9000", ["::ffff:127.0.0.1"]),
    ("http://six.example/", ["64:ff9b::7f00:1"]),
    ("https://many.example/", ["224.0.0.1"]), ("http://link.example/", ["fe80::1%eth0"]),
    ("http://nat.example/", ["64:ff9b:1::a9fe:a9fe"]),
    # DNS that changes: allowed at the first look, and forbidden at the second
    ("http://turns.example/", [["10.0.0.5"], ["169.254.169.254"]]),
    ("rtsp://turns.example/", [["10.0.0.5"], ["127.0.0.1"]]),
    ("http://host.example:80:80/", None), ("http://user@10.0.0.5@169.254.169.254/", None),
    ("http://169.254.169.254\\@10.0.0.5/", None), ("http://10.0.0.5/..%2f", None),
]  # fmt: skip


class Sockets:
    """Doubles of the resolver and of everything that could send: they only count."""

    def __init__(self, monkeypatch):
        self.answers, self.looked, self.met = {}, [], []
        monkeypatch.setattr(socket, "getaddrinfo", self.resolve)
        monkeypatch.setattr(socket, "create_connection", self.connect)
        monkeypatch.setattr(socket.socket, "connect", self.connect)
        monkeypatch.setattr(socket.socket, "sendto", self.connect)
        self.reply = None

    def resolve(self, host, port, *rest, **more):
        self.looked.append(host)
        answer = self.answers.get(host, ["203.0.113.9"])
        if isinstance(answer[0], list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in answer]

    def connect(self, place, *rest, **more):
        self.met.append(place)
        if self.reply is not None:
            return Wire(self.reply)
        raise ConnectionRefusedError


class Wire(socket.socket):
    """A connection that has one answer ready, and leads nowhere."""

    def __init__(self, reply):
        super().__init__()
        self._reply, self.sent = io.BytesIO(reply), b""

    def makefile(self, *mode, **more):
        return self._reply

    def sendall(self, data):
        self.sent += data

    def getpeername(self):
        return ("203.0.113.9", 80)


@pytest.fixture
def sockets(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    # whatever patterns say
    patterns = [f"{s}://{host}:*" for s in SCHEMES for host in ("*", "[0.0.0.0/0]", "[::/0]")]
    write(wires.allowed().path, {"addresses": patterns}, lasting=False)
    return Sockets(monkeypatch)


def opened(text):
    """All that opens an address, as far as it gets."""
    Kind.check(text)
    address = wires.checked(text, SCHEMES)
    if address.scheme == "srt":
        wires.look_up(address)
    elif address.scheme in ("http", "https"):
        wires.ask(address).close()
    else:
        Relay(address).close()


@pytest.mark.parametrize("text, leads", TABLE, ids=range(len(TABLE)))
def test_a_forbidden_address_is_refused_before_anything_is_sent(sockets, text, leads):
    host = text.partition("://")[2].partition("/")[0].partition(":")[0]
    turns = bool(leads) and isinstance(leads[0], list)
    if leads:
        sockets.answers[host] = leads
    if turns:
        with pytest.raises(Lost):  # nothing listens there, and it was tried
            opened(text)
        assert [place[0] for place in sockets.met] == ["10.0.0.5"]
        sockets.met.clear()
    with pytest.raises(Refused, match=r"^address: "):
        opened(text)
    assert sockets.met == []
    assert set(sockets.looked) <= {host}
    for to in ("stream", "whip"):
        if not leads:
            with pytest.raises(Refused, match=r"^(address|to): "):
                sinks.kind(to).check(Target(to, "", text, 30.0, 6.0))
    assert sockets.met == []


def test_a_name_is_looked_up_once_and_the_connection_goes_to_that_very_address(sockets):
    sockets.answers["cam.example"] = [["203.0.113.7"], ["169.254.169.254"]]
    with pytest.raises(Lost):
        opened("http://cam.example/film")
    assert sockets.looked == ["cam.example"] and sockets.met == [("203.0.113.7", 80)]


REDIRECTS = [
    "http://169.254.169.254/latest/", "//169.254.169.254/", "http://[fd00:ec2::254]/",
    "file:///etc/passwd", "ftp://host/", "rtsp://host/", "http://127.0.0.1:8188/",
    "http://inside.example/", "http://2130706433/", "gopher://x/", "data:,x", "http://",
]  # fmt: skip


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", REDIRECTS)
def test_a_server_that_leads_to_a_forbidden_address_is_not_followed(sockets, status, location):
    sockets.answers["inside.example"] = ["127.0.0.1"]
    sockets.reply = f"HTTP/1.1 {status} X\r\nLocation: {location}\r\n\r\n".encode()
    with pytest.raises((Refused, Lost)):
        wires.ask(wires.checked("http://me:word@first.example/film", SCHEMES)).close()
    # an empty host leads back to the first one, again and again
    assert {place[0] for place in sockets.met} == {"203.0.113.9"}


def test_a_login_goes_to_the_first_server_only(sockets, monkeypatch):
    replies = [
        b'HTTP/1.1 401 X\r\nWWW-Authenticate: Basic realm="x"\r\n\r\n',
        b"HTTP/1.1 302 X\r\nLocation: http://second.example/film\r\n\r\n",
        b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n",
    ]
    wired = []

    def connect(place, *rest, **more):
        wired.append(Wire(replies[len(wired)]))
        return wired[-1]

    monkeypatch.setattr(socket, "create_connection", connect)
    wires.ask(wires.checked("http://me:word@first.example/film", SCHEMES)).close()
    assert [b"Authorization" in wire.sent for wire in wired] == [False, True, False]
    assert b"Host: second.example\r\n" in wired[2].sent


class Peer:
    """A connection of WebRTC that says yes to everything."""

    async def accept(self, answer):
        pass

    async def close(self):
        pass


class Loop:
    """Its event loop, in which nothing is done."""

    closed = 0

    def call(self, work, timeout):
        work.close()
        return Peer(), "v=0"

    def close(self, wait):
        Loop.closed += 1


CREATED = b"HTTP/1.1 201 X\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n"
LED = b"HTTP/1.1 307 X\r\nLocation: %s\r\n\r\n"


@pytest.mark.parametrize("replies, told", [
    ([CREATED % b"/whip/1", b"HTTP/1.1 200 X\r\n\r\n"], [True, True]),
    ([CREATED % b"http://second.example/whip/1", b"HTTP/1.1 200 X\r\n\r\n"], [True, False]),
    ([LED % b"http://second.example/whip", CREATED % b"http://first.example/whip/1",
      b"HTTP/1.1 200 X\r\n\r\n"], [True, False, False]),
    ([CREATED % b"/whip/1", LED % b"http://second.example/", b"HTTP/1.1 200 X\r\n\r\n"],
     [True, True, False]),
    ([CREATED % b"/whip/1", LED % b"http://[second/"], [True, True]),
    ([CREATED % b"http://[second/"], [True]),
])  # fmt: skip
def test_a_token_goes_to_the_first_server_only(sockets, monkeypatch, replies, told):
    """Whatever a WHIP server answers to offer and farewell; and no thread stays."""
    wired = []

    def connect(place, *rest, **more):
        wired.append(Wire(replies[len(wired)]))
        return wired[-1]

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(Loop, "closed", 0)
    monkeypatch.setattr(whip, "Loop", Loop)
    monkeypatch.setattr(whip.offers, "answer", lambda *given: "v=0")
    made = whip.Kind(Target("whip", "", "http://:key@first.example/whip", 30, 4.0))
    with contextlib.suppress(Lost, Refused):
        made.open(64, 64)
    made.close()
    assert [b"Authorization: Bearer key\r\n" in wire.sent for wire in wired] == told
    assert [b"key" in wire.sent for wire in wired] == told
    assert Loop.closed == 1


def test_a_redirect_elsewhere_needs_a_pattern_of_its_own(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    wires.allowed().add("address", "http://first.example/film")
    sockets = Sockets(monkeypatch)
    sockets.reply = b"HTTP/1.1 302 X\r\nLocation: http://second.example/film?key=abcdef\r\n\r\n"
    with pytest.raises(allowed.NotAllowed, match=r"http://second\.example/film is not") as refused:
        wires.ask(wires.checked("http://first.example/film", SCHEMES))
    assert "abcdef" not in str(refused.value) and len(sockets.met) == 1


def test_what_nobody_allowed_is_not_looked_up(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    sockets = Sockets(monkeypatch)
    source = Kind(Wanted("rtsp://me:word@cam.example/film", 64, 64, 30))
    with pytest.raises(allowed.NotAllowed, match=r"is not allowed yet\. Press Allow") as refused:
        source.open()
    source.close()
    assert "word" not in str(refused.value) and sockets.looked == sockets.met == []
    assert refused.value.allow["what"].startswith("rtsp://{k")


def test_a_line_that_is_no_pattern_takes_nothing_from_the_others(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    path = wires.allowed().path
    path.parent.mkdir(parents=True)
    path.write_text('{"addresses": ["x", "http://a.example/"], "devices": []}', encoding="utf-8")
    wires.checked("http://a.example/", SCHEMES)
    for text in ("{", "[]", '{"other": 1}', '{"addresses": [1]}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(Refused, match=r"allowed\.json cannot be read"):
            wires.checked("http://a.example/", SCHEMES)
    path.unlink()
    with pytest.raises(allowed.NotAllowed):
        wires.checked("http://a.example/", SCHEMES)
