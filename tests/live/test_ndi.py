"""NDI: a sender of ours and a receiver of ours on one machine, with the package's own library."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clock import Limit
from ends import count, counted, pulls
from inprocess import until
from livediffusion.live import ndi, sources
from livediffusion.live.faults import Refused
from livediffusion.live.pulled import GIVING, PulledFeed
from livediffusion.live.sending import SENDING, Sender
from livediffusion.live.sinks import Target
from livediffusion.live.sinks.ndi import Kind as Sink
from livediffusion.live.sources import Lost, Wanted
from livediffusion.live.sources.ndi import Kind as Source

PULLS = pulls(3)
WIDTH, HEIGHT = 192, 96


@pytest.fixture
def name(request):
    return f"livediffusion {os.getpid()} {request.node.name}"


@pytest.fixture
def library():
    return pytest.importorskip("NDIlib")


def target(name, to="ndi"):
    return Target(to, name, "", 60, 6.0)


def opened(sink, width=WIDTH, height=HEIGHT):
    sink.open(width, height)
    return sink


class Film(threading.Thread):
    """Sends numbers until it is told to stop."""

    def __init__(self, send, pause=1 / 60):
        super().__init__(daemon=True)
        self._send, self._pause, self._over = send, pause, threading.Event()
        self.number = 0
        self.start()

    def run(self):
        while not self._over.wait(self._pause):
            self.number += 1
            self._send(counted(self.number, HEIGHT, WIDTH), time.monotonic())

    def end(self):
        self._over.set()
        self.join(5)


def own():
    """Threads and descriptors of this process, with those of the library."""
    me = pathlib.Path("/proc/self")
    if not me.is_dir():
        pytest.skip("descriptors are counted in /proc")
    return len(list((me / "task").iterdir())), len(list((me / "fd").iterdir()))


def test_a_counter_film_comes_in_order_and_none_twice(library, name):
    sink, source = opened(Sink(target(name))), Source(Wanted(name, WIDTH, HEIGHT, 60))
    source.open()
    film, numbers = Film(sink.send), []
    try:
        limit = Limit(10)
        while len(numbers) < 60:
            assert not limit.over
            if (shot := source.newest(0.25)) is not None:
                assert shot.picture.shape == (HEIGHT, WIDTH, 3) and shot.picture.flags.c_contiguous
                assert time.time() - 5 < shot.captured <= time.time()
                numbers.append(count(shot.picture))
    finally:
        film.end()
        sink.close()
        source.close()
    assert None not in numbers and numbers == sorted(set(numbers))


def test_what_waited_is_left_out_for_the_newest(library, name):
    sink, source = opened(Sink(target(name))), Source(Wanted(name, WIDTH, HEIGHT, 60))
    source.open()
    try:
        sink.send(counted(1, HEIGHT, WIDTH), time.monotonic())
        until(lambda: source.newest(0.25), 10)
        for number in range(2, 6):
            sink.send(counted(number, HEIGHT, WIDTH), time.monotonic())
            time.sleep(0.1)  # each has come before the next is sent
        assert count(source.newest(0.25).picture) == 5
        assert source.newest(0.05) is None
    finally:
        sink.close()
        source.close()


@pytest.mark.parametrize("channels", [3, 4])
def test_the_fourth_channel_is_sent_as_it_is(library, name, channels):
    """Looked at with the library itself: a Live Camera has no use for alpha."""
    sink = opened(Sink(target(name)))
    picture = np.full((HEIGHT, WIDTH, channels), 200, np.uint8)
    picture[:, WIDTH // 2 :, 3:] = 60
    receiver = None
    try:
        with ndi.looking(library) as finder:
            sender = ndi.found(library, finder, name, 3)
            receiver = library.recv_create_v3(
                library.RecvCreateV3(sender, library.RECV_COLOR_FORMAT_RGBX_RGBA)
            )
        limit = Limit(10)
        while True:
            assert not limit.over
            sink.send(picture, time.monotonic())
            came, frame, _, _ = library.recv_capture_v2(receiver, 50, True, False, False)
            if came == library.FRAME_TYPE_VIDEO:
                break
        kind, pixels = frame.FourCC, np.array(frame.data)
        library.recv_free_video_v2(receiver, frame)
    finally:
        sink.close()
        if receiver is not None:
            library.recv_destroy(receiver)
    if channels == 3:
        assert kind == library.FOURCC_VIDEO_TYPE_RGBX
    else:
        assert kind == library.FOURCC_VIDEO_TYPE_RGBA
        assert abs(int(pixels[HEIGHT // 2, WIDTH // 4, 3]) - 200) < 4
        assert abs(int(pixels[HEIGHT // 2, 3 * WIDTH // 4, 3]) - 60) < 4
    # not multiplied with alpha
    assert abs(int(pixels[HEIGHT // 2, 3 * WIDTH // 4, 0]) - 200) < 8


def sent(sender):
    return sender.state == SENDING and sender.sent > 5


def test_a_cable_pulled_again_and_again(library, name):
    """The other end goes and comes back; both loops go on, and nothing is left in the end."""
    warm = opened(Sink(target(f"{name} first")))  # what the library keeps for good
    warm.close()
    before = own()
    feed = PulledFeed(Source, Wanted(name, WIDTH, HEIGHT, 60))
    feed.begin()
    sender = film = None
    try:
        for pull in range(PULLS):
            sender = Sender(target(name), Sink)
            film = Film(sender.put)
            until(lambda: feed.state == GIVING, 3)
            until(functools.partial(sent, sender))
            assert feed.trouble is None and sender.trouble is None
            film.end()
            sender.end()
            assert sender.over.wait(5)
            until(lambda: feed.trouble is not None, 5)
            assert name in feed.trouble or "no picture has come" in feed.trouble
            assert feed.losses > pull
    finally:
        for thread in (film, sender):
            if thread is not None:
                thread.end()
        feed.end()
    until(lambda: not feed._thread.is_alive(), 5)
    until(lambda: all(now <= was for now, was in zip(own(), before, strict=True)), 5)


ELSEWHERE = """
import sys, time, numpy, NDIlib
NDIlib.initialize()
sender = NDIlib.send_create(NDIlib.SendCreate(sys.argv[1], None, False, False))
frame = NDIlib.VideoFrameV2()
frame.data = numpy.full((96, 192, 4), 90, numpy.uint8)
frame.FourCC = NDIlib.FOURCC_VIDEO_TYPE_RGBX
while True:
    NDIlib.send_send_video_v2(sender, frame)
    time.sleep(0.02)
