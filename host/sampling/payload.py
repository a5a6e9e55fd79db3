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
        number: of the frame, in the order in which they enter.
        drawn: tells noise that it entered with from that of others; None where it is the slots'.
    """

    conditioning: Conditioning
    mask: Tensor | None = None
    noise: Tensor | None = None
    run: int = 0
    number: int = 0
    drawn: int | None = None

    def recondition(self, other: "Payload") -> "Payload":
        """The same frame under another frame's conditioning."""
        return replace(self, conditioning=other.conditioning)


def payloads(
    batch: Batch, count: int, run: int, mask: Tensor | None = None, noise: Tensor | None = None,
    first: int = 0, drawn: int | None = None,
) -> list[Payload]:  # fmt: skip
    """Of the frames of a run, in order.

    Args:
        batch: their conditioning.
        count: B.
        run: its number.
        mask: ComfyUI's, [b, 1 or C, H, W], which repeats, or None.
        noise: that they enter with, [B, C, H, W]; needed with a mask.
        first: number of the first.
        drawn: of the first, where they have entered with noise that was drawn for them in turn.
    """
    if mask is None:
        masks: list = [(None, None)] * count
    else:
        masks = [(mask[i % mask.shape[0]][None], noise[i : i + 1]) for i in range(count)]
    of = [None if drawn is None else drawn + i for i in range(count)]
    return [Payload(batch.frame(i), *masks[i], run, first + i, of[i]) for i in range(count)]
