"""Where the steps go. Pure torch, no ComfyUI."""
