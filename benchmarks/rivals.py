"""The sides of the comparison: [F, H, W, 3] uint8 pictures in, as many out, on the host.

Every side takes the fastest way that it documents: tensors instead of PIL pictures, the tiny
autoencoder, no progress bars, no previews. All use the same number of UNet calls' rows per frame.
Each side's docstring says what its time holds.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from networks import SCHEDULE, Kit, relative
from torch import Tensor

CFG, DELTA, SEED = 1.4, 0.8, 5
# places in LCM's grid of 50 timesteps, as StreamDiffusion names its steps
STEPS = {1: (32,), 2: (26, 40), 4: (18, 26, 35, 45), 8: (10, 15, 20, 25, 30, 35, 40, 45)}
# what compiled.layout may do to a recorded UNet, in the order of what it gives
LAYOUT = ("CHANNELS_LAST", "OWN_WEIGHTS", "CUDNN_ATTENTION")
MODES = {"off": "none", "self-negative": "self", "onetime-negative": "initialize", "full": "full"}
STRENGTH = 0.5  # of the sides that take a strength: n of 2n steps


def timesteps(n: int) -> list[int]:
    """LCM's: 50 of 1000, from 999 downwards."""
    return [999 - 20 * i for i in STEPS[n]]


def rows(mode: str, n: int, f: int = 1) -> int:
    """Rows of a tick's UNet call."""
    return {"onetime-negative": (n + 1) * f, "full": 2 * n * f}.get(mode, n * f)


def pictures(kit: Kit, f: int = 1) -> np.ndarray:
    """Some of the right size, [F, H, W, 3] uint8."""
    return np.random.default_rng(0).integers(0, 256, (f, kit.size, kit.size, 3), dtype=np.uint8)


def up(pictures: np.ndarray, kit: Kit) -> Tensor:
    """uint8 on the host to 0..1 on the device, [F, 3, H, W]."""
    return torch.from_numpy(pictures).to(kit.device).permute(0, 3, 1, 2).to(kit.dtype) / 255


def down(images: Tensor) -> np.ndarray:
    """0..1 on the device, [F, 3, H, W], to uint8 on the host."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class Public:
    """streamdiffusion 0.1.1's own class: upload, its call, its postprocess, download.

    Its call waits for the device after each frame, as published. On a CPU, where that call cannot
    run (it makes CUDA events), the methods it calls are called in its order.
    """

    title = "streamdiffusion 0.1.1"
    modes = tuple(MODES)

    def __init__(self, kit: Kit, n: int, mode: str = "off", f: int = 1):
        from streamdiffusion import StreamDiffusion
        from streamdiffusion.image_utils import postprocess_image

        self.name = self.title
        self.kit, self._postprocess = kit, postprocess_image
        self.stream = StreamDiffusion(
            _Pipe(kit), list(STEPS[n]), kit.dtype, kit.size, kit.size,
            frame_buffer_size=f, cfg_type=MODES[mode],
        )  # fmt: skip
        self.stream.prepare("", "", 50, guidance_scale=CFG, delta=DELTA, seed=SEED)
        if kit.channels != 4:  # which the class takes for granted
            self._widen(n, f)

    def _widen(self, n: int, f: int) -> None:
        stream, made = self.stream, torch.zeros(n * f, *self.kit.latent)
        made = made.to(self.kit.device, self.kit.dtype)
        stream.init_noise, stream.stock_noise = torch.randn_like(made), made
        stream.x_t_latent_buffer = made[f:].clone() if n > 1 else None

    @torch.inference_mode()
    def frames(self, pictures: np.ndarray) -> np.ndarray:
        x = up(pictures, self.kit)
        out = self.stream(x) if self.kit.device.type == "cuda" else self._call(x)
        return down(self._postprocess(out, output_type="pt"))

    def _call(self, x: Tensor) -> Tensor:
        stream = self.stream
        x = stream.image_processor.preprocess(x, stream.height, stream.width)
        x = stream.encode_image(x.to(device=stream.device, dtype=stream.dtype))
        return stream.decode_image(stream.predict_x0_batch(x)).detach().clone()

    @torch.inference_mode()
    def step(self, latents: Tensor) -> Tensor:
        """A noised latent to a clean one."""
        return self.stream.predict_x0_batch(latents)


class _Pipe:
    """What the public class needs of a diffusers pipeline."""

    text_encoder = None

    def __init__(self, kit: Kit):
        from diffusers import LCMScheduler

        self.kit, self.device, self.vae = kit, kit.device, kit.tiny_vae
        self.vae_scale_factor = kit.patch
        self.unet = kit.unet if kit.added is None else _WithAdded(kit)
        self.scheduler = LCMScheduler(**SCHEDULE)

    def encode_prompt(self, **unused):
        return self.kit.prompt, self.kit.negative


class _WithAdded:
    """SDXL's UNet for a class that knows no pooled prompt."""

    def __init__(self, kit: Kit):
        self.unet, self._one, self._many = kit.unet, kit.added, {}

    def __call__(self, x, t, **named):
        count = x.shape[0]
        if count not in self._many:
            self._many[count] = {name: v.repeat(count, 1) for name, v in self._one.items()}
        return self.unet(x, t, added_cond_kwargs=self._many[count], **named)


