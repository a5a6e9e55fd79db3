"""A MODEL without weights: what ComfyUI needs around an engine that has them."""

import importlib
import json
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models_base
import torch

from ...trust.boundary import FAMILY, MODEL_CLASSES
from ...trust.schema import BadData

_PACK = __name__.partition(".host.")[0]


class Skeleton(torch.nn.Module):
    """Stands where the UNet would; an engine's wrapper answers before it is asked."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(
        self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None,
        **kwargs,
    ):  # fmt: skip
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, wrappers
        ).execute(x, timesteps, context, y, control, options, **kwargs)

    def _forward(self, *args, **kwargs):
        raise RuntimeError("A node has removed the engine of this model; load it once more.")


class EnginePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose weights are an engine's: they cannot be patched.

    Its model has the engine as its `engine`.
    """

    def model_size(self):
        """Bytes that ComfyUI makes room for."""
        return self.model.engine.memory

    def add_patches(self, *args, **kwargs):
        raise ValueError(
            "model: a LoRA cannot be added to a TensorRT engine that is loaded alone. Put the LoRA "
            "before Live TensorRT Build, or wire the checkpoint's MODEL into Live TensorRT Loader."
        )


def described(patcher) -> dict[str, Any]:
    """What a MODEL is besides its weights, as JSON; empty where it cannot be told."""
    model, config = patcher.model, patcher.model.model_config
    told = {
        "base": _where(type(model)),
        "config": _where(type(config)),
        "unet_config": {k: v for k, v in config.unet_config.items() if k != "dtype"},
        "sampling_settings": dict(config.sampling_settings),
        "model_type": model.model_type.name,
        "memory_usage_factor": model.memory_usage_factor,
    }
    try:
        told = json.loads(json.dumps(told))
        for part in MODEL_CLASSES:
            _found(told, part)
        return FAMILY(told, "family")
    except (ValueError, TypeError):
        # nothing is written that would not be read
        return {}


def made(family: dict[str, Any], dtype: torch.dtype) -> comfy.model_base.BaseModel:
    """The BaseModel that was described.

    Args:
        family: of an engine's JSON file, so from anybody.

    Raises:
        ValueError: this ComfyUI has no such model, or it is described as none ever was.
    """
    try:
        family = FAMILY(family, "family")
        config = _found(family, "config")(dict(family["unet_config"]))
        config.unet_config = {
            **family["unet_config"], "dtype": dtype, "disable_unet_model_creation": True,
        }  # fmt: skip
        config.sampling_settings = dict(family["sampling_settings"])
        kind = comfy.model_base.ModelType[family["model_type"]]
        model = _found(family, "base")(config, kind)
    except Exception as error:
        # a model's own class says anything of a configuration that it was not written for
        raise ValueError(
            "engine: it was built from a model that cannot be made up here "
            f"({type(error).__name__}: {error}). Wire the model it was built from into model."
        ) from error
    model.memory_usage_factor = family["memory_usage_factor"]
    model.diffusion_model = Skeleton(dtype)
    return model.train(False)


def _where(kind: type) -> list[str]:
    """Module and name of a class; a module of this pack as a relative one."""
    module = kind.__module__
    own = module.startswith(f"{_PACK}.")
    return [module.removeprefix(_PACK) if own else module, kind.__qualname__]


def _found(family: dict[str, Any], part: str) -> type:
    """A model's class, by its place in one of the few modules that have such.

    Raises:
        BadData: it stands elsewhere, or is no such class.
    """
    where, name = family[part]
    if where not in MODEL_CLASSES[part]:
        raise BadData(f"{part}: {where} has no models")
    module = importlib.import_module(where, _PACK)
    found = vars(module).get(name)
    above = {
        "base": comfy.model_base.BaseModel,
        "config": comfy.supported_models_base.BASE,
    }[part]
    if not (isinstance(found, type) and issubclass(found, above)):
        raise BadData(f"{part}: {where}.{name} is no model")
    return found
