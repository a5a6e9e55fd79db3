"""What there is to choose from for a source: asked for in a thread, for a while, by our page."""

import asyncio
import threading

import inprocess
import pytest
from inprocess import live
from livediffusion.live import listing
from livediffusion.live.faults import Refused
from livediffusion.live.listing import Listing

pytestmark = [pytest.mark.comfy]


class Kind:
    names, missing, calls = [], None, 0

    @classmethod
    def listed(cls):
        cls.calls += 1
        return cls.names

    @classmethod
    def check(cls, name):
        if cls.missing:
            raise Refused(cls.missing)


@pytest.fixture
def kind(monkeypatch):
    made = type("Kind", (Kind,), {})
    monkeypatch.setattr(listing, "kind", lambda source: made)
    return made


def asked(source="device"):
    return asyncio.run(Listing().names(source))


def test_names_are_told_and_bounded(kind):
    kind.names = ["Cam", "", "x" * 300, *(f"c{i}" for i in range(100))]
    told = asked()
    assert told["reason"] is None and told["names"][0] == "Cam" and len(told["names"]) == 64
    assert all(0 < len(name) <= 256 for name in told["names"])


def test_where_there_are_none_it_says_why(kind, caplog):
    kind.missing = "sender: pip install something"
    assert asked() == {"names": [], "reason": "sender: pip install something"}
    kind.missing = None
    assert asked() == {"names": [], "reason": None}

    def broken():
        raise OSError("/secret/place")

    kind.listed = staticmethod(broken)
    told = asked()
    assert told["names"] == [] and "log" in told["reason"] and "secret" not in told["reason"]
    assert "/secret/place" in caplog.text


def test_one_that_hangs_holds_up_one_thread(kind, monkeypatch):
    monkeypatch.setattr(listing, "_PATIENCE", 0.1)
    go, threads = threading.Event(), set()

    def hangs():
        threads.add(threading.current_thread())
        go.wait(20)
        return ["late"]

    kind.listed = staticmethod(hangs)

    async def work():
        one = Listing()
        told = await asyncio.gather(*(one.names("ndi") for _ in range(20)))
        told.append(await one.names("ndi"))
        assert all(one["names"] == [] and "ndi" in one["reason"] for one in told)
        assert len(threads) == 1
        go.set()
        monkeypatch.setattr(listing, "_PATIENCE", 10)
        assert (await one.names("ndi"))["names"] == ["late"]

    asyncio.run(work())


def test_the_route_is_for_our_page_and_for_sources(kind):
    kind.names = ["Cam"]

    async def work(http):
        async def get(query, **headers):
            async with http.get(f"{comfy.url}/livediffusion/sources{query}", headers=headers) as r:
                return r.status, await r.json()

        assert await get("?kind=device") == (200, {"names": ["Cam"], "reason": None})
        for query in ("", "?kind=", "?kind=os", "?kind=../run"):
            status, told = await get(query)
            assert status == 400 and told["error"]["message"], query
        calls = kind.calls
        status, _ = await get("?kind=device", Origin="https://evil.example")
        assert status == 403 and kind.calls == calls

    with inprocess.comfy() as (comfy, _):
        live(work)