class AutoPipeline:
    """diffusers' AutoPipelineForImage2Image: upload, its call with prepared prompts, download."""

    title = "AutoPipelineForImage2Image"
    modes = ("off", "full")

    def __init__(self, kit: Kit, n: int, mode: str = "off", f: int = 1):
        import diffusers

        self.name = self.title
        diffusers.utils.logging.set_verbosity_error()  # about the safety checker that is not there
        self.kit = kit
        parts = {"vae": kit.tiny_vae, "text_encoder": None, "tokenizer": None, "unet": kit.unet,
                 "scheduler": diffusers.LCMScheduler(**SCHEDULE, steps_offset=1)}  # fmt: skip
        full = mode == "full"
        self._asked = {
            "prompt_embeds": kit.prompt.expand(f, -1, -1), "strength": STRENGTH,
            "num_inference_steps": round(n / STRENGTH), "guidance_scale": CFG if full else 1.0,
            "output_type": "pt",
        }  # fmt: skip
        if full:
            self._asked["negative_prompt_embeds"] = kit.negative.expand(f, -1, -1)
        if kit.added is None:
            parts |= {"safety_checker": None, "feature_extractor": None}
            pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        else:
            parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
            pipe = diffusers.StableDiffusionXLPipeline(**parts)
            self._asked["pooled_prompt_embeds"] = kit.pooled.expand(f, -1)
            if full:
                self._asked["negative_pooled_prompt_embeds"] = kit.pooled.expand(f, -1)
        self.pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def frames(self, pictures: np.ndarray) -> np.ndarray:
        return down(self.pipe(image=up(pictures, self.kit), **self._asked).images)


class ComfySampler:
    """ComfyUI without its queue: what VAEEncode, KSampler and VAEDecode call, without previews."""

    title = "ComfyUI's sampler"
    modes = ("off", "full")

    def __init__(self, kit: Kit, n: int, mode: str = "off", f: int = 1):
        self.name = self.title
        self.kit, self.n, self.cfg = kit, n, CFG if mode == "full" else 1.0
        self._positive, self._negative = map(kit.conditioning, (kit.prompt, kit.negative))

    @torch.inference_mode()
    def frames(self, pictures: np.ndarray) -> np.ndarray:
        import comfy.sample

        latent = self.kit.vae.encode(torch.from_numpy(pictures).float() / 255)
        out = comfy.sample.sample(
            self.kit.model, comfy.sample.prepare_noise(latent, SEED), self.n, self.cfg, "lcm",
            "simple", self._positive, self._negative, latent, denoise=STRENGTH, disable_pbar=True,
            seed=SEED,
        )  # fmt: skip
        return _shown(self.kit.vae.decode(out))


def _shown(image: Tensor) -> np.ndarray:
    """ComfyUI's IMAGE as it saves it."""
    return np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)


