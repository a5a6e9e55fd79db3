"""Servers that are slow, and servers that drip: the first are waited for, the second let go."""

import contextlib
import io
import socket
import threading
import time

import pytest
from clock import Limit
from counting import count, counted
from livediffusion.live import wires
from livediffusion.live.sources import Lost, Wanted, address
from livediffusion.trust.addresses import parsed
from PIL import Image

pytestmark = pytest.mark.comfy
DRIP = 0.02  # seconds between two bytes


@pytest.fixture(autouse=True)
def anything_here(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    for host in ("127.0.0.1", "localhost"):
        wires.allowed().add("address", f"http://{host}:*/*")
    yield
    assert not mine()


def mine():
    return {t.name for t in threading.enumerate() if t.name.startswith("livediffusion-")}


class Server:
    """Args:
    answers: takes a request's first line and all of it, and a wire; gives bytes to send.

    Attributes:
        open: connections that the other end has not closed.
    """

    def __init__(self, answers):
        self._answers, self.open = answers, 0
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self._door.accept()
                self._threads.append(threading.Thread(target=self._talk, args=(wire,), daemon=True))
                self._threads[-1].start()

    def _talk(self, wire):
        self.open += 1
        with wire, contextlib.suppress(OSError):
            asked = wire.recv(2**16).decode()
            for data in self._answers(asked.partition(" HTTP/")[0], asked):
                wire.sendall(data)
        self.open -= 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        for one in self._threads:
            one.join(5)


def jpeg(number):
    out = io.BytesIO()
    Image.fromarray(counted(number)).save(out, "JPEG", quality=95)
    return out.getvalue()


def film(first):
    yield b"HTTP/1.1 200 X\r\nContent-Type: multipart/x-mixed-replace; boundary=f\r\n\r\n"
    for number in range(first, first + 500):
        yield b"--f\r\nContent-Type: image/jpeg\r\n\r\n" + jpeg(number) + b"\r\n--f\r\n"
        time.sleep(DRIP)


def test_a_server_that_takes_its_time_for_every_step_is_waited_for(monkeypatch):
    """Two questions who is there and two ways elsewhere, each within the silence it may keep."""
    monkeypatch.setattr(address, "SILENCE", 0.8)

    def answers(what, asked):
        time.sleep(0.3)
        if "Authorization: Digest" not in asked:
            ask = b'WWW-Authenticate: Digest realm="a", nonce="b"\r\n'
            yield b"HTTP/1.1 401 X\r\n" + ask + b"Content-Length: 0\r\n\r\n"
        elif what == "GET /a":
            yield b"HTTP/1.1 302 X\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n"
        else:
            yield from film(7)

    with Server(answers) as server:
        source = address.Kind(Wanted(f"http://me:word@127.0.0.1:{server.port}/a", 96, 96, 30))
        limit = Limit(5)
        with contextlib.closing(source):
            source.open()
            while (shot := source.newest(0.1)) is None:
                assert not limit.over
        assert count(shot.picture) >= 7


def test_a_name_that_was_asked_for_while_the_network_was_away_is_asked_for_anew(monkeypatch):
    """The system repeats a question that was lost only after seconds; a new one is answered."""
    monkeypatch.setattr(wires, "_BETWEEN", 0.1)
    away, hung, over = threading.Event(), [], threading.Event()
    away.set()

    def looked_up(host, *rest, **more):
        if away.is_set():
            hung.append(host)
            over.wait(10)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.9", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    name = parsed("http://away.example/")
    try:
        for _ in range(10):
            with pytest.raises(Lost, match="no name server answers"):
                wires.look_up(name, patience=0.11)
        assert len(hung) == 4  # no more threads than that
        away.clear()
        with pytest.raises(Lost):  # all are under way
            wires.look_up(name, patience=0.01)
        over.set()
        with contextlib.suppress(Lost):
            wires.look_up(name, patience=1)
        assert wires.look_up(name) == ["203.0.113.9"]
        over.clear()
        away.set()
        with pytest.raises(Lost):
            wires.look_up(name, patience=0.15)
        away.clear()
        assert wires.look_up(name, patience=0.5) == ["203.0.113.9"]
    finally:
        over.set()
        limit = Limit(5)
        while mine():
            assert not limit.over
            time.sleep(0.01)


def dripping(data):
    for at in range(len(data)):
        yield data[at : at + 1]
        time.sleep(DRIP)
    while True:
        yield b"x"
        time.sleep(DRIP)


OK = b"HTTP/1.1 200 X\r\nContent-Type: application/vnd.apple.mpegurl\r\n\r\n"
LISTS = {
    "GET /all": OK + b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n/list\n",
    "GET /list": OK + b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/1.ts\n#EXTINF:1,\n/2.ts\n",
    "GET /1.ts": OK + b"G" * 1000,
}


@pytest.mark.parametrize("slow, begin", [
    ("GET /all", ""), ("GET /all", "#EXTM3U"), ("GET /list", ""), ("GET /list", "#EXTM3U"),
    ("GET /1.ts", ""), ("GET /1.ts", "GGG"), ("GET /bytes", ""),
])  # fmt: skip
def test_whoever_drips_leaves_no_thread_and_no_connection(slow, begin):
    """Byte after byte and never an end, in whatever is asked for: closed, it is gone at once."""

    def answers(what, asked):
        whole = LISTS.get(what, b"HTTP/1.1 200 " + b"X" * 500)
        if what == slow:
            fast = whole.find(begin.encode()) + len(begin) if begin else 0
            yield whole[:fast]
            yield from dripping(whole[fast:])
        yield whole

    with Server(answers) as server:
        first = slow if slow == "GET /bytes" else "GET /all"
        name = f"http://127.0.0.1:{server.port}{first.removeprefix('GET ')}"
        source = address.Kind(Wanted(name, 96, 96, 30))
        source.open()
        with contextlib.suppress(Lost):
            source.newest(0.3)
        limit = Limit(1)
        source.close()
        assert not limit.over
        assert not mine()
        limit = Limit(3)
        while server.open:
            assert not limit.over
            time.sleep(0.01)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 X\r\n\r\n"])
def test_an_answer_that_drips_has_an_end_also_where_nobody_closes_it(head, monkeypatch):
    monkeypatch.setattr(wires, "_ANSWER", 0.3)

    def answers(what, asked):
        yield head
        yield from dripping(b"HTTP/1.1 200 X\r\n")

    with Server(answers) as server:
        place = wires.checked(f"http://127.0.0.1:{server.port}/", ("http",))
        limit = Limit(1.5)
        with pytest.raises(Lost, match="does not answer"):
            answer = wires.ask(place, "POST", {}, b"offer")
            with contextlib.closing(answer):
                answer.whole(1000_000)
        assert not limit.over


@pytest.mark.parametrize("length", [b"", b"Content-Length: 9\r\n"])
def test_an_answer_that_is_cut_off_is_not_taken_for_a_whole_one(length):
    def answers(what, asked):
        yield b"HTTP/1.1 200 X\r\n" + length + b"\r\nhalf"

    with Server(answers) as server:
        answer = wires.ask(wires.checked(f"http://127.0.0.1:{server.port}/", ("http",)))
        with contextlib.closing(answer):
            if not length:
                assert answer.whole(100) == b"half"
            else:
                with pytest.raises(Lost, match="has cut the connection"):
                    answer.whole(100)
