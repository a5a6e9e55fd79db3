"""What acts on a model call besides the model, and how much of the call it looks at.

A tick holds frames at different steps, so what a node has hung on a MODEL, a GUIDER or a
CONDITIONING is right for every row only if it looks at each row for itself. Nothing tells that of
a function but reading it: those below have been read, and tests/host/test_looks.py keeps them to
it. Everything else is taken to look at the level, the step, the batch and the calls before.
"""

import functools
import os
import sys
import types
import weakref
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import comfy.conds
import comfy.controlnet
import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP


class Look(IntEnum):
    """What something looks at; the more, the fewer frames may share its call."""

    ROWS = 0  # each row for itself
    LEVEL = 1  # the noise level, which it takes from the first row
    FRAME = 2  # anything: steps, calls, neighbours, or nobody knows


ENGINE = "livediffusion.engine"  # key of an engine's wrappers and callbacks
COUNT = "livediffusion.calls"  # key of what counts model calls
COHERENCE = "livediffusion.coherence"  # key of what lets frames help each other
NEIGHBOURS = "livediffusion.neighbours"  # of a call's options: who its rows are
EXCHANGE = "livediffusion.exchange"  # and what its layers read and write
# AnimateDiff-Evolved's words for a part of a batch, which other packs read too: places in the
# batch, its length, and that of the part
PLACE = "ad_params"
Found = tuple[Look, str]  # and what it is, for people

# functions of ComfyUI's own nodes, by file and name
_KNOWN = {
    ("comfy_extras/nodes_freelunch.py", "output_block_patch"): Look.ROWS,
    ("comfy_extras/nodes_hypernetwork.py", "__call__"): Look.ROWS,
    ("comfy_extras/nodes_model_downscale.py", "output_block_patch"): Look.ROWS,
    ("comfy_extras/nodes_model_downscale.py", "input_block_patch"): Look.LEVEL,
    ("comfy_extras/nodes_model_advanced.py", "rescale_cfg"): Look.LEVEL,
    ("comfy_extras/nodes_pag.py", "post_cfg_function"): Look.LEVEL,
    # tokens of a row are matched within it; what is drawn, all rows of a call share, as they do in
    # ComfyUI's own batch, and each step of a frame has a draw of its own either way
    ("comfy_extras/nodes_tomesd.py", "tomesd_m"): Look.ROWS,
    ("comfy_extras/nodes_tomesd.py", "tomesd_u"): Look.ROWS,
    ("comfy_extras/nodes_hypertile.py", "hypertile_in"): Look.ROWS,
    ("comfy_extras/nodes_hypertile.py", "hypertile_out"): Look.ROWS,
    # called for each place with that place's own levels (evaluate)
    ("comfy_extras/nodes_differential_diffusion.py", "forward"): Look.ROWS,
    ("comfy_extras/nodes_differential_diffusion.py", "<lambda>"): Look.ROWS,
}
# what is run of a part when it is called
_WAYS = frozenset({"forward", "_forward", "_conv_forward"})
_HOUSE = __name__.removesuffix("host.models.looks")  # what our modules' names begin with
_KNOWN_FOLDERS = ("comfy/weight_adapter/",)  # LoRA beside the weights instead of in them
# ComfyUI's own way from a guider to the model
SEAM = (
    "sampling_function", "cfg_function", "calc_cond_batch", "_calc_cond_batch",
    "get_area_and_mult",
)  # fmt: skip
# callbacks that come while sampling; the others are about loading and copying
_WHILE_SAMPLING = (
    CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_CLEANUP,
    CallbacksMP.ON_APPLY_HOOKS, CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES,
)  # fmt: skip
# parts of a model that say what its numbers mean, asked of the model at every level
_PLAIN_PARTS = ("model_sampling", "latent_format", "manual_cast_dtype")
_HUNG = ("wrappers", "callbacks")
# what ComfyUI and we write into transformer_options; anything else may steer the network
_WRITTEN = frozenset({
    "cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "prefetch_dynamic_vbars",
    "original_shape", "transformer_index", "block", "block_index", "activations_shape", PLACE,
    NEIGHBOURS, EXCHANGE, *_HUNG,
})  # fmt: skip
_CONDS = (
    comfy.conds.CONDRegular, comfy.conds.CONDNoiseShape, comfy.conds.CONDCrossAttn,
    comfy.conds.CONDConstant, comfy.conds.CONDList,
)  # fmt: skip
_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(comfy.samplers.__file__)))


