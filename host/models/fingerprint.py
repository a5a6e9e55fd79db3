"""What a MODEL or a CONDITIONING is, as a short text that stays the same in another session."""

import hashlib
import uuid
import weakref
from typing import Any

import torch
from torch import Tensor

_PROBED = 64  # values of a big tensor that are looked at
_WHOLE = 1 << 20  # bytes below which all of a tensor is
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_strangers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def of_model(patcher) -> str:
    """Of a MODEL: its configuration, its weights by samples of each, and what is patched on it.

    Remembered for as long as neither the model nor its patches change.
    """
    what = patcher.patches_uuid, _settings(patcher)
    known = _known.get(patcher.model)
    if known is not None and what in known:
        return known[what]
    digest = hashlib.sha256()
    config = getattr(patcher.model.model_config, "unet_config", None)
    _feed(digest, [type(patcher.model).__name__, repr(sorted((config or {}).items(), key=str))])
    # where patches are baked in, the weight before them is in the backup
    weights = patcher.model.diffusion_model.state_dict(prefix="diffusion_model.")
    for name, weight in weights.items():
        kept = patcher.backup.get(name)
        _feed(digest, [name, weight if kept is None else kept.weight], whole=False)
    for name in sorted(patcher.patches, key=str):
        _feed(digest, [str(name), _patches(patcher.patches[name])], whole=False)
    digest.update(what[1].encode())
    text = digest.hexdigest()[:32]
    _known.setdefault(patcher.model, {})[what] = text
    return text


def of(value: Any) -> str:
    """Of a CONDITIONING, or of any value. What has no content that can be read is taken for itself:
    it is the same in this session only."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:32]


def _settings(patcher) -> str:
    """Of what nodes have hung on the model besides weights, and of its noise levels."""
    sampling = patcher.get_model_object("model_sampling")
    plain = {k: v for k, v in vars(sampling).items() if isinstance(v, int | float | str)}
    classes = [kind.__name__ for kind in type(sampling).__mro__]
    patches = {k: v for k, v in patcher.object_patches.items() if k != "model_sampling"}
    return of([classes, plain, dict(sampling.named_buffers()), patches, patcher.model_options])


def _patches(entries) -> list:
    """Of one weight: strengths and adapters without what ComfyUI has wrapped them in."""
    out = []
    for strength, adapter, model_strength, offset, _ in entries:
        inner = getattr(adapter, "weights", adapter)
        out.append([strength, model_strength, offset, type(adapter).__name__, inner])
    return out


def _feed(digest, value: Any, whole: bool = True) -> None:
    if isinstance(value, Tensor):
        value = getattr(value, "_qdata", value)  # a quantised weight's numbers
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        flat = value.detach().reshape(-1)
        if not (whole or flat.numel() <= _PROBED) or flat.nbytes > _WHOLE:
            flat = flat[torch.linspace(0, flat.numel() - 1, _PROBED).long().to(flat.device)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, str | int | float | bool | bytes | torch.dtype):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, dict):
        digest.update(f"dict{len(value)}".encode())
        for name in sorted(value, key=str):
            digest.update(str(name).encode())
            _feed(digest, value[name], whole)
    elif isinstance(value, list | tuple | set | frozenset):
        digest.update(f"list{len(value)}".encode())
        for one in sorted(value, key=str) if isinstance(value, set | frozenset) else value:
            _feed(digest, one, whole)
    else:
        try:
            text = _strangers.setdefault(value, uuid.uuid4().hex)
        except TypeError:
            text = uuid.uuid4().hex
        digest.update(text.encode())
