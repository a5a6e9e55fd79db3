"""How every node of ComfyUI that gives CONDITIONING is exercised, or why it is not."""

from node_models import ALL, AUDIO, SPACE, UNETS, VIDEO, Out, Use, referring, wired

ENCODER = "asks a vision model for features (CLIP_VISION)"


def masked(family, rows):
    """CONDITIONING that leaves a part of the picture to a default."""
    import parts

    ((cond, extra),) = parts.conditioning(family, "positive", rows)
    return [[cond, {**extra, "mask": parts.mask("left", (0,)), "mask_strength": 1.0}]]


TEXTS = {
    "CLIPTextEncode": Use(ALL, given={"text": "a cat"}),
    "CLIPTextEncodeControlnet": Use(UNETS, given={"text": "a cat"}, acts=False),
    "CLIPTextEncodeFlux": Use(("Flux",), inside={"guidance": 2.0}),
    "CLIPTextEncodeHiDream": Use(("Flux",)),
    "CLIPTextEncodeHunyuanDiT": Use(("SD3",)),
    "CLIPTextEncodeKandinsky5": Use(("Flux",)),
    "CLIPTextEncodeLumina2": Use(("Lumina2",)),
    "CLIPTextEncodePixArtAlpha": Use(("SD1.5",), inside={"width": 512}),
    "CLIPTextEncodeSD3": Use(("SD3",)),
    "CLIPTextEncodeSDXL": Use(("SDXL",), inside={"width": 512, "crop_h": 64}),
    "CLIPTextEncodeSDXLRefiner": Use(("SDXL",), inside={"ascore": 4.0}),
    "TextEncodeQwenImageEdit": Use(("Flux",)),
    "TextEncodeQwenImageEditPlus": Use(("Flux",)),
    "TextEncodeZImageOmni": Use(("Lumina2",)),
    "TextEncodeBooguEdit": Out("needs the text encoder of Boogu"),
    "TextEncodeJoyImageEdit": Out("needs the text encoder of JoyImage"),
    "TextEncodeMageFlowEdit": Out("needs the text encoder of Mage"),
    "TextEncodeHunyuanVideo_ImageToVideo": Out(VIDEO),
    "TextEncodeAceStepAudio": Out(AUDIO),
    "TextEncodeAceStepAudio1.5": Out(AUDIO),
    "MiniMaxMusic3TextEncode": Out(AUDIO),
    "PhotoMakerEncode": Out("needs the weights of PhotoMaker's encoder"),
}

PLAIN = {
    "ConditioningAverage": Use(ALL, inside={"conditioning_to_strength": 0.4}, rows=True),
    "ConditioningCombine": Use(ALL, rows=True),
    "ConditioningConcat": Use(ALL, rows=True),
    "ConditioningMultiply": Use(("SD1.5", "SD3"), inside={"multiplier": 0.7}, rows=True),
    "ConditioningZeroOut": Use(ALL, rows=True),
    "ConditioningSetArea": Use(
        ALL, inside={"width": 32, "height": 48, "x": 16, "strength": 0.7}, rows=True
    ),
    "ConditioningSetAreaPercentage": Use(
        ALL, inside={"width": 0.5, "height": 0.75, "x": 0.25}, rows=True
    ),
    "ConditioningSetAreaPercentageVideo": Out(VIDEO),
    "ConditioningSetAreaStrength": Use(("SD1.5", "Flux"), inside={"strength": 0.6}, acts=False),
    "ConditioningSetMask": Use(
        ALL, inside={"strength": 0.6, "set_cond_area": "mask bounds"}, rows=True
    ),
    "ConditioningSetTimestepRange": Use(ALL, inside={"start": 0.3, "end": 0.7}, rows=True),
    "ConditioningSetProperties": Use(
        ALL, rows=True,
        inside={"mask": wired("MASK"), "timesteps": wired("TIMESTEPS_RANGE"), "strength": 0.8,
                "hooks": wired("HOOKS")},
    ),
    "ConditioningSetPropertiesAndCombine": Use(
        ALL, rows=True,
        inside={"mask": wired("MASK"), "timesteps": wired("TIMESTEPS_RANGE"), "strength": 0.8,
                "hooks": wired("HOOKS")},
    ),
    "ConditioningSetDefaultCombine": Use(
        ALL, inside={"hooks": wired("HOOKS"), "cond": masked}
    ),
    "PairConditioningCombine": Use(ALL, rows=True),
    "PairConditioningSetDefaultCombine": Use(
        ALL, inside={"hooks": wired("HOOKS"), "positive": masked}
    ),
    "PairConditioningSetProperties": Use(
        ALL, rows=True, inside={"mask": wired("MASK"), "timesteps": wired("TIMESTEPS_RANGE")}
    ),
    "PairConditioningSetPropertiesAndCombine": Use(
        ALL,
        given={"positive_NEW": wired("CONDITIONING", "new")},
        rows=True,
        inside={"mask": wired("MASK"), "timesteps": wired("TIMESTEPS_RANGE")}
    ),
    "FluxGuidance": Use(("Flux",), given={"guidance": 2.0}, rows=True),
    "FluxDisableGuidance": Use(("Flux",), rows=True),
    "LotusConditioning": Out("its text is 1024 wide, for Lotus only"),
    "PiDConditioning": Use(("SD1.5",), acts=False),
}  # fmt: skip