"""


def elsewhere(name):
    """A sender in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", ELSEWHERE, name])


@pytest.mark.skipif(os.name == "nt", reason="a process is stopped by a signal")
def test_a_sender_that_hangs_or_is_killed_is_told_and_taken_again(library, name):
    child = elsewhere(name)
    feed = PulledFeed(Source, Wanted(name, WIDTH, HEIGHT, 60))
    try:
        feed.begin()
        until(lambda: feed.state == GIVING, 10)
        child.send_signal(signal.SIGSTOP)  # half open: the connection stands, nothing comes
        until(lambda: feed.trouble is not None, 4)
        child.send_signal(signal.SIGCONT)
        until(lambda: feed.state == GIVING, 3)
        child.kill()
        child.wait(5)
        until(lambda: feed.trouble is not None, 4)
        child = elsewhere(name)
        until(lambda: feed.state == GIVING, 10)
    finally:
        feed.end()
        child.send_signal(signal.SIGCONT)
        child.kill()
        child.wait(5)
    until(lambda: not feed._thread.is_alive(), 5)


def test_a_name_is_a_senders_and_is_taken_once(library, name):
    sink = opened(Sink(target(name)))
    try:
        assert any(name in listed for listed in Source.listed())
        with pytest.raises(Lost, match=name):
            opened(Sink(target(name)))
    finally:
        sink.close()
    source = Source(Wanted(name, WIDTH, HEIGHT, 60))
    with pytest.raises(Lost, match=name):
        source.open()
    source.close()


@pytest.mark.parametrize(
    "asked, full, fit",
    [
        ("STUDIO (Camera 1)", "STUDIO (Camera 1)", True),
        ("camera 1", "STUDIO (Camera 1)", True),
        ("OBS (main)", "STUDIO (OBS (main))", True),
        ("Camera", "STUDIO (Camera 1)", False),
        ("", "STUDIO ()", True),
    ],
)
def test_which_sender_a_name_means(asked, full, fit):
    assert ndi.fits(asked, full) == fit


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch):
    monkeypatch.setattr(ndi.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"^sender: .*pip install ndi-python"):
        Source.check("a")
    with pytest.raises(Refused, match=r"^to: .*pip install ndi-python"):
        Sink.check(target("a"))
    with pytest.raises(Refused, match=r"^sender: choose"):
        Source.check(" ")


def test_one_picture_for_an_ordinary_prompt(library, name):
    sink = opened(Sink(target(name)))
    film = Film(sink.send)
    try:
        picture = sources.one("ndi", Wanted(name, WIDTH, HEIGHT, 60))
        assert count(picture) is not None
    finally:
        film.end()
        sink.close()
