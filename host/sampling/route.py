"""The one decision how ticks reach the model, and why not faster.

Each road gives what ComfyUI gives of a frame alone; the earlier in the list, the more of it is
prepared and the more rows share a call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import comfy.model_management
import comfy.samplers
from comfy.model_base import BaseModel
from torch.utils.hooks import RemovableHandle

from ...engine.guidance import Guidance
from ..models import looks
from ..models.looks import Look
from .guider import RCFGGuider
from .rows import Batch

# ComfyUI's guiders that do with each row the same, by the file they are in
_GUIDERS = {"comfy_extras/nodes_custom_sampler.py": ("Guider_Basic", "Guider_DualCFG")}
_SAMPLING = (
    "__call__", "outer_predict_noise", "predict_noise", "inner_sample", "outer_sample", "sample",
)  # fmt: skip
_OWN = ("apply_model", "_apply_model", "process_timestep")  # what a direct call does not make


class Road(IntEnum):
    """How a tick reaches the model."""

    DIRECT = 0  # the network itself, with the numbers around it worked out once
    PREPARED = 1  # one call of apply_model with rows prepared once
    GUIDER = 2  # the guider, with all rows that ComfyUI treats alike
    PER_LEVEL = 3  # the guider, once for each noise level
    PER_FRAME = 4  # the guider's own sample(), once for each frame and for all of its steps

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Route:
    """A road, and why it is not a faster one.

    Attributes:
        why: empty on the fastest road.
        guidance: what is applied where the guider itself is not asked.
    """

    road: Road
    why: str = ""
    guidance: Guidance | None = None

    def at_least(self, road: Road, why: str) -> "Route":
        """This route, or the slower road where that is asked for."""
        return self if self.road >= road else Route(road, why, self.guidance)


_ROADS = {Look.ROWS: Road.GUIDER, Look.LEVEL: Road.PER_LEVEL, Look.FRAME: Road.PER_FRAME}


def before(guider) -> Route | None:
    """The route where it is certain before the guider's sample() begins: PER_FRAME, or None."""
    patcher = guider.model_patcher
    # a guider of another pack may keep none
    known = vars(guider).get("original_conds", {})
    entries = [entry for side in known.values() for entry in side]
    found = [
        *_of_guider(guider), *looks.of_options(patcher.model_options),
        *looks.of_patcher(patcher), *looks.of_model(patcher.model),
        *(one for entry in entries for one in looks.of_entry(entry)),
    ]  # fmt: skip
    look, why = looks.most(iter(found))
    return Route(Road.PER_FRAME, why) if look is Look.FRAME else None


def route(guider, model, options: dict[str, Any], batch: Batch, shape: list[int]) -> Route:
    """The route of a guider's ticks.

    Args:
        guider: whose sample() is under way.
        model: its loaded BaseModel.
        options: model_options as its sampler receives them.
        batch: its processed conditioning.
        shape: of the largest call that a tick may make, [R, C, H, W].
    """
    patcher = guider.model_patcher
    found = [
        *_of_guider(guider), *looks.of_options(options), *looks.of_patcher(patcher),
        *looks.of_model(model),
    ]  # fmt: skip
    look, why = looks.most(iter(found))
    if batch.look > look:
        look, why = batch.look, batch.why
    if look is not Look.ROWS or found:
        return Route(_ROADS[look], why)
    guidance, why = _guidance(guider, batch)
    if not why and not batch.plain:
        why = "the conditioning has areas, masks, percent ranges or a ControlNet"
    if not why and options.get("disable_cfg1_optimization"):
        why = "a node asks for the negative even where it counts nothing"
    if not why and model.memory_required(shape) * 1.5 >= _free(patcher):
        why = "memory is short for one call of all rows"  # ComfyUI knows how to split it
    if why:
        return Route(Road.GUIDER, why)
    own = [name for name in _OWN if getattr(type(model), name) is not getattr(BaseModel, name)]
    if own:
        return Route(
            Road.PREPARED, f"the model {type(model).__name__} has its own {own[0]}", guidance
        )
    return Route(Road.DIRECT, "", guidance)


def _of_guider(guider) -> Iterator[looks.Found]:
    """What a guider does otherwise than ComfyUI's."""
    kind, stock = type(guider), comfy.samplers.CFGGuider
    for name in _SAMPLING:
        if looks.file_of(getattr(stock, name)) != "comfy/samplers.py":
            yield Look.FRAME, f"a pack has replaced ComfyUI's CFGGuider.{name}"
    if own := _own_ways(guider):
        yield Look.FRAME, f"the guider {kind.__name__} has its own {own[0]}"


def _own_ways(guider) -> list[str]:
    kind, stock = type(guider), comfy.samplers.CFGGuider
    own = [name for name in _SAMPLING if name in vars(guider)]
    written = looks.file_of(vars(kind).get("set_conds"))
    if kind is not RCFGGuider and kind.__name__ not in _GUIDERS.get(written, ()):
        own += [n for n in _SAMPLING if getattr(kind, n, None) is not getattr(stock, n)]
    return own


def way_of(guider) -> tuple:
    """The functions on ComfyUI's own way from a guider to the network, to see if one changes."""
    kind, model = type(guider), guider.model_patcher.model
    own, sampling, network = vars(model), vars(model.model_sampling), model.diffusion_model
    return (
        *[getattr(comfy.samplers, name) for name in looks.SEAM],
        kind.predict_noise, kind.outer_predict_noise,
        type(model).apply_model, own.get("apply_model"),
        type(model)._apply_model, own.get("_apply_model"),
        sampling.get("calculate_input"), sampling.get("calculate_denoised"),
        type(network).forward, vars(network).get("forward"),
        RemovableHandle.next_id,  # grows with every hook on any module
    )  # fmt: skip


def samples_itself(guider) -> bool:
    """Whether a guider does more around its sampler than ComfyUI's."""
    return not {"sample", "outer_sample", "inner_sample"}.isdisjoint(_own_ways(guider))


def _guidance(guider, batch: Batch) -> tuple[Guidance | None, str]:
    """What a guider of ComfyUI's or ours does with the two sides, as guidance."""
    if "positive" not in batch.names:
        return None, "the guider has no positive side"
    if type(guider) is RCFGGuider:
        return guider.guidance, ""
    if batch.names == {"positive", "negative"} and not _custom(guider):
        return Guidance("full", guider.cfg), ""
    if batch.names == {"positive"} and guider.cfg == 1.0 and not _custom(guider):
        return Guidance("off"), ""
    return None, f"the guider {type(guider).__name__} guides in its own way"


def _custom(guider) -> bool:
    stock = comfy.samplers.CFGGuider
    return type(guider).predict_noise is not stock.predict_noise


def _free(patcher) -> int:
    """ComfyUI's own measure (comfy.samplers._calc_cond_batch)."""
    return comfy.model_management.get_free_memory(patcher.load_device)
