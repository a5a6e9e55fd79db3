"""Triton kernels of stream.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .stream import SECONDS
from .triton_launch import launch

BLOCK = 1024  # values of a row that a program takes
WARPS = 4


@triton.jit
def _clean(value):
    return tl.where((value == value) & (tl.abs(value) != float("inf")), value, 0.0)


@triton.jit
def _enter_kernel(
    state, source, entry, entering, mix, base, gain, bad, dropped, y, after, size, rows, count,
    ENTRY: tl.constexpr, BASE: tl.constexpr, COPIES: tl.constexpr, TAIL: tl.constexpr,
    FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's part: ENTRY is 0 without noise, 1 for one noise, 2 for one of each frame."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    new = row - tl.load(entering).to(tl.int32)
    enters = (new >= 0) & (new < count)
    fresh = inside & enters
    place = row * size + at
    clean = tl.load(source + new * size + at, mask=fresh, other=0.0).to(tl.float32)
    noised = clean * tl.load(mix)
    if ENTRY == 1:
        noised += tl.load(entry + at, mask=fresh, other=0.0)
    if ENTRY == 2:
        noised += tl.load(entry + new * size + at, mask=fresh, other=0.0)
    x = tl.load(state + place, mask=inside & (enters == 0), other=0.0)
    x = tl.where(enters, noised, x)
    tl.store(state + place, x, mask=fresh)
    tl.store(state + rows * size + place, clean, mask=fresh)
    start = x * tl.load(gain + COPIES * rows + row)
    if BASE:
        start += tl.load(base + COPIES * rows * size + place, mask=inside, other=0.0)
    tl.store(after + place, start, mask=inside)
    seen = (x * tl.load(gain + row)).to(y.dtype.element_ty)
    tl.store(y + place, seen, mask=inside)
    if COPIES == 2:
        tl.store(y + rows * size + place, seen, mask=inside)
    if TAIL:
        tl.store(y + (COPIES * rows + new) * size + at, seen, mask=fresh)
    if (row == 0) & (tl.program_id(1) == 0):
        each = tl.arange(0, FLAGS)
        found = tl.load(bad + each, mask=each < rows, other=0)
        tl.store(bad + each, tl.zeros([FLAGS], tl.int32), mask=each < rows)
        total = tl.sum((found != 0).to(tl.int32)).to(tl.int64)
        tl.store(dropped, tl.load(dropped) + total)


@triton.jit
def _step_kernel(
    state, after, out, weights, reference, past0, past1, past2, kept, own, entering, bad, size,
    rows, count,
    SECOND: tl.constexpr, OWN: tl.constexpr, HISTORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's part: SECOND is 0 for nothing, 1 negative, 2 source, 3 reference."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    place = row * size + at
    new = row - tl.load(entering).to(tl.int32)
    fresh = inside & (new >= 0) & (new < count)
    x = tl.load(state + place, mask=inside, other=0.0)
    total = tl.load(after + place, mask=inside, other=0.0)
    shift = rows * size if SECOND == 1 else 0
    output = tl.load(out + shift + place, mask=inside, other=0.0).to(tl.float32)
    total += output * tl.load(weights + row)
    beside = tl.zeros([BLOCK], tl.float32)
    if SECOND == 1:
        beside = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    if SECOND == 2:
        beside = tl.load(state + rows * size + place, mask=inside, other=0.0)
        tl.store(state + rows * size + place, _clean(beside), mask=fresh)
    if SECOND == 3:
        beside = tl.load(reference + place, mask=inside, other=0.0)
        if OWN:
            negative = tl.load(out + (rows + new) * size + at, mask=fresh, other=0.0)
            first = tl.load(own + new, mask=(new >= 0) & (new < count), other=0.0)
            of_output = tl.load(own + count + new, mask=(new >= 0) & (new < count), other=0.0)
            mine = x * first + negative.to(tl.float32) * of_output
            beside = tl.where(fresh, mine, beside)
        tl.store(reference + place, _clean(beside), mask=fresh)
    if SECOND > 0:
        total += beside * tl.load(weights + rows + row)
    NEXT: tl.constexpr = 2 if SECOND > 0 else 1
    if HISTORY > 0:
        newest = tl.load(past0 + place, mask=inside, other=0.0)
        total += newest * tl.load(weights + NEXT * rows + row)
        keep = x * tl.load(kept + row) + output * tl.load(kept + rows + row)
        if SECOND > 0:
            keep += beside * tl.load(kept + 2 * rows + row)
        keep += newest * tl.load(kept + (NEXT + 1) * rows + row)
        if HISTORY > 1:
            older = tl.load(past1 + place, mask=inside, other=0.0)
            total += older * tl.load(weights + (NEXT + 1) * rows + row)
            if HISTORY > 2:
                oldest = tl.load(past2 + place, mask=inside, other=0.0)
                total += oldest * tl.load(weights + (NEXT + 2) * rows + row)
                tl.store(past2 + place, older, mask=inside)
            tl.store(past1 + place, newest, mask=inside)
        tl.store(past0 + place, _clean(keep), mask=inside)
    cleaned = _clean(total)
    wrong = tl.sum((cleaned != total).to(tl.int32))
    tl.store(bad + row, 1, mask=wrong > 0)
    tl.store(state + place, cleaned, mask=inside)


def stream_enter(
    state: Tensor, source: Tensor, entry: Tensor | None, entering: Tensor, mix: Tensor,
    base: Tensor | None, gain: Tensor, bad: Tensor, dropped: Tensor, tail: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, size, count = state.shape[1], state[0, 0].numel(), entering.shape[0]
    copies = gain.shape[0] - 1
    seen = copies * rows + (count if tail else 0)
    y = torch.empty((seen, *state.shape[2:]), dtype=dtype, device=state.device)
    after = torch.empty_like(state[0])
    noises = 0 if entry is None else 1 if entry.shape[1] == 1 else 2
    launch(
        _enter_kernel, (rows, triton.cdiv(size, BLOCK)),
        state, source, state if entry is None else entry, entering, mix,
        state if base is None else base, gain, bad, dropped, y, after, size, rows, count,
        ENTRY=noises, BASE=base is not None, COPIES=copies, TAIL=tail,
        FLAGS=triton.next_power_of_2(rows), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y, after


def stream_step(
    state: Tensor, after: Tensor, out: Tensor, weights: Tensor, second: str,
    reference: Tensor | None, past: list[Tensor], kept: Tensor | None, own: Tensor | None,
    entering: Tensor, bad: Tensor,
) -> None:  # fmt: skip
    rows, size = state.shape[1], state[0, 0].numel()
    # tensors that are not there are not read
    pasts = [*past, *[state] * (3 - len(past))]
    launch(
        _step_kernel, (rows, triton.cdiv(size, BLOCK)),
        state, after, out, weights, state if reference is None else reference, *pasts,
        weights if kept is None else kept, weights if own is None else own, entering, bad, size,
        rows, entering.shape[0],
        SECOND=SECONDS.index(second), OWN=own is not None, HISTORY=len(past), BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
