"""Finding where the steps go, inside ComfyUI's own sampling."""
