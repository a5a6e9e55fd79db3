"""Models as nodes."""

from .compat import io


class LiveDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveDemoModel",
            display_name="Live Demo Model",
            category="live/models",
            description=(
                "The tiny model that comes with the pack: turns a picture into one of a dozen "
                "looks, best at 256 x 256, on a CPU. Other prompts need a real model."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..demo import loader

        return io.NodeOutput(*loader.load())
