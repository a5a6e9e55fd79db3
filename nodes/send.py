"""The node whose pictures go to other programs."""

from ..live.frames import current
from ..live.sinks import KINDS, USUAL
from .compat import io, newer


class LiveSend(io.ComfyNode):
    LIVE_VIEW = LIVE_SENDS = True
    LIVE_CHECKS = True  # while live a setting that cannot be leaves the one before

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveSend",
            display_name="Live Send",
            category="live/frames",
            description=(
                "Sends the frames of a live graph to other programs: as a virtual camera, over "
                "NDI, Spout or Syphon, or as a stream. It never holds the run up."
            ),
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The frames to send; a fourth channel is sent where it can be.",
                ),
                io.Combo.Input(
                    "to",
                    options=list(KINDS),
                    default=USUAL["to"],
                    tooltip="virtual camera: other programs see a webcam. ndi: everybody in the "
                    "local network. spout (Windows), syphon (macOS): other programs on the "
                    "server's GPU. stream: RTMP, SRT or RTSP, H.264. whip: WebRTC.",
                ),
                io.String.Input(
                    "name",
                    default=USUAL["name"],
                    tooltip="Of the sender, as others see it, or of the virtual camera. Empty: the "
                    "usual one.",
                ),
                io.String.Input(
                    "address",
                    default=USUAL["address"],
                    tooltip="Used by stream (rtmp://, rtmps://, srt://, rtsp://) and whip "
                    "(https://). It is opened only if it was allowed at the server.",
                ),
                io.Int.Input(
                    "fps", default=USUAL["fps"], min=1, max=240,
                    tooltip="The most frames per second that are sent.",
                ),
                io.Float.Input(
                    "bit_rate", default=USUAL["bit_rate"], min=0.1, max=100.0, step=0.1,
                    tooltip="Mbit per second, of stream and whip.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["ndi", "spout", "syphon", "virtual camera", "rtmp", "obs"]),
        )  # fmt: skip

    @classmethod
    def execute(cls, image, to, name, address, fps, bit_rate) -> io.NodeOutput:
        frames = current.get()
        if frames is not None:
            settings = {
                "to": to, "name": name, "address": address, "fps": fps, "bit_rate": bit_rate
            }  # fmt: skip
            frames.send(str(cls.hidden.unique_id), image, settings)
        # in an ordinary prompt there is nobody to send to: the picture is over at once
        return io.NodeOutput()
