"""Frames that help each other, as nodes."""

from ..engine.coherence.bank import BANKS
from ..engine.coherence.carry import Carry
from ..engine.coherence.neighbours import LEVELS, Future, Memory
from ..host.models.coherence import attach
from .compat import io, newer
from .compiled import teller

OFF = "off"
CUSTOM = "custom"
PRESETS = {
    # by StreamV2V's own figures attention does nearly all that features do: a warp error of 85.2
    # becomes 74.0, with fusion 73.4
    "calm": (Memory(fuse=0.0), Carry()),
    "calmer": (
        Memory(frames=2, bank="queue", fuse=0.8, threshold=0.9, levels="all"),
        Carry(early=0.9, moving=0.5, still=0.8),
    ),
}
_FIRST = "calm"
_OF_CUSTOM = "Of the preset custom. "


class LiveFutureAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveFutureAttention",
            display_name="Live Future Attention",
            category="live/models",
            description=(
                "Frames in flight look at each other, so that they agree: in self-attention, keys "
                "and values of all steps of the stream batch are put together (StreamDiffusion). "
                "Works from two steps on."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A UNet: SD1.5, SD2.1, SDXL, Live Demo Model."),
                io.Combo.Input(
                    "levels",
                    options=[*LEVELS, OFF],
                    default=LEVELS[0],
                    tooltip="Where they look. The finest level costs most and adds least. deepest: "
                    "the middle and the level around it. off: the model as it is.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            **newer(search_aliases=["temporal", "consistency", "flicker", "future frame"]),
        )

    @classmethod
    def execute(cls, model, levels) -> io.NodeOutput:
        if levels == OFF:
            return io.NodeOutput(model)
        return io.NodeOutput(attach(model, future=Future(levels)))


class LiveMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        # who goes on from it to custom has what they had, but for what they change
        memory, carry = PRESETS[_FIRST]
        return io.Schema(
            node_id="LiveMemory",
            display_name="Live Memory",
            category="live/models",
            description=(
                "A stream remembers frames of before: new ones look at their features and take on "
                "what is alike (StreamV2V), and what was predicted is carried along the motion, "
                "so that the picture stays calm."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A UNet: SD1.5, SD2.1, SDXL, Live Demo Model."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, OFF, CUSTOM],
                    default=_FIRST,
                    tooltip="calm: costs little. calmer: holds on to more. off: the model as it "
                    "is. custom: what the inputs below say, which the others ignore.",
                ),
                io.Int.Input(
                    "frames",
                    default=memory.frames,
                    min=1,
                    max=16,
                    tooltip=_OF_CUSTOM + "Keyframes that a queue holds.",
                ),
                io.Int.Input(
                    "interval",
                    default=memory.interval,
                    min=1,
                    max=256,
                    tooltip=_OF_CUSTOM + "Every how many frames one is remembered.",
                ),
                io.Combo.Input(
                    "bank",
                    options=list(BANKS),
                    default=memory.bank,
                    tooltip=_OF_CUSTOM + "merged: one frame, into which new ones are merged. "
                    "queue: the newest keyframes as they were.",
                ),
                io.Float.Input(
                    "fuse",
                    default=memory.fuse,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=_OF_CUSTOM + "How much of a remembered feature is taken on where it is "
                    "alike. 0: frames only look at what is remembered.",
                ),
                io.Float.Input(
                    "threshold",
                    default=memory.threshold,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=_OF_CUSTOM + "How alike: the cosine above which it is. Lower is calmer "
                    "and softer.",
                ),
                io.Combo.Input(
                    "levels",
                    options=list(LEVELS),
                    default=memory.levels,
                    tooltip=_OF_CUSTOM + "Where frames look at what is remembered. The finest "
                    "level costs most.",
                ),
                io.Float.Input(
                    "carry",
                    default=carry.early,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=_OF_CUSTOM + "How much of the prediction of the frame before is taken, "
                    "moved to where it is now. Does most for calm. 0: nothing.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["temporal", "consistency", "flicker", "feature bank"]),
        )

    @classmethod
    def execute(
        cls, model, preset, frames, interval, bank, fuse, threshold, levels, carry
    ) -> io.NodeOutput:
        tell = teller(cls.hidden.unique_id)
        if preset == OFF:
            tell("off: the model as it is")
            return io.NodeOutput(model)
        if preset == CUSTOM:
            memory = Memory(frames, interval, bank, fuse, threshold, levels)
            parts = memory, Carry.of(carry)
        else:
            parts = PRESETS[preset]
        return io.NodeOutput(attach(model, tell, memory=parts[0], carry=parts[1]))
