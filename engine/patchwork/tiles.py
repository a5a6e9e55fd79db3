"""Where the tokens of changed tiles lie, at each scale of a network.

Tokens of tiles stand one after the other, [N, C], N tiles of side * side tokens each, tiles ordered
by row. What a 3 x 3 convolution reads is kept with a rim of zeros, [P, h + 2, w + 2, C], so that a
tile with its halo never leaves it.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


class Tiles:
    """The changed tiles of some rows at one scale.

    Args:
        mask: bool [R, h / side, w / side]. To read it waits for the device.
        at: where each row's things are kept, int64 [R].
        side: tokens along a tile.

    Attributes:
        place: of each tile's row among what is kept, int64 [M].
        counts: tokens of each row.
    """

    def __init__(self, mask: Tensor, at: Tensor, side: int):
        self.side, self.height, self.width = side, mask.shape[1] * side, mask.shape[2] * side
        self._mask, self.at = mask, at
        self.row, self._ty, self._tx = mask.nonzero(as_tuple=True)
        self.place = at.index_select(0, self.row)
        tiles = torch.bincount(self.row, minlength=mask.shape[0]).tolist()
        self.counts = [count * side**2 for count in tiles]
        self.count = len(self.row)

    def coarser(self) -> "Tiles":
        """The same of pictures of half the height and width; at a token per tile, of all tiles
        that hold a changed one."""
        if self.side > 1:
            return Tiles(self._mask, self.at, self.side // 2)
        return Tiles(F.max_pool2d(self._mask.float(), 2) > 0, self.at, 1)

    @functools.cached_property
    def _steps(self) -> Tensor:
        return torch.arange(self.side, device=self.row.device)

    @functools.cached_property
    def y(self) -> Tensor:
        """Of each token, [M, side, 1]."""
        return (self._ty[:, None] * self.side + self._steps)[:, :, None]

    @functools.cached_property
    def x(self) -> Tensor:
        """Of each token, [M, 1, side]."""
        return (self._tx[:, None] * self.side + self._steps)[:, None]

    @functools.cached_property
    def tokens(self) -> Tensor:
        """Of [P * h * w, C], int64 [N]."""
        return self._index(self.place)

    @functools.cached_property
    def inputs(self) -> Tensor:
        """Of [R * h * w, C], int64 [N]."""
        return self._index(self.row)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Of [h * w, C], int64 [N]."""
        return self._index(torch.zeros_like(self.row))

    def _index(self, of: Tensor) -> Tensor:
        return ((of[:, None, None] * self.height + self.y) * self.width + self.x).flatten()

    @functools.cached_property
    def padded(self) -> Tensor:
        """Of [P * (h + 2) * (w + 2), C], int64 [N]."""
        down = self.place[:, None, None] * (self.height + 2) + self.y + 1
        return (down * (self.width + 2) + self.x + 1).flatten()

    @functools.cached_property
    def halo(self) -> Tensor:
        """The same of tiles with what is around them, int64 [M * (side + 2) ** 2]."""
        return self._windows(self, self.side + 2, 1)

    @functools.cached_property
    def halving(self) -> Tensor:
        """The same of what a convolution of stride 2 reads for the tiles of `coarse`, int64
        [M' * (2 * coarse.side + 1) ** 2]."""
        return self._windows(self.coarse, 2 * self.coarse.side + 1, 2)

    @functools.cached_property
    def coarse(self) -> "Tiles":
        """`coarser`, made once."""
        return self.coarser()

    def _windows(self, of: "Tiles", size: int, stride: int) -> Tensor:
        """Windows of `size` that begin a token above and left of tiles of another scale."""
        steps = torch.arange(size, device=self.row.device)
        y = (of._ty[:, None] * (of.side * stride) + steps)[:, :, None]
        x = (of._tx[:, None] * (of.side * stride) + steps)[:, None]
        return ((of.place[:, None, None] * (self.height + 2) + y) * (self.width + 2) + x).flatten()

    @functools.cached_property
    def parents(self) -> Tensor:
        """For each token, which of `coarse`'s tokens holds it, int64 [N]."""
        rows, coarse = len(self.counts), self.coarse
        where = coarse.inputs.new_zeros(rows * coarse.height * coarse.width)
        where[coarse.inputs] = torch.arange(len(coarse.inputs), device=where.device)
        down = self.row[:, None, None] * coarse.height + self.y // 2
        return where[(down * coarse.width + self.x // 2).flatten()]
