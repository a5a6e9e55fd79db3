"""Conditioning that knows which frame it is of: nobody is handed the batch it came in.

ComfyUI processes the conditioning of all frames of a run at once, and an entry may hold a prompt,
a mask, a hint for each of them. A frame's Conditioning is its place in that Batch; `together` makes
of any frames what one call takes, row by row in the order given.
"""

import copy
import functools
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ..models import looks
from . import control as controls
from . import told

Entries = list[dict[str, Any]]
Sides = dict[str, Entries]  # as guiders keep them

# what makes ComfyUI treat an entry by anything but its model_conds (get_area_and_mult)
_ACTING = frozenset({
    "area", "mask", "mask_strength", "strength", "timestep_start", "timestep_end",
    "control", "gligen", "hooks", "default",
})  # fmt: skip
_MUST_EQUAL = _ACTING - {"control", "mask"}
_SAME_FOR_EVERY_FRAME = (comfy.conds.CONDRegular, comfy.conds.CONDCrossAttn)
_KEPT = 16  # joint conditionings of rows that are kept
_numbers = itertools.count()


class Batch:
    """Processed conditioning of the frames of one run (comfy.samplers.process_conds).

    Args:
        sides: of a guider, by name.
        model: the BaseModel it was processed for.
        shape: of the run's latents, [B, C, H, W].
        of_latents: the model took something of it from the run's latents or seed.
        edition: tells it from one of the same entries before somebody changed them.

    Attributes:
        look, why: what in it looks at most of a call, and what that is.
        ranges: noise levels (start, end) between which each gated entry acts.
        plain: one ungated entry per side with nothing but model_conds.
        of_latents: see Args.
        shared: nothing in it belongs to one frame only.
        direct: one plain call serves its frames, whatever their slots.
        names: the sides' names.
    """

    def __init__(
        self, sides: Sides, model, shape: Sequence[int], of_latents: bool, edition: int
    ):
        self._sides, self._count, self._first = sides, shape[0], 0
        self.of_latents = of_latents
        entries = [entry for side in sides.values() for entry in side]
        self.names = frozenset(sides)
        self.look, self.why = looks.most(f for e in entries for f in looks.of_entry(e))
        self.ranges = tuple(r for entry in entries for r in _ranges(entry, model))
        self.plain = is_plain(sides)
        self.direct = self.plain and not self.ranges and not self.look
        self.shared = not of_latents and all(map(_same_for_every_frame, entries))
        if self.shared:
            # in the next run it may be the same conditioning again
            named = tuple((side, *[e["uuid"] for e in es]) for side, es in sides.items())
            self._key: tuple = (_number(tuple(shape[1:]), edition, named),)
            self._any = Conditioning(self, 0, self._key)
        else:
            self._key = (next(_numbers),)

    def only(self, index: int, own: "Batch") -> "Batch":
        """The batch of a run with frame `index` alone, whose own conditioning is `own`."""
        if self.shared:
            return own
        out = copy.copy(self)
        out._first = index
        return out

    def frame(self, index: int) -> "Conditioning":
        """Of frame `index` of the run, 0 <= index < B."""
        if self.shared:
            return self._any
        index += self._first
        return Conditioning(self, index, (*self._key, index))

    @functools.cached_property
    def _prompts(self) -> tuple:
        """Of all entries, and of how many frames they are."""
        sides = sorted(self._sides.items())
        entries = [entry for _, entries in sides for entry in entries]
        own = tuple((side, *map(told.asked, entries)) for side, entries in sides)
        return own, max(map(told.rows, entries), default=1)

    @property
    def tokens(self) -> int:
        """Of the longest prompt."""
        entries = [entry for entries in self._sides.values() for entry in entries]
        known = [e["cross_attn"].shape[1] for e in entries if e.get("cross_attn") is not None]
        return max(known, default=1)

    def _whole(self) -> Sides | None:
        """As ComfyUI gave it, where it holds for every frame that it is asked for."""
        return self._sides if self.shared or self._count == 1 else None


