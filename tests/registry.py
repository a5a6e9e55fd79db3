"""ComfyUI's own node registry, and a node called with what its inputs are by default."""

import asyncio
import functools
import inspect

import families
import parts

KINDS = ("MODEL", "GUIDER", "CONDITIONING")


@functools.cache
def registry():
    """Every node of this ComfyUI by its id, API nodes left out, which need a server's answer."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return {
        name: node
        for name, node in nodes.NODE_CLASS_MAPPINGS.items()
        if not getattr(node, "RELATIVE_PYTHON_MODULE", "").startswith("comfy_api_nodes")
        and not name.startswith("Live")
    }


def outputs(node):
    """The kinds that a node gives."""
    return [str(kind) for kind in getattr(node, "RETURN_TYPES", None) or ()]


def concerned():
    """Ids of the nodes that give a MODEL, a GUIDER or CONDITIONING."""
    return {name for name, node in registry().items() if set(outputs(node)) & set(KINDS)}


def inputs(node, family, rows=(0,), given=None):
    """What a node is called with: defaults, first choices, stand-ins for what is wired.

    Args:
        given: inputs by name instead; a callable is called with (family, rows).

    Raises:
        KeyError: nothing stands in for a kind of link.
    """
    given = dict(given or {})
    values = {}  # in the node's own order, which merging by parts goes by
    for name, entry in node.INPUT_TYPES().get("required", {}).items():
        if name in given:
            value = given.pop(name)
            values[name] = value(family, rows) if callable(value) else value
            continue
        kind, options = entry[0], entry[1] if len(entry) > 1 else {}
        if isinstance(kind, list | tuple):
            choices = list(kind)
            values[name] = options.get("default", choices[0] if choices else "none")
        elif kind == "COMBO":
            values[name] = options.get("default", (options.get("options") or ["none"])[0])
        elif kind in ("FLOAT", "INT", "BOOLEAN", "STRING"):
            values[name] = options.get("default", "" if kind == "STRING" else 0)
        else:
            values[name] = parts.link(str(kind), family, name, rows)
    for name, value in given.items():
        values[name] = value(family, rows) if callable(value) else value
    return values


def call(node, values):
    """What a node gives, as a tuple."""
    function = getattr(node, node.FUNCTION) if _is_new(node) else getattr(node(), node.FUNCTION)
    if _is_new(node):
        function = node.execute
    out = function(**values)
    if inspect.isawaitable(out):
        out = asyncio.run(out)
    return tuple(getattr(out, "args", out))


def _is_new(node):
    return hasattr(node, "define_schema")


def plain(family, rows=(0,)):
    """The two sides of a prompt."""
    return (
        parts.conditioning(family, "positive", rows),
        parts.conditioning(family, "negative", rows),
    )


def model(family):
    return families.model(family).clone()
