"""TensorRT engines as nodes."""

import pathlib
import re
from typing import Any

import comfy.utils

from ..compiled.engine import Refused
from ..compiled.trt import api, files, targets
from ..compiled.trt.building import PRECISIONS
from ..host.models import tensorrt
from ..trust.boundary import inside
from ..trust.schema import shown
from .compat import io, newer
from .compiled import engine_ui, teller


def _engines() -> list[str]:
    """Names of engines; where there can be none, what to do."""
    reason = api.missing()
    if reason:
        return [reason]
    return list(files.listed(tensorrt.folders())) or ["none yet: run Live TensorRT Build, then R"]


def _path(engine: Any) -> pathlib.Path:
    """The file of an engine that is listed; a link may bring a name of any type."""
    found = files.listed(tensorrt.folders()).get(engine) if isinstance(engine, str) else None
    if found is None:
        raise ValueError(f"engine: {shown(engine)} is not there. Choose another, or build one.")
    return inside(found.parent, found.name, "engine", "ComfyUI's models folder, tensorrt")


_NAME = 120  # bytes of what a file name begins with; sizes and key follow, and 255 may be all


class LiveTensorRTBuild(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveTensorRTBuild",
            display_name="Live TensorRT Build",
            category="live/models",
            description=(
                "Builds an engine of the model's UNet with TensorRT or TensorRT for RTX, its LoRAs "
                "baked in. Takes minutes once; an engine that is there is not built again."
            ),
            inputs=[
                io.Model.Input("model", tooltip="With the LoRAs that are to be baked in."),
                io.Int.Input(
                    "width", default=512, min=64, max=4096, step=8, tooltip="Of the pictures."
                ),
                io.Int.Input(
                    "height", default=512, min=64, max=4096, step=8, tooltip="Of the pictures."
                ),
                io.Int.Input(
                    "rows",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Rows of one call: steps x frames_per_slot, plus frames_per_slot with "
                    "onetime-negative, twice as many with full guidance. Fewer also run.",
                ),
                io.Int.Input(
                    "context_tokens",
                    default=77,
                    min=1,
                    max=77 * 16,
                    tooltip="Length of the prompt: 77, or 154 for long ones, which 77 also fit.",
                ),
                io.Boolean.Input(
                    "controlnet",
                    default=False,
                    tooltip="Can take ControlNets; slower, also without one.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp16",
                    tooltip="Of weights and computation.",
                ),
                io.String.Input(
                    "name", default="unet", tooltip="The engine's file name begins with it."
                ),
                io.Boolean.Input(
                    "dynamic_size",
                    default=False,
                    tooltip="Also half to one and a half times width and height; slower.",
                ),
                io.Boolean.Input(
                    "refit",
                    default=False,
                    tooltip="LoRAs may be changed later, with the model wired into the loader; "
                    "slower.",
                ),
                io.Combo.Input(
                    "library",
                    options=[api.AUTO, *api.MODULES],
                    default=api.AUTO,
                    optional=True,
                    tooltip="auto: tensorrt-rtx where it is installed and runs on the GPU, else "
                    "tensorrt.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(targets.SETS),
                    default=targets.HERE,
                    optional=True,
                    tooltip="GPUs that the engine is for. Others than this one: tensorrt-rtx, also "
                    "on a computer without a GPU.",
                ),
            ],
            outputs=[io.String.Output(display_name="engine")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["trt", "rtx", "nvidia"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs):
        """What lies there: an engine that is gone or spoilt is built when it is queued again."""
        return files.seen(tensorrt.folders())

    @classmethod
    def execute(
        cls, model, width, height, rows, context_tokens, controlnet, precision, name,
        dynamic_size, refit, library=api.AUTO, targets=targets.HERE,
    ) -> io.NodeOutput:  # fmt: skip
        named = isinstance(name, str) and re.fullmatch(r"(?!\.)[\w .+-]{1,100}", name)
        if not named or len(name.encode()) > _NAME:
            raise ValueError(
                f"name: {name!r:.80} cannot begin a file name. Use letters, digits, - and _."
            )
        asked = tensorrt.wish(
            model, width, height, rows, context_tokens, controlnet, precision, dynamic_size, refit,
            library, targets,
        )  # fmt: skip
        tell = teller(cls.hidden.unique_id)
        tell(f"{asked.library.name}: {asked.why}")
        label = f"{name}_{width}x{height}_r{rows}_t{context_tokens}_{precision}"
        path = tensorrt.build(model, asked, label, _reporter(tell))
        told = {"engine": path.name, "library": asked.library.name, "why": asked.why}
        memory = asked.call.memory
        within = "" if memory is None else f", with {memory.layers}"
        tell(f"{path.name}: {asked.library.name}, {asked.why}{within}")
        return io.NodeOutput(path.name, ui=engine_ui(told))


class LiveTensorRTLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveTensorRTLoader",
            display_name="Live TensorRT Loader",
            category="live/models",
            description=(
                "A model that runs on a TensorRT engine. With a checkpoint's model wired in, that "
                "one does what the engine cannot; without it, less memory is needed."
            ),
            inputs=[
                io.Combo.Input(
                    "engine",
                    options=_engines(),
                    tooltip="From ComfyUI's models folder, tensorrt. Press R to see new ones.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model it was built from, with its LoRAs: runs what the engine "
                    "cannot do.",
                ),
                io.Boolean.Input(
                    "rebuild",
                    default=False,
                    tooltip="Build the engine anew from model where it does not fit: another GPU, "
                    "another TensorRT, other LoRAs. Takes minutes.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["trt", "nvidia"]),
        )

    @classmethod
    def fingerprint_inputs(cls, engine, **kwargs):
        """An engine that was built anew is loaded anew."""
        try:
            return _path(engine).stat().st_mtime_ns
        except (OSError, ValueError):
            return None

    @classmethod
    def execute(cls, engine, rebuild=False, model=None) -> io.NodeOutput:
        if rebuild and model is None:
            raise ValueError("rebuild: no model to build from. Wire one, or switch rebuild off.")
        reason = api.missing()
        if reason:
            raise ValueError(f"engine: {reason}")
        path = _path(engine)
        tell = teller(cls.hidden.unique_id)
        try:
            sidecar = files.check(path, tensorrt.here)
        except Refused as refused:
            raise ValueError(f"engine: {refused}") from refused
        except files.Unfit as unfit:
            if not rebuild:
                raise ValueError(
                    f"engine: {engine} {unfit}. Queue Live TensorRT Build again, or wire the model "
                    "and switch rebuild on."
                ) from unfit
            path, sidecar = _rebuilt(path, model, tell)
        if model is None:
            return io.NodeOutput(tensorrt.load(path, sidecar, tell))
        if rebuild and not tensorrt.fits(model, sidecar):
            path, sidecar = _rebuilt(path, model, tell)
        return io.NodeOutput(tensorrt.run_on(model, path, sidecar, tell))


def _rebuilt(path: pathlib.Path, model, tell) -> tuple[pathlib.Path, files.Sidecar]:
    """The engine that `path` would be if it were built here and now."""
    try:
        asked = tensorrt.again(files.read(path), model)
    except files.Unfit as unfit:
        raise ValueError(
            f"engine: {path.name} {unfit}, so it cannot be built again. Queue Live TensorRT Build."
        ) from unfit
    label = path.name.removesuffix(files.SUFFIX).rpartition("-")[0] or "unet"
    tell(f"{asked.library.name}: {asked.why}")
    built = tensorrt.build(model, asked, label, _reporter(tell))
    return built, files.check(built, tensorrt.here)


def _reporter(tell):
    """Progress on the node: a bar for each phase, and its name."""
    bar = comfy.utils.ProgressBar(1)
    current = None

    def report(phase: str, step: int, steps: int) -> None:
        nonlocal current
        if phase != current:
            current = phase
            tell(f"building: {phase}")
        bar.update_absolute(step, max(steps, 1))

    return report
