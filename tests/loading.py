"""What loaders of ComfyUI would read from files, given to them from memory."""

import contextlib
import unittest.mock

import families
import parts
import tiny
import torch


def hypernetwork():
    """A hypernetwork's state dict, for the text's width."""
    width = tiny.CONTEXT

    def layer(seed):
        return {
            "linear.0.weight": parts.noise(seed, width, width)[0] * 0.2,
            "linear.0.bias": torch.zeros(width),
        }

    return {str(width): [layer(1), layer(2)]} | {width: [layer(1), layer(2)]}


@contextlib.contextmanager
def loaded(what, family):
    """Lets a loader find `what` ("" for nothing): its file is there and holds this."""
    if not what:
        yield
        return
    model = families.model(family).clone()
    found = {
        "checkpoint": ("comfy.sd.load_checkpoint_guess_config", (model, None, None, None)),
        "unet": ("comfy.sd.load_diffusion_model", model),
        "lora": ("comfy.utils.load_torch_file", parts.lora(family)),
        "hypernetwork": ("comfy.utils.load_torch_file", hypernetwork()),
    }
    target, value = found[what]

    def give(*_, return_metadata=False, **__):
        return (value, {}) if return_metadata else value

    with contextlib.ExitStack() as stack:
        for name in (target, *_ALSO.get(what, ())):
            stack.enter_context(unittest.mock.patch(name, give))
        path = unittest.mock.patch("folder_paths.get_full_path_or_raise", lambda *_: "a file")
        stack.enter_context(path)
        yield


_ALSO = {"checkpoint": ("comfy.sd.load_checkpoint",)}
