"""The looks that the demo model can give a picture, as filters of real pictures.

Each look maps a Scene to (B, 3, H, W) in 0..1 and keeps the layout of the picture. They are what
the network is trained to do in one step; nothing here runs at inference. filters.py names the
papers of what they are made of.
"""

import functools

import torch

from . import filters
from .filters import blur, colour, fill, grey, mix, palette, saturate, smooth, steps


class Scene:
    """Pictures (B, 3, H, W) in 0..1, and what several looks want to know of them."""

    def __init__(self, x):
        self.x = x

    @functools.cached_property
    def exposed(self):
        return filters.expose(self.x)

    @functools.cached_property
    def flow(self):
        return filters.Flow(self.exposed)

    @functools.cached_property
    def tone(self):
        """Luminance, stretched."""
        return filters.stretch(grey(self.x))

    @functools.cached_property
    def flat(self):
        """The picture in flat regions."""
        return filters.kuwahara(self.exposed)

    @functools.cached_property
    def flat_tone(self):
        return filters.stretch(grey(self.flat))

    @functools.cached_property
    def lines(self):
        return filters.lines(self.exposed, self.flow)

    @functools.cached_property
    def bold(self):
        """Lines of a brush, twice as wide."""
        return filters.lines(self.exposed, self.flow, sigma=1.5)


def photo(s):
    """The picture itself."""
    return s.x


def ink(s):
    """Contours, two directions of hatching and black shadows on warm paper."""
    y = 0.5 * blur(s.tone, 1.2) + 0.5 * s.flat_tone
    light = fill((1.5 * (0.58 - y)).clamp(0, 0.85), filters.hatch(s.x))
    deep = fill((2.0 * (0.34 - y)).clamp(0, 0.85), filters.hatch(s.x, -1))
    black = smooth((0.17 - y) / 0.12 + 0.5)
    dark = torch.stack([0.85 * light, 0.85 * deep, s.lines, black]).amax(0)
    return mix(colour(s.x, 0.97, 0.945, 0.88), colour(s.x, 0.07, 0.06, 0.10), dark)


def neon(s):
    """Glowing tubes along the contours, cyan to pink, in a violet night."""
    tube = blur((1.25 * s.bold).clamp(0, 1), 0.7)
    warm = blur(s.exposed[:, :1] - s.exposed[:, 2:], 5) * 1.3 + 0.5 * (blur(s.tone, 6) - 0.5)
    tint = palette(0.5 + warm, [[0, 0.85, 1], [0.35, 0.35, 1], [0.9, 0.15, 1], [1, 0.15, 0.6]])
    night = s.flat * colour(s.x, 0.22, 0.14, 0.34) + colour(s.x, 0.02, 0.01, 0.07)
    glow = blur(torch.cat([tube, tube], 1), 3.0)[:, :1] * 0.7 + blur(tube, 9) * 0.55
    return (night * (1 - 0.5 * tube) + tint * (tube + glow) + 0.4 * tube * tube).clamp(0, 1)


def watercolor(s):
    """Washes of pigment with darker rims on paper.

    After Bousseau et al., "Interactive Watercolor Rendering" (NPAR 2006): edge darkening, and
    pigment density that turns into colour.
    """
    flat = 0.8 * s.flat + 0.2 * blur(s.exposed, 1.2)
    y = filters.stretch(grey(flat))
    hue = saturate((flat / (flat.amax(1, True) + 0.06)).clamp(0, 1), 1.6)
    density = (1 - (0.6 * steps(y, 5, 0.7) + 0.4 * y)).clamp(min=0) ** 1.15 * 0.86
    wash = 1 - density * (1 - 0.55 * hue) - 0.42 * (1 - hue) * (1 - density) * smooth(3 * (1 - y))
    wash = wash * (1 - 0.42 * smooth((0.45 - y) / 0.45))
    dx, dy = filters.slopes(blur(s.flat, 1.0))
    edge = (dx * dx + dy * dy).sum(1, True).sqrt()
    rim = (s.flow.along(edge, 3) * 4).clamp(0, 0.32) + 0.34 * s.lines
    wash = wash * (1 - rim * (1.05 - 0.5 * hue))
    grain = filters.paper(s.x)
    return ((1 - (1 - wash) * (1 + 0.035 * grain) - 0.008 * grain)
            * colour(s.x, 1, 0.99, 0.96)).clamp(0, 1)  # fmt: skip


