"""Source device: there is no camera on a machine that tests, so PyAV's device is a double; what it
gives are PyAV's own frames, and the loop around it is the real one.
"""

import errno
import sys
import threading
import time
import types

import av
import pytest
from clock import Limit
from counting import count, counted
from livediffusion.live import wires
from livediffusion.live.allowed import NotAllowed
from livediffusion.live.faults import Refused
from livediffusion.live.pulled import GIVING, PulledFeed
from livediffusion.live.sources import Lost, Wanted
from livediffusion.live.sources.device import Kind

pytestmark = pytest.mark.comfy
NAME = "Test Camera"


class Camera:
    """A double of what PyAV opens: it can be unplugged, and say no to a size."""

    def __init__(self):
        self.plugged, self.number, self.asked, self.opened, self.closed = True, 0, [], 0, 0
        self.refuses = ()

    def listed(self, system):
        one = types.SimpleNamespace(name="/dev/video7", description=NAME, media_types=["video"])
        sound = types.SimpleNamespace(name="mic", description="Mic", media_types=["audio"])
        return [one, sound] if self.plugged else [sound]

    def open(self, place, format, container_options):
        self.asked.append((place, format, container_options))
        if not self.plugged:
            raise OSError(errno.ENODEV, "No such device")
        if set(container_options) & set(self.refuses):
            raise av.error.ArgumentError(errno.EINVAL, "no")
        self.opened += 1
        context = types.SimpleNamespace(options={}, thread_type="")
        stream = types.SimpleNamespace(
            codec_context=context, disposition=av.stream.Disposition(0), width=96, height=96
        )
        return types.SimpleNamespace(
            streams=types.SimpleNamespace(video=[stream]), demux=self._demux, close=self._close
        )

    def _close(self):
        self.closed += 1

    def _demux(self, stream):
        while True:
            if not self.plugged:
                raise av.error.OSError(errno.ENODEV, "No such device")
            time.sleep(0.01)
            self.number += 1
            frame = av.VideoFrame.from_ndarray(counted(self.number % 4096), format="rgb24")
            frame.pts = self.number
            yield types.SimpleNamespace(pts=self.number, decode=lambda frame=frame: [frame])


@pytest.fixture
def camera(tmp_path, monkeypatch):
    import folder_paths

    made = Camera()
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(av, "enumerate_input_devices", made.listed, raising=False)
    monkeypatch.setattr(av, "open", made.open)
    return made


def _until(condition, seconds=10):
    limit = Limit(seconds)
    while not (value := condition()):
        assert not limit.over, "it did not happen"
        time.sleep(0.005)
    return value


def _mine():
    return [t for t in threading.enumerate() if t.name.startswith("livediffusion-")]


def test_a_camera_is_listed_by_name_and_opened_once_it_is_allowed(camera):
    assert Kind.listed() == [NAME]
    with pytest.raises(NotAllowed, match="Test Camera is not allowed yet") as refused:
        Kind.check(NAME)
    assert refused.value.allow == {"kind": "device", "what": NAME}
    assert camera.opened == 0
    wires.allowed().add("device", NAME)
    Kind.check(NAME)
    with pytest.raises(ValueError, match="choose a camera"):
        Kind.check(" ")
    source = Kind(Wanted(NAME, 640, 480, 30))
    try:
        source.open()
        numbers = []
        while len(numbers) < 20:
            if (shot := source.newest(0.25)) is not None:
                numbers.append(count(shot.picture))
                time.sleep(0.02)
    finally:
        source.close()
    assert None not in numbers and numbers == sorted(set(numbers))
    place, system, options = camera.asked[0]
    assert (place, system) == ("/dev/video7", "v4l2")
    assert options == {"video_size": "640x480", "framerate": "30"}
    assert camera.opened == camera.closed == 1 and not _mine()


def test_a_camera_that_says_no_to_a_size_gives_what_it_has(camera):
    wires.allowed().add("device", NAME)
    camera.refuses = ("video_size",)
    source = Kind(Wanted(NAME, 640, 480, 25))
    try:
        source.open()
        assert _until(lambda: source.newest(0.25)).picture.shape == (96, 96, 3)
    finally:
        source.close()
    assert camera.asked[-1][2] == {"framerate": "25"}


def test_a_camera_unplugged_twenty_times_is_told_and_goes_on(camera):
    wires.allowed().add("device", NAME)
    feed = PulledFeed(Kind, Wanted(NAME, 96, 96, 30))
    feed._pauses.MOST = 0.3  # of each try; the usual 2 s are in the tests of source address
    feed.begin()
    try:
        for _ in range(20):
            _until(lambda: feed.state == GIVING)
            camera.plugged = False
            said = _until(lambda: feed.trouble)
            assert NAME in said and ("unplugged" in said or "not plugged in" in said)
            camera.plugged = True
            limit = Limit(3)
            _until(lambda: feed.state == GIVING)
            assert not limit.over
    finally:
        feed.end()
    _until(lambda: not _mine())
    assert camera.opened == camera.closed


def test_a_camera_that_another_program_has_is_told(camera, monkeypatch):
    wires.allowed().add("device", NAME)

    def busy(*args, **more):
        raise av.error.OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(av, "open", busy)
    source = Kind(Wanted(NAME, 96, 96, 30))
    try:
        source.open()
        with pytest.raises(Lost, match="another program uses the camera"):
            _until(lambda: source.newest(0.25))
    finally:
        source.close()


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_a_pyav_that_lists_no_cameras_is_told_before_a_run_begins(camera, monkeypatch, system):
    monkeypatch.delattr(av, "enumerate_input_devices", raising=False)
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(Refused, match=r"^device: .* PyAV 17 or newer"):
        Kind.check(NAME)
