"""No sign in an address becomes a line of its own in what is sent: a sweep of all of them, through
every part of an address and every way that writes headers.
"""

import io
import socket

import pytest
from livediffusion.live import rtsp, sinks, wires
from livediffusion.live.faults import Refused
from livediffusion.live.heads import head
from livediffusion.live.logins import Login
from livediffusion.live.sinks import coding, rtmp, whip
from livediffusion.live.sinks import rtsp as sink
from livediffusion.live.sources import Lost
from livediffusion.trust import addresses

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]
ANY = tuple(addresses.SCHEMES)
SIGNS = [*map(chr, range(32)), "\x7f", "\x85", "\u2028"]
PARTS = ["me{}:word", "me:wo{}rd", ":to{}ken"]
WHERE = [
    ("", "/live/x{}y/z"), ("", "/live/x/y?a=b{}c"), *((f"{part}@", "/live/x") for part in PARTS)
]  # fmt: skip
ASKS = {
    "Digest": 'Digest realm="a", nonce="b", qop="auth"', "Basic": 'Basic realm="a"',
}  # fmt: skip
NO = "HTTP/1.1 401 No\r\nWWW-Authenticate: {}\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    for scheme in ANY:
        wires.allowed().add("address", f"{scheme}://10.0.0.5:*")


class Wire(socket.socket):
    """Leads nowhere, and has one answer."""

    def __init__(self, reply):
        super().__init__()
        self._reply, self.sent = reply.encode(), b""

    def makefile(self, *mode, **more):
        return io.BytesIO(self._reply)

    def sendall(self, data):
        self.sent += data

    def getpeername(self):
        return ("10.0.0.5", 80)


def asked(address, ask, monkeypatch, call):
    made = []

    def connect(*given):
        made.append(Wire(NO.format(ask)))
        return made[-1]

    monkeypatch.setattr(wires, "connect", connect)
    try:
        call(address)
    finally:
        yield from (wire.sent for wire in made)


def by_http(address, ask, monkeypatch):
    yield from asked(address, ask, monkeypatch, lambda it: wires.ask(it).close())


def by_whip(address, ask, monkeypatch):
    def called(self, work, timeout):
        work.close()
        return None, "v=0"

    def opened(it):
        made = whip.Kind(sinks.Target("whip", "", "http://10.0.0.5/", 30, 4.0))
        with pytest.raises(Lost):
            made.open(64, 64)
        made._resource = it
        made._loop = Quiet()
        made.close()

    monkeypatch.setattr(whip, "Loop", Quiet)
    monkeypatch.setattr(whip.Kind, "_call", called)
    monkeypatch.setattr(wires, "checked", lambda *given, **more: address)
    yield from asked(address, ask, monkeypatch, opened)


class Quiet:
    """An event loop that does nothing."""

    def call(self, work, timeout):
        work.close()

    def close(self, wait=0.0):
        pass


def by_rtsp_in(address, ask, monkeypatch):
    one = rtsp.Conversation(address, "rtsp://127.0.0.1:1/x")
    yield one.asked(b"DESCRIBE rtsp://127.0.0.1:1/x RTSP/1.0\r\nCSeq: 1\r\n\r\n")
    no = f"RTSP/1.0 401 No\r\nCSeq: 1\r\nWWW-Authenticate: {ask}\r\n\r\n"
    if address.login:
        yield one.answered(no.encode())[1]


class Link:
    """A server's answers, and what it was told."""

    place = "10.0.0.5:1935"

    def __init__(self, *answers):
        self.answers, self.sent = list(answers), []

    def heard(self, timeout):
        return self.answers.pop(0) if self.answers else b""

    def send(self, data):
        self.sent.append(data)

    def close(self):
        pass


def by_rtsp_out(address, ask, monkeypatch):
    one = sink.Rtsp(address, None)
    one._link = link = Link()
    one._say("OPTIONS", one._url, {})
    one._login.hear([ask])
    one._say("OPTIONS", one._url, {})
    yield from link.sent


