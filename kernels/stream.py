"""The two ends of a tick around the UNet, each in one launch.

What the weights mean is engine.fold's: no op knows of guidance or step rules. Rows are those of all
places, so entering rows lie side by side: `entering` names them in order.
"""

import torch
from torch import Tensor

from .choice import INDEX, op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HISTORY = 3  # tensors remembered with a row, at most


def _unfit(dtype: torch.dtype, *tensors: Tensor | None) -> str:
    given = [tensor for tensor in tensors if tensor is not None]
    if dtype not in DTYPES or any(tensor.dtype not in DTYPES for tensor in given):
        return f"the kernel takes {DTYPES}"
    if not all(tensor.is_contiguous() for tensor in given):
        return "the rows are not contiguous"
    if any(tensor.numel() >= INDEX for tensor in given):
        return "the rows are too large"
    return ""


def _enter_unfit(state, source, entry, entering, mix, base, gain, bad, dropped, tail, dtype) -> str:
    return _unfit(dtype, state, source, entry, mix, base, gain)


@op("triton_stream", unfit=_enter_unfit, mutates=("state", "bad", "dropped"))
def stream_enter(
    state: Tensor, source: Tensor, entry: Tensor | None, entering: Tensor, mix: Tensor,
    base: Tensor | None, gain: Tensor, bad: Tensor, dropped: Tensor, tail: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Frames enter, and the model gets what it is to see.

    Args:
        state: x and source of every row, [2, R, C, H, W], float32; the entering ones are written.
        source: latents that enter, [b, C, H, W].
        entry: weighted noise of their x, and zeros, [2, b or 1, C, H, W].
        entering: their rows, [b], int64.
        mix: weights of the source in x and in itself, [2, 1, 1, 1, 1], float32.
        base: noise of the step in its last plane, [P + 1, R, C, H, W].
        gain: what the model sees of x, P times, and x's own part of the step, [P + 1, R, 1, 1, 1].
        bad: rows found bad since the last call, [R], int32; counted into `dropped` and emptied.
        dropped: [1], int64.
        tail: the entering rows are seen once more, behind the others.
        dtype: of what the model sees.

    Returns:
        y [P * R (+ b), C, H, W], and the step's beginning [R, C, H, W], float32.
    """
    dropped += (bad != 0).sum()
    bad.zero_()
    both = source[None].float() * mix
    state.index_copy_(1, entering, both if entry is None else both + entry)
    planes = state[0][None] * gain
    if base is not None:
        planes = planes + base
    y = planes[:-1].flatten(0, 1)
    if tail:
        y = torch.cat([y, y.index_select(0, entering)])
    return y.to(dtype, copy=True), planes[-1].clone()


def _step_unfit(
    state, after, out, weights, second, reference, past, kept, own, entering, bad
) -> str:
    if second not in SECONDS:
        return "the arguments are wrong"
    if len(past) > HISTORY:
        return f"more than {HISTORY} tensors are remembered"
    return _unfit(torch.float32, state, after, out, weights, reference, kept, own, *past)


# what stands beside the model's output in the step
SECONDS = ("nothing", "negative", "source", "reference")


@op("triton_stream", unfit=_step_unfit, mutates=("state", "reference", "past", "bad"))
def stream_step(
    state: Tensor, after: Tensor, out: Tensor, weights: Tensor, second: str,
    reference: Tensor | None, past: list[Tensor], kept: Tensor | None, own: Tensor | None,
    entering: Tensor, bad: Tensor,
) -> None:  # fmt: skip
    """Every row takes its step: guidance, step rule, re-noising, what is remembered, the guard.

    A non-finite value becomes 0 and marks its row as bad.

    Args:
        state: x and source of every row, [2, R, C, H, W]; x is written, and the entering sources'
            bad values where they are pointed at.
        after: the step's beginning, [R, C, H, W].
        out: of the model, [M, C, H, W]: for `negative` the negative rows first, for `own` the
            entering rows' negatives behind the others.
        weights: of output, of the second term if there is one, and of each of `past`, [T, R].
        second: one of SECONDS.
        reference: of every row, [R, C, H, W]; for `reference`.
        past: what is remembered, newest first, each [R, C, H, W]; everything moves on by one.
        kept: weights of x, output, the second term and the newest of `past` in what is remembered
            from now on, [3 or 4, R].
        own: weights of x and output in an entering row's own negative, [2, b], which becomes its
            reference.
        entering: [b], int64.
        bad: [R], int32.
    """
    x, r = state[0], state.shape[1]

    def wide(row: Tensor) -> Tensor:
        return row.view(-1, *[1] * (x.ndim - 1))

    others: Tensor | None = None
    output = out[:r]
    if second == "negative":
        others, output = out[:r], out[r:]
    elif second == "source":
        others = state[1]
    elif second == "reference":
        if own is not None:
            fresh = x.index_select(0, entering) * wide(own[0]) + out[r:] * wide(own[1])
            reference.index_copy_(0, entering, fresh)
        others = reference
    terms = [output, *([] if others is None else [others]), *past]
    total = after
    for term, weight in zip(terms, weights, strict=True):
        total = total + term * wide(weight)
    if past:
        named = [x, *terms[: kept.shape[0] - 1]]
        new = sum(term * wide(weight) for term, weight in zip(named, kept, strict=True))
        for newer, older in zip(past[-2::-1], past[:0:-1], strict=True):
            older.copy_(newer)
        past[0].copy_(new.nan_to_num(0.0, 0.0, 0.0))
    bad |= ~total.flatten(1).isfinite().all(1)
    if second in ("source", "reference"):
        healed = others.index_select(0, entering).nan_to_num(0.0, 0.0, 0.0)
        others.index_copy_(0, entering, healed)
    x.copy_(total.nan_to_num(0.0, 0.0, 0.0))
