"""The looks the demo model can give a picture, as plain image functions, and their prompts.

Each look maps (B, 3, H, W) in 0..1 to the same shape and range, keeps the layout of the picture and
has no parameters. They are the training targets; nothing here runs at inference.
"""

import functools
import math

import torch
import torch.nn.functional as F

GREY = (0.299, 0.587, 0.114)


@functools.lru_cache(maxsize=64)
def blur_matrix(size, sigma, device):
    """Matrix (size, size) that blurs a row with a Gaussian, reflected at the borders."""
    radius = max(1, math.ceil(2.5 * sigma))
    t = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (t / sigma) ** 2)
    unit = F.pad(torch.eye(size)[None], (radius, radius), mode="reflect")
    return F.conv1d(unit[0][:, None], (kernel / kernel.sum()).view(1, 1, -1))[:, 0].to(device)


def blur(x, sigma):
    """Gaussian blur with reflected borders; as two matrix products, the fastest way on a CPU."""
    rows = blur_matrix(x.shape[2], sigma, x.device).T
    columns = blur_matrix(x.shape[3], sigma, x.device)
    return rows @ (x @ columns)


def grey(x):
    """Luminance (B, 1, H, W)."""
    return (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def levels(y):
    """Stretch the luminance of each picture so that its 2 % and 98 % points become 0 and 1."""
    small = F.avg_pool2d(y, 4).flatten(1)
    low, high = torch.quantile(small, torch.tensor([0.02, 0.98], device=y.device), dim=1)
    span = (high - low).clamp(min=0.2)
    return ((y - low.view(-1, 1, 1, 1)) / span.view(-1, 1, 1, 1)).clamp(0, 1)


def edges(x, sigma=1.0):
    """Strength of the colour edges (B, 1, H, W), about 0..1, normalised per picture."""
    x = blur(x, sigma)
    dx = F.pad(x[..., 2:] - x[..., :-2], (1, 1, 0, 0))
    dy = F.pad(x[..., 2:, :] - x[..., :-2, :], (0, 0, 1, 1))
    strength = (dx.square() + dy.square()).amax(1, keepdim=True).sqrt()
    top = torch.quantile(F.max_pool2d(strength, 4).flatten(1), 0.9, dim=1)
    return strength / top.clamp(min=0.08).view(-1, 1, 1, 1)


def lines(x, sigma=1.0, low=0.25, high=0.6):
    """Drawn lines: edges pushed towards 0 and 1."""
    t = ((edges(x, sigma) - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def palette(y, stops):
    """Colour a map (B, 1, H, W) in 0..1 through equally spaced colours."""
    stops = y.new_tensor(stops)
    at = y[:, 0].clamp(0, 1) * (len(stops) - 1)
    index = at.floor().long().clamp(max=len(stops) - 2)
    t = (at - index).unsqueeze(-1)
    return (stops[index] * (1 - t) + stops[index + 1] * t).movedim(-1, 1)


def saturate(x, amount):
    """Scale the distance from grey."""
    y = grey(x)
    return (y + (x - y) * amount).clamp(0, 1)


def flatten(x, steps=2, contrast=10.0):
    """Smooth inside regions and keep their borders (a cheap bilateral filter, at half size)."""
    size = x.shape[2:]
    x = F.avg_pool2d(x, 2)
    for _ in range(steps):
        total, weight = x.clone(), torch.ones_like(x[:, :1])
        for dy, dx in ((0, 2), (2, 0), (0, -2), (-2, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            other = torch.roll(x, (dy, dx), (2, 3))
            alike = torch.exp(-contrast * (other - x).square().sum(1, keepdim=True))
            total, weight = total + alike * other, weight + alike
        x = total / weight
    return F.interpolate(x, size=size, mode="bilinear")


def grid(x, period, width=1):
    """Mask (1, 1, H, W) of grid lines every `period` pixels."""
    rows = (torch.arange(x.shape[2], device=x.device) % period) < width
    columns = (torch.arange(x.shape[3], device=x.device) % period) < width
    return (rows[:, None] | columns[None]).to(x.dtype)[None, None]


def photo(x):
    """The picture itself."""
    return x


def ink(x):
    """Dark lines and flat shadows on warm paper."""
    y = levels(grey(x))
    shadow = ((0.3 - blur(y, 1.5)) / 0.12).clamp(0, 1)
    half = ((0.55 - blur(y, 1.5)) / 0.1).clamp(0, 1) * 0.22
    dark = torch.maximum(torch.maximum(lines(x), 0.85 * shadow), half)
    paper, black = x.new_tensor([0.97, 0.94, 0.86]), x.new_tensor([0.08, 0.07, 0.1])
    return paper.view(1, 3, 1, 1) * (1 - dark) + black.view(1, 3, 1, 1) * dark


def neon(x):
    """Glowing edges, cyan to magenta, on a dark night."""
    edge = lines(x, 1.2, 0.2, 0.7)
    warm = blur(x[:, :1] - x[:, 2:] + 0.6 * (grey(x) - 0.5), 6)
    tint = palette((0.5 + 1.6 * warm).clamp(0, 1), [[0, 0.9, 1], [0.55, 0.2, 1], [1, 0.1, 0.75]])
    glow = tint * (edge + 1.3 * blur(edge, 4)) + 0.45 * edge * edge
    base = x.new_tensor([0.05, 0.02, 0.13]).view(1, 3, 1, 1)
    return (base + 0.1 * tint * blur(grey(x), 2) + glow).clamp(0, 1)


def watercolor(x):
    """Pale flat washes with darker rims on paper."""
    wash = flatten(x, 3)
    wash = saturate(0.46 + 0.54 * wash, 2.0)
    rim = lines(x, 1.3, 0.3, 1.1) * 0.4
    paper = x.new_tensor([1.0, 0.99, 0.95]).view(1, 3, 1, 1)
    return (wash * (1 - rim * (1 - 0.5 * wash)) * paper).clamp(0, 1)


def mosaic(x):
    """Tiles of 8 pixels in one vivid colour each, with dark joints."""
    tiles = F.interpolate(F.avg_pool2d(x, 8), scale_factor=8.0, mode="nearest")
    tiles = saturate((tiles - 0.5) * 1.15 + 0.52, 1.6)
    return tiles * (1 - 0.75 * grid(x, 8, 2))


def thermal(x):
    """Luminance as a heat camera shows it: blue, green, yellow, red."""
    heat = levels(blur(grey(x), 1.5))
    cold = [[0.03, 0, 0.4], [0, 0.25, 1], [0, 0.85, 0.6]]
    return palette(heat, [*cold, [0.85, 0.95, 0], [1, 0.35, 0], [0.7, 0, 0]])


def blueprint(x):
    """White lines on blue paper with a faint grid."""
    line = torch.maximum(lines(x, 0.9), 0.16 * grid(x, 32))
    blue = palette(levels(blur(grey(x), 2)), [[0.02, 0.1, 0.38], [0.09, 0.27, 0.62]])
    return blue * (1 - line) + x.new_tensor([0.92, 0.96, 1]).view(1, 3, 1, 1) * line


def poster(x):
    """Four levels per channel, very saturated, black outlines."""
    flat = saturate(flatten(x, 2), 2.6)
    y = levels(grey(x))
    flat = (flat + 0.5 * (y - grey(x))).clamp(0, 1)
    steps = flat * 3
    soft = steps.floor() + ((steps - steps.floor() - 0.5) * 6 + 0.5).clamp(0, 1)
    return (soft / 3) * (1 - lines(x, 1.2, 0.45, 0.8))


def sunset(x):
    """Two tones, violet shadows and golden light, with a soft glow."""
    y = levels(grey(x))
    y = (0.75 * y + 0.3 * blur(y, 5)).clamp(0, 1)
    return palette(y, [[0.15, 0.03, 0.22], [0.62, 0.14, 0.25], [0.98, 0.52, 0.1], [1, 0.9, 0.55]])


LOOKS = {
    "photo": photo, "ink": ink, "neon": neon, "watercolor": watercolor, "mosaic": mosaic,
    "thermal": thermal, "blueprint": blueprint, "poster": poster, "sunset": sunset,
}  # fmt: skip

NAMES = {
    "photo": ["photo", "photograph", "realistic photo", "plain picture", "real footage", "natural"],
    "ink": ["ink drawing", "ink", "black and white drawing", "pen and ink", "comic ink", "sketch",
            "line art", "manga"],
    "neon": ["neon night", "neon", "glowing neon lights", "cyberpunk", "neon glow", "synthwave"],
    "watercolor": ["watercolor", "watercolour", "watercolor painting", "pastel painting",
                   "soft pastel", "aquarelle"],
    "mosaic": ["mosaic", "mosaic tiles", "tiles", "pixel art", "roman mosaic", "pixels"],
    "thermal": ["thermal camera", "thermal", "heat map", "infrared camera", "thermal vision",
                "infrared"],
    "blueprint": ["blueprint", "technical blueprint", "blue print", "white lines on blue",
                  "architect plan", "technical drawing"],
    "poster": ["pop art poster", "pop art", "poster", "comic poster", "screen print", "bold colors",
               "cartoon"],
    "sunset": ["golden sunset", "sunset", "golden hour", "warm evening light", "sepia gold",
               "golden light"],
}  # fmt: skip

SUBJECTS = {
    "landscape": ["a landscape", "mountains", "hills and trees", "a house in the hills", "nature"],
    "city": ["a city", "a street", "buildings", "skyline", "houses"],
    "portrait": ["a portrait", "a face", "a person", "a woman", "a man", "people"],
    "people": ["people", "a person walking", "a dancer", "a crowd", "a man", "a woman"],
    "animal": ["an animal", "a cat", "a dog", "a bird", "a horse"],
    "objects": ["a still life", "balls and boxes", "things on a table", "a cup", "a car"],
    "room": ["a room", "an interior", "a wall"],
    "pattern": ["a pattern", "an abstract texture", "letters", "shapes"],
}

TEMPLATES = [
    "{look}", "{look}", "{look} style", "{subject}, {look}", "{look} of {subject}",
    "{look}, {subject}", "{subject} in {look} style", "{subject} as {look}", "a {look}",
    "in the style of {look}", "{look}, detailed", "a {look} of {subject}",
    "{look}, beautiful, high quality", "turn it into {look}",
]  # fmt: skip


def prompt(look, kind, rng):
    """A random prompt (str) for a look (key of LOOKS) and a scene kind (key of SUBJECTS)."""
    return str(rng.choice(TEMPLATES)).format(
        look=rng.choice(NAMES[look]), subject=rng.choice(SUBJECTS[kind])
    )


def all_prompts():
    """Every prompt that `prompt` can give; its words are the vocabulary of the text encoder."""
    subjects = sorted({s for group in SUBJECTS.values() for s in group})
    looks = [name for group in NAMES.values() for name in group]
    return [t.format(look=n, subject=subjects[0]) for t in TEMPLATES for n in looks] + [
        f"{looks[0]}, {s}" for s in subjects
    ]
