"""How every node of ComfyUI that gives a MODEL or a GUIDER is exercised, or why it is not.

One table for all versions of ComfyUI: a node that is in one version only stands here, too.
"""

from dataclasses import dataclass, field
from typing import Any

UNETS = ("SD1.5", "SDXL")
FLOWS = ("SD3", "Flux", "Lumina2")
ALL = (*UNETS, *FLOWS)


@dataclass(frozen=True)
class Use:
    """A node that is exercised.

    Attributes:
        families: the models it runs on; the first one in every way, the others in a few.
        given: inputs that are not the defaults.
        inside: more inputs, away from their defaults and inside their ranges: a second variant.
        acts: whether it changes the result at all, in one of the variants at least.
        loads: what its loader would have read, by what it asks for.
        masked: sampled with a noise mask, without which it does nothing.
        basic: sampled without a negative side, which ComfyUI's own sampling with it cannot hold.
        rows: its inputs may have a row per frame, and so has its CONDITIONING.
    """

    families: tuple[str, ...] = ("SD1.5",)
    given: dict[str, Any] = field(default_factory=dict)
    inside: dict[str, Any] = field(default_factory=dict)
    acts: bool = True
    loads: str = ""
    masked: bool = False
    basic: bool = False
    rows: bool = False


@dataclass(frozen=True)
class Out:
    """A node that is not exercised, and why."""

    why: str


VIDEO = "for a model family whose latents have a time axis"
AUDIO = "for a model family of sound"
SPACE = "for a model family of 3D shapes"


def wired(kind, name=None):
    """An input that a part is wired to (parts.link)."""

    def make(family, rows):
        import parts

        return parts.link(kind, family, name or kind.lower(), rows)

    return make


def part(name):
    """An input that parts.`name` makes for the family."""

    def make(family, rows):
        import parts

        return getattr(parts, name)(family)

    return make


def referring(family, rows):
    """CONDITIONING with two reference latents."""
    import parts

    latents = [parts.latent(family, name, rows)["samples"] for name in ("first", "second")]
    return parts.conditioning(family, "positive", rows, reference_latents=latents)


def merged(names, families=("Lumina2",)):
    """Merges by parts: all of the first model by default, half of each inside."""
    return Use(families, inside=dict.fromkeys(names, 0.5))


MERGES = {
    "ModelMergeAdd": Use(("SD1.5",)),
    "ModelMergeSubtract": Use(("SD1.5",), inside={"multiplier": 0.3}),
    "ModelMergeSimple": Use(("SD1.5", "SDXL", "Flux"), inside={"ratio": 0.4}),
    "ModelMergeBlocks": merged(("input", "middle", "out"), ("SD1.5",)),
    "ModelMergeSD1": merged(("input_blocks.1", "middle_block.0", "out."), ("SD1.5",)),
    "ModelMergeSD2": merged(("input_blocks.1", "middle_block.0", "out."), ("SD1.5",)),
    "ModelMergeSDXL": merged(("input_blocks.1", "middle_block.0", "out."), ("SDXL",)),
    "ModelMergeSD3_2B": merged(("joint_blocks.0.", "x_embedder."), ("SD3",)),
    "ModelMergeSD35_Large": merged(("joint_blocks.0.", "x_embedder."), ("SD3",)),
    "ModelMergeFlux1": merged(("double_blocks.0.", "img_in."), ("Flux",)),
    # these name blocks of other families; what they do not name follows their first number
    "ModelMergeAuraflow": merged(("init_x_linear.", "final_linear."), ("SD3",)),
    "ModelMergeCosmos14B": merged(("pos_embedder.", "final_layer.")),
    "ModelMergeCosmos7B": merged(("pos_embedder.", "final_layer.")),
    "ModelMergeCosmosPredict2_14B": merged(("pos_embedder.", "final_layer.")),
    "ModelMergeCosmosPredict2_2B": merged(("pos_embedder.", "final_layer.")),
    "ModelMergeKrea2": merged(("first.", "last.")),
    "ModelMergeLTXV": merged(("patchify_proj.", "proj_out.")),
    "ModelMergeMochiPreview": merged(("pos_frequencies.", "final_layer.")),
    "ModelMergeQwenImage": merged(("pos_embeds.", "proj_out.")),
    "ModelMergeWAN2_1": merged(("patch_embedding.", "head.")),
}

