"""Filters that the looks are made of, on pictures (B, C, H, W) in 0..1, on any device.

Published ones name their paper. All fixed patterns repeat every 32 pixels, so that the network can
learn where they are; sizes are therefore multiples of 32.
"""

import functools
import math

import torch
import torch.nn.functional as F

PERIOD = 32
GREY = (0.299, 0.587, 0.114)


@functools.lru_cache(maxsize=256)
def _blur_matrix(size, sigma, device):
    """Matrix (size, size) that blurs a row with a Gaussian, reflected at the borders."""
    radius = min(size - 1, max(1, math.ceil(3 * sigma)))
    t = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (t / sigma) ** 2)
    unit = F.pad(torch.eye(size)[None], (radius, radius), mode="reflect")
    return F.conv1d(unit[0][:, None], (kernel / kernel.sum()).view(1, 1, -1))[:, 0].to(device)


def blur(x, sigma):
    """Gaussian blur; as two matrix products, the fastest way on a CPU."""
    rows = _blur_matrix(x.shape[2], sigma, x.device).T
    return rows @ (x @ _blur_matrix(x.shape[3], sigma, x.device))


def grey(x):
    """Luminance (B, 1, H, W)."""
    return (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def smooth(t):
    """Smooth step over 0..1."""
    t = t.clamp(0, 1)
    return t * t * (3 - 2 * t)


def mix(a, b, t):
    """a where t is 0, b where it is 1."""
    return a + (b - a) * t


def colour(x, *rgb):
    """One colour (1, 3, 1, 1) beside x."""
    return x.new_tensor(rgb).view(1, 3, 1, 1)


def saturate(x, amount):
    """Scale the distance from grey."""
    y = grey(x)
    return (y + (x - y) * amount).clamp(0, 1)


def quantile(y, q):
    """A quantile (B, 1, 1, 1) of each picture, at a quarter of the size, for speed and calm."""
    return torch.quantile(F.avg_pool2d(y, 4).flatten(1), q, dim=1).view(-1, 1, 1, 1)


def stretch(y, low=0.01, high=0.99, span=0.35):
    """Luminance stretched so that its low and high quantiles become 0 and 1, at most 1 / span."""
    a, b = quantile(y, low), quantile(y, high)
    width = (b - a).clamp(min=span)
    start = ((a + b) / 2 - width / 2).clamp(min=0)
    return ((y - torch.minimum(start, (1 - width).clamp(min=0))) / width).clamp(0, 1)


def expose(x):
    """The picture as a camera with good exposure saw it: most of a stretch, colours kept."""
    y = grey(x)
    return mix(x, (x * ((stretch(y) + 0.02) / (y + 0.02))).clamp(0, 1), 0.6)


def palette(y, stops):
    """Colour a map (B, 1, H, W) in 0..1 through equally spaced colours."""
    stops = y.new_tensor(stops)
    at = y[:, 0].clamp(0, 1) * (len(stops) - 1)
    index = at.floor().long().clamp(max=len(stops) - 2)
    t = (at - index).unsqueeze(-1)
    return (stops[index] * (1 - t) + stops[index + 1] * t).movedim(-1, 1)


def steps(y, count, soft):
    """Quantise 0..1 to `count` values; `soft` is how much of a step the passage takes."""
    t = y * (count - 1)
    whole = t.floor()
    return (whole + smooth((t - whole - 0.5) / soft + 0.5)) / (count - 1)


def slopes(x):
    """Derivatives along x and y by Scharr's kernel, each like x."""
    kernel = x.new_tensor([[3, 0, -3], [10, 0, -10], [3, 0, -3]]) / 32
    padded = F.pad(x.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    d = F.conv2d(padded, torch.stack([-kernel, -kernel.T])[:, None])
    return d[:, 0].view(x.shape), d[:, 1].view(x.shape)


class Flow:
    """The direction of edges at each place, and averages along it.

    Kang, Lee, Chui, "Coherent Line Drawing" (NPAR 2007), and Kyprianidis and Doellner, "Image
    Abstraction by Structure Adaptive Filtering" (TPCG 2008), whose smoothed structure tensor
    gives the direction.

    Args:
        x: pictures (B, 3, H, W).
        sigma: smoothing of the structure tensor, in pixels.
        reach: longest average, in pixels to either side.
    """

    def __init__(self, x, sigma=2.2, reach=5):
        dx, dy = slopes(blur(x, 0.8))
        tensor = torch.cat([(dx * dx).sum(1, True), (dx * dy).sum(1, True),
                            (dy * dy).sum(1, True)], 1)  # fmt: skip
        e, f, g = blur(tensor, sigma).split(1, 1)
        angle = 0.5 * torch.atan2(2 * f, e - g) + math.pi / 2
        tangent = torch.cat([angle.cos(), angle.sin()], 1)
        h, w = x.shape[2:]
        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        self._scale = x.new_tensor([2 / w, 2 / h])
        start = torch.stack([xs, ys], -1).to(x) + 0.5
        self._places = []
        for sign in (1, -1):
            place, heading = start.expand(len(x), -1, -1, -1), sign * tangent
            for _ in range(reach):
                place = place + heading.movedim(1, -1)
                self._places.append(place * self._scale - 1)
                turn = self._look(tangent, self._places[-1])
                # a tangent has no sign of its own: go on as before
                heading = torch.where((turn * heading).sum(1, True) < 0, -turn, turn)
        self._reach = reach

    @staticmethod
    def _look(v, grid):
        return F.grid_sample(v, grid, padding_mode="reflection", align_corners=False)

    def along(self, v, reach):
        """Average of v (B, C, H, W) over `reach` pixels to both sides along the edge."""
        total = v.clone()
        for side in (0, self._reach):
            for grid in self._places[side : side + reach]:
                total += self._look(v, grid)
        return total / (2 * reach + 1)


def lines(x, flow, sigma=1.0, low=0.3, width=0.75):
    """Ink of drawn contours (B, 1, H, W) in 0..1.

    Flow-guided difference of Gaussians (Kang et al. 2007; Winnemoeller, Kyprianidis, Olsen, "XDoG",
    C&G 2012), of luminance and of the colour differences, measured by the picture's own contrast.
    """
    y = (0.9 * stretch(grey(x)) + 0.05).sqrt()
    channels = torch.cat([y, x[:, :1] - x[:, 1:2], x[:, 2:] - x[:, 1:2]], 1)
    d = flow.along(blur(channels, sigma) - blur(channels, 1.6 * sigma), 4)
    dark, hue = d[:, :1], d[:, 1:].abs().sum(1, True)
    # flat pictures have no lines: below this contrast is noise
    strong = quantile_of(dark.abs(), 0.92).clamp(min=0.02)
    return smooth((-dark / strong - low + 0.35 * hue / strong * (dark < 0)) / width)


def quantile_of(y, q):
    """A quantile (B, 1, 1, 1) of every second pixel: for lines, which a mean would thin out."""
    return torch.quantile(y[..., ::2, ::2].flatten(1), q, dim=1).view(-1, 1, 1, 1)


@functools.lru_cache(maxsize=4)
def _sectors(radius, device):
    t = torch.arange(-radius, radius + 1, dtype=torch.float32)
    y, x = torch.meshgrid(t, t, indexing="ij")
    angle, distance = torch.atan2(y, x), torch.hypot(x, y)
    kernels = []
    for i in range(8):
        off = ((angle - i * math.pi / 4 + math.pi) % (2 * math.pi) - math.pi).abs()
        weight = torch.exp(-0.5 * (distance / (0.43 * radius)) ** 2)
        weight = weight * (1.25 - off / (math.pi / 4)).clamp(0, 1)
        weight[radius, radius] = 0.25
        kernels.append(weight / weight.sum())
    return torch.stack(kernels)[:, None].to(device)


def kuwahara(x, radius=4, sharpness=6.0):
    """Flat regions with kept borders: the mean of the calmest of eight sectors.

    Papari, Petkov, Campisi, "Artistic Edge and Corner Enhancing Smoothing" (IEEE TIP 2007).
    """
    b, c, h, w = x.shape
    planes = torch.cat([x, x * x], 1).flatten(0, 1)[:, None]
    planes = F.pad(planes, (radius,) * 4, mode="reflect")
    means = F.conv2d(planes, _sectors(radius, x.device)).view(b, 2, c, 8, h, w)
    mean, square = means[:, 0], means[:, 1]
    spread = (square - mean * mean).sum(1, True).clamp(min=0)
    weight = (2e-4 + spread) ** (-sharpness / 4)
    return (mean * weight).sum(2) / weight.sum(2)


def places(x):
    """Pixel coordinates (1, 1, H, W) along x and y."""
    h, w = x.shape[2:]
    ys, xs = torch.meshgrid(
        torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij"
    )
    return xs[None, None].to(x.dtype), ys[None, None].to(x.dtype)


def hatch(x, sign=1, period=8):
    """Distance 0..1 from the middle of 45 degree lines."""
    xs, ys = places(x)
    return (((xs + sign * ys) / period) % 1 - 0.5).abs() * 2


def fill(amount, pattern, soft=0.3):
    """Where a pattern of distances is inked when `amount` (0..1) of it shall be."""
    return ((amount - pattern - 0.15) / soft + 0.5).clamp(0, 1)


def dots(x, period=8):
    """Distance in pixels to the nearest dot of a halftone screen at 45 degrees."""
    xs, ys = places(x)
    half = period / 2

    def near(dx, dy):
        u = (xs + dx) % period - half
        v = (ys + dy) % period - half
        return torch.hypot(u, v)

    return torch.minimum(near(0.5, 0.5), near(half + 0.5, half + 0.5))


def tiled(x, pattern):
    """A pattern (C, 32, 32) repeated to the size of x: (1, C, H, W)."""
    h, w = x.shape[2:]
    return pattern.to(x).repeat(1, -(-h // PERIOD), -(-w // PERIOD))[None, ..., :h, :w]


@functools.lru_cache(maxsize=1)
def _paper():
    noise = torch.randn(1, 1, PERIOD, PERIOD, generator=torch.Generator().manual_seed(3))
    grain = sum(w * blur(noise.repeat(1, 1, 3, 3), s) for w, s in ((0.9, 0.9), (0.6, 1.8)))[0]
    grain = grain[:, PERIOD : 2 * PERIOD, PERIOD : 2 * PERIOD]
    return (grain - grain.mean()) / grain.std()


def paper(x):
    """Grain of paper (1, 1, H, W), mean 0, deviation 1."""
    return tiled(x, _paper())


class Tiles:
    """Irregular tiles (Voronoi cells), 16 in each 32 x 32 pixels.

    Attributes, each (32, 32) of one period: which: index 0..15 of the tile; row, column: periods
    that its middle lies away; gap: pixels to the joint; dx, dy: pixels from its middle; shade:
    -1..1.
    """

    def __init__(self, count=4, jitter=0.36, seed=5):
        draw = torch.rand(count, count, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        j, i = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
        size = PERIOD / count
        cx = ((i + 0.5 + jitter * draw[..., 0] + 0.5 * (j % 2) - 0.25) * size).flatten()
        cy = ((j + 0.5 + jitter * draw[..., 1]) * size).flatten()
        away = torch.tensor([(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)])
        x = (cx[None] + PERIOD * away[:, 1:]).flatten()
        y = (cy[None] + PERIOD * away[:, :1]).flatten()
        t = torch.arange(PERIOD) + 0.5
        distance = torch.hypot(t[None, :, None] - x, t[:, None, None] - y)
        (d1, d2), (a, b) = (v.unbind(-1) for v in distance.topk(2, largest=False))
        self.gap = (d2**2 - d1**2) / (2 * torch.hypot(x[a] - x[b], y[a] - y[b]))
        self.which, (self.row, self.column) = a % len(cx), away[a // len(cx)].unbind(-1)
        self.dx, self.dy = t[None, :] - x[a], t[:, None] - y[a]
        self.shade = draw[..., 2].flatten()[self.which]

    def average(self, x):
        """The mean colour of each tile of x, at each pixel."""
        b, c, h, w = x.shape
        rows, columns = h // PERIOD, w // PERIOD
        period = torch.stack([self.which, self.row, self.column])
        which, row, column = period.repeat(1, rows, columns).to(x.device)
        row = row + torch.arange(h, device=x.device)[:, None] // PERIOD + 1
        column = column + torch.arange(w, device=x.device)[None] // PERIOD + 1
        cell = ((row * (columns + 2) + column) * (int(self.which.max()) + 1) + which).flatten()
        count = int(cell.max()) + 1
        total = x.new_zeros(b, c, count).index_add_(2, cell, x.flatten(2))
        share = x.new_zeros(count).index_add_(0, cell, torch.ones_like(cell, dtype=x.dtype))
        return (total / share.clamp(min=1))[..., cell].view(x.shape)
