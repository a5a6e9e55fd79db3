"""What ComfyUI does not take, though it is there: nothing stands still without a word."""


import pytest
from aiohttp import web
from gating import run, stream, until

pytestmark = pytest.mark.alone


@pytest.mark.parametrize("status", [410, 429, 500])
def test_a_change_that_comfyui_does_not_take_is_not_said_to_be_taken(status):
    async def test(house):
        async def broken(request):
            return web.Response(status=status)

        page = await house.page({"3.text": "neon"})
        await until(lambda: page.heard("state"))
        house.comfyui._update = broken
        told, answer = await page.post("update", prompt={"values": {"5.cfg": 2}})
        assert told == 503 and answer["error"]["message"].endswith(".")
        assert [event for event, _ in house.events if event == "edit lost"]
        # what was before it goes on, also in the next ComfyUI
        del house.comfyui._update
        await house.comfyui.die()
        await house.comfyui.rise()
        await until(lambda: len(house.comfyui.graphs) == 2)
        assert house.comfyui.graphs[-1]["3"]["inputs"] == {"3.text": "neon"}

    run(test)


@pytest.mark.parametrize("again", [True, False])
def test_a_comfyui_that_takes_no_socket_is_asked_calmly_and_not_for_ever(monkeypatch, again):
    monkeypatch.setattr(stream, "_LOOK_S", 0.1)
    refused = []

    async def test(house):
        real = house.comfyui._frames

        async def refuse(request):
            if again and len(refused) > stream._MISSES:  # of another session
                return await real(request)
            refused.append(request)
            return web.Response(status=503)

        house.comfyui._frames = refuse
        page = await house.page({"3.text": "neon"})
        if again:
            await until(lambda: page.heard("state"))
            await page.send()
            await until(lambda: page.pictures)
            assert page.closed is None and "restarted" in [event for event, _ in house.events]
            assert [graph["3"]["inputs"] for graph in house.comfyui.graphs] == 2 * [
                {"3.text": "neon"}
            ]
        else:
            await until(lambda: page.closed)
            assert page.heard("over") == [{"type": "over", "reason": "failed"}]
        assert stream._MISSES < len(refused) <= stream._MISSES + stream._DEATHS

    run(test)
