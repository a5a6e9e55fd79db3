"""What the network is shown: a noised picture, the prompt, and the picture it shall become."""

import dataclasses
import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from . import filters, looks, network, prompts

KEYS = list(looks.LOOKS)
WEIGHTS = {"photo": 0.6, "mosaic": 1.3, "ink": 1.2, "neon": 1.2, "poster": 1.2, "thermal": 1.2,
           "blueprint": 1.1}  # fmt: skip
MIDDLE, SPREAD, NARROW = 470, 90, 0.66  # t of this share of the pairs: strength about 0.5
WEAK, NOTHING = 260, 30  # below WEAK the look fades, so that strength means something
ALREADY, OTHER, EMPTY = 0.08, 0.16, 0.25  # shares, one after the other; see `draw`
WEBCAM = 0.35
# of a step's t, where the next one may be: the ladders of 2, 3 and 4 steps, and anything
LADDER = (0.5, 0.5, 0.75, 2 / 3, 0.5)
# T.81, annex K: the quantisation of luminance and of colour
LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56
14 17 22 29 51 87 80 62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92
49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMA = " ".join(["17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56", "99 " * 5,
                   "47 66", "99 " * 38])  # fmt: skip


@dataclasses.dataclass
class Batch:
    """Pairs; pictures are (B, 3, H, W) in -1..1."""

    source: torch.Tensor
    target: torch.Tensor
    noise: torch.Tensor  # (B, 48, H / 4, W / 4)
    t: torch.Tensor  # (B,) timesteps, 0..999
    prompts: list
    kinds: list  # what each pair is, for the curves: a key of LOOKS, or "keep"

    def pick(self, rows):
        """Some of the rows."""
        rows = rows.tolist()
        return Batch(*(v[rows] for v in (self.source, self.target, self.noise, self.t)),
                     *([v[i] for i in rows] for v in (self.prompts, self.kinds)))  # fmt: skip

    def join(self, other):
        """Both, one after the other."""
        tensors = zip(
            (self.source, self.target, self.noise, self.t),
            (other.source, other.target, other.noise, other.t), strict=True,
        )  # fmt: skip
        return Batch(*(torch.cat(pair) for pair in tensors),
                     self.prompts + other.prompts, self.kinds + other.kinds)  # fmt: skip


def _dct(device):
    k = torch.arange(8, dtype=torch.float32)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis.to(device)


def jpeg(x, quality):
    """What JPEG (ITU T.81, baseline, 4:2:0) leaves of pictures (B, 3, H, W) in 0..1."""
    y = filters.grey(x)
    blue, red = (x[:, 2:] - y) * 0.564, (x[:, :1] - y) * 0.713
    scale = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
    basis = _dct(x.device)

    def coded(plane, table):
        table = x.new_tensor([int(v) for v in table.split()]).view(8, 8)
        table = ((table * scale).round().clamp(1, 255)) / 255
        blocks = plane.unfold(2, 8, 8).unfold(3, 8, 8)
        coefficients = ((basis @ blocks @ basis.T) / table).round() * table
        return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(plane.shape)

    def colour(plane):
        half = coded(F.avg_pool2d(plane, 2), CHROMA)
        return F.interpolate(half, scale_factor=2, mode="bilinear")

    y, blue, red = coded(y - 0.5, LUMINANCE) + 0.5, colour(blue), colour(red)
    g = y - 0.344 * blue - 0.714 * red
    return torch.cat([y + 1.402 * red, g, y + 1.772 * blue], 1).clamp(0, 1)


def light(x, rng):
    """A dim or yellow room: pictures (B, 3, H, W) in 0..1."""
    gain = rng.uniform(0.5, 0.9) if rng.random() < 0.5 else 1.0
    warm = rng.uniform(0, 1) if rng.random() < 0.5 else 0.0
    white = filters.colour(x, 1 + 0.08 * warm, 1 - 0.03 * warm, 1 - 0.32 * warm)
    return (x * gain * white).clamp(0, 1)


def sensor(x, rng, generator):
    """A webcam's noise and compression on pictures (B, 3, H, W) in 0..1."""
    noise = torch.randn(x.shape, generator=generator).to(x)
    x = (x + rng.uniform(0, 0.04) * noise).clamp(0, 1)
    return jpeg(x, rng.uniform(50, 95)) if rng.random() < 0.7 else x