class ComfyQueue:
    """ComfyUI as a user has it: a prompt per frame, VAEEncode, KSampler, VAEDecode.

    The picture comes from memory and goes there; no PNG, no browser. ComfyUI's own executor, as its
    worker calls it, but in this thread: a second thread that computes would give torch a second
    pool of threads, and on two cores every side of the comparison would be slower by half. So the
    queue itself, a fraction of a millisecond, is left out.
    """

    title = "ComfyUI, a prompt per frame"
    modes = ("off", "full")

    def __init__(self, kit: Kit, n: int, mode: str = "off", f: int = 1):
        import comfy.utils
        import execution

        self.name = self.title
        self._open = contextlib.ExitStack()
        self._open.enter_context(mock.patch.object(comfy.utils, "PROGRESS_BAR_ENABLED", False))
        cache = {"ram": 0.0, "ram_inactive": 0.0, "lru": 0}
        self._executor = execution.PromptExecutor(_Silent(), cache_args=cache)
        classes = execution.nodes.NODE_CLASS_MAPPINGS
        self._in: Any = None
        self._out: Any = None
        self._count = itertools.count()
        parts = kit.model, kit.vae, *map(kit.conditioning, (kit.prompt, kit.negative))
        fed = itertools.count()
        types = "MODEL", "VAE", "CONDITIONING", "CONDITIONING"
        kinds = [f"Benchmark{kind}{id(self)}" for kind in ("Parts", "Picture", "Shown")]
        self._open.callback(lambda: [classes.pop(kind, None) for kind in kinds])
        _node(classes, kinds[0], types, lambda: parts)
        _node(classes, kinds[1], ("IMAGE",), lambda: (self._in,), lambda: next(fed))
        _node(classes, kinds[2], None, self._show)
        sample = {"model": ["parts", 0], "positive": ["parts", 2], "negative": ["parts", 3],
                  "latent_image": ["encode", 0], "seed": SEED, "steps": n, "denoise": STRENGTH,
                  "cfg": CFG if mode == "full" else 1.0, "sampler_name": "lcm",
                  "scheduler": "simple"}  # fmt: skip
        graph = {
            "parts": (kinds[0], {}),
            "picture": (kinds[1], {}),
            "encode": ("VAEEncode", {"pixels": ["picture", 0], "vae": ["parts", 1]}),
            "sample": ("KSampler", sample),
            "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["parts", 1]}),
            "shown": (kinds[2], {"image": ["decode", 0]}),
        }
        self._graph = {
            name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()
        }

    def _show(self, image: Tensor) -> dict:
        self._out = _shown(image)
        return {}

    def frames(self, pictures: np.ndarray) -> np.ndarray:
        self._in, self._out = torch.from_numpy(pictures).float() / 255, None
        prompt = {
            name: {**node, "inputs": {**node["inputs"]}} for name, node in self._graph.items()
        }
        extra = {"extra_pnginfo": {"workflow": {"id": "b"}}}
        self._executor.execute(prompt, f"frame-{next(self._count)}", extra, ["shown"])
        if self._out is None:
            raise RuntimeError(f"the prompt failed: {self._executor.status_messages[-1]}")
        return self._out

    def close(self) -> None:
        self._open.close()


class _Silent:
    """Where the prompts' messages go."""

    client_id = last_node_id = None
    sockets_metadata: dict = {}  # noqa: RUF012

    def send_sync(self, event, data, sid=None):
        pass


def _node(
    classes: dict, name: str, returns: tuple | None, function: Callable, changed=None
) -> None:
    """Make a node of a function; without returns it is where a graph ends."""
    takes = inspect.signature(function).parameters
    needed = {"required": {"image": ("IMAGE", {})}} if takes else {"required": {}}
    members: dict[str, Any] = {
        "INPUT_TYPES": classmethod(lambda cls: needed), "RETURN_TYPES": returns or (),
        "FUNCTION": "go", "CATEGORY": "benchmark", "OUTPUT_NODE": returns is None,
        "go": lambda self, **inputs: function(**inputs),
    }  # fmt: skip
    if changed is not None:
        members["IS_CHANGED"] = classmethod(lambda cls: changed())
    classes[name] = type(name, (), members)


