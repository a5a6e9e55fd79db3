"""Stand-ins for what a node may be wired to, for each family of tiny models.

Every part comes for the rows of some frames: row r of a batch is the same whatever batch it is in,
so that a node may be given all rows at once or one frame's row alone.
"""

import types
import zlib

import comfy.cldm.cldm
import comfy.clip_vision
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.model_patcher
import comfy.ops
import families
import tiny
import torch

CPU = torch.device("cpu")
PIXELS = 8 * families.SIZE
EVERY = 4  # rows that there are


def of_rows(rows, make):
    """A tensor whose row r is make(r), [len(rows), ...]."""
    return torch.cat([make(r) for r in rows])


def noise(seed, *shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def seeded(name):
    """A number for a name, the same in every process."""
    return zlib.crc32(name.encode()) % 10_000


def conditioning(family, name, rows=(0,), tokens=8, **extra):
    """A CONDITIONING with a row per frame."""
    pieces = [families.conditioning(family, seeded(name) + 17 * r, tokens)[0] for r in rows]
    for key in pieces[0][1]:
        extra[key] = torch.cat([piece[1][key] for piece in pieces])
    return [[torch.cat([piece[0] for piece in pieces]), extra]]


def image(name="image", rows=(0,), size=PIXELS):
    """An IMAGE, [B, H, W, 3] in 0..1."""
    return of_rows(rows, lambda r: torch.sigmoid(noise(seeded(name) + r, size, size, 3)))


def mask(name="mask", rows=(0,), size=PIXELS):
    """A MASK, [B, H, W] in 0..1; coarse, so that resizing keeps it a mask."""

    def make(r):
        coarse = (noise(seeded(name) + r, size // 8, size // 8) > 0).float()
        return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)

    return of_rows(rows, make)


def latent(family, name="latent", rows=(0,)):
    """A LATENT."""
    channels = families.CHANNELS.get(family, 4)
    size = families.SIZE
    return {"samples": of_rows(rows, lambda r: noise(seeded(name) + r, channels, size, size))}


class TinyVAE:
    """A fixed linear map from 8 x 8 pixels to a latent, row by row."""

    def __init__(self, family):
        self.channels = families.CHANNELS.get(family, 4)
        self.latent_channels = self.channels
        self.mix = noise(5, 3, self.channels)[0]
        self.downscale_ratio = 8
        self.first_stage_model = self.patcher = None

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8)
        return torch.einsum("bchw,cd->bdhw", small - 0.5, self.mix) * 4

    def spacial_compression_encode(self):
        return 8

    spacial_compression_decode = spacial_compression_encode

    def temporal_compression_decode(self):
        return None


class Tokens(dict):
    """Text by encoder; every encoder has one token."""

    def __init__(self, text):
        super().__init__({name: [[(text, 1.0)]] for name in ("l", "g", "h", "t5xxl", "mt5xl")})
        self.text = text

    def __missing__(self, name):
        return [[(name, 1.0)]]


class TinyCLIP:
    """A CLIP whose every text is another random conditioning."""

    def __init__(self, family):
        self.family = family
        self.cond_stage_model = torch.nn.Module()

    def clone(self, **_):
        return self

    def set_tokenizer_option(self, *_):
        pass

    def tokenize(self, text, *_, **__):
        return Tokens(str(text))

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, **_):
        words = " ".join(str(tokens[name]) for name in sorted(tokens))
        out = conditioning(self.family, words)
        out[0][1].update(add_dict or {})
        return out

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        ((cond, extra),) = self.encode_from_tokens_scheduled(tokens)
        pooled = extra.get("pooled_output", noise(3, families.POOLED))
        if return_dict:
            return {"cond": cond, "pooled_output": pooled}
        return (cond, pooled) if return_pooled else cond

    def add_patches(self, *_):
        return []


