"""The inside of the network now and then, as a node."""

from ..engine.blocks.schedule import DEPTHS, Reuse
from ..host.models.coherence import attach
from .compat import io, newer
from .compiled import teller


class LiveReuse(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        reuse = Reuse()
        return io.Schema(
            node_id="LiveReuse",
            display_name="Live Reuse",
            category="live/models",
            description=(
                "A stream computes the inside of the UNet only now and then: a frame goes on with "
                "what the frame before had there (DeepCache), and the rest is computed for each. "
                "Faster, a little less exact. In streams only."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A UNet: SD1.5, SD2.1, SDXL, Live Demo Model."),
                io.Int.Input(
                    "interval",
                    default=reuse.interval,
                    min=1,
                    max=16,
                    tooltip="Every how many frames a step computes all of the UNet. 1: always, the "
                    "model as it is.",
                ),
                io.Combo.Input(
                    "depth",
                    options=list(DEPTHS),
                    default=reuse.depth,
                    tooltip="What is computed for every frame. outermost block: the least, "
                    "fastest. finest level: the most, closest to the full picture.",
                ),
                io.Float.Input(
                    "awake",
                    default=reuse.awake,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How alike a frame has to be to the one whose features it takes; where "
                    "it is less, all is computed. A cut has all computed anew. 0: nobody looks.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["deepcache", "cache", "speed", "faster"]),
        )

    @classmethod
    def execute(cls, model, interval, depth, awake) -> io.NodeOutput:
        tell = teller(cls.hidden.unique_id)
        if interval == 1:
            tell("off: the model as it is")
            return io.NodeOutput(model)
        reuse = Reuse(interval, depth, awake)
        return io.NodeOutput(attach(model, reuse=reuse, tell_reuse=tell))
