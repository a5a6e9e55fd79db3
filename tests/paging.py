"""ComfyUI's dynamic VRAM without a GPU: its own patcher and its own owners of memory
(comfy_aimdo), over a library that only counts.

What a real card does on a second free of a pointer is a segfault; here it is in `wrong`.
"""

import contextlib
import gc
import itertools

import pytest
import torch

DEVICE = torch.device("cpu", 0)  # ComfyUI's patcher takes it for one that is no CPU


class Library:
    """Of comfy_aimdo, as far as loading a model asks it.

    Attributes:
        held: pointers that somebody owns.
        wrong: what would end the process on a card, in words.
    """

    def __init__(self):
        self.held: set[int] = set()
        self.wrong: list[str] = []
        self._next = itertools.count(1 << 20, 1 << 20)

    def vbar_allocate(self, *size):
        self.held.add(pointer := next(self._next))
        return pointer

    hostbuf_allocate = vbar_allocate

    def vbar_get(self, context, pointer):
        return pointer << 20

    def vbar_free(self, context, pointer):
        self.hostbuf_free(pointer)

    def hostbuf_free(self, pointer):
        if pointer not in self.held:
            self.wrong.append(f"freed again: {pointer:x}")
        self.held.discard(pointer)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: 1


@contextlib.contextmanager
def library():
    """The library in the place of comfy_aimdo's; whatever was loaded over it is let go at the
    end."""
    control = pytest.importorskip("comfy_aimdo.control")
    import comfy.model_management
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar

    parts = [control, comfy_aimdo.host_buffer, comfy_aimdo.model_vbar]
    kinds = [comfy_aimdo.model_vbar.ModelVBAR, comfy_aimdo.host_buffer.HostBuffer]
    lib = Library()

    def copying(self, protocol):
        lib.wrong.append(f"a {type(self).__name__} was copied")
        return object.__reduce_ex__(self, protocol)

    def is_cpu(device):
        return torch.device(device).type == "cpu" and torch.device(device).index is None

    with pytest.MonkeyPatch.context() as patch:
        for part in parts:
            patch.setattr(part, "lib", lib)
        patch.setattr(control, "get_devctx", lambda device: None)
        patch.setattr(comfy.model_management, "is_device_cpu", is_cpu)
        for kind in kinds:
            patch.setattr(kind, "__reduce_ex__", copying)
        try:
            yield lib
        finally:
            gc.collect()
            for one in gc.get_objects():
                if type(one) in kinds:
                    one._ptr = None
                elif issubclass(type(one), torch.nn.Module):
                    vars(one).get("dynamic_patchers", set()).clear()  # whose end unloads the model


@contextlib.contextmanager
def untouched(lib):
    """What is done inside copies no owner of memory and nothing that is pinned, and frees
    nothing."""
    held, Pinned.copies = set(lib.held), 0
    yield
    gc.collect()
    assert lib.wrong == [] and lib.held >= held
    assert Pinned.copies == 0


def page(model):
    """Load a model by pages, as ComfyUI does on NVIDIA; returns its patcher."""
    import comfy.model_patcher

    kind = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if kind is None:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    patcher = kind(model, DEVICE, torch.device("cpu"))
    patcher.load(DEVICE)
    _call(model)
    assert any(hasattr(part, "_v") for part in model.modules())
    return patcher


def _call(model):
    """What a call of each part leaves on it (comfy/ops.py, comfy/pinned_memory.py): views of its
    pages, and its weights in memory that is pinned."""
    for part in model.modules():
        state = vars(part).get("_pin_state")
        if state is None or not hasattr(part, "_v"):
            continue
        buffer, stack = state["weights"][:2]
        part._v_weight, part._v_bias = torch.zeros(8), None
        part._v_signature = (1, 2)
        pin = Pinned.of(torch.zeros(8), buffer)
        part._pins = {"weights": {
            "pin": pin, "registered": True, "stack_index": len(stack),
            "balancer_entry": [0, 0, part],
        }}  # fmt: skip
        part._pin = pin  # in earlier ComfyUIs
        stack.append((part, 0))


class Pinned(torch.Tensor):
    """Pinned memory, which nobody is to copy into RAM."""

    copies = 0

    @classmethod
    def of(cls, tensor, buffer):
        pinned = tensor.as_subclass(cls)
        pinned.untyped_storage()._comfy_hostbuf = buffer
        return pinned

    def __deepcopy__(self, memo):
        Pinned.copies += 1
        return self
