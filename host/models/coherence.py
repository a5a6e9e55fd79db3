"""Frames that help each other, on a MODEL: a keyed wrapper around the UNet's calls.

Nothing is patched for others to see or to write over: the patches are put into the options of a
call when it is made, around those that other nodes have put there. Whose rows a call has is told by
the stream (engine.coherence.neighbours), under NEIGHBOURS in its options; a call of an ordinary
sampler, of which nobody tells, goes on as it is.
"""

import functools
import logging
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.ldm.modules.attention as attention
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    Downsample,
    ResBlock,
    UNetModel,
    Upsample,
)
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...engine.blocks.plan import BlockPlan
from ...engine.blocks.schedule import DEPTHS, Reuse
from ...engine.blocks.skips import Choice, Splits
from ...engine.coherence.attention import attend, parts
from ...engine.coherence.carry import Carry
from ...engine.coherence.neighbours import LEVELS, Exchange, Future, Memory, Neighbours
from ...engine.patchwork.mask import Patchwork
from . import looks, patchwork, walk
from .looks import COHERENCE, EXCHANGE, NEIGHBOURS
from .weights import staying

_FUSED = 2  # levels on the way up, besides the middle, whose outputs are fused
# of patches in the place of an attention, those that ask how many keys there are
_COUNTING = {("comfy_extras/nodes_sag.py", "attn_and_record")}
Key = tuple[str, int, int]  # block, its number, place of the transformer block in it


@dataclass(frozen=True)
class Place:
    """A self-attention of a UNet.

    Attributes:
        key: as ComfyUI's patches name it.
        scale: how much smaller than the latent its pictures are.
        fused: outputs of this layer are fused, where any are.
    """

    key: Key
    scale: int
    fused: bool

    @property
    def name(self) -> str:
        return ".".join(map(str, self.key))

    def tokens(self, size: Sequence[int]) -> int:
        """Of a latent of this height and width."""
        return math.prod(-(-side // self.scale) for side in size)


_said: set[str] = set()
_known: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Place, ...]] = weakref.WeakKeyDictionary()


def places(unet: torch.nn.Module) -> tuple[Place, ...]:
    """The self-attentions of a UNet in the order of a call; empty where it has none that are
    known."""
    if unet not in _known:
        _known[unet] = _places(unet) if isinstance(unet, UNetModel) else ()
    return _known[unet]


def _places(unet: UNetModel) -> tuple[Place, ...]:
    found, scale = [], 1
    sides = (
        ("input", unet.input_blocks), ("middle", [unet.middle_block]),
        ("output", unet.output_blocks),
    )  # fmt: skip
    for side, blocks in sides:
        for number, block in enumerate(blocks):
            for part in () if block is None else block:
                if isinstance(part, attention.SpatialVideoTransformer):
                    return ()
                if isinstance(part, attention.SpatialTransformer):
                    found += [
                        ((side, number, i), scale)
                        for i, inner in enumerate(part.transformer_blocks)
                        if not inner.disable_self_attn
                    ]
                scale = _after(part, scale)
    deepest = sorted({s for (side, *_), s in found if side == "output"})[-_FUSED:]
    return tuple(
        Place(key, s, key[0] == "middle" or (key[0] == "output" and s in deepest))
        for key, s in found
    )


def _after(part: torch.nn.Module, scale: int) -> int:
    if isinstance(part, ResBlock) and part.updown:
        part = part.h_upd
    if isinstance(part, Downsample):
        return scale * 2
    return scale // 2 if isinstance(part, Upsample) else scale


def chosen(known: tuple[Place, ...], levels: str) -> frozenset[str]:
    """Names of the layers at some levels, of LEVELS; a model that has one level has it in all.

    "deepest" are the middle and what has the smallest pictures besides it.
    """
    scales = sorted({place.scale for place in known})
    if levels == "all but the finest":
        scales = scales[1:] or scales
    elif levels == "deepest":
        beside = [place.scale for place in known if place.key[0] != "middle"]
        scales = [s for s in scales if s >= max(beside, default=scales[-1])]
    elif levels not in LEVELS:
        raise ValueError(f"levels: {levels!r} is none of {', '.join(LEVELS)}")
    return frozenset(place.name for place in known if place.scale in scales)


