"""What a run keeps: every buffer has a bound, and what ended or was removed is let go."""

import ast
import asyncio
import collections
import ctypes
import gc
import importlib
import os
import pathlib
import sys
import time
import weakref

import inprocess
import livediffusion.live
import numpy as np
import pytest
from films import write_gif
from inprocess import Client, camera, flat, graph, view
from livediffusion.live import bounds, feeds, frames
from livediffusion.live.mailbox import Slot

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]

ROOM = pathlib.Path(livediffusion.live.__file__).parent
HOLDERS = {"deque", "Queue", "SimpleQueue", "OrderedDict", "defaultdict", "Counter", "set", "dict",
           "list", "fromkeys", "WeakKeyDictionary", "WeakSet"}  # fmt: skip
# filled once, when they are made
FIXED = {
    "executor._Silent.sockets_metadata", "sessions.Invalid.answer", "shared.Shared.counts",
    "shared.Shared.calls", "shared.Shared.extra", "executor.FrameExecutor.caches",
    "allowed.NotAllowed.allow", "relay.Relay.options", "wires._Lookup.ips",
}  # fmt: skip


def kept(path: pathlib.Path):
    """Attributes of a module's classes that are made as something to put things into."""

    def holds(value):
        if isinstance(value, ast.Call):
            name = value.func.attr if isinstance(value.func, ast.Attribute) else value.func
            name = name.id if isinstance(name, ast.Name) else name
            inner = value.func.value if isinstance(value.func, ast.Subscript) else None
            if isinstance(inner, ast.Attribute | ast.Name):
                name = inner.attr if isinstance(inner, ast.Attribute) else inner.id
            return name in HOLDERS
        return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp)

    for kind in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(kind, ast.ClassDef):
            continue
        for node in ast.walk(kind):
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                pairs = [(node.target, node.value)]
            elif isinstance(node, ast.Assign):
                pairs = [(target, node.value) for target in node.targets]
                pairs = [
                    pair
                    for target, value in pairs
                    for pair in (
                        zip(target.elts, value.elts, strict=False)
                        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                        else [(target, value)]
                    )
                ]
            else:
                continue
            for target, value in pairs:
                own = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
                if own and holds(value):
                    module = ".".join(path.relative_to(ROOM).with_suffix("").parts)
                    yield f"{module}.{kind.name}.{target.attr}"


def test_every_buffer_is_in_the_table():
    found = {name for path in ROOM.rglob("*.py") for name in kept(path)} - FIXED
    found |= {"mailbox.Slot._item"}
    assert found - set(bounds.KEPT) == set(), "name its bound in live/bounds.py"
    assert set(bounds.KEPT) - found == set(), "nothing keeps this any more"


