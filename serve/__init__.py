"""Many streams on Ray Serve: one address, a queue, a ComfyUI for each stream that runs."""
