"""Whether a MODEL's weights are as before, and where: nobody says when ComfyUI moves them."""

import gc

import moving
import pytest
import tiny
import torch
from compiled_models import patched

pytestmark = pytest.mark.comfy


@pytest.fixture
def model(comfyui):
    import comfy.model_management

    comfy.model_management.unload_all_models()
    patcher = tiny.model()
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def version(patcher):
    from livediffusion.host.models.weights import weights_version

    return weights_version(patcher)


def loaded(patcher):
    from livediffusion.host.models.weights import loaded

    return loaded(patcher)


def test_what_stays_is_the_same(model):
    import comfy.model_management

    before = version(model)
    comfy.model_management.load_models_gpu([model])
    assert version(model) == before and hash(version(model)) == hash(before)
    assert len(before.at) == len(list(model.model.diffusion_model.parameters()))
    assert loaded(model)


@pytest.mark.parametrize("move", [moving.elsewhere, moving.partly_unloaded])
def test_weights_that_moved_without_a_word(model, move):
    before = version(model)
    move(model)
    assert version(model) != before
    assert model.patches_uuid == model.model.current_weight_patches_uuid


def test_back_at_other_addresses_through_another_clone(model):
    """As many bytes as before, the same patches, and not the memory that they were in."""
    import comfy.model_management

    before = version(model)
    moving.partly_unloaded(model)
    assert not loaded(model)
    other = model.clone()
    comfy.model_management.load_models_gpu([other])
    now = version(model)
    assert now[:-1] == before[:-1] and now.at != before.at
    assert loaded(other) and not loaded(model)
    comfy.model_management.load_models_gpu([model])
    assert version(model) == now and loaded(model)


def test_a_lora_and_what_it_leaves(model):
    import comfy.model_management

    before = version(model)
    other = patched(model, 0.5)
    comfy.model_management.load_models_gpu([other])
    assert version(other) != before and not loaded(model) and loaded(other)
    moving.partly_unloaded(other)
    assert not loaded(other)
    comfy.model_management.load_models_gpu([other])
    assert loaded(other)


def test_replaced_weights_and_parts(model):
    """comfy's set_attr_param puts a new parameter in the old one's place, object patches a part."""
    import comfy.utils

    key = "diffusion_model.input_blocks.0.0.weight"
    before = version(model)
    weight = comfy.utils.get_attr(model.model, key)
    comfy.utils.set_attr_param(model.model, key, weight.detach().clone())
    now = version(model)
    assert sum(a != b for a, b in zip(before.at, now.at, strict=True)) == 1
    unet = model.model.diffusion_model
    whole, unet.out = unet.out, torch.nn.Linear(2, 2)
    changed = version(model)
    assert unet.out.weight.data_ptr() in changed.at and changed != now
    unet.out = whole
    assert version(model) == now
    bias, unet.out[-1].bias = unet.out[-1].bias, None
    assert len(version(model).at) == len(now.at) - 1
    unet.out[-1].bias = bias


def test_unloaded(model):
    import comfy.model_management

    before = version(model)
    comfy.model_management.unload_all_models()
    assert version(model) != before and not loaded(model)


def test_what_loads_with_it_is_part_of_it(model):
    """An engine's memory hangs on its MODEL: ComfyUI unloads it alone and loads them together."""
    import comfy.model_management

    memory = tiny.model(seed=1)
    model.set_additional_models("test", [memory])
    assert not loaded(model)
    comfy.model_management.load_models_gpu([model, memory])
    assert loaded(model)


def test_dynamic_vram_needs_what_has_no_pages():
    """0.33's partially_unload takes buffers and small weights off the device, if pages are not
    enough; a stand-in, since pages need a GPU."""
    import comfy.model_management
    from comfy.model_management import LoadedModel

    class Dynamic(type(tiny.model())):
        def is_dynamic(self):
            return True

    patcher = tiny.model()
    patcher.__class__ = Dynamic
    model = patcher.model
    model.current_weight_patches_uuid, model.model_loaded_weight_memory = patcher.patches_uuid, 64
    entry = LoadedModel(patcher)
    comfy.model_management.current_loaded_models.append(entry)
    try:
        model.model_lowvram = True
        assert loaded(patcher)
        model.model_loaded_weight_memory = 0  # ModelPatcherDynamic.restore_loaded_backups
        assert not loaded(patcher)
    finally:
        comfy.model_management.current_loaded_models.remove(entry)


def test_a_quantised_weight_has_its_address_in_its_parts():
    from livediffusion.compiled.weights import addresses

    class Quantised(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float16)

        def __init__(self, inner):
            self._qdata = inner

        def __tensor_flatten__(self):
            return ["_qdata"], None

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return cls(args[0]._qdata)  # detach

    module = torch.nn.Linear(3, 3)
    seen = []
    inner = [torch.zeros(3, 3, dtype=torch.int8) for _ in range(2)]
    for one in (*inner, inner[0]):
        module.weight = torch.nn.Parameter(Quantised(one), requires_grad=False)
        seen.append(addresses(module))
    assert seen[0] == seen[2] != seen[1]


def test_it_keeps_no_module_alive():
    import weakref

    from livediffusion.compiled.weights import addresses

    module = torch.nn.Linear(3, 3)
    addresses(module)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
