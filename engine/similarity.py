"""Stochastic similarity filter: decides per frame if the pipeline runs (arXiv 2312.12491).

The paper compares frames by the cosine of whole pictures, which depends on brightness: two
unrelated bright pictures count as alike, a grey scene with sensor noise as changed. The centred
measure here compares small, mean-centred, contrast-normalised versions block by block, less what
noise explains; the worst block counts, so that a small thing moving in a still scene is seen.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import likeness, picture_out
from .devices import pooled

Measure = Literal["centred", "cosine"]
MEASURES: tuple[Measure, ...] = ("centred", "cosine")

GRID = 64  # cells along the longer side, at most
CELL = 4  # pixels along a cell, at least: its mean has a quarter of the sensor noise
BLOCK = 4  # side of a block, in cells
MAX_NOISE = 0.03  # standard deviation per pixel above which noise is texture, pictures being 0..1
_CODEC = 0.0025  # the same for what compression and 8 bits make of a still cell
_FLAT = 0.02  # contrast (standard deviation) below which a picture counts as flat
_MARGIN = 3.0  # how far the noise of the noisiest block may exceed the mean
_RELIT = 0.1  # change of mean brightness that is a light switched on or off


class View(NamedTuple):
    """One small version of a frame."""

    values: Tensor  # [3, h, w], centred and of unit contrast; for cosine the whole picture
    noise: float = 0.0  # variance that noise makes in a value


@dataclass(frozen=True)
class Sketch:
    """A frame as the measure sees it: on the CPU, for cosine where the frame is."""

    views: tuple[View, ...]
    light: float = 0.0  # mean brightness


def sketch(frame: Tensor, measure: Measure = "centred") -> Sketch:
    """What is kept of a frame for comparing.

    Args:
        frame: [H, W, C], 0..1, any device; channels after the third are not looked at.
        measure: `centred` keeps the means of up to 64 x 64 cells and the middle pixel of each:
            means see small steps, pixels see texture that means wash out. `cosine` keeps every
            value: on a GPU in 8 bits and there, else in -1..1, flat.
    """
    if measure == "cosine" and frame.is_cuda:
        return on_device(frame)
    if measure == "cosine":
        return Sketch((View(frame.float().mul(2).sub(1).flatten()),))
    h, w = frame.shape[:2]
    cell = max(CELL, math.ceil(max(h, w) / GRID))
    frame = frame[..., :3]
    rows, columns = max(1, h // cell), max(1, w // cell)
    ys, xs = _middles(h, rows), _middles(w, columns)
    picture = frame.float().movedim(-1, 0)[None]
    means = pooled(picture, (rows, columns))[0].cpu()
    pixels = _around(frame, ys, xs, 0)[0, :, 0].movedim(-1, 0)
    noise = _noise(frame, ys[::2], xs[::2]) ** 2
    views = _view(means, noise * rows * columns / (h * w)), _view(pixels, noise)
    return Sketch(views, float(means.nan_to_num().mean()))


def on_device(frame: Tensor) -> Sketch:
    """For cosine: the frame in 8 bits where it is, to be compared there (kernels.likeness)."""
    return Sketch((View(picture_out(frame[None], "BHWC", 255.0, 0.0)[0]),))


def score(a: Sketch, b: Sketch) -> float:
    """How alike two frames are, -1..1; 1 means the same up to brightness and sensor noise."""
    if len(a.views) != len(b.views):
        return -1.0
    worst = 0.0
    for old, new in zip(a.views, b.views, strict=True):
        if old.values.shape != new.values.shape:
            return -1.0
        if old.values.device != new.values.device:
            return -1.0
        if old.values.dtype == torch.uint8:
            return float(likeness(old.values, new.values)[0])
        if old.values.ndim == 1:
            return float(F.cosine_similarity(old.values, new.values, dim=0, eps=1e-8))
        energy = (new.values - old.values).square().mean(0)
        block = [min(BLOCK, side) for side in energy.shape]
        energy = F.avg_pool2d(energy[None, None], block, stride=BLOCK // 2)
        # all of it counts from one and a half times the floor, so that the score knows no noise
        floor = _MARGIN * (old.noise + new.noise)
        counted = energy * (2 * (energy / floor - 1)).clamp(0, 1)
        worst = max(worst, float(counted.max()))
    # for unit contrast, half the squared difference is one minus the correlation
    return max(-1.0, 1.0 - worst / 2)


def correlation(a: Sketch, b: Sketch) -> float:
    """How alike two frames are as wholes, -1..1, for sketches of the centred measure.

    `score` counts the worst block and falls to -1 with any motion; this falls slowly with motion,
    and at once where the scene, or its light, is another.
    """
    (old, *_), (new, *_) = a.views, b.views
    if old.values.shape != new.values.shape or abs(a.light - b.light) > _RELIT:
        return -1.0
    # for unit contrast, half the squared difference is one minus the correlation
    return max(-1.0, 1.0 - float((new.values - old.values).square().mean()) / 2)


def _view(values: Tensor, noise: float) -> View:
    values = values.nan_to_num()
    centred = values - values.mean()
    contrast = max(float(centred.square().mean()), _FLAT**2)
    return View(centred / math.sqrt(contrast), (noise + _CODEC**2) / contrast)


def _middles(size: int, count: int) -> Tensor:
    return ((torch.arange(count) + 0.5) * (size / count)).long()


def _around(frame: Tensor, ys: Tensor, xs: Tensor, reach: int) -> Tensor:
    """Pixels of [H, W, C] at every (y, x) and around it: [2 reach + 1, ny, 2 reach + 1, nx, C]."""
    h, w, channels = frame.shape
    off = torch.arange(-reach, reach + 1)[:, None]
    rows, columns = (off + ys) % h, (off + xs) % w
    # one flat index, so that a frame on a GPU is read by one small copy
    at = (rows[:, :, None, None] * w + columns).to(frame.device)
    return frame.reshape(h * w, channels)[at].float().cpu()


def _noise(frame: Tensor, ys: Tensor, xs: Tensor) -> float:
    """Standard deviation of the noise per pixel: Immerkaer 1996, by the median to skip edges."""
    stencil = torch.tensor([1.0, -2.0, 1.0])
    second = torch.einsum("yixjc,y,x->ijc", _around(frame, ys, xs, 1), stencil, stencil)
    return min(float(second.abs().median()) / (6 * 0.6745), MAX_NOISE)


def skip_probability(similarity: float, threshold: float) -> float:
    """The paper's max(0, (s - eta) / (1 - eta)), in 0..1."""
    if threshold >= 1.0:
        return 0.0
    return min(1.0, max(0.0, (similarity - threshold) / (1.0 - threshold)))


