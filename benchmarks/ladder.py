"""gpu.py's ladder: each step of ours alone, whole frames, beside what was predicted for it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import best
import measure
import rivals
from blocks import Way, in_blocks
from rivals import LAYOUT
from sides import able, engine, made


class Rung(NamedTuple):
    """A step: what a side is made of.

    Attributes:
        predicted: ms of an SD-Turbo frame on an H200, by n, written down before any was measured:
            the project's notes for the first four and the compiled ones, ours for the others.
        kernels: the pack's Triton kernels.
        layout: of rivals.LAYOUT.
        stage: both halves of the autoencoder as CUDA graphs.
    """

    name: str
    engine: str
    predicted: dict[int, float]
    kernels: bool = True
    layout: tuple[str, ...] = ()
    stage: bool = False


SHIPPED = "+ cuDNN attention: as shipped"
LADDER = (
    Rung("eager", "eager", {1: 20.0, 4: 22.0}, kernels=False),
    Rung("graph of the tick", "graph", {1: 4.5, 4: 9.5}, kernels=False),
    Rung("+ folded constants", "cudagraph", {1: 4.2, 4: 9.2}, kernels=False),
    Rung("+ kernels", "cudagraph", {1: 4.0, 4: 9.0}),
    Rung("+ channels_last", "cudagraph", {1: 3.8, 4: 8.3}, layout=LAYOUT[:1]),
    Rung("+ weights of its own", "cudagraph", {1: 3.8, 4: 8.3}, layout=LAYOUT[:2]),
    Rung(SHIPPED, "cudagraph", {1: 3.8, 4: 8.3}, layout=LAYOUT),
    Rung(
        "+ Live Compile VAE", "cudagraph", {1: 2.7, 4: 7.2}, layout=LAYOUT, stage=True
    ),
    Rung("torch.compile in the graph", "inductor", {1: 3.0, 4: 7.2}),
    Rung("torch.compile, Live Compile VAE", "inductor", {1: 2.3, 4: 6.5}, stage=True),
)  # fmt: skip
# those measured with cudnn.benchmark: in a process of its own, since cuDNN keeps what it has chosen
# for a shape, with it or without
CONVOLVED = ("+ kernels", "+ Live Compile VAE")


def ladder(bench, kit) -> None:
    """A table for n = 1 and one for n = 4; what is compiled for long has tables of its own."""
    if bench.benchmark:
        _tables(bench, kit, "step by step, cudnn.benchmark", [*map(_named, CONVOLVED)])
    else:
        _tables(bench, kit, "step by step", [r for r in LADDER if r.engine != "inductor"])


def compiled(bench, kit) -> None:
    """The steps with torch.compile, beside what is shipped."""
    chosen = [_named(SHIPPED), *(rung for rung in LADDER if rung.engine == "inductor")]
    _tables(bench, kit, "step by step, torch.compile", chosen, best.SECONDS)


def _named(name: str) -> Rung:
    return next(rung for rung in LADDER if rung.name == name)


def _tables(bench, kit, title: str, chosen: list[Rung], needs: float = 0.0) -> None:
    """A table for each n.

    Args:
        needs: seconds without which none is begun.
    """
    for i, n in enumerate((1, 4)):
        name = f"{kit.name}: {title}, n = {n}"
        if bench.left <= (0.0 if bench.rehearse else needs):
            bench.skip(name)
            continue
        with bench.report.part(name):
            sides = {rung.name: (rung, made(_side, bench, kit, n, rung)) for rung in chosen}
            ways = {step: way(side, rung) for step, (rung, side) in sides.items() if able(side)}
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
        with rivals.kernels(rung.kernels, rung.layout):
            return work(fed)

    return Way(
        functools.partial(inside, side.frames), functools.partial(inside, side.flow), side.counts
    )


def _side(bench, kit, n: int, rung: Rung):
    if rung.stage:
        kit = best.compiled_vae(kit, bench.recording)
    return bench.engine(rung.engine)(kit, n, "self-negative")
