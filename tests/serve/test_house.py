"""The real thing: Ray Serve, two ComfyUIs, four visitors. More of it: benchmarks/serve_bars.py."""

import asyncio
import http.client
import pathlib

import pytest
from serving import launch

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.server]


@pytest.fixture(scope="module")
def ray_there():
    """Skips where Ray's environment cannot be had."""
    house = launch("house")
    try:
        house.environment()
    except launch("console").Stop as reason:
        pytest.skip(f"no Ray here: {reason}")


def test_two_run_and_two_wait_their_turn(comfyui, ray_there, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    import house
    import visitors

    with house.House(tmp_path, "--replicas", "2", "--fps", "10") as there:
        there.wait(2)
        linked(there)
        asyncio.run(four(there, visitors))
    assert there.left() == {}


def linked(there):
    """Who clicks the operator's address in a mail gets in, though the cookie is a strict one."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    given = f"/operator?ticket={there.operator}"
    steps = [(given, link), ("/operator", link), ("/operator", {}), ("/operator", link)]
    name = there.url.removeprefix("http://")
    cookie, seen = "", []
    for path, headers in steps:
        line = http.client.HTTPConnection(name, timeout=10)
        # strict: not with a link from elsewhere, nor where that is sent on to
        line.request("GET", path, headers=headers or {"Cookie": cookie})
        answer = line.getresponse()
        cookie = answer.getheader("Set-Cookie", cookie).partition(";")[0]
        seen.append((answer.status, b"url=/operator" in answer.read()))
        line.close()
    assert seen == [(303, False), (200, True), (200, False), (200, True)], seen


async def four(there, visitors):
    """Each sees only its own pictures; who leaves makes room for the next in line."""

    def told():
        return [(v.phase, v.place, v.of, v.errors[-3:], v.overs) for v in all_]

    hues = (0.0, 0.3, 0.55, 0.8)
    all_ = [visitors.Visitor(there.url, hue, relay=i % 2 == 1) for i, hue in enumerate(hues)]
    async with all_[0], all_[1], all_[2], all_[3]:
        await all_[0].want()
        # how long a start takes on this machine, with nobody to wait for
        own = await visitors.until(lambda: all_[0].pictures, 30, told)
        for visitor in all_[1:]:
            await visitor.want()
            # who comes first is first in line
            await asyncio.sleep(0.5)
        first, waiting = all_[:2], all_[2:]
        await visitors.until(lambda: all(len(v.pictures) > 8 for v in first), 20, told)
        assert [v.phase for v in waiting] == ["waiting"] * 2, told()
        assert [(v.place, v.of) for v in waiting] == [(1, 2), (2, 2)], told()
        assert first[0].replica != first[1].replica
        await first[1].change(**{"1_mirror": True})
        await visitors.until(lambda: first[1].lights, 5, told)
        assert not first[0].lights, "a setting is its visitor's own"
        await first[0].leave()
        took = await visitors.until(lambda: waiting[0].pictures, 30, told)
        # 3 s; where a start alone takes more than one of them, at most 3 s beside it
        assert took <= min(max(3.0, 3 * own), 3.0 + own), (took, own)
        await visitors.until(lambda: (waiting[1].place, waiting[1].of) == (1, 1), 10, told)
        await visitors.until(lambda: len(waiting[0].pictures) > 8, 10, told)
        assert [v.wrong for v in all_] == [[]] * 4
        assert not waiting[1].pictures
