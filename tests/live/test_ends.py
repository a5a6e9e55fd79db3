"""Sources that are pulled, sinks that are sent to: the loop around each, the cable in hand."""

import asyncio
import threading
import time
import types

import folder_paths
import inprocess
import pytest
from ends import Cable, count, counted
from films import write_gif
from inprocess import Client, camera, graph, until, view
from livediffusion.live import feeds, shared, sinks, sources
from livediffusion.live.faults import Refused
from livediffusion.live.frames import Frames
from livediffusion.live.graph import GraphError
from livediffusion.live.retried import Pauses
from livediffusion.live.sending import Sender

pytestmark = pytest.mark.comfy


@pytest.fixture
def running():
    with inprocess.comfy() as both:
        yield both


@pytest.fixture
def cables(monkeypatch):
    """A source and a sink that are both in the test's hand: `device` and `virtual camera`."""
    source, sink = Cable(), Cable()
    monkeypatch.setattr(shared, "kind", lambda name: source)
    monkeypatch.setattr(sinks, "kind", lambda name: sink)
    from livediffusion.live import sending

    monkeypatch.setattr(sending, "kind", lambda name: sink)
    return source, sink


def through(**settings):
    """device -> work -> Live Send and Live View."""
    made = graph(source="device", device="cable", width=96, height=96)
    send = {"to": "virtual camera", "name": "", "address": "", "fps": 200, "bit_rate": 6.0}
    made["6"] = {"class_type": "LiveSend", "inputs": {"image": ["4", 0], **send, **settings}}
    return made


def threads():
    return {t.name for t in threading.enumerate() if t.name.startswith("livediffusion-s")}


async def started(http, comfy, made):
    return await Client.start(http, comfy.url, made)


def test_a_counter_film_goes_through_a_run_in_order_and_none_twice(running, cables):
    comfy, _ = running
    source, sink = cables

    async def work(http):
        client = await started(http, comfy, through())
        await client.wait(lambda: len(sink.taken) > 60)
        stats = await client.wait(lambda: client.stats.get("sends") and client.stats)
        await client.stop()
        return client, stats

    client, stats = inprocess.live(work)
    numbers = [count(picture) for picture, _ in sink.taken]
    assert None not in numbers and numbers == sorted(set(numbers))
    assert stats["sends"]["6"]["state"] == "sending" and stats["sources"]["3"]["state"] == "giving"
    assert client.state == "ended" and not client.problems
    until(lambda: not threads())
    assert source.opened == source.closed == 1 and sink.opened == sink.closed == 1


def test_a_cable_pulled_again_and_again_is_told_and_the_run_goes_on(running, cables):
    comfy, _ = running
    source, sink = cables

    async def pull(client, cable, node, kind, goes_on):
        said = len(client.problems)
        cable.plugged = False
        await client.wait(lambda: len(client.problems) > said)
        problem = client.problems[-1]
        assert (problem["kind"], problem["node"]) == (kind, node)
        assert "the cable is pulled" in problem["reason"]
        before, cable.plugged = goes_on(), True
        await client.wait(lambda: goes_on() > before + 3, 3)

    async def work(http):
        client = await started(http, comfy, through())
        await client.wait(lambda: len(sink.taken) > 5)
        for _ in range(3):
            await pull(client, source, "3", "source", lambda: source.number)
            await pull(client, sink, "6", "send", lambda: len(sink.taken))
            await client.wait(lambda: client.stats["sources"]["3"]["reason"] is None)
            await client.wait(lambda: client.stats["sends"]["6"]["reason"] is None)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert client.state == "ended" and client.stats["faults"] == {"source": 3, "send": 3}
    until(lambda: not threads())
    assert source.opened == source.closed and sink.opened == sink.closed


