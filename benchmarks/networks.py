"""The networks that every side runs: equal weights, each side on its own implementation of them.

Published configurations with random weights (speed does not depend on their values, but zeros run
faster), as diffusers' modules and, converted by ComfyUI itself, as ComfyUI's; and the pack's
embedded model, which only ComfyUI knows, behind adapters that diffusers takes.
"""

import contextlib
import types
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# unet/config.json of runwayml/stable-diffusion-v1-5, stabilityai/sd-turbo and
# stabilityai/sdxl-turbo; what is not named there differs in nothing from diffusers' defaults
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd-turbo": {
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl-turbo": {
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
# the same layouts at a width that a CPU rehearses in seconds
_SMALL = {"layers_per_block": 1, "cross_attention_dim": 32}
_PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
_LATE = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
TINY: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 64), "types": _PLAIN},
    "sd-turbo": {"block_out_channels": (64, 64), "attention_head_dim": (1, 1), "types": _PLAIN},
    "sdxl-turbo": {
        "block_out_channels": (32, 64), "attention_head_dim": (1, 1), "types": _LATE,
        "transformer_layers_per_block": (1, 2),
    },
}  # fmt: skip
# the scale of TAESD's latents (ComfyUI's VAELoader.load_taesd)
TAESD_SCALE = {"sd15": 0.18215, "sd-turbo": 0.18215, "sdxl-turbo": 0.13025}
POOLED = 1280
TOKENS = 77
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# how far two implementations of the same float operations may be apart, as relative RMS
CLOSE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class Disagree(AssertionError):
    """Two sides do not run the same network."""


@dataclass
class Kit:
    """One set of networks, as each side takes it.

    Attributes:
        size: of the pictures, in pixels.
        channels: of the latents.
        model, vae: ComfyUI's MODEL and VAE.
        unet, tiny_vae: the same for diffusers and for the public class.
        prompt, negative: [1, tokens, D].
        pooled: pooled prompt [1, P], the same for both prompts, or None.
        patch: pixels on each side of a latent's position.
    """

    name: str
    size: int
    device: torch.device
    dtype: torch.dtype
    channels: int
    model: Any
    vae: Any
    unet: Any
    tiny_vae: Any
    prompt: Tensor
    negative: Tensor
    pooled: Tensor | None = None
    patch: int = 8

    @property
    def latent(self) -> tuple[int, int, int]:
        return self.channels, self.size // self.patch, self.size // self.patch

    @property
    def added(self) -> dict[str, Tensor] | None:
        """What diffusers' SDXL UNet takes besides: the pooled prompt and the sizes, one row.

        None for other UNets; the embedded one has its pooled prompt.
        """
        if self.pooled is None or isinstance(self.unet, EpsilonUNet):
            return None
        sizes = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]])
        return {"text_embeds": self.pooled, "time_ids": sizes.to(self.device, self.dtype)}

    def conditioning(self, prompt: Tensor) -> list:
        """A prompt as ComfyUI's CONDITIONING."""
        extra = {} if self.pooled is None else {"pooled_output": self.pooled.float().cpu()}
        return [[prompt.float().cpu(), extra]]

    def load(self) -> None:
        """Let ComfyUI put the weights where they are used."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([self.model, self.vae.patcher])

    def call(self, rows: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Keyword arguments of a call of ComfyUI's UNet, rows at different noise levels."""
        x = torch.randn(rows, *self.latent, generator=generator).to(self.device, self.dtype)
        named = {
            "x": x,
            "timesteps": torch.linspace(639.0, 99.0, rows, device=self.device),
            "context": self.prompt.expand(rows, -1, -1),
        }
        if self.pooled is not None:
            y = self.model.model.encode_adm(
                pooled_output=self.pooled.float().cpu(), width=self.size, height=self.size
            )
            named["y"] = y.to(self.device, self.dtype).expand(rows, -1)
        return named

    @torch.inference_mode()
    def check(self) -> dict[str, float]:
        """Relative RMS between the two sides' UNets, encoders and decoders.

        Raises:
            Disagree: they are not the same networks.
        """
        from diffusers import LCMScheduler

        self.load()
        generator = torch.Generator().manual_seed(0)
        call = self.call(3, generator)
        steps = call["timesteps"].long()
        bar = LCMScheduler(**SCHEDULE).alphas_cumprod.to(self.device)[steps].view(-1, 1, 1, 1)
        sigma = ((1 - bar) / bar).sqrt()
        more = {name: call[name] for name in ("y",) if name in call}
        # the same latents: ComfyUI's are noised by sigma, diffusers' have variance one
        noised = call["x"].float() / bar.sqrt()
        clean = self.model.model.apply_model(
            noised, sigma.flatten(), c_crossattn=call["context"], **more
        )
        added = self.added and {name: t.expand(3, -1) for name, t in self.added.items()}
        named = {} if added is None else {"added_cond_kwargs": added}
        theirs = self.unet(
            call["x"], steps, encoder_hidden_states=call["context"], return_dict=False, **named
        )[0]
        picture = torch.rand(1, 3, self.size, self.size, generator=generator)
        pixels = (picture * 2 - 1).to(self.device, self.dtype)
        scale = self.tiny_vae.config.scaling_factor
        latent = self.tiny_vae.encode(pixels).latents * scale
        shown = self.tiny_vae.decode(latent / scale, return_dict=False)[0]
        process = self.model.model.process_latent_in, self.model.model.process_latent_out
        errors = {
            "UNet": relative((noised - clean) / sigma, theirs),
            "encoder": relative(process[0](self.vae.encode(picture.movedim(1, -1))), latent),
            "decoder": relative(
                self.vae.decode(process[1](latent.float())).movedim(-1, 1),
                (shown.float() / 2 + 0.5).clamp(0, 1),
            ),
        }
        for part, error in errors.items():
            if not error <= CLOSE[self.dtype]:
                raise Disagree(f"{self.name}: the {part}s differ by {error:.1e} (relative RMS)")
        return errors


