"""Residual guidance as a ComfyUI GUIDER: for the stream, and for every ordinary sampler."""

from dataclasses import dataclass, replace

import comfy.samplers
import torch
from torch import Tensor

from ...engine.guidance import Guidance
from .rows import merge_entries


@dataclass
class SamplerRows:
    """The rows of an ordinary sampler: one frame each, all at the same level (guidance.Rows)."""

    x: Tensor
    sigma: Tensor
    source: Tensor
    entered: slice
    kept: dict[str, Tensor]

    def remember(self, negative: Tensor | None) -> Tensor:
        if negative is not None:
            self.kept["reference"] = negative
        return _rows_of(self.kept.get("reference", self.source), self.x.shape[0])


class RCFGGuider(comfy.samplers.CFGGuider):
    """CFGGuider with the virtual negatives of StreamDiffusion (engine.guidance).

    Wrappers, hooks and cfg functions act as they do on CFGGuider: the virtual negative takes the
    place of the unconditional prediction.
    """

    def __init__(self, model_patcher, guidance: Guidance):
        super().__init__(model_patcher)
        self.guidance = guidance
        self.cfg = guidance.cfg
        self.rows = None  # set by the stream for the duration of a call
        self._source: Tensor | None = None
        self._kept: dict[str, Tensor] = {}

    def inner_sample(self, noise, latent_image, *args, **kwargs):
        clean = latent_image
        if torch.count_nonzero(clean) > 0:
            clean = self.inner_model.process_latent_in(clean)
        self._source, self._kept = clean, {}
        try:
            return super().inner_sample(noise, latent_image, *args, **kwargs)
        finally:
            self._source, self._kept = None, {}

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        options = {} if model_options is None else model_options
        positive = self.conds["positive"]
        negative = self.conds.get("negative")
        if self.guidance.mode in ("full", "off"):
            full = self.guidance.mode == "full"
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, negative if full else None, positive,
                self.guidance.cfg if full else 1.0, model_options=options, seed=seed,
            )  # fmt: skip
        rows = self.rows
        if rows is None:
            rows = self._sampler_rows(x, timestep)
        elif rows.x is not x:
            # a wrapper has changed what comes in
            rows = replace(rows, x=x, sigma=timestep)

        def predict(rows, which):
            return self._predict(rows, which, positive, negative, options)

        denoised, virtual = self.guidance.sides(rows, predict)
        return _combine(
            self.inner_model, denoised, virtual, self.guidance.cfg, x, timestep, options,
            positive, negative,
        )  # fmt: skip

    def _sampler_rows(self, x: Tensor, timestep: Tensor) -> SamplerRows:
        first = 0 if "reference" in self._kept else x.shape[0]
        source = _rows_of(x if self._source is None else self._source, x.shape[0])
        return SamplerRows(x, timestep, source, slice(0, first), self._kept)

    def _predict(self, rows, which, positive, negative, options):
        model, at, r = self.inner_model, rows.entered, rows.x.shape[0]
        if which == "none":
            return _calc(model, [positive, None], rows.x, rows.sigma, options)[0], None
        x, sigma = rows.x[at], rows.sigma[at]
        if not _labelled(options):
            sides = [*[positive] * r, *[negative] * x.shape[0]]
            both = merge_entries(sides, [*range(r), *range(r)[at]], model)
            if both is not None:
                x, sigma = torch.cat([rows.x, x]), torch.cat([rows.sigma, sigma])
                out = _calc(model, [both, None], x, sigma, options)[0]
                return out[:r], out[r:]
        denoised = _calc(model, [positive, None], rows.x, rows.sigma, options)[0]
        return denoised, _calc(model, [None, negative], x, sigma, options)[1]


def _labelled(options) -> bool:
    """True where something may ask which rows are conditional (cond_or_uncond), so sides stay."""
    inner = options.get("transformer_options", {})
    patches = inner.get("patches") or inner.get("patches_replace")
    return bool(patches or options.get("model_function_wrapper"))


def _calc(model, conds, x, sigma, options) -> list[Tensor]:
    """calc_cond_batch, or what a node put in its place (comfy.samplers.sampling_function)."""
    if "sampler_calc_cond_batch_function" in options:
        return options["sampler_calc_cond_batch_function"]({
            "conds": conds, "input": x, "sigma": sigma, "model": model, "model_options": options,
        })  # fmt: skip
    return comfy.samplers.calc_cond_batch(model, conds, x, sigma, options)


def _combine(model, denoised, negative, cfg, x, sigma, options, cond, uncond) -> Tensor:
    """The second half of comfy.samplers.sampling_function, on predictions already made."""
    conds, out = [cond, uncond], [denoised, negative]
    for fn in options.get("sampler_pre_cfg_function", []):
        out = fn({
            "conds": conds, "conds_out": out, "cond_scale": cfg, "timestep": sigma, "input": x,
            "sigma": sigma, "model": model, "model_options": options,
        })  # fmt: skip
    return comfy.samplers.cfg_function(
        model, out[0], out[1], cfg, x, sigma, model_options=options, cond=cond, uncond=uncond
    )


def _rows_of(tensor: Tensor, rows: int) -> Tensor:
    """Samplers may evaluate a batch several times at once; the rows then repeat."""
    if tensor.shape[0] == rows:
        return tensor
    return tensor.repeat(-(-rows // tensor.shape[0]), *[1] * (tensor.ndim - 1))[:rows]
