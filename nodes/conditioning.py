"""Prompts as nodes."""

from ..engine.blend import METHODS
from ..host.sampling.prompts import blend_conditioning
from .compat import io


class LivePromptBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LivePromptBlend",
            display_name="Live Prompt Blend",
            category="live/conditioning",
            description="Moves from one prompt to another by one weight, for live cross-fades.",
            inputs=[
                io.Conditioning.Input("a", tooltip="The prompt at weight 0. Keeps its settings."),
                io.Conditioning.Input("b", tooltip="The prompt at weight 1."),
                io.Float.Input(
                    "weight",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 is a, 1 is b.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="slerp",
                    tooltip="slerp turns at an even pace and keeps the prompt's strength; lerp "
                    "takes the straight line.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, a, b, weight, method) -> io.NodeOutput:
        return io.NodeOutput(blend_conditioning(a, b, weight, method))
