"""What an engine is told where frames help each other, and what it tells: tensors by name.

The self-attentions of such a network (engine.coherence) read which rows see each other and what is
remembered, and give their own keys, values and outputs. For an engine both are plain tensors:
inputs and outputs of its graph, at every number of rows and keyframes. A graph holds for the layers
alone.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engine.coherence.attention import Group, Read
from ..engine.coherence.neighbours import Exchange

BANK, OWN = "bank_", "own_"  # what names of inputs and of outputs begin with
SEEN, WHO = "bank_seen_", "bank_who_"  # and the number of a group
AMOUNT, THRESHOLD = "bank_amount", "bank_threshold"
INNER = "inner_"  # of groups of the rows that inner blocks have, behind SEEN and WHO
_READ = ("k", "v", "unit", "norm")


def named(prefix: str, what: str, layer: str) -> str:
    """The name of a tensor of a layer: "bank_k_output_3_0"."""
    return f"{prefix}{what}_{layer.replace('.', '_')}"


def narrow(name: str, inner: Collection[str]) -> bool:
    """Whether a tensor is of the rows that run the inner blocks alone.

    Args:
        inner: layers there.
    """
    if name.startswith((SEEN + INNER, WHO + INNER)):
        return True
    ends = tuple(named("", "", layer) for layer in inner)
    return name.startswith((BANK, OWN)) and name.endswith(ends)


def read_of(output: str) -> str:
    """The input that is shaped as an output of the same layer, but for the number of tokens."""
    return f"{BANK}k_{output[len(OWN) + 2 :]}"


@dataclass(frozen=True)
class Layers:
    """The self-attentions that see more than their own row, each in the order of a call.

    Attributes:
        ahead: their rows see each other.
        behind: they remember.
        fused: of these, those whose outputs are remembered, too; none where nothing is fused.
    """

    ahead: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ahead or self.behind)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a graph gives besides its result."""
        out = []
        for layer in self.behind:
            kinds = "kvo" if layer in self.fused else "kv"
            out += [named(OWN, kind, layer) for kind in kinds]
        return tuple(out)

    def __str__(self) -> str:
        ahead = f"future attention in {len(self.ahead)} layers" if self.ahead else ""
        behind = f"memory in {len(self.behind)} layers" if self.behind else ""
        return " and ".join(part for part in (ahead, behind) if part)

    def without(self, names: Collection[str]) -> "Layers":
        """But for these."""
        kinds = self.ahead, self.behind, self.fused
        return Layers(*(tuple(n for n in kind if n not in names) for kind in kinds))

    def words(self, frames: int, inputs: Collection[str]) -> str:
        """All that a graph of fixed shapes depends on, for people.

        Args:
            frames: that a layer remembers.
            inputs: names.
        """
        if not self.behind:
            return str(self)
        fused = sum(named(BANK, "unit", layer) in inputs for layer in self.behind)
        return f"{self}, {frames} keyframes, {fused} layers fused"


