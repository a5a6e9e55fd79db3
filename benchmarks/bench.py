"""`python run.py bench`: the pack beside its rivals on this machine's CPU, with the project's bars.

Counts of operations, bookkeeping without a network, the live loop against one queued prompt per
frame, whole frames with the embedded model, scaling. All sides run in one process with the same
weights, in turns, each measured twice (A/A). By name only, `--only calm`: how calm pictures are
(docs/coherence.md), `--only serve`: what a house of `run.py serve` holds (docs/serve.md), and
`--only reuse` and `--only share`: what Live Reuse saves (docs/reuse.md), `--only patchwork`: what
Live Patchwork does (docs/patchwork.md).
Prints tables and bars and writes JSON. Ends with status 1 if a count is missed or a part failed; a
missed time is only said, as times depend on the machine.
"""

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import sys

import engines
import measure
import reuse_rows
from measure import Bar, Device, Report

ROOT = pathlib.Path(__file__).resolve().parents[1]
TICK = "ours, n = 4, self-negative, the tick"
# aten operations of a tick of n = 4 outside the UNet: the most that ours may have, and theirs
OPS = {"off": (6, 11), "full": (8, 16), "self-negative": (14, 30), "onetime-negative": (14, 33)}
LITTLE = ("counts", "bookkeeping", "memory", "live loop", "ends")  # parts with next to no network
NAMED = ("calm", "reuse", "patchwork", "serve", "share", "ends")  # when they are asked for by name
PARTS = ("counts", "bookkeeping", "memory", "live loop", "whole frames", "scaling", *NAMED)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py bench", description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--frames", type=int, default=300, help="of each side (default 300)")
    parser.add_argument("--quick", action="store_true", help="30 frames of each side")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all but {', '.join(NAMED)})",
    )  # fmt: skip
    parser.add_argument(
        "--docs",
        action="store_true",
        help="calm, reuse: write what docs/coherence.md and docs/reuse.md show",
    )
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "output" / "bench.json")
    args = parser.parse_args()
    args.only = args.only or [name for name in PARTS if name not in NAMED]
    if args.quick:
        args.frames = 30
    return args


def without_network(size: int = 512):
    """A Kit whose UNet returns its input: what is left is bookkeeping.

    Scaling latents is left out on both sides; the public class does it with its autoencoder.
    """
    from networks import published

    kit = published("sd15", size, tiny=True)
    base = kit.model.model
    # as a class of its own: a forward put on a module would be noticed, and sampled frame by frame
    kind = type(base.diffusion_model)
    base.diffusion_model.__class__ = type("Null", (kind,), {"forward": lambda self, x, *a, **k: x})
    base.process_latent_in = base.process_latent_out = lambda latent: latent
    return dataclasses.replace(kit, unet=lambda x, t, **named: (x,))


def counts(report: Report) -> None:
    """aten operations per tick outside the UNet, latents in and latents out."""
    import torch
    from rivals import Ours, Public

    kit, rows = without_network(), []
    latents = torch.randn(1, *kit.latent)
    for n in (1, 2, 4):
        row = {"n": n}
        for mode, (most, theirs) in OPS.items():
            totals = {}
            for side in (Public(kit, n, mode), Ours(kit, n, mode)):
                for _ in range(3 * n):
                    side.step(latents)
                # the worst of two rounds of the ring
                names = max((measure.ops(lambda s=side: s.step(latents)) for _ in range(2 * n)),
                            key=lambda names: sum(names.values()))  # fmt: skip
                totals[side.name] = sum(names.values())
            public, ours = totals.values()
            row[mode] = f"{ours} ({public})"
            if n == 4:
                report.bars.append(Bar(f"aten ops, ours, {mode}", ours, most, counted=True))
                report.bars.append(
                    Bar(f"aten ops, public class, {mode}", public, theirs, theirs, counted=True)
                )
                print(f"ours, {mode}: {dict(names)}", flush=True)
        rows.append(row)
    report.add("aten operations of a tick outside the UNet", rows, "ours (the public class's)")


def tick(side, latents):
    """The same tick again and again: what the public class's step is compared with."""
    ring, given = side.stream.ring, []
    before = ring.tick

    def kept(*args, **named):
        given.append((args, named))
        return before(*args, **named)

    ring.tick = kept
    for _ in range(12):
        side.step(latents)
    del ring.tick
    args, named = given[-1]
    return lambda: ring.tick(*args, **named)


