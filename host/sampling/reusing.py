"""Which frames a tick holds, for what a stream keeps of its network's inner blocks."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.blocks.schedule import At, Coming, Guest, Reuse
from ...engine.coherence.neighbours import Neighbours
from ...engine.fetch import Fetched
from ...engine.plan import Place
from ...engine.similarity import Sketch, sketch
from ...engine.work import Work
from ..models.flops import Uncountable, cost_of
from ..models.walk import is_inner, why_not
from .carry import colours

# ticks after which the node says what share of the network ran, and says it anew
_FIRST, _TOLD = 8, 32


class Looking:
    """Of one stream: the pictures of its frames in flight, and the share of the network that runs.

    Attributes:
        share: of the network's floating point operations, what ran in the newest ticks, 0 to 1; 1
            where they cannot be counted.
        told: the same in words, or for what share of the rows all of it ran.
    """

    def __init__(self) -> None:
        self.share, self.told = 1.0, "100% of the network"
        self._reuse: Reuse | None = None
        self._format: Any = None
        self._looks: dict[int, Sketch | Coming | None] = {}  # by the frames' numbers
        self._coming: list[tuple[Fetched, list[Coming]]] = []  # what the host has not seen yet
        self._newest: Sketch | None = None  # of what it has
        self._under: dict[int, tuple] = {}  # the same: the prompts of their steps so far
        self._inner: tuple[Any, float] = (None, 0.0)  # the share of the inner blocks, and of what
        self._uncounted = False
        self._ticks = 0

    def settle(self, reuse: Reuse | None, latent_format: Any) -> None:
        """What holds for the ticks of a run."""
        self._reuse, self._format = reuse, latent_format

    def begin(self, neighbours: Neighbours, work: Work, alone: bool) -> None:
        """Before a tick.

        Args:
            alone: its frame is sampled by itself, so ticks follow each other otherwise.
        """
        if self._reuse is None:
            return
        self._arrive()
        entering = [p.number for place in work.places if not place.k for p in place.payloads]
        if self._reuse.awake > 0 and work.source is not None:
            self._looks |= zip(entering, self._look(work.source), strict=True)
        self._under = {
            p.number: (*self._had(p.number, place.k), p.conditioning.prompt)
            for place in work.places
            for p in place.payloads
        }
        guests = guests_of(work.places, self._looks, self._under)
        # counted once, before the first frame and not while pictures are shown
        self._share_of_inner(neighbours, work)
        known = {guest.frame for guest in guests.values()}
        self._looks = {n: one for n, one in self._looks.items() if n in known}
        first = work.places[0]
        beat = first.payloads[0].number + first.k if alone else self._ticks
        neighbours.reusing.meet(guests, beat)

    def _look(self, latents: Tensor) -> Sequence[Sketch | Coming | None]:
        """How frames look that enter, [B, C, H, W] in the model's scale.

        CUDA comes to them after the tick before: waiting for that would leave it with nothing to
        do. So the host learns it when the next tick begins, always, and results do not depend on
        who was faster.
        """
        pictures = Fetched(((colours(latents, self._format) + 1) / 2).float())
        if not pictures.late:
            return sketches(pictures.read())
        coming = [Coming(self._newest) for _ in latents]
        self._coming.append((pictures, coming))
        return coming

    def _arrive(self) -> None:
        """What the tick before has sent."""
        for pictures, coming in self._coming:
            for one, self._newest in zip(coming, sketches(pictures.read()), strict=True):
                one.sketch = self._newest
        self._coming.clear()

    def _had(self, frame: int, steps: int) -> tuple:
        """The prompts of a frame's steps before; None where nobody was there to see."""
        had = self._under.get(frame, ())[:steps]
        return *[None] * (steps - len(had)), *had

    def done(self, neighbours: Neighbours) -> str:
        """The tick is done; returns what the node is to say from now on, if anything."""
        self._ticks += 1
        if self._reuse is None or (self._ticks % _TOLD and self._ticks != _FIRST):
            return ""
        known = neighbours.reusing
        rows, whole = known.ran if self._ticks % _TOLD else known.looked()
        self.share = 1 - self._inner[1] * (1 - whole / rows) if rows else 1.0
        self.told = f"{self.share:.0%} of the network"
        if self._uncounted:
            self.told = f"all of the network for {whole / rows if rows else 1:.0%} of the rows"
        line, why = f"{self.told} runs", known.why or neighbours.why
        return f"{line}: {why}" if why else line

    def _share_of_inner(self, neighbours: Neighbours, work: Work) -> None:
        unet, depth = neighbours.network(), neighbours.reusing.depth
        key = weakref.ref(unet), depth, tuple(work.buffers.shape[1:])
        if key == self._inner[0]:
            return
        share, self._uncounted = 0.0, False
        if not why_not(unet):
            shape = unet.in_channels, *key[2]
            tokens = work.places[0].payloads[0].conditioning.batch.tokens
            try:
                cost = cost_of(unet, shape, tokens)
                parts = [flops for name, flops in cost.parts.items() if is_inner(name, depth, unet)]
                share = sum(parts) / cost.whole
            except Uncountable:  # it is for a word on the node only
                self._uncounted = True
        self._inner = key, share


def guests_of(
    places: Sequence[Place], looks: dict[int, Sketch | Coming | None], under: dict[int, tuple]
) -> dict[At, Guest]:
    """The frames of a tick by where they are.

    Args:
        looks, under: by the frames' numbers, how they look and the prompts of their steps: a
            latent that began under another prompt is another.
    """
    return {
        (place.k, j): Guest(
            payload.number,
            (tuple(place.course.sigmas), under[payload.number], *_noise(place, payload)),
            looks.get(payload.number),
        )
        for place in places
        for j, payload in enumerate(place.payloads)
    }


def _noise(place: Place, payload: Any) -> tuple:
    """What a frame's noise is, as far as it is alike for other frames."""
    noise = place.noise
    return payload.drawn, place.course.add_noise, None if noise is None else noise.seed


def sketches(pictures: Tensor) -> list[Sketch | None]:
    """What the similarity filter would keep of pictures, [B, H, W, C]; None of one that is not
    finite."""
    return [sketch(one) if torch.isfinite(one).all() else None for one in pictures]
