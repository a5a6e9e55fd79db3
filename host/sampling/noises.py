"""The noise of a stream, and what a NOISE brings into it."""

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine.devices import lies_on
from ...engine.moving import Pictures, Scene, Scenes, follow
from ...engine.noise import FrameNoise, Noise, SlotNoise
from . import alone
from .settings import Settings

_LEAST_SEED, _MOST_SEED = -(2**63), 2**64 - 1  # what torch's generators take


class FlowNoise:
    """A NOISE that moves with the pictures it is given.

    It holds no state: a stream keeps the last picture that it took, and the noise it had.

    Args:
        seed: of the first picture's noise.
        pictures: one for each latent.
    """

    def __init__(self, seed: int, pictures: Pictures):
        self.seed = seed
        self.pictures = pictures

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """As ComfyUI asks a NOISE, for a clip that begins with the first picture: [B, C, H, W]."""
        samples = latent["samples"]
        fitting(self.pictures, samples)
        noise = SlotNoise(self.seed, tuple(samples.shape[1:]))
        scenes = follow(None, self.pictures, noise, 1)
        return torch.cat([scene.field.pixels for scene in scenes]).to(samples.dtype)


@dataclass(frozen=True)
class Brought:
    """What a NOISE brings: pictures that it moves with, or the noise that frames enter with."""

    pictures: Pictures | None = None
    entry: Tensor | None = None  # [B, C, H, W]


def seed_of(noise: Any) -> int:
    """The seed of a wired NOISE.

    Raises:
        ValueError: it is no NOISE, or its seed is none; the text begins with the input's name.
    """
    name = type(noise).__name__
    if not hasattr(noise, "seed") or not callable(getattr(noise, "generate_noise", None)):
        raise ValueError(f"noise: {name} is no NOISE. Wire Live Flow Noise or RandomNoise.")
    try:
        seed = operator.index(noise.seed)  # NumPy's and torch's whole numbers, too
    except TypeError:
        seed = None
    if seed is None or not _LEAST_SEED <= seed <= _MOST_SEED:
        raise ValueError(
            f"noise: the seed of {name} is {noise.seed!r:.40}, not a whole number of 64 bits. Wire "
            "Live Flow Noise or RandomNoise."
        )
    return seed


def brought(noise: Any, latent: dict[str, Any]) -> Brought:
    """What a wired NOISE brings for the latents of a run.

    Raises:
        ValueError: it does not fit them; the text begins with the input's name.
    """
    samples = latent["samples"]
    if isinstance(noise, FlowNoise):
        fitting(noise.pictures, samples)
        return Brought(noise.pictures)
    entry = noise.generate_noise(latent)
    if not isinstance(entry, Tensor) or entry.shape != samples.shape:
        raise ValueError(
            f"noise: {type(noise).__name__} gives no noise of the latents' size "
            f"{list(samples.shape)}. Wire Live Flow Noise or RandomNoise."
        )
    return Brought(entry=entry.float())


@dataclass(frozen=True)
class RunNoise:
    """What the frames of one run meet, beside the slots' fixed noise.

    Attributes:
        scenes: of each frame, where its noise moves.
        entry: what each enters with, [B, C, H, W], where another NOISE gives it.
        drawn: see Payload, of the first frame.
    """

    scenes: Scenes | None = None
    entry: Tensor | None = None
    drawn: int | None = None

    def of(self, at: slice, fixed: SlotNoise) -> Noise:
        """The noise of some frames; where they have none of their own, the fixed one."""
        own = [scene.field.pixels for scene in self.met(at)]
        return FrameNoise(own, fixed) if own else fixed

    def met(self, at: slice) -> list[Scene]:
        """The scenes of some frames, if there are any."""
        return [] if self.scenes is None else self.scenes.at(at)

    def entry_of_all(self, fixed: SlotNoise) -> Tensor:
        """What all frames enter with, [B or 1, C, H, W], where no NOISE gives it."""
        return fixed.slot(0) if self.scenes is None else self.scenes.entry()

    def only(self, index: int) -> "RunNoise":
        """That of one frame, which brings what it enters with itself."""
        drawn = None if self.entry is None else index
        own = self.met(slice(index, index + 1))
        return RunNoise(Scenes(lambda: iter(own), 1) if own else None, drawn=drawn)

    def entered(self, index: int, latents: Tensor, settings: Settings) -> Tensor:
        """What a frame that is sampled alone enters with, [1, C, H, W] as its latents."""
        if settings.add_noise and self.scenes is not None:
            (scene,) = self.met(slice(index, index + 1))
            return scene.field.pixels[:1].to(latents.device)
        if settings.add_noise and self.entry is not None:
            return self.entry[index : index + 1]
        return alone.noise_of(latents, settings.seed, settings.add_noise)


class Noises:
    """The noise of a stream: the slots' fixed one, and the scene that it moves with."""

    def __init__(self) -> None:
        self._fixed: SlotNoise | None = None
        self._scene: Scene | None = None  # of the newest frame that was taken in

    def fixed(self, seed: int, shape: tuple[int, ...], device: torch.device) -> SlotNoise:
        """The slots' noise; the same object as long as it means the same."""
        known, device = self._fixed, lies_on(device)  # as a model and its latents both mean it
        if known is None or (known.seed, known.shape, known.device) != (seed, shape, device):
            self._fixed = SlotNoise(seed, shape, device)
        return self._fixed

    def of_run(
        self, device: torch.device, latents: Tensor, settings: Settings, brought: Brought | None
    ) -> RunNoise:
        """What the frames of a run meet, after those that were taken in before."""
        if brought is None or brought.pictures is None:
            self._scene = None
            return RunNoise() if brought is None else RunNoise(None, brought.entry, 0)
        fixed = self.fixed(settings.seed, tuple(latents.shape[1:]), device)
        make = functools.partial(follow, self._scene, brought.pictures, fixed, settings.slots)
        return RunNoise(Scenes(make, len(brought.pictures.frames)))

    def taken(self, met: RunNoise, at: slice) -> None:
        """These frames are in the ring: the next one moves on from them."""
        scenes = met.met(at)
        if scenes:
            self._scene = scenes[-1]


def fitting(pictures: Pictures, samples: Tensor) -> None:
    """Refuse pictures that are not those of the latents.

    Raises:
        ValueError: the text begins with the input's name.
    """
    if samples.ndim != 4:
        raise ValueError(
            f"noise: Live Flow Noise moves noise over a picture, but these latents "
            f"{list(samples.shape)} are not [frames, channels, height, width]. Leave noise unwired."
        )
    if len(pictures.frames) != len(samples):
        raise ValueError(
            f"noise: Live Flow Noise has {len(pictures.frames)} pictures for {len(samples)} "
            "latents. Wire the same frames into it and into the encoder."
        )
