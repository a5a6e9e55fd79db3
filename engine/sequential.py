"""A batch through a course by itself, step after step: what the stream batch gives every frame."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .step_rules import Course


class Place(NamedTuple):
    """Where frames are before a step: their x, and what they remember, newest first."""

    x: Tensor
    past: tuple[Tensor, ...] = ()


def stepped(place: Place, denoised: Tensor, course: Course, k: int) -> Place:
    """Step k of a course.

    Args:
        place: before the step, x [B, ...] at noise level course.levels[k].
        denoised: the model's clean prediction there, [B, ...].
        course: its rule draws no fresh noise (all but `lcm`).
    """
    w = course.steps[k]
    if w.noise:
        raise ValueError("a rule that draws fresh noise leads to no certain end")
    x = place.x * w.x + denoised * w.denoised
    # a frame remembers nothing yet at its first steps
    for kept, weight in zip(place.past, w.past, strict=False):
        if weight:
            x = x + kept * weight
    kept = denoised
    if w.keep != (0.0, 1.0, 0.0):
        kept = place.x * w.keep.x + denoised * w.keep.denoised
        if place.past:
            kept = kept + place.past[0] * w.keep.past
    return Place(x, (kept, *place.past)[: course.rule.history])


def through(predict, x: Tensor, course: Course) -> Iterator[Place]:
    """Every place on the way, the last one the end.

    Args:
        predict: gives the clean prediction of (x, noise level).
        x: [B, ...] at the course's first level.
    """
    place = Place(x)
    for k, level in enumerate(course.levels):
        place = stepped(place, predict(place.x, level), course, k)
        yield place
