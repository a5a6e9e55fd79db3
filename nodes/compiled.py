"""Compiled UNets as nodes."""

import json
import pathlib

import folder_paths
from server import PromptServer

from ..compiled.choice import AUTO, ENGINES, Wish, chosen, make, make_faster
from ..compiled.engine import Refused
from ..compiled.ov import api as openvino
from ..compiled.precision import DEFAULT, PRECISIONS
from ..host.models.engines import Attached, attach, without
from .compat import io, newer


class LiveCompile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveCompile",
            display_name="Live Compile",
            category="live/models",
            description=(
                "Runs the model's UNet on a faster engine. LoRA, ControlNet and prompts go on "
                "working; what an engine cannot do, the UNet itself does, and the node says so."
            ),
            inputs=[
                io.Model.Input("model", tooltip="With its LoRAs."),
                io.Combo.Input(
                    "engine",
                    options=[AUTO, *ENGINES],
                    default=AUTO,
                    tooltip="auto: the best that works here without a long build. cudagraph: "
                    "NVIDIA, ready in a second. inductor: torch.compile, minutes once. "
                    "onnxruntime: also on a CPU. openvino: Intel and AMD processors, Intel GPUs "
                    "and NPUs. eager: as it is.",
                ),
                precision_input(),
                device_input(),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["torch compile", "cuda graph", "onnx", "speed"]),
        )

    @classmethod
    def execute(cls, model, engine, precision=DEFAULT, device=openvino.AUTO) -> io.NodeOutput:
        place = model.load_device
        tell = teller(cls.hidden.unique_id)
        wish = Wish(precision, device, kept_folder(), lambda text: attached.note(text))
        try:
            name, why = chosen(engine, place, wish)
        except Refused as refused:
            raise ValueError(refusal(engine, refused)) from refused
        if name == "eager" and precision == DEFAULT:
            tell(f"{name}: {why}")
            return io.NodeOutput(without(model), ui=engine_ui({"engine": name, "why": why}))
        # auto never changes a picture, so it measures float32 only
        measured = engine == AUTO and name == "openvino" and precision == DEFAULT
        how = make_faster if measured else make
        attached = Attached(
            name, why, lambda: how(name, place, wish), tell, beside=name == "inductor"
        )
        tell(attached.line())
        return io.NodeOutput(attach(model, attached), ui=engine_ui(attached.stats()))


def precision_input():
    """The input of a node that compiles; graphs saved before it was there lack it."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default=DEFAULT,
        optional=True,
        tooltip="default: the model's own, float32 on a CPU. bfloat16: faster on a processor that "
        "multiplies it; openvino and eager. float16: GPU and NPU of openvino. int8: openvino; "
        "look at the picture. The node tells the error.",
    )


def device_input():
    """The input of a node that compiles; graphs saved before it was there lack it."""
    return io.Combo.Input(
        "device",
        options=[openvino.AUTO, *openvino.DEVICES],
        default=openvino.AUTO,
        optional=True,
        tooltip="Of openvino. auto: the processor.",
    )


def kept_folder() -> pathlib.Path:
    """Where compiled networks and measurements are kept."""
    return pathlib.Path(folder_paths.get_user_directory()) / "livediffusion" / "openvino"


def refusal(engine: str, refused: Refused) -> str:
    """The message of a refusal, which begins with the input it is about."""
    text = str(refused)
    if text.startswith(("device:", "precision:")):
        return f"{text}."
    return f"engine: {engine} cannot be used here. {text}"


def teller(node: str | None):
    """What puts a line on a node, now and later."""
    send = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)

    def tell(text: str) -> None:
        if send is not None and node is not None:
            send(text, node)

    return tell


def engine_ui(stats: dict) -> dict:
    """A node's result for its page; as text, since others take an object for a file."""
    return {"livediffusion_engine": [json.dumps(stats)]}
