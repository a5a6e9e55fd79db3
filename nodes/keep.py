"""What a frame keeps for the frame after it: feedback, trails, echo, difference."""

from dataclasses import dataclass

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..host.frames.keep import Kept, checked_name
from ..host.registry import stream_key, streams
from ..live.faults import Refused
from ..live.frames import current
from .compat import io, newer

_NAME = "feedback"  # of both nodes, so that they belong together as they are put in


@dataclass(frozen=True)
class Prompt:
    """A queued prompt as a host.frames.keep.Turn."""

    id: str

    @property
    def well(self) -> bool:
        queue = getattr(PromptServer.instance, "prompt_queue", None)
        entry = queue.get_history(prompt_id=self.id) if queue is not None else {}
        status = (entry.get(self.id) or {}).get("status")
        # of one that is forgotten by now nothing bad is known
        return status is None or bool(status["completed"])


def _kept(hidden) -> tuple[Kept, object]:
    """What the owner of a node keeps, and the turn that runs."""
    key = stream_key(hidden, "LiveKeep")._replace(execution="")
    frames = current.get()
    turn = frames.turn if frames is not None else Prompt(get_executing_context().prompt_id)
    return streams.get(key, Kept), turn


def _type(node: str):
    return io.MatchType.Template(node, [io.Image, io.Latent])


class LiveKeep(io.ComfyNode):
    LIVE_KEEPS = True

    @classmethod
    def define_schema(cls):
        kind = _type("kept")
        return io.Schema(
            node_id="LiveKeep",
            display_name="Live Keep",
            category="live/frames",
            description=(
                "Keeps a picture or a latent under a name. Live Last gives it one frame later: "
                "feedback, trails, echo, difference."
            ),
            inputs=[
                io.MatchType.Input("value", template=kind, tooltip="An IMAGE or a LATENT."),
                io.String.Input(
                    "name",
                    default=_NAME,
                    tooltip="The same as on the Live Last that gives it. One Live Keep per name.",
                ),
            ],
            outputs=[
                io.MatchType.Output(
                    template=kind, display_name="value", tooltip="What came in, to be wired on."
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
            not_idempotent=True,
            **newer(search_aliases=["feedback", "trails", "echo", "previous frame", "loop"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return float("nan")

    @classmethod
    def execute(cls, value, name) -> io.NodeOutput:
        kept, turn = _kept(cls.hidden)
        try:
            kept.keep(turn, str(cls.hidden.unique_id), checked_name(name), value)
        except ValueError as reason:
            raise Refused(str(reason)) from None
        return io.NodeOutput(value)


class LiveLast(io.ComfyNode):
    LIVE_LASTS = True

    @classmethod
    def define_schema(cls):
        kind = _type("last")
        return io.Schema(
            node_id="LiveLast",
            display_name="Live Last",
            category="live/frames",
            description=(
                "Gives what Live Keep kept under a name one frame before; in ordinary runs, one "
                "run before."
            ),
            inputs=[
                io.String.Input("name", default=_NAME, tooltip="The same as on the Live Keep."),
                io.MatchType.Input(
                    "first",
                    template=kind,
                    tooltip="Given while nothing is kept yet, and once more when its size changes. "
                    "An IMAGE or a LATENT, as what is kept.",
                ),
            ],
            outputs=[io.MatchType.Output(template=kind, display_name="value")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            not_idempotent=True,
            **newer(search_aliases=["feedback", "trails", "echo", "previous frame", "delay"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return float("nan")

    @classmethod
    def execute(cls, name, first) -> io.NodeOutput:
        kept, turn = _kept(cls.hidden)
        try:
            return io.NodeOutput(
                kept.last(turn, str(cls.hidden.unique_id), checked_name(name), first)
            )
        except ValueError as reason:
            raise Refused(str(reason)) from None