def relative(a: Tensor, b: Tensor) -> float:
    """Relative RMS of a against b; nan where either is."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def published(name: str, size: int = 512, device="cpu", dtype=torch.float32, tiny=False) -> Kit:
    """A published configuration, or a tiny one of the same layout, with random weights."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    config = PUBLISHED[name]
    if tiny:
        own = dict(TINY[name])
        down, up = own.pop("types")
        config = {**config, **_SMALL, **own, "down_block_types": down, "up_block_types": up}
    device = torch.device(device)
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config, sample_size=64).to(dtype).eval()
        tiny_vae = AutoencoderTiny().to(dtype).eval()
        width = config["cross_attention_dim"]
        prompt, negative = torch.randn(2, 1, TOKENS, width).to(dtype)
        pooled = torch.randn(1, POOLED).to(dtype) if "addition_embed_type" in config else None
    for module in (unet, tiny_vae):
        module.requires_grad_(False)
    model = comfy_model(name, unet, config if tiny else None)
    vae = comfy_vae(tiny_vae, TAESD_SCALE[name])
    return Kit(
        name, size, device, dtype, 4, model, vae, unet, tiny_vae, prompt, negative, pooled
    )  # fmt: skip


def comfy_model(name: str, unet, tiny: dict[str, Any] | None):
    """diffusers' UNet as ComfyUI's MODEL, by ComfyUI's own loader.

    ComfyUI tells layouts by the widths that were published; a tiny one has to be named.
    """
    import comfy.model_detection
    import comfy.sd
    import comfy.supported_models

    dtype = next(unet.parameters()).dtype
    state = {key: value.detach().clone() for key, value in unet.state_dict().items()}
    named = contextlib.nullcontext()
    if tiny is not None:
        kinds = {"sd15": "SD15", "sd-turbo": "SD20", "sdxl-turbo": "SDXL"}
        config = getattr(comfy.supported_models, kinds[name])(comfy_config(tiny, dtype))
        detection = "model_config_from_diffusers_unet"
        named = mock.patch.object(comfy.model_detection, detection, lambda state: config)
    with named:
        return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})


