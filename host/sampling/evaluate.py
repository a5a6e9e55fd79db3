"""One tick's rows through the user's model, exactly as ComfyUI would evaluate each frame alone.

Two paths give equal results. The fast one calls the model once with rows prepared beforehand; it
is taken only where a written-down predicate (`fast_guidance`) holds. Everything else goes through
the guider itself, so LoRA hooks, ControlNet, attention patches, wrappers and cfg functions act.
Where ComfyUI looks at the first row only (percent ranges, hooks, cfg functions), rows are split
into calls whose first row speaks for all.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...engine.guidance import Guidance
from ...engine.ring import TickRows
from ..models.options import ENGINE, empty, foreign
from .conditioning import Conds, Payload, Traits, merge, merge_entries, plain, traits
from .guider import RCFGGuider

# functions that may look at one noise level for the whole batch, so they get one level at a time
_ONE_LEVEL = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "context_handler",
)
_SAMPLING = (
    "__call__",
    "outer_predict_noise",
    "predict_noise",
    "inner_sample",
    "outer_sample",
    "sample",
)
_HUNG = ("wrappers", "callbacks")
_KNOWN_OPTIONS = ("transformer_options", "to_load_options")


@dataclass
class Calls:
    """Model calls and rows, counted where ComfyUI enters the model (BaseModel.apply_model)."""

    calls: int = 0
    rows: int = 0

    def __call__(self, executor, x, *args, **kwargs):
        self.calls += 1
        self.rows += x.shape[0]
        return executor(x, *args, **kwargs)


@dataclass
class Visit:
    """A guider whose model is loaded and whose conditioning is processed.

    Attributes:
        guider: has inner_model set for the duration.
        model: the loaded BaseModel.
        conds: its processed conditioning.
        options: model_options as a sampler receives them.
        seed: as a sampler receives it.
        guidance: what the fast path applies, or None where only the guider itself is right.
    """

    guider: Any
    model: Any
    conds: Conds
    options: dict[str, Any]
    seed: int | None
    guidance: Guidance | None = None
    batches: dict[tuple, tuple] = field(default_factory=dict)

    @property
    def traits(self) -> Traits:
        """Of the conditioning, looked through once."""
        known = self.batches.get(("traits",))
        if known is None or known[0] is not self.conds:
            # the model's functions must not see mixed noise levels
            per_sigma = any(self.options.get(name) for name in _ONE_LEVEL)
            known = self.conds, traits(self.conds, self.model, per_sigma)
            self.batches[("traits",)] = known
        return known[1]


def fast_guidance(guider, conds: Conds, options: dict[str, Any]) -> Guidance | None:
    """The guidance of a guider whose model may be called directly, else None.

    Admitted: RCFGGuider, CFGGuider and guiders that change nothing of it; one plain entry per side
    (`conditioning.plain`); no cfg, calc or model function, context handler or unknown option; no
    patch, wrapper or callback but an engine's; no injection or additional model. LoRA needs no
    care, being patched into the weights.
    """
    if not plain(conds) or "positive" not in conds:
        return None
    if any(options[name] for name in options.keys() - {*_KNOWN_OPTIONS}):
        return None
    if any(not _harmless(options.get(name, {})) for name in _KNOWN_OPTIONS):
        return None
    patcher = guider.model_patcher
    if any(foreign(getattr(patcher, name)) for name in _HUNG):
        return None
    others = {k: v for k, v in patcher.additional_models.items() if k != ENGINE}
    if not (empty(others) and empty(patcher.injections)):
        return None
    if type(guider) is RCFGGuider:
        return guider.guidance
    if not _stock(guider):
        return None
    if conds.keys() == {"positive", "negative"}:
        return Guidance("full", guider.cfg)
    return Guidance("off") if conds.keys() == {"positive"} and guider.cfg == 1.0 else None


def _harmless(options: dict[str, Any]) -> bool:
    """True for transformer_options in which there is nothing but an engine."""
    inner = {k: v for k, v in options.items() if k not in ("sample_sigmas", *_HUNG)}
    return empty(inner) and not any(foreign(options.get(name, {})) for name in _HUNG)


def _stock(guider) -> bool:
    """True for a guider that samples exactly as CFGGuider does, such as BasicGuider's."""
    stock = comfy.samplers.CFGGuider
    return all(getattr(type(guider), name, None) is getattr(stock, name) for name in _SAMPLING)


