"""A visitor's stream through the gate: frames unread, messages by a list, ComfyUIs that die."""

import asyncio
import json
import socket
import time

import pytest
from gating import HEADER, SECRET, House, gate, messages, run, stream, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("size", [0, 1, 100, 125, 126, 65_535, 65_536, 300_000, 4 * 2**20 - 24])
def test_frames_pass_as_they_are(size):
    payload = bytes(range(256)) * (size // 256 + 1)

    async def test(house):
        page = await house.page()
        await page.send(payload[:size], 7)
        await until(lambda: page.pictures)
        sent = house.comfyui.frames[0]
        assert sent[HEADER.size :] == payload[:size] == page.pictures[0][HEADER.size :]
        assert HEADER.unpack_from(sent)[:4] == (1, 1, 0, 7)
        assert len(page.heard("received")) == 1

    run(test)


def test_the_answer_says_what_a_page_needs_and_no_more():
    async def test(house):
        page = await house.page()
        assert set(page.begun) == {
            "session", "token", "prompt_id", "version", "ahead", "cameras", "views", "idle"
        }  # fmt: skip
        assert SECRET not in json.dumps(page.begun)
        assert "comfy" not in json.dumps([page.begun["session"], page.begun["token"]])
        assert page.begun["views"] == [{"node": "9", "index": 0}]
        asked = {"node": "1", "source": "browser", "width": 64, "height": 64, "fps": 60}
        assert page.begun["cameras"] == [asked]
        status, answer = await page.post("update", prompt={"values": {}})
        assert status == 200 and SECRET not in json.dumps(answer)

    run(test)


def test_a_view_that_is_not_shown_stays_here():
    async def test(house):
        page = await house.page()
        await until(lambda: house.comfyui.sockets)
        for view in (1, 1, 1, 0):
            await house.comfyui.tell(bytes([2, 1, view, 0]) + bytes(20) + b"picture")
        await until(lambda: page.pictures)
        assert [one[2] for one in page.pictures] == [0]
        # or ComfyUI would wait for it
        await until(lambda: [m["view"] for m in house.comfyui.heard].count(1) == 3)

    run(test)


KNOWN = ("state", "stats", "pace", "received", "refused", "unreadable", "problem", "recorded")
_PLAIN = st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.just(SECRET))
_TEXTS = st.fixed_dictionaries(
    {"type": st.one_of(st.sampled_from(KNOWN), st.just("new"))},
    optional={
        "reason": st.just(SECRET), "message": st.just(SECRET), "node": st.just(SECRET),
        "details": st.just({"path": SECRET}), "engines": st.just([SECRET]),
        "roads": st.just([{"why": SECRET}]), "name": st.just(SECRET),
        "kind": st.sampled_from(["edit", "picture", "task", "send", "record"]),
        "seq": st.integers(0, 9),
        "state": st.sampled_from(["live", "queued", "failed", "stopping"]),
        "refused": st.sampled_from([None, SECRET]), "silent": st.just([SECRET]),
    },
)  # fmt: skip


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_TEXTS, min_size=5, max_size=40))
def test_what_comfyui_says_of_itself_stays_with_the_operator(texts):
    async def test(house):
        page = await house.page()
        for text in texts:
            await house.comfyui.tell(text)
        await house.comfyui.tell({"type": "stats", "frames": 4711})
        await until(lambda: any(m.get("frames") == 4711 for m in page.messages))
        assert SECRET not in json.dumps(page.messages)
        assert {m["type"] for m in page.messages} <= {*KNOWN} - {"recorded"}
        # each of them, also what is no page's business
        told = [(t.get("kind"), t.get("reason")) for t in texts if t["type"] == "problem"]
        assert [(f["kind"], f["why"]) for e, f in house.events if e == "problem"] == told

    run(test)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"type": "stop"}', '{"type": "shown"}',
     '{"type": "shown", "view": -1}', '{"type":"compare","view":0,"on":1}', "x" * 5000,
     '{"type":"shown","view":' + "[" * 900,
     '{"type": "refused", "reason": "x"}', "\ud800".encode("utf-8", "surrogatepass").hex()],
)  # fmt: skip
def test_what_a_page_may_not_say_is_left_alone(text):
    async def test(house):
        page = await house.page()
        await page.socket.send_str(text)
        await page.socket.send_json({"type": "compare", "view": 0, "on": True, "extra": 1})
        await page.send()
        await until(lambda: page.pictures)
        said = [one for one in house.comfyui.heard if one["type"] != "shown"]
        assert said == [{"type": "compare", "view": 0, "on": True}]

    run(test)