@dataclass(frozen=True)
class Decision:
    """What the filter found about a batch of frames."""

    skip: bool
    changed: bool  # by more than noise: once it has run, what follows must settle
    similarity: float
    newest: Sketch


class SimilarityFilter:
    """State of one filter. `decide` looks, `commit` makes it so; a frame that failed is not kept.

    Args:
        seed: of the filter's own random numbers.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._random = random.Random(seed)
        self._reference: Sketch | None = None  # of the frame processed last
        self._previous: Sketch | None = None  # of the frame before this one
        self._shape: tuple[int, ...] | None = None
        self._skipped = 0
        self._settling = 0

    def decide(
        self,
        frames: Tensor,
        threshold: float = 0.98,
        max_skip: int = 10,
        measure: Measure = "centred",
    ) -> Decision:
        """Whether frames need the pipeline.

        Args:
            frames: [B, H, W, C], 0..1; a batch is skipped only as a whole.
            threshold: eta; frames less alike always run.
            max_skip: the most frames skipped in a row.

        Raises:
            ValueError: no frame.
        """
        if frames.ndim != 4 or 0 in frames.shape:
            raise ValueError(
                f"image: expected frames (batch, height, width, channels), got the shape "
                f"{tuple(frames.shape)}. Connect a camera or an image."
            )
        sketches = [sketch(frame, measure) for frame in frames]
        newest = sketches[-1]
        if self._reference is None or self._shape != tuple(frames.shape):
            return Decision(False, True, -1.0, newest)
        similarity = min(score(self._reference, s) for s in sketches)
        relit = abs(newest.light - self._reference.light) > _RELIT
        # noise never leaves the centred measure below 1
        same = 1.0 if measure == "centred" else threshold
        changed = similarity < same or relit
        skip = (
            not relit
            and self._settling == 0
            and self._skipped < max_skip
            and self._random.random() < skip_probability(similarity, threshold)
            # a slight change was skipped by chance, and it stands still again: catch up
            and not (changed and score(self._previous, newest) >= same)
        )
        return Decision(skip, changed, similarity, newest)

    def commit(self, decision: Decision, frames: Tensor, settle: int = 3) -> None:
        """The decision was carried out.

        Args:
            decision: from `decide` for these frames.
            settle: frames that still run after the last changed one, so that the stream batch
                shows it; n - 1 are enough for n slots.
        """
        self._previous = decision.newest
        if decision.skip:
            self._skipped += 1
            return
        self._skipped = 0
        self._settling = settle if decision.changed else max(0, self._settling - 1)
        self._reference, self._shape = decision.newest, tuple(frames.shape)

    def renew(self) -> None:
        """Let the next frame run as a changed one: what processes it has changed."""
        self._reference = None
