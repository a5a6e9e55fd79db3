"""The stream batch and residual guidance as nodes."""

import comfy.sample
import comfy.samplers
import comfy.utils

from ..engine.guidance import MODES, Guidance
from ..engine.step_rules import STEP_RULES
from ..host.registry import stream_key, streams
from ..host.sampling.check import checked_latent, checked_sigmas
from ..host.sampling.guider import RCFGGuider
from ..host.sampling.noises import brought, seed_of
from ..host.sampling.pfdiff import sample_pfdiff
from ..host.sampling.sampler import StreamSampler
from ..host.sampling.stream import Settings, Stream
from .compat import io, newer

_STEP_RULE_TIP = (
    "How a frame goes from one noise level to the next. lcm: for LCM, Turbo and Lightning models. "
    "euler, dpmpp_2m, unipc and deis: ordinary solvers, for any model. pfdiff: euler whose steps "
    "share calls; pfdiff-1_1 from 5 slots on, for EDM models from 8, with fewer an ordinary solver."
)
_FRAMES_PER_SLOT_TIP = (
    "Frames that share a slot of the stream batch. More of them use a big GPU better, and each "
    "waits for the others."
)


class LiveStreamSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveStreamSampler",
            display_name="Live Stream Sampler",
            category="live/sampling",
            description=(
                "Stateful stream batch (StreamDiffusion): frames at different denoising steps "
                "share one model call. Keeps its frames in flight from one run to the next."
            ),
            inputs=[
                io.Guider.Input(
                    "guider", tooltip="Any guider. Live RCFG Guider adds cheap guidance."
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="n + 1 descending noise levels; n is the number of slots. "
                    "From Live Timesteps, Live Strength or any scheduler.",
                ),
                io.Latent.Input("latent", tooltip="Source latents, one per frame, oldest first."),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Each slot has fixed noise, the same on every machine: this keeps a "
                    "stream calm. With noise wired, its seed counts instead.",
                ),
                io.Combo.Input(
                    "step_rule", options=list(STEP_RULES), default="lcm", tooltip=_STEP_RULE_TIP
                ),
                io.Int.Input(
                    "frames_per_slot", default=1, min=1, max=64, tooltip=_FRAMES_PER_SLOT_TIP
                ),
                io.Combo.Input(
                    "mode",
                    options=["live", "clip"],
                    default="live",
                    tooltip="live: frames come out n-1 runs late and state is kept between runs. "
                    "clip: starts empty, finishes every frame, output aligned with input.",
                ),
                io.Combo.Input(
                    "conditioning",
                    options=["per frame", "immediate"],
                    default="per frame",
                    tooltip="On a prompt change: per frame lets a frame finish with the prompt it "
                    "entered with, immediate switches all frames in flight.",
                ),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    tooltip="Off: source latents enter as they are, with no noise added.",
                ),
                io.Noise.Input(
                    "noise",
                    optional=True,
                    tooltip="Live Flow Noise moves the noise with the scene. Any other noise is "
                    "what frames enter with. Unwired: the slots' fixed noise.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            not_idempotent=True,
            **newer(search_aliases=["stream diffusion", "stream batch", "realtime"]),
        )

    @classmethod
    def execute(
        cls, guider, sigmas, latent, noise_seed, step_rule, frames_per_slot, mode, conditioning,
        add_noise, noise=None,
    ) -> io.NodeOutput:  # fmt: skip
        clip = mode == "clip"
        seed = noise_seed if noise is None else seed_of(noise)
        settings = Settings(
            checked_sigmas(sigmas), step_rule, seed, clip, conditioning == "immediate", add_noise
        )
        samples = checked_latent(guider.model_patcher, latent, finite=clip)
        wired = None if noise is None else brought(noise, {**latent, "samples": samples})
        if clip:
            stream = Stream(frames_per_slot)
        else:
            key = stream_key(cls.hidden, "LiveStreamSampler")
            stream = streams.get(key, lambda: Stream(frames_per_slot))
            if stream.ring.frames_per_slot != frames_per_slot:
                stream = Stream(frames_per_slot)
                streams.put(key, stream)
        bar = comfy.utils.ProgressBar(1) if clip else None

        def progress(done, total, estimate):
            bar.update_absolute(done, total)

        out = stream.run(
            guider, samples, settings, latent.get("noise_mask"), progress if clip else None, wired
        )
        result = {**latent, "samples": out}
        for name in ("downscale_ratio_spacial", "downscale_ratio_temporal"):
            result.pop(name, None)
        # a message per frame would flood the browser, so only a clip reports
        return io.NodeOutput(result, ui={"live": [stream.stats()]} if clip else None)


class LiveStreamBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveStreamBatch",
            display_name="Live Stream Batch",
            category="live/sampling",
            description=(
                "The stream batch as a sampler for SamplerCustomAdvanced: the latent batch is a "
                "clip, frames at different steps share one model call."
            ),
            inputs=[
                io.Combo.Input(
                    "step_rule", options=list(STEP_RULES), default="lcm", tooltip=_STEP_RULE_TIP
                ),
                io.Int.Input(
                    "frames_per_slot", default=1, min=1, max=64, tooltip=_FRAMES_PER_SLOT_TIP
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, step_rule, frames_per_slot) -> io.NodeOutput:
        return io.NodeOutput(StreamSampler(step_rule, frames_per_slot))


class LivePFDiff(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LivePFDiff",
            display_name="Live PFDiff",
            category="live/sampling",
            description=(
                "PFDiff (Wang et al. 2025) as a sampler: steps of the schedule share model calls, "
                "through a springboard into the future."
            ),
            inputs=[
                io.Combo.Input(
                    "base", options=["euler"], default="euler", tooltip="The solver of each step."
                ),
                io.Int.Input(
                    "k",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="Steps skipped per call: n steps take 1 + (n - 1) / (k + 1) calls. "
                    "1 from 5 calls on (EDM models: from 8), 2 for 3 calls and never for EDM; "
                    "with fewer calls take an ordinary solver.",
                ),
                io.Int.Input(
                    "h",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="Steps to the springboard, at most k.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, base, k, h) -> io.NodeOutput:
        if h > k:
            raise ValueError(f"h: {h} is more than k, which is {k}. Lower h or raise k.")
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_pfdiff, {"k": k, "h": h}))


class LiveRCFGGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveRCFGGuider",
            display_name="Live RCFG Guider",
            category="live/sampling",
            description=(
                "Residual classifier-free guidance (StreamDiffusion): guidance with no extra model "
                "rows, or one per frame. Works in the stream and in ordinary samplers."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model, with LoRA and patches as you like."),
                io.Conditioning.Input("positive", tooltip="What the picture shall become."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What it shall not. Needed by onetime-negative and full.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.4,
                    min=0.0,
                    max=30.0,
                    step=0.05,
                    tooltip="Guidance scale. 1 leaves the prediction as it is; residual guidance "
                    "likes 1.1 to 2.",
                ),
                io.Float.Input(
                    "delta",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Magnitude of the virtual residual noise: less is gentler. Used by "
                    "self-negative and onetime-negative.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="self-negative",
                    tooltip="self-negative: pushes away from the source frame, for free. "
                    "onetime-negative: away from the negative prompt, asked once per frame. "
                    "full: asked at every step, twice the work. off: no guidance.",
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider")],
        )

    @classmethod
    def execute(cls, model, positive, cfg, delta, mode, negative=None) -> io.NodeOutput:
        if negative is None and mode in ("onetime-negative", "full"):
            raise ValueError(
                f"negative: mode {mode} needs a negative conditioning. Connect one, or choose "
                "self-negative or off."
            )
        guider = RCFGGuider(model, Guidance(mode, cfg, delta))
        conds = {"positive": positive}
        if mode in ("onetime-negative", "full"):
            conds["negative"] = negative
        guider.inner_set_conds(conds)
        return io.NodeOutput(guider)
