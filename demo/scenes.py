"""Pictures for training: landscapes, cities, portraits, animals, objects, rooms, patterns.

Everything is drawn from a numpy Generator, so a seed names a picture. Nothing is downloaded.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 256
GLYPHS = "ABCDEFGHKLMNPRSTWXYZ0123456789?!&@#"


def field(rng, size=SIZE, octaves=5, roughness=0.55, first=2):
    """Smooth random field (size, size) float32, mean 0 and deviation about 1 (fractal noise)."""
    total = np.zeros((size, size), np.float32)
    amplitude = 1.0
    for octave in range(octaves):
        n = min(first * 2**octave + 2, size)
        grid = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
        total += amplitude * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        amplitude *= roughness
    return (total - total.mean()) / (total.std() + 1e-6)


def colour(rng, saturation=None, value=None):
    """Random colour (3,) in 0..1 from hue, saturation, value."""
    h = rng.random() * 6
    s = rng.beta(1.6, 1.8) if saturation is None else saturation
    v = 0.1 + 0.9 * rng.beta(1.6, 1.3) if value is None else value
    offsets = np.array([5.0, 3.0, 1.0])
    k = (offsets + h) % 6
    return (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def near(rng, base, amount=0.12):
    """A colour close to another."""
    return np.clip(base + rng.normal(0, amount, 3), 0, 1).astype(np.float32)


class Canvas:
    """Float picture (256, 256, 3) in 0..1 that textured, shaded shapes are painted on.

    Coordinates of shapes are fractions of the picture, x to the right and y down.
    """

    def __init__(self, rng):
        self.rng = rng
        self.pixels = np.zeros((SIZE, SIZE, 3), np.float32)
        axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
        self.x, self.y = np.meshgrid(axis, axis)

    def gradient(self, top, bottom, angle=0.0):
        """Fill with a gradient; angle 0 runs from top to bottom."""
        t = (self.y - 0.5) * math.cos(angle) + (self.x - 0.5) * math.sin(angle) + 0.5
        t = np.clip(t, 0, 1)[..., None]
        self.pixels = top * (1 - t) + bottom * t

    def blend(self, mask, paint):
        """Put paint (colour or picture) where mask (256, 256) in 0..1 says."""
        mask = mask[..., None]
        self.pixels = self.pixels * (1 - mask) + paint * mask

    def textured(self, base, grain=0.08, shade=0.25):
        """Picture of a surface: colour with grain and a light falling from some side."""
        rng = self.rng
        light = 1.0 + grain * field(rng, octaves=4, first=int(rng.integers(4, 24)))
        angle = rng.random() * 2 * math.pi
        light += shade * ((self.x - 0.5) * math.cos(angle) + (self.y - 0.5) * math.sin(angle))
        return np.clip(base * light[..., None], 0, 1)

    def shape(self, kind, points, base, grain=0.08, shade=0.25, soft=0.0):
        """Draw a polygon, ellipse or rectangle, smooth-edged and textured."""
        mask = self.mask(kind, points, soft)
        self.blend(mask, self.textured(base, grain, shade) if grain or shade else base)
        return mask

    def mask(self, kind, points, soft=0.0):
        """Coverage (256, 256) of a shape; drawn at twice the size for smooth edges."""
        picture = Image.new("L", (2 * SIZE, 2 * SIZE))
        xy = [(float(x) * 2 * SIZE, float(y) * 2 * SIZE) for x, y in points]
        draw = ImageDraw.Draw(picture)
        if kind == "polygon":
            draw.polygon(xy, fill=255)
        else:
            (x0, y0), (x1, y1) = xy
            box = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
            (draw.ellipse if kind == "ellipse" else draw.rectangle)(box, fill=255)
        picture = picture.reduce(2)
        if soft:
            picture = picture.filter(ImageFilter.GaussianBlur(soft))
        return np.asarray(picture, np.float32) / 255

    def ball(self, cx, cy, r, base):
        """A lit sphere."""
        mask = self.mask("ellipse", [(cx - r, cy - r), (cx + r, cy + r)])
        dx, dy = (self.x - cx) / r, (self.y - cy) / r
        height = np.sqrt(np.clip(1 - dx * dx - dy * dy, 0, 1))
        angle = self.rng.random() * 2 * math.pi
        lit = 0.5 * (dx * math.cos(angle) + dy * math.sin(angle)) + 0.7 * height
        picture = np.clip(base * (0.25 + lit)[..., None], 0, 1)
        shine = np.clip(lit - 0.78, 0, 1)[..., None] * self.rng.uniform(0, 3)
        self.blend(mask, np.clip(picture + shine, 0, 1))

    def limb(self, a, b, width, base):
        """A thick line: arms, legs, trunks, lamp posts."""
        ax, ay, bx, by = *a, *b
        length = math.hypot(bx - ax, by - ay) + 1e-6
        nx, ny = -(by - ay) / length * width / 2, (bx - ax) / length * width / 2
        corners = [(ax + nx, ay + ny), (bx + nx, by + ny), (bx - nx, by - ny), (ax - nx, ay - ny)]
        self.shape("polygon", corners, base, 0.04, 0.1)

    def ellipse(self, cx, cy, rx, ry, base, grain=0.05, shade=0.3, soft=0.0):
        """A textured ellipse around a centre."""
        return self.shape(
            "ellipse", [(cx - rx, cy - ry), (cx + rx, cy + ry)], base, grain, shade, soft
        )


def sky(c, rng):
    """Sky with a gradient, sun or moon, clouds."""
    top = colour(rng)
    c.gradient(top, near(rng, np.clip(top + rng.uniform(-0.3, 0.5), 0, 1), 0.2))
    if rng.random() < 0.6:
        r = rng.uniform(0.03, 0.12)
        cx, cy = rng.random(), rng.uniform(0.05, 0.45)
        sun = near(rng, np.array([1, 0.95, 0.8], np.float32))
        glow = np.exp(-((c.x - cx) ** 2 + (c.y - cy) ** 2) / (2 * (3 * r) ** 2))
        c.blend(0.5 * glow, sun)
        c.ellipse(cx, cy, r, r, sun, 0, 0)
    if rng.random() < 0.6:
        cloud = field(rng, octaves=6, first=3)
        mask = np.clip((cloud - rng.uniform(-0.2, 0.9)) * 0.8, 0, 1) * rng.uniform(0.4, 1)
        c.blend(mask, near(rng, np.full(3, rng.uniform(0.4, 1), np.float32), 0.05))


def tree(c, rng, x, y, h):
    """Trunk and a crown of blobs, or a fir."""
    leaf, bark = colour(rng, value=rng.uniform(0.2, 0.8)), colour(rng, 0.4, rng.uniform(0.1, 0.5))
    c.limb((x, y), (x, y - 0.6 * h), 0.1 * h, bark)
    if rng.random() < 0.4:
        for k in range(3):
            top, width = y - h * (0.6 + 0.25 * k), h * (0.35 - 0.08 * k)
            points = [(x - width, top + 0.3 * h), (x + width, top + 0.3 * h), (x, top - 0.15 * h)]
            c.shape("polygon", points, near(rng, leaf, 0.03), 0.15)
    else:
        for _ in range(int(rng.integers(2, 5))):
            dx, dy = rng.normal(0, 0.14, 2) * h
            r = h * rng.uniform(0.18, 0.32)
            c.ellipse(x + dx, y - 0.8 * h + dy, r, r, near(rng, leaf, 0.05), 0.2, 0.4)


def house(c, rng, x, y, w, h):
    """Wall, roof, door, windows."""
    wall, roof, glass = colour(rng), colour(rng), colour(rng)
    c.shape("rectangle", [(x, y - h), (x + w, y)], wall)
    peak = y - h - rng.uniform(0.2, 0.7) * h
    e = 0.12 * w
    c.shape("polygon", [(x - e, y - h), (x + w + e, y - h), (x + w / 2, peak)], roof, 0.12)
    c.shape("rectangle", [(x + 0.42 * w, y - 0.5 * h), (x + 0.6 * w, y)], near(rng, roof), 0, 0.1)
    for k in (0.12, 0.72):
        box = [(x + k * w, y - 0.75 * h), (x + (k + 0.18) * w, y - 0.45 * h)]
        c.shape("rectangle", box, glass, 0, 0.2)


def landscape(c, rng):
    """Sky, layered hills, perhaps water, trees, houses."""
    sky(c, rng)
    y = rng.uniform(0.35, 0.6)
    base = colour(rng, value=rng.uniform(0.2, 0.9))
    line = np.linspace(-0.02, 1.02, 40)
    for _ in range(int(rng.integers(1, 5))):
        wave = field(rng, 64, 4, first=int(rng.integers(2, 6)))[0, :40] * rng.uniform(0.01, 0.09)
        ridge = list(zip(line, y + wave, strict=True))
        base = near(rng, base, 0.12)
        c.shape("polygon", [*ridge, (1.02, 1.02), (-0.02, 1.02)], base, rng.uniform(0, 0.2))
        y += rng.uniform(0.05, 0.2)
    if rng.random() < 0.35:
        shore = rng.uniform(0.6, 0.85)
        c.shape("rectangle", [(-0.1, shore), (1.1, 1.1)], colour(rng, 0.5), 0.05, 0.3)
        streak = np.repeat(field(rng, 64, first=8)[:, :1], 64, axis=1)
        streak = np.asarray(Image.fromarray(streak).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        c.blend(np.clip(streak, 0, 1) * 0.4 * (c.y > shore), c.pixels[::-1])
    for _ in range(int(rng.integers(0, 6))):
        tree(c, rng, rng.random(), rng.uniform(0.6, 1.0), rng.uniform(0.12, 0.5))
    for _ in range(int(rng.integers(0, 3))):
        w = rng.uniform(0.12, 0.35)
        house(c, rng, rng.random() - w / 2, rng.uniform(0.6, 0.95), w, w * rng.uniform(0.5, 1))


def city(c, rng):
    """Rows of towers with windows, a street."""
    sky(c, rng)
    for row in range(int(rng.integers(1, 4))):
        x, ground = -0.05, 0.75 + 0.1 * row
        base = colour(rng, rng.uniform(0, 0.5))
        while x < 1.05:
            w, h = rng.uniform(0.06, 0.25), rng.uniform(0.15, 0.75 - 0.1 * row)
            wall = near(rng, base)
            mask = c.shape("rectangle", [(x, ground - h), (x + w, ground + 0.3)], wall, 0.05)
            nx, ny = rng.uniform(18, 60), rng.uniform(18, 60)
            lit = ((c.x * nx) % 1 > 0.45) & ((c.y * ny) % 1 > 0.4)
            c.blend(mask * lit * rng.uniform(0, 0.9), colour(rng, rng.uniform(0, 0.6)))
            x += w + rng.uniform(0, 0.05)
    if rng.random() < 0.6:
        road = [(0.4, 0.8), (0.6, 0.8), (1.2, 1.02), (-0.2, 1.02)]
        c.shape("polygon", road, colour(rng, 0.1, rng.uniform(0.15, 0.6)), 0.06)


def backdrop(c, rng):
    """What stands behind people and objects: a plain, a room, bokeh or a blurred scene."""
    pick = rng.random()
    if pick < 0.3:
        a = colour(rng)
        c.gradient(a, near(rng, a, 0.25), rng.random() * 6.3)
    elif pick < 0.55:
        room(c, rng)
    elif pick < 0.75:
        (landscape if rng.random() < 0.5 else city)(c, rng)
        blurred(c, rng.uniform(2, 8))
    else:
        c.gradient(colour(rng), colour(rng), rng.random() * 6.3)
        for _ in range(int(rng.integers(4, 14))):
            r = rng.uniform(0.02, 0.15)
            c.ellipse(rng.random(), rng.random(), r, r, colour(rng), 0, 0, rng.uniform(1, 6))


def blurred(c, radius):
    """Blur what is painted so far."""
    picture = Image.fromarray((np.clip(c.pixels, 0, 1) * 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(radius))
    c.pixels = np.asarray(picture, np.float32) / 255


def face(c, rng, x, y, r):
    """Head with hair, eyes, brows, nose, mouth."""
    tones = np.array([[0.96, 0.82, 0.72], [0.87, 0.66, 0.5], [0.66, 0.45, 0.32], [0.4, 0.26, 0.18]])
    skin = near(rng, tones[rng.integers(4)], 0.04)
    hair = near(rng, np.array([0.25, 0.17, 0.1]) * rng.uniform(0.2, 3), 0.05)
    wide = r * rng.uniform(0.7, 0.9)
    turn = rng.uniform(-0.25, 0.25) * r
    c.ellipse(x, y - 0.15 * r, wide * 1.18, r * 1.12, hair, 0.2, 0.4)
    if rng.random() < 0.4:
        box = [(x - wide * 1.15, y - 0.1 * r), (x + wide * 1.15, y + r * rng.uniform(0.6, 1.6))]
        c.shape("rectangle", box, hair, 0.2, 0.3)
    c.limb((x, y + 0.5 * r), (x, y + 1.5 * r), 0.7 * r, skin * 0.85)
    c.ellipse(x, y + 0.05 * r, wide, r, skin, 0.03, 1.2)
    for side in (-1, 1):
        ex, ey = x + turn + side * 0.38 * wide, y - 0.05 * r
        c.ellipse(ex, ey, 0.17 * r, 0.09 * r, np.full(3, 0.93), 0, 0)
        c.ellipse(ex + 0.02 * r, ey, 0.075 * r, 0.085 * r, colour(rng, 0.6, 0.25), 0, 0)
        c.limb((ex - 0.2 * r, ey - 0.2 * r), (ex + 0.2 * r, ey - 0.22 * r), 0.06 * r, hair * 0.7)
    c.limb((x + turn, y), (x + turn * 1.3, y + 0.28 * r), 0.1 * r, skin * 0.8)
    c.ellipse(
        x + turn,
        y + 0.52 * r,
        0.28 * r,
        rng.uniform(0.04, 0.14) * r,
        np.array([0.65, 0.25, 0.25]) * rng.uniform(0.6, 1.2),
        0,
        0,
    )


def portrait(c, rng):
    """One or two people from the chest up."""
    backdrop(c, rng)
    count = 1 if rng.random() < 0.75 else 2
    for k in range(count):
        r = rng.uniform(0.12, 0.28) / math.sqrt(count)
        x = rng.uniform(0.3, 0.7) if count == 1 else 0.27 + 0.46 * k + rng.normal(0, 0.03)
        y = rng.uniform(0.3, 0.5)
        cloth = colour(rng)
        c.ellipse(x, y + 3.1 * r, r * 2.1, r * 1.8, cloth, 0.12, 0.5)
        face(c, rng, x, y, r)


def people(c, rng):
    """Whole figures, standing, walking, with arms anywhere."""
    backdrop(c, rng)
    for _ in range(int(rng.integers(1, 4))):
        h = rng.uniform(0.35, 0.85)
        x, foot = rng.uniform(0.15, 0.85), rng.uniform(0.8, 1.05)
        shirt, trousers = colour(rng), colour(rng, value=rng.uniform(0.1, 0.6))
        hip, neck = foot - 0.48 * h, foot - 0.84 * h
        skin = np.array([0.9, 0.7, 0.56]) * rng.uniform(0.35, 1.05)
        for side in (-1, 1):
            c.limb(
                (x + side * 0.04 * h, hip),
                (x + side * rng.uniform(0, 0.2) * h, foot),
                0.1 * h,
                trousers,
            )
            hand = (x + side * rng.uniform(0.1, 0.35) * h, neck + rng.uniform(-0.2, 0.4) * h)
            c.limb((x + side * 0.1 * h, neck + 0.05 * h), hand, 0.06 * h, near(rng, shirt, 0.03))
            c.ellipse(*hand, 0.03 * h, 0.03 * h, skin, 0, 0)
        torso = [(x - 0.13 * h, neck), (x + 0.13 * h, neck),
                 (x + 0.1 * h, hip + 0.04 * h), (x - 0.1 * h, hip + 0.04 * h)]  # fmt: skip
        c.shape("polygon", torso, shirt, 0.1)
        c.ellipse(x, neck - 0.1 * h, 0.075 * h, 0.095 * h, skin * 0.4, 0.1)
        c.ellipse(x, neck - 0.075 * h, 0.065 * h, 0.08 * h, skin, 0.02, 0.8)


def animal(c, rng):
    """Four legs or a fish or a bird: ellipses with fur."""
    backdrop(c, rng)
    for _ in range(int(rng.integers(1, 3))):
        fur = colour(rng, rng.uniform(0.1, 0.7))
        s, x, y = rng.uniform(0.12, 0.3), rng.uniform(0.25, 0.75), rng.uniform(0.4, 0.7)
        d = rng.choice([-1, 1])
        tail = [(x - d * s, y), (x - d * 1.7 * s, y - 0.5 * s), (x - d * 1.5 * s, y + 0.4 * s)]
        c.shape("polygon", tail, near(rng, fur), 0.15)
        if rng.random() < 0.65:
            for k in (-0.75, -0.5, 0.5, 0.75):
                c.limb(
                    (x + k * s, y),
                    (x + k * s * rng.uniform(0.8, 1.2), y + 1.25 * s),
                    0.2 * s,
                    near(rng, fur * 0.8, 0.02),
                )
        c.ellipse(x, y, 1.1 * s, 0.55 * s, fur, 0.2, 0.8)
        hx, hy = x + d * 1.15 * s, y - rng.uniform(0, 0.6) * s
        for k in (-0.25, 0.2):
            ear = [
                (hx + (k - 0.15) * s, hy - 0.2 * s),
                (hx + (k + 0.15) * s, hy - 0.2 * s),
                (hx + k * s, hy - 0.75 * s),
            ]
            c.shape("polygon", ear, fur * 0.8, 0.1)
        c.ellipse(hx, hy, 0.48 * s, 0.4 * s, near(rng, fur, 0.04), 0.12, 0.6)
        c.ellipse(hx + d * 0.2 * s, hy - 0.08 * s, 0.07 * s, 0.07 * s, np.full(3, 0.05), 0, 0)


def room(c, rng):
    """A floor, walls in perspective, a window or pictures."""
    wall = colour(rng, rng.uniform(0, 0.5))
    c.gradient(wall, near(rng, wall), rng.random() * 6)
    horizon, left, right = rng.uniform(0.55, 0.8), rng.uniform(0, 0.3), rng.uniform(0.7, 1)
    floor = colour(rng, rng.uniform(0, 0.6))
    ground = [(left, horizon), (right, horizon), (1.2, 1.1), (-0.2, 1.1)]
    c.shape("polygon", ground, floor, 0.1, 0.5)
    c.shape("polygon", [(-0.1, -0.1), (left, 0.1), (left, horizon), (-0.1, 1.1)], wall * 0.8, 0.05)
    c.shape("polygon", [(1.1, -0.1), (right, 0.1), (right, horizon), (1.1, 1.1)], wall * 0.9, 0.05)
    for _ in range(int(rng.integers(0, 3))):
        x, y, w, h = rng.uniform(0.2, 0.6), rng.uniform(0.1, 0.3), *rng.uniform(0.08, 0.25, 2)
        c.shape("rectangle", [(x - 0.015, y - 0.015), (x + w + 0.015, y + h + 0.015)], wall * 0.4)
        c.shape("rectangle", [(x, y), (x + w, y + h)], colour(rng), 0.1, 0.5)


def objects(c, rng):
    """Balls, boxes and cylinders on a table or in the air."""
    backdrop(c, rng)
    for _ in range(int(rng.integers(2, 8))):
        x, y, s = rng.random(), rng.uniform(0.3, 0.95), rng.uniform(0.05, 0.22)
        base = colour(rng)
        pick = rng.random()
        c.ellipse(x, y + s, 1.1 * s, 0.3 * s, np.zeros(3), 0, 0, 4)
        if pick < 0.45:
            c.ball(x, y, s, base)
        elif pick < 0.8:
            dx, dy = s * rng.uniform(0.3, 0.7), s * rng.uniform(0.2, 0.5)
            a, b = (x - s, y - s), (x + s, y + s)
            c.shape("rectangle", [a, b], base)
            top = [a, (b[0], a[1]), (b[0] + dx, a[1] - dy), (a[0] + dx, a[1] - dy)]
            c.shape("polygon", top, np.clip(base * 1.35, 0, 1))
            side = [(b[0], a[1]), b, (b[0] + dx, b[1] - dy), (b[0] + dx, a[1] - dy)]
            c.shape("polygon", side, base * 0.6)
        else:
            h = s * rng.uniform(1, 2.5)
            c.ellipse(x, y + s, 0.6 * s, 0.2 * s, base * 0.8)
            c.shape("rectangle", [(x - 0.6 * s, y + s - h), (x + 0.6 * s, y + s)], base, 0.05, 1.5)
            c.ellipse(x, y + s - h, 0.6 * s, 0.2 * s, np.clip(base * 1.3, 0, 1))


def pattern(c, rng):
    """Noise, marble, stripes, checks, waves, glyphs."""
    a, b = colour(rng), colour(rng)
    pick = rng.random()
    angle, scale = rng.random() * 6.3, rng.uniform(3, 20)
    u = c.x * math.cos(angle) + c.y * math.sin(angle)
    v = c.y * math.cos(angle) - c.x * math.sin(angle)
    if pick < 0.3:
        t = 0.5 + 0.35 * field(rng, octaves=6, roughness=rng.uniform(0.35, 0.75))
    elif pick < 0.5:
        t = 0.5 + 0.5 * np.sin(scale * u * 3 + rng.uniform(0, 3) * field(rng, octaves=4))
    elif pick < 0.65:
        t = ((np.floor(u * scale) + np.floor(v * scale)) % 2).astype(np.float32)
    else:
        t = np.clip(0.5 + u - 0.5, 0, 1)
    t = np.clip(t, 0, 1)[..., None]
    c.pixels = a * (1 - t) + b * t
    if pick > 0.8:
        for _ in range(int(rng.integers(1, 7))):
            glyph(c, rng)
    elif pick > 0.65:
        for _ in range(int(rng.integers(3, 12))):
            kind = rng.choice(["polygon", "ellipse", "rectangle"])
            n = int(rng.integers(3, 7)) if kind == "polygon" else 2
            c.shape(kind, rng.uniform(-0.1, 1.1, (n, 2)), colour(rng), 0.1, 0.4)


def glyph(c, rng):
    """A big letter or digit."""
    font = ImageFont.load_default(int(rng.integers(50, 220)))
    picture = Image.new("L", (SIZE, SIZE))
    at = tuple(rng.integers(-20, 190, 2).tolist())
    ImageDraw.Draw(picture).text(at, str(rng.choice(list(GLYPHS))), fill=255, font=font)
    picture = picture.rotate(rng.uniform(-30, 30), Image.Resampling.BILINEAR)
    c.blend(np.asarray(picture, np.float32) / 255, c.textured(colour(rng), 0.05, 0.2))


KINDS = {
    "landscape": (landscape, 0.24), "city": (city, 0.13), "portrait": (portrait, 0.19),
    "people": (people, 0.12), "animal": (animal, 0.09), "objects": (objects, 0.11),
    "room": (room, 0.04), "pattern": (pattern, 0.08),
}  # fmt: skip


def camera(c, rng):
    """What a lens and a sensor do: shadow, haze, exposure, colour cast, blur, noise."""
    pixels = c.pixels * (1 + rng.uniform(0, 0.25) * field(rng, octaves=2))[..., None]
    if rng.random() < 0.4:
        distance = (c.x - 0.5) ** 2 + (c.y - 0.5) ** 2
        pixels = pixels * (1 - rng.uniform(0, 1.2) * distance)[..., None]
    if rng.random() < 0.3:
        grey = pixels.mean(-1, keepdims=True)
        pixels = grey + (pixels - grey) * rng.uniform(0, 0.8)
    pixels = np.clip(pixels * rng.normal(1, 0.07, 3), 0, 1) ** rng.uniform(0.6, 1.6)
    low, high = rng.uniform(0, 0.15), rng.uniform(0.75, 1)
    c.pixels = low + (high - low) * pixels
    if rng.random() < 0.45:
        blurred(c, rng.uniform(0.3, 2.2))
    c.pixels = c.pixels + rng.normal(0, rng.uniform(0, 0.014), c.pixels.shape)


def draw(seed):
    """Draw the picture of a seed.

    Returns:
        (uint8 array (256, 256, 3), name of its kind, a key of KINDS).
    """
    rng = np.random.default_rng(seed)
    names = list(KINDS)
    weights = np.array([KINDS[name][1] for name in names])
    kind = str(rng.choice(names, p=weights / weights.sum()))
    canvas = Canvas(rng)
    KINDS[kind][0](canvas, rng)
    camera(canvas, rng)
    if rng.random() < 0.5:
        canvas.pixels = canvas.pixels[:, ::-1]
    return (np.clip(canvas.pixels, 0, 1) * 255 + 0.5).astype(np.uint8), kind
