"""A UNet in the layout that tensor cores multiply, channels_last, while it is recorded.

ComfyUI's UNets are laid out [N, C, H, W]: every convolution then converts its input and its weight
and its result, and normalisation goes back and forth. On an H200 that is a third of a recorded
SD-Turbo call (docs/performance.md). A recording is made once and runs no Python of the model, so
while it is made the model can be led another way, with nothing changed that others would see.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels import group_norm_silu
from ..kernels.choice import place_unfit

# what a recording takes; benchmarks/gpu.py measures each of them both ways
CHANNELS_LAST = True
CUDNN_ATTENTION = True
OWN_WEIGHTS = True
FORCED = False  # also on a CPU and in float32, where it gains nothing: for tests

_LAST = torch.channels_last
_HALF = (torch.float16, torch.bfloat16)
_CLOSE = 0.05  # relative RMS; rounding in half precision gives 2e-3
_ROOM = 4  # how many times what our own weights take must be free on the device
# compute capabilities where cuDNN's attention is the faster one (H200: 1.5 to 1.65 times)
_CUDNN = (9, 10)
_LONG = 1024  # tokens from which on that holds

_own: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[_Weights]]" = weakref.WeakKeyDictionary()


class _Weights:
    """Convolutions' weights in channels_last, beside the model's own: shared by its recordings.

    Attributes:
        size: bytes.
    """

    def __init__(self, module: nn.Module):
        self._kept = [
            (weakref.ref(conv), torch.empty_like(conv.weight, memory_format=_LAST))
            for conv in _convolutions(module)
        ]
        self.size = sum(copy.nbytes for _, copy in self._kept)
        self.read()

    def read(self) -> None:
        """Take the values that the model's weights have now."""
        for conv, copy in self._kept:
            copy.copy_(conv().weight)

    def named(self) -> list[tuple[nn.Conv2d, Tensor]]:
        return [(conv(), copy) for conv, copy in self._kept]


class Led:
    """Leads a UNet through channels_last while `inside`; where that does not suit it, nothing is.

    Args:
        module: a UNet of convolutions [N, C, H, W], its weights where they are computed with.

    Attributes:
        active: whether it does anything.
        reason: why not, where it was tried on and did not fit.
        size: bytes of our own weights; 0 without.
    """

    reason = ""

    def __init__(self, module: nn.Module):
        self._module = module
        self._weights: _Weights | None = None
        self.active = FORCED or (CHANNELS_LAST and _suits(module))
        if self.active and OWN_WEIGHTS:
            self._weights = _weights_of(module)

    @property
    def size(self) -> int:
        return 0 if self._weights is None else self._weights.size

    def try_on(self, call: Callable[[], Tensor]) -> None:
        """Compare both ways; where a UNet computes something else when it is led, it is not.

        Args:
            call: of the module, the same at each call.
        """
        if not self.active:
            return
        plain = call().float()
        with self.inside():
            led = call().float()
        error = float((led - plain).square().mean().sqrt() / plain.square().mean().sqrt())
        if not error <= _CLOSE:
            self.active, self._weights = False, None
            self.reason = f"channels_last gives another result (relative error {error:.1g})"
            logging.warning("LiveDiffusion: recorded as it is: %s", self.reason)

    def told(self) -> dict[str, Any]:
        """For the live stats."""
        told = {"channels_last": self.active, "own_weights_mb": round(self.size / 2**20, 1)}
        return {**told, "reason": self.reason} if self.reason else told

    def read(self) -> None:
        """The weights have new values."""
        if self._weights is not None:
            self._weights.read()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """While this lasts, the module takes and gives what it did, and is channels_last inside.

        Whoever keeps to its own layout in there sees it: `.contiguous()` leaves a picture that is
        channels_last as it is.
        """
        if not self.active:
            yield
            return
        norms, silus = _norms(self._module)
        changed: list[nn.Module] = [self._module]
        before = self._module.__dict__.get("forward")
        try:
            self._module.forward = functools.partial(_forward, self._module.forward)
            for norm, followed in norms:
                changed.append(norm)
                norm.forward = functools.partial(_norm, weakref.ref(norm), followed)
            for silu in silus:
                changed.append(silu)
                silu.forward = _same
            for conv, weight in self._weights.named() if self._weights is not None else ():
                changed.append(conv)
                conv.forward = functools.partial(_convolve, weakref.ref(conv), weight)
            yield
        finally:
            for part in changed:
                part.__dict__.pop("forward", None)
            if before is not None:
                self._module.forward = before