@functools.lru_cache(256)
def _number(shape: tuple[int, ...], edition: int, named: tuple) -> int:
    """Of a conditioning that is the same for every frame: a short name for its entries' ids."""
    return next(_numbers)


@dataclass(eq=False, slots=True)
class Conditioning:
    """The conditioning of one frame; those of equal keys are alike."""

    batch: Batch
    index: int
    key: tuple
    _sides: Sides | None = None  # for the frame by itself: a control counts its steps

    @property
    def prompt(self) -> tuple:
        """Tells what it asks of the network from others, but for pictures of its frame (told)."""
        own, count = self.batch._prompts
        return own, self.index % count

    def alone(self, model) -> Sides:
        """For the frame by itself, in the run it came with.

        Raises:
            ValueError: it cannot be taken out of its batch.
        """
        if self._sides is None:
            whole = self.batch._whole()
            self._sides = _joined([self], model).sides if whole is None else whole
        return self._sides

    def gate(self, sigma: float) -> tuple:
        """Rows whose gates are equal may share one ComfyUI call, which looks at its first row."""
        return tuple(end <= sigma <= start for start, end in self.batch.ranges)


@dataclass(eq=False)
class Joint:
    """The conditioning of the rows of one call, in their order.

    Attributes:
        sides: what a guider takes.
        rows: how many they are; None where any number of rows is conditioned alike.
        plain: see Batch.
        heavy: it holds pictures on the device.
        prepared: of model calls, by what they ask (evaluate.prepared).
    """

    sides: Sides
    rows: int | None
    plain: bool
    heavy: bool = False
    prepared: dict[tuple, Any] = field(default_factory=dict)

    def flipped(self, at: slice) -> "Joint":
        """The negative side of the rows `at` in place of the positive one; of a plain joint."""
        negative, rows = self.sides["negative"], None
        if self.rows is not None:
            picked = range(self.rows)[at]
            rows, negative = len(picked), merge_entries([negative] * len(picked), picked, None)
        return Joint({"positive": negative}, rows, True)


class Joints:
    """Joint conditionings of one stream, kept for the next tick that asks for the same rows."""

    def __init__(self):
        self._known: OrderedDict[tuple, Joint | None] = OrderedDict()

    def clear(self) -> None:
        """Forget them: the model is another."""
        self._known.clear()

    def together(self, frames: Sequence[Conditioning], model) -> Joint | None:
        """What one call for these rows takes, or None where they need several calls.

        Raises:
            ValueError: see Conditioning.alone.
        """
        first = frames[0]
        shared = first.batch.shared and all(f is first or f.key == first.key for f in frames)
        if shared:
            frames = [first]
        key = (shared, *[f.key for f in frames])
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        joint = _joined(frames, model)
        if shared:
            joint = replace(joint, rows=None)
        elif joint is None or joint.heavy:
            return joint
        self._known[key] = joint
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return joint

    def split(
        self, frames: Sequence[Conditioning], index: Sequence[int], model
    ) -> list[tuple[list[int], Joint]]:
        """Rows that may share a call each, by their places `index`, with its conditioning."""
        whole = self.together(frames, model)
        if whole is not None:
            return [(list(index), whole)]
        by_key: dict[tuple, list[int]] = {}
        for j, frame in enumerate(frames):
            by_key.setdefault(frame.key, []).append(j)
        return [
            ([index[j] for j in rows], self.together([frames[j] for j in rows], model))
            for rows in by_key.values()
        ]


def is_plain(sides: Sides) -> bool:
    """One ungated entry per side without area, mask, control, hooks."""
    return all(
        len(side) == 1 and not _ACTING & side[0].keys() and side[0].get("model_conds")
        for side in sides.values()
    )


