"""The embedded model's UNet: ComfyUI's UNetModel on pixels, with three changes.

It sees pictures without an autoencoder: PATCH x PATCH pixels are one position of 3 * PATCH**2
channels. Fewer groups in its norms, none before the last convolution and a map of positions are
what makes that work at this width; MODEL_CARD.md says what it can do.
"""

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

PATCH = 4  # pixels on each side of a latent's position
CHANNELS = 3 * PATCH**2
CONTEXT = 64  # width of the prompt's tokens and of the pooled prompt
SCALE = 16.0  # latents over pixels in -1..1: SD's noise is made for latents of a wide spread
SIGMA_DATA = 8.0  # spread of the latents, by which the network's input is divided
PERIOD = 8  # positions after which the map repeats: 32 pixels
GROUP = 16  # channels in a group of a norm
UNET = {
    "image_size": 64,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 0, 1],
    "transformer_depth_output": [0, 0, 0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "use_scale_shift_norm": True,
    "conv_resample": False,
    "num_classes": "sequential",
    "adm_in_channels": CONTEXT,
}


class Tile(torch.nn.Module):
    """Adds a learned map that repeats over the picture: where grain, hatching and tiles lie.

    Args:
        channels: of the features.
        device, dtype: of the map, as for ComfyUI's layers.
    """

    adds_to_positions = True  # the same to every picture (host.models.patchwork)

    def __init__(self, channels: int, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.map = torch.nn.Parameter(
            torch.zeros(1, channels, PERIOD, PERIOD, device=device, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, H, W], of any size, to the same."""
        height, width = x.shape[-2:]
        # channels last, as the convolution before it leaves them on a CPU
        whole = self.map.to(x).permute(0, 2, 3, 1)
        # rounded up by a sum: a traced -(-a // b) rounds towards zero
        down, across = ((side + PERIOD - 1) // PERIOD for side in (height, width))
        whole = whole.repeat(1, down, across, 1)
        return x + whole.permute(0, 3, 1, 2)[..., :height, :width]


class Network(UNetModel):
    """The UNet; arguments are UNetModel's, UNET for the embedded model.

    As trained it gives clean pixels in -1..1 of [R, CHANNELS, H, W]; as exported, with its last
    convolution times SCALE, clean latents.
    """

    def __init__(self, *, device=None, dtype: torch.dtype = torch.float32, **config):
        super().__init__(**config, device=device, dtype=dtype)
        for part in self.modules():
            if isinstance(part, torch.nn.GroupNorm):
                # UNetModel's are 32: groups of 2 to 4 channels erase tone and colour
                part.num_groups = part.num_channels // GROUP
        self.input_blocks[0].append(Tile(self.model_channels, device, dtype))
        self.out[0] = torch.nn.Identity()
