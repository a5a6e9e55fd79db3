"""A tick in a handful of operations, for models whose prediction is linear in what they return.

ComfyUI's denoisers are: the model sees x * input, and x0 = x * of_x + output * of_output, with
numbers that depend on the noise level alone. Residual guidance (engine.guidance), the step rules
(engine.step_rules) and re-noising are linear too, so per row the whole tick is

    x' = x * w_x + noise + output * w_output + negative * w_negative + reference * w_reference + ...

The weights are worked out in double precision once per layout of rows and setting of the guider.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import stream_enter, stream_step
from .guidance import Guidance
from .step_rules import Weights

if TYPE_CHECKING:
    from .ring import Plan, Work

Which = Literal["none", "entered", "all"]
_TERMS = {
    "off": (), "self-negative": ("reference",), "onetime-negative": ("reference",),
    "full": ("negative",),
}  # fmt: skip


class Level(NamedTuple):
    """A model at one noise level: what it sees, and what its output means."""

    input: float  # the model sees x * input
    of_x: float  # x0 = x * of_x + output * of_output
    of_output: float
    timestep: float


@dataclass
class Linear:
    """A guide that knows the model only by its levels and its raw output.

    Attributes:
        guidance: with cfg and delta as numbers.
        which: negative rows in the call: none, those of the entered rows at its end, or all of them
            at its beginning.
        levels: gives the Level of a sigma; the same object as long as the model means the same.
        model: the raw output of y [M, C, H, W] at the fold's timesteps [M].
        dtype: what y is given in.
    """

    guidance: Guidance
    which: Which
    levels: Callable[[float], Level]
    model: Callable[[Tensor, "Fold"], Tensor]
    dtype: torch.dtype = torch.float32

    def fold(self, plan: "Plan") -> "Fold":
        """The weights for a layout of rows; kept with it until the settings change."""
        guidance = self.guidance
        key = (id(self.levels), self.which, guidance.mode, guidance.cfg, guidance.delta)
        known = plan.fold
        if known is None or known.key != key:
            known = plan.fold = _fold(plan, self, key)
        return known


@dataclass
class Fold:
    """The weights of a tick in one tensor, the dial; the others are views of it.

    Folds of one `form` are put in each other's place by copying dial and base.
    """

    form: tuple[tuple[str, int], ...]
    which: Which
    dial: Tensor  # 1-D, float32
    base: Tensor | None  # noise of the step, [planes, R, C, H, W]; all but the last plane are 0
    dims: int
    key: tuple = ()
    holds: Any = None  # what the key names by id

    def __post_init__(self) -> None:
        parts, at = {}, 0
        for name, count in self.form:
            parts[name] = self.dial[at : at + count]
            at += count

        def columns(name: str, *lead: int) -> Tensor:
            return parts[name].view(*lead, -1, *[1] * self.dims)

        self.sigma = parts["sigma"]  # [R]
        self.timestep = parts["timestep"]  # [M]
        rows = self.sigma.shape[0]
        self.gain = columns("gain", parts["gain"].shape[0] // rows)  # [planes, R, 1, 1, 1]
        self.weights = {  # by target and term, each [R, 1, 1, 1]
            target: {
                name.split(".")[1]: columns(name) for name in parts if name.startswith(f"{target}.")
            }
            for target in ("after", "denoised", "kept", "entered")
        }
        # the same side by side, [terms, R], for the kernels
        self.after, self.kept, self.own = (self._block(p) for p in ("after", "kept", "entered"))
        # of the source in x, and in the source itself, [2, 1, 1, 1, 1]
        self.mix = columns("mix", 2) if "mix" in parts else None

    def _block(self, prefix: str) -> Tensor | None:
        counts = [count for name, count in self.form if name.startswith(f"{prefix}.")]
        if not counts:
            return None
        names = [name.startswith(f"{prefix}.") for name, _ in self.form]
        start = sum(count for _, count in self.form[: names.index(True)])
        return self.dial[start : start + sum(counts)].view(len(counts), -1)

    def at(self, dial: Tensor, base: Tensor | None) -> "Fold":
        """The same weights with their values elsewhere."""
        return Fold(self.form, self.which, dial, base, self.dims)


def _fold(plan: "Plan", guide: Linear, key: tuple) -> Fold:
    dims, device = plan.dims, plan.device
    rows, entered = plan.steps, plan.entered
    levels = [guide.levels(level) for level, _ in rows]
    terms = [_terms(step, at, guide.guidance) for (_, step), at in zip(rows, levels, strict=True)]
    copies = 2 if guide.which == "all" else 1
    timesteps = [level.timestep for level in levels] * copies
    if guide.which == "entered":
        timesteps += timesteps[entered]
    parts = {
        "sigma": [level for level, _ in rows],
        "timestep": timesteps,
        "gain": [level.input for level in levels] * copies + [t["after"]["x"] for t in terms],
    }
    past = [f"past{i}" for i in range(plan.history)]
    mine = ["output", *_TERMS[guide.guidance.mode if guide.which != "none" else _plain(guide)]]
    for target, names in (
        ("after", [*mine, *past]),
        ("denoised", ["x", *mine]),
        ("kept", ["x", *mine, *past[:1]] if past else []),
    ):
        for name in names:
            parts[f"{target}.{name}"] = [t[target].get(name, 0.0) for t in terms]
    if guide.which == "entered":
        parts["entered.x"] = [level.of_x for level in levels[entered]]
        parts["entered.output"] = [level.of_output for level in levels[entered]]
    if plan.mix is not None:
        parts["mix"] = [plan.mix.source, 1.0]
    base = None
    if plan.noise is not None:
        base = torch.zeros(copies + 1, *plan.noise.shape, device=device)
        base[-1] = plan.noise
    numbers = torch.tensor([value for part in parts.values() for value in part])
    form = tuple((name, len(part)) for name, part in parts.items())
    return Fold(form, guide.which, numbers.to(device), base, dims, key, guide.levels)


def _plain(guide: Linear) -> str:
    # full guidance of scale 1 asks for no negative
    return "off" if guide.guidance.mode == "full" else guide.guidance.mode


def _terms(step: Weights, level: Level, guidance: Guidance) -> dict[str, dict[str, float]]:
    """Of one row: what x', the guided prediction and what is remembered take of each term."""
    cfg, delta, mode = guidance.cfg, guidance.delta, guidance.mode
    denoised = {"x": level.of_x, "output": level.of_output}
    if mode == "full":
        denoised["output"] = cfg * level.of_output
        denoised["negative"] = (1 - cfg) * level.of_output
    elif mode != "off":
        # u = x - delta * (x - reference) is the negative (engine.guidance)
        denoised = {
            "x": cfg * level.of_x + (1 - cfg) * (1 - delta),
            "output": cfg * level.of_output,
            "reference": (1 - cfg) * delta,
        }
    after = {name: step.denoised * weight for name, weight in denoised.items()}
    after["x"] += step.x
    after |= {f"past{i}": weight for i, weight in enumerate(step.past)}
    kept = {name: step.keep.denoised * weight for name, weight in denoised.items()}
    kept["x"] += step.keep.x
    kept["past0"] = step.keep.past
    return {"after": after, "denoised": denoised, "kept": kept}