class Ours:
    """The pack: picture to IMAGE, encode, stream, decode, picture, with its live nodes' functions.

    Args:
        engine: a name of compiled.choice's, and a precision behind it as in "openvino bfloat16";
            or "graph": the tick recorded as it is, nothing folded.
        recording: stands for CUDA graphs where there are none.
        ahead: a picture is fetched while the next frame is on its way, as in a live run.
        reuse: Live Reuse's settings; its pictures are others.

    Attributes:
        prepared: frames that went on with what was prepared for the frame before.
    """

    modes = tuple(MODES)

    def __init__(self, kit: Kit, n: int, mode: str = "off", f: int = 1, engine: str = "eager",
                 recording: Callable | None = None, ahead: bool = False,
                 reuse: Any = None):  # fmt: skip
        from livediffusion.engine.guidance import Guidance
        from livediffusion.host.models import coherence
        from livediffusion.host.models.engines import engine_of
        from livediffusion.host.sampling.guider import RCFGGuider
        from livediffusion.host.sampling.stream import Settings, Stream

        self.name = f"LiveDiffusion, {engine}"
        self.kit, self.stream = kit, Stream(f)
        self.ahead, self._flying, self.prepared = ahead, [], 0
        if recording is not None:
            self.stream.recorded._new = recording
        self.model = kit.model if engine == "eager" else _attached(kit, engine, recording)
        if reuse is not None:
            self.name += f", with reuse ({reuse.depth}, interval {reuse.interval})"
            self.model = coherence.attach(self.model, reuse=reuse)
        self.attached = engine_of(self.model)
        self.guider = RCFGGuider(self.model, Guidance(mode, CFG, DELTA))
        self.guider.set_conds(kit.conditioning(kit.prompt), kit.conditioning(kit.negative))
        table = kit.model.get_model_object("model_sampling").sigmas
        levels = (*(float(table[t]) for t in timesteps(n)), 0.0)
        self.settings = Settings(levels, "lcm", SEED)

    @torch.inference_mode()
    def frames(self, pictures: np.ndarray) -> np.ndarray:
        from livediffusion.host.frames import transfer
        from livediffusion.host.frames import vae as vaes
        from livediffusion.live.pictures import landed, on_its_way, to_image

        images = [to_image(picture) for picture in pictures]
        if len(images) == 1:
            transfer.send(images[0], pictures[0])
        image = images[0] if len(images) == 1 else torch.cat(images)
        out = vaes.decode(self.kit.vae, self.step(vaes.encode(self.kit.vae, image)))
        # all on their way before the first is waited for
        flying = [on_its_way(one[None]) for one in out]
        if self.ahead:
            flying, self._flying = self._flying, flying
        return np.stack([landed(frame) for frame in flying]) if flying else pictures * 0

    def step(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder gives them, to latents as it takes them."""
        before = self.stream._kept
        out = self.stream.run(self.guider, latents, self.settings)
        self.prepared += before is not None and self.stream._kept is before
        return out

    def flow(self, pictures: np.ndarray) -> np.ndarray:
        """As a live run does it: the picture is fetched while the next frame is on its way."""
        before, self.ahead = self.ahead, True
        try:
            return self.frames(pictures)
        finally:
            self.ahead = before

    @property
    def captures(self) -> int:
        """Ticks that were recorded."""
        return self.stream.recorded.captures

    @property
    def counts(self) -> dict[str, Callable[[], int]]:
        """Running counts, for blocks.in_blocks."""
        counts = {"prepared": lambda: self.prepared}
        if self.attached is not None:
            counts["by the engine"] = lambda: self.attached.ran
        return counts

    @property
    def fallback(self) -> str | None:
        """Why the engine did not run, if so."""
        return None if self.attached is None else self.attached.reason


def _attached(kit: Kit, engine: str, recording: Callable | None):
    from livediffusion.compiled import choice
    from livediffusion.compiled.cudagraph import CudaGraph
    from livediffusion.compiled.engine import Eager, Refused
    from livediffusion.host.models.engines import Attached, attach

    class Unchanged(Eager):
        """The UNet as it is, and the whole tick may be recorded."""

        name, capturable, placed = "graph", True, True

    def make():
        if engine == "graph":
            return Unchanged()
        if recording is not None:  # a rehearsal
            from replaying import inductor

            return CudaGraph(recording) if engine == "cudagraph" else inductor()
        return choice.make(engine, kit.device, wish)

    engine, _, precision = engine.partition(" ")
    wish = choice.Wish(precision or "default")
    reason = None if engine == "graph" else choice.missing(engine, kit.device, wish)
    if reason and recording is None:
        raise Refused(reason)
    return attach(kit.model, Attached(engine, "", make))


@contextlib.contextmanager
def kernels(on: bool, layout: Sequence[str] = LAYOUT):
    """Whether the pack may use its Triton kernels while this lasts, and what of its layout."""
    from livediffusion.compiled import layout as led
    from livediffusion.kernels import choice

    switched = {} if on else {"triton_missing": lambda: "switched off by the benchmark"}
    with contextlib.ExitStack() as inside:
        if switched:
            inside.enter_context(mock.patch.multiple(choice, **switched))
        for name in LAYOUT:
            inside.enter_context(mock.patch.object(led, name, name in layout))
        yield


def _prepared(kit: Kit, engine: str, named: dict[str, Tensor]):
    """(the engine made for a call of the UNet, that call)."""
    from livediffusion.compiled import choice
    from livediffusion.compiled.engine import Call, Shapes
    from livediffusion.host.models.unet import ComfyUNet

    name, _, precision = engine.partition(" ")
    made = choice.make(name, kit.device, choice.Wish(precision or "default"))
    asked = Call.of({**named, "timesteps": named["timesteps"].float()})
    made.prepare(ComfyUNet(kit.model.model.diffusion_model), Shapes.of(asked))
    return made, asked


class Floor:
    """The networks alone: encoder, one UNet call of the mode's rows, decoder.

    What no pipeline around them can go below; its pictures mean nothing.

    Args:
        engine: the UNet's, as for Ours.
    """

    title = "the networks alone"
    modes = tuple(MODES)

    def __init__(
        self, kit: Kit, n: int, mode: str = "off", f: int = 1, engine: str = "eager"
    ):  # fmt: skip
        self.name = self.title if engine == "eager" else f"{self.title}, {engine}"
        kit.load()
        self.kit, self.f = kit, f
        self.call = kit.call(rows(mode, n, f))
        self._unet = lambda: kit.model.model.diffusion_model(**self.call)
        if engine != "eager":
            made, asked = _prepared(kit, engine, self.call)
            self._unet = lambda: made(asked)

    @torch.inference_mode()
    def frames(self, pictures: np.ndarray) -> np.ndarray:
        kit, vae = self.kit, self.kit.vae.first_stage_model
        latents = vae.encode(up(pictures, kit) * 2 - 1)
        out = self._unet()
        # both are needed, so nothing is left out
        return down((vae.decode(latents + out[: self.f]) / 2 + 0.5).clamp(0, 1))


@torch.inference_mode()
def apart(kit: Kit, n: int, mode: str, seed: int = SEED) -> float:
    """Relative RMS of our latents against the public class's, whose noise is that of `seed`."""
    from livediffusion.engine.noise import SlotNoise

    public, ours, base = Public(kit, n, mode), Ours(kit, n, mode), kit.model.model
    noise, generator = SlotNoise(seed, kit.latent), torch.Generator().manual_seed(0)
    slots = torch.stack([noise.slot(k) for k in range(n)]).to(kit.device, kit.dtype)
    public.stream.init_noise, worst = slots, 0.0
    for i in range(3 * n):
        fed = torch.randn(1, *kit.latent, generator=generator).to(kit.device)
        clean = base.process_latent_in(fed).to(kit.dtype)
        theirs = public.step(public.stream.add_noise(clean, slots[0], 0))
        mine = base.process_latent_in(ours.step(fed))
        if i >= n:  # theirs begins with an empty buffer
            worst = max(worst, relative(mine, theirs))
    return worst
