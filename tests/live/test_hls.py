"""HLS: the parts of a playlist, each once, whatever is lost in between."""

import contextlib
import re
import socket
import threading
import time

import pytest
from clock import Limit
from livediffusion.live import hls, wires
from livediffusion.live.faults import Refused
from livediffusion.live.sources import Lost, Memory, Wanted, address

pytestmark = pytest.mark.comfy
LASTS = 0.2  # seconds of a part


@pytest.fixture(autouse=True)
def anything_here(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.setattr(hls, "SILENCE", 0.9)
    wires.allowed().add("address", "http://127.0.0.1:*/*")
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("livediffusion-")]


class Server:
    """A web server with a live stream of parts, each `<number>` and a hundred dots.

    Attributes:
        last: number of the newest part; `length` of the list.
        ended: the list says so.
        name: of its parts, before their number.
        fails: for a path, how often it fails, and how: a status, or how many bytes come of it.
    """

    def __init__(self):
        self.last, self.length, self.ended, self.fails = 9, 5, False, {}
        self.name = ""
        self._door = socket.create_server(("127.0.0.1", 0))
        self.place = f"http://127.0.0.1:{self._door.getsockname()[1]}/list"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self._door.accept()
                with wire, contextlib.suppress(OSError):
                    wire.sendall(self._answer(wire.recv(2**14).split()[1].decode()))

    def _answer(self, path):
        number = path[1:].partition("?")[0].removeprefix(self.name)
        body = self._list() if path == "/list" else f"<{number}>{'.' * 100}".encode()
        path = path.partition("?")[0]  # signed anew in each list, as by many services
        times, how = self.fails.get(path, (0, None))
        status = 200
        if times:
            self.fails[path] = times - 1, how
            status = how if how >= 400 else 200
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        return head + (body[:how] if times and how < 400 else body)

    def _list(self):
        first = max(0, self.last - self.length + 1)
        lines = ["#EXTM3U", f"#EXT-X-TARGETDURATION:{LASTS}", f"#EXT-X-MEDIA-SEQUENCE:{first}"]
        lines += [
            f"#EXTINF:{LASTS},\n/{self.name}{number}?{time.time()}"
            for number in range(first, self.last + 1)
        ]
        return "\n".join([*lines, *(["#EXT-X-ENDLIST"] if self.ended else [])]).encode()

    def close(self):
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        self._thread.join(5)


@pytest.fixture
def server():
    with contextlib.closing(Server()) as made:
        yield made


class Viewer:
    """What comes of one address over its connections, one after the other.

    Attributes:
        got: all bytes.
        trouble: why the last connection ended.
    """

    def __init__(self, server):
        self._place, self.got, self._memory = wires.checked(server.place, ("http",)), b"", Memory()
        self.trouble, self._hls = None, None

    def open(self):
        call = wires.Call()
        self._hls = hls.Hls(wires.ask(self._place, call=call), 96, self._memory, call)
        self._thread = threading.Thread(target=self._read, args=(self._hls,), daemon=True)
        self._thread.start()
        return self

    def _read(self, file):
        try:
            while data := file.read(64):
                self.got += data
        except (Lost, Refused) as reason:
            self.trouble = str(reason)

    def close(self):
        self._hls.close()
        self._thread.join(5)

    @property
    def parts(self):
        """Numbers of the parts that are there as a whole."""
        return [int(number) for number in re.findall(rb"<(\d+)>[.]{100}", self.got)]

    def again(self):
        self.close()
        self.trouble = None
        return self.open()


@pytest.fixture
def viewer(server):
    with contextlib.closing(Viewer(server)) as made:
        yield made.open()


def until(condition, seconds=5):
    limit = Limit(seconds)
    while not condition():
        assert not limit.over, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("path, how", [
    ("/list", 502), ("/list", 0), ("/list", 30), ("/11", 404), ("/11", 0), ("/11", 40),
])  # fmt: skip
def test_what_fails_once_or_twice_is_asked_for_again_and_nothing_comes_twice(
    server, viewer, path, how
):
    until(lambda: viewer.parts == [8, 9])
    server.fails[path] = 2, how
    for number in range(10, 14):
        server.last = number
        until(lambda number=number: viewer.parts[-1:] == [number])
    assert viewer.got == b"".join(b"<%d>" % number + b"." * 100 for number in range(8, 14))
    assert viewer.trouble is None


