"""ComfyUI-LiveDiffusion: real-time diffusion as graph components."""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; the nodes are imported here, so importing the root costs nothing."""
    try:
        from .nodes.extension import LiveDiffusionExtension
    except Exception:
        logging.getLogger("livediffusion").exception("LiveDiffusion: could not load the nodes")
        raise
    return LiveDiffusionExtension()