def bookkeeping(report: Report, device: Device, frames: int) -> None:
    """Milliseconds of a frame without its UNet call."""
    import comfy.sample
    import torch
    from rivals import Ours, Public

    kit = without_network()
    latents = torch.randn(1, *kit.latent)
    zeros = torch.zeros_like(latents)
    conds = kit.conditioning(kit.prompt), kit.conditioning(kit.negative)

    def stock():
        comfy.sample.sample(kit.model, zeros, 1, 1.0, "euler", "simple", *conds, latents,
                            disable_pbar=True)  # fmt: skip

    base, ways = "comfy.sample.sample, 1 step", {}
    ways[base] = stock
    sides = [(Public, 4), (Ours, 1), (Ours, 2), (Ours, 4), (Ours, 8)]
    for make, n in sides:
        for mode in OPS if n < 8 else ["self-negative"]:
            side = make(kit, n, mode)
            name = "public class" if make is Public else "ours"
            ways[f"{name}, n = {n}, {mode}"] = lambda side=side: side.step(latents)
    ways[TICK] = tick(Ours(kit, 4, "self-negative"), latents)
    times = measure.in_turns(ways, device, frames, 40)
    ms = {name: own.median for name, own in times.items()}
    rows = [
        {"without a network": name, **own.row(), "x 1 step": round(ms[name] / ms[base], 3)}
        for name, own in times.items()
    ]
    report.add("bookkeeping per frame", rows, "one thread, latents of 4 x 64 x 64")
    for mode in OPS:
        worst = max(ms[f"ours, n = {n}, {mode}"] for n in (1, 2, 4)) / ms[base]
        report.bars.append(Bar(f"bookkeeping / comfy.sample 1 step, {mode}, worst n", worst, 0.25))
    step = ms[TICK] / ms["public class, n = 4, self-negative"]
    report.bars.append(Bar("tick / public class's step, n = 4, self-negative", step, 0.6))
    frame = ms["ours, n = 4, self-negative"] / ms["public class, n = 4, self-negative"]
    print(f"a whole frame of ours, guider and latent scale included / their step: {frame:.2f}")
    steps = measure.slope({n: ms[f"ours, n = {n}, self-negative"] for n in (1, 2, 4, 8)})
    report.bars.append(Bar("bookkeeping against steps, slope", steps, 1.0))


