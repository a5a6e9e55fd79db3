"""What only a GPU can show, in one command and without network.

    COMFYUI_PATH=... python benchmarks/gpu.py [--only PART ...] [--seconds S] [--rehearse]

Tests marked cuda, every engine against eager, then published SD-Turbo, SD1.5 and SDXL-Turbo
configurations with random weights at 512 x 512: all sides in turns in this process, the UNet alone
against its floor, each step of ours with its prediction, what a steady stream asks of host and
memory, where the time goes, scaling. Prints tables and writes JSON after each part; a side or a
part that fails is told by name and the others go on.

Needs torch with CUDA, ComfyUI, diffusers, streamdiffusion, pytest and hypothesis; onnxruntime-gpu
and tensorrt are used where they are. `--rehearse` runs all of it on a CPU, with tiny configurations
of the same layouts and a stand-in for CUDA graphs.
"""

import argparse
import dataclasses
import functools
import gc
import logging
import os
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

import engines
import measure
from measure import Device, Report

ROOT = pathlib.Path(__file__).resolve().parents[1]
NETWORKS = ("sd-turbo", "sd15", "sdxl-turbo")
PARTS = ("tests", "engines", *NETWORKS, "unets", "ladder", "steady", "profile", "scaling")
# (n, mode, frames per slot)
CELLS = (
    (1, "off", 1), (2, "off", 1), (4, "off", 1), (4, "self-negative", 1),
    (4, "onetime-negative", 1), (4, "full", 1), (1, "off", 4), (4, "off", 4),
)  # fmt: skip
# milliseconds of one UNet forward at 512 x 512 by rows, the project's model of the hardware:
# for each matmul-type operation the larger of its arithmetic and its bytes, everything else free,
# with whole waves of tiles; H200: 790 TFLOP/s, 4.3 TB/s; 4090: 165.2 TFLOP/s, 1.008 TB/s, fp16
_SD = {"H200": {1: 1.71, 2: 2.74, 3: 3.54, 4: 4.59, 8: 8.75},
       "4090": {1: 7.93, 2: 12.7, 3: 16.5, 4: 21.3, 8: 40.7}}  # fmt: skip
_SDXL = {"H200": {1: 3.17, 2: 5.61, 4: 9.24}, "4090": {1: 14.7, 2: 26.0, 4: 42.8}}
FLOORS = {"sd15": _SD, "sd-turbo": _SD, "sdxl-turbo": _SDXL}


# a whole SD-Turbo frame on an H200 as predicted before anything was measured, ms at n = 1 and 4:
# (name, engine, with the pack's kernels, predictions)
class Rung(NamedTuple):
    """One more step than the rung before."""

    name: str
    engine: str
    predicted: dict[int, float]  # ms on an H200 by n: performance notes 6.1, and ours for the last
    kernels: bool = True
    norms: bool = False
    ahead: bool = False


LADDER = (
    Rung("eager", "eager", {1: 20.0, 4: 22.0}, kernels=False),
    Rung("+ graph of the tick", "graph", {1: 4.5, 4: 9.5}, kernels=False),
    Rung("+ folded constants", "cudagraph", {1: 4.2, 4: 9.2}, kernels=False),
    Rung("+ kernels", "cudagraph", {1: 4.0, 4: 9.0}),
    Rung("+ compile", "inductor", {1: 3.0, 4: 7.2}),
    Rung("+ fused norms, not compiled", "cudagraph", {1: 3.9, 4: 8.7}, norms=True),
    Rung("+ two frames in flight, not compiled", "cudagraph", {1: 3.6, 4: 8.6}, ahead=True),
)


