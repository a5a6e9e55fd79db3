"""Tiny models in ComfyUI's own classes: five families, and two that see a picture beside x.

`tests/tiny.py` has the UNet; these are its siblings, with gentle random weights so that rounding
is not amplified.
"""

import functools

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import tiny
import torch

WIDE = 32  # text features of the transformers
POOLED = 16
SIZE = 8  # of a latent
CHANNELS = {"SD3": 16, "Flux": 16, "Lumina2": 16}
TEXT = {"SD3": WIDE, "Flux": WIDE, "Lumina2": WIDE}
POOL = {"SDXL": POOLED, "SD3": POOLED, "Flux": POOLED}

_SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "num_blocks": 3, "adm_in_channels": POOLED,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": WIDE, "out_features": 64},
    },
    "input_size": None, "pos_embed_scaling_factor": None, "pos_embed_max_size": 16,
    "num_patches": 256, "dtype": torch.float32,
}  # fmt: skip
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "vec_in_dim": POOLED, "context_in_dim": WIDE, "hidden_size": 32, "mlp_ratio": 2.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], "dtype": torch.float32,
}  # fmt: skip
_LUMINA2 = {  # as Z-Image has it, whose modulation is 256 wide
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 8, "n_kv_heads": 8, "multiple_of": 16,
    "ffn_dim_multiplier": 0.5, "qk_norm": True, "cap_feat_dim": WIDE, "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64], "z_image_modulation": True, "pad_tokens_multiple": 16,
    "dtype": torch.float32,
}  # fmt: skip


class SDXL(comfy.model_base.SDXL):
    """SDXL's own class; its size conditioning makes 6 * 256 numbers beside the pooled prompt."""


def _unet(kind, config, layout="SD1.5", **more):
    unet = {**tiny.UNET, **tiny.LAYOUTS[layout], **more}
    return kind(config(unet), comfy.model_base.ModelType.EPS)


_BUILD = {
    "SD1.5": lambda: _unet(comfy.model_base.BaseModel, comfy.supported_models.SD15),
    "SDXL": lambda: _unet(
        SDXL, comfy.supported_models.SDXL, "SDXL", adm_in_channels=POOLED + 6 * 256
    ),
    "SD3": lambda: comfy.model_base.SD3(comfy.supported_models.SD3(_SD3)),
    "Flux": lambda: comfy.model_base.Flux(comfy.supported_models.Flux(_FLUX)),
    "Lumina2": lambda: comfy.model_base.Lumina2(comfy.supported_models.Lumina2(_LUMINA2)),
    "inpaint": lambda: _unet(
        comfy.model_base.BaseModel, comfy.supported_models.SD15, in_channels=9
    ),
    "ip2p": lambda: comfy.model_base.SD15_instructpix2pix(
        comfy.supported_models.SD15_instructpix2pix({**tiny.UNET, "in_channels": 8})
    ),
}  # fmt: skip


@functools.cache
def model(family, seed=0):
    """A MODEL of a family, on the CPU; the same object each time, so clone before patching."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inner = _BUILD[family]()
        for name, value in inner.diffusion_model.state_dict().items():
            if value.is_floating_point():
                # layers that start as zero would hide errors, and so would norms without a scale
                torch.nn.init.normal_(value, std=1.0 / max(value[0].numel(), 1) ** 0.5)
                value.mul_(0.8).add_(1.0 if "norm" in name and value.ndim == 1 else 0.0)
    if family == "inpaint":
        inner.set_inpaint()
    inner.eval()
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(inner, load_device=cpu, offload_device=cpu)


def conditioning(family, seed, tokens=8, batch=1, **extra):
    """A CONDITIONING of random tokens that the family takes, for a batch of frames."""
    g = torch.Generator().manual_seed(seed)
    cond = torch.randn(batch, tokens, TEXT.get(family, tiny.CONTEXT), generator=g)
    if family in POOL:
        extra.setdefault("pooled_output", torch.randn(batch, POOL[family], generator=g))
    return [[cond, extra]]


def latents(family, n, seed=0):
    """N source latents, [N, C, 8, 8]."""
    return tiny.latents(n, seed, SIZE, CHANNELS.get(family, 4))


def levels(family, n):
    """n + 1 noise levels from well inside the model's range to 0.

    Starts where ComfyUI's percent is past 0, so that a range of percents splits them.
    """
    sampling = model(family).get_model_object("model_sampling")
    percents = [0.1 + 0.75 * k / n for k in range(n)]
    return (*(float(sampling.percent_to_sigma(p)) for p in percents), 0.0)


def forget():
    """ComfyUI's patchers complain if they outlive the interpreter's modules."""
    model.cache_clear()
