"""What a visitor's tickets open at a gate: one stream. At a house: benchmarks/serve_bars.py."""

import asyncio
import pathlib

import pytest
from gating import ORIGIN, SECRET, House, until

pytestmark = pytest.mark.alone


@pytest.fixture
def tries(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    import tries

    return tries


def test_a_visitors_tickets_open_nothing_else(tries):
    """Nothing reaches ComfyUI, nothing of it is told, and the stream goes on."""
    opened, told = [], []

    async def whole():
        async with House() as house:
            page = await house.page()
            other = {"session": page.begun["session"], "token": "B" * 32}
            visit = house.tickets.make("visit", 60, id="v1", since=1.0)
            known = tries.Known(
                f"127.0.0.1:{house.port}", "127.0.0.1:1", "r1", page.ticket, visit, page.keys,
                "127.0.0.1:1", "r2", other, ORIGIN,
            )  # fmt: skip
            before = [*house.comfyui.asked]
            mine = [one for one in tries.tries(known) if one.at == known.gate]
            assert len(mine) > 60
            answers = await asyncio.gather(*(tries.answer(one) for one in mine))
            for one, (status, came) in zip(mine, answers, strict=True):
                if not tries.refused(status, came):
                    opened.append((one.name, status))
                if SECRET.encode() in came:
                    told.append(one.name)
            assert house.comfyui.asked == before
            await page.send()
            await until(lambda: page.pictures)

    asyncio.run(whole())
    assert opened == [] == told


def test_a_try_that_opens_something_is_seen(tries):
    """The oracle: what its own ticket does open counts as opened."""

    async def whole():
        async with House() as house:
            page = await house.page()
            keys = "&".join(f"{name}={value}" for name, value in page.keys.items())
            path = f"/livediffusion/stats?ticket={page.ticket}&{keys}"
            one = tries.Try("own figures", f"127.0.0.1:{house.port}", path)
            assert not tries.refused(*await tries.answer(one))

    asyncio.run(whole())
