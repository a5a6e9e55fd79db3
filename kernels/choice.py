"""One op, two ways to run it: a plain torch reference, and a Triton kernel where it can run.

An op is its reference, decorated:

    @op("triton_pictures", unfit=_unfit)
    def picture_out(image: Tensor, layout: str, scale: float, shift: float) -> Tensor: ...

The kernel is the function of the same name in the module `triton_pictures` beside it, which
imports triton at its top and is imported by the first CUDA tensor that comes. Eager calls go to
the one or the other directly, because the dispatcher of a custom op costs tens of microseconds;
under torch.compile the call is the custom op `livediffusion::<name>`, whose fake is the reference.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor

OLDEST = (7, 5)  # compute capability that the kernels are compiled for in the tests
INDEX = 2**31  # the kernels count in 32 bits
BARE = (3, 3)  # Triton whose compiled kernels take addresses and all of their arguments

log = logging.getLogger(__name__)


@functools.cache
def triton_missing() -> str:
    """Why triton cannot be imported; empty when it is installed. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


@functools.cache
def gpu_unfit(index: int) -> str:
    """Why the kernels do not run on a CUDA device; empty when they do."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return "the GPU is older than sm_{}{}: sm_{}{}".format(*OLDEST, *capability)
    return ""


def place_unfit(*tensors: Tensor) -> str:
    """Why no kernel runs on these tensors, wherever they are used; empty when one does."""
    device = tensors[0].device
    if device.type != "cuda":
        return f"not a CUDA tensor but one on {device}"
    if any(tensor.device != device for tensor in tensors):
        return "the tensors are on different devices"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "the kernels have no gradient"
    return triton_missing() or gpu_unfit(device.index) or (capturing() and graph_unfit()) or ""


def driver_allocates() -> bool:
    """Whether memory is the driver's to give out, as ComfyUI sets it up (cudaMallocAsync)."""
    there = torch.cuda.is_available()
    return there and torch.cuda.get_allocator_backend() == "cudaMallocAsync"


@functools.cache
def graph_unfit() -> str:
    """Why no Triton kernel of ours can be captured into a CUDA graph; empty when one can."""
    if not driver_allocates():
        return ""
    if not triton_missing() and _triton() >= BARE:
        return ""
    # an older one asks the driver about every pointer (triton_launch.py)
    return (
        "this Triton does not take the memory that a graph gets of cudaMallocAsync: start ComfyUI "
        "with --disable-cuda-malloc"
    )


def _triton() -> tuple[int, ...]:
    return tuple(map(int, importlib.import_module("triton").__version__.split(".")[:2]))


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream, or was until it broke."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def unmapped() -> bool:
    """Whether what torch gives out now has no memory before the first replay of a CUDA graph."""
    return capturing() and driver_allocates()


def extent(tensor: Tensor) -> int:
    """Elements from the first of a tensor to its last in memory; 0 for an empty one."""
    if tensor.numel() == 0:
        return 0
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sides)


class Op:
    """An op with its two ways. Called like its reference; made by `op`.

    Attributes:
        failed: why the kernel was given up in this process; empty while it was not.
        reference: the plain torch function, the truth.
        unfit: takes the op's arguments, says which of its constraints they break.
        custom: the same as `torch.ops.livediffusion.<name>`.
    """

    def __init__(
        self, reference: Callable, module: str, unfit: Callable[..., str], mutates: tuple[str, ...]
    ):
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.unfit = unfit
        self._module = module
        self.failed = ""

        @functools.wraps(reference)
        def run(*args, **kwargs):
            return self._run(*args, **kwargs)

        self.custom = torch.library.custom_op(
            f"livediffusion::{reference.__name__}", run, mutates_args=mutates
        )
        self.custom.register_fake(reference)

    @functools.cached_property
    def launch(self) -> Callable:
        """The Triton way, without any check; importing it needs triton."""
        module = importlib.import_module(f".{self._module}", __package__)
        return getattr(module, self.__name__)

    def why_not(self, *args, **kwargs) -> str:
        """Why Triton does not run these arguments, in words; empty when it does."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return place_unfit(*tensors) or self.failed or self.unfit(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.custom(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args, **kwargs):
        if self.why_not(*args, **kwargs):
            return self.reference(*args, **kwargs)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        try:
            # triton launches on the current device, wherever the tensors are
            with torch.cuda.device(next(tensors).device):
                return self.launch(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if capturing():
                # the capture may be what it failed by, and is lost: outside of one it may well run
                raise
            failed = f"Triton failed: {type(error).__name__}: {error}"
        # where the arguments or the GPU are at fault this fails as well, and says so
        result = self.reference(*args, **kwargs)
        self.failed = failed
        log.warning("%s runs without its kernel from now on. %s", self.__name__, failed)
        return result


def op(
    module: str, unfit: Callable[..., str], mutates: tuple[str, ...] = ()
) -> Callable[[Callable], Op]:
    """Makes an op of its reference.

    Args:
        module: in this folder, with the Triton function of the same name and arguments.
        unfit: takes the same arguments and returns why the kernel cannot take them, as the rest
            of a sentence, or an empty string. Wrong arguments belong here as well: the reference
            then raises what is to be raised. Devices, gradients and triton are seen to already.
        mutates: names of the arguments that are written.

    The reference has annotations that a custom op understands, no defaults, and returns new
    tensors or nothing; it runs on fake tensors, so it never looks at values.
    """
    return lambda reference: Op(reference, module, unfit, mutates)
