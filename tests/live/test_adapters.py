"""Spout, Syphon and virtual cameras: our adapters against the real packages' signatures.

None of the three has another end on this system: Spout is Windows', Syphon is macOS', and a virtual
camera needs a module of the kernel. So the first two run against doubles of the packages that have
the signatures of the wheels, and the third against the real package with a backend of the test's.
"""

import ast
import asyncio
import os
import pathlib
import queue
import sys
import threading
import time
import types
import zipfile

import adapters
import numpy as np
import pytest
from ends import count, counted
from inprocess import until
from livediffusion.live import spout, syphon
from livediffusion.live.faults import Refused
from livediffusion.live.pulled import GIVING, PulledFeed
from livediffusion.live.sending import Sender
from livediffusion.live.sinks import Target, virtual_camera
from livediffusion.live.sinks.rgba import canvas, draw
from livediffusion.live.sources import Lost, Wanted, kind
from livediffusion.live.sources.spout import Kind as SpoutSource
from livediffusion.live.sources.syphon import Kind as SyphonSource

pytestmark = pytest.mark.comfy
WHEELS = os.environ.get("LIVEDIFFUSION_WHEELS")  # a folder with wheels for other systems
WANTED = Wanted("film", 96, 96, 60)


def target(to, name="film"):
    return Target(to, name, "", 120, 6.0)


def wheel(name):
    found = sorted(pathlib.Path(WHEELS).rglob(f"{name}-*.whl")) if WHEELS else []
    if not found:
        pytest.skip("LIVEDIFFUSION_WHEELS names a folder with the wheels")
    return zipfile.ZipFile(found[-1])


# what the doubles have is what the packages have


@pytest.mark.parametrize("owner", adapters.SPOUT)
def test_the_double_of_spout_takes_what_its_methods_take(owner):
    sizes = {"X": 0, "_N": 1, "PEBD": 1, "PEBEIII_NI": 6, "PEAEI_NI": 4}
    for name, symbol in adapters.SPOUT[owner].items():
        taken = symbol.partition("@@QEAA")[2]
        for result in ("_N", "X", "I", "J", "?AV"):
            if taken.startswith(result):
                taken = taken.removeprefix(result)
                break
        taken = taken.removesuffix("Z").removesuffix("@") or "X"
        method = getattr(getattr(adapters.spout(), owner), name)
        assert len(adapters.parameters(method)) == sizes[taken], name


def test_the_table_of_spout_is_what_the_wheel_says():
    with wheel("spoutgl") as archive:
        name = next(n for n in archive.namelist() if n.endswith(".pyd"))
        compiled, version = archive.read(name), archive.namelist()[-1].split("-")[1]
    assert version.startswith(f"{adapters.SPOUT_VERSION}.")
    for methods in adapters.SPOUT.values():
        for method, symbol in methods.items():
            assert method.encode() + b"\0" in compiled and symbol.encode() in compiled, method


def test_the_double_of_syphon_takes_what_its_methods_take():
    modules = adapters.Syphon().modules
    for file, methods in adapters.SYPHON.items():
        for name, expected in methods.items():
            owner, _, method = name.rpartition(".")
            where = f"syphon.{file.removesuffix('.py').replace('/', '.')}"
            holder = getattr(modules["syphon"], owner) if owner else modules[where]
            made = vars(holder)[method or name]
            assert adapters.parameters(made) == expected, name


def test_the_table_of_syphon_is_what_the_wheel_says():
    with wheel("syphon_python") as archive:
        assert f"syphon_python-{adapters.SYPHON_VERSION}.dist-info/METADATA" in archive.namelist()
        sources = {name: archive.read(f"syphon/{name}").decode() for name in adapters.SYPHON}
    for file, methods in adapters.SYPHON.items():
        found = {}
        for node in ast.walk(ast.parse(sources[file])):
            members = node.body if isinstance(node, ast.ClassDef | ast.Module) else []
            owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for member in members:
                if isinstance(member, ast.FunctionDef):
                    wrapped = [ast.unparse(d) for d in member.decorator_list]
                    names = [a.arg for a in member.args.args if a.arg != "self"]
                    found[owner + member.name] = None if "property" in wrapped else names
        for name, expected in methods.items():
            assert found[name] == expected, name


# a counter film through both adapters and the loops around them


class Loop:
    """An event loop whose calls the test's thread makes when it turns."""

    def __init__(self):
        self._calls = queue.SimpleQueue()

    def call_soon_threadsafe(self, call):
        self._calls.put(call)

    def turn(self):
        while not self._calls.empty():
            self._calls.get()()


