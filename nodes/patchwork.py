"""Only what has changed, as a node."""

from ..engine.patchwork.mask import Patchwork
from ..host.models.coherence import attach
from .compat import io, newer
from .compiled import teller


class LivePatchwork(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        patchwork = Patchwork()
        return io.Schema(
            node_id="LivePatchwork",
            display_name="Live Patchwork",
            category="live/models",
            description=(
                "A stream computes the UNet only where the picture moves, and goes on with what it "
                "kept of the rest (SIGE). For a camera that stands still, on a CPU. In streams "
                "only."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A UNet: SD1.5, SD2.1, SDXL, Live Demo Model."),
                io.Float.Input(
                    "threshold",
                    default=patchwork.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much a place has to change to be computed anew. Less: closer to "
                    "the full picture. More: faster, and less of the camera's noise is followed.",
                ),
                io.Int.Input(
                    "grow",
                    default=patchwork.grow,
                    min=0,
                    max=16,
                    tooltip="By how many positions of the latent what has changed is grown: what "
                    "moves has effects around it.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["sige", "cache", "speed", "faster", "motion mask"]),
        )

    @classmethod
    def execute(cls, model, threshold, grow) -> io.NodeOutput:
        tell = teller(cls.hidden.unique_id)
        patchwork = Patchwork(threshold, grow)
        return io.NodeOutput(attach(model, patchwork=patchwork, tell_patchwork=tell))