def comfy_config(tiny: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """ComfyUI's words for a diffusers configuration of one block per level."""
    widths = tiny["block_out_channels"]
    crossed = [kind.startswith("CrossAttn") for kind in tiny["down_block_types"]]
    depths = tiny.get("transformer_layers_per_block", (1,) * len(widths))
    depth = [d if has else 0 for d, has in zip(depths, crossed, strict=True)]
    return {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": widths[0],
        "num_res_blocks": [1] * len(widths), "channel_mult": [w // widths[0] for w in widths],
        "transformer_depth": depth, "transformer_depth_middle": depths[-1],
        "transformer_depth_output": [d for d in depth for _ in range(2)],
        "context_dim": tiny["cross_attention_dim"], "use_spatial_transformer": True,
        "use_linear_in_transformer": tiny.get("use_linear_projection", False), "legacy": False,
        "adm_in_channels": tiny.get("projection_class_embeddings_input_dim"), "dtype": dtype,
        **({"num_classes": "sequential"} if "addition_embed_type" in tiny else {}),
    }  # fmt: skip


def comfy_vae(tiny_vae, scale: float):
    """diffusers' AutoencoderTiny as ComfyUI's VAE, of the same precision."""
    import comfy.sd

    state = {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(0.0)}
    for key, value in tiny_vae.state_dict().items():
        part, _, place, rest = key.split(".", 3)
        # ComfyUI counts the clamp before the decoder's first layer
        at = int(place) + (part == "decoder")
        state[f"taesd_{part}.{at}.{rest}"] = value.detach().clone()
    return comfy.sd.VAE(sd=state, dtype=tiny_vae.dtype)


def embedded(size: int = 256, dtype: torch.dtype | None = None) -> Kit:
    """The pack's own model, where ComfyUI runs models, with adapters for diffusers.

    Args:
        dtype: of the UNet, as ComfyUI's --bf16-unet would have it; None is ComfyUI's choice.
    """
    import comfy.model_management
    from livediffusion.demo import loader

    model, clip, vae = loader.load()
    (prompt, extra), (negative, _) = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in ("neon night", "")
    )
    if dtype is not None:
        model.model.diffusion_model.to(dtype).dtype = dtype
        model.model.manual_cast_dtype = None
    comfy.model_management.load_models_gpu([model, vae.patcher])
    device, dtype = model.load_device, model.model_dtype()
    prompt, negative, pooled = (
        t.to(device, dtype) for t in (prompt, negative, extra["pooled_output"])
    )
    kind = model.model.latent_format
    return Kit(
        "embedded", size, device, dtype, kind.latent_channels, model, vae,
        EpsilonUNet(model.model, pooled), FirstStage(vae, kind.scale_factor), prompt, negative,
        pooled, vae.downscale_ratio,
    )  # fmt: skip


class EpsilonUNet(torch.nn.Module):
    """The embedded UNet, called as diffusers calls one that predicts noise, of one pooled prompt.

    Its own work is three products and a sum of latents per call.
    """

    def __init__(self, base, pooled: Tensor):
        from diffusers import LCMScheduler

        super().__init__()
        self._base = [base]  # its weights are ComfyUI's to move
        self._pooled = pooled
        bar = LCMScheduler(**SCHEDULE).alphas_cumprod
        self.signal, self.noise = bar.sqrt(), (1 - bar).sqrt()
        spread = base.model_sampling.sigma_data
        self.scale = (self.noise.square() + (spread * self.signal).square()).rsqrt()
        channels = base.latent_format.latent_channels
        self.config = types.SimpleNamespace(
            in_channels=channels, time_cond_proj_dim=None, sample_size=64
        )
        self.dtype, self.device = base.get_dtype(), base.device

    def forward(self, x, t, encoder_hidden_states, return_dict=False, **unused):
        t = t.expand(x.shape[0])
        context = encoder_hidden_states.expand(x.shape[0], -1, -1)
        tables = self.signal / self.noise, 1 / self.noise, self.scale
        of_clean, of_x, scale = (table[t].view(-1, 1, 1, 1).to(x.dtype) for table in tables)
        y = self._pooled.expand(x.shape[0], -1)
        # the public class keeps some of its state in float32, whatever it is told
        asked = (x * scale).to(self.dtype)
        clean = self._base[0].diffusion_model(asked, t.float(), context=context, y=y)
        return (of_x * x - of_clean * clean,)


class FirstStage(torch.nn.Module):
    """The embedded VAE, called as diffusers calls AutoencoderTiny."""

    def __init__(self, vae, scale: float):
        super().__init__()
        self._vae = [vae]
        self.dtype, self.device = vae.vae_dtype, vae.device
        # diffusers reads the size of latents off the number of blocks
        self.config = types.SimpleNamespace(
            scaling_factor=scale, latent_channels=vae.latent_channels,
            block_out_channels=(1,) * vae.downscale_ratio.bit_length(),
        )  # fmt: skip

    def encode(self, pixels: Tensor):
        return types.SimpleNamespace(latents=self._vae[0].first_stage_model.encode(pixels))

    def decode(self, latents: Tensor, return_dict: bool = False, **unused):
        return (self._vae[0].first_stage_model.decode(latents),)
