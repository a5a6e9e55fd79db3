"""The seam to ComfyUI: guiders, conditioning, model lifetimes, latents that stay on the device."""
