"""Self-attention that sees more than its own row: other rows of the tick, and what is remembered.

Future-frame attention (StreamDiffusion, arXiv 2312.12491v2, section 3.2): keys and values of all
rows of a tick that belong together are put side by side, queries stay per row,

    softmax(q [k_0 ... k_n-1]^T / sqrt d) [v_0 ... v_n-1].

Extended attention (StreamV2V, arXiv 2405.15757, section 4.1): behind them stand the keys and values
of frames before. No mask and no weight in either.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..upload import uploaded

# attention(q [R, S, C], k [R, K, C], v, mask [R, 1, K] of what is seen, or None) -> [R, S, C]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Group:
    """Rows of a call that see equally many others.

    Attributes:
        rows: which of the call, int64 [R']; None for all of them in order.
        members: whom each of them sees, int64 [R', g].
        whole: every row sees all rows, so one attention over the reshaped batch does.
    """

    rows: Tensor | None
    members: Tensor
    whole: bool


class Read(NamedTuple):
    """What a layer remembers, for each row of a call.

    Attributes:
        k, v: [R, M, C].
        unit, norm: of the layer's outputs, as unit vectors [R, M', C] and their lengths [R, M'];
            None where these are not remembered.
        known: which of a row's frames there are, [R, m], M = m * L; None where there are all.
    """

    k: Tensor
    v: Tensor
    unit: Tensor | None = None
    norm: Tensor | None = None
    known: Tensor | None = None

    def seen(self, tokens: int) -> Tensor | None:
        """`known` per token, [R, tokens]; None where all are."""
        if self.known is None:
            return None
        return self.known.repeat_interleave(tokens // self.known.shape[1], 1)


class Part(NamedTuple):
    """What some rows of a call attend to.

    Attributes:
        rows: as Group.rows.
        k, v: [R', K, C].
        mask: of what is seen, [R', 1, K], or None for all.
    """

    rows: Tensor | None
    k: Tensor
    v: Tensor
    mask: Tensor | None


def grouped(alike: Sequence[Hashable], device: torch.device) -> list[Group]:
    """The groups of a call's rows, those that see fewest others first.

    Args:
        alike: of each row; rows of equal values see each other, in the order of the call.
    """
    members = [[j for j, other in enumerate(alike) if other == one] for one in alike]
    out = []
    for size in sorted({len(seen) for seen in members}):
        rows = [r for r, seen in enumerate(members) if len(seen) == size]
        index = uploaded(torch.tensor([members[r] for r in rows]), device)
        all_rows = len(rows) == len(alike)
        own = None if all_rows else uploaded(torch.tensor(rows), device)
        out.append(Group(own, index, size == len(alike)))
    return out


def attend(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group] | None = None,
    read: Read | None = None,
) -> Tensor:  # fmt: skip
    """One self-attention, [R, S, C].

    Args:
        q: [R, S, C].
        k, v: each row's own, [R, L, C].
        groups: who sees whom; None where every row sees itself only.
        read: what is remembered for each row.
    """
    if groups is not None and read is None and len(groups) == 1 and groups[0].whole:
        k, v = (t.reshape(1, -1, t.shape[-1]) for t in healed(k, v, groups[0]))
        return attention(q.reshape(1, -1, q.shape[-1]), k, v, None).view(q.shape[:2] + v.shape[2:])
    out = None
    for part in parts(k, v, groups, read):
        if part.rows is None:
            return attention(q, part.k, part.v, part.mask)
        own = attention(q.index_select(0, part.rows), part.k, part.v, part.mask)
        if out is None:
            out = own.new_empty((q.shape[0], *own.shape[1:]))
        out.index_copy_(0, part.rows, own)
    return out


def parts(
    k: Tensor, v: Tensor, groups: Sequence[Group] | None, read: Read | None
) -> Iterator[Part]:
    """What the rows attend to, in as many parts as there are numbers of keys."""
    if groups is None:
        yield _with(read, None, k, v)
        return
    for group in groups:
        healthy = healed(k, v, group)
        if group.whole:
            wide = (t.reshape(1, -1, t.shape[-1]).expand(t.shape[0], -1, -1) for t in healthy)
        else:
            wide = healthy
        yield _with(read, group.rows, *wide)


def healed(k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Keys and values that a group's rows see, without those of rows with a non-finite value.

    These are replaced by those of the first finite row that is seen, on the device.

    Returns:
        [R, L, C] each for a whole group, else [R', g * L, C].
    """
    sums = [t.flatten(1).sum(1, dtype=torch.float32) for t in (k, v)]
    finite = (sums[0] + sums[1]).isfinite()[group.members]
    # argmax gives the first of equal ones
    first = group.members.gather(1, finite.to(torch.int32).argmax(1, keepdim=True))
    members = torch.where(finite, group.members, first)
    if group.whole:
        return k.index_select(0, members[0]), v.index_select(0, members[0])
    count = members.shape[0]
    k, v = (t.index_select(0, members.flatten()) for t in (k, v))
    return k.view(count, -1, k.shape[-1]), v.view(count, -1, v.shape[-1])


def _with(read: Read | None, rows: Tensor | None, k: Tensor, v: Tensor) -> Part:
    """Keys and values of some rows with what these remember behind them."""
    if read is None:
        return Part(rows, k, v, None)
    pick = (lambda t: t) if rows is None else (lambda t: t.index_select(0, rows))
    mask, tokens = read.seen(read.k.shape[1]), k.shape[1]
    if mask is not None:
        own = torch.ones((k.shape[0], tokens), dtype=torch.bool, device=k.device)
        mask = torch.cat([own, pick(mask)], 1)[:, None]
    return Part(rows, torch.cat([k, pick(read.k)], 1), torch.cat([v, pick(read.v)], 1), mask)