def live(report: Report, frames: int) -> None:
    """The live loop against one queued prompt per frame, nothing computed."""
    import live_loop

    rows = []
    for name, ms in live_loop.measure(max(frames // 3, 40)).items():
        rows.append({"way": name, **measure.Times(ms).row()})
    report.add("the standard live graph around a null model", rows)
    report.bars.append(
        Bar("live loop / one queued prompt per frame", rows[0]["ms"] / rows[1]["ms"], 0.5)
    )


def memory(report: Report, device: Device) -> None:
    """What is held after 32 frames and after 3,200."""
    import rivals
    import scaling

    kit, rows = without_network(), []
    for mode in ("self-negative", "onetime-negative"):
        # what is made once in a process is there before
        scaling.memory(kit, device, rivals.Ours, [32, 64], 4, mode)
        held = scaling.memory(kit, device, rivals.Ours, [32, 3200], 4, mode)
        rows += [{"mode": mode, **dataclasses.asdict(own)} for own in held]
        grown = held[1].tensors - held[0].tensors
        report.bars.append(
            Bar(f"tensors held, 3,200 frames against 32, {mode}", grown, 0, counted=True)
        )
        more = (held[1].objects - held[0].objects) / (3200 - 32)
        report.bars.append(
            Bar(f"Python objects held per frame, {mode}", more, 0.1, counted=True)
        )  # fmt: skip
    report.add("memory against frames", rows, "n = 4, no network")


def whole(report: Report, device: Device, frames: int) -> None:
    """Picture to picture with the embedded model, every side in turns."""
    import rivals
    import torch
    from livediffusion.compiled import choice
    from networks import embedded

    kit, n, mode = embedded(256), 4, "self-negative"
    errors = kit.check()
    report.add("the same networks, relative RMS", [errors])
    for name in OPS:
        error = rivals.apart(kit, n, name)
        report.bars.append(
            Bar(f"latents apart from the public class's, {name}", error, 1e-3, counted=True)
        )
    sides = {
        "public": rivals.Public(kit, n, mode),
        "AutoPipeline": rivals.AutoPipeline(kit, n),
        "queue": rivals.ComfyQueue(kit, n),
        "queue, 1 step": rivals.ComfyQueue(kit, 1),
        "ours": rivals.Ours(kit, n, mode),
        "floor": rivals.Floor(kit, n, mode),
    }
    for name in ("onnxruntime", "openvino"):
        if choice.missing(name, kit.device) is None:
            sides[f"ours, {name}"] = rivals.Ours(kit, n, mode, engine=name)
    half = [
        f"{name} bfloat16" for name in ("eager", "openvino")
        if choice.missing(name, kit.device, choice.Wish("bfloat16")) is None
    ]  # fmt: skip
    for name in half:
        sides[f"ours, {name}"] = rivals.Ours(kit, n, mode, engine=name)
    for name in [name for name in ("openvino", *half) if f"ours, {name}" in sides]:
        sides[f"floor, {name}"] = rivals.Floor(kit, n, mode, engine=name)
    if half:  # the others' whole networks, as ComfyUI's --bf16-unet has them
        rounded = embedded(256, torch.bfloat16)
        sides["public, bfloat16"] = rivals.Public(rounded, n, mode)
        sides["AutoPipeline, bfloat16"] = rivals.AutoPipeline(rounded, n)
        sides["queue, bfloat16"] = rivals.ComfyQueue(rounded, n)
    quick = frames < 100
    kinds = {key: engine for key, engine in (
        ("ours", "eager"), ("ours, openvino", "openvino"),
        ("ours, openvino bfloat16", "openvino bfloat16"),
    ) if key in sides}  # fmt: skip
    for key, engine in kinds.items():
        for way in reuse_rows.WAYS:
            sides[f"{key}, {way}"] = rivals.Ours(
                kit, n, mode, engine=engine, reuse=reuse_rows.asked(way)
            )
    fed = rivals.pictures(kit)
    ways = {key: lambda side=side: side.frames(fed) for key, side in sides.items()}
    try:
        # a library's threads spin for a while after its work, and would slow the side after it
        times = measure.in_turns(ways, device, frames, 12, rest=0.05)
    finally:
        for key in [key for key in sides if key.startswith("queue")]:
            sides[key].close()
    names = {key: side.name for key, side in sides.items()}
    names["queue, 1 step"] += " of 1 step"
    names |= {key: f"{names[key]}, bfloat16" for key in sides if key.endswith(", bfloat16")}
    rows = []
    for key, own in times.items():
        row = {"side": names[key], **own.row()}
        if own.failed is None:
            row |= {
                "fps": round(1000 / own.median, 2),
                "x public": times["public"].median / own.median,
            }
        fell = getattr(sides[key], "fallback", None)
        way = next((way for way in reuse_rows.WAYS if key.endswith(f", {way}")), "the same")
        pictures = {"pictures": way}
        rows.append(row | pictures | ({"fell back": fell} if fell else {}))
    report.add("whole frames, the embedded model", rows, f"n = {n}, {kit.size} x {kit.size}")
    ms = {key: own.median for key, own in times.items() if not own.failed}
    bars(report, ms, names)
    with_reuse(report, ms, names)
    rows = []
    for way in reuse_rows.WAYS:
        near = reuse_rows.psnr(
            lambda way=way: rivals.Ours(kit, n, mode, reuse=reuse_rows.asked(way)),
            lambda: rivals.Ours(kit, n, mode), 1 if quick else reuse_rows.CLIPS,
        )  # fmt: skip
        rows.append({"pictures": way, **near})
    report.add("pictures with reuse against the whole network's", rows, "dB, eager")


def with_reuse(report: Report, ms: dict[str, float], names: dict[str, str]) -> None:
    """Bars of the rows whose pictures are others: beside the same pictures, not instead of them."""
    keys = [key for key in ms if "with reuse" in key and "bfloat16" not in key]
    if not keys:
        return
    for way in reuse_rows.WAYS:
        best = min((key for key in keys if key.endswith(f", {way}")), key=ms.get)
        for rival, least in (("public", 1.8), ("queue", 3.0)):
            name = f"fps / {names[rival]}, {names[best]}"
            report.bars.append(Bar(name, ms[rival] / ms[best], least=least))


def bars(report: Report, ms: dict[str, float], names: dict[str, str]) -> None:
    """The fastest way of the pack's against its rivals, in float32 and in bfloat16."""
    import torch

    best = min((k for k in ("ours", "ours, openvino") if k in ms), key=ms.get)
    for rival, least in (("public", 1.3), ("queue", 2.0)):
        ratio = ms[rival] / ms[best]
        report.bars.append(Bar(f"fps / {names[rival]}, {names[best]}", ratio, least=least))
    half = [key for key in ms if key.startswith("ours") and key.endswith("bfloat16")]
    if not half:
        return
    best = min(half, key=ms.get)
    # asked for on a processor with AMX; on another one it is only told
    amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    for rival, least in (("public", 2.5), ("queue", 3.5)):
        ratio = ms[rival] / ms[best]
        name = f"fps / {names[rival]}, {names[best]}"
        report.bars.append(Bar(name, ratio, least=least if amx else -math.inf))
        if f"{rival}, bfloat16" in ms:
            both = ms[f"{rival}, bfloat16"] / ms[best]
            report.bars.append(Bar(f"{name}, both in bfloat16", both, least=1.0))


def scale(report: Report, device: Device, frames: int) -> None:
    """Cost with the embedded model, eager.

    Against frames: whole ones at 64 x 64, n = 4; pixels: whole frames, n = 2; steps and frames per
    slot: ticks at 128 x 128.
    """
    import rivals
    import scaling
    from networks import embedded

    few, ours = frames < 100, rivals.Ours
    repeats = 3 if few else 9
    counts = [10, 20, 40] if few else [10, 20, 40, 80, 160, 320]
    # below, the networks' launches count; above, their attention grows with the square
    sizes = [192, 256, 384, 512]
    steps = {n: (n, "self-negative", 1) for n in (1, 2, 4, 8)}
    slots = {f: (1, "self-negative", f) for f in (1, 2, 4, 8)}
    small, middle = embedded(64), embedded(128)
    points = {
        "frames": scaling.frames(small, device, ours, counts, 4, 3),
        "pixels": scaling.pixels(middle, device, ours, sizes, 2, repeats),
        "pixels, the networks alone": scaling.pixels(
            middle, device, rivals.Floor, sizes, 2, repeats
        ),
        "steps": scaling.ticks(middle, device, ours, steps, repeats),
        "frames per slot": scaling.ticks(middle, device, ours, slots, repeats),
    }
    rows = [scaling.row(what, costs) for what, costs in points.items()]
    report.add("scaling, the embedded model", rows, "the least of several turns")
    report.bars.append(Bar("cost against frames, slope", rows[0]["slope"], 1.08, 0.92))
    report.bars.append(Bar("cost against pixels, slope", rows[1]["slope"], 1.1, 0.9))


def calmness(report: Report, quick: bool, docs: bool) -> None:
    """How calm the embedded model's pictures are, and what makes them so."""
    import calm

    calm.part(report, quick, docs)


def reusing(report: Report, quick: bool, docs: bool) -> None:
    """What Live Reuse saves with the embedded model, and how far its pictures are off."""
    import reuse

    reuse.part(report, quick, docs)


def patches(report: Report, quick: bool) -> None:
    """What Live Patchwork saves, how far its pictures are off, and whether they drift."""
    import patchwork

    patchwork.part(report, quick)


def house(report: Report, quick: bool) -> None:
    """Many streams behind one address: kills, scaling, overhead, tries (serve_bars.py)."""
    from serve_bars import serve

    serve(report, quick)


def ways(report: Report, quick: bool) -> None:
    """How late pictures are by each way in and out."""
    import ends_late

    ends_late.part(report, quick)


def main() -> int:
    args = options()
    engines.prepare(args.comfyui)
    sys.path.insert(0, str(ROOT / "tests"))
    logging.disable(logging.WARNING)
    import torch

    device, report = Device("cpu"), Report(args.json, measure.machine())
    cores = report.told["on"]["cores"]
    print(", ".join(f"{name} {value}" for name, value in report.told["on"].items()), flush=True)
    parts = {
        "counts": lambda: counts(report),
        "bookkeeping": lambda: bookkeeping(report, device, args.frames),
        "memory": lambda: memory(report, device),
        "live loop": lambda: live(report, args.frames),
        "whole frames": lambda: whole(report, device, args.frames),
        "scaling": lambda: scale(report, device, args.frames),
        "calm": lambda: calmness(report, args.quick, args.docs),
        "reuse": lambda: reusing(report, args.quick, args.docs),
        "patchwork": lambda: patches(report, args.quick),
        "serve": lambda: house(report, args.quick),
        "ends": lambda: ways(report, args.quick),
        "share": lambda: reuse_rows.share(report, device, 3 if args.quick else 9),
    }
    for name in PARTS:
        if name in args.only:
            # a second thread only waits where there is next to nothing to compute
            torch.set_num_threads(1 if name in LITTLE else cores)
            # the live loop's server has threads of its own
            plain = name in ("live loop", "ends")
            with report.part(name), contextlib.nullcontext() if plain else torch.inference_mode():
                parts[name]()
    report.add("the bars", [bar.row() for bar in report.bars])
    print(f"\n{args.json}; seconds: {report.seconds}")
    wrong = [bar.name for bar in report.bars if bar.counted and not bar.ok]
    return 1 if wrong or report.failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    sys.exit(main())
