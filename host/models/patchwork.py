"""ComfyUI's UNet on the tokens of changed tiles.

Li et al., Efficient Spatially Sparse Inference (SIGE), NeurIPS 2022, arXiv 2211.02048: convolutions
gather tiles with what is around them and scatter their outputs into what is kept; norms go on with
kept statistics. Here what is kept is what each 3 x 3 convolution reads, the keys and values of each
self-attention, each norm as a scale and a shift per channel, and the output. All else of the
network is one token at a time and needs nothing.
"""

import functools
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    Downsample,
    ResBlock,
    UNetModel,
    Upsample,
    timestep_embedding,
)
from torch import Tensor, nn

from ...compiled.weights import addresses
from ...engine.coherence.exchange import Exchange
from ...engine.coherence.neighbours import Neighbours
from ...engine.patchwork.kept import Kept
from ...engine.patchwork.tiles import Tiles
from . import looks, walk

# where nodes put what is to be done inside of a network
_PATCHED = "patches", "patches_replace", "optimized_attention_override"

_networks: weakref.WeakKeyDictionary[nn.Module, "Network"] = weakref.WeakKeyDictionary()


def network(unet: UNetModel) -> "Network":
    """The one of a UNet."""
    if unet not in _networks:
        _networks[unet] = Network(unet)
    return _networks[unet]


def why_not(unet: nn.Module) -> str:
    """Why a network cannot be run on tiles, for people; empty where it can."""
    why = walk.why_not(unet)
    if why:
        return why
    parts = [part for _, _, block in walk.blocks(unet) for part in block]
    strange = next((part for part in parts if not _known(part)), None)
    if strange is not None:
        return f"nothing is known of its {type(strange).__name__}"
    return "" if unet.out[-1].kernel_size == (3, 3) else "its last convolution is no 3 x 3 one"


def _known(part: nn.Module) -> bool:
    if isinstance(part, ResBlock):
        convs = part.in_layers[-1], part.out_layers[-1]
        skip = part.skip_connection
        plain = isinstance(skip, nn.Identity) or skip.kernel_size == (1, 1)
        return not part.updown and not part.skip_t_emb and plain and all(map(_three, convs))
    if isinstance(part, SpatialTransformer):
        return all(
            not b.ff_in and not b.disable_self_attn and b.attn2 is not None
            and not b.switch_temporal_ca_to_sa
            for b in part.transformer_blocks
        )  # fmt: skip
    if isinstance(part, Downsample):
        return part.dims == 2 and (not part.use_conv or _three(part.op))
    if isinstance(part, Upsample):
        return part.dims == 2 and (not part.use_conv or _three(part.conv))
    return _three(part) or adds(part)


def _three(part: nn.Module) -> bool:
    plain = isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3) and part.groups == 1
    zeros = plain and part.padding_mode == "zeros"
    return zeros and part.padding == (1, 1) and part.dilation == (1, 1)


def adds(part: nn.Module) -> bool:
    """A part that adds the same to every picture of a size, and says so."""
    return getattr(part, "adds_to_positions", False) is True


def why_not_now(unet: nn.Module, key: Hashable = None) -> str:
    """Why its parts and their weights cannot be used as they lie; empty where they can.

    Args:
        key: of how the weights are loaded. Parts are looked at in each call, since a hook may be
            put on them at any time; weights that lie where they lay, under an equal key, once.
    """
    why = network(unet).why_not_its_weights(key)
    if not why and (name := looks.changed_part(unet)):
        why = f"a pack has changed what its {name} does"
    return why


def _why_not_weights(unet: nn.Module) -> str:
    dtypes = set()
    for part in unet.modules():
        if getattr(part, "comfy_cast_weights", False) or getattr(part, "weight_function", None):
            return (
                "weights are cast or patched call by call, for lack of memory or because they are "
                "of another precision than is computed with"
            )
        for weight in part.parameters(recurse=False):
            if hasattr(weight, "_qdata") or weight.is_meta:
                return "weights are quantised"
            dtypes.add(weight.dtype)
    return "" if len(dtypes) == 1 else "weights are of several precisions"


@dataclass(frozen=True)
class Call:
    """What the UNet is called with.

    Attributes:
        more: whatever else.
    """

    x: Tensor
    timesteps: Tensor
    context: Tensor | None
    y: Tensor | None
    control: Any
    options: Mapping[str, Any]
    more: Mapping[str, Any]


