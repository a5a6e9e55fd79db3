"""Tiny models in ComfyUI's own classes, with random weights, for tests on the CPU."""

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch

CONTEXT = 16
PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
}
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 0],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "dtype": torch.float32,
}
# what tells the layouts apart, at reduced width (comfy.supported_models)
LAYOUTS = {
    "SD1.5": {},
    "SD2.1": {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 16},
    "SDXL": {
        "use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 16,
        "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2, "num_classes": "sequential", "adm_in_channels": 24,
    },
}  # fmt: skip
# attention at the finest level, too, which some nodes patch alone
FINE = {"transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]}


def model(prediction="epsilon", seed=0, adm=None, layout="SD1.5", prompt=4.0, device="cpu"):
    """A MODEL (ModelPatcher) of the SD1.5 layout; `adm` gives it SDXL's pooled vector.

    `prompt` is how much prompts matter; as much as by default makes rounding errors grow, too.
    """
    unet = {**UNET, **(FINE if layout == "fine" else LAYOUTS[layout])}
    adm = unet.get("adm_in_channels", adm)
    if adm is not None:
        unet |= {"num_classes": "sequential", "adm_in_channels": adm}
    config = comfy.supported_models.SD15(unet)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = comfy.model_base.BaseModel if adm is None else TinySDXL
        inner = kind(config, PREDICTIONS[prediction])
        for name, parameter in inner.diffusion_model.named_parameters():
            # layers that start as zero would hide errors, and prompts shall matter
            gain = prompt if ".attn2." in name or "label_emb" in name else 0.6
            torch.nn.init.normal_(parameter, std=gain / max(parameter[0].numel(), 1) ** 0.5)
    inner.eval()
    return comfy.model_patcher.ModelPatcher(
        inner, load_device=torch.device(device), offload_device=torch.device("cpu")
    )


class TinySDXL(comfy.model_base.BaseModel):
    """Takes the pooled prompt as SDXL does."""

    def encode_adm(self, **kwargs):
        return kwargs["pooled_output"]


def conditioning(seed, tokens=8, pooled=None, width=CONTEXT, **extra):
    """A CONDITIONING of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, tokens, width, generator=generator)
    if pooled is not None:
        extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
    return [[cond, dict(extra)]]


def latents(n, seed=0, size=8, channels=4):
    """N source latents."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n, channels, size, size, generator=generator)


def rms(a, b):
    """Relative RMS error of a against b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