def randomized(module, seed, gain=1.0):
    """The same module with random weights, layers that start as zero included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim else 1
            torch.nn.init.normal_(parameter, std=gain / max(fan, 1) ** 0.5)
    return module.eval().requires_grad_(False)


def control_net(_family):
    """A CONTROL_NET for the UNet without pooled prompts."""
    config = {k: v for k, v in tiny.UNET.items() if k not in _NOT_OF_CONTROL}
    net = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, operations=comfy.ops.disable_weight_init, device=CPU
    )
    return comfy.controlnet.ControlNet(randomized(net, 9), load_device=CPU)


_NOT_OF_CONTROL = ("out_channels", "transformer_depth_output")


def gligen(_family):
    """A GLIGEN for the UNet: one gated attention per transformer."""
    widths = [64, 64, 64]
    modules = [comfy.gligen.GatedSelfAttentionDense(w, tiny.CONTEXT, 4, w // 4) for w in widths]
    position = comfy.gligen.PositionNet(families.POOLED, tiny.CONTEXT)
    net = randomized(comfy.gligen.Gligen(modules, position, families.POOLED), 10)
    return comfy.model_patcher.ModelPatcher(net, load_device=CPU, offload_device=CPU)


def seen(family, rows=(0,)):
    """A CLIP_VISION_OUTPUT."""
    out = comfy.clip_vision.Output()
    width = families.TEXT.get(family, tiny.CONTEXT)
    out["image_embeds"] = of_rows(rows, lambda r: noise(31 + r, families.POOLED))
    out["last_hidden_state"] = of_rows(rows, lambda r: noise(41 + r, 4, width))
    out["penultimate_hidden_states"] = of_rows(rows, lambda r: noise(51 + r, 4, width))
    out["all_hidden_states"] = of_rows(rows, lambda r: noise(61 + r, 24, 4, width))
    out["image_sizes"] = [(3, 32, 32)] * len(rows)
    return out


def style_model(family):
    """A STYLE_MODEL that passes on what was seen."""
    return types.SimpleNamespace(get_cond=lambda output: output.last_hidden_state)


def hooks(family):
    """HOOKS: a LoRA on attention."""
    state = families.model(family).model_state_dict()
    g = torch.Generator().manual_seed(3)
    names = [k for k in state if k.endswith(("to_v.weight", "qkv.weight")) and state[k].ndim == 2]
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights = {k: (torch.randn(state[k].shape, generator=g) * 0.2,) for k in names}
    hook.need_weight_init = False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


def lora(family):
    """A LoRA's state dict, for every attention."""
    state = families.model(family).model_state_dict()
    g, out = torch.Generator().manual_seed(4), {}
    for name, value in state.items():
        if name.endswith(("to_v.weight", "qkv.weight")) and value.ndim == 2:
            stem = name.removesuffix(".weight")
            out[f"{stem}.lora_up.weight"] = torch.randn(value.shape[0], 2, generator=g) * 0.3
            out[f"{stem}.lora_down.weight"] = torch.randn(2, value.shape[1], generator=g) * 0.3
    return out


def patch_model(net):
    """A MODEL_PATCH around a net."""
    return comfy.model_patcher.ModelPatcher(
        randomized(net, 12), load_device=CPU, offload_device=CPU
    )


def uso_patch(_family):
    """USO's style projector at reduced width, which takes what `seen` gives."""
    from comfy_extras.nodes_model_patch import SigLIPMultiFeatProjModel

    return patch_model(
        SigLIPMultiFeatProjModel(4, 2, families.WIDE, 32, operations=comfy.ops.manual_cast)
    )


def z_image_patch(_family):
    """Z-Image's ControlNet at reduced width.

    As many layers as let it forget at the model's own few, as it does at thirty.
    """
    import comfy.ldm.lumina.controlnet

    return patch_model(
        comfy.ldm.lumina.controlnet.ZImage_Control(
            dim=256, n_heads=8, n_kv_heads=8, multiple_of=16, ffn_dim_multiplier=0.5,
            n_control_layers=30, operations=comfy.ops.manual_cast,
        )
    )  # fmt: skip


def operation(_family):
    """A LATENT_OPERATION that looks at the noise level."""

    def go(latent, sigma=None, **_):
        return latent * (1.1 if sigma is None else 1.0 + 0.1 * torch.tanh(sigma.view(-1)[0]))

    return go


# how each kind of link is made; those with rows have a row per frame
LINKS = {
    "VAE": TinyVAE,
    "CLIP": TinyCLIP,
    "CONTROL_NET": control_net,
    "GLIGEN": gligen,
    "STYLE_MODEL": style_model,
    "HOOKS": hooks,
    "TIMESTEPS_RANGE": lambda _: (0.3, 0.8),
    "LORA_MODEL": lora,
    "LATENT_OPERATION": operation,
}
ROWS = {
    "CONDITIONING": conditioning,
    "IMAGE": lambda family, name, rows: image(name, rows),
    "MASK": lambda family, name, rows: mask(name, rows),
    "LATENT": latent,
    "CLIP_VISION_OUTPUT": lambda family, name, rows: seen(family, rows),
}


# the inputs that go on as they are where a node does nothing
SIDES = dict.fromkeys(
    ("conditioning", "conditioning_1", "conditioning_to", "cond", "cond1", "cond_NEW",
     "positive_A", "positive_NEW"), "positive",
) | dict.fromkeys(("negative_A", "negative_NEW"), "negative")  # fmt: skip


def link(kind, family, name, rows):
    """What a node's input of this kind is wired to; KeyError where nothing stands in for it."""
    if kind == "MODEL":
        return families.model(family, 1 if name in ("model2", "model_negative") else 0).clone()
    if kind in ROWS:
        return ROWS[kind](family, SIDES.get(name, name), rows)
    return LINKS[kind](family)