def tick(work: "Work", guide: Linear, fold: Fold | None = None) -> tuple[Tensor, Tensor | None]:
    """One tick; see engine.ring.Work.

    A non-finite value becomes 0 before it reaches the state, and its row is counted.

    Returns:
        The rows after the step, which may be the ring's own, and the guided predictions
        [R, C, H, W]; None for these while a frame leaves, because nobody looks at them then.
    """
    own, plan = work.buffers, work.plan
    if fold is None:
        fold = guide.fold(plan)
        prepare(work, guide)
    if work.full and not own.unfused:
        return _fused(work, guide, fold)
    if work.source is not None:
        entry = work.noise if work.recorded else own.entry(work.noise, plan.mix)
        own.admit(plan, work.source, entry, fold.mix)
    views = own.views(plan)
    x = own.take(own.x, plan.rows) if views.x is None else views.x
    # what the model sees, once or twice, and x's own part of the step
    if fold.base is None:
        planes = torch.mul(x[None], fold.gain)
    else:
        planes = torch.addcmul(fold.base, x[None], fold.gain)
    y, after = planes if len(planes) == 2 else (planes[:-1].flatten(0, 1), planes[-1])
    if fold.which == "entered":
        y = torch.cat([y, own.take(y, plan.entered)])
    out = guide.model(y.to(guide.dtype), fold)
    terms = {"x": x, "output": out}
    if fold.which == "all":
        # comfy.samplers._calc_cond_batch puts the unconditional rows first
        terms["negative"], terms["output"] = out.chunk(2)
    elif fold.which == "entered":
        terms["output"] = out[: x.shape[0]]
    reference = _reference(work, guide, fold, terms, out)
    for i, past in enumerate(own.past):
        terms[f"past{i}"] = own.take(past, plan.rows)
    for name, weight in fold.weights["after"].items():
        after.addcmul_(terms[name], weight)
    denoised = None if work.finishes else _sum(fold.weights["denoised"], terms)
    if own.past:
        own.push(plan.rows, _sum(fold.weights["kept"], terms).nan_to_num_(0.0, 0.0, 0.0))
    own.count(after, work.recorded)
    if reference is not None and work.source is not None:
        own.heal(reference, plan)
    if views.x is not None:
        return torch.nan_to_num(after, 0.0, 0.0, 0.0, out=x), denoised
    own.put(own.x, plan.rows, after.nan_to_num_(0.0, 0.0, 0.0))
    return after, denoised


