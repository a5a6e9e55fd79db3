"""ComfyUI moving a model's weights, on a CPU, where they would stay in place.

What lies in the memory that they leave is overwritten, as another model's weights would do it.
"""


def elsewhere(patcher, part=""):
    """Every weight to other memory, as if it had been unloaded and loaded again; calls nobody.

    Args:
        part: only weights whose name begins with this.
    """
    for name, weight in patcher.model.diffusion_model.named_parameters():
        if name.startswith(part):
            old, weight.data = weight.data, weight.data.clone()
            old.fill_(float("nan"))
            _kept.append(old)
    del _kept[:-2000]


def partly_unloaded(patcher, size=20_000):
    """ComfyUI has taken some bytes of a model's memory for something else; calls nobody."""
    import comfy.model_management

    entry = next(
        entry
        for entry in comfy.model_management.current_loaded_models
        if entry.model.model is patcher.model
    )
    before = patcher.model.model_loaded_weight_memory
    assert entry.model.partially_unload(entry.model.offload_device, size) > 0
    assert patcher.model.model_loaded_weight_memory < before and patcher.model.model_lowvram
    for module in patcher.model.diffusion_model.modules():
        if getattr(module, "comfy_patched_weights", None) is False:
            for weight in module.parameters(recurse=False):
                old, weight.data = weight.data, weight.data.clone()
                old.fill_(float("nan"))
                _kept.append(old)
    del _kept[:-2000]


_kept = []  # so that nothing right comes to lie in the old memory again
