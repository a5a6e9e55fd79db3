"""gpu.py's ladder: each step of ours alone, whole frames, beside what was predicted for it."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import best
import measure
import rivals
import torch
from blocks import Way, in_blocks
from sides import able, engine, made
from torch import Tensor


class Rung(NamedTuple):
    """A step: what a side is made of.

    Attributes:
        predicted: ms of an SD-Turbo frame on an H200, by n, written down before any was measured:
            the project's notes for the first four and the compiled ones, ours for the others.
        kernels, norms: the pack's Triton kernels, and that of GroupNorm with SiLU.
        last: UNet and autoencoder in channels_last, with weights of their own.
        stage: both halves of the autoencoder as CUDA graphs.
    """

    name: str
    engine: str
    predicted: dict[int, float]
    kernels: bool = True
    norms: bool = False
    last: bool = False
    stage: bool = False


LADDER = (
    Rung("eager", "eager", {1: 20.0, 4: 22.0}, kernels=False),
    Rung("graph of the tick", "graph", {1: 4.5, 4: 9.5}, kernels=False),
    Rung("+ folded constants", "cudagraph", {1: 4.2, 4: 9.2}, kernels=False),
    Rung("+ kernels: as shipped", "cudagraph", {1: 4.0, 4: 9.0}),
    Rung("shipped, fused norms", "cudagraph", {1: 3.9, 4: 8.7}, norms=True),
    Rung("shipped, channels_last", "cudagraph", {1: 3.8, 4: 8.3}, last=True),
    Rung("shipped, TAESD in a graph", "cudagraph", {1: 3.2, 4: 8.2}, stage=True),
    Rung(
        "shipped, all three", "cudagraph", {1: 2.7, 4: 7.2}, norms=True, last=True, stage=True
    ),
    Rung("torch.compile in the graph", "inductor", {1: 3.0, 4: 7.2}),
    Rung("torch.compile, TAESD in a graph", "inductor", {1: 2.3, 4: 6.5}, stage=True),
)  # fmt: skip
# those measured with cudnn.benchmark: in a process of its own, since cuDNN keeps what it has chosen
# for a shape, with it or without
CONVOLVED = ("+ kernels: as shipped", "shipped, all three")


def ladder(bench, kit) -> None:
    """A table for n = 1 and one for n = 4, where one step needs no earlier one's frames."""
    chosen = [rung for rung in LADDER if not bench.benchmark or rung.name in CONVOLVED]
    title = "step by step, cudnn.benchmark" if bench.benchmark else "step by step"
    last = None
    for i, n in enumerate((1, 4)):
        name = f"{kit.name}: {title}, n = {n}"
        if bench.left <= 0:
            bench.skip(name)
            continue
        with bench.report.part(name):
            last = last or in_channels_last(kit)
            ways, sides = {}, {}
            for rung in chosen:
                if rung.engine == "inductor" and not bench.rehearse and bench.left < best.SECONDS:
                    bench.skip(f"{name}: {rung.name}")
                    continue
                side = made(_side, bench, last if rung.last else kit, n, rung)
                sides[rung.name] = rung, side
                if able(side):
                    ways[rung.name] = way(side, rung)
            share = bench.left / (2 - i)
            times = in_blocks(ways, bench.device, bench.frames, bench.warm, share, bench.left)
            rows = []
            for step, (rung, side) in sides.items():
                own = {"failed": measure.short(side)} if not able(side) else times[step].row()
                told = {"step": step, "predicted for an H200": rung.predicted[n]}
                rows.append({**told, **own, **engine(side)})
            bench.report.add(name, rows, "self-negative; ms per frame")


def way(side, rung: Rung) -> Way:
    """A side inside its rung's switches, for in_blocks."""
    fed = rivals.pictures(side.kit)

    def inside(work: Callable, fed=fed) -> Any:
        with rivals.kernels(rung.kernels, rung.norms):
            return work(fed)

    return Way(
        functools.partial(inside, side.frames), functools.partial(inside, side.flow), side.counts
    )


def _side(bench, kit, n: int, rung: Rung):
    if rung.stage:
        from livediffusion.compiled.graph import CudaRecording

        kit = recorded(kit, bench.recording or CudaRecording)
    return bench.engine(rung.engine)(kit, n, "self-negative")


def in_channels_last(kit):
    """The same networks with weights of their own, in channels_last."""
    model, vae = kit.another()
    own = dataclasses.replace(kit, model=model, vae=vae)
    own.load()
    for module in (model.model.diffusion_model, vae.first_stage_model):
        module.to(memory_format=torch.channels_last)
    return own


def recorded(kit, new: Callable[[], Any]):
    """The same networks, the autoencoder as recordings."""
    vae = copy.copy(kit.vae)
    vae.first_stage_model = RecordedStage(kit.vae.first_stage_model, new)
    return dataclasses.replace(kit, vae=vae)


class RecordedStage:
    """An autoencoder whose encode and decode are recordings, one for each shape.

    Its weights must stay where they are.

    Args:
        stage: ComfyUI's first_stage_model.
        new: makes what records.
    """

    def __init__(self, stage, new: Callable[[], Any]):
        self._stage, self._new = stage, new
        self._made: dict[tuple, tuple] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def encode(self, x: Tensor) -> Tensor:
        return self._run("encode", x)

    def decode(self, x: Tensor) -> Tensor:
        return self._run("decode", x)

    def _run(self, what: str, x: Tensor) -> Tensor:
        key = what, tuple(x.shape), x.stride(), x.dtype
        if key not in self._made:
            work, still = getattr(self._stage, what), x.clone()
            for _ in range(2):
                work(still)  # in which libraries set themselves up
            recording = self._new()
            out = recording.capture(lambda: work(still))
            self._made[key] = still, recording, out
        still, recording, out = self._made[key]
        still.copy_(x)
        recording.replay()
        return out.clone()
