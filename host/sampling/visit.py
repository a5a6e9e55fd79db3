"""A guider while its sample() is under way: model loaded, conditioning processed."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...engine.coherence.neighbours import Neighbours
from ...engine.guidance import Guidance
from ..models.looks import COUNT
from .route import Route
from .rows import Batch, Joints, Sides

_PROBES = 64  # answers kept for one model
_probed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass
class Calls:
    """Model calls and rows, counted where ComfyUI enters the model (BaseModel.apply_model)."""

    calls: int = 0
    rows: int = 0

    def __call__(self, executor, x, *args, **kwargs):
        self.calls += 1
        self.rows += x.shape[0]
        return executor(x, *args, **kwargs)

    def into(self, options: dict[str, Any]) -> None:
        """See every entry into the model made with these model_options."""
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.APPLY_MODEL, COUNT, self, options,
            is_model_options=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Received:
    """What a sampler is called with besides latents, after all that may have changed it.

    Attributes:
        noise: [B, C, H, W].
        sigmas: [n + 1].
        callback: called with (step, x0, x, steps), or None.
    """

    noise: Tensor
    sigmas: Tensor
    callback: Callable[[int, Tensor, Tensor, int], None] | None


@dataclass
class Visit:
    """A guider whose model is loaded and whose conditioning is processed.

    Attributes:
        guider: has inner_model set for the duration.
        model: the loaded BaseModel.
        batch: the conditioning of the run's frames.
        options: model_options as a sampler receives them.
        seed: as a sampler receives it.
        route: how its ticks go.
        joints: of the stream.
        received: where its frame is sampled alone by a sampler inside the guider.
        neighbours: who is told which rows a call has, where nodes let frames help each other.
    """

    guider: Any
    model: Any
    batch: Batch
    options: dict[str, Any]
    seed: int | None
    route: Route
    joints: Joints = field(default_factory=Joints)
    received: Received | None = None
    neighbours: Neighbours | None = None

    @property
    def guidance(self) -> Guidance | None:
        """What a road without the guider applies itself."""
        return self.route.guidance


def of_latents(
    model, sides: Sides, noise: Tensor, latents: Tensor, mask: Tensor | None, seed: int | None
) -> bool:
    """Whether a model takes something of its conditioning from the latents or the seed.

    It is asked again with others, as comfy.samplers.process_conds asks it: what comes out the same
    belongs to every frame.

    Args:
        sides: processed conditioning.
        noise, latents, mask, seed: that it was processed with.
    """
    other = latents.flip(-1) * 0.7 + 0.1
    later = None if seed is None else seed + 1

    def probe() -> bool:
        again = _asked(model, sides, noise, other, mask, later)
        return any(not _alike(entry, twin) for entry, twin in again)

    return _known(model, ("latents", _named(sides), tuple(latents.shape), mask is None), probe)


def check_batch(
    model, sides: Sides, noise: Tensor, latents: Tensor, mask: Tensor | None, seed: int | None
) -> None:
    """A model may make one number of a whole batch (the tokens of all prompts, frames of a video).

    It is asked again for the first frame alone.

    Raises:
        ValueError: so it has.
    """

    def probe() -> str:
        one = {side: [_first_row(entry) for entry in entries] for side, entries in sides.items()}
        again = _asked(model, one, noise[:1], latents[:1], None if mask is None else mask[:1], seed)
        for (entry, twin), whole in zip(
            again, [entry for entries in sides.values() for entry in entries], strict=True
        ):
            for name, cond in twin["model_conds"].items():
                mine = whole["model_conds"].get(name)
                constant = type(mine) is comfy.conds.CONDConstant
                if constant and name in entry["model_conds"] and not _equal(mine.cond, cond.cond):
                    return name
        return ""

    name = _known(model, ("batch", _named(sides), tuple(latents.shape), mask is None), probe)
    if name:
        raise ValueError(
            f"guider: the model makes one thing of the conditioning of all frames ({name}), so "
            "frames cannot be told apart. Send one frame per run, or give all the same prompt."
        )


def _named(sides: Sides) -> tuple:
    return tuple((side, *[entry["uuid"] for entry in entries]) for side, entries in sides.items())


def _known(model, key: tuple, probe: Callable[[], Any]) -> Any:
    known = _probed.setdefault(model, {})
    if key not in known:
        with torch.random.fork_rng(devices=[]):
            known[key] = probe()
        while len(known) > _PROBES:
            del known[next(iter(known))]
    return known[key]


def _asked(model, sides: Sides, noise: Tensor, latents: Tensor, mask, seed) -> list[tuple]:
    """Each entry, and what a model makes of it with these (comfy.samplers.process_conds)."""
    out = []
    for side, entries in sides.items():
        again = comfy.samplers.encode_model_conds(
            model.extra_conds, entries[:], noise, noise.device, side, latent_image=latents,
            denoise_mask=mask, seed=seed, latent_shapes=[latents.shape],
        )  # fmt: skip
        out += zip(entries, again, strict=True)
    return out


def _first_row(entry: dict[str, Any]) -> dict[str, Any]:
    tokens = entry.get("cross_attn")
    rows = tokens.shape[0] if isinstance(tokens, Tensor) else 1
    if rows == 1:
        return entry
    own = {n: v for n, v in entry.items() if isinstance(v, Tensor) and v.ndim and len(v) == rows}
    return {**entry, **{name: value[:1] for name, value in own.items()}}


def _alike(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, theirs = entry["model_conds"], other["model_conds"]
    return mine.keys() == theirs.keys() and all(
        type(mine[name]) is type(theirs[name]) and _equal(mine[name].cond, theirs[name].cond)
        for name in mine
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or a == b
