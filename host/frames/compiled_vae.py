"""A VAE of ComfyUI whose network runs on an engine; for everybody else it is a VAE as before."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import comfy.utils
import torch
from comfy.pixel_space_convert import PixelspaceConversionVAE
from comfy.taesd.taesd import TAESD
from torch import Tensor

from ...compiled.copies import cloned, copied
from ...compiled.engine import Refused
from ...compiled.half import Half
from ...compiled.precision import relative
from ...compiled.weights import addresses
from ..models.compiler import uncompiled

_KEPT = 4  # engines of other sizes that are kept


def as_it_is(vae) -> str | None:
    """Why an engine is of no use to a VAE; None where it is."""
    stage = vae.first_stage_model
    if isinstance(stage, CompiledStage):
        stage = stage.inner
    if isinstance(stage, PixelspaceConversionVAE):
        return "this VAE only rearranges pixels, so there is nothing to run faster"
    if type(stage) is not TAESD:
        return f"{type(stage).__name__} runs as it is; only TAESD is compiled"
    return None


def compiled(vae, make: Callable[[], Half], tell: Callable[[str], None]):
    """A copy of a TAESD whose halves run on engines.

    Args:
        make: a half's engine, not prepared yet.
        tell: called with a line for people whenever there is something new to say.
    """
    clone = without(vae)
    before = clone.first_stage_model, clone.patcher
    if getattr(clone.patcher, "is_dynamic", lambda: False)():
        clone.patcher = _fixed(clone)
        clone.first_stage_model = clone.patcher.model
    clone.first_stage_model = CompiledStage(clone.first_stage_model, make, tell, before)
    return clone


def without(vae):
    """A copy of a VAE without engines."""
    clone = copy.copy(vae)
    if isinstance(clone.first_stage_model, CompiledStage):
        clone.first_stage_model, clone.patcher = clone.first_stage_model.before
    return clone


def _fixed(vae):
    """A patcher of the same weights that stay where they are loaded, as host.models.engines.fixed.

    Paged ones (ComfyUI's dynamic VRAM) are somewhere else at each call. No loader of a TAESD can
    give it once more without pages, but it is small, so it is copied.
    """
    paged = vae.patcher
    with torch.inference_mode(False), torch.no_grad():
        network = copied(vae.first_stage_model)
        for key, kept in paged.backup.items():  # what ComfyUI has patched, as it was before
            comfy.utils.set_attr_param(network, key, cloned(kept.weight))
        network = network.to(paged.offload_device, vae.vae_dtype)
        for part in network.modules():
            vars(part).pop("comfy_cast_weights", None)
    clone = paged.clone(disable_dynamic=True, model_override=(network, ({}, {}, {}, set())))
    clone.parent = None  # which ComfyUI would take for the same network
    return clone


class CompiledStage:
    """What stands in the place of a VAE's network; everything but its two calls is the network's.

    Args:
        inner: the network.
        make, tell: see compiled.
        before: the VAE's own network and patcher.

    Attributes:
        ran, fell_back: calls by the engines, and by the network because they could not.
        errors: relative RMS of each half against the network on its first call, by its name.
        reason: of the newest fallback, or None.
    """

    def __init__(
        self, inner: torch.nn.Module, make: Callable[[], Half], tell: Callable[[str], None],
        before: tuple[torch.nn.Module, Any],
    ):  # fmt: skip
        self.inner, self.before = inner, before
        self.ran = self.fell_back = 0
        self.errors: dict[str, float] = {}
        self.reason: str | None = None
        self._make, self._tell = make, tell
        self._halves: OrderedDict[tuple, Half] = OrderedDict()
        self._broken: dict[tuple, str] = {}
        self._looked: set[tuple] = set()

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # copied without being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def encode(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Pixels in -1..1, [B, 3, H, W], to latents."""
        return self._run("encode", x, args, kwargs)

    def decode(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Latents, [B, C, h, w], to pixels in -1..1."""
        return self._run("decode", x, args, kwargs)

    def _run(self, side: str, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        network = getattr(self.inner, side)
        if args or kwargs:
            self._fall_back(f"{side} was called with options that the engine does not know")
            return network(x, *args, **kwargs)
        key = side, tuple(x.shape), x.dtype, x.device, addresses(self.inner)
        try:
            half = self._half(key, side, x)
            settled = half.settled
            out = half(x)
        except Exception as error:
            reason = (
                str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
            )
            self._gave_up(key, reason)
            self._fall_back(reason)
            return network(x)
        self.ran += 1
        if settled and key not in self._looked:
            self._look(key, side, half, relative(out, network(x)))
        return out

    def _half(self, key: tuple, side: str, x: Tensor) -> Half:
        if key in self._broken:
            raise Refused(self._broken[key])
        half = self._halves.get(key)
        if half is None:
            while len(self._halves) >= _KEPT:
                self._drop(next(iter(self._halves)))
            half = self._make()
            try:
                with uncompiled():
                    half.prepare(_Side(self.inner, side), x)
            except BaseException:
                half.release()
                raise
            self._halves[key] = half
        self._halves.move_to_end(key)
        return half

    def _drop(self, key: tuple) -> None:
        self._looked.discard(key)
        half = self._halves.pop(key, None)
        if half is not None:
            half.release()

    def _gave_up(self, key: tuple, reason: str) -> None:
        """What has failed is not tried again in the same shape."""
        self._drop(key)
        if len(self._broken) >= 64:
            self._broken.clear()
        self._broken[key] = reason

    def _look(self, key: tuple, side: str, half: Half, error: float) -> None:
        self._looked.add(key)
        self.errors[side] = error
        told = ", ".join(f"{name} {value:.1e}" for name, value in self.errors.items())
        what = "" if half.precision == "default" else f" in {half.precision}"
        self._tell(f"{half.name}{what}; relative error against the VAE itself: {told}")

    def _fall_back(self, reason: str) -> None:
        self.fell_back += 1
        if reason != self.reason:
            self.reason = reason
            logging.warning("LiveDiffusion: the VAE runs as it is: %s", reason)
            self._tell(f"the VAE runs as it is: {reason}")


class _Side(torch.nn.Module):
    """A VAE's network as one function, for an exporter."""

    def __init__(self, inner: torch.nn.Module, side: str):
        super().__init__()
        # an exporter cannot trace what inference mode made
        with torch.inference_mode(False), torch.no_grad():
            self.module = copied(inner).float().train(False)
        self._side = side

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self._side)(x)
