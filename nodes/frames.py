"""Frames as nodes: into latents and back, and past the pipeline when nothing moves."""

from ..engine.similarity import MEASURES
from ..host.frames import vae as vaes
from ..host.frames.check import checked_image
from ..host.frames.skip import FrameSkip, pipeline_recipe
from ..host.registry import stream_key, streams
from .compat import io


class LiveEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveEncode",
            display_name="Live Encode",
            category="live/frames",
            description="VAE Encode for live graphs: the latents stay on the VAE's device.",
            inputs=[
                io.Image.Input("pixels", tooltip="Frames, oldest first."),
                io.Vae.Input("vae", tooltip="A small one (TAESD) is many times faster."),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, pixels, vae) -> io.NodeOutput:
        return io.NodeOutput({"samples": vaes.encode(vae, pixels)})


class LiveDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveDecode",
            display_name="Live Decode",
            category="live/frames",
            description="VAE Decode for live graphs: the frames stay on the VAE's device.",
            inputs=[
                io.Latent.Input("samples", tooltip="Latents, one per frame."),
                io.Vae.Input("vae", tooltip="A small one (TAESD) is many times faster."),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, samples, vae) -> io.NodeOutput:
        return io.NodeOutput(vaes.decode(vae, samples["samples"]))


class LiveSimilarityFilter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveSimilarityFilter",
            display_name="Live Similarity Filter",
            category="live/frames",
            description=(
                "Stochastic similarity filter (StreamDiffusion): a frame like the last processed "
                "one skips encoder, model and decoder, and the last picture is shown again."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The frames as they come in."),
                io.Image.Input(
                    "processed",
                    lazy=True,
                    tooltip="The pipeline's output for these frames. Not run for a skipped frame.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.98,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="Frames less alike than this always run. Higher skips less.",
                ),
                io.Int.Input(
                    "max_skip",
                    default=10,
                    min=0,
                    max=1000,
                    tooltip="The most frames skipped in a row; then one runs in any case.",
                ),
                io.Int.Input(
                    "settle",
                    default=3,
                    min=0,
                    max=100,
                    tooltip="Frames that still run after the last change, so that the stream batch "
                    "shows it: slots - 1.",
                ),
                io.Combo.Input(
                    "measure",
                    options=list(MEASURES),
                    default="centred",
                    tooltip="centred: blind to brightness and sensor noise, sees small motion. "
                    "cosine: the paper's, which depends on brightness.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the filter's chance decisions.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Boolean.Output(display_name="skipped"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
            not_idempotent=True,
        )

    @classmethod
    def check_lazy_status(
        cls, image, threshold, max_skip, settle, measure, seed, processed=None
    ) -> list[str]:
        skip = cls._decide(image, threshold, max_skip, measure, seed)
        return [] if skip else ["processed"]

    @classmethod
    def execute(
        cls, image, threshold, max_skip, settle, measure, seed, processed=None
    ) -> io.NodeOutput:
        skipped = cls._decide(image, threshold, max_skip, measure, seed)
        if not skipped and processed is None:
            raise ValueError("processed: nothing came in. Connect the pipeline's output image.")
        return io.NodeOutput(cls._state(seed).carry_out(image, processed, settle), skipped)

    @classmethod
    def _decide(cls, image, threshold, max_skip, measure, seed) -> bool:
        checked_image("image", image)
        hidden = cls.hidden

        def recipe() -> dict:
            return pipeline_recipe(hidden.prompt, hidden.unique_id, "processed", "image")

        return cls._state(seed).decide(image, threshold, max_skip, measure, recipe)

    @classmethod
    def _state(cls, seed: int) -> FrameSkip:
        key = stream_key(cls.hidden, "LiveSimilarityFilter")
        state = streams.get(key, lambda: FrameSkip(seed))
        if state.seed != seed:
            state = FrameSkip(seed)
            streams.put(key, state)
        return state
