"""What ends the tries of a source or a sink, and what does not."""

import socket
import threading

import pytest
from clock import Limit
from livediffusion.live import srt, wires
from livediffusion.live.faults import Refused, Unread
from livediffusion.live.retried import Retried
from livediffusion.live.sources import Lost
from livediffusion.trust import addresses

pytestmark = pytest.mark.comfy


class Place(Retried):
    """Refuses a few times, as opened and as looked at, and then goes well."""

    def __init__(self, opened, looked, times):
        super().__init__("a place")
        self.opened, self.looked, self.left = opened, looked, times
        self._thread.start()

    def _made(self):
        return self

    def _use(self, connection):
        if self.left:
            self.left -= 1
            raise self.opened
        self.well("going")
        self._stop.wait()

    def _check(self):
        if self.looked is not None:
            raise self.looked

    def close(self):
        pass


@pytest.mark.parametrize("opened, looked, ends", [
    (Refused("no"), Refused("no"), True), (Refused("no"), None, False),
    (Refused("no"), Unread("busy"), False), (Unread("busy"), Unread("busy"), False),
    (Lost("away"), Refused("no"), False), (ValueError("?"), Refused("no"), False),
])  # fmt: skip
def test_what_only_the_setting_makes_impossible_ends_the_tries(opened, looked, ends):
    """A file of the server's that cannot be read may be readable in a moment."""
    place, limit = Place(opened, looked, 1), Limit(5)
    while place.state not in ("refused", "going"):
        assert not limit.over
    assert (place.state == "refused") == ends
    place._stop.set()
    assert place.over.wait(5)


def test_a_name_is_looked_up_again_once_there_are_threads_again(monkeypatch):
    address = addresses.parsed("http://somewhere.example/")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(0, 0, 0, "", ("10.0.0.5", 0))])

    def none(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as busy:
        busy.setattr(threading.Thread, "start", none)
        for _ in range(10):
            with pytest.raises(Lost, match="too busy"):
                wires.look_up(address)
    assert wires.look_up(address) == ["10.0.0.5"]


def test_srt_passes_over_a_kind_of_address_that_the_computer_lacks(monkeypatch):
    """As an IPv6 number first, where the kernel has no IPv6."""
    tried = []

    def none(family, *kind):
        tried.append(family)
        raise OSError("Address family not supported by protocol")

    monkeypatch.setattr(srt.socket, "socket", none)
    with pytest.raises(Lost, match="nobody answers there"):
        srt.called(["::1", "127.0.0.1"], 9, srt.Settings(), 1.0)
    assert tried == [socket.AF_INET6, socket.AF_INET]