@dataclass(frozen=True)
class Coherence:
    """What nodes have asked for on a MODEL.

    Attributes:
        future, memory, carry, reuse: the settings, or None.
        skips: what rows pass by at which noise level, or None.
        patchwork: how it is decided which tiles have changed; None where all is computed.
        tell: called with a line for the node of the memory whenever it has another size.
        tell_reuse, tell_patchwork: called with a line for that node now and then.
    """

    future: Future | None = None
    memory: Memory | None = None
    carry: Carry | None = None
    reuse: Reuse | None = None
    skips: Choice | None = None
    patchwork: Patchwork | None = None
    tell: Callable[[str], None] | None = None
    tell_reuse: Callable[[str], None] | None = None
    tell_patchwork: Callable[[str], None] | None = None

    def diffusion_model(
        self, executor, x, timesteps=None, context=None, y=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        """DIFFUSION_MODEL: the call, with its self-attentions extended where its rows are told."""
        options = {} if transformer_options is None else transformer_options
        exchange = self.exchange(options, executor.class_obj, x.shape)
        plan = self._plan(options, exchange, x)
        unet, inner = executor.class_obj, executor.wrappers[executor.idx + 1 :]
        if self.patchwork is not None and exchange is not None:
            call = patchwork.Call(x, timesteps, context, y, control, options, kwargs)
            out = patchwork.tried(options[NEIGHBOURS], exchange, unet, call, inner)
            if out is not None:
                return out
        goes = bool(plan) and self.goes_by_plan(exchange, options, unet, inner)
        if exchange is not None and not goes:
            exchange.inner = None
        # frames without neighbours and memory are as they were, to the last bit
        if exchange is not None and (exchange.groups is not None or self.memory is not None):
            options = self.patched(options, unet, exchange)
        if not goes:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        return walk.walk(unet, plan, x, timesteps, context, y, control, options, **kwargs)

    def _plan(
        self, options: dict[str, Any], exchange: Exchange | None, x: Tensor
    ) -> BlockPlan | None:
        """Of a call; where nobody tells of its rows, by the noise levels that ComfyUI tells."""
        if exchange is not None:
            return exchange.plan
        sigmas, rows = options.get("sigmas"), x.shape[0]
        if self.skips is None or sigmas is None or rows % max(sigmas.numel(), 1):
            return None
        levels = sigmas.flatten().tolist()  # which waits for the device
        skipped = [self.skips.at(level) for level in levels] * (rows // len(levels))
        return BlockPlan(None, Splits(x.device).of(skipped))

    def goes_by_plan(
        self, exchange: Exchange | None, options: dict[str, Any], unet: torch.nn.Module,
        inner: Sequence[Any] = (), alone: bool = False,
    ) -> bool:  # fmt: skip
        """Whether the rows of a call may run as its plan says; where not, it is said why.

        Args:
            exchange: None for a call of which nobody tells.
            inner: wrappers of the network that come after this one.
            alone: it is for an engine that knows plans, or frames that help each other, and not
                both.
        """
        if exchange is not None and not exchange.plan:
            return False
        why = walk.why_not(unet)
        replaced = options.get("patches_replace", {}).get("attn1", {})
        if exchange is not None and exchange.plan.kept and any(map(_counts, replaced.values())):
            why = "a node takes down the attention of every row"
        if options.get("patches", {}).get("middle_patch"):
            why = "GLIGEN is given for every row of a call"
        if inner:
            why = f"another node has wrapped the UNet ({looks.named(inner[0])})"
        elif exchange is not None and (exchange.groups is not None or self.memory is not None):
            if alone:
                why = "the engine runs all of it where frames help each other"
            elif exchange.plan.splits:
                why = "frames help each other"
        if why:
            self._say(options.get(NEIGHBOURS), why)
        return not why

    def _say(self, neighbours: Neighbours | None, why: str) -> None:
        """That a call runs whole."""
        if neighbours is not None and neighbours.reusing is not None:
            neighbours.reusing.why = why
        if self.skips is not None and why not in _said:
            _said.add(why)
            logging.warning("LiveDiffusion: nothing of the network is left out: %s", why)

    def exchange(
        self, options: dict[str, Any], unet: torch.nn.Module, shape: Sequence[int]
    ) -> Exchange | None:
        """Of a call [R, C, H, W] with these transformer_options; None where it goes on as it is.

        It is made once in a call: who asks and lets the call go on puts it into its options, under
        EXCHANGE.
        """
        if not self.acts(options, unet):
            return None
        if EXCHANGE in options:
            return options[EXCHANGE]
        return options[NEIGHBOURS].call(shape, options.get("cond_or_uncond"))

    def changes(self, exchange: Exchange) -> bool:
        """Whether a call with an exchange may be another than without."""
        acting = self.future, self.memory, self.patchwork
        return bool(exchange.plan) or any(part is not None for part in acting)

    def acts(self, options: dict[str, Any], unet: torch.nn.Module) -> bool:
        """Whether a stream tells the rows of calls with these transformer_options."""
        neighbours: Neighbours | None = options.get(NEIGHBOURS)
        return neighbours is not None and neighbours.network() is unet

    def patched(
        self, options: dict[str, Any], unet: torch.nn.Module, exchange: Exchange
    ) -> dict[str, Any]:
        """transformer_options whose patches extend the self-attentions by an exchange."""
        return extended(options, unet, exchange, *self.layers(unet))

    def layers(self, unet: torch.nn.Module) -> tuple[frozenset[str], ...]:
        """Names of the layers whose rows see each other, of those that remember, and of these
        those whose outputs are fused."""
        known = places(unet)
        ahead, behind = (
            frozenset() if part is None else chosen(known, part.levels)
            for part in (self.future, self.memory)
        )
        fuses = self.memory is not None and self.memory.fuse > 0
        fused = [place.name for place in known if fuses and place.fused and place.name in behind]
        return ahead, behind, frozenset(fused)


def depth_of(unet: torch.nn.Module, name: str) -> int:
    """A depth of DEPTHS as engine.blocks.plan.Kept counts it; a UNet that has one level has no
    more than it."""
    blocks = len(unet.input_blocks)
    if name != DEPTHS[2]:
        return min(DEPTHS.index(name), blocks - 1)
    finest = 0
    for block in list(unet.input_blocks)[1:]:
        if any(_after(part, 1) != 1 for part in block):
            break
        finest += 1
    return min(finest, blocks - 1)


def extended(
    options: dict[str, Any], unet: torch.nn.Module, exchange: Exchange, ahead: Collection[str],
    behind: Collection[str], fused: Collection[str],
) -> dict[str, Any]:  # fmt: skip
    """transformer_options whose patches extend the self-attentions by an exchange.

    Args:
        ahead, behind, fused: names of layers, see Coherence.layers.
    """
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
    before = replaced.get("attn1", {})
    mine, outs = {}, {}

    def within(key: Key) -> Exchange:
        """Of the rows that the block has."""
        inner = exchange.inner
        if inner is None or not walk.is_inner(f"{key[0]}.{key[1]}", exchange.plan.kept.depth, unet):
            return exchange
        return inner

    for place in places(unet):
        key, name = place.key, place.name
        future, memory = name in ahead, name in behind
        if future or memory:
            other = before.get(key, before.get(key[:2]))
            mine[key] = functools.partial(_attend, within(key), name, future, memory, other)
        if name in fused:
            outs[key] = name, within(key)
    out = {**options, "patches_replace": {**replaced, "attn1": {**before, **mine}}}
    if outs:
        fuse = functools.partial(_fuse, outs)
        last = [*patches.get("attn1_output_patch", []), fuse]
        out["patches"] = {**patches, "attn1_output_patch": last}
    return out


def _attend(
    exchange: Exchange, layer: str, future: bool, memory: bool, other: Callable | None,
    q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any],
) -> Tensor:  # fmt: skip
    """A patch in the place of a self-attention, around the one that another node has put there."""
    heads = extra["n_heads"]

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        how = attention.optimized_attention  # by its module: packs put their own there
        # what ComfyUI takes on a CPU needs twice the time of torch's own, and knows no such masks
        if mask is not None or (how is attention.attention_sub_quad and q.device.type == "cpu"):
            how = attention.attention_pytorch
        return how(
            q, k, v, heads=heads, mask=mask, attn_precision=extra.get("attn_precision"),
            transformer_options=extra,
        )  # fmt: skip

    if k.shape[0] != exchange.rows or q.shape[0] != exchange.rows:
        # another node has cut the pictures up: these are no rows
        return plain(q, k, v) if other is None else other(q, k, v, extra)
    read = exchange.read(layer) if memory else None
    if read is not None and (read.k.shape[2], read.k.dtype) != (k.shape[2], k.dtype):
        read = None
    if memory:
        exchange.write(layer, k, v)
    groups = exchange.groups if future else None
    if other is None:
        return attend(plain, q, k, v, groups, read)
    found = list(parts(k, v, groups, read))
    if len(found) == 1 and found[0].mask is None and found[0].rows is None and not _counts(other):
        out = other(q, found[0].k, found[0].v, extra)
        if out.shape[1] == q.shape[1]:
            return out
    # it wants a key for every query, or is given what it cannot be told
    return other(q, k, v, extra)


def _counts(other: Callable) -> bool:
    return (looks.file_of(other), getattr(other, "__name__", "")) in _COUNTING


def _fuse(
    layers: dict[Key, tuple[str, Exchange]], o: Tensor, extra: dict[str, Any]
) -> Tensor:  # fmt: skip
    """A patch behind a self-attention."""
    block = extra.get("block")
    layer = None if block is None else layers.get((*block, extra.get("block_index", 0)))
    if layer is None or o.shape[0] != layer[1].rows:
        return o
    name, exchange = layer
    return exchange.fused(name, o)


def attach(patcher, tell: Callable[[str], None] | None = None, **settings: Any):
    """A clone of a MODEL with more of this.

    Args:
        tell: see Coherence.
        settings: `future`, `memory`, `carry`, `reuse`, `tell_reuse`, `skips`, `patchwork`,
            `tell_patchwork`; what is not named stays as it is.

    Raises:
        ValueError: the model has no self-attention that is known, no blocks for `reuse` or
            `patchwork`, or for this no weights that stay (host.models.weights.staying).
    """
    unet = patcher.get_model_object("diffusion_model")
    why = "" if settings.get("reuse") is None else walk.why_not(unet)
    if settings.get("patchwork") is not None:
        why = patchwork.why_not(unet)
    if why:
        raise ValueError(
            f"model: {why}. This node is for pictures of the SD1.5, SD2.1 and SDXL families and "
            "Live Demo Model."
        )
    if {"future", "memory", "carry"} & settings.keys() and not places(unet):
        raise ValueError(
            f"model: {type(unet).__name__} has no self-attention that this node knows. It is for "
            "pictures of the SD1.5, SD2.1 and SDXL families and Live Demo Model."
        )
    known = coherence_of(patcher) or Coherence()
    wanted = replace(known, **settings, tell=known.tell if tell is None else tell)
    # tiles are computed with the weights as they lie
    clone = patcher.clone() if wanted.patchwork is None else staying(patcher)
    there = clone.get_wrappers(WrappersMP.DIFFUSION_MODEL, COHERENCE)
    # another pack may have used our key: its wrappers stay, where they are
    there[:] = [wrapper for wrapper in there if among([wrapper]) is None]
    if not there:
        clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, COHERENCE)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, COHERENCE, wanted.diffusion_model)
    return clone


def coherence_of(patcher) -> Coherence | None:
    """What nodes have asked for on a MODEL."""
    return among(patcher.get_wrappers(WrappersMP.DIFFUSION_MODEL, COHERENCE))


def among(wrappers: Iterable[Any]) -> Coherence | None:
    """The one among the wrappers of a call."""
    owners = (getattr(wrapper, "__self__", None) for wrapper in wrappers)
    return next((owner for owner in owners if isinstance(owner, Coherence)), None)
