"""Residual classifier-free guidance (RCFG) in clean-prediction form.

StreamDiffusion (arXiv 2312.12491, equations 5 and 6) replaces the negative prompt's noise by a
virtual one, the residual that leads from x back to a known reference. In terms of clean
predictions, with reference r and magnitude delta, that negative is

    u = x - delta * (x - r)

and the guided prediction is u + cfg * (denoised - u). In this form it holds for epsilon, v and flow
models alike, and needs no recurrence: r travels with the frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Mode = Literal["self-negative", "onetime-negative", "full", "off"]
MODES: tuple[Mode, ...] = ("self-negative", "onetime-negative", "full", "off")


def residual_negative(x: Tensor, reference: Tensor, delta: float) -> Tensor:
    """The virtual negative prediction. All [R, C, H, W]; delta 1 gives the reference itself."""
    return x - delta * (x - reference)


def guided(denoised: Tensor, negative: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) on clean predictions, [R, C, H, W]."""
    return negative + (denoised - negative) * cfg


class Rows(Protocol):
    """What guidance needs to know of the rows of one model call."""

    x: Tensor  # [R, C, H, W]
    sigma: Tensor  # [R]
    source: Tensor  # [R, C, H, W], clean latents the rows started from
    entered: slice  # the rows that are in slot 0

    def remember(self, negative: Tensor | None) -> Tensor:
        """Keep `negative` [E, C, H, W] as the entered rows' reference; returns all references."""


Which = Literal["none", "entered", "all"]
# predict(rows, which): the positive predictions [R, ...], the negative ones of the rows asked for
Predict = Callable[[Rows, Which], tuple[Tensor, Tensor | None]]


@dataclass
class Guidance:
    """The knobs of the guider. All may change between two ticks.

    Attributes:
        mode: `self-negative` points at the source latent (no extra rows), `onetime-negative` at the
            real negative prediction made while a frame is in slot 0 (F extra rows), `full` asks the
            model for the negative of every row (twice the rows), `off` takes the prompt as it is.
        cfg: guidance scale; 1 leaves the prediction as it is.
        delta: magnitude of the virtual residual noise; only self- and onetime-negative use it.
    """

    mode: Mode = "self-negative"
    cfg: float = 1.4
    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: {self.mode!r} is none of {', '.join(MODES)}")

    def sides(self, rows: Rows, predict: Predict) -> tuple[Tensor, Tensor | None]:
        """Positive and negative clean prediction of every row; None where no negative acts."""
        if self.mode == "self-negative":
            denoised, _ = predict(rows, "none")
            return denoised, residual_negative(rows.x, rows.source, self.delta)
        if self.mode == "onetime-negative":
            asks = rows.x[rows.entered].shape[0] > 0
            denoised, negative = predict(rows, "entered" if asks else "none")
            reference = rows.remember(negative)
            return denoised, residual_negative(rows.x, reference, self.delta)
        if self.mode == "full" and self.cfg != 1.0:
            return predict(rows, "all")
        denoised, _ = predict(rows, "none")
        return denoised, None

    def __call__(self, rows: Rows, predict: Predict) -> Tensor:
        """Guided clean predictions, [R, C, H, W]."""
        denoised, negative = self.sides(rows, predict)
        return denoised if negative is None else guided(denoised, negative, self.cfg)