def _suits(module: nn.Module) -> bool:
    weight = next((conv.weight for conv in _convolutions(module)), None)
    return weight is not None and weight.dtype in _HALF and not place_unfit(weight)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """Those whose weights are plain numbers that another layout is another order of.

    A 1 x 1 kernel is the same either way.
    """
    return [
        part for part in module.modules()
        if isinstance(part, nn.Conv2d) and type(part.weight) in (nn.Parameter, Tensor)
        and part.padding_mode == "zeros" and part.weight.shape[2:].numel() > 1
        and not getattr(part, "comfy_cast_weights", False)
    ]  # fmt: skip


def _weights_of(module: nn.Module) -> _Weights | None:
    known = _own.get(module)
    weights = None if known is None else known()
    if weights is None:
        size = sum(conv.weight.nbytes for conv in _convolutions(module))
        if not FORCED and torch.cuda.mem_get_info()[0] < _ROOM * size:
            return None
        weights = _Weights(module)
        _own[module] = weakref.ref(weights)
    else:
        weights.read()
    return weights


def _norms(module: nn.Module) -> tuple[list[tuple[nn.GroupNorm, bool]], list[nn.SiLU]]:
    """Each GroupNorm, whether a SiLU follows it, and those that do."""
    silus: dict[nn.Module, nn.SiLU] = {}
    # where the time's scale and shift go between them
    apart = {
        id(part.out_layers) for part in module.modules()
        if getattr(part, "use_scale_shift_norm", False) and hasattr(part, "out_layers")
    }  # fmt: skip
    for several in (part for part in module.modules() if isinstance(part, nn.Sequential)):
        for norm, silu in zip(several, list(several)[1:], strict=False):
            if id(several) in apart:
                continue
            if isinstance(norm, nn.GroupNorm) and isinstance(silu, nn.SiLU):
                silus[norm] = silu
    norms = [
        (part, part in silus) for part in module.modules()
        if isinstance(part, nn.GroupNorm) and part.weight is not None
        and (FORCED or not place_unfit(part.weight))
    ]  # fmt: skip
    return norms, [silus[norm] for norm, followed in norms if followed]


def _norm(norm: Callable[[], nn.GroupNorm], silu: bool, x: Tensor) -> Tensor:
    own = norm()
    return group_norm_silu(x, own.num_groups, own.weight, own.bias, own.eps, silu)


def _convolve(conv: Callable[[], nn.Conv2d], weight: Tensor, x: Tensor) -> Tensor:
    own = conv()
    return F.conv2d(x, weight, own.bias, own.stride, own.padding, own.dilation, own.groups)


def _same(x: Tensor) -> Tensor:
    return x


def _forward(forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    with _Led():
        out = forward(x.contiguous(memory_format=_LAST), *args, **kwargs)
    return out.contiguous()


class _Led(TorchFunctionMode):
    """Pictures that are channels_last count as contiguous; long attention is cuDNN's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.contiguous and len(args) == 1 and not kwargs:
            x = args[0]
            if x.ndim == 4 and x.is_contiguous(memory_format=_LAST):
                return x
        if func is Tensor.index_select and args[0].ndim == 4 and args[1] == 0:
            x = args[0]
            if x.is_contiguous(memory_format=_LAST):  # torch's own would be contiguous
                rows = func(x.permute(0, 2, 3, 1), *args[1:], **kwargs)
                return rows.permute(0, 3, 1, 2)
        if func is F.scaled_dot_product_attention and _cudnn(*args[:2]):
            from torch.nn.attention import SDPBackend, sdpa_kernel

            first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                     SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # fmt: skip
            with sdpa_kernel(first, set_priority=True):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _cudnn(q: Tensor | None = None, k: Tensor | None = None) -> bool:
    if not CUDNN_ATTENTION or q is None or k is None or not q.is_cuda or q.dtype not in _HALF:
        return False
    long = min(q.shape[-2], k.shape[-2]) >= _LONG
    return long and torch.cuda.get_device_capability(q.device)[0] in _CUDNN