_TILES = filters.Tiles()


def mosaic(s):
    """Irregular tiles in one vivid colour each, a glint on each, dark joints."""

    def map_(values):
        return filters.tiled(s.x, values[None])

    dx, dy, gap = map_(_TILES.dx), map_(_TILES.dy), map_(_TILES.gap)
    x = saturate((1.18 * (s.exposed - 0.5) + 0.52).clamp(0, 1), 1.55)
    tile = _TILES.average(x) * (1 + 0.1 * map_(_TILES.shade))
    tile = tile - 0.012 * (dx + dy) * (0.5 + tile)
    tile = tile * (1 + 0.22 * torch.exp(-((dx + 1.6) ** 2 + (dy + 1.6) ** 2) / 2.2))
    return mix(colour(x, 0.13, 0.11, 0.10), tile, smooth((gap - 0.25) / 0.9)).clamp(0, 1)


def thermal(s):
    """Luminance as a heat camera shows it: blue, cyan, green, yellow, red."""
    heat = 0.7 * blur(s.flat_tone, 1.2) + 0.3 * blur(s.tone, 1.0)
    cold = [[0.03, 0.02, 0.30], [0.05, 0.22, 0.80], [0.0, 0.68, 0.80], [0.45, 0.86, 0.25]]
    hot = [[0.98, 0.86, 0.05], [1.0, 0.45, 0.0], [0.82, 0.05, 0.05]]
    return palette(heat, [*cold, *hot]) * (1 - 0.25 * s.lines)


def blueprint(s):
    """White lines on blue paper with a grid, and hatched light places."""
    line = blur((1.1 * s.bold).clamp(0, 1), 0.5)
    light = 0.3 * fill((1.5 * (s.flat_tone - 0.6)).clamp(0, 0.7), filters.hatch(s.x))
    xs, ys = filters.places(s.x)
    grid = torch.where((xs % 32 < 1) | (ys % 32 < 1), 0.2, 0.0).to(s.x)
    grid = torch.where((xs % 8 < 1) | (ys % 8 < 1), grid.clamp(min=0.07), grid)
    blue = palette(s.flat_tone, [[0.02, 0.09, 0.34], [0.05, 0.19, 0.52], [0.1, 0.28, 0.64]])
    white = torch.stack([0.97 * line, light, grid.expand_as(line)]).amax(0)
    return mix(blue, colour(s.x, 0.93, 0.97, 1), white)


def poster(s):
    """Screen print in few inks: violet, red or blue, cream; halftone dots between them."""
    tone = steps(s.flat_tone, 4, 0.4)
    hue = saturate((s.flat / (s.flat.amax(1, True) + 0.10)).clamp(0, 1), 2.2)
    warm = s.flat[:, :1] - s.flat[:, 2:]
    duo = mix(colour(s.x, 0.1, 0.55, 0.95), colour(s.x, 1, 0.22, 0.32), smooth(0.5 + 2.0 * warm))
    hue = 0.55 * hue + 0.45 * duo
    value = palette(tone, [[0, 0, 0], [0.5, 0.5, 0.5], [0.92, 0.92, 0.92], [1, 1, 1]])[:, :1]
    dark = mix(colour(s.x, 0.13, 0.05, 0.30), hue, (2 * value).clamp(max=1))
    print_ = mix(dark, colour(s.x, 1, 0.96, 0.72), (2 * value - 1).clamp(min=0))
    radius = 2.6 * (1 - (s.flat_tone - 0.62).abs() / 0.22).clamp(0, 1)
    dot = (radius - filters.dots(s.x) + 0.5).clamp(0, 1) * smooth(radius / 0.6)
    print_ = mix(print_, 0.92 * hue, 0.85 * dot)
    return mix(print_, colour(s.x, 0.04, 0.02, 0.06), s.lines).clamp(0, 1)