LOADERS = {
    "CheckpointLoader": Use(loads="checkpoint", acts=False),
    "CheckpointLoaderSimple": Use(loads="checkpoint", acts=False),
    "unCLIPCheckpointLoader": Use(loads="checkpoint", acts=False),
    "ImageOnlyCheckpointLoader": Use(loads="checkpoint", acts=False),
    "DiffusersLoader": Out("reads the folder of a diffusers model"),
    "UNETLoader": Use(("Flux",), loads="unet", acts=False),
    "LoraLoader": Use(("SD1.5", "Flux"), loads="lora", inside={"strength_model": 0.6}),
    "LoraLoaderModelOnly": Use(ALL, loads="lora", inside={"strength_model": 0.6}),
    "LoraLoaderBypass": Use(("SD1.5", "Flux"), loads="lora", inside={"strength_model": 0.6}),
    "LoraLoaderBypassModelOnly": Use(
        ("SD1.5", "Flux"), loads="lora", inside={"strength_model": 0.6}
    ),
    "LoraModelLoader": Use(("SD1.5", "Flux"), inside={"bypass": True, "strength_model": 0.6}),
    "HypernetworkLoader": Use(loads="hypernetwork", inside={"strength": 0.6}),
    "TrainLoraNode": Out("trains a LoRA; what it gives is a LORA_MODEL's weights on the model"),
}

SAMPLINGS = {
    # shifts move the levels of schedules, which the walk gives itself
    "ModelSamplingAuraFlow": Use(FLOWS, inside={"shift": 2.5}, acts=False),
    "ModelSamplingSD3": Use(FLOWS, inside={"shift": 2.0}, acts=False),
    "ModelSamplingFlux": Use(FLOWS, inside={"width": 512, "height": 768}, acts=False),
    "ModelSamplingLTXV": Use(("Flux",), inside={"latent": wired("LATENT")}, acts=False),
    "ModelSamplingStableCascade": Use(UNETS, inside={"shift": 1.5}),
    "ModelSamplingContinuousEDM": Use(
        UNETS, inside={"sampling": "edm", "sigma_max": 80.0}
    ),
    "ModelSamplingContinuousV": Use(UNETS, inside={"sigma_max": 400.0}),
    "ModelSamplingDiscrete": Use(
        UNETS, inside={"sampling": "v_prediction", "zsnr": True}
    ),
    "MiniMaxH3SigmaShift": Use(("Flux",), inside={"shift_video": 5.0}),
    "ModelNoiseScale": Use(("SD3", "Lumina2"), inside={"noise_scale": 1.5}),
}  # fmt: skip

GUIDANCES = {
    "APG": Use(ALL, inside={"momentum": -0.5, "eta": 0.5, "norm_threshold": 2.0}),
    "CFGNorm": Use(ALL, inside={"strength": 0.7}),
    "CFGOverride": Use(
        ALL, given={"cfg": 3.5}, inside={"start_percent": 0.2, "end_percent": 0.5}
    ),
    "CFGZeroStar": Use(ALL),
    "Epsilon Scaling": Use(ALL, inside={"scaling_factor": 1.1}),
    "TemporalScoreRescaling": Use(ALL, inside={"tsr_k": 0.7, "tsr_sigma": 0.5}),
    "FreSca": Use(ALL, inside={"scale_low": 1.2, "freq_cutoff": 2}),
    "LatentApplyOperationCFG": Use(ALL),
    "Mahiro": Use(ALL),
    "NAGuidance": Use(
        ("SD1.5", "SDXL", "Flux"), inside={"nag_scale": 3.0, "nag_alpha": 0.3, "nag_tau": 2.0}
    ),
    "PerpNeg": Use(ALL, inside={"neg_scale": 0.6}),
    "PerturbedAttentionGuidance": Use(UNETS, inside={"scale": 1.5}),
    "RenormCFG": Use(ALL, inside={"cfg_trunc": 5.0, "renorm_cfg": 0.7}),
    "RescaleCFG": Use(ALL, inside={"multiplier": 0.4}),
    "SelfAttentionGuidance": Use(UNETS, inside={"scale": 1.5, "blur_sigma": 1.0}),
    "SkipLayerGuidanceDiT": Use(
        FLOWS, given={"double_layers": "0", "single_layers": "1"},
        inside={"start_percent": 0.2, "end_percent": 0.6, "rescaling_scale": 0.5},
    ),
    "SkipLayerGuidanceDiTSimple": Use(
        FLOWS, given={"double_layers": "0", "single_layers": "1"},
        inside={"start_percent": 0.2, "end_percent": 0.6},
    ),
    "SkipLayerGuidanceSD3": Use(
        ("SD3",), given={"layers": "0, 1"}, inside={"start_percent": 0.2, "end_percent": 0.6}
    ),
    "TCFG": Use(ALL),
    "VideoLinearCFGGuidance": Use(ALL, inside={"min_cfg": 1.4}),
    "VideoTriangleCFGGuidance": Use(ALL, inside={"min_cfg": 1.4}),
    # their extra pass is like the first one in models without what they perturb
    "LTXVModalityGuidance": Use(
        ("Flux", "SD1.5"), inside={"start_percent": 0.2, "end_percent": 0.5}, acts=False
    ),
    "LTXVSpatioTemporalGuidance": Use(
        ("Flux", "SD1.5"), inside={"start_percent": 0.2, "end_percent": 0.5}, acts=False
    ),
    "LTXVReferenceAudio": Out(AUDIO),
}  # fmt: skip

