"""What hangs on a MODEL and on the options of a call, and whether it is ours."""

from typing import Any

ENGINE = "livediffusion.engine"  # key of an engine's wrappers and callbacks


def empty(value: Any) -> bool:
    """True for a dict, list or tuple in which there is nothing, however nested."""
    if isinstance(value, dict):
        return all(empty(v) for v in value.values())
    return isinstance(value, list | tuple) and not value


def foreign(hung: dict[str, dict[str, list]]) -> bool:
    """True where wrappers or callbacks, by kind and key, are there that are not an engine's."""
    return any(value for by_key in hung.values() for key, value in by_key.items() if key != ENGINE)


def unet_parts(patcher) -> list[str]:
    """Names of the UNet's parts that nodes have replaced by others (object patches)."""
    return [name for name in patcher.object_patches if name.startswith("diffusion_model")]