def tried(
    neighbours: Neighbours, exchange: Exchange, unet: nn.Module, call: Call, inner: Sequence[Any]
) -> Tensor | None:
    """The network's output of a call, computed where its rows have changed; None, with the reason
    in `neighbours.patching`, where the call is to be made as it is.

    Args:
        inner: wrappers of the network that come after ours.
    """
    patching = neighbours.patching
    why = (
        patching.off or _as_it_is(neighbours, exchange, call, inner) or why_not(unet)
        or why_not_now(unet, patching.key)
    )  # fmt: skip
    if why:
        patching.skipped(why, call.x.shape[0])
        return None
    return patching.call(
        network(unet), exchange.spots, call.x, call.timesteps, call.context, call.y
    )


def _as_it_is(neighbours: Neighbours, exchange: Exchange, call: Call, inner: Sequence[Any]) -> str:
    """Why nothing of a call may be left out, for people; empty where it may."""
    if inner:
        return f"another node has wrapped the UNet ({looks.named(inner[0])})"
    if exchange.groups is not None or neighbours.memory is not None:
        return "frames help each other (Live Memory, Live Future Attention)"
    if exchange.plan:
        return "the network goes by a plan of blocks (Live Reuse, Live Searched Steps)"
    if call.control:
        return "a ControlNet acts on all of it"
    acting = [name for name in _PATCHED if call.options.get(name)]
    if acting:
        return "a node has put patches into the UNet"
    return "" if call.context is not None and not call.more else "it is asked in another way"


class Network:
    """See engine.patchwork.patching.Network."""

    def __init__(self, unet: UNetModel):
        # kept by the UNet
        self._unet = weakref.ref(unet)
        downs = [
            part for block in unet.input_blocks for part in block if isinstance(part, Downsample)
        ]
        self.step = 2 ** len(downs)
        self._looked: tuple[Any, str] | None = None  # at which weights, and what was seen

    def why_not_its_weights(self, key: Hashable) -> str:
        """See `why_not_now`."""
        unet = self._unet()
        now = key, addresses(unet)
        if self._looked is None or self._looked[0] != now:
            self._looked = now, _why_not_weights(unet)
        return self._looked[1]

    def whole(
        self, kept: Kept, at: Tensor, x: Tensor, timesteps: Tensor, context: Tensor,
        y: Tensor | None,
    ) -> Tensor:  # fmt: skip
        unet = self._unet()
        emb = timestep_embedding(timesteps, unet.model_channels, repeat_only=False).to(x.dtype)
        emb = unet.time_embed(emb)
        if unet.num_classes is not None:
            emb = emb + unet.label_emb(y)
        return _through(unet, _Whole(kept, at, emb, context), x)

    def some(self, kept: Kept, tiles: Tiles, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, tiles.inputs)
        return _through(self._unet(), _Some(kept, tiles), tokens)


def _through(unet: UNetModel, way: "_Whole | _Some", h: Tensor) -> Tensor:
    """All blocks in their order, for whole pictures [R, C, H, W] or for tokens [N, C]."""
    skips = []
    for side, number, block in walk.blocks(unet):
        if side == "output":
            h = torch.cat([h, skips.pop()], dim=1)
        for i, part in enumerate(block):
            h = _part(f"{side}.{number}.{i}", part, way, h)
        if side == "input":
            skips.append(h)
    h = F.silu(h) if isinstance(unet.out[0], nn.Identity) else way.norm("last", unet.out[0], h)
    return way.conv("last", unet.out[-1], h)


def _part(name: str, part: nn.Module, way: "_Whole | _Some", h: Tensor) -> Tensor:
    if isinstance(part, ResBlock):
        inner = way.norm(f"{name}.in", part.in_layers[0], h)
        inner = way.conv(f"{name}.in", part.in_layers[-1], inner)
        inner = way.norm(f"{name}.out", part.out_layers[0], inner, block=part)
        inner = way.conv(f"{name}.out", part.out_layers[-1], inner)
        skip = part.skip_connection
        return inner + (h if isinstance(skip, nn.Identity) else way.linear(skip, h))
    if isinstance(part, SpatialTransformer):
        tokens = way.tokens(way.norm(name, part.norm, h, act=False))
        tokens = _linear(part.proj_in, tokens)
        for i, block in enumerate(part.transformer_blocks):
            tokens = _attending(f"{name}.{i}", block, way, tokens)
        return h + way.pictures(_linear(part.proj_out, tokens), h)
    if isinstance(part, Downsample):
        return way.conv(name, part.op, h) if part.use_conv else way.pool(name, h)
    if isinstance(part, Upsample):
        h = way.double(h)
        return way.conv(name, part.conv, h) if part.use_conv else h
    return way.add(name, part, h) if adds(part) else way.conv(name, part, h)