@dataclasses.dataclass
class Bench:
    """What every part needs.

    Attributes:
        frames, warm: of each side, measured and before that.
        deadline: of the command (time.monotonic).
        recording: stands for CUDA graphs in a rehearsal.
    """

    report: Report
    device: Device
    frames: int
    warm: int
    deadline: float
    rehearse: bool
    recording: Any = None

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    @functools.cached_property
    def ours(self):
        """Makes our side on the engine that `auto` takes on a GPU."""
        return self.engine("cudagraph")

    def engine(self, name: str):
        from rivals import Ours

        return functools.partial(Ours, engine=name, recording=self.recording)

    def kit(self, name: str):
        """A published network, checked to be the same on both sides."""
        import comfy.model_management
        import torch
        from networks import published

        # the last one's memory is free before
        comfy.model_management.unload_all_models()
        gc.collect()
        comfy.model_management.soft_empty_cache()
        dtype = torch.float16 if self.device.cuda else torch.float32
        size = 32 if self.rehearse else 512
        kit = published(name, size, self.device.device, dtype, tiny=self.rehearse)
        self.report.add(f"{name}: both sides' networks, relative RMS", [kit.check()])
        return kit


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("output"))
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=3600, help="budget (default 3600)")
    parser.add_argument("--frames", type=int, default=300, help="of each side (default 300)")
    return parser.parse_args()


def sides(bench: Bench, kit, n: int, mode: str, f: int) -> dict[str, Any]:
    """Every side that knows the mode, or the error that making it gave, by name."""
    import rivals

    makers = [rivals.Public, rivals.AutoPipeline, rivals.ComfySampler, rivals.ComfyQueue,
              rivals.Floor]  # fmt: skip
    made = {}
    for make in makers:
        if mode in make.modes:
            made[make.title] = _made(make, kit, n, mode, f)
    for engine in ("eager", "graph", "cudagraph"):
        made[f"LiveDiffusion, {engine}"] = _made(bench.engine(engine), kit, n, mode, f)
    return made


def _made(make, *how):
    try:
        return make(*how)
    except Exception as error:
        return error


def _engine(side) -> dict[str, Any]:
    """What its engine has to tell: ticks recorded, and why it did not run."""
    told = {
        "recorded": getattr(side, "captures", None),
        "fell back": getattr(side, "fallback", None),
    }
    return {name: value for name, value in told.items() if value is not None}


def side_by_side(bench: Bench, kit, cells) -> None:
    """Milliseconds per frame of every side, in each cell."""
    import rivals

    rows = []
    for i, (n, mode, f) in enumerate(cells):
        made = sides(bench, kit, n, mode, f)
        able = {name: side for name, side in made.items() if not isinstance(side, Exception)}
        fed = rivals.pictures(kit, f)
        ways = {name: functools.partial(side.frames, fed) for name, side in able.items()}
        share = bench.left / (len(cells) - i)
        times = measure.in_turns(ways, bench.device, bench.frames, bench.warm, share)
        base = times.get(rivals.Public.title)
        for name, side in made.items():
            row = {"n": n, "mode": mode, "F": f, "side": name}
            if name not in times:
                rows.append({**row, "failed": measure.short(side)})
                continue
            own = times[name]
            if own.failed is None:
                row["ms/frame"] = own.median / f
                if base is not None and base.failed is None:
                    row["x public"] = base.median / own.median
                row["MiB"] = bench.device.peak(ways[name])
                row["p99/p50"] = own.p99 / own.median
            rows.append({**row, **own.row(), **_engine(side)})
            if hasattr(side, "close"):
                side.close()
        made = able = ways = None  # so that the next cell finds the memory free
    bench.report.add(f"{kit.name}: side by side", rows, f"{kit.size} x {kit.size}, {kit.dtype}")


def unets(bench: Bench, kit) -> None:
    """The UNet alone, launched and as a graph, against the floor of this hardware."""
    import torch
    from livediffusion.compiled.graph import CudaRecording

    gpu = torch.cuda.get_device_name() if bench.device.cuda else ""
    floors = next((t for name, t in FLOORS[kit.name].items() if name in gpu), {})
    if not floors:
        bench.device.missing["share of the floor (known for H200 and 4090)"] = None
    unet, rows, first = kit.model.model.diffusion_model, [], None
    kit.load()
    repeats = 5 if bench.rehearse else 100
    for count in (1, 2, 3, 4, 8):
        call = kit.call(count)
        for _ in range(3):
            unet(**call)
        recording = (bench.recording or CudaRecording)()
        recording.capture(lambda call=call: unet(**call))
        recording.replay()
        row = {
            "rows": count,
            "eager ms": bench.device.busy(lambda call=call: unet(**call), repeats),
            "graph ms": bench.device.busy(recording.replay, repeats),
        }
        recording.release()
        first = first or row["graph ms"]
        row["graph / (rows x one row)"] = row["graph ms"] / (count * first)
        if count in floors:
            row |= {"floor ms": floors[count], "share": floors[count] / row["graph ms"]}
        rows.append(row)
    bench.report.add(f"{kit.name}: the UNet alone", rows)