CACHES = {
    "EasyCache": Use(ALL, inside={"reuse_threshold": 3.0, "start_percent": 0.0}),
    "LazyCache": Use(ALL, inside={"reuse_threshold": 3.0}),
    # with references it raises on this tiny Flux in ComfyUI itself: its oracle is without them
    "FluxKVCache": Use(("Flux",), basic=True, acts=False),
    "WanAnimate2Cache": Out(VIDEO),
}

PATCHES = {
    "UNetCrossAttentionMultiply": Use(UNETS, inside={"q": 1.3, "k": 0.8, "v": 1.2, "out": 0.9}),
    "UNetSelfAttentionMultiply": Use(UNETS, inside={"q": 1.3, "k": 0.8, "v": 1.2, "out": 0.9}),
    "UNetTemporalAttentionMultiply": Use(UNETS, inside={"self_structural": 1.3,
                                                       "cross_structural": 0.8}),
    "FreeU": Use(UNETS, inside={"b1": 1.3, "s2": 0.5}),
    "FreeU_V2": Use(UNETS, inside={"b1": 1.1, "s2": 0.5}),
    # their pictures are smaller here than what these two begin with
    "HyperTile": Use(UNETS, inside={"tile_size": 32, "swap_size": 1}, acts=False),
    "PatchModelAddDownscale": Use(
        UNETS, inside={"block_number": 1, "end_percent": 0.6, "downscale_after_skip": False}
    ),
    "TomePatchModel": Use(UNETS, inside={"ratio": 0.6}, acts=False),
    "ScaleROPE": Use(("Flux", "Lumina2"), inside={"scale_x": 1.5, "shift_y": 3.0}),
    "ChromaRadianceOptions": Use(("Flux",), inside={"start_sigma": 0.8}, acts=False),
    "HiDreamO1PatchSeamSmoothing": Use(
        ("SD3", "Lumina2"), inside={"start_percent": 0.2, "end_percent": 0.7}, acts=False
    ),
    "DifferentialDiffusion": Use(ALL, inside={"strength": 0.6}, masked=True),
    "ContextWindowsManual": Use(
        ALL, inside={"context_length": 1, "context_overlap": 0}, acts=False
    ),
    "LTXVContextWindows": Use(("Flux",), acts=False),
    "WanContextWindowsManual": Use(("Flux",), acts=False),
    "ModelAttentionBackend": Use(ALL, acts=False),
    "ModelComputeDtype": Use(ALL, inside={"dtype": "fp32"}, acts=False),
    "MultiGPU_WorkUnits": Use(acts=False),
    "SelectModelDevice": Use(inside={"device": "cpu"}, acts=False),
    "wanBlockSwap": Use(("SD1.5", "Flux"), acts=False),
    "TorchCompileModel": Out("compiles the model, which takes minutes; tests/compiled has it"),
    "USOStyleReference": Use(
        ("Flux",), given={"model_patch": part("uso_patch")}, basic=True
    ),
    "ZImageFunControlnet": Use(
        ("Lumina2",),
        given={"model_patch": part("z_image_patch"),
               "image": wired("IMAGE")},
        inside={"strength": 0.6},
    ),
    "QwenImageDiffsynthControlnet": Use(
        ("Lumina2",), given={"model_patch": part("z_image_patch")}, inside={"strength": 0.6}
    ),
    "AnimaLLLiteApply": Out("patches the attention of Anima, a model of a family not built here"),
    "SUPIRApply": Out("its ControlNet is as wide as SDXL's own UNet"),
    "WanUni3CControlnetApply": Out(VIDEO),
    "ARVideoI2V": Out(VIDEO),
    "WanInfiniteTalkToVideo": Out(VIDEO),
    "TripoSplatSamplingPreview": Out(SPACE),
}  # fmt: skip

GUIDERS = {
    "BasicGuider": Use(ALL),
    "CFGGuider": Use(ALL, given={"cfg": 3.0}, inside={"cfg": 1.7}),
    "DualCFGGuider": Use(
        ALL, given={"cfg_conds": 2.0, "cfg_cond2_negative": 1.5}, inside={"style": "nested"}
    ),
    "DualModelGuider": Use(
        ALL, given={"cfg": 2.0, "negative": wired("CONDITIONING", "negative")},
        inside={"model_negative": wired("MODEL", "model_negative")},
    ),
    "LTXVDualCFGGuider": Use(ALL, given={"video_cfg": 3.0}, inside={"video_cfg": 1.5}),
    "PerpNegGuider": Use(ALL, given={"cfg": 3.0}, inside={"neg_scale": 0.5}),
}  # fmt: skip

TABLE = {
    **MERGES, **LOADERS, **SAMPLINGS, **GUIDANCES, **CACHES, **PATCHES, **GUIDERS,
}  # fmt: skip
