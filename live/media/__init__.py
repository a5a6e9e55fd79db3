"""Films and pictures from files: one reader for live runs, nodes, clients and tests.

Knows nothing of ComfyUI and of torch. `reader` is its front door.
"""
