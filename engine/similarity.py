"""Stochastic similarity filter: decides per frame if the pipeline runs (arXiv 2312.12491, 3.4).

The paper compares frames by the cosine of whole pictures, which depends on brightness: two
unrelated bright pictures count as alike, a grey scene with sensor noise as changed. The centred
measure here compares small, mean-centred, contrast-normalised versions block by block, and the
worst block counts, so that a small thing moving in a still scene is seen and sensor noise is not.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Measure = Literal["centred", "cosine"]
MEASURES: tuple[Measure, ...] = ("centred", "cosine")

GRID = 32  # side of the small version, in cells
BLOCK = 4  # side of a block, in cells
SENSOR_NOISE = 0.02  # standard deviation per pixel that counts as no change, pictures being 0..1
_FLOOR = 0.004  # contrast below which a picture is flat
_MARGIN = 2.0  # how far a block's noise may exceed its mean
_RELIT = 0.1  # change of mean brightness that is a light switched on or off


@dataclass(frozen=True)
class Sketch:
    """A frame as the measure sees it."""

    values: Tensor  # centred: [3, GRID, GRID]; cosine: the whole picture, flat
    noise: float = 0.0  # standard deviation that sensor noise leaves in a cell
    brightness: float = 0.0  # mean, 0..1; only centred looks at it


def sketch(frame: Tensor, measure: Measure = "centred") -> Sketch:
    """What is kept of a frame for comparing.

    Args:
        frame: [H, W, C], 0..1.
        measure: `centred` averages to 32 x 32 cells, `cosine` keeps every value in -1..1.
    """
    if measure == "cosine":
        return Sketch(frame.float().mul(2).sub(1).flatten().cpu())
    h, w = frame.shape[:2]
    picture = frame[..., :3].float().movedim(-1, 0)[None]
    cells = F.interpolate(picture, (GRID, GRID), mode="area")[0].cpu()
    per_cell = max(1.0, h * w / GRID**2)
    mean = cells.mean()
    return Sketch(cells - mean, SENSOR_NOISE / math.sqrt(per_cell), float(mean))


def score(a: Sketch, b: Sketch) -> float:
    """How alike two frames are, -1..1; 1 means the same up to brightness and sensor noise."""
    if a.values.shape != b.values.shape:
        return -1.0
    if a.noise == 0.0:
        return float(F.cosine_similarity(a.values, b.values, dim=0, eps=1e-8))
    noise, normal = 0.0, []
    for s in (a, b):
        scale = math.sqrt(float(s.values.square().mean()) + _FLOOR**2)
        normal.append(s.values / scale)
        noise += (s.noise / scale) ** 2
    energy = F.avg_pool2d((normal[0] - normal[1]).square().mean(0)[None, None], BLOCK)
    worst = max(0.0, float(energy.max()) - _MARGIN * noise)
    # for unit contrast, half the squared difference is one minus the correlation
    return max(-1.0, 1.0 - worst / 2)


def skip_probability(similarity: float, threshold: float) -> float:
    """Equation 9 of the paper: max(0, (s - eta) / (1 - eta)), in 0..1."""
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
        self._reference: Sketch | None = None
        self._previous: Sketch | None = None
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
        """
        sketches = [sketch(frame, measure) for frame in frames]
        known = self._reference is not None and self._shape == tuple(frames.shape)
        similarity = min(score(self._reference, s) for s in sketches) if known else -1.0
        chance = skip_probability(similarity, threshold)
        relit = known and abs(sketches[-1].brightness - self._reference.brightness) > _RELIT
        skip = (
            not relit
            and self._settling == 0
            and self._skipped < max_skip
            and self._random.random() < chance
            and not (chance < 1 and self._rests(sketches[-1], threshold))
        )
        return Decision(skip, chance < 1 or relit, similarity, sketches[-1])

    def _rests(self, newest: Sketch, threshold: float) -> bool:
        """A slight change was skipped by chance and now nothing moves: it would never be shown."""
        before = self._previous
        return before is not None and skip_probability(score(before, newest), threshold) == 1

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