def _joined(frames: Sequence[Conditioning], model) -> Joint | None:
    """None only where the frames differ."""
    first = frames[0]
    whole = first.batch._whole() if len(frames) == 1 else None
    controlled = any("control" in e for es in first.batch._sides.values() for e in es)
    # controls are copied even for one row: ComfyUI cleans a run's own up at its end
    if whole is not None and not controlled:
        return Joint(whole, 1, first.batch.plain)
    names = first.batch._sides.keys()
    if any(f.batch._sides.keys() != names for f in frames):
        return None
    indices = [f.index for f in frames]
    out: Sides = {}
    for side in names:
        merged = merge_entries([f.batch._sides[side] for f in frames], indices, model)
        if merged is None:
            break
        out[side] = merged
    else:
        return Joint(out, len(frames), is_plain(out), heavy=controlled)
    if any(f.key != first.key for f in frames):
        return None
    if whole is None and first.batch._whole() is None:
        raise ValueError(
            "guider: its conditioning holds something for several frames at once that cannot be "
            "taken apart (a ControlNet without a picture, or one of another pack). Send one frame "
            "per run, or give every frame the same."
        )
    return Joint(first.batch._sides, len(frames), first.batch.plain, heavy=controlled)


def merge_entries(rows: Sequence[Entries], indices: Sequence[int], model) -> Entries | None:
    """One side of a call: row r is conditioned by frame indices[r] of the entries rows[r]."""
    if any(len(entries) != len(rows[0]) for entries in rows):
        return None
    out = []
    for level in range(len(rows[0])):
        merged = _merge_entry([entries[level] for entries in rows], indices, model)
        if merged is None:
            return None
        out.append(merged)
    return out


def _merge_entry(rows: Entries, indices: Sequence[int], model) -> dict[str, Any] | None:
    newest = rows[0]
    for other in rows[1:]:
        if other["model_conds"].keys() != newest["model_conds"].keys():
            return None
        if ("control" in other) != ("control" in newest) or ("mask" in other) != ("mask" in newest):
            return None
        if any(not _equal(other.get(k), newest.get(k)) for k in _MUST_EQUAL):
            return None
    out = dict(newest)
    if "control" in newest:
        out["control"] = controls.stack([e["control"] for e in rows], indices, model)
        if out["control"] is None:
            return None
    if "mask" in newest:
        out["mask"] = torch.cat([_row(e["mask"], i) for e, i in zip(rows, indices, strict=True)])
    out["model_conds"] = {}
    for name in newest["model_conds"]:
        pieces = [_one(e["model_conds"][name], i) for e, i in zip(rows, indices, strict=True)]
        if any(type(p) is not type(pieces[0]) or not pieces[0].can_concat(p) for p in pieces[1:]):
            return None
        out["model_conds"][name] = pieces[0]._copy_with(pieces[0].concat(pieces[1:]))
    return out


def _row(tensor: Tensor, index: int) -> Tensor:
    """Of frame `index`, as ComfyUI's repeat_to_batch_size spreads a batch."""
    i = index % tensor.shape[0]
    return tensor[i : i + 1]


def _one(cond, index: int):
    """A cond of one frame out of a cond of a batch."""
    if isinstance(cond, comfy.conds.CONDConstant):
        return cond
    if isinstance(cond, comfy.conds.CONDList):
        return cond._copy_with([_row(c, index) for c in cond.cond])
    return cond._copy_with(_row(cond.cond, index))


def _equal(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or a == b


def _same_for_every_frame(entry: dict[str, Any]) -> bool:
    """True where nothing in the entry belongs to one frame or one latent only."""
    if "mask" in entry and entry["mask"].shape[0] > 1:
        return False
    for control in controls.chain(entry.get("control")):
        if not controls.same_for_every_frame(control):
            return False
    for cond in entry["model_conds"].values():
        if type(cond) is comfy.conds.CONDConstant:
            continue
        if type(cond) not in _SAME_FOR_EVERY_FRAME or cond.cond.shape[0] != 1:
            return False
    return True


def _ranges(entry: dict[str, Any], model) -> list[tuple[float, float]]:
    out = []
    if "timestep_start" in entry or "timestep_end" in entry:
        start, end = entry.get("timestep_start"), entry.get("timestep_end")
        out.append((
            float("inf") if start is None else float(start),
            0.0 if end is None else float(end),
        ))  # fmt: skip
    for c in controls.chain(entry.get("control")):
        low, high = c.timestep_percent_range
        to_sigma = model.model_sampling.percent_to_sigma
        out.append((float(to_sigma(low)), float(to_sigma(high))))
    return out
