"""What a live frame costs beside the UNet: our stream against ComfyUI's sampler, in one process.

    COMFYUI_PATH=... python benchmarks/bookkeeping.py [--frames 300]

The UNet is replaced by a function that returns its input, so that only bookkeeping is timed. Prints
a table and one line of JSON; times mean little between machines, ratios inside one run do.
"""

import argparse
import importlib.util
import json
import logging
import pathlib
import platform
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def timed(work, frames: int) -> float:
    """Median milliseconds of a call."""
    for _ in range(20):
        work()
    times = []
    for _ in range(frames):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=300)
    args = parser.parse_args()
    # the tests' set-up: the pack under its alias, ComfyUI as it makes itself, the tiny model
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    logging.disable(logging.INFO)

    import comfy.sample
    import tiny
    import torch
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.guider import RCFGGuider
    from livediffusion.host.stream import Settings, Stream

    model = tiny.model()
    model.model.diffusion_model.forward = lambda x, *args, **kwargs: x
    latent = torch.randn(1, 4, 64, 64)
    levels = {1: (3.0, 0.0), 2: (3.0, 1.0, 0.0), 4: (8.0, 3.0, 1.2, 0.5, 0.0)}

    def stock(n):
        def work():
            comfy.sample.sample(
                model, torch.zeros_like(latent), n, 1.0, "euler", "simple",
                tiny.conditioning(1), tiny.conditioning(2), latent, disable_pbar=True,
            )  # fmt: skip

        return work

    def stream(n, mode):
        guider = RCFGGuider(model, Guidance(mode, 1.4))
        conds = {"positive": tiny.conditioning(1), "negative": tiny.conditioning(2)}
        guider.inner_set_conds(conds)
        live, settings = Stream(), Settings(levels[n], "lcm", 0)
        return lambda: live.run(guider, latent, settings)

    baseline = timed(stock(1), args.frames)
    rows = {"ComfyUI comfy.sample.sample, 1 step": baseline}
    for n in levels:
        for mode in ("off", "self-negative", "onetime-negative", "full"):
            rows[f"stream n = {n}, {mode}"] = timed(stream(n, mode), args.frames)
    for name, ms in rows.items():
        sys.stdout.write(f"{name:<40}{ms:8.3f} ms{ms / baseline:8.2f} x\n")
    where = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    sys.stdout.write(json.dumps({"ms": rows, **where}) + "\n")


if __name__ == "__main__":
    main()
