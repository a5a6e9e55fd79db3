"""A compiled VAE as a node."""

from ..compiled.choice import AUTO, Wish
from ..compiled.engine import Refused
from ..compiled.half import HALVES, missing, picked
from ..compiled.ov import api as openvino
from ..compiled.precision import DEFAULT
from ..host.frames.compiled_vae import as_it_is, compiled, without
from .compat import io, newer
from .compiled import device_input, engine_ui, kept_folder, precision_input, refusal, teller


class LiveCompileVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveCompileVAE",
            display_name="Live Compile VAE",
            category="live/models",
            description=(
                "Runs a tiny VAE (TAESD) on a faster engine. It stays a VAE for every node; other "
                "VAEs run as they are, and the node says so."
            ),
            inputs=[
                io.Vae.Input("vae", tooltip="A tiny one (TAESD)."),
                io.Combo.Input(
                    "engine",
                    options=[AUTO, *HALVES, "eager"],
                    default=AUTO,
                    tooltip="auto: the best that works here. cudagraph: NVIDIA, ready in a "
                    "second. openvino: a CPU, Intel GPUs and NPUs. eager: as it is.",
                ),
                precision_input(),
                device_input(),
            ],
            outputs=[io.Vae.Output(display_name="vae")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["taesd", "openvino", "speed"]),
        )

    @classmethod
    def execute(cls, vae, engine, precision=DEFAULT, device=openvino.AUTO) -> io.NodeOutput:
        wish = Wish(precision, device, kept_folder())
        if vae is None:
            raise ValueError("vae: nothing came in. Wire a loader that gives a VAE.")
        chosen = "chosen"
        if engine == AUTO:
            engine, chosen = picked(vae.device, wish)
        reason = missing(engine, vae.device, wish)
        if reason is not None:
            raise ValueError(refusal(engine, Refused(reason)))
        tell = teller(cls.hidden.unique_id)
        why = as_it_is(vae)
        if engine == "eager" or why is not None:
            tell(why or f"eager: {chosen}")
            told = {"engine": "eager", "why": why or chosen}
            return io.NodeOutput(without(vae), ui=engine_ui(told))
        tell(f"{engine}: {chosen}")
        out = compiled(vae, lambda: HALVES[engine](wish), tell)
        return io.NodeOutput(out, ui=engine_ui({"engine": engine, "why": chosen}))
