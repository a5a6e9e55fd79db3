"""Whether a MODEL's weights are the same as before, and where they were.

ComfyUI moves weights without telling anybody: its free_memory may call partially_unload, which
calls no callback and leaves patches_uuid as it is, and a later load through another clone brings
them back to as many loaded bytes at other addresses. So everything that keeps what it made of the
weights, or where they lie, asks here.
"""

import weakref
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher

from ...compiled.weights import addresses


class Weights(NamedTuple):
    """The state of a MODEL's weights; equal where they are the same, in the same place.

    Attributes:
        patches: of the MODEL that asks (patches_uuid).
        loaded: the patches that are in the weights now, None for none.
        device: where ComfyUI has put the model.
        size: bytes of it that are loaded.
        lowvram: some weights stay behind and are moved and patched call by call.
        patched: weights that were made to be patched call by call; ComfyUI only counts up.
        at: addresses of all parameters and buffers of the diffusion model. They tell of a weight
            that is patched by a function, too: ComfyUI puts its unpatched original in its place.
    """

    patches: Any
    loaded: Any
    device: Any
    size: int
    lowvram: bool
    patched: int
    at: tuple[int, ...]


def weights_version(patcher) -> Weights:
    """The state of a ModelPatcher's weights, to be compared with that of another time.

    Weights that hooks change while sampling are not told apart. With ComfyUI's dynamic VRAM it
    tells where they wait, since pages have no address to rely on.
    """
    model = patcher.model
    return Weights(
        patcher.patches_uuid,
        model.current_weight_patches_uuid,
        model.device,
        model.model_loaded_weight_memory,
        model.model_lowvram,
        model.lowvram_patch_counter,
        addresses(model.diffusion_model),
    )


def loaded(patcher) -> bool:
    """True where ComfyUI has nothing to load before it samples with this ModelPatcher.

    That is also what loads with it: models of its patches, an engine's memory. A model that does
    not fit in whole is never loaded: ComfyUI tries to bring in more of it each time.
    """
    there = {id(entry.model) for entry in comfy.model_management.current_loaded_models}
    others = (*patcher.get_nested_additional_models(), *patcher.model_patches_models())
    return all(id(one) in there and _complete(one) for one in (patcher, *others))


def _complete(patcher) -> bool:
    """True where the weights are on their device as patched (ModelPatcher.partially_load)."""
    model = patcher.model
    if model.current_weight_patches_uuid != patcher.patches_uuid:
        return False
    if patcher.current_loaded_device() != patcher.load_device:
        return False
    if getattr(patcher, "is_dynamic", lambda: False)():
        # weights come page by page; what has no pages, and the buffers, is loaded or is not
        return model.model_loaded_weight_memory > 0
    return not model.model_lowvram


# of a network whose weights are paged, a patcher of one that was loaded without pages
_unpaged: weakref.WeakKeyDictionary[Any, comfy.model_patcher.ModelPatcher] = (
    weakref.WeakKeyDictionary()
)


def staying(patcher):
    """A clone whose weights lie as they are computed with.

    Paged ones (ComfyUI's dynamic VRAM) are cast call by call. In their place is a network loaded
    once more, without pages, which all clones share for as long as the paged one is there: a node
    with settings that are moved while it is live, or behind a LoRA that is, asks for another clone
    each time.

    Raises:
        ValueError: the MODEL has only paged ones.
    """
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return patcher.clone()
    still = _unpaged.get(patcher.model)
    if still is None:
        made = _unpaged_clone(patcher)
        # of the network alone: what hangs on the MODEL may know the paged one
        still = type(made)(made.model, made.load_device, made.offload_device)
        _unpaged[patcher.model] = still
    clone = patcher.clone(disable_dynamic=True, model_override=still.get_clone_model_override())
    clone.parent = still  # by whom ComfyUI finds the weights when the clone is gone
    return clone


def _unpaged_clone(patcher):
    """A clone of a MODEL with paged weights, of a network that was loaded without pages.

    Raises:
        ValueError: its loader gives none.
    """
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ValueError(
            f"model: its loader gives no weights that stay in place ({error}). Load it with a "
            "stock loader, or start ComfyUI with --disable-dynamic-vram."
        ) from error
