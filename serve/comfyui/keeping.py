"""What keepers import, and when they begin the next ComfyUI. Standard library only."""

import contextlib
import importlib
import pathlib
import socket
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

# What ComfyUI 0.33.0 imports and what of it costs 10 ms or more, in its order; tests/serve looks
# whether one asks for a GPU. comfy_kitchen does (its backends ask whether there is one), so it is
# not here; what it imports of torch is. A name behind a colon is what a lazy module is asked for.
PRELOADED = (
    "yaml", "sqlalchemy.orm", "sqlalchemy.dialects.sqlite", "alembic.command", "filelock",
    "PIL.Image", "PIL.ImageDraw", "tqdm", "numpy", "torch", "torch._dynamo", "safetensors.torch",
    "einops", "psutil", "scipy.ndimage", "scipy.integrate", "scipy.stats", "scipy.signal",
    "torchvision", "torchsde", "torchaudio", "transformers:CLIPTokenizer", "tokenizers", "av",
    "aiohttp.web", "requests", "pydantic", "pydantic_settings", "kornia", "spandrel",
)  # fmt: skip
CUDA = ("_cuda_init", "_cuda_getDeviceCount")  # of torch._C

_AT_ONCE = 2  # ComfyUIs that died before they answered, after which the next is begun later
_LATEST = 30.0  # seconds, the longest that is waited


def preload(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Import what ComfyUI will.

    Returns:
        What could not be imported, with the reason; and what has asked CUDA for a device.
    """
    missing, asked = [], []
    with contextlib.ExitStack() as watching:
        for name in names:
            module, _, attribute = name.partition(":")
            try:
                found = importlib.import_module(module)
                if attribute:
                    getattr(found, attribute)
            except Exception as reason:  # another ComfyUI may have no use for it
                missing.append(f"{name}: {reason}")
            if name == "torch" and "torch" in sys.modules:
                watching.enter_context(_watched(sys.modules["torch"]._C, asked))
    return missing, asked


@contextlib.contextmanager
def _watched(door: Any, asked: list[str]) -> Iterator[None]:
    """Note who goes through torch's ways to CUDA; each of them ends what a fork could use."""
    kept = {name: getattr(door, name) for name in CUDA if hasattr(door, name)}

    def noting(name: str, function):
        def noted(*args):
            ours = (__file__, str(pathlib.Path(sys.modules["torch"].__file__).parent / "cuda"))
            who = [f.filename for f in traceback.extract_stack() if not f.filename.startswith(ours)]
            asked.append(f"{name} by {who[-1]}")
            return function(*args)

        return noted

    for name, function in kept.items():
        setattr(door, name, noting(name, function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(door, name, function)


def later(mute: int) -> float:
    """Seconds until the next ComfyUI, after so many one after the other that never answered."""
    return min(_LATEST, 0.5 * 2 ** min(mute - _AT_ONCE, 10)) if mute > _AT_ONCE else 0.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