def _attending(name: str, block: BasicTransformerBlock, way: "_Whole | _Some", x: Tensor) -> Tensor:
    own, other = block.attn1, block.attn2
    n = block.norm1(x)
    k, v = own.to_k(n), own.to_v(n)
    x = x + own.to_out(way.attend(f"{name}.own", block, own.to_q(n), k, v))
    n = block.norm2(x)
    x = x + other.to_out(way.ask(f"{name}.other", block, other.to_q(n)))
    return x + block.ff(block.norm3(x))


def _linear(part: nn.Module, x: Tensor) -> Tensor:
    """Tokens [..., C] through a linear layer or a convolution of 1 x 1."""
    return F.linear(x, part.weight.flatten(1), part.bias)


def _attention(block: BasicTransformerBlock, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[R, N, C] of q [R, N, C] and k, v [R, L, C]."""
    rows, heads, dtype = q.shape[0], block.n_heads, v.dtype
    if block.attn_precision == torch.float32:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(rows, -1, heads * out.shape[-1]).to(dtype)


class _Whole:
    """What the parts do to whole pictures; what tiles will need is kept.

    Args:
        at: where, of each row.
    """

    def __init__(self, kept: Kept, at: Tensor, emb: Tensor, context: Tensor):
        self._kept, self._at, self._emb, self._context = kept, at, emb, context
        self._places: list[int] = at.tolist()

    def _keep(self, name: str, value: Tensor) -> None:
        self._kept.room(name, value.shape[1:], value).index_copy_(0, self._at, value)

    def _padded(self, name: str, h: Tensor) -> None:
        _, channels, height, width = h.shape
        kept = self._kept.room(name, (height + 2, width + 2, channels), h)
        for row, place in zip(h, self._places, strict=True):
            kept[place, 1:-1, 1:-1].copy_(row.permute(1, 2, 0))

    def conv(self, name: str, part: nn.Conv2d, h: Tensor) -> Tensor:
        self._padded(name, h)
        return part(h)

    def linear(self, part: nn.Module, h: Tensor) -> Tensor:
        return part(h)

    def norm(
        self, name: str, part: nn.GroupNorm, h: Tensor, block: ResBlock | None = None,
        act: bool = True,
    ) -> Tensor:  # fmt: skip
        """A norm, with what the noise level adds before it, or makes of it, in a block."""
        emb = None if block is None else block.emb_layers(self._emb).to(h.dtype)
        scaled = block is not None and block.use_scale_shift_norm
        if emb is not None and not scaled:
            h = h + emb[:, :, None, None]
        rows, channels, height, width = h.shape
        out, *told = torch.native_group_norm(
            h, part.weight, part.bias, rows, channels, height * width, part.num_groups, part.eps
        )
        mean, unit = (t.repeat_interleave(channels // part.num_groups, 1) for t in told)
        scale = unit * part.weight
        shift = part.bias - mean * scale
        if scaled:
            more, shifted = (t[:, :, None, None] for t in emb.chunk(2, 1))
            out = out * (1 + more) + shifted
            scale, shift = (scale * (1 + more[..., 0, 0]),
                            shift * (1 + more[..., 0, 0]) + shifted[..., 0, 0])  # fmt: skip
        elif emb is not None:
            shift = shift + emb * scale
        self._keep(f"{name}.scale", scale.to(h.dtype))
        self._keep(f"{name}.shift", shift.to(h.dtype))
        return F.silu(out) if act else out

    def add(self, name: str, part: nn.Module, h: Tensor) -> Tensor:
        out = part(h)
        self._keep(name, (out - h)[:1].permute(0, 2, 3, 1).flatten(1, 2).expand(len(h), -1, -1))
        return out

    def pool(self, name: str, h: Tensor) -> Tensor:
        self._padded(name, h)
        return F.avg_pool2d(h, 2)

    def double(self, h: Tensor) -> Tensor:
        return F.interpolate(h, scale_factor=2, mode="nearest")

    def tokens(self, h: Tensor) -> Tensor:
        return h.permute(0, 2, 3, 1).flatten(1, 2)

    def pictures(self, tokens: Tensor, like: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, like.shape[2:])

    def attend(
        self, name: str, block: BasicTransformerBlock, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        self._keep(f"{name}.k", k)
        self._keep(f"{name}.v", v)
        return _attention(block, q, k, v)

    def ask(self, name: str, block: BasicTransformerBlock, q: Tensor) -> Tensor:
        """Attention to the prompt."""
        k, v = block.attn2.to_k(self._context), block.attn2.to_v(self._context)
        return self.attend(name, block, q, k, v)


class _Some:
    """What the parts do to tokens of tiles, [N, C] at the scale that they have come to."""

    def __init__(self, kept: Kept, tiles: Tiles):
        self._kept, self._tiles, self._finer = kept, tiles, []

    def _flat(self, name: str, of: int) -> Tensor:
        """What is kept, by token [..., C]; `of` dimensions of it are places and positions."""
        return self._kept[name].flatten(0, of - 1)

    def _read(self, name: str, h: Tensor, index: Tensor, side: int) -> Tensor:
        """Tiles [M, C, side, side] of what is kept, with h written into it before."""
        flat = self._flat(name, 3)
        flat.index_copy_(0, self._tiles.padded, h)
        found = flat.index_select(0, index)
        return found.view(-1, side, side, h.shape[1]).permute(0, 3, 1, 2)

    def _halved(self, name: str, h: Tensor) -> Tensor:
        """What tiles of half the height and width are of, with a token more above and left."""
        tiles = self._tiles
        found = self._read(name, h, tiles.halving, 2 * tiles.coarse.side + 1)
        self._finer.append(tiles)
        self._tiles = tiles.coarse
        return found

    def conv(self, name: str, part: nn.Conv2d, h: Tensor) -> Tensor:
        if part.stride == (2, 2):
            found = self._halved(name, h)
        else:
            found = self._read(name, h, self._tiles.halo, self._tiles.side + 2)
        out = F.conv2d(found, part.weight, part.bias, part.stride)
        return out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])

    def linear(self, part: nn.Module, h: Tensor) -> Tensor:
        return _linear(part, h)

    def norm(
        self, name: str, part: nn.GroupNorm, h: Tensor, block: Any = None, act: bool = True
    ) -> Tensor:
        place = self._tiles.place
        scale, shift = (
            self._kept[f"{name}.{what}"].index_select(0, place)[:, None]
            for what in ("scale", "shift")
        )
        out = torch.addcmul(shift, h.view(len(place), -1, h.shape[1]), scale).view_as(h)
        return F.silu(out, inplace=True) if act else out

    def add(self, name: str, part: nn.Module, h: Tensor) -> Tensor:
        place, size = self._tiles.place, self._tiles.side**2
        first = place.repeat_interleave(size) * self._kept[name].shape[1]
        return h + self._flat(name, 2).index_select(0, first + self._tiles.positions)

    def pool(self, name: str, h: Tensor) -> Tensor:
        out = F.avg_pool2d(self._halved(name, h)[:, :, 1:, 1:], 2)
        return out.permute(0, 2, 3, 1).reshape(-1, out.shape[1])

    def double(self, h: Tensor) -> Tensor:
        self._tiles = self._finer.pop()
        return h.index_select(0, self._tiles.parents)

    def tokens(self, h: Tensor) -> Tensor:
        return h

    def pictures(self, tokens: Tensor, like: Tensor) -> Tensor:
        return tokens

    def attend(
        self, name: str, block: BasicTransformerBlock, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        for what, new in (("k", k), ("v", v)):
            self._flat(f"{name}.{what}", 2).index_copy_(0, self._tiles.tokens, new)
        return self.ask(name, block, q)

    def ask(self, name: str, block: BasicTransformerBlock, q: Tensor) -> Tensor:
        k, v = self._kept[f"{name}.k"], self._kept[f"{name}.v"]
        out = []
        for own, place in zip(q.split(self._tiles.counts), self._rows, strict=True):
            if len(own):
                out.append(_attention(block, own[None], k[place, None], v[place, None])[0])
        return torch.cat(out)

    @functools.cached_property
    def _rows(self) -> list[int]:
        """Where the things of each row are kept."""
        return self._tiles.at.tolist()