def by_rtmp(address, ask, monkeypatch):
    """What connect and publish say, as lines."""
    said = []
    monkeypatch.setattr(rtmp, "Link", lambda address: Link(b"\x03" + bytes(2 * 1536)))
    monkeypatch.setattr(rtmp.Rtmp, "_command", lambda self, *values: said.extend(values))
    monkeypatch.setattr(rtmp.Rtmp, "_until", lambda *given: [])
    rtmp.Rtmp.check(address)
    coder = coding.Encoder.__new__(coding.Encoder)
    coder.width = coder.height = 64
    rtmp.Rtmp(address, coder).open()
    texts = [v for one in said for v in (one.values() if isinstance(one, dict) else [one])]
    yield "\n".join(text for text in texts if isinstance(text, str)).encode()


WAYS = {"http": [by_http, by_whip], "rtsp": [by_rtsp_in, by_rtsp_out], "rtmp": [by_rtmp]}
ALL = [(scheme, way) for scheme, ways in WAYS.items() for way in ways]


def lines(data):
    """How many lines a head has, however its reader tells them apart."""
    return len(data.replace(b"\0", b"\n").partition(b"\r\n\r\n")[0].splitlines())


def spelt(sign):
    """Encoded, and as it is."""
    code = "".join(f"%{byte:02X}" for byte in sign.encode())
    return [code, code.lower(), sign]


@pytest.mark.parametrize("scheme, way", ALL, ids=[way.__name__ for _, way in ALL])
@pytest.mark.parametrize("ask", ASKS)
def test_no_sign_of_an_address_is_a_line_of_what_is_sent(scheme, way, ask, monkeypatch):
    """As typed, and as it would be if it had slipped through where addresses are read."""
    sent = 0
    for login, tail in WHERE:
        plain = addresses.parsed(f"{scheme}://{login}10.0.0.5{tail}".replace("{}", ""))
        with monkeypatch.context() as patch:
            usual = [lines(data) for data in way(plain, ASKS[ask], patch)]
        for text in (text for sign in SIGNS for text in spelt(sign)):
            given = f"{scheme}://{login}10.0.0.5{tail}".replace("{}", f"{text}X-Method:")
            forced = plain._replace(
                login=login.replace("{}", text).rstrip("@"),
                path=tail.partition("?")[0].replace("{}", text),
                query=tail.partition("?")[2].replace("{}", text),
            )
            # RTMP has lengths, no lines: there it is as it is read
            slips = text.isascii() and (way is not by_rtmp or text[0] == "%")
            for typed in (True, False) if slips else (True,):
                with monkeypatch.context() as patch:
                    try:
                        address = wires.checked(given, ANY, sink=True) if typed else forced
                        for data, many in zip(way(address, ASKS[ask], patch), usual, strict=False):
                            assert not data or lines(data) == many, (given, data)
                            sent += 1
                    except (Lost, Refused):
                        pass
    assert sent > 100  # in a path and a query of the others they stay what they are: %0D


def test_a_name_stands_for_nothing_that_would_not_be_read_there():
    """Half a sign here, half there: together they would be a line break, or lead out of a path."""
    store = wires.concealed()
    name = store.read("http://10.0.0.5/?token=0d%0aX:y").query.partition("=")[2]
    for where in ("http://:x%{}@10.0.0.5/", "http://me:x%{}@10.0.0.5/"):
        with pytest.raises(Refused, match=r"^address: .* Type it anew"):
            wires.checked(where.format(name), ANY)
    up = store.read("http://10.0.0.5/?token=../admin").query.partition("=")[2]
    with pytest.raises(Refused, match=r"^address: .* Type it anew"):
        wires.checked(f"http://10.0.0.5/live/{up}", ANY)


def test_who_is_there_is_said_in_utf_8_whatever_letters_a_name_has():
    for user in ("me%C3%BC", "%E2%82%AC"):
        login = Login(addresses.parsed(f"rtsp://{user}:w%C3%B6rd@10.0.0.5/"))
        login.hear([ASKS["Digest"]])
        said = head([f"Authorization: {login.answer('OPTIONS', '*')}"])
        assert bytes.fromhex(user.replace("%", "").replace("me", "6d65")) in said