def test_what_does_not_close_well_is_opened_again(running, cables):
    """Libraries raise in close, above all of what is lost; other sizes close what is well."""
    comfy, _ = running
    source, sink = cables
    source.closes = sink.closes = False

    async def work(http):
        client = await started(http, comfy, through())
        for cable, node, kind in ((source, "3", "source"), (sink, "6", "send")):
            await client.wait(lambda: len(sink.taken) > 5)
            cable.plugged = False
            await client.wait(lambda k=kind: client.stats.get("faults", {}).get(k))
            cable.plugged = True
            seen = len(sink.taken)
            await client.wait(lambda n=seen: len(sink.taken) > n + 5)
            figures = "sources" if kind == "source" else "sends"
            await client.wait(lambda f=figures, n=node: client.stats[f][n]["reason"] is None)
        other = {**through(), "3": camera(source="device", device="cable", width=64, height=48)}
        opened = sink.opened
        assert (await client.post("update", prompt=other, workflow={}))[0] == 200
        await client.wait(lambda: sink.opened > opened and sink.taken[-1][0].shape[0] == 48)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert client.state == "ended"
    reasons = {problem["reason"] for problem in client.problems}
    assert reasons == {"the cable is pulled"}
    until(lambda: not threads())
    assert source.opened == source.closed and sink.opened == sink.closed


def test_what_went_well_and_is_refused_later_is_told_and_tried_again(running, cables):
    """A page in place of the stream, a name that leads to what is forbidden: not for ever."""
    comfy, _ = running
    source, sink = cables

    async def turn(client, cable, node, kind, goes_on):
        opened, cable.refused = cable.opened, "address: it leads to what is forbidden"
        # more than once, and after pauses that grow
        await client.wait(lambda: cable.opened >= opened + 2)
        await client.wait(lambda: client.problems and client.problems[-1]["kind"] == kind)
        assert client.problems[-1]["node"] == node
        assert client.problems[-1]["reason"] == cable.refused
        before, cable.refused = goes_on(), None
        await client.wait(lambda: goes_on() > before + 3, 3)

    async def work(http):
        client = await started(http, comfy, through())
        await client.wait(lambda: len(sink.taken) > 5)
        await turn(client, source, "3", "source", lambda: source.number)
        await turn(client, sink, "6", "send", lambda: len(sink.taken))
        await client.stop()
        return client

    client = inprocess.live(work)
    assert client.state == "ended" and client.stats["faults"] == {"source": 1, "send": 1}
    until(lambda: not threads())
    assert source.opened == source.closed and sink.opened == sink.closed


@pytest.mark.parametrize("end", ["source", "send"])
def test_what_leads_astray_at_first_is_told_and_tried_again(running, cables, end):
    """As a router does after a power cut: a kept run would be without it for weeks."""
    comfy, _ = running
    cable = cables[end == "send"]
    cable.refused = "address: it leads to what is forbidden"

    async def work(http):
        client = await started(http, comfy, through())
        await client.wait(lambda: client.problems and cable.opened >= 3)
        problem, node = client.problems[0], "3" if end == "source" else "6"
        assert (problem["kind"], problem["node"]) == (end, node)
        assert problem["reason"] == cable.refused
        if end == "send":
            await client.wait(lambda: client.state == "live" and len(client.views) > 5)
        cable.refused = None
        await client.wait(lambda: len(cables[1].taken) > 5)
        assert client.state == "live" and len(client.problems) == 1
        await client.stop()

    inprocess.live(work)
    until(lambda: not threads())
    assert cable.opened == cable.closed


def test_what_a_setting_makes_impossible_at_first_is_tried_no_more(running, cables):
    comfy, _ = running
    source, sink = cables
    sink.refused = sink.forbidden = "to: a package is missing"

    async def work(http):
        client = await started(http, comfy, through())
        await client.wait(
            lambda: client.stats.get("sends", {}).get("6", {}).get("state") == "refused"
        )
        assert client.state == "live" and sink.opened == 1
        await client.stop()
        source.refused = source.forbidden = "device: a package is missing"
        failed = await started(http, comfy, through())
        await failed.wait(lambda: failed.closed)
        return failed

    failed = inprocess.live(work)
    assert failed.state == "failed" and failed.states[-1]["reason"] == source.refused
    assert source.opened == source.closed == 2
    until(lambda: not threads())


