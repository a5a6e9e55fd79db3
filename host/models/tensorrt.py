"""TensorRT engines as MODELs of ComfyUI."""

import pathlib
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...compiled import onnx_export
from ...compiled.engine import Call, Refused
from ...compiled.remembered import BANK
from ...compiled.trt import api, building, files, targets
from ...compiled.trt.engine import TensorRT
from ...compiled.weights import whole
from . import fingerprint, remembering, reused, skeleton
from .coherence import coherence_of
from .engines import Attached, attach, fixed
from .looks import ENGINE
from .unet import ComfyUNet

_LIBRARIES = (api.AUTO, *api.MODULES)


def folders() -> list[str]:
    """Where engines are: ComfyUI's models folder, and any that another pack has named."""
    named = folder_paths.folder_names_and_paths.get("tensorrt", ([], set()))[0]
    own = str(pathlib.Path(folder_paths.models_dir) / "tensorrt")
    return list(dict.fromkeys([own, *named]))


def wish(
    model, width: int, height: int, rows: int, tokens: int, controlnet: bool, precision: str,
    dynamic_size: bool = False, refit: bool = False, library: str = api.AUTO,
    gpus: str = targets.HERE,
) -> building.Wish:  # fmt: skip
    """What is to be built for a MODEL.

    Args:
        model: with its LoRAs.
        width, height: of the pictures, in pixels.
        rows: of a call.
        tokens: of the prompt.
        controlnet: also take the residuals of a ControlNet.
        library: api.AUTO, or the name of one.
        gpus: that it is for, a name in targets.SETS.

    Raises:
        ValueError: naming the input.
    """
    inner = model.model
    config = dict(inner.model_config.unet_config)
    if not isinstance(inner.diffusion_model, UNetModel):
        raise ValueError(
            f"model: {type(inner.diffusion_model).__name__} cannot be built. Use a model of the "
            "SD1.5, SD2.1 or SDXL family."
        )
    ratio = getattr(inner.latent_format, "spacial_downscale_ratio", None) or 8
    for name, pixels in (("width", width), ("height", height)):
        if pixels % ratio:
            raise ValueError(f"{name}: {pixels} is no multiple of {ratio}. Use one that is.")
    for name, value, known in (("library", library, _LIBRARIES), ("targets", gpus, targets.SETS)):
        if not (isinstance(value, str) and value in known):
            raise ValueError(f"{name}: {value!r:.80} is none of {', '.join(known)}.")
    taken, capabilities, why = _taken(library, targets.SETS[gpus], precision, refit)
    dtype = building.PRECISIONS[precision]
    size = (rows, config["in_channels"], height // ratio, width // ratio)
    named = {"x": torch.zeros(size, dtype=dtype), "timesteps": torch.zeros(rows)}
    dim = config.get("context_dim")
    if dim is not None:
        wide = dim[0] if isinstance(dim, list | tuple) else dim
        named["context"] = torch.zeros(rows, tokens, wide, dtype=dtype)
    if config.get("adm_in_channels"):
        named["y"] = torch.zeros(rows, config["adm_in_channels"], dtype=dtype)
    if controlnet:
        for name, shape in _residuals(config, Call.of(named)).items():
            named[name] = torch.zeros(shape, dtype=dtype)
    return building.Wish(
        taken, _example(model, named, dtype), precision, fingerprint.of_model(model), capabilities,
        dynamic_size, refit, skeleton.described(model), why,
    )  # fmt: skip


def _example(model, named: dict[str, torch.Tensor], dtype: torch.dtype) -> Call:
    """The call of these tensors, with what frames help each other by in this MODEL."""
    unet = model.model.diffusion_model
    asked = coherence_of(model)
    memory = remembering.example(asked, unet, named["x"], dtype)
    # where frames help each other, rows run whole
    reuse = None if memory is not None else reused.example(asked, unet, named["x"], dtype)
    for part in (memory, reuse):
        named = named if part is None else {**named, **part.reads}
    return Call.of(named, memory, reuse)


def _taken(
    library: str, asked: tuple[str, ...] | None, precision: str, refit: bool
) -> tuple[api.Library, tuple[str, ...], str]:
    """The library that builds, the compute capabilities it is told, and why it is this one."""
    if refit and precision == "bf16":
        raise ValueError("refit: weights of bf16 cannot be exchanged. Use fp16 or fp32.")
    try:
        taken, capabilities, why = api.chosen(library, asked)
    except Refused as refused:
        raise ValueError(f"The engine was not built: {refused}") from refused
    if precision == "bf16" and targets.NO_BF16 in capabilities:
        raise ValueError(
            f"precision: {targets.named((targets.NO_BF16,))} has no bf16. Use fp16, or targets "
            "without it."
        )
    if refit and capabilities and api.gpu() is None:
        raise ValueError(
            "refit: tensorrt-rtx needs a GPU to build an engine whose weights can be exchanged. "
            "Switch refit off, or build where there is one."
        )
    return taken, capabilities, why


def build(model, asked: building.Wish, name: str, report: building.Report) -> pathlib.Path:
    """The engine for a wish, built unless it is there. Cancelled as ComfyUI is.

    Raises:
        ValueError: it cannot be built, and why.
    """
    still = fixed(model)

    def unet() -> ComfyUNet:
        comfy.model_management.load_models_gpu([still], force_patch_weights=True)
        return ComfyUNet(still.model.diffusion_model)

    def free() -> None:
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()

    try:
        path, _ = building.make(
            unet, asked, pathlib.Path(folders()[0]), name, report,
            comfy.model_management.throw_exception_if_processing_interrupted, free,
        )  # fmt: skip
    except Refused as refused:
        raise ValueError(f"The engine was not built: {refused}") from refused
    except OSError as error:
        raise ValueError(f"The engine was not built: {error}") from error
    return path


def again(sidecar: files.Sidecar, model) -> building.Wish:
    """The wish that an engine was built for, for another model, machine or version.

    Raises:
        ValueError: it cannot be built here, and why.
    """
    made = sidecar.made
    here = api.gpu()
    # the same library for the same GPUs, unless this one is another
    same = api.installed(made.library) and (
        not made.targets or (here is not None and here["capability"] in made.targets)
    )
    library, asked = (made.library, made.targets or None) if same else (api.AUTO, None)
    taken, capabilities, why = _taken(library, asked, made.precision, "refit" in made.flags)
    dtype = building.PRECISIONS[made.precision]
    named = {
        name: torch.zeros(usual, dtype=torch.float32 if name == "timesteps" else dtype)
        for name, (_, usual, _) in made.profile.items()
        if not name.startswith(BANK)
    }
    return building.Wish(
        taken, _example(model, named, dtype), made.precision, fingerprint.of_model(model),
        capabilities, "dynamic_size" in made.flags, "refit" in made.flags,
        skeleton.described(model), why,
    )  # fmt: skip


def here(library: str) -> dict[str, Any]:
    """What an engine of a library must match (files.check).

    Raises:
        Refused: the library is installed and does not load.
    """
    version = api.load(library).version if api.installed(library) else None
    return {**api.gpu(), "tensorrt": version, "exporter": onnx_export.VERSION}


def load(path: pathlib.Path, sidecar: files.Sidecar, tell: Callable[[str], None]):
    """A MODEL that is the engine alone.

    Raises:
        ValueError: it has a memory, which the UNet itself has to fill, or was built with reuse.
    """
    if sidecar.made.layers is not None:
        raise ValueError(
            f"model: {path.name} was built with {sidecar.made.layers}, and while nothing is "
            "remembered yet the model itself has to run. Wire the one it was built from."
        )
    if sidecar.made.depth is not None:
        raise ValueError(
            f"model: {path.name} was built with Live Reuse, whose node needs the model itself. "
            "Wire the one it was built from."
        )
    device = comfy.model_management.get_torch_device()
    engine = TensorRT(path, sidecar, device)
    base = skeleton.made(sidecar.family, building.PRECISIONS[sidecar.made.precision])
    base.engine = engine
    patcher = skeleton.EnginePatcher(base, device, torch.device("cpu"))
    attached = Attached("tensorrt", path.name, lambda: engine, tell, alone=True)
    return attach(patcher, attached, frees=True)


def fits(model, sidecar: files.Sidecar) -> bool:
    """True where an engine can run for a MODEL: built from it, or refittable, and with what its
    frames help each other by."""
    built = bool(sidecar.weights) or fingerprint.of_model(model) == sidecar.made.model
    return built and not _helps_otherwise(model, sidecar)


def _helps_otherwise(model, sidecar: files.Sidecar) -> str:
    """See remembering.differs and reused.differs."""
    asked, unet = coherence_of(model), model.model.diffusion_model
    return remembering.differs(asked, unet, sidecar.made) or reused.differs(
        asked, unet, sidecar.made
    )


def run_on(model, path: pathlib.Path, sidecar: files.Sidecar, tell: Callable[[str], None]):
    """A MODEL that runs on an engine built from it, and falls back to itself.

    Raises:
        ValueError: the engine was built from another model or other LoRAs, and cannot be refitted.
    """
    engine = TensorRT(path, sidecar, model.load_device)
    built_from = fingerprint.of_model(model) == sidecar.made.model
    if why := _helps_otherwise(model, sidecar):
        raise ValueError(
            f"model: {why}. Queue Live TensorRT Build with this model, switch rebuild on, or take "
            "the nodes out."
        )
    if not fits(model, sidecar):
        raise ValueError(
            f"model: {path.name} was built from another model, or with other LoRAs or strengths. "
            "Wire the one it was built from, switch rebuild on, or build with refit on."
        )
    weights = _Weights(model.patches_uuid if built_from else None)
    attached = Attached("tensorrt", path.name, lambda: engine, tell, accept=weights)
    clone = attach(model, attached)
    if sidecar.made.layers is not None and not remembering.helps(model):
        built = sidecar.made.layers.words(sidecar.made.frames, sidecar.made.inputs)
        attached.note(f"it was built with {built}: only behind such nodes does it run")
    if sidecar.made.depth is not None and not reused.reuses(model):
        attached.note("it was built with Live Reuse: only behind such a node does it run")
    # ComfyUI is to know of the engine's memory, and may take it back
    holder = torch.nn.Module()
    holder.engine = engine
    memory = skeleton.EnginePatcher(holder, model.load_device, torch.device("cpu"))
    memory.add_callback_with_key(comfy.model_patcher.CallbacksMP.ON_DETACH, ENGINE, attached.taken)
    clone.set_additional_models(ENGINE, [memory])
    return clone


class _Weights:
    """Keeps an engine at the weights that ComfyUI has patched.

    Args:
        built: patches_uuid of the weights that it was built with, None if they were others.
    """

    def __init__(self, built: Any):
        self._built = self._now = built
        self._loads = 0
        self._changed: set[str] = set()  # parameters that are not as they were built

    def __call__(self, base, engine: TensorRT) -> None:
        """Raises Refused where the engine cannot follow."""
        loaded = base.current_weight_patches_uuid
        if engine.loads != self._loads:
            self._loads, self._now = engine.loads, self._built  # as it was built
            self._changed = set()
        if loaded == self._now:
            return
        if not engine.refittable:
            raise Refused(
                "a LoRA was added after the engine was built: put it before Live TensorRT Build, "
                "or build with refit on"
            )
        whole(base.diffusion_model)
        weights = dict(base.diffusion_model.named_parameters())
        patched = {
            str(key).removeprefix("diffusion_model.") for key in base.current_patcher.patches
        }
        if self._built is not None:
            weights = {n: w for n, w in weights.items() if n in patched | self._changed}
        engine.refit(weights)
        self._now = loaded
        self._changed |= patched


def _residuals(config: dict[str, Any], call: Call) -> dict[str, torch.Size]:
    """Shapes of a ControlNet's residuals, found without weights."""
    plain = {k: v for k, v in config.items() if k != "dtype"}
    unet = UNetModel(
        **plain, dtype=call.x.dtype, device="meta", operations=comfy.ops.disable_weight_init
    )
    named = {name: tensor.to("meta") for name, tensor in call.named().items()}
    shapes = onnx_export.residual_shapes(ComfyUNet(unet).bare(), Call.of(named))
    # ControlNets give none at the input blocks; T2I adapters do
    return {name: shape for name, shape in shapes.items() if "_input_" not in name}