@dataclass
class Group:
    """Rows of a tick that share a call (engine.guidance.Rows)."""

    x: Tensor
    sigma: Tensor
    source: Tensor
    entered: slice
    conds: Conds
    index: list[int] | None = None  # rows of the tick; None means all
    whole: TickRows | None = None

    def remember(self, negative: Tensor | None) -> Tensor:
        if self.index is None:
            return self.whole.remember(negative)
        first = self.whole.entered.start
        offsets = [self.index[j] - first for j in range(self.entered.start, self.entered.stop)]
        return self.whole.remember(negative, offsets)[self.index]


def evaluate(visit: Visit, rows: TickRows) -> Tensor:
    """Guided clean predictions of all rows, [R, C, H, W]."""
    payloads = [p for place in rows.places for p in place.payloads]
    masked = any(p.mask is not None for p in payloads)
    if masked:
        mask, rows, source = _inpaint(visit, rows, payloads)
    groups = _groups(visit, rows, payloads)
    if len(groups) == 1:
        out = _call(visit, groups[0])
    else:
        out = torch.empty_like(rows.x)
        for group in groups:
            out[group.index] = _call(visit, group)
    return out * mask + source * (1.0 - mask) if masked else out


def _groups(visit: Visit, rows: TickRows, payloads: list[Payload]) -> list[Group]:
    buckets: dict[tuple, list[int]] = {}
    r = 0
    for place in rows.places:
        for payload in place.payloads:
            buckets.setdefault(payload.gate(place.sigma), []).append(r)
            r += 1
    shared: list[tuple[list[int], Conds]] = []
    for index in buckets.values():
        shared += sharing([payloads[i] for i in index], index, visit.model)
    if len(shared) == 1:
        return [Group(rows.x, rows.sigma, rows.source, rows.entered, shared[0][1], None, rows)]
    out = []
    for index, conds in shared:
        entered = [j for j, i in enumerate(index) if rows.entered.start <= i < rows.entered.stop]
        span = slice(entered[0], entered[-1] + 1) if entered else slice(0, 0)
        x, sigma, source = rows.x[index], rows.sigma[index], rows.source[index]
        out.append(Group(x, sigma, source, span, conds, index, rows))
    return out


def sharing(payloads: list[Payload], index: list[int], model) -> list[tuple[list[int], Conds]]:
    """The rows that may share a call, and its conditioning."""
    first = payloads[0]
    if not first.controlled and all(p.key == first.key for p in payloads):
        return [(index, first.conds)]
    # controls are merged even where alike: ComfyUI cleans a run's own controls up after it
    merged = merge(payloads, model)
    if merged is not None:
        return [(index, merged)]
    by_key: dict[tuple, list[int]] = {}
    for j, p in enumerate(payloads):
        by_key.setdefault(p.key, []).append(j)
    out = []
    for rows in by_key.values():
        alike = [payloads[j] for j in rows]
        out.append(([index[j] for j in rows], merge(alike, model) or alike[0].conds))
    return out


def _call(visit: Visit, group: Group) -> Tensor:
    if visit.guidance is not None and plain(group.conds):
        return visit.guidance(group, lambda rows, which: _predict(visit, rows, which))
    guider = visit.guider
    before = guider.conds
    guider.conds, guider.rows = group.conds, group
    try:
        return guider(group.x, group.sigma, model_options=visit.options, seed=visit.seed)
    finally:
        guider.conds, guider.rows = before, None


def _predict(visit: Visit, rows: Group, which: str) -> tuple[Tensor, Tensor | None]:
    """The fast path: what calc_cond_batch does for plain conditioning, prepared once per batch."""
    batch = prepared(visit, rows.conds, which, rows.x.shape[0], rows.entered)
    if batch is None:
        at = rows.entered if which == "entered" else slice(0, rows.x.shape[0])
        return _predict_apart(visit, rows, at)
    return apply(visit, rows, which, batch)


def asked(values: Tensor, entered: slice, which: str) -> Tensor:
    """What a call is asked of x or sigma: [R, ...] for the prompt, and the negative's rows."""
    if which == "none":
        return values
    # comfy.samplers._calc_cond_batch puts the unconditional rows first
    return torch.cat([values, values[entered] if which == "entered" else values])