def of_options(options: dict[str, Any]) -> Iterator[Found]:
    """What acts through model_options."""
    for name, value in options.items():
        if name == "transformer_options":
            yield from _of_transformer(value)
        elif name not in ("to_load_options", "registered_hooks"):
            # the same wrappers again; hooks are looked for in the conditioning
            yield from _each(value, name)


def of_patcher(patcher) -> Iterator[Found]:
    """What acts through a MODEL besides its options."""
    yield from _of_hung(patcher.wrappers, "wrappers")
    yield from _of_hung(patcher.callbacks, "callbacks")
    for injections in patcher.injections.values():
        for injection in injections:
            yield _look_of(injection.inject), "an injection into the model"
    for name in patcher.object_patches:
        if name not in _PLAIN_PARTS:
            yield Look.FRAME, f"a node has replaced the model's {name}"


def of_model(model) -> Iterator[Found]:
    """What a model does otherwise than ComfyUI's, and what a pack has put in ComfyUI's place."""
    for name in ("apply_model", "_apply_model"):
        if name in vars(model) or not file_of(getattr(type(model), name)).startswith("comfy/"):
            yield Look.FRAME, f"the model {type(model).__name__} has its own {name}"
    for name in SEAM:
        if file_of(getattr(comfy.samplers, name)) != "comfy/samplers.py":
            yield Look.FRAME, f"a pack has replaced ComfyUI's {name}"
    network = model.diffusion_model
    kind = type(network)
    if kind.__module__.startswith("comfy.") and not file_of(kind.forward).startswith("comfy/"):
        yield Look.FRAME, f"a pack has replaced {kind.__name__}.forward"
    for name, part in ("", network), *_parts(network):
        own = vars(part).get("forward")
        if own is not None:
            yield _look_of(own), f"{name or 'the network'} has a forward of its own"
        if part._forward_hooks or part._forward_pre_hooks:
            yield Look.FRAME, f"{name or 'the network'} has a hook on it"


def changed_part(network: torch.nn.Module) -> str:
    """The kind of a part that does not do what its class was written to, by a hook, a forward of
    its own or one put into its class; empty where there is none."""
    kinds = set()
    for part in network.modules():
        own = part._forward_hooks or part._forward_pre_hooks or not _WAYS.isdisjoint(vars(part))
        if own:
            return type(part).__name__
        kinds.add(type(part))
    return next((kind.__name__ for kind in kinds if not _as_written(kind)), "")


def _as_written(kind: type) -> bool:
    """Whether what a class does when it is called stands in the file of who defines it."""
    for name in _WAYS:
        owner = next((c for c in kind.__mro__ if name in vars(c)), None)
        if owner is None:
            continue
        code, module = _code(vars(owner)[name]), sys.modules.get(owner.__module__)
        file = getattr(module, "__file__", None)
        if code is None or file is None or _relative(code.co_filename) != _relative(file):
            return False
    return True


