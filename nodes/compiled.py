"""Compiled UNets as nodes."""

import json

from server import PromptServer

from ..compiled.choice import AUTO, ENGINES, chosen, make
from ..compiled.engine import Refused
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
                    "onnxruntime: also on a CPU. eager: as it is.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["torch compile", "cuda graph", "onnx", "speed"]),
        )

    @classmethod
    def execute(cls, model, engine) -> io.NodeOutput:
        device = model.load_device
        try:
            name, why = chosen(engine, device)
        except Refused as refused:
            raise ValueError(f"engine: {engine} cannot be used here. {refused}") from refused
        tell = teller(cls.hidden.unique_id)
        if name == "eager":
            tell(f"{name}: {why}")
            return io.NodeOutput(without(model), ui=engine_ui({"engine": name, "why": why}))
        attached = Attached(name, why, lambda: make(name, device), tell)
        tell(attached.line())
        return io.NodeOutput(attach(model, attached), ui=engine_ui(attached.stats()))


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
