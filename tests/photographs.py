"""Real photographs seen by a camera that moves as told, for what looks at motion."""

import functools
import importlib.util
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from pictures import picture
from PIL import Image

HELD_OUT = pathlib.Path(__file__).resolve().parents[1] / "demo" / "held_out.txt"
SIDE = 384  # of the scene, so that a camera of 256 pixels can move


@functools.cache
def scene(number: int) -> torch.Tensor:
    """[384, 384, 3] in 0..1: a held-out preview of ComfyUI's template packages (MIT), or where
    they are not installed a drawn scene."""
    found = _previews()
    if not found:
        return torch.from_numpy(picture(number, SIDE, SIDE)).float() / 255
    with Image.open(found[number % len(found)]) as opened:
        photograph = opened.convert("RGB")
    short = min(photograph.size)
    x, y = ((side - short) // 2 for side in photograph.size)
    cropped = photograph.crop((x, y, x + short, y + short)).resize((SIDE, SIDE), Image.LANCZOS)
    return torch.from_numpy(np.array(cropped)).float() / 255


@functools.cache
def _previews() -> list[pathlib.Path]:
    spec = importlib.util.find_spec("comfyui_workflow_templates_media_image")
    if spec is None:
        return []
    folder = pathlib.Path(spec.submodule_search_locations[0]).parent
    named = HELD_OUT.read_text(encoding="utf-8").split()
    paths = {p.stem: p for p in folder.glob("comfyui_workflow_templates_media_*/**/*.webp")}
    # x-1 and x-2 are one scene before and after
    scenes = {name.rsplit("-", 1)[0]: paths[name] for name in named if name in paths}
    return list(scenes.values())


def places(side: int) -> torch.Tensor:
    """x and y of each pixel from the middle, [side, side, 2]."""
    at = torch.arange(side) - (side - 1) / 2
    return torch.stack([at.expand(side, side), at[:, None].expand(side, side)], -1)


def turn(zoom: float, angle: float) -> torch.Tensor:
    c, s = math.cos(angle) / zoom, math.sin(angle) / zoom
    return torch.tensor([[c, -s], [s, c]])


def seen(of: torch.Tensor, x=0.0, y=0.0, zoom=1.0, angle=0.0, side=256) -> torch.Tensor:
    """What a camera at (x, y) pixels from the middle of a scene sees, [side, side, 3]."""
    at = places(side) @ turn(zoom, angle).T + torch.tensor([x, y], dtype=torch.float32)
    grid = at[None] / (of.shape[0] / 2)
    picture = of.movedim(-1, 0)[None]
    out = F.grid_sample(picture, grid, "bicubic", "reflection", align_corners=False)
    return out[0].movedim(0, -1).clamp(0, 1)


def flow_from_rest(x=0.0, y=0.0, zoom=1.0, angle=0.0, side=256) -> torch.Tensor:
    """Where each pixel of such a view was in the one at rest, less where it is, [2, side, side]."""
    now = places(side)
    before = now @ turn(zoom, angle).T + torch.tensor([x, y], dtype=torch.float32)
    return (before - now).movedim(-1, 0)


def noisy(picture: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    """With a sensor's noise."""
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return (picture + sigma * noise).clamp(0, 1)


def disc(x: float, y: float, radius: float, side=256) -> torch.Tensor:
    """Inside of a disc around (x, y) from the middle, [side, side]."""
    at = places(side) - torch.tensor([x, y], dtype=torch.float32)
    return at.square().sum(-1) < radius**2
