"""Every schedule that somebody made by hand and ComfyUI or this pack has, from one first level."""

import logging
from collections.abc import Iterable, Iterator
from itertools import pairwise

import comfy.samplers
import numpy as np
from torch import Tensor

BESIDE = ("simple", "karras", "beta")  # what plots show
_SAME = 0.01  # levels nearer than this in their logarithm are the same


def of_comfyui(sampling, flow: bool, steps: int) -> Iterator[tuple[str, Tensor]]:
    """ComfyUI's schedulers and the nodes beside them, each with its levels.

    Args:
        sampling: the MODEL's model_sampling.
        flow: whether it is a flow model's.
        steps: n.
    """
    for name in comfy.samplers.SCHEDULER_NAMES:
        try:
            yield name, comfy.samplers.calculate_sigmas(sampling, name, steps)
        except Exception as error:  # a scheduler of another pack, or one too few steps
            logging.debug("LiveDiffusion: no %s schedule of %d steps: %s", name, steps, error)
    if flow:
        from comfy_extras.nodes_optimalsteps import NOISE_LEVELS, OptimalStepsScheduler

        if steps >= 3:
            for kind in NOISE_LEVELS:
                yield f"optimal steps {kind}", _of(OptimalStepsScheduler, kind, steps)
        return
    from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler
    from comfy_extras.nodes_gits import NOISE_LEVELS, GITSScheduler

    for kind in ("SD1", "SDXL", "SVD"):
        yield f"align your steps {kind}", _of(AlignYourStepsScheduler, kind, steps)
    if steps >= 2:
        for coefficient in NOISE_LEVELS:
            yield f"gits {coefficient}", _of(GITSScheduler, coefficient, steps)


def _of(node, first, steps: int) -> Tensor:
    return node.execute(first, steps, 1.0).args[0]


def fitted(
    found: Iterable[tuple[str, Tensor]], steps: int, top: float
) -> dict[str, tuple[float, ...]]:
    """Those that can be used: n steps from `top` to 0, no two the same.

    A longer schedule gives its last n steps, as ComfyUI's denoise does it; the first level is
    moved to the top.
    """
    hands: dict[str, tuple[float, ...]] = {}
    for name, sigmas in found:
        levels = (top, *sigmas[-steps:-1].tolist(), 0.0) if len(sigmas) > steps else ()
        if len(levels) != steps + 1 or any(a <= b for a, b in pairwise(levels)):
            continue
        places = np.log(levels[:-1])
        if all(np.abs(places - np.log(other[:-1])).max() > _SAME for other in hands.values()):
            hands[name] = levels
    return hands


def beside(sampling, steps: int, top: float) -> dict[str, tuple[float, ...]]:
    """A few of ComfyUI's own schedules from the same first level, to be looked at.

    Args:
        sampling: the MODEL's model_sampling.
        steps: n.
        top: the first level.
    """
    known = sampling.sigmas.detach().float().cpu()
    part = (int((known < top * (1 - 1e-4)).sum()) + 1) / len(known)
    total = max(steps, int(steps / part))
    found = ((name, comfy.samplers.calculate_sigmas(sampling, name, total)) for name in BESIDE)
    return fitted(found, steps, top)