@pytest.fixture
def turned(monkeypatch):
    """ComfyUI's main thread, which is the test's: turns."""
    from server import PromptServer

    loop = Loop()
    monkeypatch.setattr(PromptServer, "instance", types.SimpleNamespace(loop=loop), raising=False)
    return loop.turn


@pytest.fixture(params=["spout", "syphon"])
def both(request, monkeypatch, turned):
    """The name of a package, with its double in its place."""
    if request.param == "spout":
        monkeypatch.setattr(spout, "sys", types.SimpleNamespace(platform="win32"))
        monkeypatch.setitem(sys.modules, "SpoutGL", adapters.spout())
    else:
        monkeypatch.setattr(syphon, "sys", types.SimpleNamespace(platform="darwin"))
        for name, module in adapters.Syphon().modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    return request.param


def happens(condition, turned, seconds=5):
    return until(lambda: turned() or condition(), seconds)


def test_a_counter_film_goes_through_and_the_cable_is_pulled(both, turned):
    from livediffusion.live import sinks

    open_before = adapters._Context.open
    feed = PulledFeed(kind(both), WANTED)
    feed.begin()
    numbers, number = [], 0
    try:
        for _ in range(3):
            sender = Sender(target(both), sinks.kind(both))
            met = len(numbers) + 20
            while len(numbers) < met:
                number += 1
                sender.put(counted(number), time.monotonic())
                turned()
                time.sleep(0.01)
                if (frame := feed.slot.take()) is not None:
                    numbers.append(count(frame.picture))
                assert number < 2000
            assert feed.state == GIVING and feed.trouble is None
            sender.end()
            assert sender.over.wait(5) and sender.trouble is None
            happens(lambda: feed.trouble is not None, turned)
            assert "film" in feed.trouble
    finally:
        feed.end()
    happens(lambda: not feed._thread.is_alive(), turned)
    assert None not in numbers and numbers == sorted(set(numbers))
    assert adapters._Context.open == open_before


def test_what_there_is_to_choose_is_listed(both, turned):
    from livediffusion.live import sinks

    sink = sinks.kind(both)(target(both))
    listed = []

    def list_them():
        sink.open(8, 8)
        sink.send(np.zeros((8, 8, 4), np.uint8), 0.0)
        listed.extend(kind(both).listed())
        sink.close()

    thread = threading.Thread(target=list_them)
    thread.start()
    happens(lambda: not thread.is_alive(), turned)
    assert listed == ["film" if both == "spout" else "python: film"]


def test_a_sender_that_counts_nothing_gives_no_picture_twice(monkeypatch, turned):
    monkeypatch.setattr(spout, "sys", types.SimpleNamespace(platform="win32"))
    double = adapters.spout()
    monkeypatch.setitem(sys.modules, "SpoutGL", double)
    monkeypatch.setattr(double.SpoutReceiver, "getSenderFrame", lambda self: 0)
    monkeypatch.setattr(double.SpoutReceiver, "isFrameNew", lambda self: True)
    source = SpoutSource(WANTED)
    double.senders["film"] = np.full((8, 8, 4), 1, np.uint8), 1
    source.open()
    try:
        assert source.newest(0.02) is not None  # empty, as the library has it
        double.senders["film"] = np.full((8, 8, 4), 2, np.uint8), 2
        assert source.newest(0.02).picture.max() == 1
        assert source.newest(0.02) is None
    finally:
        source.close()


def test_the_main_threads_run_loop_is_left_alone_elsewhere(monkeypatch):
    """A server whose event loop is not in the main thread: nothing is turned in the wrong one."""
    double = adapters.Syphon()
    for name, module in double.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    asyncio.run(asyncio.to_thread(syphon._turn))
    assert not double.heard
    syphon._turn()
    assert double.heard and double.pools == 0


@pytest.mark.parametrize(
    "name, fit", [("OBS: main", True), ("main", True), ("OBS", True), ("obs", False)]
)
def test_which_syphon_server_a_name_means(name, fit):
    assert syphon.fits(name, types.SimpleNamespace(app_name="OBS", name="main")) == fit


@pytest.mark.parametrize(
    "module, source, system, install",
    [
        (spout, SpoutSource, "win32", "pip install SpoutGL"),
        (syphon, SyphonSource, "darwin", "pip install syphon-python"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, module, source, system, install):
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(platform="linux"))
    with pytest.raises(Refused, match=r"^sender: .* is for .*Choose ndi"):
        source.check("film")
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(platform=system))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=f"^sender: .*{install}"):
        source.check("film")
    with pytest.raises(Refused, match=r"^sender: choose"):
        source.check("")


