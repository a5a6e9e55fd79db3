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
