"""The conditioning of a frame, kept with it, and what one model call needs of several."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import torch

from . import control as controls

# what makes ComfyUI treat an entry by anything but its model_conds (get_area_and_mult)
PLAIN_EXCLUDES = frozenset({
    "area", "mask", "mask_strength", "strength", "timestep_start", "timestep_end",
    "control", "gligen", "hooks", "default",
})  # fmt: skip
_MUST_EQUAL = PLAIN_EXCLUDES - {"control", "mask"}
_SAME_FOR_EVERY_FRAME = (comfy.conds.CONDRegular, comfy.conds.CONDCrossAttn)

Conds = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Payload:
    """What travels with a frame: its conditioning and what an inpainting mask needs.

    Attributes:
        conds: ComfyUI's processed conditioning, per side, for a batch of frames.
        index: the frame's place in that batch.
        key: rows with equal keys are conditioned alike.
        ranges: noise levels (start, end) between which each gated entry acts.
        per_sigma: an entry looks at the noise level in a way that only equal levels can share.
        mask: where the frame is denoised, [1, 1 or C, H, W], or None for everywhere.
        noise: the noise the frame entered with, [1, C, H, W]; kept with a mask only.
        run: number of the run it entered in.
        simple: see Traits.
    """

    conds: Conds
    index: int
    key: tuple
    ranges: tuple[tuple[float, float], ...] = ()
    per_sigma: bool = False
    mask: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    run: int = 0
    simple: bool = False

    @property
    def controlled(self) -> bool:
        """True where a ControlNet acts."""
        return any("control" in entry for side in self.conds.values() for entry in side)

    def gate(self, sigma: float) -> tuple:
        """Rows whose gates are equal may share one ComfyUI call, which looks at its first row."""
        if self.per_sigma:
            return (sigma,)
        return tuple(end <= sigma <= start for start, end in self.ranges)

    def recondition(self, other: "Payload") -> "Payload":
        """The same frame under another frame's conditioning."""
        return Payload(
            other.conds, other.index, other.key, other.ranges, other.per_sigma,
            self.mask, self.noise, self.run, other.simple,
        )  # fmt: skip


def plain(conds: Conds) -> bool:
    """One ungated entry per side without area, mask, control, hooks: the fast path's condition."""
    return all(
        len(side) == 1 and not PLAIN_EXCLUDES & side[0].keys() and side[0].get("model_conds")
        for side in conds.values()
    )


def same_for_every_frame(conds: Conds) -> bool:
    """True where nothing in the conditioning belongs to one frame or one latent only."""
    for side in conds.values():
        for entry in side:
            if "mask" in entry and entry["mask"].shape[0] > 1:
                return False
            for c in controls.chain(entry.get("control")):
                if c.cond_hint_original is not None:
                    return False
            for cond in entry["model_conds"].values():
                constant = type(cond) is comfy.conds.CONDConstant
                if not constant and type(cond) not in _SAME_FOR_EVERY_FRAME:
                    return False
                if not constant and cond.cond.shape[0] != 1:
                    return False
    return True


@dataclass(frozen=True)
class Traits:
    """What is the same for all frames that come with one conditioning.

    Attributes:
        shared: nothing in it belongs to one frame only.
        names: tells it from others, where it is shared.
        ranges, per_sigma: see Payload.
        simple: one plain call serves its frames, whatever their slots.
    """

    shared: bool
    names: tuple
    ranges: tuple[tuple[float, float], ...]
    per_sigma: bool
    simple: bool


def traits(conds: Conds, model, per_sigma: bool) -> Traits:
    """Looks through a conditioning once.

    Args:
        conds: processed conditioning (comfy.samplers.process_conds).
        model: the BaseModel they were processed for.
        per_sigma: the model itself asks for calls of one noise level.

    Raises:
        ValueError: a hook is scheduled by keyframes.
    """
    entries = [entry for side in conds.values() for entry in side]
    per_sigma = per_sigma or any(_hooked(entry) for entry in entries)
    ranges = tuple(r for entry in entries for r in _ranges(entry, model))
    return Traits(
        same_for_every_frame(conds),
        tuple((side, tuple(e["uuid"] for e in entries)) for side, entries in conds.items()),
        ranges,
        per_sigma,
        plain(conds) and not ranges and not per_sigma,
    )


def payloads(conds: Conds, batch: int, known: Traits, serial: int) -> list[Payload]:
    """The payloads of a batch of frames that come with one conditioning.

    Args:
        batch: number of frames B.
        known: its traits.
        serial: number of this run, which tells conditionings of different runs apart.
    """
    return [
        Payload(
            conds, i, known.names if known.shared else (*known.names, serial, i), known.ranges,
            known.per_sigma, run=serial, simple=known.simple,
        )
        for i in range(batch)
    ]  # fmt: skip


def _hooked(entry: dict[str, Any]) -> bool:
    """True for an entry with hooks, whose weights ComfyUI applies to one noise level at a time."""
    group = entry.get("hooks")
    if group is None:
        return False
    for hook in group.hooks:
        if len(hook.hook_keyframe.keyframes) > 1:
            # comfy.hooks steps through keyframes in one direction, and slots need all at once
            raise ValueError(
                "guider: its conditioning has hooks scheduled by keyframes, which cannot be "
                "streamed because every slot is at another step. Use one strength for the hook, "
                "or conditioning with start and end percent."
            )
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


def merge(rows: Sequence[Payload], model) -> Conds | None:
    """The conditioning of a batch whose row r is rows[r], or None where one call cannot hold it."""
    sides = rows[0].conds.keys()
    if any(p.conds.keys() != sides for p in rows):
        return None
    indices = [p.index for p in rows]
    out: Conds = {}
    for side in sides:
        merged = merge_entries([p.conds[side] for p in rows], indices, model)
        if merged is None:
            return None
        out[side] = merged
    return out


def merge_entries(
    rows: Sequence[list[dict[str, Any]]], indices: Sequence[int], model
) -> list[dict[str, Any]] | None:
    """The same for one side: rows[r] is the entry list of row r."""
    if any(len(entries) != len(rows[0]) for entries in rows):
        return None
    out = []
    for level in range(len(rows[0])):
        merged = _merge_entry([entries[level] for entries in rows], indices, model)
        if merged is None:
            return None
        out.append(merged)
    return out


def _merge_entry(rows: list[dict[str, Any]], indices, model) -> dict[str, Any] | None:
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
        if any(not pieces[0].can_concat(p) for p in pieces[1:]):
            return None
        out["model_conds"][name] = pieces[0]._copy_with(pieces[0].concat(pieces[1:]))
    return out


def _row(tensor: torch.Tensor, index: int) -> torch.Tensor:
    i = index % tensor.shape[0]
    return tensor[i : i + 1]


def _one(cond, index: int):
    """A cond of one frame out of a cond of a batch (as repeat_to_batch_size would repeat it)."""
    if isinstance(cond.cond, torch.Tensor):
        return cond._copy_with(_row(cond.cond, index))
    if isinstance(cond, comfy.conds.CONDList):
        return cond._copy_with([_row(c, index) for c in cond.cond])
    return cond


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a is b or a == b
