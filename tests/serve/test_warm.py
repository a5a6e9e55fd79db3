"""The run that makes a replica warm: what ends it, and what does not."""

import asyncio

import aiohttp
import pytest
from gating import ComfyUI, until
from serving import served

warm = served("comfyui.warm")
GRAPH = {"1": {"class_type": "LiveCamera", "inputs": {"source": "browser"}}}


def measured(*problems):
    """Seconds of a tick, of a run in which these problems were told."""

    async def whole():
        comfyui = ComfyUI()
        await comfyui.rise()
        try:
            async with aiohttp.ClientSession(comfyui.url) as http:
                run = warm._Run(http)
                measuring = asyncio.create_task(run.measure(GRAPH))
                await until(lambda: comfyui.sockets)
                for kind in problems:
                    said = {"type": "problem", "kind": kind, "node": "7", "reason": "no room"}
                    await comfyui.tell(said)
                await until(lambda: run.pictures > warm.MEASURED or measuring.done())
                await comfyui.tell({"type": "stats", "compute_ms": {"p50": 40.0}})
                return await measuring
        finally:
            await comfyui.die()

    return asyncio.run(whole())


def test_a_receiver_that_is_not_there_or_a_full_disk_ends_no_warm_up():
    assert measured("send", "record") == 0.04


@pytest.mark.parametrize("kind", ["picture", "source", "task", "setting", "edit", "newer"])
def test_a_problem_of_the_workflow_ends_it_with_the_node_and_why(kind):
    with pytest.raises(warm.NotWarm, match="node 7: no room"):
        measured("send", kind)
