"""What travels with a frame through the ring."""

from dataclasses import dataclass, replace

from torch import Tensor

from .rows import Batch, Conditioning


@dataclass(eq=False, slots=True)
class Payload:
    """What a frame brings besides its latent.

    Attributes:
        conditioning: its own.
        mask: where the frame is denoised, [1, 1 or C, H, W], or None for everywhere.
        noise: the noise the frame entered with, [1, C, H, W]; kept with a mask only.
        run: number of the run it entered in.
    """

    conditioning: Conditioning
    mask: Tensor | None = None
    noise: Tensor | None = None
    run: int = 0

    def recondition(self, other: "Payload") -> "Payload":
        """The same frame under another frame's conditioning."""
        return replace(self, conditioning=other.conditioning)


def payloads(
    batch: Batch, count: int, run: int, mask: Tensor | None = None, noise: Tensor | None = None
) -> list[Payload]:
    """Of the frames of a run, in order.

    Args:
        batch: their conditioning.
        count: B.
        run: its number.
        mask: ComfyUI's, [b, 1 or C, H, W], which repeats, or None.
        noise: that they enter with, [B, C, H, W]; needed with a mask.
    """
    if mask is None:
        return [Payload(batch.frame(i), run=run) for i in range(count)]
    return [
        Payload(batch.frame(i), mask[i % mask.shape[0]][None], noise[i : i + 1], run)
        for i in range(count)
    ]
