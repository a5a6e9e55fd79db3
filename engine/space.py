"""How a model family mixes a clean latent with noise: all that the engine needs to know of it."""

from typing import NamedTuple, Protocol


class Mix(NamedTuple):
    """Weights of `x = source * latent + noise * randn`."""

    source: float
    noise: float


class NoiseSpace(Protocol):
    """ComfyUI's convention: x lives in sigma space, the model returns the clean prediction x0."""

    def mix(self, sigma: float) -> Mix:
        """How a clean latent is brought to noise level `sigma`."""

    def entry(self, sigma: float) -> Mix:
        """The same for the first level of a run, where some families start from pure noise."""

    def unmix(self, sigma: float) -> float:
        """Factor that makes a clean latent of an x left at noise level `sigma` (1 at sigma 0)."""


class AsItComes:
    """The space of an x that comes with its noise and is returned at its last level, as in
    k-diffusion's samplers: nothing is mixed, which rules out rules that draw fresh noise."""

    def mix(self, sigma: float) -> Mix:
        raise NotImplementedError("fresh noise asks for the space of a model family")

    def entry(self, sigma: float) -> Mix:
        return Mix(1.0, 0.0)

    def unmix(self, sigma: float) -> float:
        return 1.0
