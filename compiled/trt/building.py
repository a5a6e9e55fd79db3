"""From a UNet to an engine file, with progress and cancel."""

import contextlib
import logging
import math
import pathlib
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import onnx_export
from ..engine import Call, Refused, UNet
from ..remembered import BANK, SEEN
from ..reused import FEATURES, WHOLE
from . import api, builder, files

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_SCALES = tuple(2**i for i in range(8))  # of a UNet's levels
_LEFT_BEHIND = 86400  # seconds after which what a killed build left is removed

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wish:
    """What an engine is to be.

    Attributes:
        library: that builds and runs it.
        call: an example of the calls it is for.
        precision: a name in PRECISIONS.
        model: fingerprint of the MODEL.
        targets: compute capabilities to build for; none: for the GPU here, as TensorRT does.
        dynamic_size: also run at half to one and a half times the width and height.
        refit: weights can be exchanged, for LoRA strengths.
        family: kept for the loader (host.skeleton).
        why: it is this library, in a few words.
    """

    library: api.Library
    call: Call
    precision: str
    model: str
    targets: tuple[str, ...] = ()
    dynamic_size: bool = False
    refit: bool = False
    family: dict[str, Any] = field(default_factory=dict)
    why: str = ""

    def made(self) -> files.Made:
        """What the engine depends on: with targets, on none of what this machine alone has."""
        flags = tuple(name for name in ("dynamic_size", "refit") if getattr(self, name))
        here = {"gpu": "", "capability": "", "cuda_driver": 0} if self.targets else api.gpu()
        return files.Made(
            **here, tensorrt=self.library.version, exporter=onnx_export.VERSION,
            opset=onnx_export.OPSET, precision=self.precision, model=self.model,
            inputs=tuple(self.call.named()), profile=self._profile(), flags=flags,
            library=self.library.name, targets=self.targets, **self._memory(),
        )  # fmt: skip

    def _memory(self) -> dict[str, Any]:
        memory, reuse = self.call.memory, self.call.reuse
        told = {} if memory is None else {"layers": memory.layers, "frames": memory.frames}
        return told if reuse is None else {**told, "depth": reuse.depth}

    @property
    def open(self) -> frozenset[str]:
        """What of the shapes may differ from call to call, of onnx_export.EVERY."""
        sees = f"{SEEN}0" in self.call.named()
        asked = {
            onnx_export.SIZE: self.dynamic_size, onnx_export.SEEN_ROWS: sees,
            onnx_export.RUN: self.call.reuse is not None,
        }  # fmt: skip
        return frozenset(word for word, wanted in asked.items() if wanted)

    def _profile(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        spans = {}
        for name, tensor in self.call.named().items():
            usual = tuple(tensor.shape)
            low = high = usual
            if self.dynamic_size and (name in ("x", FEATURES) or name.startswith("control_")):
                # latents in steps that every level of the UNet can halve
                deep = self.call.x.shape[-1] // usual[-1]
                low = (*usual[:2], *(_step(s * deep * 0.5) // deep for s in usual[2:]))
                high = (*usual[:2], *(_step(s * deep * 1.5) // deep for s in usual[2:]))
            elif name.startswith(SEEN):
                low = usual[0], 1
            elif name == WHOLE:
                low, high = (1,), (self.call.x.shape[0],)
            elif self.dynamic_size and name.startswith(BANK) and tensor.ndim > 1:
                low, high = self._tokens(usual, spans["x"][0]), self._tokens(usual, spans["x"][2])
            spans[name] = low, usual, high
        return spans

    def _tokens(self, usual: tuple[int, ...], x: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is remembered, [R, frames * tokens, ...], where latents are of x's."""
        usually, frames = self.call.x.shape[2:], self.call.memory.frames
        scale = next(s for s in _SCALES if frames * _count(usually, s) == usual[1])
        return usual[0], frames * _count(x[2:], scale), *usual[2:]


def make(
    unet: Callable[[], UNet],
    wish: Wish,
    folder: pathlib.Path,
    name: str,
    report: Report,
    check: Callable[[], None],
    free: Callable[[], None] = lambda: None,
) -> tuple[pathlib.Path, bool]:
    """The engine file for a wish, built unless there is one.

    Args:
        unet: gives the network, its weights loaded; called only if there is something to build.
        folder: where engines are kept.
        name: what the file's name begins with.
        report: called with (phase, step, steps).
        check: raises if the user has cancelled.
        free: gives the GPU's memory back once the network is exported.

    Returns:
        The file, and whether it was built now.

    Raises:
        Refused: it cannot be built.
    """
    made = wish.made()
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    path = folder / f"{name}-{made.key()}{files.SUFFIX}"
    try:
        if files.whole(path).made == made:
            return path, False
    except files.Unfit as reason:
        if path.exists():
            logging.warning("LiveDiffusion: %s %s: it is built anew", path.name, reason)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix=".building-", dir=folder, ignore_cleanup_errors=True
    ) as place:
        work = pathlib.Path(place)
        report("exporting", 0, 1)
        exported = onnx_export.export(
            unet(), wish.call, work / "unet.onnx", PRECISIONS[wish.precision], wish.open,
            named=wish.refit,
        )  # fmt: skip
        report("exporting", 1, 1)
        check()
        free()
        timing = folder / f"timing-{files.slug(made.gpu)}-{made.tensorrt}.cache"
        job = builder.Job(
            exported.path, work / "engine", timing, wish.precision,
            made.profile if wish.open else {}, tuple(exported.weights), wish.targets,
        )  # fmt: skip
        _build(wish.library, job, report, check)
        files.beside(path).unlink(missing_ok=True)
        (work / "engine").replace(path)
    built = {"seconds": round(time.monotonic() - started, 1), "on": time.strftime("%Y-%m-%d")}
    files.save(files.Sidecar(made, wish.family, exported.weights, built), path)
    return path, True


def _build(
    library: api.Library, job: builder.Job, report: Report, check: Callable[[], None]
) -> None:
    """Build in a thread of its own, so that a cancel is heard."""
    told: queue.SimpleQueue = queue.SimpleQueue()
    cancelled = threading.Event()

    def heard(phase: str, step: int, steps: int) -> bool:
        told.put((phase, step, steps))
        return not cancelled.is_set()

    def work() -> None:
        try:
            builder.build(library, job, heard)
            told.put(None)
        except (Refused, builder.Cancelled) as error:
            told.put(error)
        except BaseException as error:
            told.put(Refused(f"{library.called} failed: {type(error).__name__}: {error}"))

    thread = threading.Thread(target=work, name="livediffusion-tensorrt", daemon=True)
    thread.start()
    try:
        while True:
            check()
            with contextlib.suppress(queue.Empty):
                message = told.get(timeout=0.1)
                if message is None:
                    return
                if isinstance(message, BaseException):
                    raise message
                report(*message)
    finally:
        cancelled.set()
        thread.join()


def _sweep(folder: pathlib.Path) -> None:
    """Remove what builds left that were killed with ComfyUI."""
    for left in folder.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(left, ignore_errors=True)


def _count(size: tuple[int, ...], scale: int) -> int:
    """Tokens of a level whose pictures are so many times smaller."""
    return math.prod(-(-side // scale) for side in size)


def _step(size: float) -> int:
    return max(8, round(size / 8) * 8)
