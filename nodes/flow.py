"""Noise that moves with the scene, as a node."""

from ..engine.moving import Pictures
from ..host.frames.check import checked_image
from ..host.sampling.noises import FlowNoise
from .compat import io, newer


class LiveFlowNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveFlowNoise",
            display_name="Live Flow Noise",
            category="live/sampling",
            description=(
                "Noise that moves with the scene and stays white, so that textures stick to what "
                "is seen and not to the screen. For Live Stream Sampler."
            ),
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The pictures that are encoded for the sampler, one per latent.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the first picture's noise. Another one begins anew.",
                ),
                io.Image.Input(
                    "flow",
                    optional=True,
                    tooltip="Where each pixel was in the picture before, less where it is: red "
                    "across, green down, as numbers of this image's pixels. Unwired: found by "
                    "comparing the pictures.",
                ),
            ],
            outputs=[io.Noise.Output(display_name="noise")],
            **newer(search_aliases=["optical flow", "noise warping", "temporal coherence"]),
        )

    @classmethod
    def execute(cls, image, noise_seed, flow=None) -> io.NodeOutput:
        checked_image("image", image)
        if flow is not None:
            checked_image("flow", flow, numbers="pixels as floating numbers")
        if flow is not None and len(flow) != len(image):
            raise ValueError(
                f"flow: {len(flow)} flow images for {len(image)} pictures. Wire one for each."
            )
        if flow is not None and flow.shape[-1] < 2:
            raise ValueError(
                "flow: an image of one channel holds no flow. Red is across, green is down."
            )
        return io.NodeOutput(FlowNoise(noise_seed, Pictures(image, flow)))
