"""What a replica tells the lobby, without Ray."""

import asyncio
import types
from collections import deque

from serving import served

replica = served("replica")


class Replica(replica.Replica):
    """One whose parts a test gives."""

    def __init__(self, **parts):
        vars(self).update(parts)

    def __del__(self):
        pass


def test_a_stream_that_is_slow_to_end_holds_up_no_report(monkeypatch):
    """Or the lobby would take the replica to be lost, and its visitors with it."""
    monkeypatch.setattr(replica, "EVERY", 0.15)
    heard, ended = [], []

    async def end(visitor, turn, reason):
        ended.append((visitor, turn, reason))
        if visitor == "broken":
            raise ValueError("no such stream")
        await asyncio.sleep(60)

    async def report(said):
        heard.append(said)
        ending = {"slow": (1.0, "time"), "broken": (2.0, "operator")} if len(heard) == 1 else {}
        return {"end": ending, "drain": False}

    async def whole():
        made = Replica(
            id="r1", _address="a:1", _direct=None, _device="d", _house={}, _answer={},
            _over=False, _draining=False, _told=False, _news=asyncio.Event(), _endings=set(),
            _events=deque(), _measured=types.SimpleNamespace(tick_s=0.02),
            _gate=types.SimpleNamespace(report=lambda: {"streams": {}}, end=end),
            _figures=types.SimpleNamespace(report=lambda said: None),
            _lobby=types.SimpleNamespace(report=types.SimpleNamespace(remote=report)),
        )  # fmt: skip
        reporting = asyncio.ensure_future(made._reporting())
        await asyncio.sleep(1)
        assert len(heard) >= 4 and not reporting.done()
        assert len(made._endings) == 1  # kept until it has ended
        for one in (reporting, *made._endings):
            one.cancel()
        await asyncio.sleep(0)

    asyncio.run(whole())
    assert ended == [("slow", 1.0, "time"), ("broken", 2.0, "operator")]
    told = [event for said in heard for event in said["events"]]
    assert told == [{"event": "bug", "why": repr(ValueError("no such stream"))}]
