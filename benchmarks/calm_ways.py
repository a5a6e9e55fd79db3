"""What can make a stream calm, each by itself and together: a line adds one more.

A way is what is wired around the live template: nodes between loader and guider (`model`), what
goes into the sampler's `noise` (`noise`), and what is done to latents before the stream and to
pictures after it (`before`, `after`). What keeps something is made anew for each clip.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from calm_clips import SIDE, Clip, moved, places
from torch import Tensor

PATCH = 4  # pixels of a latent's position
SETTINGS = {"steps": 2, "strength": 0.5, "cfg": 1.2, "delta": 0.6}  # workflows/live_webcam.json
Frame = Callable[[int, Tensor], Any]  # frame number and [1, ...] to what takes its place


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        name: in the tables.
        model: MODEL to MODEL.
        noise: (kit, clip) to a function of (t, picture [1, H, W, 3]) that gives a NOISE.
        slots: (kit, clip) to a function of t that gives the slots' noise itself, [n, C, H, W]: what
            no node can do, as it knows the clip's motion.
        before: (kit, clip) to a function of (t, latent [1, C, H, W]) that gives a latent.
        after: (kit, clip) to a function of (t, picture [1, H, W, 3]) that gives a picture.
        clean: True feeds the clip without its camera's noise.
    """

    name: str
    model: Callable[[Any], Any] | None = None
    noise: Callable[["Kit", Clip], Frame] | None = None
    slots: Callable[["Kit", Clip], Callable[[int], Tensor]] | None = None
    before: Callable[["Kit", Clip], Frame] | None = None
    after: Callable[["Kit", Clip], Frame] | None = None
    clean: bool = False


class Kit:
    """The embedded model and the nodes of the live template around it."""

    def __init__(self, **settings: Any):
        from livediffusion.demo import loader

        self.model, self.clip, self.vae = loader.load()
        self.settings = SETTINGS | settings
        self._prompts: dict[str, Any] = {}

    def prompt(self, text: str):
        """CONDITIONING."""
        if text not in self._prompts:
            tokens = self.clip.tokenize(text)
            self._prompts[text] = self.clip.encode_from_tokens_scheduled(tokens)
        return self._prompts[text]

    def guider(self, model, look: str):
        """The template's guider. `look` is a key of demo/looks.py."""
        from livediffusion.demo.prompts import NAMES
        from livediffusion.nodes import sampling

        asked = self.settings
        return sampling.LiveRCFGGuider.execute(
            model, self.prompt(NAMES[look][0]), asked["cfg"], asked["delta"], "self-negative"
        ).args[0]

    def run(self, clip: Clip, way: Way, pictures: Tensor | None = None) -> Tensor:
        """A clip through a stream of its own, frame by frame, as in a live run.

        Args:
            pictures: instead of the clip's own, [T, 3, H, W] in 0..1.

        Returns:
            [T', 3, H, W] in 0..1, restyled frames 0 to T' - 1 of the clip; the last n - 1 of the
            clip are still in the stream.
        """
        if pictures is None:
            pictures = clip.clean if way.clean else clip.noisy
        run = Run(self, clip, way)
        out = [run.frame(picture.movedim(0, -1)[None]) for picture in pictures]
        return torch.cat([one for one in out if one is not None]).movedim(-1, 1)


class Run:
    """The live template under way.

    Attributes:
        stream: its stream.
    """

    def __init__(self, kit: Kit, clip: Clip, way: Way):
        from livediffusion.host.sampling.stream import Settings, Stream
        from livediffusion.nodes import schedules

        self.kit, self.stream, self._t = kit, Stream(), 0
        model = kit.model if way.model is None else way.model(kit.model)
        asked = kit.settings
        self._guider = kit.guider(model, clip.look)
        sigmas = schedules.LiveStrength.execute(
            model, asked["steps"], asked["strength"], "uniform t"
        ).args[0]
        self._settings = Settings(tuple(sigmas.tolist()), immediate=True)
        self._noise, self._slots, self._before, self._after = (
            None if make is None else make(kit, clip)
            for make in (way.noise, way.slots, way.before, way.after)
        )

    def frame(self, image: Tensor) -> Tensor | None:
        """The next picture, [1, H, W, 3], to the one that is shown; None while none has left."""
        from livediffusion.nodes import frames

        t, late = self._t, self.kit.settings["steps"] - 1
        self._t += 1
        latent = frames.LiveEncode.execute(image, self.kit.vae).args[0]["samples"]
        if self._before is not None:
            latent = self._before(t, latent)
        if self._slots is not None:
            known = Known(self._slots(t))
            self.stream._noises.of_run = lambda *_, known=known: known
        wired = {} if self._noise is None else {"brought": self._wired(t, image, latent)}
        latent = self.stream.run(self._guider, latent, self._settings, **wired)
        if t < late:
            return None
        shown = frames.LiveDecode.execute({"samples": latent}, self.kit.vae).args[0]
        return shown if self._after is None else self._after(t - late, shown)

    def _wired(self, t: int, image: Tensor, latent: Tensor):
        """What the sampler makes of its `noise`."""
        from livediffusion.host.sampling.noises import brought

        return brought(self._noise(t, image), {"samples": latent})


