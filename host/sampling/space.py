"""ComfyUI's model_sampling as the engine's NoiseSpace."""

import math

import torch
from comfy.latent_formats import LatentFormat
from torch import Tensor

from ...engine.space import Mix


class ModelSpace:
    """Reads the weights of noise_scaling off the model itself, so that every family works.

    Args:
        model_sampling: ComfyUI's object (comfy/model_sampling.py); its noise_scaling must be linear
            in noise and latent, which all families but image-to-image flow (IMG_TO_IMG_FLOW) are.

    Raises:
        ValueError: the model leaves a run by more than a factor, so it cannot be streamed.
    """

    def __init__(self, model_sampling):
        self.model_sampling = model_sampling
        self.sigma_max = float(model_sampling.sigma_max)
        if self._left(0.5, 0.0) != 0:
            raise ValueError(
                "model: this model family is no denoiser of noised latents "
                f"({type(model_sampling).__name__}), so there is nothing to stream"
            )

    def mix(self, sigma: float) -> Mix:
        return self._mix(sigma, max_denoise=False)

    def entry(self, sigma: float) -> Mix:
        # as comfy.samplers.Sampler.max_denoise decides it
        full = math.isclose(self.sigma_max, sigma, rel_tol=1e-5) or sigma > self.sigma_max
        return self._mix(sigma, max_denoise=full)

    def unmix(self, sigma: float) -> float:
        return self._left(sigma, 1.0)

    def _mix(self, sigma: float, max_denoise: bool) -> Mix:
        def scaled(noise: float, latent: float) -> float:
            one = torch.ones(1, 1, 1, 1)
            level = torch.tensor([sigma], dtype=torch.float32)
            return float(
                self.model_sampling.noise_scaling(level, one * noise, one * latent, max_denoise)
            )

        return Mix(scaled(0.0, 1.0), scaled(1.0, 0.0))

    def _left(self, sigma: float, value: float) -> float:
        level = torch.tensor([sigma], dtype=torch.float32)
        return float(
            self.model_sampling.inverse_noise_scaling(level, torch.full((1, 1, 1, 1), value))
        )


def scaled_in(model, latents: Tensor) -> Tensor:
    """process_latent_in, which ComfyUI leaves out for an empty latent."""
    scaled = model.process_latent_in(latents)
    if type(model.latent_format).process_in is LatentFormat.process_in:
        return scaled  # a factor: nothing stays nothing
    # decided on the device: to ask for the answer would wait for it
    return torch.where(latents.any(), scaled, latents)