def test_three_channels_are_drawn_opaque_and_four_as_they_are():
    onto = canvas(2, 1)
    draw(onto, np.full((1, 2, 4), 7, np.uint8))
    assert (onto == 7).all()
    draw(onto, np.full((1, 2, 3), 9, np.uint8))
    assert (onto[..., :3] == 9).all() and (onto[..., 3] == 255).all()


# the real pyvirtualcam, with a backend of the test's


class Backend:
    """What pyvirtualcam.Backend says."""

    there, opened, closed, frames = True, 0, 0, []
    forms = ("raw ",)

    def __init__(self, *, width, height, fps, fourcc, device):
        from pyvirtualcam.util import decode_fourcc

        self.form = decode_fourcc(fourcc)
        if not type(self).there or self.form not in self.forms:
            raise RuntimeError("no device was found")
        self.size, self.name = (height, width), device or "double"
        type(self).opened += 1

    def close(self):
        type(self).closed += 1

    def send(self, frame):
        assert frame.ndim == 1 and frame.dtype == np.uint8
        channels = 4 if self.form == "ABGR" else 3
        type(self).frames.append(frame.reshape(*self.size, channels).copy())

    def device(self):
        return self.name

    def native_fourcc(self):
        return None


@pytest.fixture
def backend(monkeypatch):
    camera = pytest.importorskip("pyvirtualcam.camera")
    made = type("Made", (Backend,), {"frames": []})
    monkeypatch.setattr(camera, "BACKENDS", {"double": made})
    return made


def test_a_counter_film_goes_to_a_virtual_camera_and_a_device_that_comes_later_is_taken(backend):
    backend.there = False
    sender = Sender(target("virtual camera", ""), virtual_camera.Kind)
    sender.put(counted(0), 0.0)
    until(lambda: sender.trouble is not None)
    assert "no virtual camera could be opened" in sender.trouble
    assert "no device was found" in sender.trouble
    backend.there = True
    for number in range(1, 40):
        sender.put(counted(number), time.monotonic())
        time.sleep(0.01)
    until(lambda: len(backend.frames) > 10)
    sender.end()
    assert sender.over.wait(5) and sender.trouble is None
    numbers = [count(frame) for frame in backend.frames]
    assert None not in numbers and numbers == sorted(numbers)
    assert backend.opened == backend.closed == 1


def test_a_virtual_camera_has_even_sides_and_no_alpha(backend):
    sink = virtual_camera.Kind(target("virtual camera", ""))
    sink.open(97, 95)
    sink.send(np.full((95, 97, 4), 3, np.uint8), 0.0)
    sink.close()
    assert [frame.shape for frame in backend.frames] == [(94, 96, 3)]
    with pytest.raises(Refused, match=r"^image: "):
        virtual_camera.Kind(target("virtual camera", "")).open(1, 8)


def test_alpha_goes_where_a_backend_has_it(backend, monkeypatch):
    import pyvirtualcam.camera

    backend.forms = ("raw ", "ABGR")
    monkeypatch.setattr(pyvirtualcam.camera, "BACKENDS", {"unitycapture": backend})
    sink = virtual_camera.Kind(target("virtual camera", ""))
    sink.open(8, 8)
    for channels in (3, 4, 4, 3):
        sink.send(np.full((8, 8, channels), channels, np.uint8), 0.0)
    sink.close()
    assert [frame.shape[2] for frame in backend.frames] == [3, 4, 4, 3]
    assert backend.opened == backend.closed == 3


def test_a_virtual_camera_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setattr(virtual_camera.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(virtual_camera, "sys", types.SimpleNamespace(platform="linux"))
    virtual_camera.Kind.check(target("virtual camera", ""))
    virtual_camera.Kind.check(target("virtual camera", "/dev/video10"))
    for name in ("/dev/sda", "/dev/video1/../sda", "OBS Virtual Camera", "/dev/video1\n"):
        with pytest.raises(Refused, match=r"^name: "):
            virtual_camera.Kind.check(target("virtual camera", name))
    monkeypatch.setattr(virtual_camera.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"^to: .*pip install pyvirtualcam"):
        virtual_camera.Kind.check(target("virtual camera", ""))


def test_no_virtual_camera_of_this_system_is_said_in_words():
    """With the package's own backend, where this system has no such device."""
    pytest.importorskip("pyvirtualcam")
    sink = virtual_camera.Kind(target("virtual camera", ""))
    try:
        with pytest.raises(Lost, match="no virtual camera could be opened"):
            sink.open(64, 64)
            pytest.skip("this system has a virtual camera")
    finally:
        sink.close()
