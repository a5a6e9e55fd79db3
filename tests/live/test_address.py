"""Source address with real other ends: FFmpeg's RTSP, RTMP, SRT, HLS, and motion JPEG; the cable
in hand.
"""

import contextlib
import http.server
import io
import logging
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest
from clock import Limit
from counting import count, counted
from ends import LONG, pulls
from livediffusion.live import wires
from livediffusion.live.pulled import GIVING, PulledFeed
from livediffusion.live.sources import Lost, Wanted
from livediffusion.live.sources.address import Kind
from PIL import Image
from publish import Publisher
from rtsp_server import RtspServer
from wiring import Wiring

pytestmark = pytest.mark.comfy
PULLS = pulls(1)
FEW = [("rtsp", "reset"), ("mjpeg", "still"), ("hls", "reset")]
FFMPEG = shutil.which("ffmpeg")


@pytest.fixture(autouse=True)
def anything_here(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    for scheme in ("rtsp", "rtmp", "srt", "http"):
        for host in ("127.0.0.1", "localhost"):
            wires.allowed().add("address", f"{scheme}://{host}:*/*")


def jpeg(number):
    out = io.BytesIO()
    Image.fromarray(counted(number)).save(out, "JPEG", quality=95)
    return out.getvalue()


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Motion JPEG at /film and /bare, else a folder's files."""

    def do_GET(self):
        if self.path not in ("/film", "/bare"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                number = int((time.monotonic() - self.server.began) * 50) % 4096
                data = jpeg(number)
                length = f"Content-Length: {len(data)}\r\n" if self.path == "/film" else ""
                head = f"--frame\r\nContent-Type: image/jpeg\r\n{length}\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
                time.sleep(0.02)

    def log_message(self, *args):
        pass


def _free(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def _web(folder):
    def made(*args):
        return _Handler(*args, directory=str(folder))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), made)
    server.daemon_threads, server.block_on_close = True, False
    server.began = time.monotonic()  # the film's first picture: it begins anew after 80 s
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def _rtsp(folder):
    server = RtspServer()
    with contextlib.closing(server), Publisher(server.url, "rtsp", rtsp_transport="tcp"):
        _until(lambda: server.ready)
        yield server.port, "rtsp://127.0.0.1:{}/film"


@contextlib.contextmanager
def _listening(*output):
    """ffmpeg as a server that gives the film to whoever calls, one after the other."""
    if FFMPEG is None:
        pytest.skip("there is no ffmpeg")
    feed, over, children = _free(), threading.Event(), []
    brief = ["-analyzeduration", "100000", "-probesize", "32768"]
    take = [*brief, "-fflags", "nobuffer", "-f", "mpegts", "-i", f"tcp://127.0.0.1:{feed}"]
    command = [FFMPEG, "-v", "quiet", *take, "-c", "copy", *output]

    def again():
        while not over.is_set():
            children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            children[-1].wait()

    keeper = threading.Thread(target=again, daemon=True)
    with Publisher(f"tcp://127.0.0.1:{feed}?listen=1", "mpegts"):
        keeper.start()
        try:
            yield lambda: children[-1].kill()
        finally:
            over.set()
            for one in children:
                one.kill()
            keeper.join(5)


@contextlib.contextmanager
def _rtmp(folder):
    port = _free()
    with _listening("-f", "flv", "-listen", "1", f"rtmp://127.0.0.1:{port}/live/film") as again:
        yield port, "rtmp://127.0.0.1:{}/live/film", again


@contextlib.contextmanager
def _srt(folder):
    port = _free(socket.SOCK_DGRAM)
    known = [FFMPEG or "", "-hide_banner", "-protocols"]
    if FFMPEG and b" srt\n" not in subprocess.run(known, capture_output=True, check=True).stdout:
        pytest.skip("this ffmpeg has no SRT")
    place = f"srt://127.0.0.1:{port}?mode=listener&latency=50000"
    with _listening("-f", "mpegts", place) as again:
        # it takes five seconds to notice that who called is gone, and until then takes nobody else
        yield port, "srt://127.0.0.1:{}?latency=50", again


@contextlib.contextmanager
def _mjpeg(folder):
    with _web(folder) as port:
        yield port, "http://127.0.0.1:{}/film"


@contextlib.contextmanager
def _hls(folder):
    settings = {"hls_time": "0.33", "hls_list_size": "6", "hls_flags": "delete_segments"}
    with _web(folder) as port, Publisher(str(folder / "film.m3u8"), "hls", **settings):
        _until((folder / "film.m3u8").is_file)
        yield port, "http://127.0.0.1:{}/film.m3u8"


WAYS = {"rtsp": _rtsp, "rtmp": _rtmp, "srt": _srt, "mjpeg": _mjpeg, "hls": _hls}


def _until(condition, seconds=15):
    limit = Limit(seconds)
    while not (value := condition()):
        assert not limit.over, "it did not happen"
        time.sleep(0.005)
    return value


def seen(source, many, seconds=20):
    """Numbers of so many pictures of a source that is open."""
    numbers, limit = [], Limit(seconds)
    while len(numbers) < many:
        assert not limit.over, numbers
        if (shot := source.newest(0.25)) is not None:
            numbers.append(count(shot.picture))
    return numbers


@contextlib.contextmanager
def there(name):
    """A source that has begun to give pictures; who listens may need a moment before it does."""
    limit = Limit(15)
    while True:
        source = Kind(Wanted(name, 96, 96, 30))
        try:
            source.open()
            seen(source, 1)
            break
        except Lost:
            source.close()
            assert not limit.over
            time.sleep(0.1)
    try:
        yield source
    finally:
        source.close()


def _listens(port, udp):
    """Whether somebody waits at a port, without calling there: it may take only one."""
    with open(f"/proc/net/{'udp' if udp else 'tcp'}", encoding="ascii") as table:
        lines = [line.split() for line in table][1:]
    return any(
        int(line[1].partition(":")[2], 16) == port and (udp or line[3] == "0A") for line in lines
    )


def _handles():
    """The descriptors of this process, and what each is."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def mine():
    return {t.name for t in threading.enumerate() if t.name.startswith("livediffusion-")}


@pytest.mark.parametrize("way", WAYS)
def test_the_counter_film_comes_in_order_and_no_picture_twice(way, tmp_path):
    with WAYS[way](tmp_path) as (port, address, *_):
        name = address.format(port)
        Kind.check(name)
        begun = time.time()
        with there(name) as source:
            numbers = seen(source, 25)
            shot = _until(lambda: source.newest(0.25))
        assert None not in numbers and numbers == sorted(set(numbers))
        assert begun < shot.captured <= time.time()
        assert not mine()


@pytest.mark.parametrize("way", WAYS if LONG else ["rtsp"])
def test_newer_pictures_take_the_place_of_those_that_nobody_took(way, tmp_path):
    with WAYS[way](tmp_path) as (port, address, *_):
        with there(address.format(port)) as source:
            first = seen(source, 1)[0]
            time.sleep(1.0)
            second, third = seen(source, 2)
        # a second of pictures was passed over, and the next is the next
        assert second - first >= 15 and 1 <= third - second <= 8


@pytest.mark.parametrize("way, how", [
    (way, how) for way in WAYS for how in ("reset", "still") if LONG or (way, how) in FEW
])  # fmt: skip
def test_a_cable_pulled_again_and_again_is_told_and_pictures_come_again(way, how, tmp_path):
    """It goes on within three seconds of the other end's return."""
    with WAYS[way](tmp_path) as (port, address, *ends):
        wiring = Wiring(port, udp=way == "srt")
        wanted = Wanted(address.format(wiring.port), 96, 96, 30)
        feed = PulledFeed(Kind, wanted)
        before, handles = mine(), _handles()
        longest = 0.0
        feed.begin()
        try:
            _until(lambda: feed.state == GIVING)
            for _ in range(PULLS):
                losses = feed.losses
                wiring.pull(how)
                for end in ends:
                    end()
                _until(lambda losses=losses: feed.losses > losses and feed.trouble)
                assert f"127.0.0.1:{wiring.port}" in feed.trouble, feed.trouble
                pulled = time.monotonic()
                # at different moments of a try
                while time.monotonic() < pulled + (0.3 + 0.37 * (feed.losses % 5)):
                    time.sleep(0.01)
                _until(lambda: not ends or _listens(port, way == "srt"))
                wiring.plug()
                back = time.monotonic()
                _until(lambda: feed.state == GIVING)
                longest = max(longest, time.monotonic() - back)
        finally:
            feed.end()
            wiring.close()
        _until(lambda: mine() <= before)
        _until(lambda: not (_handles() - handles))
        if LONG:
            logging.warning("%s %s: back within %.2f s of %d pulls", way, how, longest, PULLS)
        assert longest < 3.0


def test_a_name_that_is_not_found_any_more_is_told_and_tried_again(tmp_path, monkeypatch):
    real, gone = socket.getaddrinfo, threading.Event()

    def looked_up(host, *rest, **more):
        if host == "localhost" and gone.is_set():
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    with WAYS["mjpeg"](tmp_path) as (port, *_):
        wiring = Wiring(port)
        feed = PulledFeed(Kind, Wanted(f"http://localhost:{wiring.port}/film", 96, 96, 30))
        feed.begin()
        try:
            for _ in range(PULLS):
                _until(lambda: feed.state == GIVING)
                gone.set()
                wiring.pull("reset")
                _until(lambda: feed.trouble and "name localhost is not found" in feed.trouble)
                wiring.plug()
                gone.clear()
                limit = Limit(3)
                _until(lambda: feed.state == GIVING)
                assert not limit.over
        finally:
            feed.end()
            wiring.close()
        _until(lambda: not mine())


@pytest.mark.parametrize("scheme", ["digest", "basic"])
def test_a_server_that_asks_who_is_there_is_told_by_the_relay(scheme, tmp_path):
    server = RtspServer(login=("me", "w@rd:x"), scheme=scheme)
    with contextlib.closing(server), Publisher(server.url, "rtsp", rtsp_transport="tcp"):
        _until(lambda: server.ready)
        for login, goes in (("me:w%40rd%3Ax@", True), ("me:wrong@", False), ("", False)):
            source = Kind(Wanted(server.url.replace("://", f"://{login}"), 96, 96, 30))
            try:
                source.open()
                if goes:
                    assert len(seen(source, 3)) == 3
                else:
                    with pytest.raises(Lost, match="user and"):
                        seen(source, 1)
            finally:
                source.close()
        assert not mine()


def test_a_server_that_leads_elsewhere_is_not_followed(tmp_path):
    other = socket.create_server(("127.0.0.1", 0))
    other.settimeout(0.5)
    server = RtspServer(redirect=f"rtsp://127.0.0.1:{other.getsockname()[1]}/film")
    with contextlib.closing(server), contextlib.closing(other):
        source = Kind(Wanted(server.url, 96, 96, 30))
        try:
            source.open()
            with pytest.raises(Lost, match="leads to another address"):
                seen(source, 1)
        finally:
            source.close()
        with pytest.raises(TimeoutError):
            other.accept()


def test_motion_jpeg_without_lengths_is_cut_at_its_boundaries(tmp_path):
    with _web(tmp_path) as port, there(f"http://127.0.0.1:{port}/bare") as source:
        numbers = seen(source, 10)
    assert None not in numbers and numbers == sorted(set(numbers))
