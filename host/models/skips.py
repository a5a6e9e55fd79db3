"""Bodies that a MODEL's network passes by, by the noise level of each row.

They hang on the MODEL as what lets frames help each other does (host.models.coherence), so they act
in every sampler, where all rows of a call share a level, and in the stream, where each row is at
its own.
"""

from collections.abc import Collection, Sequence

from ...engine.blocks.cost import Cost
from ...engine.blocks.skips import Choice, Rule
from .coherence import attach
from .flops import Uncountable, cost_of
from .walk import bodies, why_not


def skipping(patcher, levels: Sequence[float], skips: Sequence[Collection[str]]):
    """A clone of a MODEL whose network passes bodies by.

    Args:
        patcher: ComfyUI's MODEL.
        levels: noise levels, falling, above 0; a call at another takes the nearest one's choice
            (engine.blocks.skips.Rule).
        skips: for each, names of bodies (host.models.walk.bodies).

    Raises:
        ValueError: the network cannot be run so, or has no such bodies.
    """
    unet = _walkable(patcher)
    unknown = sorted(set().union(*skips) - set(bodies(unet)))
    if unknown:
        raise ValueError(
            f"model: {type(unet).__name__} has no block {unknown[0]}. Use what was searched for a "
            "model of the same layout."
        )
    return attach(patcher, skips=Rule(tuple(levels), tuple(map(frozenset, skips))))


class Dial:
    """One choice for all levels, to be turned between two calls."""

    def __init__(self):
        self.skipped: frozenset[str] = frozenset()

    def at(self, level: float) -> frozenset[str]:
        return self.skipped

    def on(self, patcher):
        """A clone of a MODEL that passes by what the dial says."""
        choice: Choice = self
        return attach(patcher, skips=choice)


def cost(patcher, size: Sequence[int], tokens: int) -> Cost:
    """What a row of a MODEL's network costs.

    Args:
        size: height and width of a latent.
        tokens: of the prompt.

    Raises:
        ValueError: the network cannot be run without some of its bodies, or not be counted.
    """
    unet = _walkable(patcher)
    channels = next(unet.input_blocks[0].parameters()).shape[1]
    try:
        return cost_of(unet, (channels, *size), tokens)
    except Uncountable as error:
        raise ValueError(f"skip_up_to: {error}. Set it to 0.") from error


def _walkable(patcher):
    unet = patcher.get_model_object("diffusion_model")
    if why := why_not(unet):
        raise ValueError(f"skip_up_to: nothing of this model can be left out: {why}. Set it to 0.")
    return unet