class Pairs:
    """Draws batches from the pictures in all looks.

    Args:
        pictures: uint8 (N, looks, 3, 256, 256), a memory map or a tensor on the device.
        seed: of everything that is drawn.
        device: of the batches.
    """

    def __init__(self, pictures, seed, device):
        self.pictures, self.device = pictures, device
        self.rng, self.numpy = random.Random(seed), np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._weights = [WEIGHTS.get(key, 1.0) for key in KEYS]

    def _piece(self, i, look, y, x, size):
        piece = self.pictures[i, look, :, y : y + size, x : x + size]
        if not isinstance(piece, torch.Tensor):
            piece = torch.from_numpy(np.array(piece))
        return piece.to(self.device).float() / 255

    def _one(self, size):
        rng = self.rng
        i = rng.randrange(len(self.pictures))
        look = rng.choices(range(len(KEYS)), self._weights)[0]
        # fixed patterns repeat every 32 pixels: pieces stay on their grid
        y, x = (32 * rng.randint(0, (self.pictures.shape[-1] - size) // 32) for _ in range(2))
        if rng.random() < NARROW:
            t = min(max(rng.gauss(MIDDLE, SPREAD), 60), 999)
        else:
            t = 40 + 880 * rng.betavariate(1.8, 2.2)
        kind, source, strength = KEYS[look], 0, 1.0
        u = rng.random()
        if u < ALREADY:
            source, t = look, t * rng.random()
        elif u < OTHER and look:
            source = rng.randrange(1, len(KEYS))
        elif u < EMPTY:
            kind = None
            look = source = rng.randrange(len(KEYS)) if rng.random() < 0.3 else 0
        elif t < WEAK:
            strength = min(max((t - NOTHING) / (WEAK - NOTHING), 0), 1)
        a, b = (self._piece(i, k, y, x, size)[None] for k in (source, look))
        if source == 0 and rng.random() < WEBCAM:
            lit = light(a, rng)
            a = sensor(lit, rng, self.generator)
            # nothing asked: the light stays; else the look is that of the well-lit picture
            b = lit if kind is None else b + (lit - b) * (1 - strength)
        else:
            b = a + (b - a) * strength
        return a, b, int(t), prompts.prompt(kind, self.numpy), kind or "keep"

    def draw(self, count, size):
        """A Batch of fresh pairs, pieces of `size` pixels.

        Most lead from the photo to a look. ALREADY of them are in it, up to OTHER come from
        another look, up to EMPTY the prompt names no look and the picture stays.
        """
        rows = [self._one(size) for _ in range(count)]
        source, target = (2 * torch.cat([row[i] for row in rows]) - 1 for i in (0, 1))
        noise = torch.randn(count, network.CHANNELS, size // network.PATCH, size // network.PATCH,
                            generator=self.generator).to(self.device)  # fmt: skip
        t = torch.tensor([row[2] for row in rows], device=self.device)
        return Batch(source, target, noise, t, *([row[i] for row in rows] for i in (3, 4)))

    def go_on(self, batch, output, noised, count):
        """`count` rows of a step, as the stream's next step would meet them.

        Args:
            batch: what the step was given. output: its pictures (B, 3, H, W). noised: the noised
                pictures it saw. count: how many rows.

        Returns:
            Batch whose source is the output; half of it after residual guidance as the guider
            does it (StreamDiffusion, arXiv 2312.12491, section 3.3, self-negative).
        """
        rows = torch.randperm(len(output), generator=self.generator)[:count]
        some = batch.pick(rows)
        q, x = output[rows.tolist()], noised[rows.tolist()]
        draw = torch.rand(4, count, generator=self.generator).to(q).view(4, count, 1, 1, 1)
        cfg = torch.where(draw[0] < 0.5, 1 + 0.6 * draw[1], torch.ones_like(draw[1]))
        delta = torch.where(draw[2] < 0.5, torch.full_like(draw[3], 0.3), draw[3])
        negative = x - delta * (x - some.source)
        q = torch.where(cfg > 1, negative + cfg * (q - negative), q).clamp(-1.6, 1.6)
        ratio = [self.rng.choice(LADDER) if self.rng.random() < 0.6 else self.rng.uniform(0.2, 0.9)
                 for _ in range(count)]  # fmt: skip
        t = (some.t * torch.tensor(ratio, device=some.t.device)).long().clamp(5, 999)
        fresh = torch.randn(some.noise.shape, generator=self.generator).to(q)
        same = torch.rand(count, generator=self.generator).to(q).view(-1, 1, 1, 1) < 0.7
        noise = torch.where(same, some.noise, fresh)
        return dataclasses.replace(some, source=q, noise=noise, t=t)
