"""How alike two pictures are, in one pass and without waiting for the device."""

import torch
from torch import Tensor

from .choice import INDEX, op


def _unfit(a, b) -> str:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        return f"the kernel takes uint8, not {a.dtype} and {b.dtype}"
    if a.shape != b.shape or a.numel() == 0:
        return "the pictures are empty or of different shapes"
    if not (a.is_contiguous() and b.is_contiguous()):
        return "a picture is not contiguous"
    if a.numel() >= INDEX:
        return "the pictures are too large"
    return ""


@op("triton_compare", unfit=_unfit)
def likeness(a: Tensor, b: Tensor) -> Tensor:
    """Cosine, correlation and means of two pictures, exact to the rounding of float32.

    Args:
        a, b: uint8 of the same shape, such as [H, W, 3]; not empty.

    Returns:
        float32 [4] on the device of the pictures:
        the cosine of the whole pictures, their levels taken as -1..1, which is StreamDiffusion's
        measure (arXiv 2312.12491) and `cosine` in engine/similarity.py;
        the correlation, -1..1: the cosine of the pictures less their mean, which knows nothing of
        brightness and contrast; of pictures of one level each 1, of one such picture 0;
        the mean of a and of b, 0..1.

    Raises:
        ValueError: other types, different shapes, no pixel.
    """
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape or a.numel() == 0:
        raise ValueError(
            f"a, b: expected two uint8 pictures of one shape, got {a.dtype} {tuple(a.shape)} "
            f"and {b.dtype} {tuple(b.shape)}"
        )
    a, b = a.flatten().double(), b.flatten().double()
    # doubled and less 255 the levels stay whole numbers, and every sum is exact
    x, y = 2 * a - 255, 2 * b - 255
    cosine = (x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt())
    x, y = a - a.mean(), b - b.mean()
    xx, yy = (x * x).sum(), (y * y).sum()
    correlation = torch.where(
        (xx > 0) & (yy > 0), (x * y).sum() / (xx.sqrt() * yy.sqrt()), (xx == yy).double()
    )
    return torch.stack([cosine, correlation, a.mean() / 255, b.mean() / 255]).float()
