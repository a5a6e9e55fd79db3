"""A batch through a course by itself, step after step: what the stream batch gives every frame."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from .step_rules import Course
from .sums import weighted


class State(NamedTuple):
    """Frames before a step: their x, and what they remember, newest first."""

    x: Tensor
    past: tuple[Tensor, ...] = ()


def stepped(state: State, denoised: Tensor, course: Course, k: int) -> State:
    """Step k of a course.

    Args:
        state: before the step, x [B, ...] at noise level course.levels[k].
        denoised: the model's clean prediction there, [B, ...].
        course: its rule draws no fresh noise (all but `lcm`).
    """
    step = course.steps[k]
    if step.noise:
        raise ValueError("a rule that draws fresh noise leads to no certain end")
    # a frame remembers nothing yet at its first steps, and these give nothing a weight
    past = {f"past{i}": kept for i, kept in enumerate(state.past)}
    terms = {"x": state.x, "denoised": denoised, **past}
    history = course.rule.history
    kept = (weighted(step.kept, terms),) if history else ()
    return State(weighted(step.after, terms), (*kept, *state.past)[:history])


def walk(predict: Callable[[Tensor, float], Tensor], x: Tensor, course: Course) -> Iterator[State]:
    """Every state on the way, the last one the end.

    Args:
        predict: gives the clean prediction of (x, noise level).
        x: [B, ...] at the course's first level.
    """
    state = State(x)
    for k, level in enumerate(course.levels):
        state = stepped(state, predict(state.x, level), course, k)
        yield state
