"""ONNX files that several engines are made of: one export serves every shape of a UNet."""

import contextlib
import hashlib
import pathlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator

import torch

from .engine import Shapes, UNet
from .onnx_export import EVERY, export

_KEPT = 2  # files that stay for the next shape
_lock = threading.Lock()  # an export is of seconds, and two of them in turns are no faster
_files: OrderedDict[tuple, tempfile.TemporaryDirectory] = OrderedDict()


@contextlib.contextmanager
def exported(unet: UNet, shapes: Shapes, dtype: torch.dtype) -> Iterator[pathlib.Path]:
    """An ONNX file of a UNet with its weights as they are now, for every size and number of rows.

    It stays for as long as this lasts.

    Raises:
        Refused: see onnx_export.export.
    """
    with _lock:
        key = _digest(unet.module), shapes.graph, str(dtype)
        folder = _files.get(key)
        if folder is None:
            folder = tempfile.TemporaryDirectory(
                prefix="livediffusion-", ignore_cleanup_errors=True
            )
            try:
                export(
                    unet, shapes.example(), pathlib.Path(folder.name) / "unet.onnx", dtype,
                    EVERY,
                )  # fmt: skip
            except BaseException:
                folder.cleanup()
                raise
            _files[key] = folder
        _files.move_to_end(key)
        while len(_files) > _KEPT:
            _files.popitem(last=False)[1].cleanup()
        yield pathlib.Path(folder.name) / "unet.onnx"


def _digest(module: torch.nn.Module) -> str:
    """The same for the same network with the same weights, whoever holds it."""
    hashed = hashlib.sha256()
    for name, part in module.named_modules():
        # numbers of heads and groups are written nowhere else
        plain = sorted((k, v) for k, v in vars(part).items() if isinstance(v, _PLAIN))
        hashed.update(f"{name} {type(part).__qualname__} {plain}".encode())
    for name, weight in module.state_dict().items():
        hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().cpu().contiguous().view(-1)
        hashed.update(flat.view(torch.uint8).numpy())
    return hashed.hexdigest()


_PLAIN = (bool, int, float, str)