@dataclass(frozen=True)
class Remembered:
    """Of one call.

    Attributes:
        layers: see Layers.
        frames: keyframes that a layer remembers.
        reads: inputs by name. `bank_seen_0` [R', g], int64: whom each row sees; where rows see
            unequally many there are several of these and `bank_who_0` [R'], the rows of each. Of
            each layer that remembers `bank_k_`, `bank_v_` [R, frames * L, C], and of those that
            are fused `bank_unit_` [R, frames * S, C], `bank_norm_` [R, frames * S]
            (engine.coherence.attention.Read) and once `bank_amount`, `bank_threshold` [1], float32.
        inner: the layers of inner blocks, where rows go on with kept features (compiled.reused):
            what they read and write is of the rows that run these blocks, `bank_seen_inner_0` too.
        wrote: outputs by name, of all rows, `own_k_`, `own_v_` [R, L, C] and `own_o_` [R, S, C]:
            put there by whoever runs the call.
    """

    layers: Layers
    frames: int
    reads: dict[str, Tensor]
    inner: tuple[str, ...] = ()
    wrote: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, exchange: Exchange, layers: Layers, frames: int, device: torch.device,
        inner: tuple[str, ...] = (),
    ) -> "Remembered | None":  # fmt: skip
        """What a call under way is to be told; None while not all is there that it reads."""
        reads, fuses = {}, False
        if set(layers.ahead) - set(inner):
            reads |= _grouped(exchange, bool(layers.behind), device)
        if set(layers.ahead) & set(inner):
            reads |= _grouped(_within(exchange), bool(layers.behind), device, INNER)
        for layer in layers.behind:
            read = (_within(exchange) if layer in inner else exchange).read(layer)
            if read is None or read.known is not None:
                return None
            fused = exchange.amount is not None and read.unit is not None
            for kind in _READ if fused else _READ[:2]:
                reads[named(BANK, kind, layer)] = getattr(read, kind)
            fuses = fuses or fused
        if fuses:
            reads[AMOUNT] = exchange.amount.view(1)
            reads[THRESHOLD] = exchange.threshold.view(1)
        return cls(layers, frames, reads, inner)

    def tell(self, exchange: Exchange) -> None:
        """Hand on what the network gave, as if it had given it there."""
        for layer in self.layers.behind:
            dtype = self.reads[named(BANK, "k", layer)].dtype
            own = {
                kind: self.wrote[named(OWN, kind, layer)].to(dtype)
                for kind in ("kvo" if layer in self.layers.fused else "kv")
            }
            to = _within(exchange) if layer in self.inner else exchange
            to.write(layer, own["k"], own["v"])
            if "o" in own:
                to.write_out(layer, own["o"])

    def shape(self, output: str) -> tuple[int, ...]:
        """Of an output of the network that is run."""
        rows, tokens, channels = self.reads[read_of(output)].shape
        return rows, tokens // self.frames, channels


class Fed(Exchange):
    """The exchange of a network that is given tensors: what is traced, or run as it is.

    Args:
        told: what it reads; what its layers write goes there.
        where: of the groups, "" or INNER.
    """

    def __init__(self, rows: int, told: Remembered, where: str = ""):
        self._told, reads = told, told.reads
        seen, who = SEEN + where, WHO + where
        count = sum(name.removeprefix(seen).isdigit() for name in reads)
        groups = [Group(reads.get(f"{who}{i}"), reads[f"{seen}{i}"], False) for i in range(count)]
        super().__init__(rows, groups or None, reads.get(AMOUNT), reads.get(THRESHOLD))

    def read(self, layer: str) -> Read | None:
        found = [self._told.reads.get(named(BANK, kind, layer)) for kind in _READ]
        return None if found[0] is None else Read(*found)

    def write(self, layer: str, k: Tensor, v: Tensor) -> None:
        self._told.wrote[named(OWN, "k", layer)] = k
        self._told.wrote[named(OWN, "v", layer)] = v

    def write_out(self, layer: str, o: Tensor) -> None:
        self._told.wrote[named(OWN, "o", layer)] = o


def _within(exchange: Exchange) -> Exchange:
    """Of the rows that run the inner blocks."""
    return exchange if exchange.inner is None else exchange.inner


def _grouped(
    exchange: Exchange, remembers: bool, device: torch.device, where: str = ""
) -> dict[str, Tensor]:
    """Whom each row of a call sees."""
    seen, who = SEEN + where, WHO + where
    groups = exchange.groups
    if groups is None:
        return {f"{seen}0": torch.arange(exchange.rows, device=device)[:, None]}
    if len(groups) > 1 and not remembers:
        groups = [_evened(groups, exchange.rows)]
    reads = {f"{seen}{i}": group.members for i, group in enumerate(groups)}
    if len(groups) > 1:
        reads |= {f"{who}{i}": group.rows for i, group in enumerate(groups)}
    return reads


def _evened(groups: Sequence[Group], rows: int) -> Group:
    """One group: a row that sees fewer than others sees each of them several times.

    Attention over what is said twice is attention over it, unless there is more to attend to.
    """
    wide = math.lcm(*(group.members.shape[1] for group in groups))
    out = groups[0].members.new_empty((rows, wide))
    for group in groups:
        out.index_copy_(0, group.rows, group.members.repeat(1, wide // group.members.shape[1]))
    return Group(None, out, False)
