"""A stream inside ComfyUI's own sampling: guiders, conditioning, roads to the model."""
