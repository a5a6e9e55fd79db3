"""`python run.py engines`: does every engine that is installed here work, and what does it give?

The embedded model as a stream of four slots, residual guidance, 256 x 256. Each engine's frames are
compared with eager's; times are medians of ticks taken in turns, so that a busy machine slows all.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import pathlib
import platform
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
# engines in less precision; how far their frames may be from eager's float32
ROUNDED = {"eager bfloat16": 0.05, "openvino bfloat16": 0.05, "openvino int8": 0.2}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py engines")
    parser.add_argument("--comfyui", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--ticks", type=int, default=60, help="measured ticks (default 60)")
    parser.add_argument("--only", nargs="+", help="these engines only")
    parser.add_argument("--json", type=pathlib.Path, help="also write the table there")
    return parser.parse_args()


def prepare(comfyui: pathlib.Path) -> None:
    """ComfyUI and the pack, importable."""
    sys.path.insert(0, str(comfyui))
    sys.argv = sys.argv[:1]
    import torch

    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import utils.install_util  # noqa: F401

    spec = importlib.util.spec_from_file_location(
        "livediffusion", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["livediffusion"] = module
    spec.loader.exec_module(module)
    logging.getLogger().setLevel(logging.ERROR)


class Way:
    """One engine with a stream of its own.

    Attributes:
        ready: seconds until the first frame had left, making the engine included.
        times: milliseconds of each measured tick.
    """

    def __init__(self, name: str, model, conditioning):
        from livediffusion.engine.guidance import Guidance
        from livediffusion.host.models.engines import engine_of
        from livediffusion.host.sampling.guider import RCFGGuider
        from livediffusion.host.sampling.stream import Stream

        self.name, self.stream = name, Stream()
        self.guider = RCFGGuider(model, Guidance("self-negative", 1.4, 0.5))
        self.guider.set_conds(conditioning, conditioning)
        self.attached = engine_of(model)
        self.times: list[float] = []
        self.ready = 0.0

    def tick(self, latents, settings):
        import torch

        began = time.perf_counter()
        out = self.stream.run(self.guider, latents, settings)
        if latents.is_cuda or torch.cuda.is_available():
            torch.cuda.synchronize()
        return out, 1000 * (time.perf_counter() - began)


def models(only, base, place):
    """(name, MODEL or the reason why there is none) for each engine."""
    import comfy.model_management
    import folder_paths
    from livediffusion.compiled import choice
    from livediffusion.compiled.trt import api, files
    from livediffusion.host.models import engines, tensorrt

    device = comfy.model_management.get_torch_device()
    for name in (*choice.ENGINES, *ROUNDED, *api.MODULES):
        if (only and name not in only) or name == "eager":
            continue
        if name not in api.MODULES:
            engine, _, precision = name.partition(" ")
            wish = choice.Wish(precision or "default")
            reason = choice.missing(engine, device, wish) or without_cuda(engine, device)
            make = lambda engine=engine, wish=wish: choice.make(engine, device, wish)  # noqa: E731
            yield name, reason or engines.attach(base, engines.Attached(engine, "", make))
            continue
        reason = api.missing()
        if reason is None and not api.installed(name):
            reason = f"{name} not installed: {api.HOW[name]}"
        if reason:
            yield name, reason
            continue
        folder_paths.models_dir = str(place)
        try:
            precision = "fp16" if base.model_dtype().itemsize == 2 else "fp32"
            asked = tensorrt.wish(base, 256, 256, 4, 77, False, precision, library=name)
            path = tensorrt.build(base, asked, "check", lambda *told: None)
            sidecar = files.check(path, tensorrt.here)
            yield name, tensorrt.run_on(base, path, sidecar, lambda text: None)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"


def without_cuda(name: str, device) -> str | None:
    """Why ONNX Runtime would run on the CPU though the model does not; None where it would not."""
    if name != "onnxruntime" or device.type != "cuda":
        return None
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return "this onnxruntime has no CUDA: pip install onnxruntime-gpu in its place"


def main() -> int:
    args = options()
    prepare(args.comfyui)
    import torch

    with torch.inference_mode(), tempfile.TemporaryDirectory() as place:
        rows = measure(args, pathlib.Path(place))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    head = f"torch {torch.__version__}, {where or platform.machine()}"
    print(f"\n{head}\n\n{table(rows)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"on": head, "engines": rows}, indent=1), encoding="utf-8")
    return 1 if any(row.get("wrong") for row in rows) else 0


def measure(args: argparse.Namespace, place: pathlib.Path) -> list[dict]:
    import comfy.model_management
    import torch
    from livediffusion.demo import loader
    from livediffusion.host.sampling.stream import Settings
    from livediffusion.schedules.timesteps import from_strength

    base, clip, _ = loader.load()
    tokens = clip.tokenize("neon night")
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    sampling = base.get_model_object("model_sampling")
    sigmas = from_strength(sampling.sigmas, 4, 0.6, "uniform t", False)
    settings = Settings(tuple(float(s) for s in sigmas))
    generator = torch.Generator().manual_seed(0)
    device = comfy.model_management.get_torch_device()
    shape = 1, base.model.latent_format.latent_channels, 64, 64  # 256 x 256 pixels
    frames = [torch.randn(shape, generator=generator).to(device) for _ in range(8)]
    eager = Way("eager", base, conditioning)
    ways, rows = [eager], []
    for name, model in models(args.only, base, place):
        if isinstance(model, str):
            rows.append({"engine": name, "missing": model})
            continue
        print(f"- {name}", flush=True)
        way = Way(name, model, conditioning)
        began = time.perf_counter()
        for i in range(8):
            way.tick(frames[i % 8], settings)
        way.ready = time.perf_counter() - began
        ways.append(way)
    errors = compare(ways, frames, settings, args.ticks)
    for way in ways:
        own = {"engine": way.name, "ms": statistics.median(way.times), "ready": way.ready}
        own["speed"] = statistics.median(eager.times) / own["ms"]
        own["error"] = errors[way.name]
        own["wrong"] = own["error"] > ROUNDED.get(
            way.name, 2e-2 if base.model_dtype().itemsize == 2 else 1e-3
        )
        if way.attached is not None:
            own |= {"fallbacks": way.attached.fell_back, "reason": way.attached.reason}
            own["wrong"] |= way.attached.fell_back > 0
        rows.append(own)
    return rows


def compare(ways: list[Way], frames: list, settings, ticks: int) -> dict[str, float]:
    """Ticks of all ways in turns; returns the largest relative error of each against eager."""
    errors = dict.fromkeys((way.name for way in ways), 0.0)
    for way in ways:
        with contextlib.suppress(AttributeError):
            way.stream.ring.clear()
    for i in range(ticks + 8):
        truth = None
        for way in ways:
            # an engine's threads spin for a while after its work, and would slow the one after it
            time.sleep(0.05)
            out, spent = way.tick(frames[i % 8], settings)
            if truth is None:
                truth = out.double()
            gone = (out.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
            errors[way.name] = max(errors[way.name], float(gone))
            if i >= 8:
                way.times.append(spent)
    return errors


def table(rows: list[dict]) -> str:
    lines = [f"{'engine':<18}{'ms/tick':>9}{'x eager':>9}{'error':>10}{'ready in':>10}"]
    for row in sorted(rows, key=lambda row: row.get("ms", 1e9)):
        if "missing" in row:
            lines.append(f"{row['engine']:<18}{row['missing']}")
            continue
        lines.append(
            f"{row['engine']:<18}{row['ms']:>9.2f}{row['speed']:>9.2f}{row['error']:>10.1e}"
            f"{row['ready']:>9.1f}s" + ("  WRONG" if row["wrong"] else "")
        )
        if row.get("reason"):
            lines.append(f"{'':<18}{row['fallbacks']} calls ran eager: {row['reason']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