@pytest.mark.parametrize("path, how, why", [
    ("/list", 502, "answers 502"), ("/10", 404, "answers 404 for a part"),
    ("", 0, "has no new part"),
])  # fmt: skip
def test_what_fails_for_long_is_told_and_nothing_comes_twice_when_it_is_back(
    server, viewer, path, how, why
):
    """Also behind a web server that gives the list of an encoder that is dead."""
    until(lambda: viewer.parts == [8, 9])
    if path:
        server.last, server.fails[path] = 10, (10_000, how)
    begun = time.monotonic()
    until(lambda: viewer.trouble)
    assert why in viewer.trouble and time.monotonic() - begun > 0.5
    for _ in range(2):
        with contextlib.suppress(Lost):
            viewer.again()
            time.sleep(0.1)
    assert viewer.parts == [8, 9]
    server.fails.clear()
    viewer.again()
    for number in (10, 11):
        server.last = number
        until(lambda number=number: viewer.parts[-1:] == [number])
    assert viewer.parts == [8, 9, 10, 11]


def test_a_part_that_was_begun_is_not_begun_again_by_the_next_connection(server, viewer):
    until(lambda: viewer.parts == [8, 9])
    server.last, server.fails["/10"] = 10, (10_000, 40)
    until(lambda: viewer.got.endswith(b"<10>" + b"." * 36))
    viewer.close()
    server.fails.clear()
    server.last, viewer.got = 11, b""
    viewer.open()
    until(lambda: viewer.parts[-1:] == [11])
    assert viewer.parts == [11] and b"<10>" not in viewer.got


def test_a_stream_that_ends_is_not_played_again(server, viewer):
    server.last, server.ended = 10, True
    until(lambda: viewer.trouble)
    assert "has ended the stream" in viewer.trouble and viewer.parts == [8, 9, 10]
    viewer.again()
    until(lambda: viewer.trouble)
    assert viewer.parts == [8, 9, 10]


def test_a_film_is_played_from_its_beginning_by_every_connection(server):
    server.last, server.ended = 4, True
    with contextlib.closing(Viewer(server).open()) as viewer:
        until(lambda: viewer.trouble)
        viewer.again()
        until(lambda: viewer.trouble)
        assert viewer.parts == 2 * [0, 1, 2, 3, 4]


@pytest.mark.parametrize("now", [0, 3])
def test_a_server_that_counts_from_the_beginning_again_is_another_stream(server, viewer, now):
    server.last = 30
    until(lambda: viewer.parts[-1:] == [30])
    server.last = now
    until(lambda: viewer.trouble)
    assert "has begun another stream" in viewer.trouble
    viewer.again()
    server.last = now + 1
    until(lambda: viewer.parts[-1:] == [now + 1])


def test_a_list_that_is_a_little_old_is_not_another_stream(server, viewer):
    """As from the second of two servers that share the work."""
    until(lambda: viewer.parts == [8, 9])
    server.last = 8
    time.sleep(0.25)
    viewer.again()
    time.sleep(0.1)
    server.last = 10
    until(lambda: viewer.parts[-1:] == [10])
    assert viewer.parts == [8, 9, 10]


@pytest.mark.parametrize("last, ended", [(9, False), (10, False), (4, True), (9, True)])
def test_another_stream_of_the_same_numbers_begins(server, viewer, last, ended):
    """A list without numbers of its own, or a film in the place of what was live."""
    until(lambda: viewer.parts == [8, 9])
    viewer.close()
    server.name, server.last, server.ended, viewer.got = "other", last, ended, b""
    viewer.open()
    until(lambda: viewer.parts[-1:] == [last])
    assert viewer.parts == list(range(max(0, last - 4) if ended else last - 1, last + 1))


def test_after_a_break_it_is_as_late_as_ever(server, viewer):
    until(lambda: viewer.parts == [8, 9])
    viewer.close()
    server.last = 12
    viewer.open()
    until(lambda: viewer.parts[-1:] == [12])
    assert viewer.parts == [8, 9, 11, 12]


def test_the_next_of_long_parts_is_waited_for():
    """Behind what was given before a break, a part of ten seconds may just have begun."""
    source = address.Kind(Wanted("http://127.0.0.1/list", 96, 96, 30))
    assert source.patience == address.BEGINS
    source._between = 3 * 10.0  # hls.patience
    assert source.patience > 30


@pytest.mark.parametrize("line", [
    "#EXT-X-BYTERANGE:100@0", '#EXT-X-MAP:URI="a.mp4",BYTERANGE="100@0"',
    '#EXT-X-MAP:BYTERANGE="100@0",URI="a.mp4"', "#EXT-X-MAP:BYTERANGE=1",
])  # fmt: skip
def test_parts_of_a_file_are_refused_in_words(line):
    with pytest.raises(Refused, match=r"^address: this HLS stream is parts of a file"):
        hls.playlist(f"#EXTM3U\n{line}\n#EXTINF:1,\na.ts\n")