def ladder(bench: Bench, kit) -> None:
    """Each step alone, whole frames, beside what was predicted for it."""
    import rivals

    fed, rows = rivals.pictures(kit), []

    def way(side, rung):
        def work():
            with rivals.kernels(rung.kernels, rung.norms):
                return side.frames(fed)

        return work

    for n in (1, 4):
        ways, made = {}, {}
        for rung in LADDER:
            side = _made(bench.engine(rung.engine), kit, n, "self-negative")
            made[rung.name] = side
            if not isinstance(side, Exception):
                side.ahead = rung.ahead
                ways[rung.name] = way(side, rung)
        times = measure.in_turns(ways, bench.device, bench.frames, bench.warm, bench.left / 2)
        for name, _, predicted, *_ in LADDER:
            row = {"n": n, "step": name, "predicted for an H200": predicted[n]}
            if name in times:
                row |= {**times[name].row(), **_engine(made[name])}
            else:
                row["failed"] = measure.short(made[name])
            rows.append(row)
    bench.report.add(f"{kit.name}: step by step", rows, "self-negative")


def steady(bench: Bench, kit) -> None:
    """What a settled stream asks of the host and of memory, per frame and per tick."""
    import rivals
    import torch

    rows, device, fed = [], bench.device, rivals.pictures(kit)
    repeats = 10 if bench.rehearse else 200
    for n, mode in ((1, "off"), (4, "self-negative"), (4, "full")):
        for make in (bench.engine("eager"), bench.ours):
            side = make(kit, n, mode)
            latents = torch.randn(1, *kit.latent, device=kit.device)
            for _ in range(bench.warm):
                side.frames(fed)
            works = {
                "tick": functools.partial(side.step, latents),
                "frame": functools.partial(side.frames, fed),
            }
            for what, work in works.items():
                times = measure.in_turns({what: work}, device, bench.frames, 3, bench.left / 8)
                rows.append({
                    "n": n, "mode": mode, "side": side.name, "of": what,
                    "host ms": device.host(work, repeats), "device ms": device.busy(work, repeats),
                    "p99/p50": times[what].p99 / times[what].median,
                    "waits": device.syncs(work), **device.allocations(work),
                    "recorded": side.captures,
                })  # fmt: skip
    bench.report.add(f"{kit.name}: a steady stream", rows, "each of one tick or one frame")


def profile(bench: Bench, kit) -> None:
    """The ten operations that take most of the device's time (a CPU's own time without one)."""
    import rivals
    import torch

    fed, kinds = rivals.pictures(kit), [torch.profiler.ProfilerActivity.CPU]
    if bench.device.cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    frames = 3 if bench.rehearse else 20
    for n in (1, 4):
        side = bench.ours(kit, n, "self-negative")
        for _ in range(bench.warm):
            side.frames(fed)
        with torch.profiler.profile(activities=kinds) as seen:
            for _ in range(frames):
                side.frames(fed)
            bench.device.wait()
        which = "self_device_time_total" if bench.device.cuda else "self_cpu_time_total"
        events = sorted(seen.key_averages(), key=lambda e: -getattr(e, which))
        whole = sum(getattr(e, which) for e in events)
        rows = [
            {"operation": e.key[:70], "calls/frame": e.count / frames,
             "ms/frame": getattr(e, which) / 1000 / frames, "share": getattr(e, which) / whole}
            for e in events[:10]
        ]  # fmt: skip
        bench.report.add(f"{kit.name}: where the time goes, n = {n}", rows, which)