_SECOND = {"off": "nothing", "self-negative": "source", "onetime-negative": "reference"}


def _fused(work: "Work", guide: Linear, fold: Fold) -> tuple[Tensor, None]:
    """A tick of full slots as two kernels and the model (kernels.stream)."""
    own, plan = work.buffers, work.plan
    entering = plan.index if isinstance(plan.entering, slice) else plan.entering
    entry = work.noise if work.recorded else own.entry(work.noise, plan.mix)
    y, after = stream_enter(
        own.state, work.source, entry, entering, fold.mix, fold.base, fold.gain, own.bad,
        own.bad_rows, fold.which == "entered", guide.dtype,
    )  # fmt: skip
    out = guide.model(y, fold).contiguous()
    second = "negative" if fold.which == "all" else _SECOND.get(guide.guidance.mode, "nothing")
    stream_step(
        own.state, after, out, fold.after, second,
        own.reference if second == "reference" else None, own.past, fold.kept, fold.own, entering,
        own.bad,
    )  # fmt: skip
    return own.x, None


def prepare(work: "Work", guide: Linear) -> None:
    """What Python has to see before a tick, recorded or not."""
    if guide.guidance.mode == "onetime-negative":
        if guide.which == "entered":
            for place in work.places:
                place.referenced |= place.k == 0
        work.buffers.references(work.places, work.plan)


def _reference(work: "Work", guide: Linear, fold: Fold, terms: dict, out: Tensor) -> Tensor | None:
    """Adds what residual guidance points at to `terms`; returns its buffer."""
    mode, own, plan = guide.guidance.mode, work.buffers, work.plan
    if mode not in ("self-negative", "onetime-negative"):
        return None
    buffer = own.source if mode == "self-negative" else own.reference
    if fold.which == "entered":
        # the negative prediction of the frames in slot 0, made once
        fresh = {"x": own.take(terms["x"], plan.entered), "output": out[terms["x"].shape[0] :]}
        if isinstance(plan.entering, slice):
            _sum(fold.weights["entered"], fresh, buffer[plan.entering])
        else:
            own.put(buffer, plan.entering, _sum(fold.weights["entered"], fresh))
    source = own.views(plan).source if buffer is own.source else None
    terms["reference"] = own.take(buffer, plan.rows) if source is None else source
    return buffer


def _sum(weights: dict[str, Tensor], terms: dict[str, Tensor], out: Tensor | None = None) -> Tensor:
    (first, weight), *others = weights.items()
    total = torch.mul(terms[first], weight, out=out)
    for name, weight in others:
        total = total.addcmul_(terms[name], weight)
    return total
