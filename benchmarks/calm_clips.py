"""Clips whose motion is known, of photographs that the embedded model never saw.

A clip is made of layers: a photograph each, seen through a window that moves over it (pans, zooms,
rotations, a shaking hand), the upper ones through a soft cut-out. So where each pixel was a frame
before is known exactly, and which pixels were not there. What a camera adds is 2 % of noise.

The photographs are the embedded model's held-out ones (demo/held_out.txt), in two halves that share
no scene: presets are tuned on one and judged on the other.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 256
CANVAS = 400  # pixels of a photograph on each side
WARM = 8  # frames before the first that counts: memories fill in them
FRAMES = 16  # pairs of frames that count
STILL = 8  # of a scene that stands still: what flickers there is much the same in all
TAIL = 3  # more frames than that, for streams that give them late
NOISE = 0.02  # of the full scale, as of a webcam in a room
Path = Callable[[int], Tensor]  # frame number to the window's matrix
LOOKS = ("ink", "neon", "watercolor", "mosaic", "thermal", "blueprint", "poster", "sunset", "oil",
         "pencil", "comic", "photo")  # fmt: skip


def window(dx: float = 0, dy: float = 0, zoom: float = 1, turn: float = 0) -> Tensor:
    """[3, 3] float64, from a pixel of the view to a place on the canvas, both from their middles.

    Args:
        dx, dy: canvas pixels by which the view's middle is off the canvas' middle.
        zoom: pixels of the view for one of the canvas.
        turn: degrees.
    """
    c, s = (f(math.radians(turn)) / zoom for f in (math.cos, math.sin))
    return torch.tensor([[c, -s, dx], [s, c, dy], [0, 0, 1]], dtype=torch.float64)


def pan(dx: float, dy: float, zoom: float = 1) -> Path:
    """A window that moves by so many canvas pixels per frame, through the middle half way."""
    half = (WARM + FRAMES) / 2
    return lambda t: window(dx * (t - half), dy * (t - half), zoom)


def zooming(start: float, end: float) -> Path:
    """By the same factor each frame."""
    return lambda t: window(zoom=start * (end / start) ** (t / (WARM + FRAMES)))


def turning(degrees: float, dx: float = 0) -> Path:
    """By so many degrees per frame."""
    half = (WARM + FRAMES) / 2
    return lambda t: window(dx * (t - half), turn=degrees * (t - half))


def hand(size: float) -> Path:
    """A hand that shakes: two slow waves in each direction and a little turning."""
    return lambda t: window(
        size * (math.sin(0.31 * t) + 0.5 * math.sin(0.83 * t + 1)),
        size * (math.sin(0.37 * t + 2) + 0.5 * math.sin(0.71 * t)),
        turn=0.3 * size * math.sin(0.29 * t + 0.5),
    )


def still(_: int) -> Tensor:
    """A camera on a stand, the whole photograph but its rim."""
    return window(zoom=0.7)


@dataclass(frozen=True)
class Layer:
    """A photograph and the window's way over it.

    Attributes:
        photo: name of a held-out file.
        path: of the window.
        hole: (x, y, half width, half height) of a cut-out on the canvas, from its middle.
    """

    photo: str
    path: Path
    hole: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """What a clip is made of. `look` is a key of demo/looks.py."""

    name: str
    look: str
    layers: tuple[Layer, ...]
    moves: bool = True


class Clip:
    """A clip, rendered when it is first looked at.

    Attributes:
        clean: [T, 3, SIDE, SIDE] in 0..1; noisy: the same with a camera's noise, in bytes' steps.
        flow: [T - 1, 2, SIDE, SIDE], (dx, dy) in pixels from a pixel of frame t + 1 to where it was
            in frame t.
        seen: [T - 1, 1, SIDE, SIDE], True where the pixel of frame t + 1 was in the picture at t,
            not covered, and not at the rim of a cut-out.
    """

    def __init__(self, plan: Plan, seed: int, frames: int = WARM + FRAMES + 1, tail: int = TAIL):
        self.plan, self.name, self.look, self.moves = plan, plan.name, plan.look, plan.moves
        self.seed = seed
        self.frames = frames  # that count or warm up; `tail` more are there
        self.length = frames + tail
        self._filtered: dict[int, Tensor] = {}

    def filtered(self, t: int) -> Tensor:
        """Frame t as the look's own filter makes it of the clean one, [1, 3, SIDE, SIDE]."""
        from livediffusion.demo import looks

        if t not in self._filtered:
            scene = looks.Scene(self.clean[t : t + 1])
            self._filtered[t] = looks.LOOKS[self.look](scene)
        return self._filtered[t]

    @functools.cached_property
    def clean(self) -> Tensor:
        if not self.moves:
            return self._frame(0).expand(self.length, -1, -1, -1)
        return torch.cat([self._frame(t) for t in range(self.length)])

    @functools.cached_property
    def noisy(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        clean = self.clean
        noise = torch.randn(clean.shape, generator=generator)
        return ((clean + NOISE * noise).clamp(0, 1) * 255).round() / 255

    @functools.cached_property
    def flow(self) -> Tensor:
        return self._motion[0]

    @functools.cached_property
    def seen(self) -> Tensor:
        return self._motion[1]

    @functools.cached_property
    def _motion(self) -> tuple[Tensor, Tensor]:
        pairs = [self._between(t) for t in range(self.length - 1)] if self.moves else []
        if not pairs:
            empty = torch.zeros(self.length - 1, 1, SIDE, SIDE)
            return empty.expand(-1, 2, -1, -1), empty == 0
        return torch.cat([flow for flow, _ in pairs]), torch.cat([seen for _, seen in pairs])

    def covers(self, t: int) -> list[Tensor]:
        """How much of each pixel of frame t each layer covers, [1, 1, SIDE, SIDE] of each."""
        found: list[Tensor] = []
        for layer in self.plan.layers:
            cover = torch.ones(1, 1, SIDE, SIDE)
            if layer.hole is not None:
                cover = sum(_inside(layer.hole, at) for at in self._samples(layer, t)) / 4
            found = [one * (1 - cover) for one in found] + [cover]
        return found

    def _frame(self, t: int) -> Tensor:
        """[1, 3, SIDE, SIDE]."""
        whole = torch.zeros(1, 3, SIDE, SIDE)
        for layer, cover in zip(self.plan.layers, self.covers(t), strict=True):
            canvas = photograph(layer.photo)
            whole += cover * sum(sampled(canvas, at) for at in self._samples(layer, t)) / 4
        return whole.clamp(0, 1)

    def _samples(self, layer: Layer, t: int) -> list[Tensor]:
        """Places on the canvas: four of each pixel, so that nothing shimmers where it is small."""
        matrix = layer.path(t if self.moves else 0)
        return [moved(matrix, places(SIDE, x, y)) for x in (-0.25, 0.25) for y in (-0.25, 0.25)]

    def _between(self, t: int) -> tuple[Tensor, Tensor]:
        now, before = self.covers(t + 1), self.covers(t)
        here = places(SIDE)
        flow, seen = torch.zeros(1, 2, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
        for layer, at_now, at_before in zip(self.plan.layers, now, before, strict=True):
            was = moved(layer.path(t).inverse() @ layer.path(t + 1), here)
            mine = at_now > 0.5
            flow = torch.where(mine, (was - here).movedim(-1, 0)[None].float(), flow)
            # pixels that are of this layer alone, and so is all around where they were
            alone = (shrunk(at_now) > 0.99) & (sampled(shrunk(at_before), was) > 0.97)
            inside = (was.abs() <= SIDE / 2 - 2.5).all(-1)
            seen = torch.where(mine, alone & inside, seen)
        return flow, seen


def places(side: int, dx: float = 0, dy: float = 0) -> Tensor:
    """[side, side, 2] float64: (x, y) of each pixel's middle, moved, from the picture's middle."""
    line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y, x = torch.meshgrid(line + dy, line + dx, indexing="ij")
    return torch.stack([x, y], -1)


def moved(matrix: Tensor, at: Tensor) -> Tensor:
    """Places by a [3, 3] matrix."""
    return at @ matrix[:2, :2].T + matrix[:2, 2]


def sampled(picture: Tensor, at: Tensor) -> Tensor:
    """[1, C, H, W] at places [h, w, 2] from its middle, bicubic, mirrored outside: [1, C, h, w]."""
    half = at.new_tensor([picture.shape[3] / 2, picture.shape[2] / 2])
    grid = (at / half).to(picture.dtype)[None]
    return F.grid_sample(picture, grid, "bicubic", "reflection", align_corners=False)


def shrunk(cover: Tensor) -> Tensor:
    """The least of each pixel and its neighbours."""
    return -F.max_pool2d(-cover, 3, 1, 1)


def _inside(hole: tuple[float, float, float, float], at: Tensor) -> Tensor:
    """[1, 1, H, W]: how much of a superellipse's inside each place is; its rim is a pixel wide."""
    x, y, width, height = hole
    u, v = (at[..., 0] - x) / width, (at[..., 1] - y) / height
    far = (u.abs() ** 2.5 + v.abs() ** 2.5) ** 0.4
    return ((1 - far) * min(width, height) + 0.5).clamp(0, 1)[None, None].float()


@functools.cache
def held_out() -> dict:
    """Held-out files by name; fetched where they are not installed."""
    from livediffusion.demo import pictures

    return pictures.split(pictures.fetched(pictures.CACHE))[1]


@functools.cache
def photograph(name: str) -> Tensor:
    """The middle of a held-out file's middle frame, [1, 3, CANVAS, CANVAS] in 0..1."""
    from livediffusion.demo import pictures
    from PIL import Image

    with Image.open(held_out()[name]) as picture:
        picture.seek(getattr(picture, "n_frames", 1) // 2)
        pixels = pictures.centre(picture.convert("RGB"), CANVAS)
    return torch.from_numpy(pixels.copy()).movedim(-1, 0)[None].float() / 255


def film(name: str, frames: int = WARM + FRAMES + 1 + TAIL, step: int = 1) -> Tensor:
    """Frames of a held-out film, [frames, 3, SIDE, SIDE] in 0..1; its motion is not known."""
    from livediffusion.demo import pictures
    from PIL import Image

    taken = []
    with Image.open(held_out()[name]) as picture:
        for t in range(frames):
            # there and back, where it is too short
            last = picture.n_frames - 1
            picture.seek(last - abs(t * step % (2 * last) - last))
            pixels = pictures.centre(picture.convert("RGB"), SIDE)
            taken.append(torch.from_numpy(pixels.copy()).movedim(-1, 0)[None])
    return torch.cat(taken).float() / 255


# scenes of a half: none of one is in the other, before and after of an edit count as one; held-out
# ones that are in neither have been looked at in other ways while presets were made
HALVES = {
    "tuning": (
        "api_bytedance_seedream_5_0_pro_image_edit-1", "image_ernie_image_turbo-1",
        "hidream_e1_1-1", "api_google_nano_banana2_image_edit-1", "video_ltx2_3_id_lora-1",
        "flux1_krea_dev-1", "utility_recraft_crisp_image_upscale-2", "image_qwen_image-1",
        "utility-gan_upscaler-2", "api_luma_ray3_2_video_edit-1", "video_kandinsky5_i2v-1",
        "templates_ohneis_i2v-2", "image_boogu_image_0_1_turbo_t2i-1", "api_happyhorse1_0_t2v-1",
        "api_kling_o3_flf2v-1",
    ),
    "judged": (
        "api_bfl_flux2_max_sofa_swap-1", "api_ltxv_image_to_video-1", "api_wan_text_to_image-1",
        "api_wavespeed_image_upscale-2", "flux_dev_checkpoint_example-1", "image_hidream_o1-1",
        "image_lens_turbo_t2i-1", "image_qwen_image_2512_with_2steps_lora-1",
        "api_kling_dual_characters_effects-1", "video_ltx2_i2v-1", "video_wan2_2_14B_t2v-1",
        "template_qwen_Image_2512_360_lora-1", "video_ltx2_3_i2v-1",
        "api_bytedance_image_to_video-1", "api_grok_imagine_image_quality_image_edit-2",
    ),
}  # fmt: skip
FILMS = {"tuning": "video_ltx2_3_id_lora-1", "judged": "video_ltx2_i2v-1"}
FILM_LOOK = "watercolor"
_HOLE = (0.0, 0.0, 66.0, 86.0)
# name, the ground's way, and those of the cut-outs over it
MOTIONS: tuple[tuple[str, Path, tuple[Path, ...]], ...] = (
    ("pan, slow", pan(0.7, 0.3), ()),
    ("pan", pan(2.3, 0.0), ()),
    ("pan, down", pan(0.0, -1.6), ()),
    ("pan, fast", pan(3.4, -1.9), ()),
    ("zoom in", zooming(0.72, 1.1), ()),
    ("zoom out", zooming(1.15, 0.7), ()),
    ("rotation", turning(0.9), ()),
    ("rotation and pan", turning(-0.5, 1.3), ()),
    ("hand", hand(5.0), ()),
    ("cut-out over a still ground", still, (pan(-2.1, 0.6),)),
    ("cut-out over a pan", pan(1.4, 0.4, 0.85), (pan(-1.7, -0.5),)),
    ("two cut-outs over a hand", hand(3.0),
     (lambda t: pan(-2.6, 0.0, 1.3)(t), lambda t: turning(1.2)(t) @ window(60.0, -50.0, 1.4))),
)  # fmt: skip
# looks are met with other motions in the other half
_FIRST = {"tuning": 5, "judged": 0}


def plans(half: str, moves: bool = True) -> list[Plan]:
    """Twelve, a look each: moving ones, or still scenes.

    Args:
        half: a key of HALVES.
    """
    photos, first = HALVES[half], _FIRST[half]
    made = []
    for i, (name, ground, cuts) in enumerate(MOTIONS):
        look = LOOKS[(i + first) % len(LOOKS)]
        if not moves:
            layers = [Layer(photos[(i + 3) % 12], still)]
            made.append(Plan(f"still, {look}", look, tuple(layers), False))
            continue
        layers = [Layer(photos[i], ground)]
        layers += [Layer(photos[12 + j + (i == 10)], path, _HOLE) for j, path in enumerate(cuts)]
        made.append(Plan(name, look, tuple(layers)))
    return made


@functools.cache
def clips(half: str, moves: bool = True, few: int = 12) -> list[Clip]:
    """The clips of a half; rendered once in a process (twelve take a minute and 1 GB).

    Args:
        moves: False for still scenes with a camera's noise.
        few: as many of the twelve, spread over them.
    """
    made, length = plans(half, moves), WARM + (FRAMES if moves else STILL) + 1
    return [Clip(made[i], 1000 + 100 * moves + i, length) for i in range(0, 12, max(1, 12 // few))]