def scale(bench: Bench, kit) -> None:
    """Cost against frames, pixels, steps and rows, and memory against frames."""
    import scaling

    device, make = bench.device, bench.ours
    small = bench.rehearse
    counts = [2, 4, 8] if small else [10, 20, 40, 80, 160, 320]
    sizes = [32, 64] if small else [256, 384, 512, 768]
    steps = {n: (n, "self-negative", 1) for n in (1, 2, 4, 8)}
    slots = {f: (1, "self-negative", f) for f in (1, 2, 4, 8)}
    repeats = 2 if small else 30
    points = {
        "frames": scaling.frames(kit, device, make, counts, 4, 2),
        "pixels": scaling.pixels(kit, device, make, sizes, 1, repeats),
        "steps": scaling.ticks(kit, device, make, steps, repeats),
        "frames per slot": scaling.ticks(kit, device, make, slots, repeats),
    }
    rows = [scaling.row(what, costs) for what, costs in points.items()]
    bench.report.add(f"{kit.name}: scaling", rows)
    held = scaling.memory(kit, device, make, [16, 64] if small else [32, 3200], 4, "self-negative")
    bench.report.add(f"{kit.name}: memory", [dataclasses.asdict(own) for own in held])


def run_tests(bench: Bench) -> None:
    how = "rehearse" if bench.rehearse else "cuda"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cuda", "tests/compiled", "tests/kernels"],
        cwd=ROOT, env={**os.environ, "LIVEDIFFUSION_CUDA": how}, check=True,
    )  # fmt: skip


def run_engines(bench: Bench, comfyui: str) -> None:
    subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "engines.py"), "--comfyui", comfyui,
            "--json", str(bench.report.path.with_name("engines.json")),
            *(["--ticks", "8", "--only", "onnxruntime"] if bench.rehearse else []),
        ],
        check=True,
    )  # fmt: skip


def main() -> int:
    args = options()
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        print("Set COMFYUI_PATH to the folder of a ComfyUI.", file=sys.stderr)
        return 2
    engines.prepare(pathlib.Path(comfyui))
    sys.path.insert(0, str(ROOT / "tests"))
    logging.disable(logging.WARNING)
    import comfy.model_management
    import torch

    device = Device("cpu" if args.rehearse else comfy.model_management.get_torch_device())
    if not (args.rehearse or device.cuda):
        print("There is no CUDA device; --rehearse runs on a CPU.", file=sys.stderr)
        return 2
    report = Report(args.out / "gpu.json", measure.machine())
    print(", ".join(f"{name} {value}" for name, value in report.told["on"].items()), flush=True)
    frames, warm = (4, 12) if args.rehearse else (args.frames, 30)
    deadline = time.monotonic() + args.seconds
    bench = Bench(report, device, frames, warm, deadline, args.rehearse)
    if args.rehearse:
        import replaying

        bench.recording = replaying.Replaying
    if "tests" in args.only:
        with report.part("tests"):
            run_tests(bench)
    if "engines" in args.only:
        with report.part("engines"):
            run_engines(bench, comfyui)
    deep = {"unets": unets, "ladder": ladder, "steady": steady, "profile": profile,
            "scaling": scale}  # fmt: skip
    asked = [name for name in deep if name in args.only]
    with torch.inference_mode():
        for name in NETWORKS:
            # SD-Turbo is what the predictions are for
            inner = [part for part in asked if name == "sd-turbo" or part == "unets"]
            if not inner and name not in args.only:
                continue
            kit = None
            with report.part(f"{name}: networks"):
                kit = bench.kit(name)
            for part in inner if kit is not None else []:
                with report.part(f"{name}: {part}"):
                    deep[part](bench, kit)
            if kit is not None and name in args.only:
                with report.part(f"{name}: side by side"):
                    side_by_side(bench, kit, CELLS)
            del kit
    report.told["not measured"] = list(device.missing)
    report.write()
    if device.missing:
        print(f"\nnot measured here: {'; '.join(device.missing)}")
    print(f"\n{report.path}; seconds: {report.seconds}; failed: {report.failed or 'nothing'}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    sys.exit(main())
