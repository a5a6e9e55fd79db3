"""What ComfyUI's own nodes that save work in a UNet gain on a stream: ToMe, HyperTile, Deep Shrink.

    python benchmarks/patches.py --comfyui FOLDER [--sizes 512 1024] [--rounds 2] [--only WORD ...]

SD1.5's layout with random weights, a stream of one slot without guidance, so that a frame is one
row of one call. Ways take turns in one process, and what is compared is processor time, which
others on the machine hardly change. FLOPs are counted by torch, in matrix products and
convolutions; ComfyUI's attention is of that kind on a processor.
"""

import argparse
import json
import pathlib
import statistics
import time

import engines
from measure import table

LEVELS, SEED = (3.0, 0.0), 11
# a shrunk picture up to which noise level, as a share of the way: here at the stream's own
SHRINK = {"start_percent": 0.0, "end_percent": 1.0}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="patches.py")
    parser.add_argument("--comfyui", type=pathlib.Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="in pixels")
    parser.add_argument("--rounds", type=int, default=2, help="frames of each way (default 2)")
    parser.add_argument("--only", nargs="+", help="ways whose names have one of these in them")
    parser.add_argument("--json", type=pathlib.Path, help="also write the table there")
    return parser.parse_args()


def network():
    """SD1.5's UNet as ComfyUI builds it, with random weights."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15({
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768,
        "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False,
        "use_linear_in_transformer": False, "adm_in_channels": None, "dtype": torch.float32,
    })  # fmt: skip
    torch.manual_seed(0)
    base = comfy.model_base.BaseModel(config).eval().requires_grad_(False)
    for value in base.diffusion_model.parameters():
        # norms around one, so that the picture reaches every layer
        torch.nn.init.normal_(value, 1.0 if value.ndim == 1 else 0.0, value[0].numel() ** -0.5)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def ways(model):
    """What is hung on the MODEL, by name."""
    from comfy_extras.nodes_freelunch import FreeU_V2
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
    from comfy_extras.nodes_tomesd import TomePatchModel

    def first(out):
        return (out if isinstance(out, tuple) else out.args)[0]

    return {
        "nothing": model,
        "ToMe, 0.3": first(TomePatchModel.execute(model, 0.3)),
        "ToMe, 0.5": first(TomePatchModel.execute(model, 0.5)),
        "HyperTile, 256": first(HyperTile.execute(model, 256, 2, 0, False)),
        "FreeU V2": first(FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)),
        "Deep Shrink, block 3, 2 x": first(PatchModelAddDownscale.execute(
            model, 3, 2.0, **SHRINK, downscale_after_skip=True, downscale_method="bicubic",
            upscale_method="bicubic",
        )),
    }  # fmt: skip


def measured(model, size: int, rounds: int, only: list[str]) -> list[dict]:
    """Processor seconds and FLOPs of a frame, by way."""
    import comfy.samplers
    import torch
    from livediffusion.host.sampling.stream import Settings, Stream
    from torch.utils.flop_counter import FlopCounterMode

    class Basic(comfy.samplers.CFGGuider):
        """ComfyUI's Guider_Basic."""

        def set_conds(self, positive):
            self.inner_set_conds({"positive": positive})

    latent = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    prompt = [[torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(2)), {}]]
    streams, frames, roads, flops, seconds = {}, {}, {}, {}, {}
    for name, patched in ways(model).items():
        if only and not any(word in name for word in only):
            continue
        streams[name], guider = Stream(1), Basic(patched)
        guider.set_conds(prompt)
        settings = Settings(LEVELS, "euler", SEED)
        frames[name] = lambda s=streams[name], g=guider, t=settings: s.run(g, latent, t)
        seconds[name] = []
    frames["nothing"]()  # who is first would pay for what is touched first
    for _ in range(rounds):
        for name, frame in frames.items():
            # counting takes next to nothing beside products of this size
            with FlopCounterMode(display=False) as counter:
                began = time.process_time()
                frame()
                seconds[name].append(time.process_time() - began)
            flops[name] = counter.get_total_flops()
            roads[name] = streams[name].roads()["road"]
    least = {name: min(own) for name, own in seconds.items()}
    return [
        {
            "size": size, "on the MODEL": name, "road": roads[name],
            "TFLOPs": round(flops[name] / 1e12, 3),
            "x FLOPs": round(flops[name] / flops["nothing"], 3),
            "CPU s": round(statistics.median(own), 2), "least": round(least[name], 2),
            "x time": round(least[name] / least["nothing"], 3),
        }
        for name, own in seconds.items()
    ]  # fmt: skip


def main() -> None:
    args = options()
    engines.prepare(args.comfyui)
    import torch

    torch.set_num_threads(1)
    model, rows = network(), []
    for size in args.sizes:
        rows += measured(model, size, args.rounds, ['nothing', *args.only] if args.only else [])
        print(table(rows), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