def apply(visit: Visit, rows, which: str, batch: tuple) -> tuple[Tensor, Tensor | None]:
    """One call of the model for rows whose conditioning is `prepared`."""
    cond, labels, uuids = batch
    options = visit.options.get("transformer_options", {})
    transformer = {**options, "cond_or_uncond": labels[:], "uuids": uuids[:], "sigmas": rows.sigma}
    x, sigma = (asked(values, rows.entered, which) for values in (rows.x, rows.sigma))
    out = visit.model.apply_model(x, sigma, **cond, transformer_options=transformer)
    r = rows.x.shape[0]
    if which == "none":
        return out, None
    if which == "entered":
        return out[:r], out[r:]
    negative, positive = out.chunk(2)
    return positive, negative


def _predict_apart(visit: Visit, rows: Group, at: slice) -> tuple[Tensor, Tensor]:
    """Two sides that cannot share a call (prompts of odd lengths) get one each."""
    denoised, _ = _predict(visit, rows, "none")
    flipped = {"positive": rows.conds["negative"]}
    asked = Group(rows.x[at], rows.sigma[at], rows.source[at], slice(0, 0), flipped)
    return denoised, _predict(visit, asked, "none")[0]


def prepared(visit: Visit, conds: Conds, which: str, r: int, span: slice) -> tuple | None:
    """Model conditioning for r rows: (kwargs, cond_or_uncond, uuids).

    None where the two sides cannot share a call.
    """
    if which != "entered":
        span = slice(0, 0)
    key = (id(conds), which, r, span.start, span.stop)
    known = visit.batches.get(key)
    if known is not None and known[0] is conds:
        return known[1]
    positive, negative = conds["positive"], conds.get("negative")
    if which == "entered":
        sides = [*[positive] * r, *[negative] * (span.stop - span.start)]
        indices = [*range(r), *range(r)[span]]
        entries, labels = merge_entries(sides, indices, visit.model), [0]
    else:
        entries = [negative[0], positive[0]] if which == "all" else positive
        labels = [1, 0] if which == "all" else [0]
    batch = None
    if entries is not None:
        size = r if which != "entered" else r + span.stop - span.start
        parts = [
            {k: v.process_cond(batch_size=size, area=None) for k, v in e["model_conds"].items()}
            for e in entries
        ]
        if all(comfy.samplers.cond_equal_size(parts[0], c) for c in parts[1:]):
            batch = (comfy.samplers.cond_cat(parts), labels, [e["uuid"] for e in entries])
    if len(visit.batches) > 32:
        visit.batches.clear()
    visit.batches[key] = (conds, batch)
    return batch


def _inpaint(visit: Visit, rows: TickRows, payloads: list[Payload]):
    """Outside a frame's mask, x is the source at the row's noise level (KSamplerX0Inpaint)."""
    everywhere = torch.ones_like(rows.source[:1])
    # ComfyUI gives masks of one channel or of all
    mask = torch.cat(
        [everywhere if p.mask is None else p.mask.expand_as(everywhere) for p in payloads]
    )
    change = visit.options.get("denoise_mask_function")
    if change is not None:
        parts = []
        for place, span in zip(rows.places, rows.spans, strict=True):
            extra = {
                "model": visit.guider,
                "sigmas": torch.tensor(place.course.sigmas, device=rows.x.device),
            }
            parts.append(change(rows.sigma[span], mask[span], extra_options=extra))
        mask = torch.cat(parts)
    zero = torch.zeros_like(rows.source[:1])
    noise = torch.cat([zero if p.noise is None else p.noise for p in payloads])
    known = visit.model.scale_latent_inpaint(
        x=rows.x, sigma=rows.sigma, noise=noise, latent_image=rows.source, denoise_mask=mask
    )
    x = rows.x * mask + known * (1.0 - mask)
    return mask, dataclasses.replace(rows, x=x), rows.source


def count_into(calls: Calls, options: dict[str, Any]) -> None:
    """Let `calls` see every entry into the model made with these options."""
    comfy.patcher_extension.add_wrapper_with_key(
        comfy.patcher_extension.WrappersMP.APPLY_MODEL,
        "livediffusion.calls",
        calls,
        options,
        is_model_options=True,
    )
