"""Train the embedded model: python demo/train.py --comfyui PATH --out demo/weights --seed 0.

Draws its own pictures, trains the autoencoder, then UNet and text encoder, and writes fp16
safetensors with the loss curves. Uses CUDA if there is one; made for two CPU cores in an hour.
"""

import argparse
import importlib.util
import logging
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORK = str(pathlib.Path(tempfile.gettempdir()) / "livediffusion_demo")


def pack_module(name):
    """Import a module of the pack under the alias the tests use."""
    if "livediffusion" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "livediffusion", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["livediffusion"] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"livediffusion.{name}")


def main():
    """Read the options, put ComfyUI on the path, train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--out", default=str(ROOT / "demo" / "weights"))
    parser.add_argument("--work", default=WORK, help="pictures, latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=1600)
    parser.add_argument("--autoencoder-minutes", type=float, default=6.5)
    parser.add_argument("--minutes", type=float, default=32, help="of UNet and text encoder")
    parser.add_argument("--decoder-minutes", type=float, default=4, help="of decoder, at the end")
    parser.add_argument("--resume", action="store_true", help="go on from UNet and text in --out")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    sys.argv = sys.argv[:1]
    sys.path.insert(0, options.comfyui)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True
    pack_module("demo.training").run(options)


if __name__ == "__main__":
    main()
