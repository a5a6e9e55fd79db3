"""The shortest way into the UNet: what ComfyUI does around it, worked out once instead of per tick.

`BaseModel.apply_model` scales x, looks up timesteps, casts conditioning and turns the output into a
clean prediction. All of that is the same from tick to tick, or linear in x and output, so a plain
tick (one ungated entry per side, no mask, no ControlNet) hands it to engine.linear as numbers.
"""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.fold import Fold, Level
from ...engine.linear import Linear
from ...engine.plan import Plan
from ...engine.work import Work
from ..models.engines import engine_of
from ..models.unet import inference_dtype
from .evaluate import prepared
from .visit import Calls, Visit

_WHOLE = (torch.int32, torch.int64)
_LEVELS = 1024  # noise levels whose numbers are kept
_BATCHES = 16
_WHICH = {"off": "none", "self-negative": "none", "onetime-negative": "entered", "full": "all"}


class NotLinear(Exception):
    """A model whose prediction is not linear in x and output."""


class Levels:
    """What a model means at each noise level, asked of its model_sampling (engine.fold.Level)."""

    def __init__(self, sampling: Any):
        self._sampling = weakref.ref(sampling)
        self._known: dict[float, Level] = {}
        self._plans: weakref.WeakSet[Plan] = weakref.WeakSet()

    def __call__(self, sigma: float) -> Level:
        """Raises NotLinear."""
        if sigma not in self._known:
            if len(self._known) >= _LEVELS:
                self._known.clear()
            self._known[sigma] = self._ask(sigma)
        return self._known[sigma]

    def ready(self, plan: Plan) -> None:
        """Asks for the levels of a plan, once. Raises NotLinear."""
        if plan not in self._plans:
            for sigma, _ in plan.steps:
                self(sigma)
            self._plans.add(plan)

    def _ask(self, sigma: float) -> Level:
        sampling = self._sampling()
        table = next(sampling.buffers(), torch.empty(0))
        level = torch.tensor([sigma], dtype=torch.float32, device=table.device)
        some = torch.tensor([1.0, -0.7, 0.0, 2.5], device=table.device).view(1, 4, 1, 1)
        other = some.flip(1) + 0.3
        seen = sampling.calculate_input(level, some)
        of_x = sampling.calculate_denoised(level, torch.zeros_like(some), some)
        of_output = sampling.calculate_denoised(level, some, torch.zeros_like(some))
        scale, a, b = (float(t.flatten()[0]) for t in (seen, of_x, of_output))
        both = sampling.calculate_denoised(level, other, some)
        near = {"rtol": 1e-4, "atol": 1e-5}
        if not (
            torch.allclose(seen, some * scale, **near)
            and torch.allclose(both, some * a + other * b, **near)
        ):
            raise NotLinear(type(sampling).__name__)
        return Level(scale, a, b, float(sampling.timestep(level).float()))


class Asked:
    """What a plain tick asks of the model.

    Attributes:
        which: negative rows in the call.
        cond: tensors for the model, in the dtype it computes in, by argument.
        still: its other arguments.
        labels, uuids: as ComfyUI's patches expect them.
    """

    def __init__(self, which: str, batch: tuple, model, device: torch.device):
        cond, self.labels, self.uuids = batch
        self.which, self.batch = which, batch
        dtype = inference_dtype(model)
        # as comfy.model_base.convert_tensor has it
        self.cond = {
            name: value.to(device, value.dtype if value.dtype in _WHOLE else dtype)
            for name, value in cond.items()
            if isinstance(value, Tensor)
        }
        self.still = {name: value for name, value in cond.items() if name not in self.cond}


class Direct:
    """Direct calls of one stream.

    Args:
        calls: counts them.
    """

    def __init__(self, calls: Calls):
        self._calls = calls
        self._levels: tuple[Any, Levels | None] = (lambda: None, None)
        self._asked: OrderedDict[int, Asked] = OrderedDict()

    def asked(self, visit: Visit, work: Work, steady: bool = False) -> Asked | None:
        """What a tick asks of the model; None where it takes more than one plain call.

        Args:
            steady: ask the same whatever the scale of the guidance is.
        """
        frames = [p for place in work.places for p in place.payloads]
        if any(p.mask is not None or not p.conditioning.batch.direct for p in frames):
            return None
        joint = visit.joints.together([p.conditioning for p in frames], visit.model)
        if joint is None or not joint.plain:
            return None
        guidance = visit.guidance
        which, span = _WHICH[guidance.mode], work.plan.entered
        if (which == "all" and guidance.cfg == 1.0 and not steady) or (
            which == "entered" and work.source is None
        ):
            which = "none"
        if which == "entered" and joint.rows is None:
            span = slice(0, span.stop - span.start)  # the same wherever a frame enters
        batch = prepared(joint, visit.model, which, len(frames), span)
        if batch is None or any(isinstance(value, list) for value in batch[0].values()):
            return None
        known = self._asked.get(id(batch))
        if known is None or known.batch is not batch:
            known = Asked(which, batch, visit.model, work.plan.device)
            self._asked[id(batch)] = known
            while len(self._asked) > _BATCHES:
                self._asked.popitem(last=False)
        return known

    def linear(self, model, levels: Sequence[float]) -> bool:
        """Whether a BaseModel is linear at these noise levels (engine.linear)."""
        known = self._meant_by(model.model_sampling)
        try:
            for sigma in levels:
                known(sigma)
        except NotLinear:
            return False
        return True

    def guide(
        self, visit: Visit, work: Work, asked: Asked, cond: dict[str, Tensor] | None = None
    ) -> Linear | None:
        """The guide of a tick, or None where the model is not linear at its noise levels.

        Args:
            cond: read instead of the tensors that are asked for.
        """
        levels = self._meant_by(visit.model.model_sampling)
        try:
            levels.ready(work.plan)
        except NotLinear:
            return None
        given = asked.cond if cond is None else cond
        return Linear(
            visit.guidance, asked.which, levels,
            lambda y, fold: self._call(visit, asked, given, y, fold), inference_dtype(visit.model),
        )  # fmt: skip

    def _meant_by(self, sampling) -> Levels:
        known, levels = self._levels
        if known() is not sampling:
            levels = Levels(sampling)
            self._levels = weakref.ref(sampling), levels
        return levels

    def _call(self, visit: Visit, asked: Asked, cond: dict[str, Tensor], y: Tensor, fold: Fold):
        """What BaseModel._apply_model calls, with what it would hand over."""
        model, kwargs = visit.model, {**asked.still, **cond}
        kwargs["context"] = kwargs.pop("c_crossattn", None)
        concat = kwargs.pop("c_concat", None)
        if concat is not None:
            y = torch.cat([y, concat], dim=1)
        dynamic = getattr(model.current_patcher, "is_dynamic", None)
        transformer = visit.options.get("transformer_options", {}).copy()
        transformer["cond_or_uncond"], transformer["uuids"] = asked.labels[:], asked.uuids[:]
        transformer["sigmas"] = fold.sigma
        transformer["prefetch_dynamic_vbars"] = dynamic is not None and dynamic()
        self._calls.calls += 1
        self._calls.rows += y.shape[0]
        attached = engine_of(visit.guider.model_patcher)
        if attached is None:
            return model.diffusion_model(
                y, fold.timestep, control=None, transformer_options=transformer, **kwargs
            )
        with attached.serving(model):
            return model.diffusion_model(
                y, fold.timestep, control=None, transformer_options=transformer, **kwargs
            )
