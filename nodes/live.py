"""The ends of a live graph, camera and view, and the node that runs it."""

import pathlib

import folder_paths
from comfy_api.latest import ui
from server import PromptServer

from ..host.registry import stream_key, streams
from ..live.codecs import JPEG
from ..live.frames import current
from ..live.media.folder import NONE, inside, listed
from ..live.media.reader import Reader
from ..live.pictures import (
    FITS,
    LEAST_SIDE,
    MOST_RATE,
    MOST_SIDE,
    checked_shape,
    fitted,
    showable,
    to_image,
)
from ..live.routes import add_routes
from ..live.run import run
from ..live.sessions import Sessions
from ..live.shared import BROWSER, FILE
from ..live.sinks.names import Wish
from ..live.sources import PHONE, PULLED, SCREEN, WHIP, Wanted, one
from ..live.still import stills
from .compat import io, newer

_sessions: Sessions | None = None


def connect() -> None:
    """Add the live run's routes to the running server, if there is one."""
    global _sessions
    server = getattr(PromptServer, "instance", None)
    if server is not None and _sessions is None:
        _sessions = add_routes(server)


def _films() -> list[str]:
    return [NONE, *listed(folder_paths.get_input_directory())]


class LiveCamera(io.ComfyNode):
    LIVE_SOURCE = LIVE_CHECKS = True  # while live a setting that cannot be leaves the one before

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveCamera",
            display_name="Live Camera",
            category="live/frames",
            description=(
                "Frames for a live graph: a webcam, a screen, a phone, a camera at the server, a "
                "stream, another program's pictures, or a video from ComfyUI's input folder. Press "
                "Live to run the graph on them."
            ),
            inputs=[
                io.Combo.Input(
                    "source",
                    options=[BROWSER, FILE, SCREEN, *PULLED, PHONE, WHIP],
                    default=BROWSER,
                    tooltip="browser: a camera of the computer that shows this page. file: a video "
                    "or animated picture that plays at its own pace. screen: a screen, window or "
                    "tab of this computer. device: a camera at the server. address: a stream "
                    "(RTSP, RTMP, SRT, MJPEG, HLS). ndi, spout, syphon: another program's "
                    "pictures. phone: a phone's camera, by a QR code. whip: a program that "
                    "publishes by WHIP, such as OBS.",
                ),
                io.Combo.Input(
                    "file",
                    options=_films(),
                    tooltip="Used by source file: a video or animated picture in the input folder.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=LEAST_SIDE,
                    max=MOST_SIDE,
                    step=8,
                    tooltip="Of the frames given.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=LEAST_SIDE,
                    max=MOST_SIDE,
                    step=8,
                    tooltip="Of the frames given.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="crop",
                    tooltip="crop: cut what is over. pad: add black. stretch: ignore the aspect.",
                ),
                io.Int.Input(
                    "fps",
                    default=30,
                    min=1,
                    max=MOST_RATE,
                    tooltip="The most frames per second. A slower graph always gets the latest; a "
                    "camera that cannot give so many gives what it can.",
                ),
                io.Boolean.Input(
                    "mirror", default=True, tooltip="Left becomes right, as in a mirror."
                ),
                io.Boolean.Input("loop", default=True, tooltip="A file starts again at its end."),
                io.String.Input(
                    "device",
                    default="",
                    optional=True,
                    tooltip="Used by source device: a camera at the server, by name.",
                ),
                io.String.Input(
                    "address",
                    default="",
                    optional=True,
                    tooltip="Used by source address: rtsp://, rtmp://, srt://, http:// or "
                    "https://. It is opened only if it was allowed at the server.",
                ),
                io.String.Input(
                    "sender",
                    default="",
                    optional=True,
                    tooltip="Used by source ndi, spout and syphon: the sender's name, or a part of "
                    "it, as the node lists them.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Int.Output(display_name="frame"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            not_idempotent=True,
            **newer(search_aliases=["webcam", "camera", "video input"]),
        )

    @classmethod
    def validate_inputs(cls, file) -> bool:
        # a shared workflow may name a file that is not here, which only source file needs: that is
        # looked at when it runs
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return float("nan")

    @classmethod
    def execute(
        cls, source, file, width, height, fit, fps, mirror, loop, device="", address="", sender=""
    ) -> io.NodeOutput:
        node = str(cls.hidden.unique_id)
        frames = current.get()
        if frames is not None:
            return io.NodeOutput(*frames.image(node, width, height, fit, mirror))
        shape = checked_shape(width, height, fit, mirror)
        if source == FILE:
            picture, number = cls._next(inside(file, folder_paths.get_input_directory()), loop)
        elif source in PULLED:
            named = {"device": device, "address": address, "sender": sender}
            wanted = Wanted(named[PULLED[source][1]], width, height, fps)
            picture, number = one(source, wanted), 0
        else:
            picture, number = cls._still(node), 0
        return io.NodeOutput(to_image(fitted(picture, shape)), number)

    @classmethod
    def _next(cls, path: pathlib.Path, loop: bool):
        key = stream_key(cls.hidden, "LiveCamera")
        reader = streams.get(key, lambda: Reader(path, loop))
        if reader.path != path:
            reader = Reader(path, loop)
            streams.put(key, reader)
        reader.loop = loop
        return reader.next(), reader.frame

    @classmethod
    def _still(cls, node: str):
        client = getattr(PromptServer.instance, "client_id", None) or ""
        data = stills.get((client, node))
        if data is None:
            raise ValueError(
                "source: no picture has come from the browser's camera. Allow the camera on the "
                "node, press Live, or choose source file. A phone, and what publishes by WHIP, "
                "send pictures only while Live runs."
            )
        return JPEG.decode(data)


class LiveView(io.ComfyNode):
    LIVE_VIEW = True

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveView",
            display_name="Live View",
            category="live/frames",
            description="Shows the frames of a live graph, here, in a window, or as a stream.",
            inputs=[
                io.Image.Input("image", tooltip="The frames to show."),
                io.Int.Input(
                    "quality", default=85, min=1, max=100, tooltip="JPEG quality of what is sent."
                ),
                io.Boolean.Input(
                    "record",
                    default=False,
                    tooltip="While live: write what is shown to a video in the output folder.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="live/recording",
                    tooltip="Of recordings and snapshots, in the output folder.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, quality, record, filename_prefix) -> io.NodeOutput:
        frames = current.get()
        if frames is None:
            showable(image)
            saved = ui.ImageSaveHelper.save_images(
                image[-1:], "livediffusion", io.FolderType.temp, cls, compress_level=1
            )
            return io.NodeOutput(ui={"live_images": [dict(one) for one in saved]})
        wish = Wish(record, filename_prefix, cls.hidden.prompt, cls.hidden.extra_pnginfo)
        frames.show(str(cls.hidden.unique_id), image, quality, wish)
        return io.NodeOutput()


class LiveRun(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveRun",
            display_name="Live Run",
            category="live",
            description="Runs the frames of a live graph. Live puts it in; not for graphs.",
            inputs=[io.String.Input("session", default="")],
            outputs=[],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            is_output_node=True,
            is_input_list=True,
            not_idempotent=True,
            # hidden from the node menu
            **(newer(is_dev_only=True) or newer(is_deprecated=True)),
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return float("nan")

    @classmethod
    async def execute(cls, session, **frozen) -> io.NodeOutput:
        found = _sessions.get(session[0]) if _sessions is not None and session else None
        if found is None or found.running or found.over:
            raise ValueError("session: this node runs inside Live only. Remove it from the graph.")
        values = [frozen[f"frozen_{i}"] for i in range(len(found.split.handover))]
        hidden = cls.hidden
        await run(found.frames, values, hidden.dynprompt, hidden.unique_id, PromptServer.instance)
        return io.NodeOutput(ui={"live": [found.stats()]})
