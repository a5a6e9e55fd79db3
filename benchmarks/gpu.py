"""What only a GPU can show, in one command and without network.

    COMFYUI_PATH=... python benchmarks/gpu.py [--only PART ...] [--seconds S] [--rehearse]

Tests marked cuda, as torch and as ComfyUI sets CUDA up; every engine against eager; then published
SD-Turbo, SD1.5 and SDXL-Turbo configurations with random weights at 512 x 512: all sides in blocks
in this process, the UNet alone against its floor, each step of ours with its prediction, what a
steady stream asks of host and memory, where the time goes, scaling. Prints tables and writes JSON
after each cell; a side or a part that fails is told by name and the others go on. It ends within
--seconds, and tells by name what there was no time for.

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
from collections.abc import Sequence
from typing import Any

BEGAN = time.monotonic()  # the imports below count, too

# ruff: noqa: E402
import engines
from blocks import NO_TIME
from floors import floors
from ladder import compiled, ladder
from live_gpu import live
from measure import Device, Report, in_turns, machine
from sides import CELLS, FIRST, agree, at_their_best, side_by_side

ROOT = pathlib.Path(__file__).resolve().parents[1]
NETWORKS = ("sd-turbo", "sd15", "sdxl-turbo")
PARTS = (
    "tests", "engines", *NETWORKS, "unets", "ladder", "profile", "steady", "compiled", "scaling",
    "live", "cudnn",
)  # fmt: skip
SKIPPED = "no time for"
MARGIN = 8.0  # seconds of the budget for what comes after the last table


@dataclasses.dataclass
class Bench:
    """What every part needs.

    Attributes:
        frames, warm: of each side, measured and before that.
        deadline: of the command (time.monotonic).
        recording: stands for CUDA graphs in a rehearsal.
        benchmark: cudnn.benchmark is on.
    """

    report: Report
    device: Device
    frames: int
    warm: int
    deadline: float
    rehearse: bool
    recording: Any = None
    benchmark: bool = False

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.deadline - time.monotonic())

    def part(self, name: str, work, *arguments) -> None:
        """A part, where there is time for it."""
        if self.left <= 0:
            self.skip(name)
            return
        with self.report.part(name):
            work(self, *arguments)

    def skip(self, name: str) -> None:
        """There was no time for it."""
        print(f"\n{name}: {NO_TIME}", flush=True)
        self.report.told.setdefault(SKIPPED, []).append(name)
        self.report.write()

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
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS,
                        help="that unets looks at (default all)")  # fmt: skip
    parser.add_argument("--cells", type=int, default=len(CELLS), help="side by side, at most")
    parser.add_argument("--cudnn-benchmark", action="store_true",
                        help="cuDNN tries its convolutions, in the whole process")  # fmt: skip
    return parser.parse_args()


def unets(bench: Bench, kit) -> None:
    """The UNet alone, launched and as a graph, against the floor of this hardware."""
    import rivals
    import torch

    gpu = torch.cuda.get_device_name() if bench.device.cuda else ""
    known = floors(kit.name, gpu)
    if not known:
        bench.device.missing["share of the floor (known for H200, H100 and 4090)"] = None
    kit.load()
    rows: list[dict[str, Any]] = []
    first = None
    for count in (1, 2, 3, 4, 8):
        eager, graph = _alone(bench, kit, count)
        first = first or graph
        row = {"rows": count, "eager ms": eager, "graph ms": graph,
               "graph / (rows x one row)": graph / (count * first)}  # fmt: skip
        if count in known:
            row |= {"floor ms": known[count], "share": known[count] / graph}
        rows.append(row)
    bench.report.add(f"{kit.name}: the UNet alone", rows)
    for row in rows:
        for last, name in enumerate(LED, 1):
            row[name] = _alone(bench, kit, row["rows"], rivals.LAYOUT[:last], eager=False)[1]
        if "share" in row:
            row["best share"] = row["floor ms"] / min(row["graph ms"], *(row[name] for name in LED))
    bench.report.add(f"{kit.name}: the UNet alone", rows)


# rivals.LAYOUT, each step with those before it
LED = ("channels_last ms", "own weights ms", "cuDNN attention ms")


def _alone(bench: Bench, kit, count: int, layout: Sequence[str] = (), eager: bool = True):
    """Milliseconds of a call of so many rows: (launched, as a graph)."""
    import rivals
    from livediffusion.compiled.graph import CudaRecording
    from livediffusion.compiled.layout import Led

    unet, call = kit.model.model.diffusion_model, kit.call(count)
    repeats = 5 if bench.rehearse else 30

    def work() -> None:
        out.copy_(unet(**call))

    with rivals.kernels(True, layout), Led(unet).inside():
        for _ in range(3):
            out = unet(**call)
        recording = (bench.recording or CudaRecording)()
        recording.capture(work)
    launched = bench.device.busy(lambda: unet(**call), repeats) if eager else None
    recording.replay()
    graph = bench.device.busy(recording.replay, repeats)
    recording.release()
    return launched, graph


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
                times = in_turns({what: work}, device, bench.frames, 3, bench.left / 8)
                rows.append({
                    "n": n, "mode": mode, "side": side.name, "of": what,
                    "host ms": device.host(work, repeats), "device ms": device.busy(work, repeats),
                    "p99/p50": times[what].p99 / times[what].median,
                    "waits": device.syncs(work), **device.allocations(work),
                    "recorded": side.captures,
                })  # fmt: skip
    bench.report.add(f"{kit.name}: a steady stream", rows, "each of one tick or one frame")


def profile(bench: Bench, kit) -> None:
    """Where the device's time goes (a CPU's own time without one): by kind, and by kernel."""
    import kinds
    import rivals
    import torch

    fed, activities = rivals.pictures(kit), [torch.profiler.ProfilerActivity.CPU]
    if bench.device.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    frames = 3 if bench.rehearse else 20
    for n, last in ((1, False), (4, False), (1, True), (4, True)):
        with rivals.kernels(True, rivals.LAYOUT if last else ()):
            side = bench.ours(kit, n, "self-negative")
            for _ in range(bench.warm):
                side.frames(fed)
            with torch.profiler.profile(activities=activities) as seen:
                for _ in range(frames):
                    side.frames(fed)
                bench.device.wait()
        name = f"{kit.name}: where the time goes, n = {n}"
        if last:
            name += ", channels_last"
        spent = kinds.spent(seen, frames, bench.device.cuda)
        bench.report.add(f"{name}, by kind", kinds.by_kind(spent))
        bench.report.add(f"{name}, by kernel", kinds.by_name(spent, 15))


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


def run_tests(bench: Bench, comfy_as_on_cuda: bool) -> None:
    """The tests marked cuda, as torch comes or as ComfyUI sets it up on CUDA."""
    env = {**os.environ, "LIVEDIFFUSION_CUDA": "rehearse" if bench.rehearse else "cuda"}
    env["LIVEDIFFUSION_TEST_SECONDS"] = "0"  # what is left of the whole is the limit
    if comfy_as_on_cuda:
        env |= {"LIVEDIFFUSION_DYNAMIC_VRAM": "1"}
        if not bench.rehearse:
            env |= {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cuda", "tests/compiled", "tests/kernels"],
        cwd=ROOT, env=env, timeout=bench.left or None,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


def run_engines(bench: Bench, comfyui: str) -> None:
    subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "engines.py"), "--comfyui", comfyui,
            "--json", str(bench.report.path.with_name("engines.json")),
            *(["--ticks", "8", "--only", "onnxruntime"] if bench.rehearse else []),
        ],
        check=True,
    )  # fmt: skip


def run_benchmarked(bench: Bench, args: argparse.Namespace) -> None:
    """UNet and ladder with cudnn.benchmark, in a process that has not chosen before."""
    subprocess.run(
        [
            sys.executable, __file__, "--only", "unets", "ladder", "--networks", "sd-turbo",
            "--cudnn-benchmark",
            "--out", str(args.out / "cudnn"), "--seconds", str(round(bench.left)),
            "--frames", str(args.frames), *(["--rehearse"] if args.rehearse else []),
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
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    report = Report(args.out / "gpu.json", machine())
    print(", ".join(f"{name} {value}" for name, value in report.told["on"].items()), flush=True)
    frames, warm = (4, 8) if args.rehearse else (args.frames, 12)
    deadline = BEGAN + args.seconds - min(MARGIN, args.seconds / 10)
    bench = Bench(report, device, frames, warm, deadline, args.rehearse)
    bench.benchmark = args.cudnn_benchmark
    if args.rehearse:
        import replaying

        bench.recording = replaying.Replaying
    if "tests" in args.only:
        for name, as_on_cuda in (("tests", False), ("tests, cudaMallocAsync", True)):
            bench.part(name, run_tests, as_on_cuda)
    if "engines" in args.only:
        bench.part("engines", run_engines, comfyui)
    with torch.inference_mode():
        for name in NETWORKS:
            measured(bench, name, args)
    if "live" in args.only:
        bench.part("live", live, comfyui)
    if "cudnn" in args.only:
        bench.part("cudnn", run_benchmarked, args)
    report.told["not measured"] = list(device.missing)
    report.write()
    if device.missing:
        print(f"\nnot measured here: {'; '.join(device.missing)}")
    if SKIPPED in report.told:
        print(f"\nno time for: {'; '.join(report.told[SKIPPED])}")
    print(f"\n{report.path}; seconds: {report.seconds}; failed: {report.failed or 'nothing'}")
    return 1 if report.failed else 0


def measured(bench: Bench, name: str, args: argparse.Namespace) -> None:
    """The parts of one network that are asked for; those first that tell most.

    What is compiled for long comes late.
    """
    cells = CELLS[: args.cells]
    first, more = cells[:FIRST], cells[FIRST:]
    deep = {"unets": unets} if name in args.networks else {}
    late = {}
    if name == "sd-turbo":  # what the predictions are for
        deep |= {"ladder": ladder, "profile": profile, "steady": steady}
        late |= {"compiled": compiled, "scaling": scale}
    asked = [(f"{name}: {part}", work, ()) for part, work in deep.items() if part in args.only]
    if name in args.only:
        asked.insert(0, (f"{name}: whether they agree", agree, (cells,)))
        asked.insert(1, (f"{name}: side by side", side_by_side, (first,)))
        asked.append((f"{name}: others at their best", at_their_best, (first,)))
        asked.append((f"{name}: side by side, more", side_by_side, (more,)))
    asked += [(f"{name}: {part}", work, ()) for part, work in late.items() if part in args.only]
    kit = None
    if asked:
        with bench.report.part(f"{name}: networks"):
            kit = bench.kit(name)
    for title, work, arguments in asked if kit is not None else []:
        bench.part(title, work, kit, *arguments)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    sys.exit(main())
