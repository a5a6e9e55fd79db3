"""One ComfyUI on one GPU, measured before a house is made of many (`--gpus-each auto`)."""

import asyncio
from typing import Any

from .replica import comfyui_of, object_info
from .settings import Settings
from .workflow.exposed import Exposed


def measure(settings: Settings) -> dict[str, Any]:
    """A tick's seconds and the memory that it takes, as a task of Ray's on a GPU of its own."""
    return asyncio.run(_measure(settings))


async def _measure(settings: Settings) -> dict[str, Any]:
    comfyui = comfyui_of(settings)
    await comfyui.start()
    try:
        exposed = Exposed.load(
            settings.workflow, await object_info(comfyui.url), settings.inputs
        )
        found = await comfyui.warm(exposed.graph({}), settings.warm_s)
        return {"tick_s": found.tick_s, "memory_bytes": found.memory_bytes,
                "total_bytes": found.total_bytes}  # fmt: skip
    finally:
        await comfyui.stop()
