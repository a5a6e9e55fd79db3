"""ComfyUI's UNet run by a plan of blocks per row.

This is what UNetModel._forward does (comfy/ldm/modules/diffusionmodules/openaimodel.py), with fewer
rows where the plan says so. Its patches, a ControlNet's residuals and the options of a call go with
the rows.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    ResBlock,
    UNetModel,
    VideoResBlock,
    apply_control,
    forward_timestep_embed,
    timestep_embedding,
)
from torch import Tensor

from ...engine.blocks.plan import BlockPlan, Split
from ...engine.blocks.rows import lying_as, pick
from . import looks

_FILE = "comfy/ldm/modules/diffusionmodules/openaimodel.py"
Options = dict[str, Any]
# options of a call whose rows are told, for the rows of an index
Narrow = Callable[[Options, Tensor], Options]

_bodies: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, torch.nn.Module]]
_bodies = weakref.WeakKeyDictionary()
_films: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


def why_not(unet: torch.nn.Module) -> str:
    """Why a network cannot be run by a plan, for people; empty where it can."""
    kind = type(unet).__name__
    if not isinstance(unet, UNetModel):
        return f"{kind} is no UNet of the SD1.5, SD2.1 and SDXL families"
    if looks.file_of(getattr(type(unet), "_forward", None)) != _FILE or "_forward" in vars(unet):
        return f"a pack has replaced what {kind} does in a call"
    if _is_for_films(unet):
        return f"{kind} is made for films, whose frames are not rows of their own"
    if unet.predict_codebook_ids or len(unet.input_blocks) != len(unet.output_blocks):
        return f"{kind} has not one output block for each input block"
    return ""


def _is_for_films(unet: UNetModel) -> bool:
    """Asked in every call, and found by looking through all parts once."""
    if unet not in _films:
        kinds = VideoResBlock | SpatialVideoTransformer
        _films[unet] = any(isinstance(part, kinds) for part in unet.modules())
    return _films[unet]


def blocks(unet: UNetModel) -> list[tuple[str, int, torch.nn.Module]]:
    """The blocks in the order of a call: side, number, and the block itself."""
    middle = [] if unet.middle_block is None else [("middle", 0, unet.middle_block)]
    return [
        *(("input", i, block) for i, block in enumerate(unet.input_blocks)),
        *middle,
        *(("output", i, block) for i, block in enumerate(unet.output_blocks)),
    ]


def bodies(unet: UNetModel) -> dict[str, torch.nn.Module]:
    """What rows may pass by, by name ("output.3.1": side, number of the block, place in it), in the
    order of a call: residual blocks, of which the shortcut and any resampling stay, and blocks of
    attention."""
    if unet not in _bodies:
        _bodies[unet] = {
            f"{side}.{number}.{i}": part
            for side, number, block in blocks(unet)
            for i, part in enumerate(block)
            if isinstance(part, ResBlock | SpatialTransformer)
        }
    return _bodies[unet]


def is_inner(name: str, depth: int, unet: UNetModel) -> bool:
    """Whether a block or body is one of the inner ones (engine.blocks.plan.Kept)."""
    side, number, *_ = name.split(".")
    if side == "input":
        return int(number) > depth
    return side == "middle" or int(number) < len(unet.output_blocks) - 1 - depth


def narrowed(options: Options, index: Tensor) -> Options:
    """The options of a call for some of its rows; labels stay, as every label keeps as many."""
    out = dict(options)
    sigmas, rows = options.get("sigmas"), (options.get("original_shape") or [0])[0]
    if isinstance(sigmas, Tensor) and sigmas.ndim and sigmas.shape[0] == rows:
        out["sigmas"] = sigmas.index_select(0, index)
    if "original_shape" in options:
        out["original_shape"] = [index.shape[0], *options["original_shape"][1:]]
    return out


@dataclass
class _Rows:
    """What goes with the rows on their way.

    Attributes:
        index: of the call's rows; None for all.
    """

    x: Tensor
    timesteps: Tensor
    emb: Tensor
    context: Tensor | None
    y: Tensor | None
    options: Options
    narrow: Narrow
    index: Tensor | None = None

    def only(self, index: Tensor) -> "_Rows":
        def some(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[0] == 1 else pick(t, index)

        at = index if self.index is None else self.index.index_select(0, index)
        return replace(
            self, x=some(self.x), timesteps=some(self.timesteps), emb=some(self.emb),
            context=some(self.context), y=some(self.y), options=self.narrow(self.options, index),
            index=at,
        )  # fmt: skip

    def through(self, parts: Sequence[torch.nn.Module], h: Tensor, shape: Any = None) -> Tensor:
        return forward_timestep_embed(
            parts, h, self.emb, self.context, self.options, shape, time_context=None,
            num_video_frames=None, image_only_indicator=None,
        )  # fmt: skip


def walk(
    unet: UNetModel, plan: BlockPlan, x: Tensor, timesteps: Tensor, context: Tensor | None = None,
    y: Tensor | None = None, control: dict[str, Any] | None = None, options: Options | None = None,
    narrow: Narrow = narrowed,
) -> Tensor:  # fmt: skip
    """The network's output, [R, C, H, W], as UNetModel._forward gives it where the plan is empty.

    Args:
        x: scaled latents, [R, C, H, W].
        control: a ControlNet's residuals in ComfyUI's lists, which are consumed.
        options: transformer_options of the call.
        narrow: gives those for some of the rows.
    """
    return _Walk(unet, plan, control, x, narrow).go(timesteps, context, y, options or {})


class _Walk:
    def __init__(self, unet: UNetModel, plan: BlockPlan, control, x: Tensor, narrow: Narrow):
        self.unet, self.plan, self.control, self.x = unet, plan, control, x
        self.narrow = narrow

    def go(self, timesteps: Tensor, context: Tensor | None, y: Tensor | None, options: Options):
        unet, x, kept = self.unet, self.x, self.plan.kept
        options["original_shape"] = list(x.shape)
        options["transformer_index"] = 0
        self.patches = options.get("patches", {})
        if (y is None) != (unet.num_classes is None):
            raise ValueError("a model of classes is to be given y, and no other")
        emb = timestep_embedding(timesteps, unet.model_channels, repeat_only=False).to(x.dtype)
        emb = unet.time_embed(emb)
        for patch in self.patches.get("emb_patch", ()):
            emb = patch(emb, unet.model_channels, options)
        if unet.num_classes is not None:
            emb = emb + unet.label_emb(y)
        every = _Rows(x, timesteps, emb, context, y, options, self.narrow)
        count = len(unet.input_blocks)
        first = count if kept is None else kept.depth + 1
        last = 0 if kept is None else count - first
        h, skips = self._down(every, x, range(first))
        if kept is None:
            h = self._middle(every, h)
        else:
            h = kept.take(self._inner(every, h, first, last, skips[-1].shape))
            # what ticks that are not led have kept is contiguous, and the norms behind it would be
            h = lying_as(h, skips[-1])
        h = self._up(every, h, skips, range(last, count), None)
        return unet.out(h.type(x.dtype))

    def _inner(
        self, every: _Rows, h: Tensor, first: int, last: int, shape: torch.Size
    ) -> Tensor | None:
        """What the rows that run the inner blocks come out with, in the height and width of
        `shape`."""
        count, whole = len(self.unet.input_blocks), self.plan.kept.whole
        if whole.shape[0] == 0:
            for side, times in (("input", count - first), ("middle", 1), ("output", last)):
                for _ in range(times):
                    self._residual(side)
            every.options["transformer_index"] += sum(
                isinstance(part, SpatialTransformer) and is_inner(name, first - 1, self.unet)
                for name, part in bodies(self.unet).items()
            )
            return None
        some = every
        if whole.shape[0] < h.shape[0]:
            some, h = every.only(whole), h.index_select(0, whole)
        h, skips = self._down(some, h, range(first, count))
        h = self._middle(some, h)
        h = self._up(some, h, skips, range(last), shape)
        every.options["transformer_index"] = some.options["transformer_index"]
        return h

    def _down(self, rows: _Rows, h: Tensor, numbers: range) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for number in numbers:
            rows.options["block"] = ("input", number)
            h = self._block(rows, h, "input", number, self.unet.input_blocks[number])
            h = self._controlled(rows, h, "input")
            for patch in self.patches.get("input_block_patch", ()):
                h = patch(h, rows.options)
            skips.append(h)
            for patch in self.patches.get("input_block_patch_after_skip", ()):
                h = patch(h, rows.options)
        return h, skips

    def _middle(self, rows: _Rows, h: Tensor) -> Tensor:
        rows.options["block"] = ("middle", 0)
        if self.unet.middle_block is not None:
            h = self._block(rows, h, "middle", 0, self.unet.middle_block)
        h = self._controlled(rows, h, "middle")
        for patch in self.patches.get("middle_block_after_patch", ()):
            h = patch({
                "h": h, "x": rows.x, "emb": rows.emb, "context": rows.context, "y": rows.y,
                "timesteps": rows.timesteps, "transformer_options": rows.options,
            })["h"]  # fmt: skip
        return h

    def _up(
        self, rows: _Rows, h: Tensor, skips: list[Tensor], numbers: range, last: torch.Size | None
    ) -> Tensor:
        """Args:
            last: what the last block's output is to be as high and wide as.
        """
        for number in numbers:
            rows.options["block"] = ("output", number)
            skip = self._controlled(rows, skips.pop(), "output")
            for patch in self.patches.get("output_block_patch", ()):
                h, skip = patch(h, skip, rows.options)
            if skip is not None:
                h = torch.cat([h, skip], dim=1)
            shape = skips[-1].shape if skips else last
            h = self._block(rows, h, "output", number, self.unet.output_blocks[number], shape)
        return h

    def _block(
        self, rows: _Rows, h: Tensor, side: str, number: int, block: Sequence[torch.nn.Module],
        shape: Any = None,
    ) -> Tensor:  # fmt: skip
        names = [f"{side}.{number}.{i}" for i in range(len(block))]
        if not any(name in self.plan.splits for name in names):
            return rows.through(block, h, shape)
        for name, part in zip(names, block, strict=True):
            split = self.plan.splits.get(name)
            if split is None:
                h = rows.through((part,), h, shape)
            else:
                h = self._split(rows, h, part, split)
        return h

    def _split(self, rows: _Rows, h: Tensor, part: torch.nn.Module, split: Split) -> Tensor:
        """The part for the rows that run its body, and past it for the others."""
        if split.rest.shape[0] == 0:
            return rows.through((part,), h)
        if split.run.shape[0] == 0:
            rows.options["transformer_index"] += isinstance(part, SpatialTransformer)
            return _past(part, h)
        passed = _past(part, h.index_select(0, split.rest))
        some = rows.only(split.run)
        new = some.through((part,), h.index_select(0, split.run))
        rows.options["transformer_index"] = some.options["transformer_index"]
        return torch.cat([new, passed.to(new.dtype)]).index_select(0, split.order)

    def _residual(self, side: str) -> Tensor | None:
        waiting = (self.control or {}).get(side)
        return waiting.pop() if waiting else None

    def _controlled(self, rows: _Rows, h: Tensor, side: str) -> Tensor:
        residual = self._residual(side)
        if residual is None:
            return h
        if rows.index is not None and residual.shape[0] != 1:
            residual = residual.index_select(0, rows.index)
        return apply_control(h, {side: [residual]}, side)


def _past(part: torch.nn.Module, h: Tensor) -> Tensor:
    """Without the body."""
    return part.skip_connection(part.x_upd(h)) if isinstance(part, ResBlock) else h