@pytest.mark.parametrize("body", [
    {"values": {"no.such": 1}}, {"values": {"3.text": 5}}, {"values": {"5.cfg": "x"}},
    {"values": []}, {}, {"values": {"x" * 300: 1}}, {"values": {str(i): 1 for i in range(300)}},
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_in_words_and_the_stream_goes_on(body):
    async def test(house):
        status, answer = await house.post("start", {"prompt": body})
        assert status == 400 and answer["error"]["message"].endswith(".")
        assert house.comfyui.graphs == []
        page = await house.page({"3.text": "neon"})
        status, answer = await page.post("update", prompt=body)
        assert status == 400 and answer["error"]["message"].endswith(".")
        await page.send()
        await until(lambda: page.pictures)
        assert len(house.comfyui.graphs) == 1

    run(test)


def test_an_edit_joins_the_settings_before_and_one_refused_leaves_them():
    async def test(house):
        page = await house.page({"3.text": "neon"})
        status, _ = await page.post("update", prompt={"values": {"5.cfg": 2}})
        assert status == 200
        house.comfyui.refuse = True
        status, answer = await page.post("update", prompt={"values": {"3.text": "bad"}})
        assert (status, answer["error"]["message"]) == (400, messages.NOT_TAKEN)
        house.comfyui.refuse = False
        # one that fails in its first frame is taken back by ComfyUI, and here
        await page.post("update", prompt={"values": {"3.text": "worse"}})
        await house.comfyui.tell({"type": "problem", "kind": "edit", "reason": "x"})
        await until(lambda: page.heard("problem"))
        await house.comfyui.die()
        await house.comfyui.rise()
        await until(lambda: len(house.comfyui.graphs) == 5)
        assert house.comfyui.graphs[-1]["3"]["inputs"] == {"3.text": "neon", "5.cfg": 2}

    run(test)


@pytest.mark.parametrize("dies", [False, True])
def test_what_a_page_wants_of_views_outlives_the_socket_to_comfyui(dies):
    async def test(house):
        page = await house.page()

        async def wish(kind, view, on):
            before = len(house.comfyui.heard)
            await page.socket.send_json({"type": kind, "view": view, "on": on})
            await until(lambda: len(house.comfyui.heard) > before)

        await until(lambda: house.comfyui.sockets)
        for one in (("compare", 0, True), ("elsewhere", 3, True), ("compare", 5, True),
                    ("compare", 5, False)):  # fmt: skip
            await wish(*one)
        for _ in range(2):
            house.comfyui.heard.clear()
            if dies:
                await house.comfyui.die()
                await house.comfyui.rise()
            else:
                house.comfyui.sockets.pop()[1].transport.abort()
            # a ComfyUI knows nothing of what it was told by another socket
            await until(lambda: len([m for m in house.comfyui.heard if "on" in m]) == 2)
            await page.send()
            await until(lambda: page.pictures)
            said = [(m["type"], m["view"], m["on"]) for m in house.comfyui.heard if "on" in m]
            assert sorted(said) == [("compare", 0, True), ("elsewhere", 3, True)]
            page.pictures.clear()
        # another page says its own
        house.comfyui.heard.clear()
        await page.join()
        await until(lambda: len([m for m in house.comfyui.heard if m.get("on") is False]) == 2)

    run(test)


def test_edits_have_a_rate():
    async def test(house):
        page = await house.page()
        edits = [page.post("update", prompt={"values": {"5.cfg": i}}) for i in range(40)]
        statuses = [status for status, _ in await asyncio.gather(*edits)]
        assert set(statuses) == {200, 429} and statuses.count(200) <= 25

    run(test)


def test_a_comfyui_that_dies_costs_no_settings_and_no_socket():
    async def test(house):
        page = await house.page({"3.text": "neon"})
        for turn in range(3):
            await page.send()
            await until(lambda: len(page.pictures) == turn + 1)  # noqa: B023
            house.comfyui.hold = True
            await page.send()
            await page.send()
            await until(lambda: len(house.comfyui.frames) == 3 * (turn + 1))  # noqa: B023
            answered = len(page.heard("received"))
            await house.comfyui.die()
            await until(lambda: len(page.heard("moving")) == turn + 1)  # noqa: B023
            # or a page would send no more: it has two that nobody will answer
            await until(lambda: len(page.heard("received")) == answered + 2)  # noqa: B023
            await page.send()
            await until(lambda: len(page.heard("received")) == answered + 3)  # noqa: B023
            await page.post("update", prompt={"values": {"5.cfg": turn}})
            house.comfyui.hold = False
            await house.comfyui.rise()
            await until(lambda: len(page.heard("state")) == turn + 2)  # noqa: B023
            assert house.comfyui.graphs[-1]["3"]["inputs"] == {"3.text": "neon", "5.cfg": turn}
        assert page.closed is None
        assert [m["reason"] for m in page.heard("moving")] == ["restart"] * 3

    run(test)


def test_a_stream_that_comfyuis_die_of_is_given_up():
    async def test(house):
        page = await house.page()
        for _ in range(stream._DEATHS):
            await until(lambda: house.comfyui.sockets)
            await house.comfyui.die()
            await house.comfyui.rise()
        await until(lambda: page.closed)
        assert page.heard("over") == [{"type": "over", "reason": "failed"}]
        assert house.gate.report()["streams"] == {}

    run(test)


def test_a_broken_connection_to_a_living_comfyui_keeps_its_session():
    async def test(house):
        page = await house.page()
        await until(lambda: house.comfyui.sockets)
        house.comfyui.sockets.pop()[1].transport.abort()
        await until(lambda: house.comfyui.sockets)
        await page.send()
        await until(lambda: page.pictures)
        assert len(house.comfyui.graphs) == 1 and not page.heard("moving")

    run(test)


@pytest.mark.parametrize("how,code", [("GRACE_S", 1000), ("LEFT_S", 1001)])
def test_a_page_may_be_away_for_a_while(monkeypatch, how, code):
    async def test(house):
        page = await house.page()
        page.patient = False
        for i in range(2):
            await page.send(sequence=i)
        await until(lambda: len(page.pictures) == 2)
        await page.away()
        # what it has not shown is said to be, so that pictures go on
        await until(lambda: len(house.gate.report()["streams"]) == 1)
        await house.comfyui.tell(b"\x02" + bytes(23) + b"new")
        await page.join()
        await until(lambda: page.pictures[-1].endswith(b"new"))
        shown = [one for one in house.comfyui.heard if one["type"] == "shown"]
        assert len(shown) >= 2
        assert page.heard("state")[-1]["state"] == "live"
        monkeypatch.setattr(stream, how, 0.3)
        await page.away(code)
        await until(lambda: house.gate.report()["streams"] == {})
        await until(lambda: house.comfyui.stopped == 1)
        assert ("ended", "gone") in [(e, f.get("reason")) for e, f in house.events]
        assert (await house.post("stats", {}, page.ticket))[0] in (403, 405, 410)

    run(test)


def test_a_page_that_never_comes_and_one_that_reads_nothing(monkeypatch):
    monkeypatch.setattr(stream, "GRACE_S", 0.2)
    monkeypatch.setattr(stream, "EXPECTED_S", 0.2)
    monkeypatch.setattr(stream, "_STUCK_S", 0.2)

    async def test(house):
        status, _ = await house.post("start", {"prompt": {"values": {}}})
        assert status == 200
        await until(lambda: house.gate.report()["streams"] == {})
        ticket = house.ticket(turn=2.0)
        status, begun = await house.post("start", {"prompt": {"values": {}}}, ticket)
        keys = f"session={begun['session']}&token={begun['token']}&ticket={ticket}"
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        writer.write(
            f"GET /livediffusion/frames?{keys} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        assert b"101" in await reader.readline()
        # from here on it reads nothing; more comes than the sockets of two processes hold
        for _ in range(400):
            if not house.gate.report()["streams"]:
                break
            try:
                await asyncio.wait_for(house.comfyui.tell(bytes(24) + bytes(2**18)), 0.5)
            except (asyncio.TimeoutError, ConnectionError):
                continue
        await until(lambda: house.gate.report()["streams"] == {})
        writer.close()

    run(test)


def test_the_page_that_comes_last_has_the_stream():
    async def test(house):
        first = await house.page()
        old = first.socket, first.reading
        await first.join()
        await until(lambda: old[0].closed)
        assert old[0].close_code == stream.TAKEN_OVER
        await first.send()
        await until(lambda: first.pictures)
        assert first.closed is None

    run(test)


def test_one_visitor_at_a_time_who_may_begin_anew():
    async def test(house):
        page = await house.page()
        status, answer = await house.post(
            "start", {"prompt": {"values": {}}}, house.ticket(id="v2")
        )
        assert status == 409 and "Somebody else" in answer["error"]["message"]
        reported = []
        house.gate._changed = lambda: reported.append([*house.gate.report()["streams"]])
        again = await house.page()
        # never as if it were gone: another would get its place
        assert len(reported) >= 2 and all(streams == ["v1"] for streams in reported)
        await until(lambda: page.closed == stream.OVER)
        assert not page.heard("over")
        await again.send()
        await until(lambda: again.pictures)
        assert list(house.gate.report()["streams"]) == ["v1"]

    run(test)


def test_a_turn_that_is_over_opens_nothing_more():
    async def test(house):
        page = await house.page()
        assert await house.gate.end("v1", 1.0, "operator")
        await until(lambda: page.closed)
        assert page.closed == stream.OVER
        assert page.heard("over") == [{"type": "over", "reason": "operator"}]
        for ticket in (page.ticket, house.ticket()):
            status, _ = await house.post("start", {"prompt": {"values": {}}}, ticket)
            assert status == 403
        assert house.comfyui.stopped == 1
        # another turn of the same visitor is not meant, whatever the clock that it was made by
        again = await house.page(turn=2.0)
        assert not await house.gate.end("v1", 1.0, "operator")
        await again.send()
        await until(lambda: again.pictures)
        assert house.gate.report()["streams"]["v1"]["turn"] == 2.0
        # who had none is ended as well: a ticket may be on its way
        assert not await house.gate.end("v7", 1.0, "operator")
        status, _ = await house.post("start", {"prompt": {"values": {}}}, house.ticket(id="v7"))
        assert status == 403

    run(test)


def test_a_stop_ends_the_turn():
    async def test(house):
        page = await house.page()
        assert await page.post("stop") == (200, {"state": "ended"})
        await until(lambda: page.closed == stream.OVER)
        assert not page.heard("over")
        assert (await house.post("start", {"prompt": {"values": {}}}))[0] == 403

    run(test)


def test_time_is_up():
    async def test(house):
        page = await house.page(until=time.time() + 0.4)
        began = time.monotonic()
        await until(lambda: page.closed)
        assert page.heard("over") == [{"type": "over", "reason": "time"}]
        assert time.monotonic() - began >= 0.3
        for end in (time.time() - 1, "soon", True):
            ticket = house.ticket(until=end, turn=2.0)
            assert (await house.post("start", {"prompt": {"values": {}}}, ticket))[0] == 403

    run(test)


def test_a_replica_that_goes_says_so_and_waits():
    async def test(house):
        page = await house.page()
        draining = asyncio.create_task(house.gate.drain(10))
        await until(lambda: page.heard("moving"))
        assert page.heard("moving") == [{"type": "moving", "reason": "draining"}]
        assert not house.gate.report()["ready"] and house.gate.report()["draining"]
        await page.send()
        await until(lambda: page.pictures)
        status, _ = await house.post("start", {"prompt": {"values": {}}}, house.ticket(id="v2"))
        assert status == 503
        assert not draining.done()
        await page.away()
        await asyncio.wait_for(draining, 5)
        assert house.gate.report()["streams"] == {}
        await asyncio.wait_for(house.gate.drain(0.1), 5)

    run(test)


def test_more_frames_than_the_house_gives_are_answered_and_left_out():
    async def whole():
        async with House(fps=10) as house:
            page = await house.page()
            pace = {"type": "pace", "camera": 0, "interval_ms": 5, "width": 64, "height": 48}
            await house.comfyui.tell(pace)
            for i in range(100):
                await page.send(sequence=i)
            await until(lambda: len(page.heard("received")) == 100)
            assert 3 <= len(house.comfyui.frames) <= 20
            # whole, or the page would not know what of which camera it is about
            assert page.heard("pace")[0] == pace | {"interval_ms": 100}
            assert page.begun["cameras"][0]["fps"] == 10
            assert page.closed is None

    asyncio.run(whole())


def test_a_frame_too_large_is_refused_by_itself_and_one_much_too_large_with_its_socket():
    async def test(house):
        page = await house.page()
        await page.send(bytes(stream.LARGEST))
        await until(lambda: page.heard("received"))
        assert "bytes" in page.heard("received")[0]["refused"]
        await page.send()
        await until(lambda: page.pictures)
        await page.send(bytes(2 * stream.LARGEST))
        await until(lambda: page.closed)
        assert page.closed == 1009
        await page.join()
        await page.send()
        await until(lambda: len(page.pictures) >= 2)
        assert len(house.comfyui.graphs) == 1

    run(test)


def test_the_report_follows():
    async def test(house):
        assert house.gate.report()["ready"]
        page = await house.page()
        before = house.changes
        figures = {"fps": 9.5, "compute_ms": {"p50": 40.0, "p95": 50.0}, "frames": 12,
                   "latency_ms": {"p50": 90.0, "p95": 99.0}}  # fmt: skip
        await house.comfyui.tell({"type": "stats", **figures})
        await until(lambda: page.heard("stats"))
        report = house.gate.report()
        one = report["streams"]["v1"]
        assert (one["fps"], one["tick_s"], one["latency_ms"], one["frames"]) == (9.5, 0.04, 90, 12)
        assert report["tick_s"] == 0.04 and house.changes > before
        await house.comfyui.die()
        assert not house.gate.report()["ready"]

    run(test)


def test_a_port_that_is_taken():
    async def test(house):
        other = gate.Gate(house.comfyui, None, house.tickets, "r2", 10.0)
        with pytest.raises(OSError):
            await other.start("127.0.0.1", house.port)
        await other.stop()
        with socket.socket() as one:
            one.settimeout(2)
            one.connect(("127.0.0.1", house.port))

    run(test)