class Known:
    """Stands for host.sampling.noises.RunNoise, with noise that nobody had to find.

    Args:
        slots: of one frame, [n, C, H, W].
    """

    entry = None

    def __init__(self, slots: Tensor):
        self._slots = slots

    def of(self, at: slice, fixed: Any):
        """engine.noise.FrameNoise of the frame."""
        from livediffusion.engine.noise import FrameNoise

        return FrameNoise([self._slots], fixed)

    def met(self, at: slice) -> list:
        """It moves with no scene."""
        return []


def keep(share: float):
    """Live Keep / Live Last and a blend of latents: `share` of the last one goes into the next."""

    def make(kit: Kit, clip: Clip) -> Frame:
        last: list[Tensor] = []

        def blended(t: int, latent: Tensor) -> Tensor:
            mixed = torch.lerp(latent, last[0], share) if last else latent
            last[:] = [mixed]
            return mixed

        return blended

    return make


def with_the_scene(kit: Kit, clip: Clip, pixels: bool = False) -> Callable[[int], Tensor]:
    """The slots' noise as if it were painted on what is seen: the best that moving it can give.

    White noise lies on each layer's canvas, a value per pixel; a latent's position takes the sum of
    what its pixels see, over the root of its variance. With `pixels` every channel of the embedded
    model's latents, which are pixels, takes what its own pixel sees.
    """
    side = SIDE // PATCH
    generator = torch.Generator().manual_seed(0)
    channels, n = kit.model.model.latent_format.latent_channels, kit.settings["steps"]
    size = 2 * SIDE
    drawn = [torch.randn(n, channels, size * size, generator=generator) for _ in clip.plan.layers]

    def at(t: int) -> Tensor:
        whole = torch.zeros(n, channels, side * side)
        for layer, own, cover in zip(clip.plan.layers, drawn, clip.covers(t), strict=True):
            cell = (moved(layer.path(t), places(SIDE)) + size / 2).floor().long() % size
            index = cell[..., 1] * size + cell[..., 0]
            index = index.view(side, PATCH, side, PATCH).transpose(1, 2).reshape(-1, PATCH**2)
            if pixels:
                near = own[:, :3].flatten(0, 1)[:, index].view(n, 3, side * side, PATCH**2)
                seen = near.movedim(2, 3).reshape(n, channels, -1)
                mine = F.avg_pool2d(cover, PATCH).flatten() > 0.5
                whole = torch.where(mine, seen, whole)
                continue
            same = (index[:, :, None] == index[:, None]).sum((1, 2)).sqrt()
            seen = own[:, :, index].sum(-1) / same
            mine = F.avg_pool2d(cover, PATCH).flatten() > 0.5
            whole = torch.where(mine, seen, whole)
        return whole.view(n, channels, side, side)

    return at


def future(levels: str) -> Callable[[Any], Any]:
    """Live Future Attention."""
    from livediffusion.nodes import coherence

    return lambda model: coherence.LiveFutureAttention.execute(model, levels).args[0]


def preset(name: str) -> Callable[[Any], Any]:
    """Live Memory with one of its presets, and all else as it is put in."""
    from livediffusion.nodes.coherence import LiveMemory

    # outside of a graph it has no place to tell something
    node = type("LiveMemory", (LiveMemory,), {"hidden": types.SimpleNamespace(unique_id=None)})
    asked = {own.id: own.default for own in node.define_schema().inputs if hasattr(own, "default")}
    return lambda model: node.execute(model, **{**asked, "preset": name}).args[0]


def attached(**settings: Any) -> Callable[[Any], Any]:
    """Any settings of a host.models.coherence.Coherence."""
    from livediffusion.host.models.coherence import attach

    return lambda model: attach(model, **settings)


def flow_noise(kit: Kit, clip: Clip) -> Frame:
    """Live Flow Noise, by its own flow."""
    from livediffusion.nodes import flow

    return lambda t, image: flow.LiveFlowNoise.execute(image, 0).args[0]


OFF = Way("off")
BEST = "calm"


def ways() -> list[Way]:
    """What `run.py bench --only calm` compares, each by itself and then together."""
    from livediffusion.engine.coherence.carry import Carry
    from livediffusion.engine.coherence.neighbours import LEVELS, Memory

    calm, ahead = preset(BEST), future(LEVELS[0])
    return [
        OFF,
        Way("future attention", ahead),
        Way("what is remembered", attached(memory=Memory())),
        Way("what is carried", attached(carry=Carry())),
        Way("flow noise", noise=flow_noise),
        Way("latents kept, 0.5", before=keep(0.5)),
        Way(BEST, calm),
        Way("calmer", preset("calmer")),
        Way("all together", lambda model: ahead(calm(model)), flow_noise),
    ]


def known() -> list[Way]:
    """For taking apart what makes a stream restless."""
    return [
        OFF,
        Way("noise with the scene", slots=with_the_scene),
        Way("noise with the scene, as pixels",
            slots=functools.partial(with_the_scene, pixels=True)),
        Way("no camera noise", clean=True),
        Way("no camera noise, noise with the scene", slots=with_the_scene, clean=True),
    ]  # fmt: skip