class Late:
    """A source whose connection is none, once a test says so."""

    def __init__(self, why):
        self.why, self.missing, self.now = why, False, threading.Event()

    def __call__(self, wanted):
        self.now.wait(20)
        if self.why == "broken":
            raise RuntimeError("a bug")
        return self

    def check(self, name):
        if self.missing:
            raise Refused("sender: a package is missing")

    def open(self):
        raise Refused("sender: a package is missing")

    def close(self):
        pass


# what a source is, and why no more comes of it while the run goes on with another
OVER = [("file", "ended"), ("file", "broken"), ("ndi", "refused"), ("ndi", "broken"),
        ("phone", "nobody"), ("whip", "nobody")]  # fmt: skip


@pytest.mark.parametrize("source, why", OVER)
def test_an_edit_goes_on_whichever_source_is_over(
    running, cables, monkeypatch, tmp_path, source, why
):
    comfy, _ = running
    late = Late(why)
    monkeypatch.setattr(shared, "kind", {"device": cables[0], "ndi": late}.get)
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    monkeypatch.setattr(shared.webrtc, "check", lambda name: None)
    write_gif(tmp_path / "a.gif", 3, 20)

    def both(text):
        made = graph(text, source="device", device="cable")
        made["7"] = camera(source=source, file="a.gif", fps=60, loop=why != "ended", sender="x")
        return {**made, "8": view(["7", 0])}

    async def work(http):
        client = await started(http, comfy, both("1"))
        await client.wait(lambda: len(client.views) > 5)
        feed = comfy.sessions.get(client.begun["session"]).shared.feed_of["7"]
        if source == "file" and why == "broken":
            monkeypatch.setattr(feed, "_play", lambda *given: 1 / 0)
        late.missing = True
        late.now.set()
        if why != "nobody":
            await client.wait(lambda: feed.slot.over and not feed._thread.is_alive())
        if why not in ("nobody", "ended"):
            await client.wait(lambda: client.problems)
        late.missing = False
        for text in ("2", "3"):
            status, answer = await client.post("update", prompt=both(text), workflow={})
            assert status == 200, answer
            await client.wait(lambda n=answer["version"]: client.views[-1][0].version == n)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert client.state == "ended" and client.states[-1]["reason"] is None
    assert all(problem["kind"] == "source" for problem in client.problems)


class Breaks(feeds.Feed):
    """Its thread ends for a reason just after the first look at the error."""

    @property
    def error(self):
        if self.slot.over:
            return RuntimeError("it broke")
        self.slot.close()
        return None

    @error.setter
    def error(self, value):
        pass


def test_a_source_that_breaks_between_two_looks_fails_the_run_with_its_words():
    """A run that has ended by itself is kept no more; one that failed is tried again."""
    feed = Breaks()
    seen = types.SimpleNamespace(feeds={"a": feed}, feed_of={"7": feed}, stopping=False)
    with pytest.raises(GraphError, match="it broke") as failed:
        asyncio.run(Frames(seen, None).next_frame(1.0))
    assert failed.value.node == "7"


def test_a_still_scene_is_sent_again_and_counted_once(running, cables):
    _, sink = cables
    sender = Sender(sinks.Target("ndi", "", "", 60, 6), sink)
    sender.put(counted(7), 0.0)
    until(lambda: len(sink.taken) >= 3)
    sender.end()
    assert sender.over.wait(3) and sender.sent == 1
    assert {count(picture) for picture, _ in sink.taken} == {7}
    times = [at for _, at in sink.taken]
    assert times == sorted(times)