def test_a_buffer_without_a_bound_would_be_seen(tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text(
        "class A:\n    def __init__(self):\n        self.a, self.b = [], 3\n"
        "        self.c: queue.Queue[int] = queue.Queue[int](3)\n        self.d = deque(maxlen=3)\n"
        "        self.e = dict.fromkeys('ab')\n        self.f = {i: 0 for i in x}\n",
        encoding="utf-8",
    )
    monkeypatch.setitem(globals(), "ROOM", tmp_path)
    assert set(kept(tmp_path / "x.py")) == {f"x.A.{name}" for name in "acdef"}


def size(holder) -> int:
    return holder.qsize() if hasattr(holder, "qsize") else len(holder)


def held(wide: dict[str, int]) -> list[str]:
    """What holds more than the table says, of every object that there is now."""
    owners = collections.defaultdict(list)
    for name in bounds.KEPT:
        module, kind, attribute = name.rsplit(".", 2)
        found = getattr(importlib.import_module(f"livediffusion.live.{module}"), kind)
        owners[found].append((name, attribute))
    over = []
    for thing in gc.get_objects():
        for name, attribute in owners.get(type(thing), ()) if type(thing) in owners else ():
            if attribute == "_item" or not hasattr(thing, attribute):
                continue
            bound = bounds.KEPT[name]
            # what is not begun holds nothing
            holder = getattr(thing, attribute) or ()
            if name == "sessions.Sessions._all":
                holder = [one for one in list(holder.values()) if one.over]
            if size(holder) > bound.most * wide.get(bound.each, 1):
                over.append(f"{name}: {size(holder)}")
    return over


def two(i, size=32):
    """Two cameras and two views whose ids are others in each edit, and other sizes, too."""
    made = graph("keep", width=size, height=size, fps=120)
    del made["5"]
    made[f"v{i}"] = view(["4", 0])
    made["f"] = camera(source="file", file="a.gif", fps=60, width=64 + 8 * i)
    made[f"w{i}"] = view(["f", 0])
    return made


@pytest.mark.slow
def test_no_buffer_holds_more_than_the_table_says(tmp_path, monkeypatch):
    """Edits that rename every view, bad frames, and a listener that does not listen."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    write_gif(tmp_path / "a.gif", 6, 20)
    edits = int(os.environ.get("LIVEDIFFUSION_EDITS", "20"))
    over, indices = [], []

    async def work(http):
        client = await Client.start(http, comfy.url, two(0))
        deaf = await Client.join(http, comfy.url, client.begun, "watch")
        deaf.acknowledge = False
        session = comfy.sessions.get(client.begun["session"])
        for i in range(1, edits):
            status, answer = await client.post("update", prompt=two(i), workflow={})
            assert status == 200
            indices.extend(place["index"] for place in answer["views"])
            for place in answer["views"]:
                await client.compare(place["index"])
                await deaf.compare(place["index"])
            places = {place["index"] for place in answer["views"]}
            seen = len(client.views)

            def shown(seen=seen, places=places):
                return places <= {p.view for p, _ in client.views[seen:]}

            while not shown():
                await client.send(flat(client.sequence % 250))
                await client.send(b"no picture")
                await asyncio.sleep(0.01)
            await client.wait(lambda: len(session.views) == 2)
            over.extend(held({"view": 6, "source": 2, "node": 6}))
            assert len(session._tasks) < 12
        await client.stop()
        return session

    with inprocess.comfy() as (comfy, _):
        session = inprocess.live(work)
        assert over == []
        assert len(set(indices)) == len(indices) == 2 * (edits - 1)
        assert not session.views and not session.shared.feeds
        assert held({"view": 6, "source": 2, "node": 6}) == []


class Watched:
    """How many of the things of a kind are alive, and the most that ever were."""

    def __init__(self):
        self._all, self.most = [], 0

    def add(self, thing):
        self._all = [ref for ref in self._all if ref() is not None] + [weakref.ref(thing)]
        self.most = max(self.most, len(self._all))
        return thing

    @property
    def alive(self):
        return sum(ref() is not None for ref in self._all)


@pytest.fixture
def watched(monkeypatch):
    found = {"frames": Watched(), "images": Watched(), "pictures": Watched()}

    class Frame(feeds.Frame):
        def __init__(self, sequence, captured, arrived, picture):
            # an array of its own, because a plain one may be a view of another
            super().__init__(sequence, captured, arrived, picture)
            if arrived:
                found["frames"].add(self)
                found["pictures"].add(picture)

    image = feeds.to_image
    monkeypatch.setattr(feeds, "Frame", Frame)
    monkeypatch.setattr(feeds, "to_image", lambda picture: found["images"].add(image(picture)))
    return found


@pytest.mark.parametrize("lag", [0, 3])
def test_a_run_keeps_few_frames_and_none_afterwards(watched, monkeypatch, lag):
    """Beside the stream's own: one shown, one ready, one being decoded, one in the graph."""
    monkeypatch.setattr(frames.streams, "owned", lambda owner: [type("S", (), {"lag": lag})])

    async def work(http):
        client = await Client.start(http, comfy.url, graph(width=64, height=64, fps=120))
        await client.compare()
        for _ in range(4000):
            if client.stats.get("frames", 0) >= 150:
                break
            await client.send(flat(client.sequence % 250))
            await asyncio.sleep(0.002)
            world.seen.clear()
        await client.stop()
        # who compares gets the frame of its picture however few are kept
        views = [packet for packet, _ in client.views if packet.input]
        return views

    with inprocess.comfy() as (comfy, world):
        views = inprocess.live(work)
        assert (
            all(abs(inprocess.grey(p, "input") - p.source % 250) <= 1 for p in views if p.source)
            and len(views) > 50
        )
        most = {name: one.most for name, one in watched.items()}
        assert most["frames"] <= 4 and most["images"] <= 6, most
        assert most["pictures"] <= 4 + 3 + lag + 1, most
        asyncio.run(asyncio.sleep(0.2))
        gc.collect()
        assert {name: one.alive for name, one in watched.items()} == dict.fromkeys(most, 0)


def test_an_edit_lets_go_of_images_of_other_sizes(watched):
    """A film of one still picture beside a camera: its one frame outlives every edit."""
    frame = feeds.Frame(0, 0.0, 1.0, flat(9))
    feed = feeds.CameraFeed()
    made = frames.Frames.__new__(frames.Frames)
    from livediffusion.live.faults import Faults
    from livediffusion.live.origins import Origins

    made.shared = type("Shared", (), {"feed_of": {"1": feed}, "faults": Faults(print)})()
    made._latest, made._origins, made._settled = {feed: frame}, Origins(), True
    made._origins.begin(frame.origin)
    for width in range(16, 400, 8):
        image, _ = made.image("1", width, 32, "crop", False)
        assert image.shape == (1, 32, width, 3)
        del image
        assert watched["images"].alive == 1


def test_a_slot_that_is_over_lets_go_of_its_item():
    slot, item = Slot(), type("Item", (), {})()
    alive = weakref.ref(item)
    slot.put(item)
    del item
    slot.close()
    assert slot.full and not slot.over and alive() is not None
    slot.end()
    assert slot.over and alive() is None


def resident() -> float:
    """MB of this process, after what its allocator holds back is given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def settled() -> float:
    """The least within two seconds: threads of a run that has ended finish what they have begun."""
    least, until = resident(), time.monotonic() + 2
    while time.monotonic() < until:
        time.sleep(0.2)
        least = min(least, resident())
    return least


@pytest.mark.skipif(
    "LIVEDIFFUSION_MEMORY" not in os.environ or sys.platform != "linux",
    reason="minutes; LIVEDIFFUSION_MEMORY is the side of its pictures, in pixels",
)
@pytest.mark.slow
def test_memory_of_long_and_many_runs():
    """Less than 8 frames' worth over 300 frames; back where it was after 20 runs, 60 renames."""
    side = int(os.environ["LIVEDIFFUSION_MEMORY"])
    frame = side * side * 3 * 4 / 2**20
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), np.uint8).repeat(side // 32, 0).repeat(
        side // 32, 1) for _ in range(3)]  # fmt: skip
    coded = [inprocess.jpeg(picture) for picture in pictures]
    figures = []

    def named(i):
        made = graph(width=side, height=side, fps=30)
        made[f"v{i}"] = made.pop("5")
        return made

    async def go(client, until):
        seen = client.stats.get("frames", 0)
        while client.stats.get("frames", 0) < seen + until:
            while client.answers < client.sequence - 2:
                await asyncio.sleep(0.001)
            await client.send(coded[client.sequence % 3])
            client.views.clear()
            world.seen.clear()

    async def long(http):
        client = await Client.start(http, comfy.url, named(0))
        await client.compare()
        before = resident()
        await go(client, 5)
        most = 0.0
        for _ in range(30):
            await go(client, 10)
            most = max(most, resident())
        await client.stop()
        figures.append(("grown over 300 frames", most - before))

    async def short(http):
        client = await Client.start(http, comfy.url, named(0))
        for i in range(1, 4):
            await client.post("update", prompt=named(i), workflow={})
            await go(client, 2)
        await client.stop()

    with inprocess.comfy() as (comfy, world):
        inprocess.live(short)  # what is loaded and made once
        start = settled()
        inprocess.live(long)
        figures.append(("left by a long run", settled() - start))
        for _ in range(20):
            inprocess.live(short)
        figures.append(("left by 20 runs of 3 renames", settled() - start))
    told = [(name, round(value, 1)) for name, value in figures]
    assert figures[0][1] < 8 * frame, told
    assert figures[1][1] < 50 and figures[2][1] < 50, told
    sys.stderr.write(f"{told}, a frame is {frame:.0f} MB\n")
