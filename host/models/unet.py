"""ComfyUI's UNet as compiled/ takes it."""

from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, timestep_embedding
from torch import Tensor

from ...compiled.copies import copied
from ...compiled.engine import Call, Refused
from ...compiled.remembered import INNER, Fed
from ...compiled.weights import whole
from ...engine.blocks.plan import BlockPlan
from .coherence import extended
from .walk import walk


class ComfyUNet:
    """A UNet of ComfyUI, called without wrappers and patches (compiled.engine.UNet).

    Args:
        module: the model's `diffusion_model`.
        options: transformer_options of each call.
    """

    def __init__(self, module: torch.nn.Module, options: dict[str, Any] | None = None):
        self.module = module
        self._options = options or {}

    def __call__(self, call: Call) -> Tensor:
        options = dict(self._options)
        if call.memory is not None:
            known, fed = call.memory.layers, Fed(call.x.shape[0], call.memory)
            if call.reuse is not None:
                fed.plan = BlockPlan(call.reuse)
                fed.inner = Fed(call.reuse.whole.shape[0], call.memory, INNER)
            options = extended(
                options, self.module, fed, known.ahead, known.behind, known.fused
            )
        if call.reuse is not None:
            plan = BlockPlan(call.reuse)
            return walk(
                self.module, plan, call.x, call.timesteps, call.context, call.y, call.control,
                options,
            )  # fmt: skip
        return self.module(
            call.x, call.timesteps, context=call.context, y=call.y, control=call.control,
            transformer_options=options,
        )  # fmt: skip

    def embedding(self, timesteps: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The time embedding of a call, [R, E] (UNetModel._forward)."""
        unet = self.module
        emb = timestep_embedding(timesteps, unet.model_channels, repeat_only=False).to(dtype)
        emb = unet.time_embed(emb)
        return emb if unet.num_classes is None else emb + unet.label_emb(y)

    def traceable(self, dtype: torch.dtype) -> "ComfyUNet":
        """See compiled.engine.UNet: a copy on the CPU, or the UNet itself where it is one already.

        Raises:
            Refused: no UNet, or weights that are quantised, or patched call by call.
        """
        self._exportable()
        if self._is_plain(dtype):
            return self.bare()
        with torch.inference_mode(False), torch.no_grad():
            module = copied(self.module).to("cpu", dtype)
        module.dtype = dtype
        for part in module.modules():
            if hasattr(part, "comfy_cast_weights"):
                part.comfy_cast_weights = False  # the casts would become part of the graph
        return ComfyUNet(module.train(False)).bare()

    def copied(self) -> "ComfyUNet":
        """See compiled.engine.UNet.

        Raises:
            Refused: see traceable.
        """
        self._exportable()
        with torch.inference_mode(False), torch.no_grad():
            return ComfyUNet(copied(self.module), self._options)

    def _exportable(self) -> None:
        if not isinstance(self.module, UNetModel):
            raise Refused(
                f"{type(self.module).__name__} is no UNet: only models of the SD1.5, SD2.1 and "
                "SDXL families can be exported"
            )
        whole(self.module)
        for name, weight in self.module.named_parameters():
            if hasattr(weight, "_qdata") or weight.is_meta:
                raise Refused(
                    f"{name}: quantised weights cannot be exported; load the model as fp16"
                )

    def bare(self) -> "ComfyUNet":
        """With attention as one operation."""
        return ComfyUNet(self.module, {"optimized_attention_override": plain_attention})

    def _is_plain(self, dtype: torch.dtype) -> bool:
        alike = all(w.dtype == dtype for w in self.module.parameters())
        return alike and not any(
            getattr(m, "comfy_cast_weights", False) for m in self.module.modules()
        )


def inference_dtype(model) -> torch.dtype:
    """What a BaseModel computes in (get_dtype_inference of newer ComfyUIs)."""
    cast = getattr(model, "manual_cast_dtype", None)
    return model.get_dtype() if cast is None else cast


def plain_attention(
    func, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, skip_reshape: bool = False,
    skip_output_reshape: bool = False, **kwargs,
) -> Tensor:  # fmt: skip
    """Attention as one operation, [B, N, heads * D]; ComfyUI's own may split it by memory.

    A UNet's has no mask.
    """
    if not skip_reshape:
        q, k, v = (t.view(t.shape[0], -1, heads, t.shape[-1] // heads) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