PICTURES = {
    "InpaintModelConditioning": Use(
        ("inpaint", "SD1.5", "Flux"), inside={"noise_mask": False}, rows=True
    ),
    "InstructPixToPixConditioning": Use(("ip2p",), rows=True),
    "ReferenceLatent": Use(("Flux", "Lumina2"), given={"latent": wired("LATENT")}, rows=True),
    "FluxKontextMultiReferenceLatentMethod": Use(
        ("Flux",), given={"conditioning": referring,
                          "reference_latents_method": "offset"},
        inside={"reference_latents_method": "index"}, rows=True,
    ),
    "ControlNetApply": Use(UNETS, inside={"strength": 0.6}, rows=True),
    "ControlNetApplyAdvanced": Use(
        UNETS, inside={"strength": 0.6, "start_percent": 0.2, "end_percent": 0.6}, rows=True
    ),
    "ControlNetApplySD3": Use(
        UNETS, inside={"strength": 0.6, "start_percent": 0.2, "end_percent": 0.6}, rows=True
    ),
    "ControlNetInpaintingAliMamaApply": Use(
        UNETS, inside={"strength": 0.6, "start_percent": 0.2, "end_percent": 0.6}, rows=True
    ),
    "GLIGENTextBoxApply": Use(("SD1.5",), given={"text": "a cat"}, inside={"x": 16}),
    "StyleModelApply": Use(
        ("Flux", "SD1.5"),
        inside={"strength": 0.5, "strength_type": "attn_bias"},
    ),
    "unCLIPConditioning": Use(
        ("Lumina2",), given={"noise_augmentation": 0.1}, inside={"strength": 0.7}, acts=False
    ),
    "SD_4XUpscale_Conditioning": Use(("SD1.5",), acts=False),
    "StableCascade_StageB_Conditioning": Use(("SD1.5",), acts=False),
    "HiDreamO1ReferenceImages": Out("for HiDream-O1, whose tokens its own encoder makes"),
    "SeedVR2Conditioning": Out(VIDEO),
    "BerniniConditioning": Out(VIDEO),
    "StableZero123_Conditioning": Out(ENCODER),
    "StableZero123_Conditioning_Batched": Out(ENCODER),
    "SV3D_Conditioning": Out(ENCODER),
    "SVD_img2vid_Conditioning": Out(ENCODER),
    "LoadTrainingDataset": Out("loads a data set to train with"),
    "MakeTrainingDataset": Out("makes a data set to train with, a list of CONDITIONING"),
    "ResolutionBucket": Out("sorts a data set to train with, a list of CONDITIONING"),
}  # fmt: skip


OTHERS = dict.fromkeys(
    (
        "HunyuanImageToVideo", "HunyuanRefinerLatent", "HunyuanVideo15ImageToVideo",
        "HunyuanVideo15SuperResolution", "Kandinsky5ImageToVideo", "LTXVAddGuide",
        "LTXVConditioning", "LTXVCropGuides", "LTXVImgToVideo", "MiniMaxH3AddGuide",
        "MiniMaxH3ImageToVideo", "MiniMaxH3ReferenceToVideo", "VOIDInpaintConditioning",
        "Wan22FunControlToVideo", "WanAnimate2ToVideo", "WanAnimateToVideo",
        "WanCameraImageToVideo", "WanDancerVideo", "WanFirstLastFrameToVideo",
        "WanFunControlToVideo", "WanFunInpaintToVideo", "WanHuMoImageToVideo",
        "WanImageToVideo", "WanMoveTrackToVideo", "WanPhantomSubjectToVideo",
        "WanSCAILToVideo", "WanSoundImageToVideo", "WanSoundImageToVideoExtend",
        "WanTrackToVideo", "WanVaceToVideo",
    ),
    Out(VIDEO),
) | dict.fromkeys(
    (
        "Hunyuan3Dv2Conditioning", "Hunyuan3Dv2ConditioningMultiView", "Pixal3DConditioning",
        "Trellis2Conditioning", "Trellis2ShapeStage", "Trellis2TextureStage",
        "Trellis2UpsampleStage", "TripoSplatConditioning",
    ),
    Out(SPACE),
) | dict.fromkeys(("ConditioningStableAudio", "ReferenceTimbreAudio"), Out(AUDIO))  # fmt: skip

TABLE = {**TEXTS, **PLAIN, **PICTURES, **OTHERS}