_known_parts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _parts(network: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """All modules below a network: walking them takes ten times as long as looking at them."""
    known = _known_parts.get(network)
    if known is None:
        known = [(name, part) for name, part in network.named_modules() if name]
        _known_parts[network] = known
    return known


def of_entry(entry: dict[str, Any]) -> Iterator[Found]:
    """What acts through an entry of a conditioning, processed or not."""
    if entry.get("hooks") is not None:
        # ComfyUI knows the hooks of the run that it samples, not those of frames in flight
        yield Look.FRAME, "the conditioning has hooks"
    control = entry.get("control")
    while control is not None:
        if type(control).__module__ != "comfy.controlnet":
            yield Look.FRAME, f"a ControlNet of another pack ({type(control).__name__})"
        if control.extra_hooks is not None:
            yield Look.FRAME, "a ControlNet has hooks"
        control = control.previous_controlnet
    for name, cond in entry.get("model_conds", {}).items():
        if type(cond) not in _CONDS:
            yield Look.FRAME, f"a conditioning of its own kind ({name}: {type(cond).__name__})"


def steering(options: dict[str, Any]) -> str:
    """What in the transformer_options of a call steers the network itself; empty for nothing."""
    for name, value in options.items():
        if name not in _WRITTEN and value is not None and value is not False and not _empty(value):
            kinds = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else ""
            return f"{name}{': ' + kinds if kinds else ''}"
    return ""


def replaced_part(patcher) -> str:
    """A part of the network that a node has replaced by another; empty for none."""
    parts = (name for name in patcher.object_patches if name.startswith("diffusion_model"))
    return next(parts, "")


def _empty(value: Any) -> bool:
    """True for a dict, list or tuple in which there is nothing, however nested."""
    if isinstance(value, dict):
        return all(_empty(v) for v in value.values())
    return isinstance(value, list | tuple) and not value


def most(found: Iterator[Found]) -> Found:
    """The one that looks at most; ROWS and "" where nothing is found."""
    return max(found, key=lambda one: one[0], default=(Look.ROWS, ""))


def _of_transformer(options: dict[str, Any]) -> Iterator[Found]:
    for kind in _HUNG:
        yield from _of_hung(options.get(kind, {}), kind)
    for name, value in options.items():
        if name not in _WRITTEN:
            yield from _each(value, f"transformer_options.{name}")


def _of_hung(hung: dict[str, dict[str, list]], kind: str) -> Iterator[Found]:
    """Wrappers or callbacks by type and key, but for our own that leave a row what it is, or mean
    to have frames help each other."""
    for name, by_key in hung.items():
        for key, functions in by_key.items():
            for function in functions:
                # another pack may have used a key of ours
                if key in (ENGINE, COUNT, COHERENCE) and _ours(function):
                    continue
                look = _look_of(function)
                if kind == "callbacks" and name not in _WHILE_SAMPLING:
                    look = Look.ROWS
                yield look, f"{named(function)} is wrapped around the model ({name})"


def _ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_HOUSE)


def _each(value: Any, name: str) -> Iterator[Found]:
    """Every function in nested dicts and lists; plain data acts through the model alone."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _each(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _each(inner, name)
    elif isinstance(value, torch.Tensor):
        yield Look.FRAME, f"a tensor in the model's options ({name})"
    elif value is not None and not isinstance(value, str | int | float | torch.dtype):
        yield _look_of(value), f"{named(value)} patches the model ({name})"


def _look_of(function: Any) -> Look:
    code = _code(function)
    if code is None:
        return Look.FRAME
    file = _relative(code.co_filename)
    if file.startswith(_KNOWN_FOLDERS):
        return Look.ROWS
    return _KNOWN.get((file, code.co_name), Look.FRAME)


def _code(function: Any) -> types.CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)  # of a bound method
    if not isinstance(function, types.FunctionType):
        function = getattr(type(function), "__call__", None)  # noqa: B004 the function is wanted
    return function.__code__ if isinstance(function, types.FunctionType) else None


@functools.lru_cache(1024)
def _relative(path: str) -> str:
    """A source file as seen from ComfyUI's folder, with forward slashes."""
    return os.path.relpath(os.path.realpath(path), _ROOT).replace(os.sep, "/")


def file_of(function: Any) -> str:
    """Where a function was written, from ComfyUI's folder; empty where nobody can tell."""
    code = _code(function)
    return "" if code is None else _relative(code.co_filename)


def named(thing: Any) -> str:
    return getattr(thing, "__qualname__", type(thing).__name__).replace(".<locals>", "")
