"""Calls, LoRAs and ControlNets of tiny models, for the tests of engines."""

import torch


def lora(patcher, strength=0.8, seed=5):
    """A LoRA on every attention, as ComfyUI's loader patches it into a clone."""
    import comfy.lora

    generator = torch.Generator().manual_seed(seed)
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    weights = patcher.model.state_dict()
    told = {}
    for name, key in keys.items():
        # one name of the several that stand for a weight
        if not name.startswith("lora_unet_input") or ".attn" not in key or weights[key].ndim != 2:
            continue
        out, into = weights[key].shape
        told[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.1
        told[f"{name}.lora_down.weight"] = torch.randn(4, into, generator=generator) * 0.1
    clone = patcher.clone()
    clone.add_patches(comfy.lora.load_lora(told, keys), strength)
    return clone


def controls(patcher, call, seed=3):
    """Residuals as a ControlNet of this UNet would give them, by Call's names."""
    from livediffusion.compiled.onnx_export import residual_shapes
    from livediffusion.host.models.unet import ComfyUNet

    generator = torch.Generator().manual_seed(seed)
    shapes = residual_shapes(ComfyUNet(patcher.model.diffusion_model), call)
    return {
        name: torch.randn(shape, generator=generator).to(call.x.dtype) * 0.3
        for name, shape in shapes.items()
        if "_input_" not in name
    }


def call(patcher, rows, size=(8, 8), tokens=77, dtype=torch.float32, control=False, seed=0):
    """A call of the UNet with values of the usual spread."""
    from livediffusion.compiled.engine import Call

    generator = torch.Generator().manual_seed(seed)
    config = patcher.model.model_config.unet_config

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    pooled = config.get("adm_in_channels")
    asked = Call(
        random(rows, config["in_channels"], *size),
        torch.linspace(20.0, 950.0, rows),
        random(rows, tokens, config["context_dim"]),
        None if pooled is None else random(rows, pooled),
    )
    if not control:
        return asked
    return Call.of({**asked.named(), **controls(patcher, asked)})


def patched(patcher, strength):
    """A clone with one weight changed, as a LoRA of this strength would."""
    key = "diffusion_model.input_blocks.3.0.in_layers.2.weight"
    clone = patcher.clone()
    change = torch.ones_like(clone.model.state_dict()[key])
    clone.add_patches({key: ("diff", (change,))}, strength)
    return clone


def sampled_once(model, rows=2, size=8):
    """One call of a stock sampler, on the model's device."""
    import comfy.samplers
    import tiny

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.conditioning(1), tiny.conditioning(2))
    guider.set_cfg(1.0)
    noise = torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(0))
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"),
        torch.tensor((10.0, 0.0)), disable_pbar=True,
    )  # fmt: skip
