"""The WHIP sink against a WHIP server that aiortc and aiohttp make."""

import os
import socket
import sys
import threading
import time

import pytest
from clock import Limit
from ends import counted, pulls
from inprocess import until

pytest.importorskip("aiortc", reason="aiortc is not installed")

import folder_paths
from livediffusion.live import sinks, wires
from livediffusion.live.faults import Refused
from livediffusion.live.sending import Sender
from rtc import SIDE, Taker, in_order

pytestmark = [pytest.mark.comfy, pytest.mark.slow]
PULLS = pulls(2)


@pytest.fixture
def taker(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    with Taker() as made:
        wires.allowed().add("address", f"http://127.0.0.1:{made.port}/*")
        yield made
    until(lambda: not threads())


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("livediffusion")]


def sender(taker, login="", fps=60):
    address = f"http://{login}127.0.0.1:{taker.port}/whip"
    target = sinks.checked_target("whip", "", address, fps, 4.0)
    return Sender(target, sinks.kind("whip"))


def film(one, until_true, fps=30, first=0):
    """Give a sender the counter film until something is so; returns the next number."""
    limit, number = Limit(15), first
    while not until_true():
        assert not limit.over, (one.state, one.trouble)
        one.put(counted(number % 4096, SIDE, SIDE), time.monotonic())
        number += 1
        time.sleep(1 / fps)
    return number


def end(one):
    one.end()
    assert one.over.wait(6)


def test_a_counter_film_arrives_in_order_and_none_twice(taker):
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    one = sender(taker, ":a%20key@")
    last = film(one, lambda: len(taker.numbers) > 60)
    assert one.state == "sending" and one.trouble is None and one.losses == 0
    end(one)
    seen = in_order(taker.numbers)
    assert len(seen) > 0.8 * (last - seen[0]) and taker.keys == ["Bearer a key"]
    assert taker.deleted == 1
    until(lambda: not threads())
    if sys.platform == "linux":
        # the taker's own connection is still there
        assert len(os.listdir("/proc/self/fd")) <= before + 8


def test_pictures_that_come_faster_than_they_go_are_left_out(taker):
    one = sender(taker, fps=240)
    last = film(one, lambda: len(taker.numbers) > 30, fps=400)
    end(one)
    seen = in_order(taker.numbers)
    assert seen[-1] > last - 60 and len(seen) <= last


def test_the_cable_is_pulled_and_plugged_in_again(taker):
    """Nothing comes any more, not even a farewell; the server is back after a while."""
    one, number, took = sender(taker), 0, []
    for _ in range(PULLS):
        number = film(one, lambda: len(taker.numbers) > 100, first=number)
        assert one.state == "sending" and one.trouble is None
        taker.pull()
        number = film(one, lambda: one.state == "waiting", first=number)
        assert "does not answer any more" in one.trouble
        number = film(one, lambda: "takes no pictures now" in (one.trouble or ""), first=number)
        taker.numbers.clear()
        taker.plugged, begun = True, Limit(3)
        number = film(one, lambda: taker.numbers, first=number)
        took.append(round(begun.spent, 2))
        assert not begun.over
    assert one.losses >= 2 * PULLS
    end(one)
    sys.stderr.write(f"pictures again after {max(took)} s at the most, {PULLS} pulls\n")


def test_a_server_that_leads_elsewhere_later_is_not_followed_and_tried_again(taker):
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.1)
        one, asked = sender(taker), lambda: len(taker.keys)
        number = film(one, lambda: len(taker.numbers) > 5)
        taker.leads = f"http://127.0.0.1:{other.getsockname()[1]}/whip"
        taker.pull()
        number = film(one, lambda: "is not allowed yet" in (one.trouble or ""), first=number)
        before = asked()
        number = film(one, lambda: asked() >= before + 2, first=number)
        taker.numbers.clear()
        taker.plugged = True
        film(one, lambda: taker.numbers and one.state == "sending", first=number)
        end(one)
        with pytest.raises(TimeoutError):
            other.accept()


def test_a_server_that_vanishes_before_its_first_report_is_missed_soon(taker):
    taker.reports = False
    one = sender(taker)
    number = film(one, lambda: len(taker.numbers) > 5)
    taker.pull()
    gone = Limit(10)
    film(one, lambda: one.state == "waiting", first=number)
    assert "does not answer any more" in one.trouble and not gone.over
    end(one)
    sys.stderr.write(f"missed after {gone.spent:.1f} s\n")


def test_a_server_that_no_packet_reaches_is_not_sent_to(taker, monkeypatch):
    """It answers the offer, each time anew, which is no connection yet."""
    from livediffusion.live.sinks import whip

    monkeypatch.setattr(whip, "_JOINED", 0.6)
    taker.deaf, states = True, []
    one = sender(taker)

    def twice():
        states.append(one.state)
        return one.losses >= 2

    film(one, twice)
    assert set(states) <= {"idle", "connecting", "waiting"} and one.sent == 0
    assert "UDP does not reach it" in one.trouble
    taker.deaf = False
    # the scene stands still: its picture goes once somebody is there
    until(lambda: one.state == "sending" and taker.numbers)
    assert one.sent == 1
    end(one)


def test_a_server_that_never_reports_is_not_taken_to_be_gone(taker, monkeypatch):
    from livediffusion.live.webrtc import peers

    for name, value in {"_MISSED": 0.5, "_CHECKED": 0.5}.items():
        monkeypatch.setattr(peers, name, value)
    answers, asked = peers.Publisher._answers, []

    async def counted_too(self):
        asked.append(await answers(self))
        return asked[-1]

    monkeypatch.setattr(peers.Publisher, "_answers", counted_too)
    taker.reports = False
    one = sender(taker)
    number = film(one, lambda: len(asked) >= 4)
    seen = len(taker.numbers)
    number = film(one, lambda: len(taker.numbers) > seen + 10, first=number)
    assert all(asked) and (one.state, one.losses) == ("sending", 0)
    taker.pull()
    film(one, lambda: one.state == "waiting", first=number)
    assert asked[-1] is False
    end(one)


@pytest.mark.parametrize(
    "address, why",
    [
        ("", "give the WHIP address"), ("rtmp://a/b", "cannot be used here"),
        ("https://203.0.113.5/whip", "not allowed yet"), ("file:///etc/passwd", "address"),
        ("http://169.254.169.254/whip", "address"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused(taker, address, why):
    with pytest.raises(Refused, match=why) as refused:
        sinks.checked_target("whip", "", address, 30, 4.0)
    assert str(refused.value).startswith("address:")