def sunset(s):
    """Violet shadows and golden light with a soft glow."""
    y = (0.5 * s.tone + 0.4 * s.flat_tone + 0.15 * blur(s.tone, 6)).clamp(0, 1) ** 1.08
    light = palette(y, [[0.10, 0.03, 0.18], [0.42, 0.10, 0.26], [0.86, 0.33, 0.14],
                        [1, 0.66, 0.22], [1, 0.93, 0.68]])  # fmt: skip
    warm = saturate(0.5 * s.exposed + 0.5 * s.flat, 1.25) * colour(s.x, 1.12, 0.86, 0.55)
    bloom = 1.1 * blur((s.tone - 0.55).clamp(min=0), 8)
    return (mix(light, warm, 0.28) + bloom * colour(s.x, 0.75, 0.38, 0.08)).clamp(0, 1)


def oil(s):
    """Strokes of thick paint along the forms, lit from one side.

    After Kyprianidis and Kang, "Image and Video Abstraction by Coherence-Enhancing Filtering"
    (Eurographics 2011): flat regions smoothed along the flow; the relief is its texture.
    """
    paint = s.flow.along(s.flat, 3)
    paint = saturate((1.08 * (paint - 0.5) + 0.48).clamp(0, 1), 1.45)
    relief = s.flow.along(s.tone - blur(s.tone, 2.2), 5)
    dx, dy = filters.slopes(blur(grey(paint), 0.8) + 1.1 * relief)
    return (paint * (1 + 2.0 * relief) + 1.0 * (dx + dy)).clamp(0, 1)


def pencil(s):
    """Graphite: dodged tones, soft hatching and contours on white paper."""
    y = 0.6 * s.tone + 0.4 * s.flat_tone
    dodge = (y / (1.02 - blur(1 - y, 7))).clamp(0, 1) ** 1.3
    shade = 1 - 0.55 * (0.72 - blur(y, 1)).clamp(0, 0.72) / 0.72
    light = fill((2.0 * (0.62 - y)).clamp(0, 1), filters.hatch(s.x) + 0.1, 0.5)
    deep = fill((2.5 * (0.32 - y)).clamp(0, 1), filters.hatch(s.x, -1) + 0.1, 0.5)
    grain = filters.paper(s.x)
    white = 1 - (1 - dodge * shade) * (1 + 0.05 * grain) - 0.26 * light - 0.22 * deep
    white = (white - 0.75 * s.lines * (1 + 0.04 * grain)).clamp(0.1, 0.97)
    return mix(colour(s.x, 0.13, 0.13, 0.16), colour(s.x, 0.985, 0.98, 0.965), white)


def comic(s):
    """Cel shading in few vivid tones, black shadows, bold outlines."""
    y = s.flat_tone
    cel = s.flat * ((steps(y, 4, 0.35) + 0.10) / (y + 0.10))
    cel = saturate((1.1 * cel + 0.04).clamp(0, 1), 1.9)
    black = torch.maximum(smooth(1.2 * s.bold), smooth((0.12 - y) / 0.1 + 0.5))
    return (cel * (1 - black)).clamp(0, 1)


LOOKS = {
    "photo": photo, "ink": ink, "neon": neon, "watercolor": watercolor, "mosaic": mosaic,
    "thermal": thermal, "blueprint": blueprint, "poster": poster, "sunset": sunset, "oil": oil,
    "pencil": pencil, "comic": comic,
}  # fmt: skip


def every(x):
    """All looks of pictures (B, 3, H, W) in 0..1, in the order of LOOKS: (B, 12, 3, H, W)."""
    scene = Scene(x)
    return torch.stack([look(scene) for look in LOOKS.values()], 1)
