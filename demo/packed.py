"""The pack as a package, for the scripts beside it that are run by their path.

`python demo/packed.py NAME ...` runs `main` of the module NAME beside it.
"""

import importlib
import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


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


def comfyui(folder):
    """Put a ComfyUI on the path and set it up for a script: on the CPU where there is no CUDA.

    Args:
        folder: str, where ComfyUI's main.py is.
    """
    sys.argv = sys.argv[:1]
    sys.path.insert(0, folder)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    comfy.cli_args.args.use_pytorch_cross_attention = True


if __name__ == "__main__":
    sys.exit(pack_module(f"demo.{sys.argv.pop(1)}").main())