def target(fps=60):
    return sinks.Target("virtual camera", "", "", fps, 6)


def test_a_still_scene_after_an_outage_begins_when_it_is_there_again(cables):
    """Else a stream began with a hole as long as the outage."""
    _, sink = cables
    sink.plugged = False
    sender = Sender(target(), sink)
    sender.put(counted(7), time.monotonic() - 3600)
    until(lambda: sink.opened >= 2)
    back, sink.plugged = time.monotonic(), True
    until(lambda: len(sink.taken) >= 2)
    sender.end()
    assert sender.over.wait(3)
    times = [at for _, at in sink.taken]
    assert times == sorted(times) and back < times[0] < back + 60


def test_times_never_fall_whenever_pictures_come(cables):
    """Also while the other end is opened, which may take long."""
    _, sink = cables

    def put():
        sender.put(counted(7), time.monotonic())

    class Slow(type(sink(None))):
        def open(self, *size):
            put()
            time.sleep(0.02)
            super().open(*size)

    sender = Sender(target(240), lambda wanted: Slow(sink, wanted))
    put()
    for i in range(3):
        # one that came while it was opened, and then none
        until(lambda n=i: len(sink.taken) >= 10 * n + 2)
        until(lambda n=i: put() or len(sink.taken) >= 10 * n + 10)
        sink.plugged = False
        until(lambda n=i: put() or sender.losses > n)
        sink.plugged = True
    until(lambda: len(sink.taken) >= 32)
    sender.end()
    assert sender.over.wait(3) and sink.opened >= 4
    times = [at for _, at in sink.taken]
    assert times == sorted(times)


def test_what_is_taken_by_nobody_yet_does_not_count_as_sent(cables):
    """A server that takes the offer while UDP does not reach it: neither sent, nor well."""
    _, sink = cables
    sink.joined, states = False, set()
    sender = Sender(target(), sink)
    for i in range(3):
        for number in range(4):
            sender.put(counted(4 * i + number), time.monotonic())
            time.sleep(0.01)
            states.add(sender.state)
        sink.plugged = False
        sender.put(counted(0), time.monotonic())
        until(lambda n=i: sender.losses > n)
        states.add(sender.state)
        sink.plugged = True
        until(lambda: sender.state == "connecting")
    assert "sending" not in states and sender.sent == 0
    assert sender._pauses.next() > 4 * Pauses.FIRST  # between two tries they have grown
    # the last picture goes once somebody takes it, though no other comes
    sink.joined = True
    until(lambda: sender.sent == 1)
    assert sender.state == "sending" and sender.trouble is None and sender.dropped > 0
    sender.end()
    assert sender.over.wait(3)


@pytest.mark.parametrize(
    "settings, told",
    [({"to": "smoke"}, "to"), ({"fps": 0}, "fps"), ({"bit_rate": "x"}, "bit_rate")],
)
def test_a_target_that_cannot_be_is_refused_at_the_start(running, cables, settings, told):
    comfy, _ = running

    async def work(http):
        asked = inprocess.begin(through(**settings))
        return await inprocess.post(http, f"{comfy.url}/livediffusion/start", asked)

    status, answer = inprocess.live(work)
    assert status == 400 and told in str(answer)


def test_a_source_that_is_not_known_is_refused(running):
    comfy, _ = running

    async def work(http):
        made = {**graph(), "3": camera(source="smoke")}
        return await inprocess.post(http, f"{comfy.url}/livediffusion/start", inprocess.begin(made))

    status, answer = inprocess.live(work)
    assert status == 400 and "source" in str(answer)


def test_every_kind_that_a_node_offers_has_its_module():
    for name in sources.PULLED:
        made = sources.kind(name)
        assert all(callable(getattr(made, part)) for part in ("check", "listed", "open", "newest"))
    for name in sinks.KINDS:
        made = sinks.kind(name)
        assert isinstance(made.REPEATS, bool) and callable(made.check)
