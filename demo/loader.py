"""The embedded tiny model as ComfyUI's MODEL, CLIP and VAE.

A diffusion model of pixels in ComfyUI's own classes (UNetModel, SDClipModel), trained by train.py;
MODEL_CARD.md says what it can do. Native size 256 x 256, whose latents are 48 x 64 x 64.
"""

import pathlib

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.pixel_space_convert
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from .network import CHANNELS, CONTEXT, PATCH, SCALE, SIGMA_DATA, UNET, Network

WEIGHTS = pathlib.Path(__file__).resolve().parent / "weights"
TEXT = {
    "hidden_size": CONTEXT,
    "intermediate_size": 4 * CONTEXT,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
VOCABULARY = 49408


class TextModel(comfy.sd1_clip.SDClipModel):
    """Two causal transformer layers over CLIP's tokens."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class Text(comfy.sd1_clip.SD1ClipModel):
    """The text encoder as CLIPTextEncode expects it."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, clip_model=TextModel
        )


class TokenizerL(comfy.sd1_clip.SDTokenizer):
    """CLIP's own vocabulary; embeddings made for CLIP-L do not fit this model's width."""

    def __init__(self, **kwargs):
        super().__init__(embedding_size=CONTEXT, embedding_key="livediffusion", **kwargs)


class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    """CLIP's tokenizer with ComfyUI's prompt weights."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
            tokenizer=TokenizerL,
        )


class LatentFormat(comfy.latent_formats.LatentFormat):
    """Pixels in -1..1 by PATCH x PATCH, so that a preview is their mean."""

    latent_channels = CHANNELS
    scale_factor = SCALE
    spacial_downscale_ratio = PATCH
    patch = PATCH  # what is moved along a motion is moved as pixels (host.sampling.carry)
    # pixel_unshuffle lays the pixels of one colour side by side
    latent_rgb_factors = [  # noqa: RUF012
        [float(channel // PATCH**2 == colour) / PATCH**2 / SCALE for colour in range(3)]
        for channel in range(CHANNELS)
    ]


class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    """SD's noise levels; the network gives the clean latent."""

    def __init__(self, model_config=None):
        super().__init__(model_config)
        self.sigma_data = SIGMA_DATA


class Model(comfy.model_base.BaseModel):
    """The model around the network, which takes the pooled prompt as its `y`."""

    def __init__(self, config, model_type=comfy.model_base.ModelType.EPS, device=None):
        # ComfyUI has no type for x0 with discrete levels: the sampling below is what counts
        super().__init__(config, model_type, device=device, unet_model=Network)
        self.model_sampling = Sampling(config)

    def encode_adm(self, **kwargs) -> Tensor:
        """[B, CONTEXT]; zeros where a conditioning has no pooled prompt.

        Raises:
            ValueError: the pooled prompt of another model's CLIP.
        """
        pooled = kwargs.get("pooled_output")
        if pooled is None:
            return torch.zeros(1, CONTEXT)
        if pooled.shape[-1] != CONTEXT:
            raise ValueError(
                f"conditioning: it was encoded by another model's CLIP (its pooled prompt has "
                f"{pooled.shape[-1]} numbers, this model takes {CONTEXT}). Use the CLIP output of "
                "Live Demo Model."
            )
        return pooled


class Config(comfy.supported_models_base.BASE):
    """Model configuration as ComfyUI's model base reads it."""

    unet_extra_config = {}  # noqa: RUF012
    latent_format = LatentFormat
    memory_usage_factor = 0.15

    def get_model(self, state_dict, prefix="", device=None) -> Model:
        return Model(self, device=device)


class Pixels(comfy.pixel_space_convert.PixelspaceConversionVAE):
    """Pixels [B, 3, H, W] in -1..1 to [B, CHANNELS, H / PATCH, W / PATCH] and back; exact."""

    def encode(self, pixels: Tensor, *_args, **_kwargs) -> Tensor:
        return F.pixel_unshuffle(pixels, PATCH)

    def decode(self, samples: Tensor, *_args, **_kwargs) -> Tensor:
        return F.pixel_shuffle(samples, PATCH)


def _patcher_class(disable_dynamic):
    core = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return comfy.model_patcher.ModelPatcher if disable_dynamic else core


def _weights(name):
    return comfy.utils.load_torch_file(str(WEIGHTS / f"{name}.safetensors"), safe_load=True)


def load_model(disable_dynamic=False):
    """The UNet as a ModelPatcher (it predicts clean latents on SD's schedule)."""
    management = comfy.model_management
    state = _weights("unet")
    device = management.get_torch_device()
    config = Config(UNET)
    parameters = comfy.utils.calculate_parameters(state)
    dtype = management.unet_dtype(
        device=device, model_params=parameters, supported_dtypes=config.supported_inference_dtypes
    )
    cast = management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    offload = management.unet_offload_device()
    model = config.get_model(state, "", device=offload)
    patcher = _patcher_class(disable_dynamic)(model, load_device=device, offload_device=offload)
    # a dynamic patcher pages weights from the file instead of copying them
    assign = {"assign": True} if getattr(patcher, "is_dynamic", bool)() else {}
    model.load_model_weights(state, "", **assign)
    if management.is_device_cpu(device):
        # the layout in which a CPU's convolutions are fastest
        model.diffusion_model.to(memory_format=torch.channels_last)
    patcher.cached_patcher_init = (load_model, ())
    return patcher


def _load_clip(disable_dynamic=False):
    state = _weights("text")
    rows, ids = state.pop("rows").float(), state.pop("ids").long()
    # words that training never saw share one row
    table = state.pop("unknown").float().expand(VOCABULARY, -1).clone()
    table[ids] = rows
    state["text_model.embeddings.token_embedding.weight"] = table
    parameters = comfy.utils.calculate_parameters(state)
    options = {"disable_dynamic": True} if disable_dynamic else {}
    target = comfy.supported_models_base.ClipTarget(Tokenizer, Text)
    clip = comfy.sd.CLIP(target, parameters=parameters, **options)
    clip.load_sd(state)
    clip.patcher.cached_patcher_init = (load_clip_patcher, ())
    return clip


def load_clip_patcher(disable_dynamic=False):
    """A fresh patcher of the text encoder, for ComfyUI's clone of a dynamic model."""
    return _load_clip(disable_dynamic).patcher


def _load_vae():
    # float32 everywhere: in bfloat16, ComfyUI's choice on many GPUs, pictures would lose tones
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = Pixels().train(False)
    vae.latent_channels = CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    # of one picture: it, what it becomes, and a copy of each
    size = comfy.model_management.dtype_size
    vae.memory_used_encode = lambda shape, dtype: 4 * 3 * shape[2] * shape[3] * size(dtype)
    vae.memory_used_decode = lambda shape, dtype: 4 * CHANNELS * shape[2] * shape[3] * size(dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )  # fmt: skip
    vae.patcher.cached_patcher_init = (load_vae_patcher, ())
    return vae


def load_vae_patcher(disable_dynamic=False):
    """A fresh patcher of the VAE, which is never a dynamic one: there is nothing to page."""
    return _load_vae().patcher


def load():
    """Load the three parts.

    Returns:
        (ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE)
    """
    return load_model(), _load_clip(), _load_vae()
