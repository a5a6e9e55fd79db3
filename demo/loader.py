"""The embedded tiny model as ComfyUI's MODEL, CLIP and VAE.

A latent diffusion model in ComfyUI's own classes (UNetModel, AutoencoderKL, SDClipModel), trained
by train.py; MODEL_CARD.md says what it can do. Native size 256 x 256, latents 8 x 32 x 32.
"""

import json
import pathlib

import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch.nn.functional as F

WEIGHTS = pathlib.Path(__file__).resolve().parent / "weights"
CONTEXT = 64
LATENT_CHANNELS = 8
PATCH = 4  # the autoencoder works on 4 x 4 patches of pixels: convolutions at full size are slow
UNET = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 1, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
}
AUTOENCODER = {
    "embed_dim": LATENT_CHANNELS,
    "ddconfig": {
        "double_z": True,
        "z_channels": LATENT_CHANNELS,
        "resolution": 256 // PATCH,
        "in_channels": 3 * PATCH**2,
        "out_ch": 3 * PATCH**2,
        "ch": 64,
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}
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
    """Latents of the demo autoencoder; the figures were measured after its training."""

    latent_channels = LATENT_CHANNELS

    def __init__(self):
        figures = json.loads((WEIGHTS / "latents.json").read_text(encoding="utf-8"))
        self.scale_factor = figures["scale_factor"]
        self.latent_rgb_factors = figures["rgb_factors"]
        self.latent_rgb_factors_bias = figures["rgb_bias"]


class Config(comfy.supported_models_base.BASE):
    """Model configuration as ComfyUI's model base reads it."""

    unet_extra_config = {}  # noqa: RUF012
    latent_format = LatentFormat
    memory_usage_factor = 0.5

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self):
        # the base class takes any UNet with more than 4 input channels for an inpainting model
        return False


def _unpatch_input(module, args):
    return (F.pixel_unshuffle(args[0], PATCH), *args[1:])


def _patch_output(module, args, output):
    return F.pixel_shuffle(output, PATCH)


def add_patches(autoencoder):
    """Let an AutoencoderKL of AUTOENCODER's shape take and give pixels (B, 3, H, W)."""
    autoencoder.encoder.register_forward_pre_hook(_unpatch_input)
    autoencoder.decoder.register_forward_hook(_patch_output)


def _patcher_class(disable_dynamic):
    core = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return comfy.model_patcher.ModelPatcher if disable_dynamic else core


def _weights(name):
    return comfy.utils.load_torch_file(str(WEIGHTS / f"{name}.safetensors"), safe_load=True)


def load_model(disable_dynamic=False):
    """The UNet as a ModelPatcher (v-prediction on SD's schedule)."""
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
    vae = comfy.sd.VAE(sd=_weights("autoencoder"), config={"params": AUTOENCODER})
    add_patches(vae.first_stage_model)
    vae.latent_channels = LATENT_CHANNELS
    # 64 channels at a quarter of the size, about 8 buffers alive at once, and attention
    size = comfy.model_management.dtype_size
    vae.memory_used_encode = lambda shape, dtype: 40 * shape[2] * shape[3] * size(dtype)
    vae.memory_used_decode = lambda shape, dtype: 2560 * shape[2] * shape[3] * size(dtype)
    vae.patcher.cached_patcher_init = (load_vae_patcher, ())
    return vae


def load_vae_patcher(disable_dynamic=False):
    """A fresh patcher of the autoencoder; the VAE class chooses the patcher's kind itself."""
    return _load_vae().patcher


def load():
    """Load the three parts.

    Returns:
        (ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE)
    """
    return load_model(), _load_clip(), _load_vae()
